"""An agent whose stages come in a random order: what sequential updates of several agents ask of an update."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlopt.agents import SAC, Temperature
from rlopt.agents.actor_critic import Nets
from rlopt.agents.sac import actor_loss
from rlopt.buffers import Batch
from rlopt.nn import SquashedGaussianActor, network_options
from rlopt.random import torch_generator
from rlopt.types import Update


class Together(NamedTuple):
    """What the stages share."""

    batch: Batch
    noise: tuple[Tensor, Tensor]
    log_probs: Tensor
    """(B, 3), of the actors updated so far; 0 of the others."""


class ThreeActors(SAC):
    """SAC with three actors; each is updated knowing those before it, in an order drawn anew for every update."""

    def build(self) -> None:
        super().build()
        spec, options = self.spec, network_options(self.config.network)
        self.actors, self.optimisers, self.temperatures = [], [], []
        for i in range(3):
            made = self.net(
                f"actor_{i}", lambda: SquashedGaussianActor(spec.observation_space, spec.action_space, options)
            )
            self.actors.append(made)
            self.optimisers.append(self.add_optimiser(f"actor_{i}_optimiser", made, 1e-3))
            self.temperatures.append(Temperature(self, -1.0 - i, f"temperature_{i}"))
        self.order_generator = self.persist("order_generator", torch_generator(self.seed, "order"))
        self.order = self.persist("order", torch.randperm(3, generator=self.order_generator))

    def prepare(self, batch: Batch) -> Any:
        work = super().prepare(batch)
        return Together(*work, torch.zeros(len(batch.reward), 3, device=self.device))

    def stages(self) -> tuple[str, ...]:
        return ("critic", *(f"actor/{i}" for i in self.order.tolist()), "target")

    def actor_stage(self, work: Any, i: int) -> Update:
        actor, temperature = self.actors[i], self.temperatures[i]
        pure = partial(actor_loss, Nets(actor, self.critic))
        loss, aux = self.per_run(pure)(
            actor.params, self.critic.params, temperature.value, work.batch.obs, work.noise[1]
        )
        loss = loss * (1.0 + work.log_probs.mean())
        self.descend(f"actor/{i}", self.optimisers[i], loss, actor)
        temperature.descend(aux["log_prob"])
        work.log_probs[:, i] = aux["log_prob"]
        return Update({f"actor_loss/{i}": loss.detach(), f"seen/{i}": work.log_probs.mean()})

    def end_update(self) -> None:
        super().end_update()
        self.order.copy_(torch.randperm(3, generator=self.order_generator))
