"""Soft actor-critic with learned temperature (Haarnoja et al. 2018b, "Soft Actor-Critic Algorithms and Applications",
arXiv 1812.05905; equation numbers below are that paper's).

Two critics learn the soft value of the current policy, a squashed Gaussian actor climbs their minimum plus its entropy,
and the temperature moves so that the entropy stays near a target. Log-probabilities live in normalised action space
[-1, 1]: the scale of the environment's bounds never enters them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from rlopt.agents.actor_critic import ActorCritic, ActorCriticConfig, Nets, Work
from rlopt.agents.td import TDLoss, squared
from rlopt.agents.temperature import LEARNED, Temperature, TemperatureConfig
from rlopt.buffers import Batch
from rlopt.fast.lanes import Lanes
from rlopt.nn import Critic, Params, SquashedGaussianActor
from rlopt.nn.distributions import squashed_gaussian
from rlopt.types import Metrics, Obs, Update, option

if TYPE_CHECKING:  # machine code, whose import takes as long as half of torch's
    from rlopt.fast import fused_sac


@dataclass(frozen=True, kw_only=True)
class SACConfig(TemperatureConfig, ActorCriticConfig):
    """Options of SAC; the defaults are the paper's (table 1), with target entropy -dim(A)."""

    target_entropy: float | None = option(
        None, "entropy the learned temperature aims at, in nats (null: -dim A)", needs=LEARNED
    )
    policy_delay: int = option(1, "critic updates per update of actor and temperature", low=1)
    fused: bool = option(True, "use the hand-written gradients where they apply (ReLU networks on the CPU)")


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
    """Return the soft Bellman residual of both critics (eq. 5), with the target of eq. 3 and 6.

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
        # A time limit is no end (``terminated`` is 0 there): the value goes on beyond it.
        y = batch.reward + batch.discount * (1.0 - batch.terminated) * next_value
    q = nets.critic(params, batch.obs, batch.action)
    residual = q - y
    return td(residual, batch.weight), {"q": q.detach().mean(), "td": residual.detach().abs().mean(0)}


def actor_loss(
    nets: Nets, params: Params, critic: Params, temperature: Tensor, obs: Obs, noise: Tensor
) -> tuple[Tensor, Metrics]:
    """Return the reparameterised policy objective (eq. 9): J = mean (α log π(a|s) - minᵢ Qᵢ(s, a)),  a = f(noise; s).

    Metrics include ``log_prob`` (B,), which the temperature's loss uses.
    """
    mean, log_std = nets.actor(params, obs)
    action, log_prob = squashed_gaussian(mean, log_std, noise)
    # The gradient runs through the critic to the action, and on to the actor; of the critic's own parameters none is
    # taken, since the caller differentiates by ``params``. Detached, log π moves the temperature and not the actor.
    q = nets.critic(critic, obs, action).amin(0)
    loss = (temperature * log_prob - q).mean()
    return loss, {"log_prob": log_prob.detach()}


class SAC(ActorCritic):
    """Soft actor-critic for bounded Box action spaces."""

    name: ClassVar[str] = "sac"
    config_class = SACConfig
    config: SACConfig
    actor_module: SquashedGaussianActor
    temperature: Temperature

    def build(self) -> None:
        c, space = self.config, self.spec.observation_space
        self.actor_module = self.build_actor(SquashedGaussianActor)
        features = self.actor_module.action_features
        self.build_critic(lambda: Critic(space, c.network, features))
        self.build_target(self.critic)
        self.nets = Nets(self.actor, self.critic)
        self.temperature = Temperature(self, -float(features) if c.target_entropy is None else c.target_entropy)
        self.fused: fused_sac.FusedUpdate | fused_sac.FusedRuns | None = None
        if c.fused:
            self._fuse()

    def _fuse(self) -> None:
        """Take the hand-written update where it applies."""
        from rlopt.fast import fused_sac

        if fused_sac.applies(self, SAC, Temperature):
            one = self.runs == 1
            # No phase of an update has more than two tasks.
            lanes = Lanes(min(2, torch.get_num_threads()))
            self.fused = fused_sac.FusedUpdate(self, None, lanes) if one else fused_sac.FusedRuns(self)
            self.fast_act = fused_sac.FusedActor(self)

    def prepare(self, batch: Batch) -> Work:
        batch = self.by_run(batch._replace(action=self.actor_module.normalise(batch.action)))
        shape = batch.action.shape[-2:]
        return Work(batch, (self.noise(*shape), self.noise(*shape)))

    def stages(self) -> tuple[str, ...]:
        acts = self.clock.updates % self.config.policy_delay == 0
        return ("critic", "actor", "target") if acts else ("critic", "target")

    def critic_objective(self, work: Work) -> tuple[Tensor, Metrics]:
        pure, temperature = partial(critic_loss, self.nets, td=self.td), self.temperature.value
        actor, critic, target = self.actor.params, self.critic.params, self.target.params
        loss, metrics = self.per_run(pure)(critic, actor, target, temperature, work.batch, work.noise[0])
        return loss, metrics | {"temperature": temperature}

    def actor_objective(self, work: Work) -> tuple[Tensor, Metrics]:
        actor, critic, temperature = self.actor.params, self.critic.params, self.temperature.value
        pure = partial(actor_loss, self.nets)
        return self.per_run(pure)(actor, critic, temperature, work.batch.obs, work.noise[1])

    def compiled(self, work: Work) -> Update | None:
        if self.fused is None or not all(self.actor.learns + self.critic.learns):
            return None
        batch, (next_noise, noise) = work
        if batch.reward.shape[-1] != self.config.batch_size:
            return None
        if self.guard.is_open:  # of the guard, compiled code reads the code alone
            self.guard.remember()
        return self.fused(batch, next_noise, noise, self.schedule.factor(self.clock), "actor" in self.stages())
