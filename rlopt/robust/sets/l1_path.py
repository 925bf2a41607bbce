"""What an L1 budget buys: the concave piecewise linear function g(ξ) = max {p·z : Σ w_i |p_i - p̂_i| ≤ ξ} of every row.

Mass flows from the successors of the smallest z to that of the largest. Unweighted, the receiver is fixed and the
donors come in the order of z, so the breakpoints are a sort and a cumulative sum (the homotopy of Ho, Petrik and
Wiesemann 2018, "Fast Bellman Updates for Robust MDPs"). With weights the path is followed in the price λ of the budget:
at λ the receiver is argmax_i z_i - λ w_i, and i gives everything it has as soon as z_i + λ w_i lies below that maximum.
Both kinks are at ratios of differences, found in closed form from all pairs: O(B²) memory per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from rlopt.robust.kernel import Kernel


class Path(ABC):
    """The breakpoints of g for every row."""

    budget: Tensor
    """(K, S, A, M) ascending from 0."""
    value: Tensor
    """(K, S, A, M) g at those budgets, ascending; g is constant beyond the last."""

    @abstractmethod
    def rows(self, budget: Tensor) -> Tensor:
        """Return rows (K, S, A, B) that are worth g(``budget``) (K, S, A) and spend no more."""

    def worth(self, budget: Tensor) -> Tensor:
        """Return (K, S, A) g at ``budget`` (K, S, A)."""
        i, t = _locate(self.budget, budget)
        return torch.lerp(_at(self.value, i), _at(self.value, i + 1), t)

    def slopes(self) -> Tensor:
        """Return (K, S, A, M-1) slopes of the segments; 0 for those of no length."""
        length = self.budget.diff(dim=-1)
        return torch.where(length > 0.0, self.value.diff(dim=-1) / length.clamp(min=1e-300), 0.0)

    def price(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least budget (K, S, A) with g ≥ ``target`` (K, S, A), and g's slope just before it (0 where none
        is)."""
        i = (torch.searchsorted(self.value, target[..., None].contiguous()) - 1)[..., 0]
        inside = (i >= 0) & (i < self.value.shape[-1] - 1)
        i = i.clamp(0, self.value.shape[-1] - 2)
        low, high = _at(self.value, i), _at(self.value, i + 1)
        t = ((target - low) / (high - low).clamp(min=1e-300)).clamp(0.0, 1.0)
        spent = torch.lerp(_at(self.budget, i), _at(self.budget, i + 1), t)
        beyond = torch.where(target > self.value[..., -1], torch.inf, 0.0)
        return torch.where(inside, spent, beyond), torch.where(inside, _at(self.slopes(), i), 0.0)


class PlainPath(Path):
    """Equal weights: one receiver, donors in ascending order of z."""

    def __init__(self, kernel: Kernel, z: Tensor) -> None:
        p, mask = kernel.probabilities, kernel.mask
        best, self.receiver = z.masked_fill(~mask, -torch.inf).max(-1, keepdim=True)
        self.order = z.masked_fill(~mask, torch.inf).argsort(-1)
        self.nominal = p
        self.mass = p.gather(-1, self.order)
        # What gives nothing by moving counts as mass that stays: it would only stretch the path's flat end.
        gain = torch.where(self.mass > 0.0, best - z.gather(-1, self.order), 0.0)
        self.moved = self.mass.cumsum(-1)
        start = (p * z.masked_fill(~mask, 0.0)).sum(-1, keepdim=True)
        self.budget = torch.cat([torch.zeros_like(start), 2.0 * self.moved], -1)
        self.value = torch.cat([start, start + (self.mass * gain).cumsum(-1)], -1)

    def rows(self, budget: Tensor) -> Tensor:
        taken = (0.5 * budget[..., None] - (self.moved - self.mass)).clamp(min=0.0).minimum(self.mass)
        rows = self.nominal.scatter_add(-1, self.order, -taken).clamp(min=0.0)
        return rows.scatter_add(-1, self.receiver, taken.sum(-1, keepdim=True))


class WeightedPath(Path):
    """Weights w (K, S, A, B) > 0: points on the path between all its kinks."""

    def __init__(self, kernel: Kernel, z: Tensor, weight: Tensor) -> None:
        p, mask = kernel.probabilities, kernel.mask
        pair = mask[..., :, None] & mask[..., None, :]
        dz, w = z[..., None, :] - z[..., :, None], weight
        leave = (dz / (w[..., None, :] + w[..., :, None])).masked_fill(~pair, 0.0).amax(-1)
        # Successor i is the receiver no longer than its line z_i - λ w_i lies above that of every lighter one.
        dw = w[..., :, None] - w[..., None, :]
        cross = -dz / torch.where(dw == 0.0, 1.0, dw)
        until = cross.masked_fill(~pair | (dw <= 0.0), torch.inf).amin(-1)
        takes = torch.where(until < torch.inf, until, 0.0)
        kinks = torch.cat([leave, takes], -1).clamp(min=0.0).sort(-1, descending=True).values
        ends = torch.cat([2.0 * kinks[..., :1] + 1.0, kinks, torch.zeros_like(kinks[..., :1])], -1)
        price = 0.5 * (ends[..., :-1] + ends[..., 1:])[..., None, :]  # (K, S, A, 1, M): inside every stretch
        z, w, q = z[..., None], w[..., None], p[..., None]
        level, receiver = (z - price * w).masked_fill(~mask[..., None], -torch.inf).max(-2, keepdim=True)
        rows = torch.where(z + price * w < level, 0.0, q)
        rows = rows.scatter_add(-2, receiver, 1.0 - rows.sum(-2, keepdim=True))
        self.points = rows.transpose(-1, -2)  # (K, S, A, M, B)
        self.budget = (w * (rows - q).abs()).sum(-2).cummax(-1).values
        self.value = (rows * z.masked_fill(~mask[..., None], 0.0)).sum(-2).cummax(-1).values

    def rows(self, budget: Tensor) -> Tensor:
        i, t = _locate(self.budget, budget)
        return torch.lerp(_at_rows(self.points, i), _at_rows(self.points, i + 1), t[..., None])


def _at(table: Tensor, index: Tensor) -> Tensor:
    return table.gather(-1, index[..., None])[..., 0]


def _at_rows(points: Tensor, index: Tensor) -> Tensor:
    shape = (*index.shape, 1, points.shape[-1])
    return points.gather(-2, index[..., None, None].expand(shape))[..., 0, :]


def _locate(budget: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the segment (…,) that holds ``wanted`` (…,) and where in it, 0 … 1."""
    i = (torch.searchsorted(budget, wanted[..., None].contiguous(), right=True) - 1)[..., 0].clamp(
        0, budget.shape[-1] - 2
    )
    low, high = _at(budget, i), _at(budget, i + 1)
    return i, ((wanted - low) / (high - low).clamp(min=1e-300)).clamp(0.0, 1.0)
