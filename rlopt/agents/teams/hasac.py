"""Heterogeneous-agent soft actor-critic (Liu et al. 2024, "Maximum Entropy Heterogeneous-Agent Reinforcement Learning",
ICLR, arXiv 2306.10715; the code read beside it is PKU-MARL/HARL @d539bad), and MASAC, its simultaneous twin.

Agents share a reward and a critic of the state and everybody's actions. In a random order each climbs that critic plus
its own entropy, seeing what those before it have become. Where all have a best answer of this kind nobody gains by
changing alone: a quantal response equilibrium, πⁱ(a) ∝ exp(E Q(s, a, a⁻ⁱ) / α). With one agent all of this is SAC.

Seven faults of the released code are not copied. Where it matters: a discrete agent's target entropy was 0 by accident
(``target_entropy_ratio=0`` brings that back; 0.98 is what was meant); the dead were masked in the actors' losses alone;
with normalised values the actors weighed entropies against values in other units than the critic's targets do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlopt.agents.actor_critic import ActorCriticConfig
from rlopt.agents.replay_agent import ReplayAgent
from rlopt.agents.teams.joint_critic import (
    JointBatch,
    JointCriticAgent,
    JointCriticConfig,
    TeamNets,
    TeamWork,
    living_mean,
    of_transitions,
)
from rlopt.agents.teams.members import MAX_CHOICES, own_actions, stochastic_actor
from rlopt.agents.temperature import LEARNED, Temperature, TemperatureConfig
from rlopt.agents.value_normaliser import ValueNormaliser
from rlopt.nn import Params
from rlopt.types import Metrics, Obs, RloptError, Update, map_obs, option


@dataclass(frozen=True, kw_only=True)
class SoftConfig(TemperatureConfig, ActorCriticConfig):
    """Options of any soft actor-critic of a team. The defaults are SAC's."""

    target_entropy: float | None = option(
        None, "entropy each agent's temperature aims at, in nats (null: -dim A, or the ratio of log n)", needs=LEARNED
    )
    target_entropy_ratio: float = option(
        0.98,
        "of discrete agents, as a fraction of log n (0.98: meant; 0: released; few actions want 0.2 to 0.5)",
        low=0.0,
        high=1.0,
        needs=LEARNED,
    )
    expectation: str = option(
        "sampled",
        "over an agent's discrete actions: straight-through, or exact",
        choices=("sampled", "exact"),
    )
    value_normalisation: bool = option(False, "the critic learns values in units of their running deviation")


@dataclass(frozen=True, kw_only=True)
class HASACConfig(SoftConfig, JointCriticConfig):
    """Options of HASAC; the experiments hold the authors' settings."""

    critic_temperature: str = option(
        "own", "what a nat is worth to the critic: its own temperature, or each agent's", choices=("own", "agents")
    )


