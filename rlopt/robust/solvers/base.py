"""What the solvers of robust MDPs have in common: a complete state of tensors, one step at a time, certified bounds.

A solver never claims more than it has proved, up to rounding: ``upper`` is a bound on the robust cost of the policy it
puts forward, ``lower`` one on the best robust cost of all policies. Both only ever tighten.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlopt.robust.bellman import best_response, objective
from rlopt.robust.mdp import discounted_bounds
from rlopt.robust.model import RobustMDP
from rlopt.robust.sets.ambiguity import Backup


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """Options of a solver; each has its own."""


Metrics = dict[str, Tensor]
"""(K,) each."""


class Solver(ABC):
    """One method on one batch of instances. ``step`` does one iteration of all of them.

    ``state`` holds every tensor a bit-exact continuation needs; it is changed in place.
    """

    name: ClassVar[str]
    options_class: ClassVar[type[SolverOptions]]
    certify_every: ClassVar[int] = 10
    """Steps between lower bounds by weak duality, which cost some linear solves."""

    def __init__(self, model: RobustMDP, options: SolverOptions, policy: Tensor | None = None) -> None:
        self.model = model
        k, s, _, _ = model.kernel.probabilities.shape
        start = model.uniform_policy() if policy is None else policy.to(model.device, torch.float64)
        nominal = model.kernel.probabilities
        worst = model.cost.amax(dim=(1, 2, 3)) / (1.0 - model.gamma)
        best = model.cost.amin(dim=(1, 2, 3)) / (1.0 - model.gamma)
        self.state: dict[str, Tensor] = {
            "iteration": torch.zeros((), dtype=torch.int64),
            "policy": start.expand_as(model.uniform_policy()).clone(),
            "best_policy": start.expand_as(model.uniform_policy()).clone(),
            "best_rows": nominal.clone(),
            "best_value": worst[:, None].expand(k, s).clone(),
            "upper": worst.clone(),
            "lower": best.clone(),
        }
        self.build(options)

    @abstractmethod
    def build(self, options: SolverOptions) -> None:
        """Add what the method itself needs to ``state``."""

    @abstractmethod
    def advance(self) -> Metrics:
        """Do one iteration; tells ``value``, the cost J(π_t, p_t) of what it looked at, and ``inner``, its effort."""

    def step(self) -> Metrics:
        """Do one iteration. Metrics (K,): ``value``, ``inner``, ``lower``, ``upper`` and ``gap``, in costs."""
        metrics = self.advance()
        self.state["iteration"] += 1
        if int(self.state["iteration"]) % self.certify_every == 0:
            self.certify()
        return metrics | {"lower": self.lower.clone(), "upper": self.upper.clone(), "gap": self.upper - self.lower}

    @property
    def iteration(self) -> int:
        return int(self.state["iteration"])

    @property
    def lower(self) -> Tensor:
        """(K,) no policy's robust cost is lower."""
        return self.state["lower"]

    @property
    def upper(self) -> Tensor:
        """(K,) the robust cost of ``best_policy`` is no higher."""
        return self.state["upper"]

    def offer(self, policy: Tensor, rows: Tensor, value: Tensor, upper: Tensor) -> None:
        """Keep a policy (K, S, A) where its bound ``upper`` (K,) is a new best, with a kernel and a value (K, S).

        The kernel is one of the set's and the value near the policy's robust one: where ``solve.polish`` and the next
        lower bound begin. Only after ``polish`` are they the worst kernel found for that policy and its value.
        """
        s = self.state
        better = upper < s["upper"]
        s["upper"].copy_(torch.where(better, upper, s["upper"]))
        for name, new in (("best_policy", policy), ("best_rows", rows), ("best_value", value)):
            s[name].copy_(torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, s[name]))

    def raise_lower(self, lower: Tensor) -> None:
        """Take a lower bound (K,) of the optimum where it is a better one."""
        self.lower.copy_(torch.maximum(self.lower, lower))

    def bounds(self, value: Tensor, backup: Backup) -> Tensor:
        """Take MacQueen's bounds from one backup: raise ``lower`` and return the upper one (K, S), which the backup's
        policy keeps as well."""
        lower, upper = discounted_bounds(self.model.gamma, value, backup.value)
        self.raise_lower(objective(self.model, lower))
        return upper

    def certify(self) -> None:
        """Raise the lower bound by weak duality, at the adversary's side of the saddle point of the best value."""
        rows = self.model.backup(self.state["best_value"]).rows
        assert rows is not None
        self.raise_lower(best_response(self.model, rows)[1])
