"""Published results that rlopt's own are drawn and tabled beside: SAC, TD3 and PPO on the MuJoCo tasks, per seed.

The numbers lie in ``data/``, whose README gives repository, path, commit and processing of each file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
from numpy.typing import ArrayLike

from rlopt.analysis.curves import Curve
from rlopt.analysis.statistics import Array, normalise
from rlopt.errors import RloptError

TD3_NORMALISATION = {
    "HalfCheetah": (-289.415, 10574.0),
    "Hopper": (18.791, 3226.0),
    "Walker2d": (2.791, 3946.0),
    "Ant": (-70.288, 3942.0),
    "Humanoid": (120.423, 5165.0),
}
"""Task: return of a random policy, return of TD3 (``DAVIAN-Robotics/SimbaV2``, ``scale_rl/envs/mujoco.py``)."""

SAME_REWARDS_IN_V5 = frozenset({"HalfCheetah", "Swimmer"})
"""v2, v3 and v4 are comparable. v5 changed the rewards or the model of the others, so nothing is shown beside those."""


@dataclass(frozen=True)
class PublishedCurve(Curve):
    """A published curve; ``env_id`` is the version that was published, which may differ from the one asked for."""

    source: str = ""
    """Repository, path and commit."""
    algorithm: str = "sac"


_SOURCES = (
    (
        "sac",
        "Tianshou SAC",
        "sac_tianshou_v3.csv",
        "thu-ml/tianshou examples/mujoco/benchmark/<env>/sac/test_rew_10seeds.csv"
        " @ beab227d14950610f459174670e8be77f788638a",
    ),
    (
        "sac",
        "SimbaV2-repository SAC",
        "sac_simbav2_v4.csv",
        "DAVIAN-Robotics/SimbaV2 results/baseline/sac.csv @ 86899c277cdc697b2b02d827243de1ea93f20a1d",
    ),
    (
        "td3",
        "Tianshou TD3",
        "td3_tianshou_v3.csv",
        "thu-ml/tianshou examples/mujoco/benchmark/<env>/td3/test_rew_10seeds.csv"
        " @ beab227d14950610f459174670e8be77f788638a",
    ),
    (
        "td3",
        "authors' TD3",
        "td3_authors_v2.csv",
        "LQNew/Continuous_Control_Benchmark MuJoCo-1M fujimoto_TD3 @ 205ceb76dbc2dda00121da2354a4ebe221a9e9d0",
    ),
    (
        "ppo",
        "FlashSAC-repository PPO",
        "ppo_flashsac_v4.csv",
        "Holiday-Robot/FlashSAC results/stateRL_cpusim @ 87edc9061150ae9e962dd84e6544e27a1554b3ab",
    ),
)

_ALGORITHMS = frozenset(algorithm for algorithm, *_ in _SOURCES)


def reference(env_id: str, agents: Iterable[str] = ("sac",)) -> list[PublishedCurve]:
    """Return the published curves of these agents' algorithms comparable with ``env_id``, to 1 000 000 steps; empty
    where none is known.

    An agent whose own algorithm has no curve here is seen beside SAC's.

    ``HalfCheetah-v2``, ``-v3`` and ``-v4`` all get the v3 and v4 curves; v5 only where its rewards are the same.
    """
    task, _, version = env_id.rpartition("-")
    if version not in ("v2", "v3", "v4") and not (version == "v5" and task in SAME_REWARDS_IN_V5):
        return []
    wanted = {agent if agent in _ALGORITHMS else "sac" for agent in agents}
    return [curve for curve in _all() if curve.env_id.rpartition("-")[0] == task and curve.algorithm in wanted]


def td3_normalised(env_id: str, score: ArrayLike) -> Array:
    """Return returns on a scale where a random policy is 0 and TD3 is 1.

    Raises:
        RloptError: the task has no published anchors.
    """
    task = env_id.rpartition("-")[0]
    if task not in TD3_NORMALISATION:
        raise RloptError(f"{env_id} has no TD3 normalisation; those that have are {', '.join(TD3_NORMALISATION)}")
    return normalise(score, *TD3_NORMALISATION[task])


@cache
def _all() -> tuple[PublishedCurve, ...]:
    curves = []
    for algorithm, name, file, source in _SOURCES:
        lines = (files("rlopt.analysis") / "data" / file).read_text(encoding="utf-8").split()
        rows = [line.split(",") for line in lines[1:]]
        for env_id in dict.fromkeys(row[0] for row in rows):
            block = np.array([row[1:] for row in rows if row[0] == env_id], dtype=np.float64)
            curves.append(
                PublishedCurve(
                    name=f"{name} ({env_id.rpartition('-')[2]}, {block.shape[1] - 1} seeds)",
                    env_id=env_id,
                    steps=block[:, 0].astype(np.int64),
                    scores=block[:, 1:],
                    source=source,
                    algorithm=algorithm,
                )
            )
    return tuple(curves)