def soft_target(
    nets: TeamNets,
    actors: Sequence[Params],
    target: Params,
    temperature: Tensor,
    batch: JointBatch,
    seen_next: Sequence[Obs],
    alive_next: Tensor | None,
    noise: Tensor,
    moments: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
    """Return the critic's targets (M,): y = r + γᵏ (1 - terminated) (minₖ Q̄ₖ(s', a') - Σᵢ αᵢ log πⁱ(a'ⁱ|oⁱ')), where
    every a'ⁱ is drawn from the present policy. The dead neither act nor have an entropy.

    ``temperature`` (n,) are the αᵢ (n times the critic's own), ``noise`` (B, F), ``moments`` (2,) the mean and
    deviation of normalised values.
    """
    found = [
        act(nets, i, params, seen, draw, exact)
        for i, (params, seen, draw) in enumerate(
            zip(actors, seen_next, torch.split(noise, nets.widths, -1), strict=True)
        )
    ]
    action, log_prob = torch.cat([a for a, _ in found], -1), torch.stack([p for _, p in found], -1)
    if alive_next is not None:
        action, log_prob = action * nets.spread(alive_next), log_prob * alive_next
    next_q = raw(nets.critic(target, batch.next_obs, nets.tile(action)).amin(0), moments)
    next_value = next_q - nets.tile((temperature * log_prob).sum(-1))
    return nets.tile(batch.reward) + nets.tile(batch.discount) * (1.0 - batch.terminated) * next_value


def actor_loss(
    nets: TeamNets,
    i: int,
    params: Params,
    critic: Params,
    temperature: Tensor,
    obs: Obs,
    seen: Obs,
    actions: Tensor,
    alive: Tensor | None,
    noise: Tensor,
    moments: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, Metrics]:
    """Return agent i's objective: J = mean (αᵢ log πⁱ(aⁱ|oⁱ) - minₖ Qₖ(s, a)), with aⁱ reparameterised and the others'
    actions as in ``actions`` (B, F), over the rows in which it lives.

    ``exact`` sums over its K actions instead: J = mean Σ_a πⁱ(a|oⁱ) (αᵢ log πⁱ(a|oⁱ) - minₖ Qₖ(s, a, a⁻ⁱ)). ``obs``
    (M, …) is what the critic sees, ``seen`` (B, …) what the agent does, ``alive`` (B, n). Where agents have states of
    their own the value is the mean over those of the living. Metrics include ``log_prob`` (B,), expected if ``exact``.
    """
    outputs, own = nets.actors[i](params, seen), nets.own[i]
    mine = None if alive is None else alive[:, i]

    def value(obs: Obs, action: Tensor, others: Tensor) -> Tensor:
        q = raw(nets.critic(critic, obs, nets.tile(nets.put(others, i, action))).amin(0), moments)
        return of_transitions(q, nets.rows, alive)

    if exact and own.choices is not None:
        count, size = len(own.choices), len(noise)
        with torch.no_grad():  # all choices as one minibatch of K · B
            action = own.choices.repeat_interleave(size, 0)
            every = value(map_obs(partial(again, count=count), obs), action, again(actions, count)).view(count, size).T
        log_pi = choice_log_prob(own, outputs)
        pi = log_pi.exp()
        loss = living_mean((pi * (temperature * log_pi - every)).sum(-1), mine)
        return loss, {"log_prob": (pi * log_pi).sum(-1).detach()}
    action, log_prob = own.sample(outputs, noise)
    loss = living_mean(temperature * log_prob - value(obs, action, actions), mine)
    return loss, {"log_prob": log_prob.detach()}


def again(x: Tensor, count: int) -> Tensor:
    """Return ``x`` (B, …) ``count`` times, one after the other."""
    return x.expand(count, *x.shape).flatten(0, 1)


def act(nets: TeamNets, i: int, params: Params, seen: Obs, noise: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Return agent i's actions (B, F_i) and log π (B,), of discrete ones if ``exact`` its expectation."""
    outputs, own = nets.actors[i](params, seen), nets.own[i]
    action, log_prob = own.sample(outputs, noise)
    if exact and own.choices is not None:
        log_pi = choice_log_prob(own, outputs)
        log_prob = (log_pi.exp() * log_pi).sum(-1)
    return action, log_prob


def choice_log_prob(own: Any, outputs: Any) -> Tensor:
    """Return log π (B, K) of each of an agent's K discrete actions."""
    return own.log_pi(outputs) @ own.choices.T  # type: ignore[no-any-return]


def raw(q: Tensor, moments: Tensor | None) -> Tensor:
    """Return values in units of the reward."""
    return q if moments is None else moments[0] + moments[1] * q


class HASAC(JointCriticAgent):
    """Heterogeneous-agent soft actor-critic, for teams in Box, Discrete and MultiDiscrete action spaces."""

    name: ClassVar[str] = "hasac"
    config_class = HASACConfig
    config: HASACConfig

    def build(self) -> None:
        c = self.config
        self.exact = c.expectation == "exact"
        self.build_team(stochastic_actor, own_actions)
        discrete = any(own.log_pi is not None for own in self.nets.own)
        if c.target_entropy_ratio != SoftConfig.target_entropy_ratio and (c.target_entropy is not None or not discrete):
            why = (
                "beside agent.target_entropy" if discrete else f"on the actions of {self.spec.id}, which are continuous"
            )
            raise RloptError(f"agent.target_entropy_ratio={c.target_entropy_ratio:g} has no effect {why}; leave it out")
        if self.exact and any(own.choices is None for own in self.nets.own):
            raise RloptError(
                f"agent.expectation=exact sums over all actions of an agent, which must be discrete and at most "
                f"{MAX_CHOICES}; use sampled"
            )
        goals = [
            (own.entropy_scale * c.target_entropy_ratio if own.log_pi is not None else own.entropy_scale)
            if c.target_entropy is None else c.target_entropy
            for own in self.nets.own
        ]  # fmt: skip
        names = [self.members.name("temperature", i) for i in range(self.members.count)]
        self.temperatures = [Temperature(self, goal, name) for goal, name in zip(goals, names, strict=True)]
        tied = c.critic_temperature == "agents"
        self.critic_temperature = None if tied else Temperature(self, sum(goals), "critic_temperature")
        self.normaliser = ValueNormaliser(self) if c.value_normalisation else None

    def constants(self) -> list[Any]:
        every = [*self.temperatures, *([self.critic_temperature] if self.critic_temperature else [])]
        return [*ReplayAgent.constants(self), [each.target_entropy for each in every]]

    def moments(self) -> Tensor | None:
        """Return mean and deviation of normalised values, (2,) or (R, 2)."""
        return None if self.normaliser is None else self.normaliser.moments()

    @torch.no_grad()
    def target_values(self, work: TeamWork) -> tuple[Tensor, Metrics]:
        own = torch.stack([each.value for each in self.temperatures], -1)
        told = {"temperature": own.mean(-1)}
        if self.critic_temperature is not None:
            alpha = self.critic_temperature.value
            told["critic_temperature"] = alpha
            own = alpha.unsqueeze(-1).expand_as(own)
        y = self.per_run(partial(soft_target, self.nets, exact=self.exact))(
            tuple(net.params for net in self.actors), self.target.params, own, work.batch, work.seen_next,
            work.alive_next, work.noise[0], self.moments(),
        )  # fmt: skip
        if self.normaliser is not None:
            self.normaliser.see(y, work.batch.weight)
            mean, deviation = self.normaliser.moments().unsqueeze(-1).unbind(-2)
            y = (y - mean) / deviation
        return y, told

    def agent_objective(self, work: TeamWork, i: int) -> tuple[Tensor, Metrics]:
        return self.per_run(partial(actor_loss, self.nets, i, exact=self.exact))(
            self.actors[i].params, self.critic.params, self.temperatures[i].value, work.batch.obs, work.seen[i],
            work.actions, work.alive, self.nets.cut(work.noise[1], i)[1], self.moments(),
        )  # fmt: skip

    def learnt(self, work: TeamWork, i: int, aux: Metrics) -> Metrics:
        log_prob, temperature = aux["log_prob"], self.temperatures[i]
        work.log_prob[..., i].copy_(log_prob)
        alive = None if work.alive is None else work.alive[..., i]
        if alive is None:
            temperature.descend(log_prob)
            return {self.members.metric("entropy", i): -log_prob.mean(-1)}
        scale = alive / alive.mean(-1, keepdim=True).clamp(min=1.0 / alive.shape[-1])
        goal = temperature.target_entropy
        # So that its mean is that over the living.
        temperature.descend(scale * (log_prob + goal) - goal, self.lives(work, i))
        return {self.members.metric("entropy", i): -(scale * log_prob).mean(-1)}

    def stages(self) -> tuple[str, ...]:
        own = () if self.critic_temperature is None else ("temperature",)
        return ("critic", *self.actor_stages(), *own, "target")

    def temperature_stage(self, work: TeamWork) -> Update:
        """Move the critic's own temperature: the living's entropies together are to be their targets together."""
        assert self.critic_temperature is not None
        total = torch.zeros_like(work.log_prob[..., 0])
        for i, each in enumerate(self.temperatures):
            beyond = work.log_prob[..., i] + each.target_entropy
            total += beyond if work.alive is None else beyond * work.alive[..., i]
        self.critic_temperature.descend(total - self.critic_temperature.target_entropy, self.lives(work))
        return Update({})


class MASAC(HASAC):
    """HASAC without its sequence: every agent's loss sees the others as they were before the update."""

    name: ClassVar[str] = "masac"
    refreshes: ClassVar[bool] = False
