"""Action distributions as plain functions of network outputs and noise."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0
"""Hard bounds of the log standard deviation (Haarnoja et al. 2018, released code)."""

IMPOSSIBLE = -1e10
"""The logit of an action that cannot be taken."""

HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


def squashed_gaussian(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return a reparameterised sample of tanh(N(mean, std²)) and its log-density.

    All arguments are (…, A); ``noise`` is standard normal. Returns the action (…, A) in (-1, 1) and log π (…,), a
    density in normalised action space: no scale of the environment's bounds enters. The log-determinant is
    Σ 2(log 2 − u − softplus(−2u)), equal to Σ log(1 − tanh²u) but finite for every u (Haarnoja et al. 2018b, appendix
    C).
    """
    u = torch.addcmul(mean, log_std.exp(), noise)
    log_normal = -0.5 * noise.square() - log_std - HALF_LOG_TWO_PI
    # The density is that of the action, not of u: without tanh's determinant the entropy would be a Gaussian's that
    # nobody acts with. It takes u: log(1 - a²) of a float32 action near the bounds is -∞.
    log_det = log_det_tanh(u)  # before the tanh: backward adds up gradients in this order, which fixes the last bit
    return torch.tanh(u), (log_normal - log_det).sum(-1)


def log_det_tanh(u: Tensor) -> Tensor:
    """Return log(1 - tanh²u) of each element, the logarithm of tanh's derivative."""
    return 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))


def gaussian_log_prob(mean: Tensor, log_std: Tensor, sample: Tensor) -> Tensor:
    """Return log N(sample; mean, std²), summed over the dimensions: (…,) from arguments (…, A)."""
    standardised = (sample - mean) * (-log_std).exp()
    return (-0.5 * standardised.square() - log_std - HALF_LOG_TWO_PI).sum(-1)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Return the entropy of N(·, std²) in nats, summed over the dimensions: (…,) from (…, A)."""
    return (log_std + 0.5 + HALF_LOG_TWO_PI).sum(-1)


def categorical(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return a sample (…,) int64 of the categorical with ``logits`` (…, K) by inversion, from ``uniform`` (…,) in [0,
    1)."""
    cumulative = logits.softmax(-1).cumsum(-1)
    # Rounding may leave the whole sum below a number that is almost 1: the last action that is possible is meant.
    last = (cumulative < cumulative[..., -1:]).sum(-1)
    return torch.minimum((cumulative <= uniform.unsqueeze(-1)).sum(-1), last)


def chosen_log_prob(logits: Tensor, index: Tensor) -> Tensor:
    """Return log π (…,) of the actions ``index`` (…,), which count from 0, from ``logits`` (…, K)."""
    return logits.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)


def categorical_entropy(logits: Tensor) -> Tensor:
    """Return the entropy (…,) in nats of the categorical with ``logits`` (…, K)."""
    log_pi = logits.log_softmax(-1)
    return -(log_pi.exp() * log_pi).sum(-1)


def possible(logits: Tensor, mask: Tensor) -> Tensor:
    """Return ``logits`` (…, K) with those of the actions that ``mask`` (…, K) bool leaves out so low that they have
    probability 0. They stay finite, so that p log p is 0."""
    return logits.masked_fill(~mask, IMPOSSIBLE)
