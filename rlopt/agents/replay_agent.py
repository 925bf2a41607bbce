"""What off-policy agents with an actor share: the warm-up, acting, exported policies, the learned temperature, runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from rlopt.agents.base import Agent, ReplayAgentConfig
from rlopt.buffers import Batch
from rlopt.nn import Actor, Net, Optimiser, Schedule
from rlopt.policy import Policy
from rlopt.types import Act, Carry, Obs, map_obs

A = TypeVar("A", bound=Actor)

FEW = 32
"""Up to so many rows an actor is called row by row where it can be."""


def temperature_loss(log_temperature: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """Dual objective of the entropy constraint (Haarnoja et al. 2018b, eq. 18):
    J(α) = mean (-α (log π(a|s) + target entropy))."""
    return -(log_temperature.exp() * (log_prob + target_entropy)).mean()


class OffPolicyActorCritic(Agent):
    """An agent that acts with the network ``actor``, which its ``build`` makes, and learns from a replay buffer."""

    supports_runs = True
    config: ReplayAgentConfig
    actor: Net
    actor_module: Actor
    """The first run's acting network."""
    schedule: Schedule
    quick_act: Callable[[Tensor, Tensor | None], Tensor] | None = None
    """Actions at a few vector observations (R·N, O) with this noise (R·N, A), where an agent has a faster way."""
    learns_temperature: bool
    log_temperature: Tensor
    """(1,), of several runs (R, 1)."""
    temperature_optimiser: Optimiser

    @property
    def policy(self) -> Policy:
        return self.policies[0]

    @property
    def policies(self) -> list[Policy]:
        return [Policy(self.spec, module) for module in self.actor.modules if isinstance(module, Actor)]

    @torch.no_grad()
    def act(self, obs: Obs, carry: Carry = None, deterministic: bool = False) -> Act:
        """Actions (N, …) in environment units: uniform during the warm-up, then samples of the policy, or its mode.

        Of several runs the rows are R·N, run by run.
        """
        module, streams = self.actor_module, self.act_generators
        rows = next(iter(obs.values())).shape[0] if isinstance(obs, dict) else obs.shape[0]
        each = rows // self.runs
        if not deterministic and self.clock.env_steps < self.config.warmup_steps:
            return Act(_join([module.uniform(each, g) for g in streams]))
        if self.quick_act is not None and isinstance(obs, Tensor) and rows <= FEW:
            return Act(self.quick_act(obs, None if deterministic else _join([module.noise(each, g) for g in streams])))
        if self.runs == 1:
            return Act(*module.act(obs, carry, deterministic, streams[0]))
        by_run = map_obs(lambda x: x.view(self.runs, each, *x.shape[1:]), obs)
        outputs = torch.vmap(self.actor)(self.actor.params, by_run)
        flat = tuple(o.flatten(0, 1) for o in outputs) if isinstance(outputs, tuple) else outputs.flatten(0, 1)
        return Act(module.choose(flat, None if deterministic else _join([module.noise(each, g) for g in streams])))

    def by_run(self, batch: Batch) -> Batch:
        """A minibatch (R·B, …) as (R, B, …), with weights where it has none; of one run as it is."""
        if self.runs == 1:
            return batch

        weight = torch.ones_like(batch.reward) if batch.weight is None else batch.weight
        return batch._replace(weight=weight).map(lambda x: x.reshape(self.runs, -1, *x.shape[1:]))

    def add_optimiser(self, name: str, flat: Tensor, learning_rate: float) -> Optimiser:
        """An optimiser of ``flat``, (P,) or (R, P), as the configuration describes it, registered as ``name``."""
        return self.persist(name, Optimiser(flat, learning_rate, self.config.optimiser, self.config.max_grad_norm))

    def add_temperature(self, fixed: float | None, initial: float, learning_rate: float) -> None:
        """``log_temperature``, and its optimiser where no ``fixed`` temperature is given."""
        self.learns_temperature = fixed is None
        shape = (1,) if self.runs == 1 else (self.runs, 1)
        start = torch.full(shape, float(np.log(initial if fixed is None else fixed)), device=self.device)
        self.log_temperature = self.persist("log_temperature", start)
        if self.learns_temperature:
            self.temperature_optimiser = self.add_optimiser("temperature_optimiser", start, learning_rate)

    def descend_temperature(self, log_prob: Tensor, target_entropy: float, factor: float) -> None:
        """One step down ``temperature_loss`` where the temperature is learned. Its gradient needs no autograd: the loss
        is linear in α = exp(log α), so dJ/d log α = J."""
        if self.learns_temperature:
            loss = self.per_run(lambda t, p: temperature_loss(t, p, target_entropy))(self.log_temperature, log_prob)
            self.temperature_optimiser.grad.copy_(loss.unsqueeze(-1))
            self.descend("temperature", self.temperature_optimiser, loss, None, factor)

    @property
    def temperature(self) -> Tensor:
        """The temperature, () or (R,), outside the graph."""
        return self.log_temperature.exp().squeeze(-1)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
