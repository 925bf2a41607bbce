"""The temperature of a maximum-entropy agent: what a nat of entropy is worth in rewards, fixed or learned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlopt.agents.replay_agent import ReplayAgent
from rlopt.types import option

LEARNED = {"temperature": (None,)}
"""What options of a learned temperature need."""


@dataclass(frozen=True, kw_only=True)
class TemperatureConfig:
    """What an agent with a temperature adds to its options."""

    temperature: float | None = option(None, "a fixed temperature α (null: learned)", above=0.0)
    initial_temperature: float = option(1.0, "where the learned temperature begins", above=0.0, needs=LEARNED)
    temperature_learning_rate: float | None = option(
        None, "of the temperature (null: learning_rate)", above=0.0, needs=LEARNED
    )


def temperature_loss(log_temperature: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """Return the dual objective of the entropy constraint (Haarnoja et al. 2018b, eq. 18), ():
    J(α) = mean (-α (log π(a|s) + target entropy))."""
    return -(log_temperature.exp() * (log_prob + target_entropy)).mean()


class Temperature:
    """A temperature α = exp(log α) of an agent, which may have several by other names.

    Registers ``log_<name>``, and ``<name>_optimiser`` where it is learned.

    Args:
        agent: whose it is; its ``config`` says whether α is learned, where it begins, and its learning rate.
        target_entropy: in nats, what the policy's entropy is driven to where α is learned.
        name: what it is called in the agent's state and guard.
    """

    def __init__(self, agent: ReplayAgent, target_entropy: float, name: str = "temperature") -> None:
        c = agent.config
        assert isinstance(c, TemperatureConfig)
        self.agent, self.target_entropy, self.name = agent, target_entropy, name
        shape = (1,) if agent.runs == 1 else (agent.runs, 1)
        start = math.log(c.initial_temperature if c.temperature is None else c.temperature)
        self.log = agent.persist(f"log_{name}", torch.full(shape, start, device=agent.device))
        """(1,), of several runs (R, 1)."""
        rate = c.temperature_learning_rate or c.learning_rate
        learned = c.temperature is None
        self.optimiser = agent.add_optimiser(f"{name}_optimiser", self.log, rate) if learned else None
        """None where the temperature is fixed."""

    @property
    def value(self) -> Tensor:
        """Return α, () or (R,), outside the graph."""
        return self.log.exp().squeeze(-1)

    def descend(self, log_prob: Tensor, learns: Tensor | None = None) -> None:
        """Take one step down ``temperature_loss`` at log π (B,) or (R, B), where the temperature is learned, and where
        ``learns``, () or (R,) bool.

        The gradient needs no autograd: the loss is linear in α = exp(log α), so dJ/d log α = J.
        """
        if self.optimiser is not None:
            pure = partial(temperature_loss, target_entropy=self.target_entropy)
            loss = self.agent.per_run(pure)(self.log, log_prob)
            self.optimiser.grad.copy_(loss.unsqueeze(-1))
            self.agent.descend(self.name, self.optimiser, loss, None, learns)
