"""Value iteration on a tabular MDP (Bellman 1957; Puterman 1994, section 6.3), with MacQueen's certified bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlopt.agents.base import AgentConfig
from rlopt.agents.solver_agent import SolverAgent
from rlopt.robust import action_values, discounted_bounds, expected_reward, greedy
from rlopt.types import RloptError, Update, option


@dataclass(frozen=True, kw_only=True)
class ValueIterationConfig(AgentConfig):
    """Options of value iteration."""

    tolerance: float | None = option(
        1e-6, "stop once every state's optimal value is known to within this (null: never)", above=0.0
    )

    def __post_init__(self) -> None:
        if self.gamma >= 1.0:
            raise RloptError(
                f"agent.gamma={self.gamma:g}: value iteration needs a discount below 1; use agent.gamma=0.999"
            )


class ValueIteration(SolverAgent):
    """Value iteration for tabular environments, with certified bounds.

    V ← max_a r(s, a) + γ Σ p(s'|s, a) V(s'), all states at once, in float64, from V = 0.

    ``value`` (S,) is the current V, ``lower`` and ``upper`` (S,) enclose the optimal value. The policy takes the
    actions that the latest backup chose; its own value lies between the bounds as well, so their gap certifies it.
    """

    name: ClassVar[str] = "value_iteration"
    config_class = ValueIterationConfig
    config: ValueIterationConfig

    def build(self) -> None:
        c = self.config
        reward = self.reward = expected_reward(self.model.kernel, self.model.reward).to(self.device)
        self.value = self.persist("value", torch.zeros_like(reward[:, 0]))
        # Before the first backup: no return is below that of the worst reward for ever, none above that of the best.
        self.lower = self.persist("lower", torch.full_like(self.value, float(reward.min()) / (1.0 - c.gamma)))
        self.upper = self.persist("upper", torch.full_like(self.value, float(reward.max()) / (1.0 - c.gamma)))
        self.build_table()

    @torch.no_grad()
    def update(self, batch: None = None) -> Update:
        """Do one Bellman backup of every state.

        Metrics: ``residual`` max |TV - V|; ``lower`` and ``upper`` enclose the optimal discounted return
        Σ initial(s) V*(s); ``gap`` is the widest interval of any state.
        """
        m, gamma = self.model, self.config.gamma
        q = action_values(m.kernel, self.reward, gamma, self.value)
        backed_up = q.amax(-1)
        lower, upper = discounted_bounds(gamma, self.value, backed_up)
        residual = (backed_up - self.value).abs().amax()
        self.value.copy_(backed_up)
        self.lower.copy_(lower)
        self.upper.copy_(upper)
        self.table.probabilities.copy_(greedy(q)[: len(self.table.probabilities)])
        self.end_update()
        metrics = {
            "residual": residual,
            "gap": (upper - lower).amax(),
            "lower": m.initial @ lower,
            "upper": m.initial @ upper,
        }
        return Update(metrics)

    @property
    def converged(self) -> bool:
        tolerance = self.config.tolerance
        return tolerance is not None and float((self.upper - self.lower).amax()) <= tolerance
