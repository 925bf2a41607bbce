"""The agents of a team to its learner: what each sees, what it does as a part of one joint vector, and how they act."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.agents.replay_agent import ReplayAgent
from rlopt.agents.sequences import Course
from rlopt.joint import own_action, own_obs, shared_agent, shared_obs
from rlopt.nn import Actor, CategoricalActor, DeterministicActor, MultiCategoricalActor, SquashedGaussianActor
from rlopt.nn.distributions import squashed_gaussian
from rlopt.policy import Policy
from rlopt.policy.team import TeamActor
from rlopt.types import Act, Carry, EnvSpec, Obs, RloptError, map_obs

MAX_CHOICES = 256
"""Joint choices of one agent's heads up to which an expectation may be an exact sum."""


class Members:
    """The n agents of an environment; a single-agent environment is a team of one.

    Args:
        spec: of the environment.
        shared: whether one network acts for all, which then sees padded rows and who it is.
    """

    def __init__(self, spec: EnvSpec, shared: bool = False) -> None:
        self.spec, self.shared = spec, shared and bool(spec.agents)
        self.count = max(len(spec.agents), 1)
        one = [_shared(spec)] * self.count if self.shared else [spec.of_agent(i) for i in range(len(spec.agents))]
        self.specs = one or [spec]
        """What the network of each sees and does."""
        self.agents = [spec.of_agent(i) for i in range(len(spec.agents))] or [spec]
        """What each itself sees and does."""

    def name(self, word: str, i: int) -> str:
        """Return how the part ``word`` of agent i is called; a team of one names its parts as a single agent does."""
        return word if self.count == 1 else f"{word}_{i}"

    def metric(self, word: str, i: int) -> str:
        """Return how agent i's metric ``word`` is called."""
        return word if self.count == 1 else f"{word}/{self.spec.agents[i]}"

    def seen(self, obs: Obs) -> tuple[Obs, ...]:
        """Return what each agent's network sees, (…, *own shape), of joint observations."""
        if not self.spec.agents:
            return (obs,)
        if not self.shared:
            return tuple(own_obs(self.spec, obs, i) for i in range(self.count))
        rows = shared_obs(self.spec, obs)
        axis = rows["agent"].dim() - 1
        return tuple(map_obs(lambda x, i=i: x.select(axis, i), rows) for i in range(self.count))  # type: ignore[misc]

    def rows(self, obs: Obs | Course) -> tuple[Obs | Course, ...]:
        """Return what each network sees of joint observations (…, B, …), its rows: (…, B, *own shape), of a network
        that all share (…, n·B, *own shape), the agents one after the other. A course, of slices, becomes theirs."""
        course = obs if isinstance(obs, Course) else None
        if course is None and not self.shared:
            return self.seen(obs)  # type: ignore[arg-type]
        if not self.shared:
            assert course is not None
            own = self.seen(course.obs)
            return tuple(course._replace(obs=x, carry=_each(course.carry, i)) for i, x in enumerate(own))
        several = shared_obs(self.spec, obs if course is None else course.obs)  # type: ignore[arg-type]
        to = several["agent"].dim() - (2 if course is None else 3)
        rows = {key: x.movedim(several["agent"].dim() - 1, to).flatten(to, to + 1) for key, x in several.items()}
        if course is None:
            return (rows,)
        burnt = course.burnt.unsqueeze(-3).expand(*course.burnt.shape[:-2], self.count, *course.burnt.shape[-2:])
        carry = {key: x.transpose(-3, -2).flatten(-3, -2) for key, x in course.carry.items()}
        return (course._replace(obs=rows, burnt=burnt.flatten(-3, -2), carry=carry),)

    def acts(self, action: Tensor) -> list[Tensor]:
        """Return what each agent does, (…, *own shape), of joint actions."""
        if not self.spec.agents:
            return [action]
        if self.shared:
            axis = action.dim() - len(self.spec.action_space.shape or ())
            return [action.select(axis, i) for i in range(self.count)]
        return [own_action(self.spec, action, i) for i in range(self.count)]

    def team(self, actors: Sequence[Actor]) -> Actor:
        """Return the networks of all agents as one actor of the environment."""
        if not self.spec.agents:
            return actors[0]
        return TeamActor(self.spec, actors[:1] if self.shared else actors, self.shared)


