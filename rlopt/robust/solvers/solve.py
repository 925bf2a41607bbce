"""``solve``: one call for every method, one kind of answer."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlopt.config import build, hint
from rlopt.robust.bellman import objective, worst_case
from rlopt.robust.kernel import normalised, told
from rlopt.robust.model import RobustMDP
from rlopt.robust.solvers.base import Metrics, Solver
from rlopt.robust.solvers.baselines import (
    MirrorDescentSolver,
    ModifiedPolicyIterationSolver,
    PartialPolicyIterationSolver,
    ValueIterationSolver,
)
from rlopt.robust.solvers.drpg import DRPGSolver
from rlopt.types import RloptError

SOLVERS: dict[str, type[Solver]] = {
    cls.name: cls
    for cls in (
        DRPGSolver,
        ValueIterationSolver,
        ModifiedPolicyIterationSolver,
        PartialPolicyIterationSolver,
        MirrorDescentSolver,
    )
}


class Solution(NamedTuple):
    """A policy with the proof of its worth. Without a K axis where the model had none; in rewards where it was given
    those.

    For costs, ``lower`` ≤ min_π Φ(π) ≤ Φ(``policy``) ≤ ``upper``, where Φ(π) = max_p ρᵀ v^{π,p}; for rewards
    ``lower`` ≤ Φ(``policy``) ≤ max_π Φ(π) ≤ ``upper`` with Φ(π) = min_p ρᵀ v^{π,p}.
    """

    policy: Tensor
    """(K, S, A) the best iterate."""
    kernel: Tensor
    """(K, S, A, S) the worst kernel found for it."""
    value: Tensor
    """(K, S) its value under that kernel."""
    lower: Tensor
    """(K,)"""
    upper: Tensor
    """(K,)"""
    history: dict[str, Tensor]
    """Per iteration: ``value`` J(π_t, p_t), ``lower``, ``upper``, ``gap``, ``inner`` (T, K), and ``seconds`` (T,)."""

    @property
    def gap(self) -> Tensor:
        """(K,) how far from optimal the policy may be."""
        return self.upper - self.lower


def make_solver(model: RobustMDP, method: str = "drpg", policy: Any = None, **options: Any) -> Solver:
    """Return the solver called ``method``, to be driven step by step; arguments as of ``solve``.

    Raises:
        RloptError: no such method or option, a value out of its range, a ``policy`` that does not fit or whose rows are
            no distributions.
    """
    if method not in SOLVERS:
        raise RloptError(f"method={method!r}: no such solver; {hint(method, SOLVERS)}")
    cls = SOLVERS[method]
    start = None if policy is None else start_policy(model, policy)
    return cls(model, build(cls.options_class, options, method), start)


def start_policy(model: RobustMDP, policy: Any) -> Tensor:
    """Return (K, S, A) a policy (S, A) or (K, S, A) as solvers take it: checked, and divided by sums within 1e-6 of
    one."""
    k, s, a = model.num_instances, model.num_states, model.num_actions
    given = torch.as_tensor(policy, dtype=torch.float64, device=model.device)
    if tuple(given.shape) not in ((s, a), (k, s, a)):
        raise RloptError(f"policy has shape {tuple(given.shape)}; this model needs ({s}, {a}) or ({k}, {s}, {a})")
    given = given.expand(k, s, a)
    found, bad = normalised(given)
    if bool(bad.any()):
        i, j = bad.nonzero()[0].tolist()
        raise RloptError(f"policy in state {j} of instance {i} is no distribution {told(given[i, j])}")
    return found


def solve(
    model: RobustMDP,
    method: str = "drpg",
    iterations: int = 1000,
    tolerance: float | None = 1e-6,
    policy: Any = None,
    **options: Any,
) -> Solution:
    """Solve every instance of ``model`` at once.

    Args:
        method: ``drpg``, ``value_iteration``, ``modified_policy_iteration``, ``partial_policy_iteration`` or
            ``mirror_descent``.
        iterations: the most that are done.
        tolerance: stop once every instance's certified gap ``upper - lower`` is at most this (None: never).
        policy: (S, A) or (K, S, A) to start from (default: uniform).
        options: those of the method, such as ``step_size=0.05`` (``DRPGOptions`` and its neighbours).

    Raises:
        RloptError: as ``make_solver``.
    """
    solver = make_solver(model, method, policy, **options)
    rows: list[Metrics] = []
    seconds: list[float] = []
    begin = time.perf_counter()
    for _ in range(iterations):
        rows.append(solver.step())
        seconds.append(time.perf_counter() - begin)
        if tolerance is not None and bool((rows[-1]["gap"] <= tolerance).all()):
            break
    history = {name: torch.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}
    return solution(solver, history | {"seconds": torch.tensor(seconds, dtype=torch.float64)})


def polish(solver: Solver) -> None:
    """Tighten both bounds around the policy put forward: its exact robust value, and weak duality at it."""
    s, m = solver.state, solver.model
    found = worst_case(m, s["best_policy"], s["best_rows"])
    s["best_rows"].copy_(found.rows)
    s["best_value"].copy_(found.value)
    s["upper"].copy_(torch.minimum(s["upper"], objective(m, found.upper)))
    solver.certify()


def solution(solver: Solver, history: dict[str, Tensor]) -> Solution:
    """Return what a solver has found, in the model's own sign and shape."""
    polish(solver)
    m, s = solver.model, solver.state
    lower, upper = (s["lower"], s["upper"]) if m.sign > 0 else (-s["upper"], -s["lower"])
    if m.sign < 0 and "value" in history:
        history = history | {
            "value": -history["value"],
            "lower": -history["upper"],
            "upper": -history["lower"],
        }
    found = (s["best_policy"], m.kernel.to_dense(s["best_rows"]), m.sign * s["best_value"], lower, upper)
    if not m.kernel.batched:
        found = tuple(x[0] for x in found)  # type: ignore[assignment]
        history = {k: v[:, 0] if v.ndim == 2 else v for k, v in history.items()}
    policy, kernel, value, lower, upper = (x.clone() for x in found)
    return Solution(policy, kernel, value, lower, upper, history)
