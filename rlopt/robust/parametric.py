"""The paper's parametric kernel, which couples all states: p(s'|s, a) ∝ p̄(s'|s, a) exp(θᵀφ(s')/(λᵀζ(s, a))).

Wang, Ho and Petrik 2023. The worst case of a KL ball has this form, with θᵀφ in the place of z and
λᵀζ in that of the multiplier. The set ‖θ - θ_c‖₁ ≤ κ_θ, ‖λ - λ_c‖₁ ≤ κ_λ, λ ≥ 1e-5 is not rectangular and the inner
problem not concave: what is found is the best of several ascents, no certified worst case, and there is no Bellman
equation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlopt.robust.bellman import best_response, objective, occupancy, policy_gradient, policy_value, worst_case
from rlopt.robust.model import RobustMDP
from rlopt.robust.sets.ambiguity import Nominal
from rlopt.robust.simplex import project_l1_ball, project_simplex
from rlopt.robust.solvers.solve import Solution, start_policy

SMALLEST = 1e-5
"""The least λ."""


class Parameters(NamedTuple):
    """A point of the set."""

    theta: Tensor
    """(K, m)"""
    lam: Tensor
    """(K, n)"""


@dataclass(frozen=True)
class ParametricSet:
    """Features, centre and radii of a parametric kernel around ``model``'s nominal one.

    Args:
        model: nominal kernel, costs, discount and start; its own ambiguity is not looked at.
        state_features: φ (S, m). pair_features: ζ (S, A, n).
        theta, lam: the centre, (m,) and (n,). theta_radius, lam_radius: κ_θ and κ_λ.
    """

    model: RobustMDP
    state_features: Tensor
    pair_features: Tensor
    theta: Tensor
    lam: Tensor
    theta_radius: float = 1.0
    lam_radius: float = 1.0

    def centre(self) -> Parameters:
        k = self.model.num_instances
        return Parameters(self.theta.expand(k, -1).clone(), self.lam.expand(k, -1).clone())

    def project(self, x: Parameters) -> Parameters:
        """Return the nearest point of the set: an L1 ball for θ, an L1 ball cut at ``SMALLEST`` for λ."""
        centre = self.centre()
        radius = torch.full_like(x.theta[:, 0], self.theta_radius)
        theta = project_l1_ball(x.theta, centre.theta, radius)
        return Parameters(theta, _project_cut_ball(x.lam, centre.lam, self.lam_radius))

    def temperature(self, lam: Tensor) -> Tensor:
        """Return (K, S, A) λᵀζ, kept away from 0, where the tilt has no meaning."""
        tau = torch.einsum("san,kn->ksa", self.pair_features, lam)
        return torch.where(tau.abs() < 1e-8, torch.where(tau < 0.0, -1e-8, 1e-8), tau)

    def rows(self, x: Parameters) -> Tensor:
        """Return (K, S, A, B) the kernel at ``x``, on the nominal one's successors."""
        m = self.model
        score = m.kernel.gather(torch.einsum("sm,km->ks", self.state_features, x.theta))
        tilt = (score / self.temperature(x.lam)[..., None]).masked_fill(m.kernel.probabilities <= 0.0, -torch.inf)
        weight = m.kernel.probabilities * (tilt - tilt.amax(-1, keepdim=True)).exp()
        return weight / weight.sum(-1, keepdim=True)

    def gradient(self, policy: Tensor, x: Parameters, rows: Tensor, value: Tensor) -> Parameters:
        """Return ∂J/∂θ = Σ (w/τ) E[Z (φ - Eφ)] and ∂J/∂λ = -Σ (w ζ/τ²) E[Z (θᵀφ - Eθᵀφ)], with w = d π/(1 - γ), Z = c +
        γ v.

        ``rows`` and ``value`` (K, S) are those of ``x`` and ``policy``.
        """
        m = self.model
        w = occupancy(m, policy, rows)[..., None] * policy / (1.0 - m.gamma)
        z = m.targets(value)
        advantage = rows * (z - (rows * z).sum(-1, keepdim=True))  # E[Z (f - E f)] = Σ p (Z - E Z) f
        tau = self.temperature(x.lam)
        by_feature = [m.kernel.gather(f.expand(m.num_instances, -1)) for f in self.state_features.unbind(-1)]
        moved = torch.stack([(advantage * f).sum(-1) for f in by_feature], -1)  # (K, S, A, m)
        theta = torch.einsum("ksa,ksam->km", w / tau, moved)
        along = torch.einsum("ksam,km->ksa", moved, x.theta)
        lam = -torch.einsum("ksa,san->kn", w * along / tau**2, self.pair_features)
        return Parameters(theta, lam)

    def ascend(
        self, policy: Tensor, start: Parameters, step_size: float = 0.01, tolerance: float = 1e-4, limit: int = 200
    ) -> tuple[Parameters, Tensor, Tensor]:
        """Climb by projected gradient ascent on (θ, λ) from ``start``, until ‖Δv‖₂ ≤ ``tolerance`` in every instance:
        the authors' rule, which proves nothing. Returns the best point met, its rows and its value (K, S)."""
        x = self.project(start)
        rows = self.rows(x)
        value = policy_value(self.model, policy, rows)
        best, best_value, best_cost = x, value, objective(self.model, value)
        for _ in range(limit):
            g = self.gradient(policy, x, rows, value)
            x = self.project(Parameters(x.theta + step_size * g.theta, x.lam + step_size * g.lam))
            rows, before = self.rows(x), value
            value = policy_value(self.model, policy, rows)
            cost = objective(self.model, value)
            better = (cost > best_cost)[:, None]
            best = Parameters(*(torch.where(better, new, old) for new, old in zip(x, best, strict=True)))
            best_value = torch.where(better, value, best_value)
            best_cost = torch.maximum(cost, best_cost)
            if bool(((value - before).norm(dim=-1) <= tolerance).all()):
                break
        return best, self.rows(best), best_value

    def worst_case(
        self, policy: Tensor, starts: list[Parameters], step_size: float = 0.01, tolerance: float = 1e-4
    ) -> tuple[Parameters, Tensor, Tensor]:
        """Return the best of one ascent from each of ``starts``."""
        found = [self.ascend(policy, s, step_size, tolerance) for s in starts]
        best = found[0]
        for other in found[1:]:
            better = objective(self.model, other[2]) > objective(self.model, best[2])
            theta, lam = (_choose(better, new, old) for new, old in zip(other[0], best[0], strict=True))
            best = (Parameters(theta, lam), _choose(better, other[1], best[1]), _choose(better, other[2], best[2]))
        return best


