"""An agent of one's own: deep deterministic policy gradient (Lillicrap et al. 2015, arXiv 1509.02971) in one file.

What it gets from ``ActorCritic``: warm-up, optimisers by name, the guard, exact resume, many runs, CUDA graphs, export.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial

import torch

import rlopt
from rlopt.agents import ActorCritic, ActorCriticConfig
from rlopt.agents.actor_critic import Nets, Work
from rlopt.nn import Critic, DeterministicActor
from rlopt.registry import register_agent
from rlopt.types import Update, option


@dataclass(frozen=True, kw_only=True)
class DDPGConfig(ActorCriticConfig):
    """Options of DDPG; ``rlopt train agent=ddpg --options`` would show their help."""

    exploration_noise: float = option(0.1, "standard deviation of the noise on actions in training", low=0.0)


def critic_loss(nets, params, target_actor, target, batch):
    """J = ½ mean (Q(s, a) - y)²,  y = r + γᵏ (1 - terminated) Q̄(s', μ̄(s')) (their eq. 4 and 5)."""
    with torch.no_grad():
        next_action = nets.actor(target_actor, batch.next_obs)
        y = batch.reward + batch.discount * (1.0 - batch.terminated) * nets.critic(target, batch.next_obs, next_action)
    residual = nets.critic(params, batch.obs, batch.action) - y
    return 0.5 * residual.square().mean(), {"td": residual.detach().abs().mean(0)}


def actor_loss(nets, params, critic, obs):
    """J = -mean Q(s, μ(s)) (their eq. 6)."""
    return -nets.critic(critic, obs, nets.actor(params, obs)).mean(), {}


class DDPG(ActorCritic):
    """Deep deterministic policy gradient."""

    name = "ddpg"
    config_class = DDPGConfig

    def build(self):
        c, space = self.config, self.spec.observation_space
        noise = {"exploration": c.exploration_noise}
        self.actor_module = self.build_actor(lambda o, a, options: DeterministicActor(o, a, options | noise))
        self.build_critic(lambda: Critic(space, c.network, self.actor_module.action_features, ensemble=1))
        self.build_target(self.critic)
        self.target_actor = self.persist("target_actor", self.actor.target())
        self.nets = Nets(self.actor, self.critic)

    def prepare(self, batch):
        return Work(self.by_run(batch._replace(action=self.actor_module.normalise(batch.action))))

    def critic_objective(self, work):
        pure = self.per_run(partial(critic_loss, self.nets))
        return pure(self.critic.params, self.target_actor.params, self.target.params, work.batch)

    def actor_objective(self, work):
        return self.per_run(partial(actor_loss, self.nets))(self.actor.params, self.critic.params, work.batch.obs)

    def target_stage(self, work):
        self.target_actor.follow(self.actor, self.config.tau)
        return Update(super().target_stage(work).metrics)


def main(total_steps: int = 10_000) -> None:
    register_agent("ddpg", DDPG)
    result = rlopt.train(
        agent="ddpg", env="Pendulum-v1", total_steps=total_steps, num_runs=2,
        **{"agent.warmup_steps": total_steps // 10, "agent.learning_rate": 1e-3},
    )  # fmt: skip
    print(result.folder, result.evaluations)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
