"""Soft actor-critic as first published (Haarnoja et al. 2018a, "Soft Actor-Critic: Off-Policy Maximum Entropy Deep
Reinforcement Learning with a Stochastic Actor", arXiv 1801.01290; equation numbers below are that paper's).

A network of its own learns the soft value of states, its slow copy is the critics' target, and the temperature is
fixed: rewards are multiplied by ``reward_scale`` = 1/α instead. Log-probabilities live in normalised action space
[-1, 1].

Where paper and released code (haarnoja/sac) differ: value and policy use the minimum of both critics, as the paper's
section 4.2 says (the code's policy loss takes the first alone), and the code's regulariser of the policy's outputs is
kept as an option, on by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from rlopt.agents.actor_critic import ActorCritic, ActorCriticConfig, Nets, Work
from rlopt.agents.td import TDLoss, squared
from rlopt.buffers import Batch
from rlopt.nn import Critic, Net, Params, SquashedGaussianActor
from rlopt.nn.distributions import squashed_gaussian
from rlopt.types import Metrics, Obs, Update, option


@dataclass(frozen=True, kw_only=True)
class SAC2018Config(ActorCriticConfig):
    """Options of the first SAC; the defaults are the paper's (appendix D, tables 1 and 2)."""

    warmup_steps: int = option(
        1_000, "environment steps with uniformly random actions (10000: HalfCheetah, Ant)", low=0
    )
    reward_scale: float = option(
        5.0,
        "1/α; paper: 5 Hopper, Walker2d, HalfCheetah, Ant; 20 Humanoid; 25, 10 rllab's Swimmer, Humanoid",
        above=0.0,
    )
    policy_regulariser: float = option(1e-3, "on the squares of the policy's mean and log std (released code)", low=0.0)


@dataclass(frozen=True)
class ValueNets(Nets):
    """With a state value."""

    value: Net


def value_loss(
    nets: ValueNets, params: Params, actor: Params, critic: Params, obs: Obs, noise: Tensor
) -> tuple[Tensor, Metrics]:
    """Return the squared residual of the state value (eq. 5), with a = f(noise; s):

    J = ½ mean (V(s) - (minᵢ Qᵢ(s, a) - log π(a|s)))².
    """
    with torch.no_grad():
        mean, log_std = nets.actor(actor, obs)
        action, log_prob = squashed_gaussian(mean, log_std, noise)
        y = nets.critic(critic, obs, action).amin(0) - log_prob
    v = nets.value(params, obs).squeeze(0)
    return 0.5 * (v - y).square().mean(), {"v": v.detach().mean()}


def critic_loss(
    nets: ValueNets, params: Params, target: Params, batch: Batch, reward_scale: float, td: TDLoss = squared
) -> tuple[Tensor, Metrics]:
    """Return the soft Bellman residual of both critics (eq. 7), with the target of eq. 8.

    y = scale·r + γᵏ (1 - terminated) V̄(s');  J = Σᵢ ½ mean (Qᵢ(s, a) - y)².

    ``batch.action`` is normalised (B, A). Metrics include ``td`` (B,), the mean absolute residual of the two critics.
    """
    with torch.no_grad():
        next_value = nets.value(target, batch.next_obs).squeeze(0)
        y = reward_scale * batch.reward + batch.discount * (1.0 - batch.terminated) * next_value
    q = nets.critic(params, batch.obs, batch.action)
    residual = q - y
    return td(residual, batch.weight), {"q": q.detach().mean(), "td": residual.detach().abs().mean(0)}


def actor_loss(
    nets: ValueNets, params: Params, critic: Params, obs: Obs, noise: Tensor, regulariser: float
) -> tuple[Tensor, Metrics]:
    """Return the reparameterised policy objective (eq. 12): J = mean (log π(a|s) - minᵢ Qᵢ(s, a)),  a = f(noise; s).

    The released code adds ``regulariser`` · ½ (mean μ² + mean (log σ)²). Metrics include ``log_prob`` (B,).
    """
    mean, log_std = nets.actor(params, obs)
    action, log_prob = squashed_gaussian(mean, log_std, noise)
    q = nets.critic(critic, obs, action).amin(0)
    size = 0.5 * (mean.square().mean() + log_std.square().mean())
    return (log_prob - q).mean() + regulariser * size, {"log_prob": log_prob.detach()}


class SAC2018(ActorCritic):
    """The first soft actor-critic, for bounded Box action spaces.

    Before the critics' stage comes that of the state value, which the target follows (algorithm 1).
    """

    name: ClassVar[str] = "sac_2018"
    config_class = SAC2018Config
    config: SAC2018Config
    actor_module: SquashedGaussianActor
    nets: ValueNets

    def build(self) -> None:
        c, space = self.config, self.spec.observation_space
        self.actor_module = self.build_actor(SquashedGaussianActor)
        features = self.actor_module.action_features
        self.build_critic(lambda: Critic(space, c.network, features))
        self.value = self.net("value", lambda: Critic(space, c.network, ensemble=1))
        self.value_optimiser = self.add_optimiser("value_optimiser", self.value, c.learning_rate)
        self.build_target(self.value)
        self.nets = ValueNets(self.actor, self.critic, self.value)

    def prepare(self, batch: Batch) -> Work:
        batch = self.by_run(batch._replace(action=self.actor_module.normalise(batch.action)))
        shape = batch.action.shape[-2:]
        return Work(batch, (self.noise(*shape), self.noise(*shape)))

    def stages(self) -> tuple[str, ...]:
        return "value", *super().stages()

    def value_stage(self, work: Work) -> Update:
        actor, critic, value = self.actor.params, self.critic.params, self.value.params
        pure = partial(value_loss, self.nets)
        loss, metrics = self.per_run(pure)(value, actor, critic, work.batch.obs, work.noise[0])
        self.descend("value", self.value_optimiser, loss, self.value)
        return Update(metrics | {"value_loss": loss.detach()})

    def critic_objective(self, work: Work) -> tuple[Tensor, Metrics]:
        pure = partial(critic_loss, self.nets, reward_scale=self.config.reward_scale, td=self.td)
        return self.per_run(pure)(self.critic.params, self.target.params, work.batch)

    def actor_objective(self, work: Work) -> tuple[Tensor, Metrics]:
        pure = partial(actor_loss, self.nets, regulariser=self.config.policy_regulariser)
        actor, critic = self.actor.params, self.critic.params
        return self.per_run(pure)(actor, critic, work.batch.obs, work.noise[1])
