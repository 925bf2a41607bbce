"""The Garnet figures of the DRPG paper (Wang, Ho and Petrik 2023), every size as one batched run of all instances.

    python experiments/drpg_garnet.py --out results/drpg

(s,a)-rectangular G(5,4,3), G(10,6,3), G(15,8,3) with step 0.1, and s-rectangular G(10,5,10), G(15,8,15) with step
0.1/√(1 + t/2), 50 instances, 200 iterations, exact adversary. Written: `garnet.csv` (mean, standard error, percentiles
of J(π_t) - J* and of the paper's |J_DRPG(t) - J_RVI(t)| at some t), `garnet_gap.png`, `garnet_paper.png`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from rlopt.analysis.robust_plots import draw_convergence
from rlopt.analysis.tables import write_csv
from rlopt.robust import RobustMDP, make_solver, solve
from rlopt.robust.bellman import objective, worst_case
from rlopt.robust.problems.garnet import garnet, random_policy

STEPS = (0, 1, 2, 5, 10, 20, 50, 100, 199)
SIZES = [((5, 4, 3), "sa"), ((10, 6, 3), "sa"), ((15, 8, 3), "sa"), ((10, 5, 10), "s"), ((15, 8, 15), "s")]
# Regenerated independently of rlopt with other random numbers: means over 50 instances of J(π_t) - J* (alpha = 0.1).
REFERENCE = {
    (5, 4, 3): (21.3, 6.3, 2.1, 0.36, 0.092, 0.029, 0.0062, 0.0007, 0.0004),
    (10, 6, 3): (26.4, 11.2, 6.0, 1.65, 0.48, 0.13, 0.029, 0.0087, 0.0026),
    (15, 8, 3): (28.5, 14.2, 8.4, 2.93, 0.98, 0.30, 0.070, 0.022, 0.0068),
}
HEAD = [
    "size",
    "set",
    "t",
    "mean",
    "standard_error",
    "p5",
    "p95",
    "reference",
    "z",
    "paper_style_mean",
    "best_so_far_mean",
]


def run(m: RobustMDP, iterations: int, kind: str, seed: int) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """J(π_t) exactly, and what value iteration has at the same index, (T, K) each; seconds of DRPG; J* (K,)."""
    start = random_policy(m, seed)
    decay = {} if kind == "sa" else {"step_decay": 2.0}
    # The adversary is solved to rounding, so that J(π_t, p_t) is the robust cost of π_t itself.
    begin = time.perf_counter()
    drpg = solve(m, "drpg", iterations, None, start, inner_tolerance=1e-10, **decay)
    seconds = time.perf_counter() - begin
    best = solve(m, "partial_policy_iteration", 100, 1e-9)
    sweeps = make_solver(m, "value_iteration", start)
    other = torch.stack([sweeps.step()["value"] for _ in range(iterations)])
    exact = objective(m, worst_case(m, best.policy, m.kernel.probabilities).value)
    return drpg.history["value"].numpy(), other.numpy(), seconds, exact.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/drpg"))
    parser.add_argument("--instances", type=int, default=50)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gaps: dict[str, dict[str, np.ndarray]] = {}
    paper: dict[str, dict[str, np.ndarray]] = {}
    rows = []
    for (s, a, b), kind in SIZES:
        m = garnet(s, a, b, arguments.instances, rectangular=kind, seed=arguments.seed)
        values, other, seconds, best = run(m, arguments.iterations, kind, arguments.seed)
        gap, error = np.maximum(values - best, 0.0), np.abs(values - other)
        so_far = np.minimum.accumulate(gap, axis=0)
        name = f"G({s},{a},{b}), {'(s,a)' if kind == 'sa' else 's'}-rectangular"
        gaps[name] = {"J(π_t) − J*": gap} | ({"best so far": so_far} if kind == "s" else {})
        paper[name] = {"|DRPG − value iteration|": error}
        print(
            f"{name}: {seconds:.1f} s for {len(values)} iterations of {arguments.instances} instances", file=sys.stderr
        )
        for i, t in enumerate(STEPS):
            if t < len(values):
                reference = REFERENCE.get((s, a, b), ("",) * len(STEPS))[i]
                spread = gap[t].std(ddof=1) / np.sqrt(gap.shape[1])
                low, high = np.percentile(gap[t], (5, 95))
                numbers = (gap[t].mean(), spread, low, high)
                # The reference has as many instances of its own, so its standard error is taken to be the same.
                z = f"{(gap[t].mean() - reference) / (np.sqrt(2.0) * spread):.1f}" if reference != "" else ""
                rows.append([f"G({s},{a},{b})", kind, t, *(f"{x:.4g}" for x in numbers), reference, z,
                             f"{error[t].mean():.4g}", f"{so_far[t].mean():.4g}"])  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.out / "garnet.csv", HEAD, rows)
    count = f"{arguments.instances} instances: mean, 5 to 95 % band"
    draw_convergence(gaps, arguments.out / "garnet_gap.png", "J(π_t) − J*", True, f"DRPG on Garnet problems ({count})")
    draw_convergence(paper, arguments.out / "garnet_paper.png", "error", False,
                     f"The paper's error: DRPG against value iteration at the same iteration ({count})")  # fmt: skip


if __name__ == "__main__":
    main()
