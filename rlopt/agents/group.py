"""What agents that learn from groups of episodes share: their options, and advantages relative to the group.

T steps, N episodes side by side, G groups of N / G episodes that begin in the same state.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlopt.agents.base import LearnerConfig
from rlopt.types import option

INFO = "info/"
"""Begins the names of ``extra_fields`` that are facts told with the observation acted on: ``Step.info`` of the step
before, not a number where nothing was told. ``GroupLoop`` stores them."""


@dataclass(frozen=True, kw_only=True)
class GroupAgentConfig(LearnerConfig):
    """What every agent that learns from group rollouts has; read by ``GroupLoop``."""

    groups: int = option(4, "groups of episodes per rollout; a group shares its first state", low=1)
    group_size: int = option(4, "episodes per group", low=2)
    horizon: int | None = option(None, "steps after which an episode is cut (null: the environment's own limit)", low=1)
    tasks: int | None = option(
        None,
        "first states to choose from: each group begins in one of so many, in reshuffled order (null: new ones)",
        low=1,
    )
    noise: str = option(
        "shared",
        "what is drawn after the first state: the same by all members of a group, or by each for itself (independent)",
        choices=("shared", "independent"),
    )
    resample: int = option(
        0,
        "rollouts at most in which groups whose returns are all equal are replaced (dynamic sampling; DAPO: 10)",
        low=0,
    )


def returns_to_go(reward: Tensor, gamma: float, terminated: Tensor | None = None) -> Tensor:
    """Return G_t = r_t + γ G_{t+1}, with 0 beyond the end and, given ``terminated`` (T, N), beyond each lost life: (T,
    N) from rewards (T, N) that are 0 where nothing is valid."""
    out = reward.clone()
    for t in range(len(out) - 2, -1, -1):
        later = out[t + 1] if terminated is None else out[t + 1] * ~terminated[t]
        out[t].add_(later, alpha=gamma)
    return out


def leave_one_out(score: Tensor, counted: Tensor, group: Tensor, groups: int) -> Tensor:
    """Return the mean score of the *other* counted members of each row's group: (T, N); 0 where there is none.

    A row's own actions do not enter it, so as a baseline it leaves the policy gradient unbiased (Kool et al. 2019).

    Args:
        score: (T, N).
        counted: (T, N) bool, who takes part at each step.
        group: (N,) int64 in [0, groups).
    """
    weight = counted.to(score.dtype)
    zeros = score.new_zeros(len(score), groups)
    others = zeros.index_add(1, group, score * weight)[:, group] - score * weight
    count = zeros.index_add(1, group, weight)[:, group] - weight
    return others / count.clamp(min=1.0)
