"""The networks of a team as one actor: joint observations in, joint actions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from gymnasium.spaces import Discrete
from torch import Tensor, nn

from rlopt.joint import join_actions, own_action, own_obs, shared_agent, shared_obs
from rlopt.nn.actors import Actor, Options, make_actor
from rlopt.policy.switching import DEFAULTS, SwitchingActor, rule_spec, switch_space
from rlopt.types import Carry, EnvSpec, Obs, RloptError, map_obs, seen_leaves, shape_of, tensor_dtype

MAX_OWN = 256
"""Agents that may each have a network of their own; more can share one."""


class TeamActor(Actor):
    """An actor of each agent, built from ``spec.of_agent(i)``, or one that all share, from ``shared_agent(spec)``.

    Each sees its own part of a joint observation and nothing else: neither ``state`` nor ``alive`` need be there. The
    carry holds those of the agents, leaves ``i/name`` (N, …), or (N, n, …) of a shared network.

    Args:
        spec: of the environment.
        actors: one for each of its agents, or a single one.
        shared: whether that single one acts for all.

    Raises:
        RloptError: the number of actors does not fit.
    """

    kind = "team"

    def __init__(self, spec: EnvSpec, actors: Sequence[Actor], shared: bool = False) -> None:
        super().__init__()
        wanted = 1 if shared else len(spec.agents)
        if len(actors) != wanted or wanted > MAX_OWN:
            fix = f"there can be {MAX_OWN} at most; let them share one" if wanted > MAX_OWN else f"give {wanted}"
            raise RloptError(f"{spec.id} with {len(spec.agents)} agents got {len(actors)} actors; {fix}")
        self.spec, self.shared = spec, shared
        self.actors = nn.ModuleList(actors)

    @property
    def options(self) -> Options:  # type: ignore[override]
        """Those of the agents' actors."""
        return {"shared": self.shared, "actors": [{"kind": a.kind, "options": a.options} for a in self._each()]}

    def _each(self) -> list[Actor]:
        return cast(list[Actor], list(self.actors))

    @torch.no_grad()
    def act(
        self,
        obs: Obs,
        carry: Carry = None,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Carry]:
        """Return joint actions (N, n, …) in environment units, padding 0, and the carry to act on next.

        Random actions of the agents draw from ``generator`` in the agents' order.
        """
        if self.shared:
            rows = {key: leaf.flatten(0, 1) for key, leaf in shared_obs(self.spec, obs).items()}
            flat = None if carry is None else {key: leaf.flatten(0, 1) for key, leaf in carry.items()}
            action, after = self._each()[0].act(rows, flat, deterministic, generator)
            return self._by_row(action), None if after is None else {k: self._by_row(x) for k, x in after.items()}
        actions: list[Tensor] = []
        every: dict[str, Tensor] = {}
        for i, actor in enumerate(self._each()):
            own = None if carry is None else {key[len(f"{i}/") :]: x for key, x in carry.items() if _is_of(i, key)}
            action, own = actor.act(own_obs(self.spec, obs, i), own or None, deterministic, generator)
            actions.append(action)
            every |= {f"{i}/{key}": leaf for key, leaf in (own or {}).items()}
        return join_actions(self.spec, actions), every or None

    def read(self, obs: Obs, carry: Carry) -> tuple[Any, Carry]:
        """Return what the networks give, one after the other, of agents without a memory."""
        if self.shared:
            rows = {key: leaf.flatten(0, 1) for key, leaf in shared_obs(self.spec, obs).items()}
            return [self._each()[0](rows)], None
        return [actor(own_obs(self.spec, obs, i)) for i, actor in enumerate(self._each())], None

    def log_prob(self, outputs: Any, action: Tensor) -> Tensor:
        """Return log π (N,) of joint actions, the sum over the agents. (One that is dead acts, too, with its last
        observation's probability.)"""
        if self.shared:
            return self._by_row(self._each()[0].log_prob(outputs[0], action.flatten(0, 1))).sum(-1)
        parts = [
            actor.log_prob(out, own_action(self.spec, action, i))
            for i, (actor, out) in enumerate(zip(self._each(), outputs, strict=True))
        ]
        return torch.stack(parts, -1).sum(-1)

    def initial_carry(self, rows: int) -> Carry:
        if self.shared:
            carry = self._each()[0].initial_carry(rows * len(self.spec.agents))
            return None if carry is None else {key: self._by_row(x) for key, x in carry.items()}
        begun = {
            f"{i}/{key}": leaf
            for i, actor in enumerate(self._each())
            for key, leaf in (actor.initial_carry(rows) or {}).items()
        }
        return begun or None

    def uniform(self, rows: int, generator: torch.Generator, obs: Obs | None = None) -> Tensor:
        """Return uniformly random joint actions (rows, n, …), padding 0; possible ones where ``obs`` has a mask."""
        if self.shared:
            n = len(self.spec.agents)
            seen = None if obs is None else map_obs(lambda x: x.flatten(0, 1), shared_obs(self.spec, obs))
            return self._by_row(self._each()[0].uniform(rows * n, generator, seen))
        drawn = [
            actor.uniform(rows, generator, None if obs is None else own_obs(self.spec, obs, i))
            for i, actor in enumerate(self._each())
        ]
        return join_actions(self.spec, drawn)

    def _by_row(self, x: Tensor) -> Tensor:
        """Return what a shared network gives for N·n rows, as (N, n, …)."""
        return x.view(-1, len(self.spec.agents), *x.shape[1:])

    def of_agent(self, i: int) -> Actor:
        """Return agent i's own actor, which acts on what it sees alone; it shares its network with this one."""
        return SharedActor(self.spec, i, self._each()[0]) if self.shared else self._each()[i]


