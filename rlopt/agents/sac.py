"""Soft actor-critic with learned temperature (Haarnoja et al. 2018b, "Soft Actor-Critic Algorithms and Applications",
arXiv 1812.05905; equation numbers below are that paper's).

Two critics learn the soft value of the current policy, a squashed Gaussian actor climbs their minimum plus its entropy,
and the temperature moves so that the entropy stays near a target. Log-probabilities live in normalised action space
[-1, 1]: the scale of the environment's bounds never enters them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from rlopt.agents.base import ReplayAgentConfig
from rlopt.agents.replay_agent import OffPolicyActorCritic
from rlopt.agents.td import TDLoss, squared
from rlopt.buffers import Batch
from rlopt.fast import sac as fast_sac
from rlopt.fast.lanes import Lanes
from rlopt.nn import Critic, Net, Params, SquashedGaussianActor, network_options
from rlopt.nn.distributions import squashed_gaussian
from rlopt.types import Metrics, Obs, Update, option


@dataclass(frozen=True, kw_only=True)
class SACConfig(ReplayAgentConfig):
    """Options of SAC; the defaults are the paper's (table 1), with target entropy -dim(A)."""

    actor_learning_rate: float | None = option(None, "of the actor (null: learning_rate)", above=0.0)
    temperature_learning_rate: float | None = option(None, "of the temperature (null: learning_rate)", above=0.0)
    tau: float = option(0.005, "step of the target critics towards the critics", above=0.0, high=1.0)
    temperature: float | None = option(None, "a fixed temperature α (null: learned)", above=0.0)
    initial_temperature: float = option(1.0, "where the learned temperature begins", above=0.0)
    target_entropy: float | None = option(None, "entropy the learned temperature aims at, in nats (null: -dim A)")
    policy_delay: int = option(1, "critic updates per update of actor and temperature", low=1)
    fused: bool = option(True, "use the hand-written gradients where they apply (ReLU networks on the CPU)")


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
    noise: Tensor,
    td: TDLoss = squared,
) -> tuple[Tensor, Metrics]:
    """Soft Bellman residual of both critics (eq. 5), with the target of eq. 3 and 6.

    y = r + γᵏ (1 - terminated) (minᵢ Q̄ᵢ(s', a') - α log π(a'|s')),  a' = f(noise; s');  J = Σᵢ ½ mean (Qᵢ(s, a) - y)²,
    or what ``td`` makes of the residuals.

    ``batch.action`` is normalised (B, A), ``noise`` (B, A). Metrics include ``td`` (B,), the mean absolute residual of
    the two critics, which prioritised samplers use.
    """
    with torch.no_grad():
        mean, log_std = nets.actor(actor, batch.next_obs)
        next_action, next_log_prob = squashed_gaussian(mean, log_std, noise)
        next_q = nets.critic(target, batch.next_obs, next_action).amin(0)
        next_value = next_q - temperature * next_log_prob
        y = batch.reward + batch.discount * (1.0 - batch.terminated) * next_value
    q = nets.critic(params, batch.obs, batch.action)
    residual = q - y
    return td(residual, batch.weight), {"q": q.detach().mean(), "td": residual.detach().abs().mean(0)}


def actor_loss(
    nets: Nets, params: Params, critic: Params, temperature: Tensor, obs: Obs, noise: Tensor
) -> tuple[Tensor, Metrics]:
    """Reparameterised policy objective (eq. 9): J = mean (α log π(a|s) - minᵢ Qᵢ(s, a)),  a = f(noise; s).

    Metrics include ``log_prob`` (B,), which the temperature's loss uses.
    """
    mean, log_std = nets.actor(params, obs)
    action, log_prob = squashed_gaussian(mean, log_std, noise)
    q = nets.critic(critic, obs, action).amin(0)
    loss = (temperature * log_prob - q).mean()
    return loss, {"log_prob": log_prob.detach()}


