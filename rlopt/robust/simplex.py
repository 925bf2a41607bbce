"""Euclidean projections onto the probability simplex and its parts: exact, batched over every leading axis."""

from __future__ import annotations

import torch
from torch import Tensor

_HALVINGS = 200
"""At most; a bisection ends earlier, when its interval is as narrow as float64 can tell."""


def project_simplex(y: Tensor, support: Tensor | None = None) -> Tensor:
    """Return the nearest distribution (…, n) to each row of y (…, n), zero outside ``support`` (…, n) where that is
    given.

    The sort algorithm (Held, Wolfe and Crowder 1974; Duchi et al. 2008, figure 1).
    """
    if support is not None:
        y = y.masked_fill(~support, -torch.inf)
    ordered = y.sort(-1, descending=True).values
    count = torch.arange(1, y.shape[-1] + 1, dtype=y.dtype, device=y.device)
    excess = (ordered.cumsum(-1) - 1.0) / count
    kept = (ordered > excess).sum(-1, keepdim=True).clamp(min=1)
    return (y - excess.gather(-1, kept - 1)).clamp(min=0.0)


def project_box(y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the nearest distribution (…, n) with ``low`` ≤ p ≤ ``high`` (…, n each); Σ low ≤ 1 ≤ Σ high must hold.

    p = clip(y - μ, low, high); μ is bracketed by bisection and then solved for exactly on the coordinates left free.
    """
    left, right = (y - high).amin(-1, keepdim=True), (y - low).amax(-1, keepdim=True)
    for _ in range(_HALVINGS):
        middle = 0.5 * (left + right)
        if bool(((middle <= left) | (middle >= right)).all()):
            break
        over = torch.clamp(y - middle, low, high).sum(-1, keepdim=True) > 1.0
        left, right = torch.where(over, middle, left), torch.where(over, right, middle)
    middle = 0.5 * (left + right)
    at_low, at_high = y - middle <= low, y - middle >= high
    free = ~(at_low | at_high)
    fixed = torch.where(at_low, low, torch.where(at_high, high, torch.zeros_like(y))).sum(-1, keepdim=True)
    exact = ((y * free).sum(-1, keepdim=True) + fixed - 1.0) / free.sum(-1, keepdim=True).clamp(min=1)
    return torch.clamp(y - torch.where(free.any(-1, keepdim=True), exact, middle), low, high)


def project_l1_ball(y: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """Return the nearest point (…, n) to y with ‖x - centre‖₁ ≤ radius (…,), by projecting |y - centre| on a
    simplex."""
    d = y - centre
    scale = radius[..., None].clamp(min=torch.finfo(y.dtype).tiny)
    inside = d.abs().sum(-1, keepdim=True) <= radius[..., None]
    return torch.where(inside, y, centre + d.sign() * scale * project_simplex(d.abs() / scale))
