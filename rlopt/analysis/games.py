"""Atari games on one scale: human-normalised scores, and their interquartile mean over games."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rlopt.analysis.curves import Curve
from rlopt.analysis.statistics import Array, bootstrap_interval, iqm
from rlopt.envs.atari.scores import ATARI_10, RANDOM_HUMAN, game_of
from rlopt.errors import RloptError

AnyCurve = TypeVar("AnyCurve", bound="Curve | PooledCurve")

_FRAMES = 4
"""Emulator frames of a step, unless the protocol's text tells another number."""
_CHANGED = re.compile(r"\bframeskip=(\d+)")


@dataclass(frozen=True)
class PooledCurve:
    """One name's human-normalised scores over several games played by one protocol."""

    name: str
    protocol: str | None
    games: tuple[str, ...]
    steps: NDArray[np.int64]
    """(T,) where every game has been evaluated."""
    scores: list[list[Array]]
    """For each step those of each game, (seeds,)."""

    @property
    def label(self) -> str:
        """Say of which games it is: those of different games are no more comparable than those of two protocols."""
        ten = set(self.games) == set(ATARI_10)
        games = "Atari-10" if ten else f"{len(self.games)} games"
        return ", ".join(["human-normalised", games, *([self.protocol] if self.protocol else [])])

    def band(self) -> Array:
        """Return (3, T): the interquartile mean over games and seeds and the ends of its 95 % bootstrap interval, which
        resamples seeds inside each game (Agarwal et al. 2021)."""
        return np.array([bootstrap_interval(each, iqm) for each in self.scores]).reshape(-1, 3).T


def human_normalised(curve: Curve) -> Curve | None:
    """Return the curve with 0 for random play and 1 for a human; None where its environment has no human score."""
    game = game_of(curve.env_id)
    if game is None:
        return None
    random, human = RANDOM_HUMAN[game]
    return replace(curve, scores=(curve.scores - random) / (human - random))


def pool_games(found: Iterable[Curve]) -> list[PooledCurve]:
    """Return what can be pooled: curves of one name and protocol on two games or more."""
    groups: dict[tuple[str, str | None], dict[str, Curve]] = {}
    for curve in found:
        if (own := human_normalised(curve)) is not None:
            groups.setdefault((curve.name, curve.protocol), {})[str(game_of(curve.env_id))] = own
    pooled = []
    for (name, protocol), games in groups.items():
        if len(games) < 2:
            continue
        first, *others = games.values()
        steps, scores = [], []
        for step in first.steps[first.common()].tolist():
            every = [curve.at(step) for curve in (first, *others)]
            if all(each is not None for each in every):
                steps.append(step)
                scores.append([each for each in every if each is not None])
        if steps:
            pooled.append(PooledCurve(name, protocol, tuple(games), np.array(steps, np.int64), scores))
    return pooled


def pooled_rows(pooled: Iterable[PooledCurve], steps: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Return each pooled curve at its last step, or at each of ``steps`` that it has, as rows like those of
    ``rlopt.analysis.plots.summary_rows``."""
    rows = []
    for curve in pooled:
        wanted = [int(curve.steps[-1])] if steps is None else [s for s in steps if s in curve.steps]
        for step in wanted:
            scores = curve.scores[int(np.flatnonzero(curve.steps == step)[0])]
            interval = bootstrap_interval(scores, iqm)
            row = {"env": curve.label, "name": curve.name, "step": step, "seeds": sum(map(len, scores))}
            row |= {"mean": float(np.concatenate(scores).mean()), "sd": math.nan}
            rows.append(row | {"iqm": interval.estimate, "low": interval.low, "high": interval.high})
    return rows


def in_frames(curve: AnyCurve) -> AnyCurve:
    """Return a curve of a game, or of several, over emulator frames instead of steps.

    Raises:
        RloptError: it is of no Atari game, or of one without a protocol, which alone says how many frames a step has.
    """
    if curve.protocol is None:
        name = curve.env_id if isinstance(curve, Curve) else curve.label
        raise RloptError(
            f"--frames counts an emulator's: {name} has none, or was played without env.protocol, which says how many "
            "a step has; leave it out"
        )
    changed = _CHANGED.search(curve.protocol)
    return replace(curve, steps=curve.steps * (int(changed[1]) if changed else _FRAMES))
