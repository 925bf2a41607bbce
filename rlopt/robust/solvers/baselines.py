"""What DRPG is measured against: robust value iteration, modified and partial policy iteration, mirror descent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from rlopt.robust.bellman import action_values, objective, robust_step, worst_case
from rlopt.robust.solvers.base import Metrics, Solver, SolverOptions
from rlopt.robust.solvers.drpg import FLOOR
from rlopt.types import option


class ValueIterationSolver(Solver):
    """Robust value iteration, v ← T v (Iyengar 2005; Nilim and El Ghaoui 2005; s-rectangular: Wiesemann et al. 2013).

    It starts from the robust value of no policy but from the nominal value of the given one, as in the paper's figures.
    """

    name: ClassVar[str] = "value_iteration"
    options_class = SolverOptions

    def build(self, options: SolverOptions) -> None:
        from rlopt.robust.bellman import policy_value

        self.state["value"] = policy_value(self.model, self.state["policy"], self.model.kernel.probabilities)

    def advance(self) -> Metrics:
        s, m = self.state, self.model
        backup = m.backup(s["value"], rows=False)
        upper = objective(m, self.bounds(s["value"], backup))
        before = objective(m, s["value"])
        self.offer(backup.policy, s["best_rows"], backup.value, upper)
        s["value"].copy_(backup.value)
        s["policy"].copy_(backup.policy)
        return {"value": before, "inner": torch.ones_like(upper)}


@dataclass(frozen=True, kw_only=True)
class ModifiedPolicyIterationOptions(SolverOptions):
    """Options of modified policy iteration."""

    sweeps: int = option(20, "robust backups of the policy between two improvements", low=0)


class ModifiedPolicyIterationSolver(Solver):
    """Robust modified policy iteration (Kaufman and Schaefer 2013): a backup, then some robust sweeps of its policy.

    It must start from above, T v ≤ v, where it falls monotonically to the fixed point: from the largest cost for ever.
    """

    name: ClassVar[str] = "modified_policy_iteration"
    options_class = ModifiedPolicyIterationOptions

    def build(self, options: SolverOptions) -> None:
        assert isinstance(options, ModifiedPolicyIterationOptions)
        self.options = options
        self.state["value"] = self.state["best_value"].clone()

    def advance(self) -> Metrics:
        s, m = self.state, self.model
        backup = m.backup(s["value"], rows=False)
        self.offer(backup.policy, s["best_rows"], backup.value, objective(m, self.bounds(s["value"], backup)))
        value = backup.value
        for _ in range(self.options.sweeps):
            value = robust_step(m, backup.policy, value)[0]
        before = objective(m, s["value"])
        s["value"].copy_(value)
        s["policy"].copy_(backup.policy)
        return {"value": before, "inner": torch.full_like(before, float(self.options.sweeps))}


@dataclass(frozen=True, kw_only=True)
class PartialPolicyIterationOptions(SolverOptions):
    """Options of partial policy iteration."""

    inner_tolerance: float = option(1.0, "certified gap asked of the first evaluation", above=0.0)
    tolerance_power: float = option(
        2.0, "each evaluation's gap is the discount to this power times the last one's", above=1.0
    )


class PartialPolicyIterationSolver(Solver):
    """Partial policy iteration (Ho, Petrik and Wiesemann 2021, algorithm 1): policies are evaluated to a tolerance that
    falls faster than the discount, which rules out the cycles of plain policy iteration on s-rectangular sets. The
    evaluation is the adversary's policy iteration, warm-started."""

    name: ClassVar[str] = "partial_policy_iteration"
    options_class = PartialPolicyIterationOptions

    def build(self, options: SolverOptions) -> None:
        assert isinstance(options, PartialPolicyIterationOptions)
        self.decay = self.model.gamma**options.tolerance_power
        self.state["rows"] = self.model.kernel.probabilities.clone()
        self.state["tolerance"] = torch.full_like(self.upper, options.inner_tolerance)

    def advance(self) -> Metrics:
        s, m = self.state, self.model
        found = worst_case(m, s["policy"], s["rows"], s["tolerance"])
        self.offer(s["policy"], found.rows, found.value, objective(m, found.upper))
        backup = m.backup(found.value)
        assert backup.rows is not None
        self.bounds(found.value, backup)
        s["policy"].copy_(backup.policy)
        s["rows"].copy_(backup.rows)
        s["tolerance"].mul_(self.decay).clamp_(min=FLOOR)
        return {"value": objective(m, found.value), "inner": found.steps.to(torch.float64)}


@dataclass(frozen=True, kw_only=True)
class MirrorDescentOptions(SolverOptions):
    """Options of mirror descent."""

    step_size: float = option(0.1, "first step, η_0", above=0.0)
    growth: float | None = option(
        None, "η_{t+1} = this η_t (null: 1/discount for (s,a)-rectangular sets, there it converges linearly, else 1)",
        low=1.0,
    )  # fmt: skip
    inner_tolerance: float = option(
        1.0, "certified gap asked of the first adversary; it falls with the discount", above=0.0
    )


class MirrorDescentSolver(Solver):
    """Robust policy mirror descent (Li, Lan and Zhao 2022, arXiv 2209.10579): π ∝ π exp(-η q), with q under the worst
    kernel and without the occupancy."""

    name: ClassVar[str] = "mirror_descent"
    options_class = MirrorDescentOptions

    def build(self, options: SolverOptions) -> None:
        assert isinstance(options, MirrorDescentOptions)
        s, m = self.state, self.model
        self.step_size = options.step_size
        # With discount 0 the steps after the first are as long as the cap of ``advance`` lets them be.
        automatic = 1.0 / max(m.gamma, 1e-14) if m.ambiguity.rectangular == "sa" else 1.0
        self.growth = automatic if options.growth is None else options.growth
        s["rows"] = m.kernel.probabilities.clone()
        s["logits"] = s["policy"].clamp(min=1e-12).log()
        s["tolerance"] = torch.full_like(s["upper"], options.inner_tolerance)

    def advance(self) -> Metrics:
        s, m = self.state, self.model
        found = worst_case(m, s["policy"], s["rows"], s["tolerance"])
        self.offer(s["policy"], found.rows, found.value, objective(m, found.upper))
        self.bounds(found.value, m.backup(found.value, rows=False))
        q = action_values(m, found.rows, found.value)
        # Beyond e^30 a policy is deterministic to the last digit; growing on would only overflow.
        eta = self.step_size * math.exp(min(self.iteration * math.log(self.growth), 30.0))
        logits = s["logits"].sub_(eta * (q - q.amin(-1, keepdim=True)))
        logits.sub_(logits.amax(-1, keepdim=True))
        s["policy"].copy_(logits.softmax(-1))
        s["rows"].copy_(found.rows)
        s["tolerance"].mul_(m.gamma).clamp_(min=FLOOR)
        return {"value": objective(m, found.value), "inner": found.steps.to(torch.float64)}
