"""Double-loop robust policy gradient (Wang, Ho and Petrik 2023, arXiv 2212.10439).

Outer loop: π_{t+1} = Proj(π_t - α_t ∇_π J(π_t, p_t)); inner loop: p_t with max_p J(π_t, p) - J(π_t, p_t) ≤ ε_t,
where ε_{t+1} ≤ γ ε_t. The guarantee is for s-rectangular sets and for the best iterate, which is what is put forward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlopt.robust.bellman import ascend, objective, policy_gradient, worst_case
from rlopt.robust.simplex import project_simplex
from rlopt.robust.solvers.base import Metrics, Solver, SolverOptions
from rlopt.types import option

FLOOR = 1e-10
"""Inner tolerances do not fall below this; it is about what rounding leaves of a value."""


@dataclass(frozen=True, kw_only=True)
class DRPGOptions(SolverOptions):
    """Options of DRPG."""

    step_size: float = option(0.1, "step of the policy, α", above=0.0)
    step_decay: float | None = option(
        None, "iterations after which the step begins to fall as 1/sqrt(1 + t/this) (null: constant)", above=0.0
    )
    parametrisation: str = option("direct", "what the gradient moves", choices=("direct", "softmax"))
    inner: str = option("exact", "the adversary: its policy iteration, or projected gradient ascent (the paper's)",
                        choices=("exact", "gradient"))  # fmt: skip
    inner_step: float = option(
        0.1, "step of the adversary's gradient ascent, β", above=0.0, needs={"inner": ("gradient",)}
    )
    inner_limit: int = option(10_000, "most steps of the adversary in one iteration", low=1)
    inner_tolerance: float = option(1.0, "certified gap asked of the first adversary, ε_0", above=0.0)
    tolerance_decay: float | None = option(
        None, "ε_{t+1} = this ε_t (null: the discount, the slowest the paper allows)", above=0.0, high=1.0
    )


class DRPGSolver(Solver):
    """The double loop, with the adversary warm-started from its last kernel."""

    name: ClassVar[str] = "drpg"
    options_class = DRPGOptions

    def build(self, options: SolverOptions) -> None:
        assert isinstance(options, DRPGOptions)
        self.options = options
        s, m = self.state, self.model
        s["rows"] = m.kernel.probabilities.clone()
        s["tolerance"] = torch.full_like(s["upper"], options.inner_tolerance)
        self.decay = m.gamma if options.tolerance_decay is None else options.tolerance_decay
        if options.parametrisation == "softmax":
            s["logits"] = s["policy"].clamp(min=1e-12).log()
            s["policy"].copy_(s["logits"].softmax(-1))

    def advance(self) -> Metrics:
        o, s, m = self.options, self.state, self.model
        policy = s["policy"]
        if o.inner == "exact":
            found = worst_case(m, policy, s["rows"], s["tolerance"], o.inner_limit)
        else:
            found = ascend(m, policy, s["rows"], s["tolerance"], o.inner_step, o.inner_limit)
        self.offer(policy, found.rows, found.value, objective(m, found.upper))
        self.bounds(found.value, m.backup(found.value, rows=False))
        gradient = policy_gradient(m, policy, found.rows, found.value)
        policy.copy_(self._moved(policy, gradient))
        s["rows"].copy_(found.rows)
        s["tolerance"].mul_(self.decay).clamp_(min=FLOOR)
        return {"value": objective(m, found.value), "inner": found.steps.to(torch.float64)}

    def _moved(self, policy: Tensor, gradient: Tensor) -> Tensor:
        o = self.options
        step = o.step_size / (1.0 if o.step_decay is None else math.sqrt(1.0 + self.iteration / o.step_decay))
        if o.parametrisation == "direct":
            return project_simplex(policy - step * gradient)
        # ∂J/∂logit(a) = π(a) (∂J/∂π(a) - Σ_b π(b) ∂J/∂π(b)).
        logits = self.state["logits"]
        logits.sub_(step * policy * (gradient - (policy * gradient).sum(-1, keepdim=True)))
        return logits.softmax(-1)
