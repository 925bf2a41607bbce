"""Robust Bellman sweeps and solvers: what robustness costs, beside an ordinary sweep and scipy's linear programs.

    python benchmarks/robust_mdp.py --out results/drpg

1. One exact robust sweep of all states (L1 sets, (s,a)- and s-rectangular) against one ordinary sweep on the same
   successor lists: both compiled by numba, one thread, run in turn, the best of several. Then the same as tensor
   operations (what runs on a GPU or without numba). At random values, and compiled also at the optimum, where actions
   are harder to tell apart and fewer can be left out.
2. One row and one state by scipy's HiGHS, for orientation.
3. Scaling to 1000 states, 20 actions, 10 successors.
4. Seconds to a certified gap of 1e-3 for every method.

Written: `sweeps.csv`, `certified.csv`. Ratios are what travels between machines.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from rlopt.analysis.tables import write_csv
from rlopt.robust import L1, Nominal, RobustMDP, StateL1, make_solver
from rlopt.robust import sweeps as compiled_sweeps
from rlopt.robust.problems.garnet import garnet

SIZES = [(50, 5, 4, 3), (50, 10, 6, 3), (50, 15, 8, 3), (50, 15, 8, 15), (50, 100, 10, 10), (4, 1000, 5, 10),
         (4, 1000, 20, 10), (1, 300, 20, 10), (1, 100, 20, 100), (1, 300, 5, 300)]  # fmt: skip
DENSE = [(50, 15, 8, 15), (1, 100, 20, 100)]
"""Again with the cost of a state and an action alone, as most models have it: then all rows share the order of v."""
METHODS = ["drpg", "drpg (gradient adversary)", "mirror_descent", "value_iteration", "modified_policy_iteration",
           "partial_policy_iteration"]  # fmt: skip


def best_of(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The shortest time of each, run in turn so that a drift of the machine's speed hits all alike."""
    for call in calls.values():
        call()
    times = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name] = min(times[name], time.perf_counter() - begin)
    return times


