"""A team behind a switch that each agent decides for itself, by what it sees alone (MANSA's distilled rule)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlopt.nn.actors import Actor
from rlopt.types import Carry, Obs, RloptError


class ApartSwitch(Actor):
    """Acts agent by agent by ``centralised`` where ``rule`` says so (a call), else by ``independent``.

    The carry holds ``switch/on`` (N, n), where the step before was a call, ``switch/remaining`` (N, n), the calls that
    are left to each agent, and those of both actors by their names. An episode's calls are the mean over the agents.

    Args:
        rule: of the team, with the two choices of ``rlopt.policy.switching.rule_spec``.
        independent, centralised: actors of the team.
        budget: of calls per episode and agent, or None.
        agents: n; None where it is one agent's own (``of_agent``), whose leaves and actions have no such axis.
    """

    kind = "switching_apart"

    def __init__(
        self, rule: Actor, independent: Actor, centralised: Actor, budget: int | None, agents: int | None
    ) -> None:
        super().__init__()
        self.rule, self.independent, self.centralised = rule, independent, centralised
        self.budget, self.shape, self.options = budget, () if agents is None else (agents,), {}

    @torch.no_grad()
    def act(
        self, obs: Obs, carry: Carry = None, deterministic: bool = False, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Carry]:
        if carry is None:
            raise RloptError("a switch needs its carry; an episode begins with initial_carry(rows)")
        calls, remaining = self.rule.act(obs, None, True)[0] > 0, carry["switch/remaining"]
        if self.budget is not None:
            calls = calls & (remaining > 0)
        made = calls.to(torch.float32)
        after = {"switch/on": made, "switch/remaining": remaining - (0.0 if self.budget is None else made)}
        found = []
        for name, actor in (("independent", self.independent), ("centralised", self.centralised)):
            action, own = actor.act(obs, carry_of(carry, name), deterministic, generator)
            found.append(action)
            after |= carry_as(name, own)
        return torch.where(calls.view(*calls.shape, *[1] * (found[0].dim() - calls.dim())), found[1], found[0]), after

    def facts(self, carry: Carry) -> dict[str, Tensor]:
        assert carry is not None
        on = carry["switch/on"]
        return {"calls": on.mean(-1) if self.shape else on}

    def initial_carry(self, rows: int) -> Carry:
        device = next(self.rule.parameters()).device
        begun = {"on": 0.0, "remaining": float(self.budget or 0)}
        found = {f"switch/{name}": torch.full((rows, *self.shape), x, device=device) for name, x in begun.items()}
        for name, actor in (("independent", self.independent), ("centralised", self.centralised)):
            found |= carry_as(name, actor.initial_carry(rows))
        return found

    def uniform(self, rows: int, generator: torch.Generator, obs: Obs | None = None) -> Tensor:
        return self.independent.uniform(rows, generator, obs)

    def of_agent(self, i: int) -> Actor:
        """Return agent i's own actor, which decides and acts on what it sees alone; it shares its networks."""
        parts: list[Any] = [self.rule, self.independent, self.centralised]
        rule, independent, centralised = (part.of_agent(i) for part in parts)
        return ApartSwitch(rule, independent, centralised, self.budget, None)


def carry_of(carry: dict[str, Tensor], name: str) -> Carry:
    """Return the part ``name`` of a carry; None where it remembers nothing."""
    return {k.removeprefix(f"{name}/"): x for k, x in carry.items() if k.startswith(f"{name}/")} or None


def carry_as(name: str, carry: Carry) -> dict[str, Tensor]:
    """Return a carry as the part ``name`` of another one."""
    return {f"{name}/{key}": x for key, x in (carry or {}).items()}
