"""What agents that learn from rollouts of a fixed length share: their options, and generalised advantages.

T steps of N environments, one time line per environment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlopt.agents.base import LearnerConfig
from rlopt.buffers.rollout import Rollout
from rlopt.types import option


@dataclass(frozen=True, kw_only=True)
class RolloutAgentConfig(LearnerConfig):
    """What every agent that learns from rollouts of a fixed length has; read by ``RolloutLoop``."""

    rollout_steps: int = option(2_048, "steps of each environment per rollout", low=1)


def generalised_advantages(rollout: Rollout, value: Tensor, next_value: Tensor, gamma: float, decay: float) -> Tensor:
    """Return generalised advantages Â (T, N) (Schulman et al. 2016, arXiv 1506.02438, eq. 16); 0 where nothing is
    valid.

    δ_t = r_t + γ (1 - terminated_t) V(s'_t) - V(s_t),  Â_t = δ_t + γλ Â_{t+1} within an episode. Where a limit cut an
    episode (truncated, or the rollout's end) the bootstrap goes on, from V(s'_t) of the state that it led to: taken as
    an end for good it would bias every value before it, and the value of the reset that follows is another episode's.
    Rows that are no transition stand outside of time: what came before a surplus row goes on behind it, what came
    before a lost episode's last row ends there.

    Args:
        rollout: its ``reward`` (T, N), or (T, N, n) with values of that shape where agents are paid apart.
        value: (T, N) V(s_t); whatever where nothing is valid.
        next_value: (T, N) V(s'_t), of ``rollout.next_obs``.
        gamma: γ per step.
        decay: λ.
    """
    flags = (rollout.valid, rollout.terminated, rollout.terminated | rollout.truncated | rollout.ended)
    valid, terminated, cut = (flag.view(*flag.shape, *[1] * (value.ndim - 2)) for flag in flags)
    delta = rollout.reward + torch.where(terminated, 0.0, gamma * next_value) - value
    advantage = torch.where(valid, delta, 0.0)
    # Â_t = δ_t + c_t Â_{t+1} by doubling, in log₂ T rounds: after round k a row holds the sum over its next 2ᵏ rows.
    factor = torch.where(cut, 0.0, torch.where(valid, gamma * decay, 1.0)).expand_as(advantage)
    reach = 1
    while reach < len(advantage):
        behind = advantage[:-reach] + factor[:-reach] * advantage[reach:]
        advantage = torch.cat((behind, advantage[-reach:]))
        factor = torch.cat((factor[:-reach] * factor[reach:], factor[-reach:]))
        reach *= 2
    return torch.where(valid, advantage, 0.0)