class SharedActor(Actor):
    """A network that a team shares, as one of the agents uses it."""

    kind = "shared"

    def __init__(self, spec: EnvSpec, agent: int, actor: Actor) -> None:
        super().__init__()
        self.spec, self.agent, self.actor = spec, agent, actor
        self.options = {}

    @torch.no_grad()
    def act(
        self,
        obs: Obs,
        carry: Carry = None,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Carry]:
        return self.actor.act(self._padded(obs), carry, deterministic, generator)

    def initial_carry(self, rows: int) -> Carry:
        return self.actor.initial_carry(rows)

    def _padded(self, obs: Obs) -> Obs:
        """Return the agent's own observation as the shared network sees it."""
        own = obs if isinstance(obs, dict) else {"obs": obs}
        like = next(iter(own.values()))
        found = {"agent": torch.full(like.shape[:1], self.agent, device=like.device)}
        for key, leaf in seen_leaves(self.spec).items():
            shape = (like.shape[0], *shape_of(leaf)[1:])
            found[key] = torch.zeros(shape, dtype=tensor_dtype(leaf), device=like.device)
            if key in own:
                found[key][tuple(map(slice, own[key].shape))] = own[key]
        return found


def _is_of(i: int, key: str) -> bool:
    return key.startswith(f"{i}/")


def build_actor(spec: EnvSpec, kind: str, options: Mapping[str, Any]) -> Actor:
    """Return the actor that ``kind`` and ``options`` describe, for an environment of one or of several agents.

    Raises:
        RloptError: an unknown kind.
        KeyError, TypeError, ValueError: options that make no sense.
    """
    if kind == SwitchingActor.kind and spec.agents:
        learners = [build_actor(spec, **options[name]) for name in ("independent", "centralised")]
        rule, network = {name: options[name] for name in DEFAULTS}, options["switch"]
        sees = switch_space(spec, rule["budget"], rule["on"])
        switch = None if network is None else make_actor(network["kind"], sees, Discrete(2), network["options"])
        described = options.get("apart")
        apart = None if described is None else build_actor(rule_spec(spec), **described)
        return SwitchingActor(spec, learners[0], learners[1], switch, rule, apart)
    if kind != TeamActor.kind or not spec.agents:
        return make_actor(kind, spec.observation_space, spec.action_space, dict(options))
    shared, described = options["shared"] is True, options["actors"]
    own = [shared_agent(spec)] if shared else [spec.of_agent(i) for i in range(len(spec.agents))]
    if len(described) != len(own):
        raise ValueError(f"it has {len(described)} actors for {len(own)} agents")
    actors = [
        make_actor(each["kind"], one.observation_space, one.action_space, each["options"])
        for each, one in zip(described, own, strict=True)
    ]
    return TeamActor(spec, actors, shared)
