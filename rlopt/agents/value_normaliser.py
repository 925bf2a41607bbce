"""Value targets in units of their running mean and deviation, so that a critic's loss does not depend on the scale of
the rewards (Yu et al. 2022, "The Surprising Effectiveness of PPO in Cooperative Multi-Agent Games", arXiv 2103.01955,
appendix D; decay as in PKU-MARL/HARL)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rlopt.agents.base import Agent

DECAY = 0.99999
LEAST_VARIANCE = 1e-2


def moments(statistics: Tensor) -> Tensor:
    """Return mean and standard deviation (2,) of what ``updated`` has seen; (0, 0.1) of nothing."""
    first, second, weight = statistics.unbind()
    weight = weight.clamp(min=1e-5)
    mean = first / weight
    return torch.stack((mean, (second / weight - mean.square()).clamp(min=LEAST_VARIANCE).sqrt()))


def updated(statistics: Tensor, values: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return statistics (3,), decayed sums of x, x² and 1, that have seen ``values`` (B,) weighted by ``weight``."""
    rows = torch.stack((values, values.square(), torch.ones_like(values)))
    new = rows.mean(-1) if weight is None else (rows * weight).sum(-1) / weight.sum().clamp(min=1e-5)
    moved = torch.lerp(new, statistics, DECAY)
    return moved if weight is None else torch.where(weight.sum() > 0, moved, statistics)


class ValueNormaliser:
    """Running mean and deviation of an agent's value targets; registers ``<name>``, of several runs (R, 3)."""

    def __init__(self, agent: Agent, name: str = "value_statistics") -> None:
        self.agent = agent
        shape = (3,) if agent.runs == 1 else (agent.runs, 3)
        self.statistics = agent.persist(name, torch.zeros(shape, device=agent.device))

    def moments(self) -> Tensor:
        """Return mean and deviation, (2,) or (R, 2)."""
        return self.agent.per_run(moments)(self.statistics)

    def see(self, values: Tensor, weight: Tensor | None = None) -> None:
        """Learn of targets (B,) or (R, B), unless something of this update was not finite."""
        ok = self.agent.guard.passes("value target", values if self.agent.runs == 1 else values.sum(-1))
        new = self.agent.per_run(partial(updated))(self.statistics, values, weight)
        self.statistics.copy_(torch.where(ok.unsqueeze(-1), new, self.statistics))