def models(k: int, s: int, a: int, b: int, narrow: bool = False) -> dict[str, RobustMDP]:
    m = garnet(s, a, b, k)
    if narrow:
        m = RobustMDP(m.kernel, (m.kernel.probabilities * m.cost).sum(-1), m.gamma, L1(m.ambiguity.radius), m.initial)
    state = StateL1(0.5 + 0.5 * torch.rand(k, s, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    return {"plain": m.replace(Nominal()), "sa": m, "s": m.replace(state)}


def sweeps(repeats: int) -> list[list[object]]:
    rows: list[list[object]] = []
    for size, narrow in [*((size, False) for size in SIZES), *((size, True) for size in DENSE)]:
        own = models(*size, narrow)
        value = 50.0 * torch.rand(size[:2], dtype=torch.float64, generator=torch.Generator().manual_seed(1))

        def sweep(name: str, at: torch.Tensor, own: dict[str, RobustMDP] = own) -> Callable[[], object]:
            return lambda: own[name].backup(at, rows=False)

        fast = best_of({name: sweep(name, value) for name in own}, repeats)
        compiled_sweeps.ENABLED = False
        slow = best_of({name: sweep(name, value) for name in own}, max(3, repeats // 4))
        compiled_sweeps.ENABLED = True
        for name in ("sa", "s"):
            there = optimum(own[name])
            solved = best_of({n: sweep(n, there) for n in ("plain", name)}, repeats)
            per_row = 1e9 * fast["plain"] / np.prod(size[:3])
            rows.append([
                *size, "s,a" if narrow else "s,a,s'", name,
                f"{1e3 * fast['plain']:.3f}", f"{per_row:.1f}", f"{1e3 * fast[name]:.3f}",
                f"{fast[name] / fast['plain']:.2f}", f"{solved[name] / solved['plain']:.2f}",
                f"{1e3 * slow['plain']:.3f}", f"{1e3 * slow[name]:.3f}", f"{slow[name] / slow['plain']:.2f}",
            ])  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def optimum(m: RobustMDP) -> torch.Tensor:
    """(K, S) robust values, by 300 sweeps."""
    value = torch.zeros(m.kernel.count.shape[:2], dtype=torch.float64)
    for _ in range(300):
        value = m.backup(value, rows=False).value
    return value


def by_linear_programs() -> None:
    """HiGHS on the rows and states of one G(100, 10, 10), beside the compiled sweep's time for each of them."""
    from scipy.optimize import linprog

    own = models(1, 100, 10, 10)
    value = 50.0 * torch.rand(1, 100, dtype=torch.float64)
    z, p = own["sa"].targets(value)[0].numpy(), own["sa"].kernel.probabilities[0].numpy()
    n, a, eye = 10, 10, np.eye(10)
    ball = np.r_[np.c_[eye, -eye], np.c_[-eye, -eye], np.c_[np.zeros((1, n)), np.ones((1, n))]]
    kappa = own["sa"].ambiguity.radius[0].numpy()

    def row(s: int) -> None:
        linprog(np.r_[-z[s, 0], np.zeros(n)], A_ub=ball, b_ub=np.r_[p[s, 0], -p[s, 0], kappa[s, 0]],
                A_eq=np.r_[np.ones(n), np.zeros(n)][None], b_eq=[1.0])  # fmt: skip

    rows = np.zeros((2 * a * n, 2 * a + 2 * a * n + 1))
    for i in range(a * n):
        rows[i, [a + i // n, 2 * a + i]] = -1.0
        rows[i, 2 * a + a * n + i] = 1.0
        rows[a * n + i, [2 * a + i, 2 * a + a * n + i]] = 1.0
        rows[a * n + i, -1] = -1.0

    def state(s: int) -> None:
        for i in range(a * n):
            rows[i, i // n] = z[s].flat[i]
        cost = np.r_[np.zeros(a), np.ones(a), p[s].ravel(), -p[s].ravel(), 0.75]
        bounds = [(0, None)] * a + [(None, None)] * a + [(0, None)] * (2 * a * n + 1)
        linprog(cost, A_ub=rows, b_ub=np.zeros(len(rows)), A_eq=np.r_[np.ones(a), np.zeros(len(cost) - a)][None],
                b_eq=[1.0], bounds=bounds)  # fmt: skip

    ours = best_of({n: lambda m=own[n]: m.backup(value, rows=False) for n in ("sa", "s")}, 30)
    theirs = best_of({"sa": lambda: row(3), "s": lambda: state(3)}, 5)
    print(f"one row of 10 successors: HiGHS {1e6 * theirs['sa']:.0f} us, compiled {1e6 * ours['sa'] / 1000:.3f} us, "
          f"ratio {1000 * theirs['sa'] / ours['sa']:.0f}")  # fmt: skip
    print(f"one state of 10 actions and 10 successors: HiGHS {1e6 * theirs['s']:.0f} us, compiled "
          f"{1e6 * ours['s'] / 100:.2f} us, ratio {100 * theirs['s'] / ours['s']:.0f}")  # fmt: skip


def certified(limit: float) -> list[list[object]]:
    """Seconds until every instance's gap is certified to 1e-3; the gap that stands where ``limit`` seconds pass.

    The gradient adversary is cut at 20 steps per iteration: with the tolerances of the paper one iteration alone would
    outlast the limit.
    """
    rows: list[list[object]] = []
    for size in [(50, 15, 8, 3), (10, 100, 10, 5), (1, 1000, 20, 10)]:
        for kind in ("sa", "s"):
            m = models(*size)[kind]
            for method in METHODS:
                rows.append([*size, kind, method, *one(m, method, limit)])
                print(rows[-1], flush=True)
    return rows


def one(m: RobustMDP, method: str, limit: float) -> tuple[str, int, str]:
    options: dict[str, object] = {"inner": "gradient", "inner_limit": 20} if "gradient" in method else {}
    if method.startswith("drpg") and m.ambiguity.rectangular == "s":
        options["step_decay"] = 2.0
    make_solver(m, method.partition(" ")[0], **options).step()  # loads machine code
    solver = make_solver(m, method.partition(" ")[0], **options)
    begin, gap = time.perf_counter(), float("inf")
    while time.perf_counter() - begin < limit:
        gap = float(solver.step()["gap"].amax())
        if gap <= 1e-3:
            return f"{time.perf_counter() - begin:.3f}", solver.iteration, f"{gap:.1e}"
    return f"not reached in {limit:.0f}", solver.iteration, f"{gap:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/drpg"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--limit", type=float, default=5.0, help="seconds per method in part 4")
    parser.add_argument("--only", choices=("sweeps", "certified"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.only != "certified":
        head = ["K", "S", "A", "B", "cost", "set", "plain_ms", "plain_ns_per_row", "robust_ms", "ratio",
                "ratio_at_optimum", "tensor_plain_ms", "tensor_robust_ms", "tensor_ratio"]  # fmt: skip
        write_csv(arguments.out / "sweeps.csv", head, sweeps(arguments.repeats))
        if importlib.util.find_spec("scipy"):
            by_linear_programs()
    if arguments.only != "sweeps":
        head = ["K", "S", "A", "B", "set", "method", "seconds", "iterations", "gap"]
        write_csv(arguments.out / "certified.csv", head, certified(arguments.limit))


if __name__ == "__main__":
    main()
