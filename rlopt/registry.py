"""What can be named: agents and samplers by name, and what installed distributions add through entry points.

Names map to ``module:attribute`` text, imported when used. Packages outside rlopt add to them by an entry point of the
groups below, or programs by ``register_agent``, ``register_sampler`` and ``register_loop``. A checkpoint, a policy or a
configuration file only ever names what is registered; none of them can name a class to import.

An agent's name may stand for a class and presets, ``(target, {"agent": {…}, "buffer": {…}})``: options that hold where
neither a file nor the user gives others. ``agent=NAME`` is then the same on the command line and from Python, and what
runs, tables and plots call it.

Entry-point groups: ``rlopt.agents``, ``rlopt.samplers`` and ``rlopt.loops`` (name = class), ``rlopt.networks`` and
``rlopt.envs`` (a module that registers when imported, or a function called once), ``rlopt.configs`` (a package with
config groups).
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

Target = str | type[Any]
Presets = Mapping[str, Mapping[str, Any]]
Entry = Target | tuple[Target, Presets]

DQN = "rlopt.agents.dqn:DQN"
C51 = {"values": "categorical", "learning_rate": 2.5e-4, "optimiser": {"epsilon": 3.125e-4}}
DDQN_LAP = {
    "double": True,
    "epsilon_steps": 1_000_000,
    "target_counts": "updates",
    "td_loss": "huber",
    "td_threshold": 0.01,
    "optimiser": {"name": "rmsprop", "beta2": 0.95, "epsilon": 1e-5},
}
QR_DQN = {"values": "quantile", "learning_rate": 5e-5, "optimiser": {"epsilon": 3.125e-4}}
RAINBOW = {
    "values": "categorical", "double": True, "dueling": True, "noisy": 0.5, "n_step": 3,
    "epsilon_start": 0.0, "epsilon_end": 0.0, "evaluation_epsilon": 0.0,
}  # fmt: skip
QMIX = "rlopt.agents.teams.qmix:QMIX"
AGENTS: dict[str, Entry] = {
    "iql": (QMIX, {"agent": {"mixer": "none"}}),
    "vdn": (QMIX, {"agent": {"mixer": "sum"}}),
    "qmix": QMIX,
    "mansa": "rlopt.agents.teams.mansa:MANSA",
    "sac": "rlopt.agents.sac:SAC",
    "sac_2018": "rlopt.agents.sac_2018:SAC2018",
    "sac_discrete": "rlopt.agents.sac_discrete:DiscreteSAC",
    "ppo": "rlopt.agents.ppo:PPO",
    "td3": "rlopt.agents.td3:TD3",
    "hasac": "rlopt.agents.teams.hasac:HASAC",
    "masac": "rlopt.agents.teams.hasac:MASAC",
    "isac": "rlopt.agents.teams.independent:ISAC",
    "ippo": "rlopt.agents.teams.mappo:IPPO",
    "mappo": "rlopt.agents.teams.mappo:MAPPO",
    "happo": "rlopt.agents.teams.mappo:HAPPO",
    "hatd3": "rlopt.agents.teams.hatd3:HATD3",
    "matd3": "rlopt.agents.teams.hatd3:MATD3",
    "dqn": DQN,
    "c51": (DQN, {"agent": C51}),
    "ddqn_lap": (DQN, {"agent": DDQN_LAP, "buffer": {"name": "lap", "alpha": 0.6, "floor": 0.01}}),
    "qr_dqn": (DQN, {"agent": QR_DQN}),
    "rainbow": (DQN, {"agent": RAINBOW, "buffer": {"name": "prioritized", "alpha": 0.5}}),
    "reinforce": "rlopt.agents.reinforce:Reinforce",
    "gigpo": "rlopt.agents.gigpo:GiGPO",
    "gigpo_llm": "rlopt.agents.gigpo_llm:GiGPOLLM",
    "value_iteration": "rlopt.agents.value_iteration:ValueIteration",
    "drpg": "rlopt.agents.robust_solvers:DRPG",
    "drpg_deep": "rlopt.agents.drpg_deep:DeepDRPG",
    "drpg_deep_discrete": "rlopt.agents.drpg_deep:DiscreteDeepDRPG",
    "robust_value_iteration": "rlopt.agents.robust_solvers:RobustValueIteration",
    "robust_modified_policy_iteration": "rlopt.agents.robust_solvers:RobustModifiedPolicyIteration",
    "partial_policy_iteration": "rlopt.agents.robust_solvers:PartialPolicyIteration",
    "robust_mirror_descent": "rlopt.agents.robust_solvers:RobustMirrorDescent",
}
SAMPLERS: dict[str, Entry] = {
    "uniform": "rlopt.buffers.samplers.base:UniformSampler",
    "distinct": "rlopt.buffers.samplers.base:DistinctSampler",
    "reshuffled": "rlopt.buffers.samplers.reshuffled:ReshuffledSampler",
    "prioritized": "rlopt.buffers.samplers.prioritized:PrioritizedSampler",
    "lap": "rlopt.buffers.samplers.prioritized:LAPSampler",
    "prioritized_reshuffled": "rlopt.buffers.samplers.prioritized_reshuffled:PrioritizedReshuffledSampler",
    "hindsight": "rlopt.buffers.samplers.hindsight:HindsightSampler",
}
LOOPS: dict[str, Entry] = {
    "replay": "rlopt.loops.replay:ReplayLoop",
    "robust": "rlopt.loops.robust:RobustLoop",
    "rollout": "rlopt.loops.rollout:RolloutLoop",
    "group": "rlopt.loops.group:GroupLoop",
    "text": "rlopt.loops.text:TextLoop",
    "solver": "rlopt.loops.solver:SolverLoop",
}


_MAMUJOCO = {
    "Ant": "2x4 2x4d 4x2 8x1", "HalfCheetah": "2x3 3x2 6x1", "Hopper": "3x1", "Humanoid": "9_8 17x1",
    "HumanoidStandup": "9_8 17x1", "ManySegmentAnt": "2x3", "ManySegmentSwimmer": "10x2", "Pusher": "3p 7x1",
    "Reacher": "2x1", "Swimmer": "2x1", "Walker2d": "2x3 3x2 6x1",
}  # fmt: skip
_SIDES = "; env.team plays (agent, adversary), env.opponent the others (scripted, or a run's folder)"
_LBF = "8x8-2p-2f-coop 2s-8x8-2p-2f-coop 10x10-3p-3f 2s-10x10-3p-3f 15x15-3p-5f 15x15-4p-3f 15x15-4p-5f"
TEAMS: dict[str, str] = {
    **{
        f"mamujoco/{task}-{part}{view}": f"MaMuJoCo{', the view of HARL' if view else ''} (extra marl)"
        for task, parts in _MAMUJOCO.items()
        for part in parts.split()
        for view in ("", "-full")
    },
    **{
        f"mpe/{task}{actions}": f"particles (MPE), {actions[1:] or 'discrete'} actions{sides}"
        for tasks, sides in (("spread reference speaker_listener", ""), ("tag adversary", _SIDES))
        for task in tasks.split()
        for actions in ("", "-continuous")
    },
    **{f"lbf/{task}": "level-based foraging, any SIZExSIZE-PLAYERSp-FOODSf[-coop]" for task in _LBF.split()},
    **{f"vmas/{task}": "a scenario of VMAS (extra vmas)" for task in ("balance", "navigation", "transport")},
    **{f"smac/{task}": "StarCraft II, any map of SMAC (package and game of its makers)" for task in ("3m", "MMM2")},
    "smacv2/terran_5_vs_5": "StarCraft II, any RACE_UNITS_vs_ENEMIES of SMACv2 (package and game of its makers)",
    "two_rooms": "a matrix game per step, in two rooms of which one needs coordination",
    "pettingzoo:MODULE": "any parallel environment of PettingZoo, by its module",
}
"""Environments of several agents that are found by a pattern of names: what `rlopt list envs` says of them."""


def register_agent(name: str, target: Target, presets: Presets | None = None) -> None:
    """Make ``agent=name`` available: an agent class, or ``module:Class`` text imported when first used, and ``presets``
    of the groups ``agent`` and ``buffer``."""
    if unknown := set(presets or ()) - {"agent", "buffer"}:
        raise ValueError(f"presets of an agent are of the groups agent and buffer, not {', '.join(sorted(unknown))}")
    _register("agent", name, (target, presets) if presets else target, AGENTS, "rlopt.agents")


def register_sampler(name: str, target: Target) -> None:
    """Make ``buffer=name`` available: a sampler class, or ``module:Class`` text imported when first used."""
    _register("sampler", name, target, SAMPLERS, "rlopt.samplers")


def register_loop(name: str, target: Target) -> None:
    """Make ``loop = name`` available to agents: a ``rlopt.loops.base.Loop`` class, or ``module:Class`` text imported
    when first used."""
    _register("loop", name, target, LOOPS, "rlopt.loops")


def agent_names() -> list[str]:
    """Return every agent that ``get_agent`` knows."""
    return sorted({*AGENTS, *_entry_points("rlopt.agents")})


def sampler_names() -> list[str]:
    """Return every sampler that ``get_sampler`` knows."""
    return sorted({*SAMPLERS, *_entry_points("rlopt.samplers")})


def get_agent(name: str) -> Any:
    """Return the agent class called ``name``. Raises RloptError, with the nearest right name, where there is none."""
    return _get("agent", name, AGENTS, "rlopt.agents")


def agent_presets(name: str) -> dict[str, Any]:
    """Return the options that the agent called ``name`` presets, by group; none of an unknown one."""
    entry, points = AGENTS.get(name), _entry_points("rlopt.agents")
    if entry is None and name in points:
        try:
            entry = points[name].load()
        except (ImportError, AttributeError):  # what does not import says so where it is used
            return {}
    return copy.deepcopy(dict(entry[1])) if isinstance(entry, tuple) else {}


def get_sampler(name: str) -> Any:
    """Return the sampler class called ``name``. Raises RloptError, with the nearest right name, where there is none."""
    return _get("sampler", name, SAMPLERS, "rlopt.samplers")


def get_loop(name: str) -> Any:
    """Return the loop class called ``name``. Raises RloptError, with the nearest right name, where there is none."""
    return _get("loop", name, LOOPS, "rlopt.loops")


def target_text(name: str, table: dict[str, Entry], group: str) -> str:
    """Return where a registered name leads, as ``module:attribute`` text, without importing it."""
    target = _target(table.get(name))
    if target is None:
        return _entry_points(group)[name].value
    return target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"


@cache
def load_extensions() -> None:
    """Import what installed distributions add to the networks and environments; done once per process."""
    for group in ("rlopt.networks", "rlopt.envs"):
        for point in _entry_points(group).values():
            loaded = _load(point)
            if isinstance(loaded, Callable):  # type: ignore[arg-type]
                loaded()


def config_packages() -> dict[str, str]:
    """Return packages that bring config groups, as {entry point name: importable package}."""
    return {name: point.value for name, point in _entry_points("rlopt.configs").items()}


def _target(entry: Entry | None) -> Target | None:
    return entry[0] if isinstance(entry, tuple) else entry


def _register(kind: str, name: str, target: Entry, table: dict[str, Entry], group: str) -> None:
    known = table.get(name)
    if (known is not None and known != target) or name in _entry_points(group):
        from rlopt.types import RloptError

        where = target_text(name, table, group)
        raise RloptError(f"a {kind} called {name!r} is registered already ({where}); choose another name")
    table[name] = target


def _get(kind: str, name: str, table: dict[str, Entry], group: str) -> Any:
    from rlopt.config import hint
    from rlopt.types import RloptError

    target = _target(table.get(name))
    if isinstance(target, type):
        return target
    if isinstance(target, str):
        module, _, attribute = target.partition(":")
        return getattr(importlib.import_module(module), attribute)
    points = _entry_points(group)
    if name in points:
        return _target(_load(points[name]))
    raise RloptError(f"no {kind} is called {name!r}; {hint(name, sorted({*table, *points}))}")


@cache
def _entry_points(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in _every_entry_point().select(group=group)}


@cache
def _every_entry_point() -> Any:
    """Return those of all installed distributions, whose files take a while to read: once for every group."""
    return entry_points()


def _load(point: EntryPoint) -> Any:
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        from rlopt.types import RloptError

        owner = point.dist.name if point.dist is not None else "a package"
        message = f"{owner} offers {point.name} ({point.group}) as {point.value}, which does not import: {error}"
        raise RloptError(" ".join(message.split())) from error


def register_games(name: str) -> None:
    """Let the package register its environments with Gymnasium whose names begin or end like ``name``, where such a
    package does not do so by itself.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    import gymnasium

    if name.startswith("ALE/") or "NoFrameskip-v" in name:
        gymnasium.register_envs(importlib.import_module("ale_py"))
    elif name.lower().startswith("minatar/") and "MinAtar/Breakout-v1" not in gymnasium.registry:
        importlib.import_module("minatar.gym").register_envs()
    elif name.startswith(("MiniGrid-", "BabyAI-")):
        importlib.import_module("minigrid")  # which registers when it is imported
