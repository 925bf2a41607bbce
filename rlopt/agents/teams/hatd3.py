"""TD3 for teams: HATD3, whose agents learn one after the other (Zhong et al. 2024, "Heterogeneous-Agent Reinforcement
Learning", JMLR, arXiv 2304.09870; the code read beside it is PKU-MARL/HARL @d539bad), and MATD3, whose agents learn
at once, each against what the others did when the transition was stored (Ackermann et al. 2019, arXiv 1910.01465).

Both share one pair of critics of the state and all actions, since all agents share a reward. With one agent both are
TD3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.agents.td3 import TD3, TD3Config
from rlopt.agents.teams.joint_critic import (
    JointBatch,
    JointCriticAgent,
    JointCriticConfig,
    TeamNets,
    TeamWork,
    living_mean,
    of_transitions,
)
from rlopt.agents.teams.members import own_actions
from rlopt.nn import Actor, DeterministicActor, Params
from rlopt.types import EnvSpec, Metrics, Obs, RloptError, Update, one_line


@dataclass(frozen=True, kw_only=True)
class HATD3Config(JointCriticConfig, TD3Config):
    """Options of HATD3: those of TD3 and the order of the agents."""


def smoothed_target(
    nets: TeamNets,
    actors: Sequence[Params],
    target: Params,
    batch: JointBatch,
    seen_next: Sequence[Obs],
    alive_next: Tensor | None,
    noise: Tensor,
    target_noise: float,
    clip: float,
) -> Tensor:
    """Return the critic's targets (M,), those of TD3 with every agent's target action smoothed:
    a'ⁱ = clip(μ̄ⁱ(oⁱ') + clip(σ ε, ±c), ±1);  y = r + γᵏ (1 - terminated) minₖ Q̄ₖ(s', a'). The dead do nothing.

    ``actors`` are the slow copies' parameters, ``noise`` ε (B, F) is standard normal.
    """
    smoothing = (target_noise * noise).clamp(-clip, clip)
    means = [net(params, seen) for net, params, seen in zip(nets.actors, actors, seen_next, strict=True)]
    action = (torch.cat(means, -1) + smoothing).clamp(-1.0, 1.0)
    if alive_next is not None:
        action = action * nets.spread(alive_next)
    next_value: Tensor = nets.critic(target, batch.next_obs, nets.tile(action)).amin(0)
    y: Tensor = nets.tile(batch.reward) + nets.tile(batch.discount) * (1.0 - batch.terminated) * next_value
    return y


def actor_loss(
    nets: TeamNets,
    i: int,
    params: Params,
    critic: Params,
    obs: Obs,
    seen: Obs,
    actions: Tensor,
    alive: Tensor | None,
) -> tuple[Tensor, Metrics]:
    """Agent i's deterministic policy gradient: J = -mean Q₁(s, a) with aⁱ = μⁱ(oⁱ) and the others' actions as in
    ``actions`` (B, F), over the rows in which it lives. Where agents have states of their own the value is the mean
    over those of the living."""
    whole = nets.put(actions, i, nets.actors[i](params, seen))
    q = of_transitions(nets.critic(critic, obs, nets.tile(whole))[0], nets.rows, alive)
    return -living_mean(q, None if alive is None else alive[:, i]), {}


class HATD3(JointCriticAgent, TD3):  # type: ignore[misc]  # their minibatches are joint
    """Heterogeneous-agent TD3, for teams in bounded Box action spaces."""

    name: ClassVar[str] = "hatd3"
    config_class = HATD3Config
    config: HATD3Config
    noises: ClassVar[int] = 1

    def build(self) -> None:
        explores = {"exploration": self.config.exploration_noise}

        def make(spec: EnvSpec, options: dict[str, object]) -> Actor:
            if not isinstance(spec.action_space, spaces.Box):
                space = one_line(spec.action_space)
                raise RloptError(
                    f"agent={self.name} acts in Box action spaces, not in {space}; use agent=hasac or masac"
                )
            return DeterministicActor(spec.observation_space, spec.action_space, options | explores)

        self.build_team(make, own_actions)
        if self.members.shared:
            self.target_actors = [self.persist("target_actor", self.actor.target())] * self.members.count
        else:
            named = ((self.members.name("target_actor", i), net) for i, net in enumerate(self.actors))
            self.target_actors = [self.persist(name, net.target()) for name, net in named]

    def stages(self) -> tuple[str, ...]:
        acts = "actor" in TD3.stages(self)
        return ("critic", *self.actor_stages(), "target") if acts else ("critic",)

    @torch.no_grad()
    def target_values(self, work: TeamWork) -> tuple[Tensor, Metrics]:
        c = self.config
        pure = partial(smoothed_target, self.nets, target_noise=c.target_noise, clip=c.target_noise_clip)
        slow = tuple(net.params for net in self.target_actors)
        data = (work.batch, work.seen_next, work.alive_next, work.noise[0])
        return self.per_run(pure)(slow, self.target.params, *data), {}

    def agent_objective(self, work: TeamWork, i: int) -> tuple[Tensor, Metrics]:
        return self.per_run(partial(actor_loss, self.nets, i))(
            self.actors[i].params, self.critic.params, work.batch.obs, work.seen[i], work.actions, work.alive
        )

    def target_stage(self, work: Any) -> Update:
        count = 1 if self.members.shared else self.members.count
        for slow, net in zip(self.target_actors[:count], self.actors[:count], strict=True):
            slow.follow(net, self.config.tau)
        self.target.follow(self.followed, self.config.tau)
        return Update({})


class MATD3(HATD3):
    """Multi-agent TD3: every agent learns against the others' stored actions, all at once."""

    name: ClassVar[str] = "matd3"
    sees_present: ClassVar[bool] = False
    refreshes: ClassVar[bool] = False
