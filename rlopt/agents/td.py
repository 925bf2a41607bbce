"""What a temporal-difference residual costs: squared, Huber as LAP wants it, or PAL."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

TD_LOSSES = ("auto", "squared", "huber", "pal")

TDLoss = Callable[[Tensor, Tensor | None], Tensor]
"""From residuals δ (E, B) of E critics and importance weights (B,), or None, to the loss ()."""


def squared(residual: Tensor, weight: Tensor | None) -> Tensor:
    """Return Σ over critics of mean ½ w δ²."""
    return _total(0.5 * residual.square(), weight)


def huber(residual: Tensor, weight: Tensor | None, threshold: float) -> Tensor:
    """Return the Huber loss: ½ δ² up to ``threshold``, linear beyond it. With LAP's priorities it has, in expectation,
    the gradient of PAL under uniform sampling (Fujimoto et al. 2020, arXiv 2007.06049, theorem 2)."""
    clipped = residual.clamp(-threshold, threshold)
    return _total(clipped * (residual - 0.5 * clipped), weight)


def pal(residual: Tensor, weight: Tensor | None, threshold: float, alpha: float) -> Tensor:
    """Return the prioritised approximation loss, LAP's twin for uniform sampling (arXiv 2007.06049, eq. 12 and released
    code):

    m^α ½ δ² below the threshold m, m |δ|^(1+α) / (1+α) beyond, divided by the mean of max(|δ|, m)^α over the minibatch,
    where |δ| is that of the worst critic. Rows of weight 0 are not of the minibatch.
    """
    size = residual.abs()
    large = threshold * size.clamp(min=threshold).pow(1.0 + alpha) / (1.0 + alpha)
    terms = torch.where(size < threshold, threshold**alpha * 0.5 * residual.square(), large)
    if weight is None:
        return _total(terms, weight) / size.detach().amax(0).clamp(min=threshold).pow(alpha).mean()
    counts = (weight > 0.0).to(size.dtype).expand_as(size)
    each, counts = (size.detach() * counts).amax(0).clamp(min=threshold).pow(alpha), counts.amax(0)
    scale = (each * counts).sum() / counts.sum().clamp(min=1.0)
    return _total(terms, weight) / scale.clamp(min=threshold**alpha)


def averaged(error: Tensor, weight: Tensor | None) -> Tensor:
    """Return mean w · error, of errors that are losses already: cross-entropies, quantile losses."""
    return _total(error, weight)


def make_td_loss(kind: str | None, threshold: float, alpha: float) -> TDLoss:
    """Return the loss called ``kind``; None for errors that are losses."""
    if kind is None:
        return averaged
    if kind == "huber":
        return partial(huber, threshold=threshold)
    if kind == "pal":
        return partial(pal, threshold=threshold, alpha=alpha)
    return squared


def _total(terms: Tensor, weight: Tensor | None) -> Tensor:
    return (terms if weight is None else terms * weight).mean(-1).sum()
