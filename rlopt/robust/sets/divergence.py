"""Balls of a divergence around the nominal rows: Kullback-Leibler and χ². Both stay where the nominal row has mass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlopt.robust.sets.ambiguity import Ambiguity

_HALVINGS = 100


class _Divergence(Ambiguity):
    def __init__(self, radius: Any) -> None:
        self.given = radius

    def _spread(self) -> None:
        self.radius = self.per_row(self.given, "radius")
        self.mass = self.kernel.probabilities > 0.0

    def divergence(self, rows: Tensor) -> Tensor:
        """Return the divergence (K, S, A) of the rows (K, S, A, B) from the nominal ones."""
        raise NotImplementedError

    def rows_at(self, y: Tensor, price: Tensor) -> Tensor:
        """Return rows minimising ½‖p - y‖² + price·D(p) (K, S, A)."""
        raise NotImplementedError

    def excess(self, rows: Tensor) -> Tensor:
        return self.divergence(rows) - self.radius

    def project(self, y: Tensor) -> Tensor:
        """Bisection on the price of the divergence, so that the ball is just kept."""
        left = torch.zeros_like(self.radius)
        plain = self.rows_at(y, left)
        inside = self.divergence(plain) <= self.radius
        right = torch.ones_like(left)
        for _ in range(_HALVINGS):
            over = (self.divergence(self.rows_at(y, right)) > self.radius) & ~inside
            if not bool(over.any()) or float(right.max()) > 1e12:
                break
            right = torch.where(over, 4.0 * right, right)
        for _ in range(_HALVINGS):
            middle = 0.5 * (left + right)
            if bool((inside | (right - left <= 1e-11 * right)).all()):
                break
            over = self.divergence(self.rows_at(y, middle)) > self.radius
            left, right = torch.where(over, middle, left), torch.where(over, right, middle)
        return torch.where(inside[..., None], plain, self.rows_at(y, right))


class KL(_Divergence):
    """(s,a)-rectangular: KL(p_sa ‖ p̂_sa) ≤ κ_sa (Iyengar 2005; Nilim and El Ghaoui 2005).

    The worst row is p̂·exp(t z) normalised, with the inverse temperature t that spends κ; where κ is enough to leave
    nothing but the largest z, it does that. ``radius``: κ in nats, a number, (S, A) or (K, S, A).
    """

    def divergence(self, rows: Tensor) -> Tensor:
        p = self.kernel.probabilities
        ratio = torch.where((rows > 0.0) & self.mass, rows / p.clamp(min=1e-300), 1.0)
        return (rows * ratio.log()).sum(-1)

    def worst(self, z: Tensor) -> tuple[Tensor, Tensor]:
        p, z = self.kernel.probabilities, z.masked_fill(~self.mass, -torch.inf)
        top = z.amax(-1, keepdim=True)
        below = top - z  # ≥ 0, infinite where there is no mass
        span = torch.where(self.mass, below, 0.0).amax(-1)
        best = (p * (below <= 0.0)).sum(-1, keepdim=True)
        corner = torch.where(below <= 0.0, p / best, 0.0)
        whole = (self.radius >= -best[..., 0].log()) | (span <= 0.0)

        away = torch.where(self.mass, below, 0.0)
        scale = torch.where(span > 0.0, span, 1.0)
        left, right = torch.full_like(scale, -25.0), torch.full_like(scale, 36.0)  # of log(t·span)
        spread = (p * away**2).sum(-1) - (p * away).sum(-1) ** 2
        # For a small radius KL ≈ t² Var/2, which is where the search begins.
        x = (0.5 * (2.0 * self.radius / spread.clamp(min=1e-300)).clamp(min=1e-22).log() + scale.log()).clamp(
            -24.0, 35.0
        )
        tilted = p
        for _ in range(_HALVINGS):  # Newton in log t: KL = -t E[away] - log Z, and its derivative there is t² Var
            t = x.exp() / scale
            e = p * torch.exp(-t[..., None] * away)
            total = e.sum(-1, keepdim=True)
            tilted = e / total
            mean = (tilted * away).sum(-1)
            error = -t * mean - total[..., 0].log() - self.radius
            left, right = torch.where(error > 0.0, left, x), torch.where(error > 0.0, x, right)
            settled = whole | (error.abs() <= 1e-14) | (right - left <= 1e-15 * right.abs())
            if bool(settled.all()):
                break
            slope = t * t * ((tilted * away**2).sum(-1) - mean**2)
            step = x - error / slope.clamp(min=1e-300)
            usable = (step > left) & (step < right)
            x = torch.where(settled, x, torch.where(usable, step, 0.5 * (left + right)))
        tilted = torch.where((self.radius > 0.0)[..., None], tilted, p)
        rows = torch.where(whole[..., None], corner, tilted)
        return (rows * torch.where(self.mass, z, 0.0)).sum(-1), rows

    def rows_at(self, y: Tensor, price: Tensor) -> Tensor:
        """Return p of p - y + μ + λ (log p - log p̂ + 1) = 0: Newton for log p inside Newton for μ.

        With q = log p, e^q + λ q = t is convex and increasing, and so is p in t; both searches converge from one side.
        """
        p, lam = self.kernel.probabilities, price[..., None].clamp(min=1e-9)
        shift = y + lam * (p.clamp(min=1e-300).log() - 1.0)
        # μ starts so low that the sum is at least 1: with p_i = p̂_i in the row's smallest coordinate's place.
        mu = torch.where(self.mass, shift - p - lam * p.clamp(min=1e-300).log(), torch.inf).amin(-1, keepdim=True)
        x = p
        for _ in range(60):
            t = shift - mu
            q = torch.where(t > 0.0, torch.minimum(t / lam, t.clamp(min=1.0).log()), t / lam)
            for _ in range(40):
                e = q.exp()
                step = (e + lam * q - t) / (e + lam)
                q = q - step
                if bool((step.abs() <= 1e-14 * (1.0 + q.abs())).all()):
                    break
            x = torch.where(self.mass, q.exp(), 0.0)
            error = x.sum(-1, keepdim=True) - 1.0
            if bool((error.abs() <= 1e-14).all()):
                break
            mu = mu + error / (x / (x + lam)).sum(-1, keepdim=True)
        return x / x.sum(-1, keepdim=True)


class ChiSquared(_Divergence):
    """(s,a)-rectangular: Σ_i (p_i - p̂_i)²/p̂_i ≤ κ_sa, exact in one sort. ``radius``: a number, (S, A) or (K, S, A).

    The worst row is p̂·max(0, a + b z). With the m successors of the largest z left, of nominal mass M, mean z̄ and
    V = Σ p̂ (z - z̄)² over them, a + b z = 1/M + b (z - z̄) and b = √((κ + 1 - 1/M)/V); the right m is the
    largest that leaves no negative mass.
    """

    def divergence(self, rows: Tensor) -> Tensor:
        p = self.kernel.probabilities
        return torch.where(self.mass, (rows - p) ** 2 / p.clamp(min=1e-300), rows).sum(-1)

    def worst(self, z: Tensor) -> tuple[Tensor, Tensor]:
        hidden = z.masked_fill(~self.mass, -torch.inf)
        order = hidden.argsort(-1, descending=True)
        p = self.kernel.probabilities.gather(-1, order)
        here = self.mass.gather(-1, order)
        top = hidden.amax(-1, keepdim=True)
        x = torch.where(here, hidden.gather(-1, order) - top, 0.0)  # ≤ 0, so that sums of squares do not cancel
        mass, first, second = p.cumsum(-1), (p * x).cumsum(-1), (p * x * x).cumsum(-1)
        mean = first / mass
        spread = (second - first * mean).clamp(min=0.0)
        room = self.radius[..., None] + 1.0 - 1.0 / mass
        slope = torch.where(spread > 1e-300, (room.clamp(min=0.0) / spread.clamp(min=1e-300)).sqrt(), 0.0)
        lowest = 1.0 / mass + slope * (x - mean)
        valid = here & (lowest >= 0.0) & (room >= -1e-15)
        last = torch.arange(1, x.shape[-1] + 1, device=x.device).mul(valid).amax(-1, keepdim=True).clamp(min=1) - 1
        factor = 1.0 / mass.gather(-1, last) + slope.gather(-1, last) * (x - mean.gather(-1, last))
        kept = torch.arange(x.shape[-1], device=x.device) <= last
        ordered = torch.where(kept & here, p * factor.clamp(min=0.0), 0.0)
        ordered = ordered / ordered.sum(-1, keepdim=True)
        rows = torch.zeros_like(ordered).scatter(-1, order, ordered)
        return (rows * torch.where(self.mass, z, 0.0)).sum(-1), rows

    def rows_at(self, y: Tensor, price: Tensor) -> Tensor:
        """Return p of p = max(0, (y - μ + 2λ)/(1 + 2λ/p̂)); μ by Newton, whose steps on a piecewise linear convex sum
        are exact."""
        p, lam = self.kernel.probabilities, price[..., None]
        scale = torch.where(self.mass, 1.0 / (1.0 + 2.0 * lam / p.clamp(min=1e-300)), 0.0)
        mu = torch.where(self.mass, y + 2.0 * lam - 1.0 / scale.clamp(min=1e-300), torch.inf).amin(-1, keepdim=True)
        x = p
        for _ in range(_HALVINGS):
            x = ((y + 2.0 * lam - mu) * scale).clamp(min=0.0)
            error = x.sum(-1, keepdim=True) - 1.0
            if bool((error <= 1e-15).all()):
                break
            mu = mu + error.clamp(min=0.0) / (scale * (x > 0.0)).sum(-1, keepdim=True)
        return x
