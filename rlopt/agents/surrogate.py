"""The clipped surrogate of policies that learn from groups (Feng, Xue, Liu and An 2025, arXiv 2505.10978, eq. 9), for
whatever an action is: a choice, a Gaussian's sample, each token of what a language model says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlopt.agents.group import GroupAgentConfig
from rlopt.agents.group_advantages import EstimatorConfig
from rlopt.types import Metrics, option


@dataclass(frozen=True, kw_only=True)
class GroupPolicyConfig(EstimatorConfig, GroupAgentConfig):
    """What policies of every kind have that learn from groups by a clipped surrogate."""

    gamma: float = option(0.95, "discount per step, of what is compared at an anchor", low=0.0, high=1.0)
    epochs: int = option(1, "passes over a rollout", low=1)
    batch_size: int = option(256, "steps per minibatch", low=1)
    clip: float = option(0.2, "ε: how far the ratio of probabilities may fall and still pay", above=0.0)
    clip_high: float | None = option(None, "how far it may rise (null: clip; DAPO: 0.28)", above=0.0)
    dual_clip: float | None = option(
        None, "c: no action that is worse than its group costs more than c times its advantage (null: off)", above=1.0
    )
    kl_coefficient: float = option(0.0, "β: weight of the divergence from the policy at the start", low=0.0)
    entropy_coefficient: float = option(0.0, "weight of the policy's entropy", low=0.0)
    max_grad_norm: float | None = option(1.0, "clip the gradient to this norm (null: never)", above=0.0)


def surrogate(
    log_ratio: Tensor, advantage: Tensor, low: float, high: float | None = None, dual: float | None = None
) -> Tensor:
    """Return the clipped gain of each action (eq. 9): min(ρ Â, clip(ρ, 1 - ε, 1 + ε_high) Â), and of a negative Â never
    less than ``dual`` Â (Ye et al. 2020, arXiv 1912.09729): a ratio that has run away must not outweigh all others."""
    ratio = log_ratio.exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1.0 - low, 1.0 + (low if high is None else high)) * advantage)
    return gain if dual is None else torch.where(advantage < 0, torch.maximum(gain, dual * advantage), gain)


def divergence(log_prob: Tensor, reference: Tensor) -> Tensor:
    """Return the estimate k3 of KL(π, π_ref) from each action (Schulman 2020): r - 1 - log r ≥ 0 with r = π_ref / π."""
    log_ratio = (reference - log_prob).clamp(-20.0, 20.0)
    return log_ratio.exp() - 1.0 - log_ratio


def policy_loss(
    log_prob: Tensor,
    entropy: Tensor,
    before: Tensor,
    advantage: Tensor,
    reference: Tensor | None,
    c: GroupPolicyConfig,
    weight: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Return the loss of a minibatch of B actions (eq. 9), -mean gain + β · divergence - entropy bonus, and its parts.

    Args:
        log_prob: (B,) log π(a|s); entropy: (B,) of π(·|s).
        before: (B,) log π_old(a|s); reference: (B,) log π_ref(a|s), where a divergence from it counts.
        advantage: (B,).
        weight: (B,) what each action counts in place of 1 / B; of a part of a minibatch less than 1 together, and
            losses and metrics of all parts are summed.
    """

    def mean(x: Tensor) -> Tensor:
        return x.mean() if weight is None else (x * weight).sum()

    log_ratio = log_prob - before
    loss, spread = -mean(surrogate(log_ratio, advantage, c.clip, c.clip_high, c.dual_clip)), mean(entropy)
    ratio = log_ratio.detach().exp()
    metrics = {
        "entropy": spread.detach(),
        "approx_kl": mean(ratio - 1.0 - log_ratio.detach()),
        "clip_fraction": mean(((ratio < 1.0 - c.clip) | (ratio > 1.0 + (c.clip_high or c.clip))).float()),
    }
    if reference is not None:
        away = mean(divergence(log_prob, reference))
        loss, metrics["reference_kl"] = loss + c.kl_coefficient * away, away.detach()
    if c.entropy_coefficient:
        loss = loss - c.entropy_coefficient * spread
    return loss, metrics | {"policy_loss": loss.detach()}