def _each(carry: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {key: x.select(-2, i) for key, x in carry.items()}


def _shared(spec: EnvSpec) -> EnvSpec:
    try:
        return shared_agent(spec)
    except RloptError as error:
        raise RloptError(f"agent.share_parameters=true: {error}") from error


@dataclass(frozen=True)
class OwnActions:
    """One agent's actions as a vector that a critic reads, and how its policy draws them."""

    features: int
    """F_i, numbers of the vector."""
    encode: Callable[[Tensor], Tensor]
    """From actions (B, …) in environment units to vectors (B, F_i)."""
    sample: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    """From what the network gave and standard normal noise (B, F_i) to reparameterised vectors (B, F_i) and log π (B,);
    of a deterministic policy to the action itself, and 0."""
    entropy_scale: float
    """In nats: of n discrete actions log n (summed over heads), of A continuous dimensions -A."""
    log_pi: Callable[[Any], Tensor] | None = None
    """Of discrete actions, from what the network gave to log-probabilities (B, F_i)."""
    choices: Tensor | None = None
    """(M, F_i) the vectors of all M discrete actions; None where there are too many, or infinitely many."""


def own_actions(module: Actor, spec: EnvSpec) -> OwnActions:
    """Return how the agent ``spec``, whose network this is, acts."""
    if isinstance(module, DeterministicActor):
        size = module.action_features
        return OwnActions(size, module.normalise, lambda action, noise: (action, torch.zeros_like(action[:, 0])), 0.0)
    if isinstance(module, SquashedGaussianActor):
        size = module.action_features
        return OwnActions(
            size, module.normalise, lambda out, noise: squashed_gaussian(out[0], out[1], noise), -float(size)
        )
    assert isinstance(module, CategoricalActor | MultiCategoricalActor)
    several = isinstance(module, MultiCategoricalActor)
    sizes = _head_sizes(spec)
    heads, start = len(sizes), module.start
    widest = max(sizes) if several else module.actions  # a network that all share knows the actions of all

    def encode(action: Tensor) -> Tensor:
        return one_hot((action - start).long().reshape(len(action), heads), widest)

    def log_pi(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).flatten(1) if several else logits.log_softmax(-1)

    def sample(logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return straight_through(logits if several else logits.unsqueeze(-2), noise)

    count = math.prod(sizes)
    choices = None
    if count <= MAX_CHOICES:
        device = next(module.parameters()).device
        index = torch.cartesian_prod(*(torch.arange(k, device=device) for k in sizes)).view(count, len(sizes))
        choices = one_hot(index, widest)
    return OwnActions(heads * widest, encode, sample, sum(map(math.log, sizes)), log_pi, choices)


def _head_sizes(spec: EnvSpec) -> list[int]:
    space: Any = spec.action_space
    return [int(space.n)] if isinstance(space, spaces.Discrete) else [int(k) for k in space.nvec.ravel()]


def one_hot(index: Tensor, size: int) -> Tensor:
    """Return indices (B, heads) as vectors (B, heads · size) of ones and zeros."""
    return ones_at(index, size).flatten(-2)


def ones_at(index: Tensor, size: int) -> Tensor:
    """Return float vectors (…, size) with a 1 at ``index`` (…,). (``F.one_hot`` looks into the tensor on the host.)"""
    return (index.unsqueeze(-1) == torch.arange(size, device=index.device)).float()


def straight_through(logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return one-hot samples (B, heads · K) of categoricals with ``logits`` (B, heads, K), and their log-probability
    (B,): the hard Gumbel-softmax at temperature 1 (Jang et al. 2017, arXiv 1611.01144), one-hot forwards and soft
    backwards. The Gumbel noise is made of standard normal ``noise`` (B, heads · K) by inversion.

    The gradient is biased; ``agent.expectation=exact`` has none of it.
    """
    normal = noise.view(logits.shape)
    tail = 0.5 * torch.erfc(normal.abs() * math.sqrt(0.5))
    gumbel = -torch.where(normal > 0.0, -torch.log1p(-tail), -tail.log()).log()  # -log(-log Φ), exact in both tails
    log_pi = logits.log_softmax(-1)
    soft = (log_pi + gumbel).softmax(-1)
    hard = ones_at(soft.argmax(-1), soft.shape[-1])
    action = hard + (soft - soft.detach())
    return action.flatten(-2), (action * log_pi).flatten(-2).sum(-1)


NETWORKS: dict[type, Callable[..., Actor]] = {
    spaces.Box: SquashedGaussianActor,
    spaces.Discrete: CategoricalActor,
    spaces.MultiDiscrete: MultiCategoricalActor,
}
"""Kinds of stochastic policy by action space."""


def stochastic_actor(spec: EnvSpec, options: dict[str, object]) -> Actor:
    """Return a network for the actions of ``spec``.

    Raises:
        RloptError: there is none.
    """
    kind = NETWORKS.get(type(spec.action_space))
    if kind is None:
        raise RloptError(f"{spec.id}: this agent acts in Box, Discrete and MultiDiscrete, not in {spec.action_space}")
    return kind(spec.observation_space, spec.action_space, options)


class ActingTeam(ReplayAgent):
    """A replay agent that acts with the networks ``teams``, of every run one, which its ``build`` makes."""

    supports_teams = True
    teams: list[Actor]

    @property
    def policies(self) -> list[Policy]:
        return [Policy(self.spec, team) for team in self.teams]

    @torch.no_grad()
    def act(self, obs: Obs, carry: Carry = None, deterministic: bool = False) -> Act:
        """Return joint actions (N, n, …): uniform during the warm-up, then explored, or the mode. Of several runs the
        rows are R·N, run by run."""
        if self.begin_act(obs, deterministic):
            return Act(self.uniform(obs), carry)
        each = zip(self.teams, self.parts_of(obs), self.act_generators, strict=True)
        return Act(_join([team.act(part, None, deterministic, stream)[0] for team, part, stream in each]), carry)

    def begin_act(self, obs: Obs, deterministic: bool) -> bool:
        """Count the rows acted on where they are to be learnt from; return whether these actions are of the warm-up."""
        random = not deterministic and self.clock.steps < self.config.warmup_steps
        self.clock.acted += 0 if deterministic else rows_of(obs) // self.runs
        return random

    def parts_of(self, obs: Obs) -> list[Obs]:
        """Return observations (R·N, …) run by run."""
        each = rows_of(obs) // self.runs
        return [map_obs(lambda x, r=r: x[r * each : (r + 1) * each], obs) for r in range(self.runs)]  # type: ignore[misc]

    def uniform(self, obs: Obs) -> Tensor:
        """Return uniformly random joint actions, each run's from its own stream."""
        each = zip(self.teams, self.parts_of(obs), self.act_generators, strict=True)
        return _join([team.uniform(rows_of(part), stream, part) for team, part, stream in each])


def rows_of(obs: Obs) -> int:
    """Return N of observations (N, …)."""
    return (next(iter(obs.values())) if isinstance(obs, dict) else obs).shape[0]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
