"""From names of teams (``mamujoco/HalfCheetah-2x3``, ``mpe/spread`` …) to what stands for a registration of them."""

from __future__ import annotations

from collections.abc import Callable

import gymnasium
from gymnasium.envs.registration import EnvSpec as GymSpec

from rlopt.envs.teams.partitions import SCENARIOS, SEGMENTED, divide, partitions

MAMUJOCO = "rlopt.envs.teams.mamujoco:MaMuJoCoEnv"
_FULL = "-full"


def team_spec(name: str) -> GymSpec | None:
    """Return what registering ``name`` would say, or None where its namespace is none of ours.

    Raises:
        RloptError: there is no such task in that namespace.
    """
    namespace, slash, task = name.partition("/")
    find = _NAMESPACES.get(namespace)
    return find(name, task) if slash and find is not None else None


def team_names() -> list[str]:
    """Return the names that ``rlopt list envs`` shows; more can be made by their pattern."""
    return [f"{namespace}/{task}" for namespace, tasks in _COMMON.items() for task in tasks()]


def _mamujoco(name: str, task: str) -> GymSpec:
    whole = task.removesuffix(_FULL)
    scenario, _, partition = whole.partition("-")
    divide(scenario, partition)
    single = gymnasium.registry[f"{scenario.removeprefix('ManySegment')}-v5"]
    kwargs = {"scenario": scenario, "partition": partition, "view": "full" if task != whole else "obsk"}
    return GymSpec(name, entry_point=MAMUJOCO, max_episode_steps=single.max_episode_steps, kwargs=kwargs)


def _mamujoco_names() -> list[str]:
    fixed = [f"{scenario}-{p}" for scenario in SCENARIOS if scenario not in SEGMENTED for p in partitions(scenario)]
    tasks = [*fixed, "ManySegmentAnt-2x3", "ManySegmentSwimmer-10x2"]
    return [task + view for task in tasks for view in ("", _FULL)]


_NAMESPACES: dict[str, Callable[[str, str], GymSpec]] = {"mamujoco": _mamujoco}
_COMMON: dict[str, Callable[[], list[str]]] = {"mamujoco": _mamujoco_names}
