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

from rlopt.agents.base import ReplayAgentConfig
from rlopt.agents.replay_agent import OffPolicyActorCritic
from rlopt.agents.td import TDLoss, squared
from rlopt.buffers import Batch
from rlopt.nn import CategoricalActor, Critic, Net, Params, network_options
from rlopt.types import Metrics, Obs, Update, option


@dataclass(frozen=True, kw_only=True)
class DiscreteSACConfig(ReplayAgentConfig):
    """Options of discrete SAC."""

    actor_learning_rate: float | None = option(None, "of the actor (null: learning_rate)", above=0.0)
    temperature_learning_rate: float | None = option(None, "of the temperature (null: learning_rate)", above=0.0)
    tau: float = option(0.005, "step of the target critics towards the critics", above=0.0, high=1.0)
    temperature: float | None = option(None, "a fixed temperature α (null: learned)", above=0.0)
    initial_temperature: float = option(1.0, "where the learned temperature begins", above=0.0)
    target_entropy_ratio: float = option(
        0.98, "entropy aimed at, as a fraction of log|A| (0.98: paper; few actions want 0.2 to 0.5)", low=0.0, high=1.0
    )
    average_critics: bool = option(False, "the mean of the two critics in place of their minimum (SD-SAC)")
    critic_entropy: bool = option(True, "whether the critics' target counts the entropy of later steps")


@dataclass(frozen=True)
class Nets:
    """The functions the losses are made of."""

    actor: Net
    critic: Net


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
    """Soft Bellman residual of both critics (eq. 4), with the exact soft value of eq. 10.

    y = r + γᵏ (1 - terminated) Σ_a π(a|s') (minᵢ Q̄ᵢ(s', a) - α log π(a|s'));  J = Σᵢ ½ mean (Qᵢ(s, a) - y)².

    ``batch.action`` counts from 0, (B,). ``average`` takes the mean of the critics, ``entropy=False`` drops the α term.
    Metrics include ``td`` (B,), the mean absolute residual of the two critics, which prioritised samplers use.
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
    return td(residual, batch.weight), {"q": q.detach().mean(), "td": residual.detach().abs().mean(0)}


def actor_loss(
    nets: Nets, params: Params, critic: Params, temperature: Tensor, obs: Obs, average: bool = False
) -> tuple[Tensor, Metrics]:
    """Policy objective (eq. 12): J = mean Σ_a π(a|s) (α log π(a|s) - minᵢ Qᵢ(s, a)).

    Metrics include ``log_prob`` (B,), the expected log π(a|s), which is minus the entropy.
    """
    with torch.no_grad():
        q = pessimistic(nets.critic(critic, obs), average)
    log_pi = nets.actor(params, obs).log_softmax(-1)
    pi = log_pi.exp()
    loss = (pi * (temperature * log_pi - q)).sum(-1).mean()
    return loss, {"log_prob": (pi * log_pi).sum(-1).detach()}


def pessimistic(q: Tensor, average: bool) -> Tensor:
    """One value of the critics' (E, …): their minimum, or their mean."""
    return q.mean(0) if average else q.amin(0)


class DiscreteSAC(OffPolicyActorCritic):
    """Soft actor-critic for Discrete action spaces."""

    name: ClassVar[str] = "sac_discrete"
    config_class = DiscreteSACConfig
    config: DiscreteSACConfig
    actor_module: CategoricalActor

    def build(self) -> None:
        c, space = self.config, self.spec.observation_space
        options = network_options(c.network)
        self.actor = self.net("actor", lambda: CategoricalActor(space, self.spec.action_space, options))
        assert isinstance(self.actor.module, CategoricalActor)
        self.actor_module = self.actor.module
        actions = self.actor_module.actions
        self.critic = self.net("critic", lambda: Critic(space, c.network, outputs=actions))
        self.target = self.persist("target", self.critic.target())
        self.nets = Nets(self.actor, self.critic)
        actor_lr = c.actor_learning_rate or c.learning_rate
        self.actor_optimiser = self.add_optimiser("actor_optimiser", self.actor.flat, actor_lr)
        self.critic_optimiser = self.add_optimiser("critic_optimiser", self.critic.flat, c.learning_rate)
        self.add_temperature(c.temperature, c.initial_temperature, c.temperature_learning_rate or c.learning_rate)
        self.target_entropy = c.target_entropy_ratio * math.log(actions)
        self.schedule, self.td = c.schedule(), c.critic_td_loss()

    def update(self, batch: Batch) -> Update:
        """One gradient step of the critics, the actor, the temperature (eq. 11), and of the targets."""
        c = self.config
        factor = self.schedule.factor(self.clock)
        batch = self.by_run(batch._replace(action=batch.action - self.actor_module.start))
        temperature = self.temperature
        nets, actor, critic, target = self.nets, self.actor.params, self.critic.params, self.target.params
        self.begin_update(observation=batch.obs, next_observation=batch.next_obs, reward=batch.reward)

        pure = partial(critic_loss, nets, average=c.average_critics, entropy=c.critic_entropy, td=self.td)
        loss, metrics = self.per_run(pure)(critic, actor, target, temperature, batch)
        self.descend("critic", self.critic_optimiser, loss, self.critic.leaves, factor)
        priority = metrics.pop("td").flatten()
        metrics["critic_loss"] = loss.detach()

        pure = partial(actor_loss, nets, average=c.average_critics)
        loss, aux = self.per_run(pure)(actor, critic, temperature, batch.obs)
        self.descend("actor", self.actor_optimiser, loss, self.actor.leaves, factor)
        metrics["actor_loss"] = loss.detach()
        metrics["entropy"] = -aux["log_prob"].mean(-1)
        self.descend_temperature(aux["log_prob"], self.target_entropy, factor)
        metrics["temperature"] = temperature

        self.target.follow(self.critic, c.tau)
        self.clock.updates += 1
        return Update(metrics, priority)
