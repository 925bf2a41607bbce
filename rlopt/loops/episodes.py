"""Returns, lengths and facts of episodes, kept by rlopt itself: no wrapper's statistics are trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rlopt.types import EnvSpec, Episode, State, Step, on_host

NOTHING: Mapping[str, Tensor] = {}


class EpisodeCounter:
    """Sums raw rewards per row until the row's episode ends, as the table of ``rlopt.envs.vector.VectorEnv`` says.

    The facts of an episode are those that the environment tells where it ends (``spec.facts``), the sums of those that
    the agent tells of each step, and ``return/AGENT`` where agents are paid apart; the return is then their sum.

    Args:
        spec: the environment's.
        num_envs: N; the rows belong to ``runs`` runs, one after the other.
    """

    def __init__(self, spec: EnvSpec, num_envs: int, runs: int = 1) -> None:
        self.facts, self.each = spec.facts, num_envs // runs
        self.paid_apart = spec.agents if spec.reward_shape else ()
        self.returns = torch.zeros(num_envs, dtype=torch.float64)
        """Of the open episodes."""
        self.lengths = torch.zeros(num_envs, dtype=torch.int64)
        self.sums: dict[str, Tensor] = {}
        """{fact: (N,)} of the open episodes."""
        self.partial = torch.zeros(num_envs, dtype=torch.bool)
        """Where a transition of the open episode is missing, so that its return is not known."""
        self.lost = torch.zeros(num_envs, dtype=torch.int64)
        """Episodes that were lost, by row."""
        self.valid = self.ended = torch.zeros(num_envs, dtype=torch.bool)
        """Of the last step, on the host."""
        self.told: dict[str, Tensor] = {}
        """{fact: (N,)} that the environment told with the last step, on the host; NaN where it told nothing."""

    def count(self, step: Step, facts: Mapping[str, Tensor] = NOTHING) -> dict[int, Episode]:
        """Add one vector step and the agent's ``facts`` {name: (N,)} of it; return the episodes that came to their end
        with it, by row and in the order of rows."""
        apart = {f"return/{name}": step.reward[:, i] for i, name in enumerate(self.paid_apart)}
        told = {name: step.info[name] for name in self.facts if name in step.info}
        reward = step.reward.sum(1, dtype=torch.float64) if apart else step.reward
        rows = on_host(reward, step.valid, step.ended, *apart.values(), *told.values())
        reward, valid, ended = rows[:3]
        self.valid, self.ended = valid, ended
        self.told = dict(zip(told, rows[3 + len(apart) :], strict=True))
        self.returns += torch.where(valid, reward, 0.0)
        self.lengths += valid
        summed = zip(apart, rows[3 : 3 + len(apart)], strict=True)
        for name, number in (*summed, *zip(facts, on_host(*facts.values()), strict=True)):
            self.sums.setdefault(name, torch.zeros_like(self.returns)).add_(torch.where(valid, number, 0.0))
        if not bool(ended.any()):
            return {}
        self.lost += ended & ~valid
        closed = (ended & valid & ~self.partial).nonzero().flatten().tolist()
        episodes = {i: self.episode(i) for i in closed}
        for total in (self.returns, self.lengths, self.partial, *self.sums.values()):
            total.masked_fill_(ended, 0)
        return episodes

    def episode(self, row: int) -> Episode:
        """Return the open episode of ``row`` as it stands, with what the environment told with its last step."""
        facts = {name: float(number[row]) for name, number in (*self.told.items(), *self.sums.items())}
        known = {name: number for name, number in facts.items() if not math.isnan(number)}
        return Episode(float(self.returns[row]), int(self.lengths[row]), row // self.each, known)

    def drop(self, rows: Tensor) -> None:
        """Leave out the open episodes of ``rows`` (N,) bool, which make a transition that is not counted."""
        self.partial |= rows.cpu()

    def state_dict(self) -> State:
        sums = {name: total.clone() for name, total in self.sums.items()}
        return {
            "returns": self.returns.clone(),
            "lengths": self.lengths.clone(),
            "partial": self.partial.clone(),
            "sums": sums,
        }

    def load_state_dict(self, state: State) -> None:
        self.returns.copy_(state["returns"])
        self.lengths.copy_(state["lengths"])
        self.partial.copy_(state["partial"])
        self.sums = {name: total.clone() for name, total in state["sums"].items()}
