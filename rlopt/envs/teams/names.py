"""From names of teams (``mamujoco/HalfCheetah-2x3``, ``mpe/spread`` …) to what stands for a registration of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec as GymSpec

from rlopt.config import hint
from rlopt.envs.teams.partitions import divide
from rlopt.types import RloptError

MAMUJOCO = "rlopt.envs.teams.mamujoco:MaMuJoCoEnv"
PETTINGZOO = "rlopt.envs.teams.pettingzoo:PettingZooEnv"
MPE = "rlopt.envs.teams.particles:MpeEnv"
OPPONENT = "rlopt.envs.teams.opponents:OpponentEnv"
VMAS = "rlopt.envs.teams.vmas:VmasEnv"
FORAGING = "rlopt.envs.teams.lbforaging:ForagingEnv"
SMAC = "rlopt.envs.teams.smac:SmacEnv"
TWO_ROOMS, _TWO_ROOMS = "two_rooms", "rlopt.envs.teams.two_rooms:TwoRooms"
_FULL = "-full"


def team_spec(name: str) -> GymSpec | None:
    """Return what registering ``name`` would say, or None where its namespace is none of ours.

    Raises:
        RloptError: there is no such task in that namespace.
    """
    if name == TWO_ROOMS:
        return GymSpec(name, entry_point=_TWO_ROOMS, max_episode_steps=20)
    namespace, slash, task = name.partition("/")
    find = _NAMESPACES.get(namespace)
    return find(name, task) if slash and find is not None else None


def _mamujoco(name: str, task: str) -> GymSpec:
    whole = task.removesuffix(_FULL)
    scenario, _, partition = whole.partition("-")
    divide(scenario, partition)
    single = gymnasium.registry[f"{scenario.removeprefix('ManySegment')}-v5"]
    kwargs = {"scenario": scenario, "partition": partition, "view": "full" if task != whole else "obsk"}
    return GymSpec(name, entry_point=MAMUJOCO, max_episode_steps=single.max_episode_steps, kwargs=kwargs)


def one_name(name: str, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the id and keywords of an environment with MaMuJoCo's ``view`` told by the id alone: tables are by id, and
    returns of the two views are of different tasks.

    Raises:
        RloptError: the id says another view.
    """
    rest = {key: value for key, value in kwargs.items() if key != "view"}
    whole, view = name.removesuffix(_FULL), kwargs.get("view")
    if not name.startswith("mamujoco/") or view not in ("obsk", "full"):
        return name, dict(kwargs)
    if view == "obsk" and name != whole:
        raise RloptError(f"env.view=obsk: {name} is the view of HARL; write env={whole}")
    return (whole + _FULL if view == "full" else whole), rest


_MPE = {
    "spread": ("simple_spread_v3", "Spread"),
    "reference": ("simple_reference_v3", "Reference"),
    "speaker_listener": ("simple_speaker_listener_v4", "SpeakerListener"),
}
"""Tasks of MPE: mpe2's module, and the class of ``rlopt.envs.teams.mpe`` that is the same in torch."""
_SIDES = {"tag": ("simple_tag_v3", "adversary"), "adversary": ("simple_adversary_v3", "agent")}
"""Those with two sides: mpe2's module, and whom the team is by default."""
_CONTINUOUS, _DISCRETE = "-continuous", "-discrete"


def _mpe(name: str, task: str) -> GymSpec:
    base = task.removesuffix(_CONTINUOUS)
    if base not in _MPE and base not in _SIDES:
        raise RloptError(f"env={name}: MPE has no task {base!r}; {hint(base, [*_MPE, *_SIDES])}")
    module, team = _SIDES[base] if base in _SIDES else (_MPE[base][0], "")
    # The time limit is Gymnasium's, so that there is one only.
    own = {"continuous_actions": task != base, "max_cycles": 2**31}
    kwargs = {"module": f"mpe2.{module}", "alive": False, "joined_state": True, **own}
    if team:
        return GymSpec(name, entry_point=OPPONENT, max_episode_steps=25, kwargs={**kwargs, "team": team})
    return GymSpec(name, entry_point=MPE, max_episode_steps=25, kwargs=kwargs)


_LBF = re.compile(r"(?:(\d+)s-)?(\d+)x(\d+)-(\d+)p-(\d+)f(-coop)?")


def _lbf_task(task: str) -> dict[str, Any] | None:
    match = _LBF.fullmatch(task)
    if match is None or match[2] != match[3]:
        return None
    size = int(match[2])
    numbers = {"size": size, "players": int(match[4]), "foods": int(match[5]), "sight": int(match[1] or size)}
    return {**numbers, "coop": match[6] is not None}


def _lbf(name: str, task: str) -> GymSpec:
    kwargs = _lbf_task(task)
    if kwargs is None:
        raise RloptError(
            f"env={name}: write lbf/SIZExSIZE-PLAYERSp-FOODSf, as lbf/8x8-2p-2f-coop, with 2s- before it for players "
            "that see no farther than 2 cells"
        )
    return GymSpec(name, entry_point=FORAGING, max_episode_steps=50, kwargs=kwargs)


def _vmas(name: str, task: str) -> GymSpec:
    base = task.removesuffix(_DISCRETE)
    kwargs = {"scenario": base, "continuous_actions": task == base}
    return GymSpec(name, entry_point=VMAS, max_episode_steps=100, kwargs=kwargs)


def _smac(name: str, task: str) -> GymSpec:
    if not task:
        raise RloptError(f"env={name}: name a map, as smac/3m or smacv2/terran_5_vs_5")
    # The time limit is the game's, and each map's own.
    return GymSpec(name, entry_point=SMAC, kwargs={"game": name.partition("/")[0], "map_name": task})


def twin(name: str) -> tuple[str, dict[str, Any]] | None:
    """Return the ``TorchEnv`` that is the same as the team ``name``, as ``module:Class`` with keywords; None where
    there is none."""
    if name == TWO_ROOMS:
        return _TWO_ROOMS, {}
    namespace, _, task = name.partition("/")
    base = task.removesuffix(_CONTINUOUS)
    if namespace == "mpe" and base in _MPE:
        return f"rlopt.envs.teams.mpe:{_MPE[base][1]}", {"continuous_actions": task != base}
    if namespace == "lbf" and (kwargs := _lbf_task(task)) is not None:
        return "rlopt.envs.teams.lbf:Foraging", kwargs
    return None


def pettingzoo_spec(name: str, module: str) -> GymSpec:
    """Return what stands for a registration of ``pettingzoo:module``.

    Raises:
        RloptError: no module is named.
    """
    if not module:
        raise RloptError(f"env={name}: name the module, as pettingzoo:mpe2.simple_spread_v3")
    return GymSpec(name, entry_point=PETTINGZOO, kwargs={"module": module})


_NAMESPACES: dict[str, Callable[[str, str], GymSpec]] = {
    "mamujoco": _mamujoco, "mpe": _mpe, "lbf": _lbf, "vmas": _vmas, "smac": _smac, "smacv2": _smac,
}  # fmt: skip
