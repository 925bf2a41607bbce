"""Nominal models and radii from samples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlopt.random import numpy_generator
from rlopt.types import RloptError


def count_transitions(states: Any, actions: Any, next_states: Any, num_states: int, num_actions: int) -> Tensor:
    """Return (S, A, S) how often each transition was seen, from equally long lists of states, actions and next states.

    Raises:
        RloptError: lists of different lengths, states or actions out of range.
    """
    s, a, t = (torch.as_tensor(x, dtype=torch.int64) for x in (states, actions, next_states))
    if not s.shape == a.shape == t.shape:
        raise RloptError("states, actions and next_states must be equally long")
    for name, x, n in (("states", s, num_states), ("actions", a, num_actions), ("next_states", t, num_states)):
        if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < n:
            raise RloptError(f"{name} must lie between 0 and {n - 1}, not {int(x.min())} … {int(x.max())}")
    index = (s * num_actions + a) * num_states + t
    counts = torch.bincount(index.flatten(), minlength=num_states * num_actions * num_states)
    return counts.reshape(num_states, num_actions, num_states).to(torch.float64)


def nominal_kernel(counts: Tensor, prior: float = 0.0) -> Tensor:
    """Return (…, S, A, S) relative frequencies of counts, each raised by ``prior``; rows never seen are uniform."""
    raised = counts + prior
    total = raised.sum(-1, keepdim=True)
    return torch.where(total > 0.0, raised / total.clamp(min=1e-300), 1.0 / counts.shape[-1])


def weissman_radius(counts: Tensor, confidence: float = 0.95) -> Tensor:
    """Return (…, S, A) L1 radii that hold for all rows at once with ``confidence``: √(2/n·log(S A (2ˢ - 2)/δ)), at most
    2.

    Weissman et al. 2003, theorem 2.1 (‖p - p̂‖₁ of a law on S points), with a union bound over states and actions.
    """
    states, actions = counts.shape[-1], counts.shape[-2]
    delta = _delta(confidence) / (states * actions)
    # log(2ˢ - 2), which overflows for large S.
    points = states * math.log(2.0) + math.log1p(-(2.0 ** (1 - states))) if states > 1 else 0.0
    n = counts.sum(-1)
    return (2.0 * (points - math.log(delta)) / n.clamp(min=1e-300)).sqrt().clamp(max=2.0)


def hoeffding_radius(counts: Tensor, confidence: float = 0.95) -> Tensor:
    """Return (…, S, A) L∞ radii that hold for every probability at once: √(log(2 S² A/δ)/(2n)), at most 1 (Hoeffding
    1963)."""
    states, actions = counts.shape[-1], counts.shape[-2]
    delta = _delta(confidence) / (states * states * actions)
    return (math.log(2.0 / delta) / (2.0 * counts.sum(-1)).clamp(min=1e-300)).sqrt().clamp(max=1.0)


def bayesian_radius(
    counts: Tensor, confidence: float = 0.95, prior: float = 1.0, samples: int = 1000, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return posterior means (…, S, A, S), and L1 radii (…, S, A) around them that hold ``confidence`` of a row's
    posterior.

    A Dirichlet posterior with ``prior`` per successor; the radius is the quantile over ``samples`` draws (Petrik and
    Russell 2019, Bayesian credible regions), so it is a statement about each row by itself.
    """
    _delta(confidence)
    alpha = (counts + prior).numpy()
    rng = numpy_generator(seed, "bayesian_radius")
    mean = alpha / alpha.sum(-1, keepdims=True)
    radius = np.empty(alpha.shape[:-1])
    for i in np.ndindex(alpha.shape[:-2]):  # a state at a time, to hold few draws at once
        gamma = rng.standard_gamma(alpha[i], (samples, *alpha[i].shape))
        drawn = gamma / gamma.sum(-1, keepdims=True)
        radius[i] = np.quantile(np.abs(drawn - mean[i]).sum(-1), confidence, axis=0)
    return torch.from_numpy(mean), torch.from_numpy(radius)


def _delta(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise RloptError(f"confidence={confidence:g} must lie strictly between 0 and 1")
    return 1.0 - confidence