def solve_parametric(
    ambiguity: ParametricSet,
    iterations: int = 200,
    step_size: float = 0.1,
    inner_step: float = 0.01,
    inner_tolerance: float = 1e-4,
    starts: list[Parameters] | None = None,
    policy: Any = None,
    robust: bool = True,
) -> Solution:
    """Solve by DRPG with the parametric adversary; ``robust=False`` follows the gradient at the centre (the paper's
    baseline).

    Both are judged by the worst case that the ascents find: ``history["value"]``. ``lower`` is the ordinary optimum
    under the worst kernel found, which bounds the robust optimum by weak duality; ``upper`` is proved too, by letting
    the adversary move every row over its whole support, and so it is loose.

    Args:
        starts: where each inner ascent begins (default: the centre); the last worst case is always one more.
        policy: (K, S, A) or (S, A) to begin with (default: uniform).
    """
    m = ambiguity.model
    pi = m.uniform_policy() if policy is None else start_policy(m, policy)
    first = starts or [ambiguity.centre()]
    warm: list[Parameters] = []
    values: list[Tensor] = []
    kept: tuple[Tensor, Tensor, Tensor] | None = None
    nominal = ambiguity.rows(ambiguity.centre())
    for _ in range(iterations):
        x, rows, value = ambiguity.worst_case(pi, [*first, *warm], inner_step, inner_tolerance)
        warm = [x]
        values.append(objective(m, value))
        if kept is None:
            kept = (pi, rows, value)
        else:
            better = objective(m, value) < objective(m, kept[2])
            shaped = [better.view(-1, *[1] * (old.ndim - 1)) for old in kept]
            kept = tuple(  # type: ignore[assignment]
                torch.where(b, new, old) for b, new, old in zip(shaped, (pi, rows, value), kept, strict=True)
            )
        if not robust:
            rows, value = nominal, policy_value(m, pi, nominal)
        pi = project_simplex(pi - step_size * policy_gradient(m, pi, rows, value))
    assert kept is not None
    best, worst_rows, best_value = kept
    lower = best_response(m, worst_rows)[1]
    upper = objective(m, worst_case(m.replace(_Anything()), best, worst_rows).upper)
    history = {"value": m.sign * torch.stack(values)}
    low, high = (lower, upper) if m.sign > 0 else (-upper, -lower)
    return Solution(best, m.kernel.to_dense(worst_rows), m.sign * best_value, low, high, history)


def _choose(better: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` in the instances where ``better`` (K,) is true."""
    return torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old)


class _Anything(Nominal):
    """Every distribution on the support."""

    def worst(self, z: Tensor) -> tuple[Tensor, Tensor]:
        value, index = z.masked_fill(~self.kernel.mask, -torch.inf).max(-1, keepdim=True)
        return value[..., 0], torch.zeros_like(z).scatter_(-1, index, 1.0)


def _project_cut_ball(y: Tensor, centre: Tensor, radius: float) -> Tensor:
    """Return the nearest (K, n) point with ‖x - centre‖₁ ≤ radius and x ≥ ``SMALLEST``: y drawn towards the centre by a
    common price, then cut. The distance falls piecewise linearly with the price, so its kinks give the price
    exactly."""
    d = y - centre

    def at(price: Tensor) -> Tensor:
        """(K, M, n) for prices (K, M)."""
        drawn = d.sign()[:, None] * (d.abs()[:, None] - price[..., None]).clamp(min=0.0)
        return (centre[:, None] + drawn).clamp(min=SMALLEST)

    kinks = torch.cat([torch.zeros_like(d[:, :1]), d.abs(), d.abs() - (centre - SMALLEST)], -1).clamp(min=0.0)
    kinks = kinks.sort(-1).values
    distance = (at(kinks) - centre[:, None]).abs().sum(-1)
    i = (distance > radius).sum(-1, keepdim=True).clamp(1, kinks.shape[-1] - 1)
    (k0, k1), (d0, d1) = ((x.gather(-1, i - 1), x.gather(-1, i)) for x in (kinks, distance))
    price = k0 + (k1 - k0) * ((d0 - radius) / (d0 - d1).clamp(min=1e-300)).clamp(0.0, 1.0)
    return at(torch.where(distance[:, :1] <= radius, 0.0, price))[:, 0]
