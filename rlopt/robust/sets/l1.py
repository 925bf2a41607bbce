"""L1 balls around the rows of the nominal kernel, on their support: the exact adversary, (s,a)- and s-rectangular."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from rlopt.robust import sweeps
from rlopt.robust.sets.ambiguity import Ambiguity, Backup
from rlopt.robust.sets.l1_path import Path, PlainPath, WeightedPath
from rlopt.robust.sets.l1_project import project_l1
from rlopt.types import RloptError


class _L1(Ambiguity):
    def __init__(self, radius: Any, weights: Any = None) -> None:
        self.given, self.weights = radius, weights

    def _spread(self) -> None:
        self.radius = self._radius()
        self.weight: Tensor | None = None
        if self.weights is not None:
            self.weight = self.kernel.pick(self.weights, fill=1.0)
            if not bool((self.weight > 0.0).all()):
                raise RloptError("weights of an L1 set must be positive; leave a successor out of the support instead")

    def _radius(self) -> Tensor:
        raise NotImplementedError

    def path(self, z: Tensor) -> Path:
        """Return what a budget buys in every row."""
        return PlainPath(self.kernel, z) if self.weight is None else WeightedPath(self.kernel, z, self.weight)

    def _distance(self, rows: Tensor) -> Tensor:
        d = (rows - self.kernel.probabilities).abs()
        return (d if self.weight is None else d * self.weight).sum(-1)


class L1(_L1):
    """(s,a)-rectangular: Σ_i w_i |p_sa,i - p̂_sa,i| ≤ κ_sa for every state and action (κ = 2·TV).

    Args:
        radius: κ as a number, (A,), (S, A) or (K, S, A); 2 or more allows every distribution on the support.
        weights: w as (S,), (S, A, S) or (K, S, A, S), positive (default: 1).
    """

    rectangular: ClassVar[str] = "sa"

    def _radius(self) -> Tensor:
        return self.per_row(self.given, "radius")

    def worst(self, z: Tensor) -> tuple[Tensor, Tensor]:
        path = self.path(z)
        return path.worth(self.radius), path.rows(self.radius)

    def backup(self, cost: Tensor, gamma: float, value: Tensor, rows: bool = True) -> Backup:
        if self.weight is None and sweeps.usable(value):
            return Backup(*sweeps.l1_sweep(self.kernel, cost, gamma, value, self.radius, rows))
        return super().backup(cost, gamma, value, rows)

    def project(self, y: Tensor) -> Tensor:
        return project_l1(y, self.kernel, self.radius, self.weight)

    def excess(self, rows: Tensor) -> Tensor:
        return self._distance(rows) - self.radius


class StateL1(_L1):
    """s-rectangular: Σ_a Σ_i w_i |p_sa,i - p̂_sa,i| ≤ κ_s, one budget for all actions of a state.

    The optimal policy may have to randomise.

    Args:
        radius: κ as a number, (S,) or (K, S).
        weights: as for ``L1``.
    """

    rectangular: ClassVar[str] = "s"

    def _radius(self) -> Tensor:
        return self.per_state(self.given, "radius")

    def respond(self, z: Tensor, policy: Tensor) -> Tensor:
        """Return the fractional knapsack: segments of all actions by slope π_a·g_a', steepest first."""
        path = self.path(z)
        k, s, a, _ = path.budget.shape
        slope, length = policy[..., None] * path.slopes(), path.budget.diff(dim=-1)
        order = slope.reshape(k, s, -1).argsort(dim=-1, descending=True, stable=True)
        length = length.reshape(k, s, -1).gather(-1, order)
        spent = (self.radius[..., None] - (length.cumsum(-1) - length)).clamp(min=0.0).minimum(length)
        each = torch.zeros_like(spent).scatter(-1, order, spent).reshape(k, s, a, -1).sum(-1)
        return path.rows(each)

    def backup(self, cost: Tensor, gamma: float, value: Tensor, rows: bool = True) -> Backup:
        """Return the backup by bisection on the value u of the game: the least budgets ξ_a(u) with g_a ≥ u must add up
        to κ_s (Ho, Petrik and Wiesemann 2018). Σ_a ξ_a(u) is piecewise linear, so a search among its breakpoints and
        one interpolation give u exactly. The policy makes all slopes equal: x_a ∝ 1/g_a'(ξ_a) where ξ_a > 0.
        """
        if self.weight is None and sweeps.usable(value):
            return Backup(*sweeps.state_l1_sweep(self.kernel, cost, gamma, value, self.radius, rows))
        path = self.path(cost + gamma * self.kernel.gather(value))
        shape = path.value.shape
        ceiling = path.value[..., -1].amin(-1, keepdim=True)  # no budget lifts the game above the weakest action's best
        levels = path.value.reshape(*shape[:2], -1).minimum(ceiling).sort(-1).values
        low = torch.zeros(shape[:2], dtype=torch.int64, device=levels.device)[..., None]
        high = torch.full_like(low, levels.shape[-1] - 1)

        def price(level: Tensor) -> tuple[Tensor, Tensor]:
            return path.price(level.expand(shape[:3]))

        budget = self.radius[..., None]
        while bool((low < high).any()):  # the last level that the budget reaches
            middle = (low + high + 1) // 2
            reached = price(levels.gather(-1, middle))[0].sum(-1, keepdim=True) <= budget
            low, high = torch.where(reached, middle, low), torch.where(reached, high, middle - 1)
        first = levels.gather(-1, low)
        second = levels.gather(-1, (low + 1).clamp(max=levels.shape[-1] - 1))
        less, (more, slope) = price(first)[0], price(second)
        spent, wanted = less.sum(-1, keepdim=True), more.sum(-1, keepdim=True)
        t = ((budget - spent) / (wanted - spent).clamp(min=1e-300)).clamp(0.0, 1.0)
        u = torch.where(second > first, torch.lerp(first, second, t), first)
        # Not u's own price: where gains are a few roundings, a rounding of u is worth any mass. These add up to κ, and
        # no slope changes between the two levels.
        each = torch.lerp(less, more, t)
        return Backup(u[..., 0], _policy(path, u, ceiling, each, slope), path.rows(each) if rows else None)

    def project(self, y: Tensor) -> Tensor:
        return project_l1(y, self.kernel, self.radius, self.weight)

    def excess(self, rows: Tensor) -> Tensor:
        return self._distance(rows).sum(-1) - self.radius


def _policy(path: Path, u: Tensor, ceiling: Tensor, each: Tensor, slope: Tensor) -> Tensor:
    """Return the minimiser: where u is the ceiling or nothing is spent, one action alone, else weights 1/slope."""
    top = path.value[..., -1]
    alone = torch.where(u >= ceiling, top, path.value[..., 0]).argmin(-1, keepdim=True)
    single = torch.zeros_like(top).scatter_(-1, alone, 1.0)
    weight = torch.where((each > 0.0) & (slope > 0.0), 1.0 / slope.clamp(min=1e-300), 0.0)
    total = weight.sum(-1, keepdim=True)
    mixed = (total > 0.0) & (u < ceiling)
    return torch.where(mixed, weight / torch.where(mixed, total, 1.0), single)
