"""Soft actor-critic for discrete actions (Christodoulou 2019, "Soft Actor-Critic for Discrete Action Settings",
arXiv 1910.07207; equation numbers below are that paper's).

A critic gives the values of all actions at once, so every expectation over the policy is an exact sum: nothing is
sampled in an update. Two options come from later work on why this version is less stable than the continuous one: the
mean of the two critics (SD-SAC, arXiv 2209.10081) and no entropy in the critic's target (arXiv 2509.09838).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from rlopt.agents.actor_critic import ActorCritic, ActorCriticConfig, Nets, Work
from rlopt.agents.sequences import mean, priorities, rows
from rlopt.agents.td import TDLoss, squared
from rlopt.agents.temperature import LEARNED, Temperature, TemperatureConfig
from rlopt.buffers import Batch
from rlopt.nn import CategoricalActor, Critic, Params
from rlopt.types import Metrics, Obs, RloptError, option


@dataclass(frozen=True, kw_only=True)
class DiscreteSACConfig(TemperatureConfig, ActorCriticConfig):
    """Options of discrete SAC."""

    target_entropy_ratio: float = option(
        0.98,
        "entropy aimed at, as a fraction of log|A| (0.98: paper; few actions want 0.2 to 0.5)",
        low=0.0,
        high=1.0,
        needs=LEARNED,
    )
    average_critics: bool = option(False, "the mean of the two critics in place of their minimum (SD-SAC)")
    critic_entropy: bool = option(True, "whether the critics' target counts the entropy of later steps")
    target_every: int = option(1, "after how many updates the target follows (with tau=1: is copied)", low=1)


def critic_loss(
    nets: Nets,
    params: Params,
    actor: Params,
    target: Params,
    temperature: Tensor,
    batch: Batch,
    average: bool = False,
    entropy: bool = True,
    td: TDLoss = squared,
) -> tuple[Tensor, Metrics]:
    """Return the soft Bellman residual of both critics (eq. 4), with the exact soft value of eq. 10.

    y = r + γᵏ (1 - terminated) Σ_a π(a|s') (minᵢ Q̄ᵢ(s', a) - α log π(a|s'));  J = Σᵢ ½ mean (Qᵢ(s, a) - y)².

    ``batch.action`` counts from 0, (B,). ``average`` takes the mean of the critics, ``entropy=False`` drops the α term.
    Metrics include ``td`` (B,), the mean absolute residual of the two critics, of slices a priority each, which
    prioritised samplers use.
    """
    with torch.no_grad():
        log_pi = nets.actor(actor, batch.next_obs).log_softmax(-1)
        next_q = pessimistic(nets.critic(target, batch.next_obs), average)
        if entropy:
            next_q = next_q - temperature * log_pi
        y = batch.reward + batch.discount * (1.0 - batch.terminated) * (log_pi.exp() * next_q).sum(-1)
    every = nets.critic(params, batch.obs)
    q = every.gather(-1, batch.action.expand(every.shape[:-1]).unsqueeze(-1)).squeeze(-1)
    residual = q - y
    return td(residual, batch.weight), {
        "q": mean(q.detach(), batch.mask),
        "td": priorities(residual.detach().abs().mean(0), batch.mask),
    }


def actor_loss(
    nets: Nets,
    params: Params,
    critic: Params,
    temperature: Tensor,
    obs: Obs,
    mask: Tensor | None = None,
    average: bool = False,
) -> tuple[Tensor, Metrics]:
    """Return the policy objective (eq. 12): J = mean Σ_a π(a|s) (α log π(a|s) - minᵢ Qᵢ(s, a)).

    The mean is over the rows whose ``mask`` is 1. Metrics include ``log_prob`` (B,), the expected log π(a|s), which is
    minus the entropy; with a mask its mean (1,).
    """
    with torch.no_grad():
        q = pessimistic(nets.critic(critic, obs), average)
    log_pi = nets.actor(params, obs).log_softmax(-1)
    pi = log_pi.exp()
    loss = mean((pi * (temperature * log_pi - q)).sum(-1), mask)
    log_prob = (pi * log_pi).sum(-1).detach()
    return loss, {"log_prob": log_prob if mask is None else mean(log_prob, mask).unsqueeze(0)}


def pessimistic(q: Tensor, average: bool) -> Tensor:
    """Return one value of the critics' (E, …): their minimum, or their mean."""
    return q.mean(0) if average else q.amin(0)


class DiscreteSAC(ActorCritic):
    """Soft actor-critic for Discrete action spaces.

    With ``network.memory`` actor and critics remember the episode, and learn from slices of it (``buffer.sequence_…``).
    """

    name: ClassVar[str] = "sac_discrete"
    supports_memory = True
    config_class = DiscreteSACConfig
    config: DiscreteSACConfig
    actor_module: CategoricalActor
    temperature: Temperature

    def build(self) -> None:
        c, space = self.config, self.spec.observation_space
        self.actor_module = self.build_actor(CategoricalActor)
        actions = self.actor_module.actions
        self.build_critic(lambda: Critic(space, c.network, outputs=actions))
        self.build_target(self.critic)
        self.nets = Nets(self.actor, self.critic)
        if c.network.memory != "none":
            self.build_memories()
        self.temperature = Temperature(self, c.target_entropy_ratio * math.log(actions))

    def q(self, obs: Obs, action: Tensor) -> Tensor:
        if self.memories is not None:
            raise RloptError(f"agent={self.name} remembers: its values depend on more than these observations")
        values: Tensor = self.critic.module(obs)
        index = (action - self.actor_module.start).expand(values.shape[:-1])
        return values.gather(-1, index.unsqueeze(-1)).squeeze(-1)

    def stages(self) -> tuple[str, ...]:
        due = (self.clock.updates + 1) % self.config.target_every == 0
        return ("critic", "actor", "target") if due else ("critic", "actor")

    def prepare(self, batch: Batch) -> Work:
        return Work(rows(self.by_run(batch._replace(action=batch.action - self.actor_module.start))))

    def critic_objective(self, work: Work) -> tuple[Tensor, Metrics]:
        c, temperature = self.config, self.temperature.value
        pure = partial(critic_loss, self.nets, average=c.average_critics, entropy=c.critic_entropy, td=self.td)
        actor, critic, target = self.actor.params, self.critic.params, self.target.params
        loss, metrics = self.per_run(pure)(critic, actor, target, temperature, work.batch)
        return loss, metrics | {"temperature": temperature}

    def actor_objective(self, work: Work) -> tuple[Tensor, Metrics]:
        actor, critic, temperature = self.actor.params, self.critic.params, self.temperature.value
        pure = partial(actor_loss, self.nets, average=self.config.average_critics)
        return self.per_run(pure)(actor, critic, temperature, work.batch.obs, work.batch.mask)
