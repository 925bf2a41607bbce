"""Learning curves: one agent on one environment, all seeds on one axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlopt.analysis.statistics import Array

WINDOW = 50_000
"""Width in steps of ``Curve.window``: ten evaluations where one comes every 5000 steps."""


@dataclass(frozen=True)
class Curve:
    """Mean evaluation returns of several seeds."""

    name: str
    env_id: str
    steps: NDArray[np.int64]
    """(T,) increasing, environment steps."""
    scores: Array
    """(T, seeds) mean evaluation return, undiscounted; NaN where a seed has no evaluation at that step."""
    agent: str = "sac"
    """Whose published curves it is seen beside."""
    protocol: str | None = None
    """How an Atari game was played."""
    spread: Array | None = None
    """(T, 2) of a single seed, the ends of the 95 % interval of its mean over the episodes of each evaluation."""

    def interval_at(self, step: int) -> Array | None:
        """Return (2,) a single seed's interval over episodes at the evaluation nearest to ``step``, where it is
        known."""
        if self.spread is None or self.at(step) is None:
            return None
        return np.asarray(self.spread[int(np.argmin(np.abs(self.steps - step)))])

    def at(self, step: int) -> Array | None:
        """Return (seeds',) scores of the evaluation nearest to ``step``, of those seeds that have it.

        None where the curve does not reach: the nearest one is further off than half the curve's widest spacing.
        """
        if not len(self.steps):
            return None
        inside = min(max(step, int(self.steps[0])), int(self.steps[-1]))  # int64, whatever was asked for
        nearest = int(np.argmin(np.abs(self.steps - inside)))
        spacing = int(np.diff(self.steps).max()) if len(self.steps) > 1 else 0
        if abs(int(self.steps[nearest]) - step) > spacing / 2:
            return None
        row = self.scores[nearest]
        row = row[~np.isnan(row)]
        return row if len(row) else None

    def window(self, step: int, width: int = WINDOW) -> Array | None:
        """Return (seeds',) each seed's mean over its evaluations in (step - width, step], which evens out their noise.

        None where the curve does not reach ``step``, and without seeds that have not got there. That of the untrained
        policy (step 0) does not count.
        """
        if self.at(step) is None:
            return None
        inside = (self.steps > max(step - width, 0)) & (self.steps <= step)
        if not inside.any():
            return None
        nearest = int(np.argmin(np.abs(self.steps - step)))
        block = self.scores[inside][:, ~np.isnan(self.scores[nearest])]
        return np.asarray(np.nanmean(block, axis=0)) if block.shape[1] and not np.isnan(block).all(0).any() else None

    def common(self) -> NDArray[np.bool_]:
        """Return (T,) where every seed was evaluated."""
        return np.asarray(~np.isnan(self.scores).any(axis=1))


def merge(name: str, env_id: str, seeds: Sequence[tuple[Sequence[int], Sequence[float]]], agent: str = "sac") -> Curve:
    """Return one curve from each seed's (steps, scores), on the union of their steps."""
    steps = np.array(sorted({int(s) for own, _ in seeds for s in own}), dtype=np.int64)
    scores = np.full((len(steps), len(seeds)), np.nan)
    for column, (own, values) in enumerate(seeds):
        scores[np.searchsorted(steps, np.asarray(own, dtype=np.int64)), column] = values
    return Curve(name, env_id, steps, scores, agent)
