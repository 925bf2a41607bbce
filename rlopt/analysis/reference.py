"""Published results that rlopt's own are drawn and tabled beside, per seed: SAC, TD3 and PPO on the MuJoCo tasks, and
Dopamine's agents on Atari.

The numbers lie in ``data/``, whose README gives repository, path, commit and processing of each file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
from numpy.typing import ArrayLike

from rlopt.analysis.curves import Curve
from rlopt.analysis.statistics import Array, normalise
from rlopt.envs.atari.scores import compact
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
_DOPAMINE = (
    "google/dopamine baselines/atari/data/<game>_CNN.json @ 5873f5494ee0c2d7c016d0ab2ad530354fec59d0",
    "atari_dopamine.csv",
)


def beside(own: Sequence[Curve]) -> list[PublishedCurve]:
    """Return the published curves that ``own``, which are all of one environment, are seen beside."""
    protocols = dict.fromkeys(curve.protocol for curve in own)
    agents = [curve.agent for curve in own]
    return [curve for protocol in protocols for curve in reference(own[0].env_id, agents, protocol)]


def reference(env_id: str, agents: Iterable[str] = ("sac",), protocol: str | None = None) -> list[PublishedCurve]:
    """Return the published curves of these agents' algorithms comparable with ``env_id``; empty where none is known.

    On MuJoCo to 1 000 000 steps; an agent whose own algorithm has no curve there is seen beside SAC's.
    ``HalfCheetah-v2``, ``-v3`` and ``-v4`` all get the v3 and v4 curves; v5 only where its rewards are the same.

    On Atari to 50 000 000 steps (200M frames), returns of training as Dopamine has them, for games that are played by
    its ``protocol``: scores of two protocols are not comparable.
    """
    agents = list(agents)
    if protocol == "dopamine":
        return [curve for curve in _games().get(compact(env_id), ()) if curve.algorithm in agents]
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
        rows = _rows(file)
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


@cache
def _games() -> dict[str, list[PublishedCurve]]:
    """Return Dopamine's curves by game, without the underscores of its name."""
    source, file = _DOPAMINE
    blocks: dict[tuple[str, str], list[list[str]]] = {}
    for game, algorithm, *numbers in _rows(file):
        blocks.setdefault((game, algorithm), []).append(numbers)
    found: dict[str, list[PublishedCurve]] = {}
    for (game, algorithm), rows in blocks.items():
        block = np.array([[x or "nan" for x in row] for row in rows], dtype=np.float64)
        name = f"Dopamine {algorithm} ({block.shape[1] - 1} seeds, training returns)"
        curve = PublishedCurve(
            name, f"ALE/{game}", block[:, 0].astype(np.int64), block[:, 1:], algorithm, "dopamine",
            source=source, algorithm=algorithm,
        )  # fmt: skip
        found.setdefault(game.replace("_", ""), []).append(curve)
    return found


def _rows(file: str) -> list[list[str]]:
    lines = (files("rlopt.analysis") / "data" / file).read_text(encoding="utf-8").split()
    return [line.split(",") for line in lines[1:]]
