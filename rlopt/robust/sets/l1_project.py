"""Euclidean projection of kernel rows onto simplex and weighted L1 ball, one ball per row or one per state.

x_i(μ, λ) = max(0, p̂_i + soft(y_i - μ - p̂_i, λ w_i)) with one μ per row, so that the row sums to 1, and one λ ≥ 0 per
ball, so that its budget is kept. The sum falls with μ and the distance with λ, both piecewise
linearly: two nested Newton searches inside brackets end exactly, after a few steps each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlopt.robust.kernel import Kernel
from rlopt.robust.simplex import project_simplex

_STEPS = 200
"""At most; with halvings alone a bracket is exhausted after about 60."""
_CLOSE = 4e-15


def project_l1(y: Tensor, kernel: Kernel, radius: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the nearest rows (K, S, A, B) to y in the L1 balls of ``radius``, (K, S, A) or (K, S), around
    ``kernel``'s."""
    p, mask = kernel.probabilities, kernel.mask
    w = (torch.ones_like(p) if weight is None else weight) * mask
    per_state = radius.ndim == 2

    def per_ball(x: Tensor) -> Tensor:
        return x.sum(-1) if per_state else x

    def spread(x: Tensor) -> Tensor:
        return x[..., None, None] if per_state else x[..., None]

    plain = project_simplex(y, mask)
    inside = per_ball((w * (plain - p).abs()).sum(-1)) <= radius
    if bool(inside.all()):
        return plain
    d = (y - p).masked_fill(~mask, 0.0)
    # From this price on nothing moves: every |y - p - μ| is at most the widest difference.
    reach = ((d.amax(-1, keepdim=True) - d.amin(-1, keepdim=True)) / w.clamp(min=1e-300)).masked_fill(~mask, 0.0)
    right = reach.amax((-2, -1)) if per_state else reach.amax(-1)
    left, price = torch.zeros_like(right), torch.zeros_like(right)
    mu = (d.sum(-1) / mask.sum(-1))[..., None]
    x = plain
    for _ in range(_STEPS):
        shrink = w * spread(price)
        x, mu, active, sign = _rows_at(d, p, mask, shrink, mu)
        distance = per_ball((w * (x - p).abs()).sum(-1))
        excess = distance - radius
        left, right = torch.where(excess > 0.0, price, left), torch.where(excess > 0.0, right, price)
        done = inside | (excess.abs() <= _CLOSE) | (right - left <= 1e-16 * right)
        if bool(done.all()):
            break
        # With μ' = -Σ w sign/n over the moving coordinates, the distance falls by Σ w² - (Σ w sign)²/n.
        pull, count = (w * sign * active).sum(-1), active.sum(-1).clamp(min=1)
        slope = per_ball((w * w * active).sum(-1) - pull**2 / count)
        newton = price + excess / slope.clamp(min=1e-300)
        usable = (slope > 1e-12) & (newton > left) & (newton < right)
        price = torch.where(done, price, torch.where(usable, newton, 0.5 * (left + right)))
    return torch.where(spread(inside), plain, x)


def _rows_at(d: Tensor, p: Tensor, mask: Tensor, shrink: Tensor, mu: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows that sum to 1 for a given λ w = ``shrink``, from a guess of μ; with μ, where they move, and which
    way."""
    # Beyond these every coordinate of d - μ is moved up, or down to zero.
    left = torch.minimum(d.masked_fill(~mask, torch.inf).amin(-1, keepdim=True) - shrink.amax(-1, keepdim=True), mu)
    right = torch.maximum((d + p + shrink).amax(-1, keepdim=True), mu)
    for _ in range(_STEPS):
        t = d - mu
        sign = torch.where(t > shrink, 1.0, torch.where(t < -shrink, -1.0, 0.0))
        x = (p + (t - sign * shrink) * sign.abs()).clamp(min=0.0) * mask
        error = x.sum(-1, keepdim=True) - 1.0
        active = (sign != 0.0) & (x > 0.0) & mask
        left, right = torch.where(error > 0.0, mu, left), torch.where(error > 0.0, right, mu)
        if bool(((error.abs() <= _CLOSE) | (right - left <= 1e-16 * right.abs())).all()):
            break
        moving = active.sum(-1, keepdim=True)
        step = mu + error / moving.clamp(min=1)
        usable = (moving > 0) & (step > left) & (step < right)
        settled = error.abs() <= _CLOSE
        mu = torch.where(settled, mu, torch.where(usable, step, 0.5 * (left + right)))
    return x, mu, active, sign
