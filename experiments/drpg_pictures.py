"""Pictures of what ambiguity does: value against radius, a worst-case kernel, policies on a grid.

    python experiments/drpg_pictures.py --out results/drpg

Written: `radius.png` and `radius.csv` (G(10,6,3), 20 instances: the robust optimum, and the nominal optimum's policy in
its worst case), `worst_kernel.png` (machine replacement), `grid.png` (nominal and robust policy on the grid world).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from rlopt.analysis.robust_plots import draw_grid_policy, draw_radius, draw_worst_kernel
from rlopt.analysis.tables import write_csv
from rlopt.robust import L1, Nominal, solve
from rlopt.robust.bellman import objective, worst_case
from rlopt.robust.problems.domains import GRID, grid_world, machine_replacement
from rlopt.robust.problems.garnet import garnet

RADII = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/drpg"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    m = garnet(10, 6, 3, instances=20)
    naive = solve(m.replace(Nominal()), "partial_policy_iteration", 100, 1e-8).policy
    robust, exposed = [], []
    for radius in RADII:
        here = m.replace(L1(radius))
        robust.append(solve(here, "partial_policy_iteration", 100, 1e-8).upper.numpy())
        exposed.append(objective(here, worst_case(here, naive, here.kernel.probabilities).value).numpy())
    out.mkdir(parents=True, exist_ok=True)
    head = ["radius", "robust_optimum_mean", "nominal_policy_worst_case_mean"]
    means = zip(RADII, robust, exposed, strict=True)
    write_csv(out / "radius.csv", head, [[radius, f"{a.mean():.4f}", f"{b.mean():.4f}"] for radius, a, b in means])
    lines = {"robust optimum": np.stack(robust), "nominal optimum's policy, worst case": np.stack(exposed)}
    draw_radius(RADII, lines, out / "radius.png", "cost J", "G(10,6,3), 20 instances: mean, 5 to 95 % band")
    machine = machine_replacement(radius=0.4)
    s = solve(machine, "partial_policy_iteration", 100, 1e-8)
    draw_worst_kernel(machine.kernel.to_dense()[0], s.kernel, s.policy, out / "worst_kernel.png",
                      "Machine replacement, κ = 0.4: the chain of the robust policy")  # fmt: skip
    grid = grid_world(radius=0.3)
    plain = solve(grid.replace(Nominal()), "partial_policy_iteration", 100, 1e-8)
    safe = solve(grid, "partial_policy_iteration", 100, 1e-8)
    draw_grid_policy(
        GRID, {"nominal": plain.policy, "robust, κ = 0.3": safe.policy},
        {"nominal": plain.value, "robust, κ = 0.3": safe.value}, out / "grid.png", "Grid world: policy and cost",
    )  # fmt: skip


if __name__ == "__main__":
    main()