class SAC(OffPolicyActorCritic):
    """Soft actor-critic for bounded Box action spaces."""

    name: ClassVar[str] = "sac"
    config_class = SACConfig
    config: SACConfig
    actor_module: SquashedGaussianActor

    def build(self) -> None:
        c, spec = self.config, self.spec
        options = network_options(c.network)
        self.actor = self.net(
            "actor", lambda: SquashedGaussianActor(spec.observation_space, spec.action_space, options)
        )
        assert isinstance(self.actor.module, SquashedGaussianActor)
        self.actor_module = self.actor.module
        self.action_features = self.actor_module.action_features
        self.critic = self.net("critic", lambda: Critic(spec.observation_space, c.network, self.action_features))
        self.target = self.persist("target", self.critic.target())
        self.nets = Nets(self.actor, self.critic)
        actor_lr = c.actor_learning_rate or c.learning_rate
        self.actor_optimiser = self.add_optimiser("actor_optimiser", self.actor.flat, actor_lr)
        self.critic_optimiser = self.add_optimiser("critic_optimiser", self.critic.flat, c.learning_rate)
        self.add_temperature(c.temperature, c.initial_temperature, c.temperature_learning_rate or c.learning_rate)
        self.target_entropy = -float(self.action_features) if c.target_entropy is None else c.target_entropy
        self.schedule = c.schedule()
        self.td = c.critic_td_loss()
        self.fused: fast_sac.FusedUpdate | fast_sac.FusedRuns | None = None
        if (
            c.fused
            and c.td_loss != "pal"
            and fast_sac.applies(spec.observation_space, c.network, c.optimiser, self.device)
        ):
            one = self.runs == 1
            # No phase of an update has more than two tasks.
            lanes = Lanes(min(2, torch.get_num_threads()))
            self.fused = fast_sac.FusedUpdate(self, None, lanes) if one else fast_sac.FusedRuns(self)
            self.quick_act = fast_sac.FusedActor(self)

    def update(self, batch: Batch) -> Update:
        """One step of the critics and targets, and of actor and temperature every ``policy_delay`` updates."""
        c = self.config
        factor = self.schedule.factor(self.clock)
        batch = self.by_run(batch._replace(action=self.actor_module.normalise(batch.action)))
        rows = batch.reward.shape[-1]
        next_noise, noise = self.noise(rows, self.action_features), self.noise(rows, self.action_features)
        act = self.clock.updates % c.policy_delay == 0
        if self.fused is not None and rows == c.batch_size:
            metrics, priority = self.fused(batch, next_noise, noise, factor, act)
        else:
            metrics, priority = self._update(batch, next_noise, noise, factor, act)
            if self.fused is not None:  # which reads the code alone
                self.guard.settle()
        self.clock.updates += 1
        return Update(metrics, priority)

    def _update(
        self, batch: Batch, next_noise: Tensor, noise: Tensor, factor: float, act: bool
    ) -> tuple[Metrics, Tensor]:
        """The update in torch's own words."""
        temperature = self.temperature
        self.begin_update(observation=batch.obs, next_observation=batch.next_obs, reward=batch.reward)
        nets, actor, critic, target = self.nets, self.actor.params, self.critic.params, self.target.params

        pure = self.per_run(partial(critic_loss, nets, td=self.td))
        loss, metrics = pure(critic, actor, target, temperature, batch, next_noise)
        self.descend("critic", self.critic_optimiser, loss, self.critic.leaves, factor)
        priority = metrics.pop("td").flatten()
        metrics["critic_loss"] = loss.detach()

        if act:
            loss, aux = self.per_run(partial(actor_loss, nets))(actor, critic, temperature, batch.obs, noise)
            self.descend("actor", self.actor_optimiser, loss, self.actor.leaves, factor)
            metrics["actor_loss"] = loss.detach()
            metrics["entropy"] = -aux["log_prob"].mean(-1)
            self.descend_temperature(aux["log_prob"], self.target_entropy, factor)
        metrics["temperature"] = temperature

        self.target.follow(self.critic, self.config.tau)
        return metrics, priority
