"""The inventory figure of the DRPG paper: robust against non-robust policy gradient under a parametric adversary.

    python experiments/drpg_inventory.py --out results/drpg

The published instance (8 states, 3 actions), uniform start and first policy, adversary by projected gradient ascent
from ones and from its last answer. Written: `inventory.csv` and `inventory.png`, J(π_t) under the worst kernel found.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from rlopt.analysis.robust_plots import draw_convergence
from rlopt.analysis.tables import write_csv
from rlopt.robust.parametric import solve_parametric
from rlopt.robust.problems.paper_inventory import ones, paper_inventory

STEPS = (0, 1, 2, 5, 10, 20, 50, 100, 199)
# Regenerated independently of rlopt (with NumPy alone): the same instance, start and first policy.
REFERENCE = {
    "DRPG, step 0.1": {0: 70.73, 1: 51.17, 5: 47.99, 10: 46.99, 20: 46.36, 50: 46.30, 199: 46.296},
    "DRPG, step 0.01": {1: 51.77, 5: 50.91, 10: 50.35, 20: 49.27, 50: 47.78, 100: 46.88, 199: 46.36},
    "non-robust, step 0.1": {1: 54.50, 5: 53.21, 10: 51.97, 20: 50.72, 50: 49.68, 199: 49.74},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/drpg"))
    parser.add_argument("--iterations", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    s = paper_inventory()
    runs = {
        "DRPG, step 0.1": solve_parametric(s, arguments.iterations, 0.1, starts=[ones(s)]),
        "DRPG, step 0.01": solve_parametric(s, arguments.iterations, 0.01, starts=[ones(s)]),
        "non-robust, step 0.1": solve_parametric(s, arguments.iterations, 0.1, starts=[ones(s)], robust=False),
    }
    lines = {name: run.history["value"].numpy() for name, run in runs.items()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = [
        [name, t, f"{values[t, 0]:.4f}", REFERENCE[name].get(t, "")]
        for name, values in lines.items()
        for t in STEPS
        if t < len(values)
    ]
    write_csv(arguments.out / "inventory.csv", ["method", "t", "worst_case_cost", "reference"], rows)
    for name, run in runs.items():
        print(f"{name}: best {float(run.value.mean()):.4f}, lower bound of the optimum {float(run.lower[0]):.4f}")
    title = "Inventory instance of the paper: cost in the worst case found"
    draw_convergence({"J(π_t) under the worst kernel": lines}, arguments.out / "inventory.png", "cost", False, title)


if __name__ == "__main__":
    main()
