"""What off-policy agents with an actor share: the warm-up, the exported policy, optimisers, the learned temperature."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlopt.agents.base import Agent, ReplayAgentConfig
from rlopt.nn import Actor, Optimiser
from rlopt.policy import Policy
from rlopt.types import Act, Obs


class OffPolicyActorCritic(Agent):
    """An agent that acts with ``actor_module``, which its ``build`` sets, and learns from a replay buffer."""

    config: ReplayAgentConfig
    actor_module: Actor
    learns_temperature: bool
    log_temperature: Tensor
    """(1,)."""
    temperature_optimiser: Optimiser

    @property
    def policy(self) -> Policy:
        return Policy(self.spec, self.actor_module)

    def act(self, obs: Obs, carry: Any = None, deterministic: bool = False) -> Act:
        """Actions (N, …) in environment units: uniform during the warm-up, then samples of the policy, or its mode."""
        if not deterministic and self.clock.env_steps < self.config.warmup_steps:
            rows = next(iter(obs.values())).shape[0] if isinstance(obs, dict) else obs.shape[0]
            return Act(self.actor_module.uniform(rows, self.act_generator))
        return Act(self.actor_module.act(obs, deterministic, self.act_generator))

    def add_optimiser(self, name: str, flat: Tensor, learning_rate: float) -> Optimiser:
        """An optimiser of ``flat`` (P,) as the configuration describes it, registered as ``name``."""
        return self.persist(name, Optimiser(flat, learning_rate, self.config.optimiser, self.config.max_grad_norm))

    def add_temperature(self, fixed: float | None, initial: float, learning_rate: float) -> None:
        """``log_temperature``, and its optimiser where no ``fixed`` temperature is given."""
        self.learns_temperature = fixed is None
        start = initial if fixed is None else fixed
        self.log_temperature = self.persist(
            "log_temperature", torch.full((1,), float(np.log(start)), device=self.device)
        )
        if self.learns_temperature:
            self.log_temperature.requires_grad_()
            flat = self.log_temperature.detach()
            self.temperature_optimiser = self.add_optimiser("temperature_optimiser", flat, learning_rate)

    @property
    def temperature(self) -> Tensor:
        """The temperature, a 0-d tensor outside the graph."""
        return self.log_temperature.detach().exp().squeeze(0)
