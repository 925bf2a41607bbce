"""Sets that bound each probability by itself: intervals, the L∞ ball, and R-contamination, which is an interval too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlopt.robust.sets.ambiguity import Ambiguity
from rlopt.robust.simplex import project_box
from rlopt.types import RloptError


class Interval(Ambiguity):
    """(s,a)-rectangular: low ≤ p_sa ≤ high (Givan, Leach and Dean 2000), on the support.

    Args:
        low, high: (S,), (S, A, S) or (K, S, A, S), or a number; the nominal kernel must lie between.
    """

    def __init__(self, low: Any, high: Any) -> None:
        self.given = (low, high)

    def _spread(self) -> None:
        low, high = (self.kernel.pick(x) for x in self.given)
        self._set(low, high)

    def _set(self, low: Tensor, high: Tensor) -> None:
        p = self.kernel.probabilities
        if bool(((p < low - 1e-12) | (p > high + 1e-12)).any()):
            raise RloptError("the nominal kernel lies outside its interval set; give low ≤ kernel ≤ high")
        self.low, self.high = low.clamp(min=0.0).minimum(p), high.clamp(max=1.0).maximum(p) * self.kernel.mask

    @property
    def radius(self) -> Tensor:
        """(K, S, A) the widest distance from the nominal row in any coordinate."""
        p = self.kernel.probabilities
        return torch.maximum(p - self.low, self.high - p).amax(-1)

    def worst(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Start from the lower ends and fill up the largest z first."""
        order = z.masked_fill(~self.kernel.mask, -torch.inf).argsort(-1, descending=True)
        room = (self.high - self.low).gather(-1, order)
        left = 1.0 - self.low.sum(-1, keepdim=True)
        added = (left - (room.cumsum(-1) - room)).clamp(min=0.0).minimum(room)
        rows = self.low.scatter_add(-1, order, added)
        return (rows * z.masked_fill(~self.kernel.mask, 0.0)).sum(-1), rows

    def project(self, y: Tensor) -> Tensor:
        return project_box(y, self.low, self.high)

    def excess(self, rows: Tensor) -> Tensor:
        return torch.maximum(self.low - rows, rows - self.high).amax(-1)


class LInf(Interval):
    """(s,a)-rectangular: max_i |p_sa,i - p̂_sa,i| ≤ κ_sa on the support. ``radius``: a number, (S, A) or (K, S, A)."""

    def __init__(self, radius: Any) -> None:
        self.given_radius = radius

    def _spread(self) -> None:
        p, r = self.kernel.probabilities, self.per_row(self.given_radius, "radius")[..., None]
        self._set((p - r).clamp(min=0.0), (p + r) * self.kernel.mask)


class Contamination(Interval):
    """(s,a)-rectangular: (1 - R) p̂ + R q with any q on the support (Huber 1965; Wang and Zou 2022, 2205.07344).

    The same as p ≥ (1 - R) p̂, so the worst row is (1 - R) p̂ + R·1{argmax z}. ``fraction``: R as a number, (S, A) or
    (K, S, A), at most 1.
    """

    def __init__(self, fraction: Any) -> None:
        self.given_fraction = fraction

    def _spread(self) -> None:
        r = self.per_row(self.given_fraction, "fraction", high=1.0)[..., None]
        p = self.kernel.probabilities
        self._set((1.0 - r) * p, torch.ones_like(p) * self.kernel.mask)
