"""Twin delayed deep deterministic policy gradient (Fujimoto, van Hoof and Meger 2018, "Addressing Function
Approximation Error in Actor-Critic Methods", arXiv 1802.09477; equation numbers below are that paper's).

Two critics learn the value of a slow copy of a deterministic actor whose action is smoothed with clipped noise; the
actor climbs the first critic, and only every ``policy_delay``-th update moves it and all targets. Noise lives in
normalised action space, where every dimension of the Box is [-1, 1]: a Box of ±0.4 has a target noise of 0.08.
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
from rlopt.nn import Critic, DeterministicActor, Params
from rlopt.types import Metrics, Obs, Update, option


@dataclass(frozen=True, kw_only=True)
class TD3Config(ActorCriticConfig):
    """Options of TD3; the defaults are the paper's and its code's (sfujim/TD3)."""

    warmup_steps: int = option(
        25_000, "environment steps with uniformly random actions (code: 1000 for the pendulums and Reacher)", low=0
    )
    exploration_noise: float = option(0.1, "standard deviation of the noise on actions in training", low=0.0)
    target_noise: float = option(0.2, "standard deviation of the smoothing noise on the target's actions", low=0.0)
    target_noise_clip: float = option(0.5, "bound of the smoothing noise", low=0.0)
    policy_delay: int = option(2, "critic updates per update of the actor and all targets", low=1)


def critic_loss(
    nets: Nets,
    params: Params,
    target_actor: Params,
    target: Params,
    batch: Batch,
    noise: Tensor,
    target_noise: float,
    clip: float,
    td: TDLoss = squared,
) -> tuple[Tensor, Metrics]:
    """Return the loss of clipped double Q-learning (eq. 10) with target policy smoothing (eq. 14 and 15).

    a' = clip(μ̄(s') + clip(σ ε, ±c), ±1);  y = r + γᵏ (1 - terminated) minᵢ Q̄ᵢ(s', a');  J = Σᵢ ½ mean (Qᵢ(s, a) - y)²,
    or what ``td`` makes of the residuals.

    ``batch.action`` is normalised (B, A), ``noise`` ε (B, A) standard normal. Metrics include ``td`` (B,), the mean
    absolute residual of the two critics, which prioritised samplers use.
    """
    with torch.no_grad():
        smoothing = (target_noise * noise).clamp(-clip, clip)
        # Clamped again: a critic was never asked about actions outside the box, and its maximum may lie there.
        next_action = (nets.actor(target_actor, batch.next_obs) + smoothing).clamp(-1.0, 1.0)
        next_value = nets.critic(target, batch.next_obs, next_action).amin(0)
        # A time limit is no end (``terminated`` is 0 there): the value goes on beyond it.
        y = batch.reward + batch.discount * (1.0 - batch.terminated) * next_value
    q = nets.critic(params, batch.obs, batch.action)
    residual = q - y
    return td(residual, batch.weight), {"q": q.detach().mean(), "td": residual.detach().abs().mean(0)}


def actor_loss(nets: Nets, params: Params, critic: Params, obs: Obs) -> tuple[Tensor, Metrics]:
    """Return the loss of the deterministic policy gradient (section 4.3, algorithm 1): J = -mean Q₁(s, μ(s)), by the
    first critic alone.

    Only the actor learns from it: the caller differentiates by ``params``, not by ``critic``.
    """
    return -nets.critic(critic, obs, nets.actor(params, obs))[0].mean(), {}


class TD3(ActorCritic):
    """Twin delayed deep deterministic policy gradient, for bounded Box action spaces."""

    name: ClassVar[str] = "td3"
    config_class = TD3Config
    config: TD3Config
    actor_module: DeterministicActor

    def build(self) -> None:
        c, space = self.config, self.spec.observation_space
        explores = {"exploration": c.exploration_noise}
        self.actor_module = self.build_actor(lambda o, a, options: DeterministicActor(o, a, options | explores))
        features = self.actor_module.action_features
        self.build_critic(lambda: Critic(space, c.network, features))
        self.build_target(self.critic)
        self.target_actor = self.persist("target_actor", self.actor.target())
        self.nets = Nets(self.actor, self.critic)

    def prepare(self, batch: Batch) -> Work:
        batch = self.by_run(batch._replace(action=self.actor_module.normalise(batch.action)))
        return Work(batch, (self.noise(*batch.action.shape[-2:]),))

    def stages(self) -> tuple[str, ...]:
        # As in the authors' code the actor's first update is the delay-th; the targets move with it, never without.
        acts = (self.clock.updates + 1) % self.config.policy_delay == 0
        return ("critic", "actor", "target") if acts else ("critic",)

    def critic_objective(self, work: Work) -> tuple[Tensor, Metrics]:
        c = self.config
        pure = partial(
            critic_loss, self.nets, target_noise=c.target_noise, clip=c.target_noise_clip, td=self.td
        )  # fmt: skip
        critic, actor, target = self.critic.params, self.target_actor.params, self.target.params
        return self.per_run(pure)(critic, actor, target, work.batch, work.noise[0])

    def actor_objective(self, work: Work) -> tuple[Tensor, Metrics]:
        return self.per_run(partial(actor_loss, self.nets))(self.actor.params, self.critic.params, work.batch.obs)

    def target_stage(self, work: Work) -> Update:
        self.target_actor.follow(self.actor, self.config.tau)
        return super().target_stage(work)
