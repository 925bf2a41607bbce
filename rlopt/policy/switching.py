"""Two teams behind a switch as one actor: at each step everybody acts by the one or by the other (MANSA)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.joint import critic_obs, critic_space, join_spaces
from rlopt.nn.actors import Actor, Options
from rlopt.policy.switching_apart import ApartSwitch, carry_as, carry_of
from rlopt.types import AgentSpaces, Carry, EnvSpec, Obs, RloptError, Space, is_mask, obs_leaves

RULES = ("global", "independent", "centralised", "random", "fixed")
"""Who decides: a network, or one of the controls it is compared with."""
DEFAULTS: Options = {"rule": "global", "budget": None, "rate": 0.0, "every": 1, "on": False}


def switch_space(spec: EnvSpec, budget: int | None, on: bool) -> spaces.Dict:
    """Return what decides: the state, with a ``budget`` how much of it is left and whether a call is possible, and
    where calls cost when they begin (``on``) whether there was one at the step before."""
    central = critic_space(spec)
    leaves = dict(central.spaces) if isinstance(central, spaces.Dict) else {"state": central}
    if budget is not None:
        leaves |= {"remaining": spaces.Box(0.0, 1.0, (1,), np.float32), "action_mask": spaces.MultiBinary(2)}
    if on:
        leaves["on"] = spaces.Box(0.0, 1.0, (1,), np.float32)
    return spaces.Dict(leaves)


def rule_spec(spec: EnvSpec) -> EnvSpec:
    """Return what the agents see where each decides for itself, a choice of two: what it acts on, without masks."""

    def seen(space: Space) -> Space:
        if not isinstance(space, spaces.Dict):
            return space
        return spaces.Dict({key: leaf for key, leaf in space.spaces.items() if not is_mask(key, leaf)})

    own = [(seen(observation), spaces.Discrete(2)) for observation, _ in spec.agent_spaces]
    observation, action = join_spaces(own)
    pairs = tuple(AgentSpaces(*pair) for pair in own)
    return EnvSpec(
        f"{spec.id}/switch", observation, action, spec.episode_limit, spec.agents, pairs, frame_stack=spec.frame_stack
    )


class SwitchingActor(Actor):
    """Acts by ``independent``, or where the switch says so (a central call) by ``centralised``; both remember every
    step.

    The carry holds ``switch/on`` (N,), 1 where the step before was a call, ``switch/remaining`` (N,), the calls that
    are left, ``switch/time`` (N,), and those of both actors by their names.

    Args:
        spec: of the environment.
        independent, centralised: actors of the team.
        switch: of ``rule=global``, a network of the two choices that sees ``switch_space``.
        options: ``rule`` (one of ``RULES``), ``budget`` of calls per episode or None, ``rate`` of ``random``, ``every``
            of ``fixed`` (the first of so many steps is a call), ``on``.
        apart: the team's rule by which each agent alone decides (``distilled``), with the choices of ``rule_spec``.

    Raises:
        RloptError: there is no such rule.
    """

    kind = "switching"

    def __init__(
        self,
        spec: EnvSpec,
        independent: Actor,
        centralised: Actor,
        switch: Actor | None,
        options: Options,
        apart: Actor | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.own = spec, {**DEFAULTS, **options}
        if self.own["rule"] not in RULES or (self.own["rule"] == "global") != (switch is not None):
            raise RloptError(f"rule={self.own['rule']} of a switch must be one of {', '.join(RULES)}")
        self.independent, self.centralised, self.switch, self.apart = independent, centralised, switch, apart
        self.draws, self.sees_state = self.own["rule"] == "random", switch is not None

    @property
    def options(self) -> Options:  # type: ignore[override]
        parts = {
            "independent": self.independent,
            "centralised": self.centralised,
            "switch": self.switch,
            "apart": self.apart,
        }
        described = {k: None if a is None else {"kind": a.kind, "options": a.options} for k, a in parts.items()}
        return {**self.own, **described}

    @torch.no_grad()
    def act(
        self, obs: Obs, carry: Carry = None, deterministic: bool = False, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Carry]:
        if carry is None:
            raise RloptError("a switch needs its carry; an episode begins with initial_carry(rows)")
        chosen = None
        if self.switch is not None:
            chosen = self.switch.act(self.seen(obs, carry), None, deterministic, generator)[0]
        calls = self.decide(carry, chosen, self.draw(len(carry["switch/time"]), generator))
        found, after = [], self.count(carry, calls)
        for name, actor in (("independent", self.independent), ("centralised", self.centralised)):
            action, own = actor.act(obs, carry_of(carry, name), deterministic, generator)
            found.append(action)
            after |= carry_as(name, own)
        return self.mix(calls, *found), after

    def seen(self, obs: Obs, carry: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what decides, leaves (N, …) of ``switch_space``."""
        return switch_obs(
            self.spec, obs, self.own["budget"], carry["switch/remaining"], carry["switch/on"], self.own["on"]
        )

    def draw(self, rows: int, generator: torch.Generator | None) -> Tensor | None:
        """Return where (rows,) random calls are made; None where none are."""
        if not self.draws:
            return None
        device = next(self.independent.parameters()).device
        return torch.rand((rows,), generator=generator, device=device) < float(self.own["rate"])

    def decide(self, carry: dict[str, Tensor], chosen: Tensor | None, drawn: Tensor | None) -> Tensor:
        """Return (N,) bool, where a step is a call: never beyond the budget. ``chosen`` (N,) is the network's,
        ``drawn`` (N,) what ``draw`` gave."""
        rule, time = self.own["rule"], carry["switch/time"]
        if chosen is not None:
            wanted = chosen > 0
        elif drawn is not None:
            wanted = drawn
        elif rule == "fixed":
            wanted = time % int(self.own["every"]) == 0
        else:
            wanted = torch.full(time.shape, rule == "centralised", device=time.device)
        return wanted if self.own["budget"] is None else wanted & (carry["switch/remaining"] > 0)

    def count(self, carry: dict[str, Tensor], calls: Tensor) -> dict[str, Tensor]:
        """Return the switch's part of the next carry."""
        made = calls.to(torch.float32)
        return {
            "switch/on": made,
            "switch/remaining": carry["switch/remaining"] - (0.0 if self.own["budget"] is None else made),
            "switch/time": carry["switch/time"] + 1,
        }

    @staticmethod
    def mix(calls: Tensor, independent: Tensor, centralised: Tensor) -> Tensor:
        """Return joint actions (N, n, …)."""
        return torch.where(calls.view(-1, *[1] * (independent.dim() - 1)), centralised, independent)

    def facts(self, carry: Carry) -> dict[str, Tensor]:
        assert carry is not None
        return {"calls": carry["switch/on"]}

    def switch_carry(self, rows: int) -> dict[str, Tensor]:
        """Return the switch's part of the carry with which ``rows`` episodes begin."""
        device = next(self.independent.parameters()).device
        begun = {"on": 0.0, "remaining": float(self.own["budget"] or 0), "time": 0.0}
        return {f"switch/{name}": torch.full((rows,), value, device=device) for name, value in begun.items()}

    def initial_carry(self, rows: int) -> Carry:
        found = self.switch_carry(rows)
        for name, actor in (("independent", self.independent), ("centralised", self.centralised)):
            found |= carry_as(name, actor.initial_carry(rows))
        return found

    @property
    def variants(self) -> dict[str, Actor]:
        """The team as it acts where each agent decides for itself (``distilled``), where such a rule was learnt."""
        if self.apart is None:
            return {}
        agents = len(self.spec.agents)
        return {"distilled": ApartSwitch(self.apart, self.independent, self.centralised, self.own["budget"], agents)}

    def of_agent(self, i: int) -> Actor:
        """Return agent i's own actor, by the distilled rule; of a team that always acts by one learner that learner's.

        Raises:
            RloptError: when to call is not known to an agent alone.
        """
        always = {"independent": self.independent, "centralised": self.centralised}.get(self.own["rule"])
        of: Any = always if always is not None and self.own["budget"] is None else self.variants.get("distilled")
        if of is None:
            raise RloptError(
                f"rule={self.own['rule']}: when {self.spec.id}'s team switches is decided for all of it at once; use "
                "the policy of the team"
            )
        return of.of_agent(i)  # type: ignore[no-any-return]

    def uniform(self, rows: int, generator: torch.Generator, obs: Obs | None = None) -> Tensor:
        return self.independent.uniform(rows, generator, obs)


def switch_obs(
    spec: EnvSpec, obs: Obs, budget: int | None, remaining: Tensor | None, on: Tensor | None, costs_on: bool
) -> dict[str, Tensor]:
    """Return leaves (N, …) of ``switch_space`` from joint observations, the calls left (N,) and whether the step before
    was one (N,)."""
    central: Any = critic_obs(spec, obs)
    found: dict[str, Tensor] = dict(central) if isinstance(central, dict) else {"state": central}
    if budget is not None:
        assert remaining is not None
        possible = torch.stack((torch.ones_like(remaining, dtype=torch.bool), remaining > 0), -1)
        found |= {"remaining": (remaining / max(budget, 1)).unsqueeze(-1), "action_mask": possible}
    if costs_on:
        assert on is not None
        found["on"] = on.to(torch.float32).unsqueeze(-1)
    return found


def state_leaves(spec: EnvSpec) -> dict[str, spaces.Space[Any]]:
    """Return the leaves of the joint observations that a switch reads."""
    central = critic_space(spec)
    several = set(central.spaces) if isinstance(central, spaces.Dict) else set()
    leaves = obs_leaves(spec.observation_space).items()
    return {key: leaf for key, leaf in leaves if key in several or leaf == central}
