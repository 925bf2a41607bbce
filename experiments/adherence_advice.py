"""Adherence-aware advice on the flappy-bird grid: learning adherence, and the price of advice.

    python experiments/adherence_advice.py --out results/drpg

Two hard-coded humans; UCB-AD, the greedy estimate without optimism, never advising, the nominal plan for a human who
always obeys, and the optimum at the true adherence. Written: `advice.csv` and `advice.png`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from rlopt.analysis.robust_plots import draw_convergence
from rlopt.analysis.tables import write_csv
from rlopt.robust.advice import breakpoints, flappy_bird, ucb_ad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/drpg"))
    parser.add_argument("--episodes", type=int, default=500)
    parser.add_argument("--runs", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, panels = [], {}
    for human in ("greedy", "fixed"):
        model, theta = flappy_bird(human=human)
        alone = float(model.evaluate(theta, torch.full((model.horizon, model.num_states), model.num_actions)))
        trusting = float(model.evaluate(theta, model.plan(torch.ones_like(theta)).advice))
        best, count = (float(x) for x in model.worth(model.plan(theta)))
        learnt = {
            "UCB-AD": ucb_ad(model, theta, arguments.episodes, arguments.runs).value,
            "without optimism": ucb_ad(model, theta, arguments.episodes, arguments.runs, optimistic=False).value,
        }
        panels[f"human: {human}"] = {name: np.maximum(best - x.numpy(), 1e-4) for name, x in learnt.items()}
        rows.append([human, "never advise", f"{alone:.3f}", 0])
        rows.append([human, "plan as if always obeyed", f"{trusting:.3f}", ""])
        rows.append([human, "optimum at the true adherence", f"{best:.3f}", f"{count:.2f}"])
        for name, x in learnt.items():
            rows.append([human, f"{name}, last 50 episodes", f"{float(x[-50:].mean()):.3f}", ""])
        for share in (0.5, 0.9):
            # The dearest advice that still keeps this share of what advising gains.
            kept = [p for p in breakpoints(model, theta) if p[1] + p[0] * p[2] >= alone + share * (best - alone) - 1e-9]
            beta, value, advices = max(kept)
            rows.append([human, f"beta = {beta:.3f}: {100 * share:.0f} % of the gain", f"{value + beta * advices:.3f}",
                         f"{advices:.2f}"])  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.out / "advice.csv", ["human", "method", "reward", "expected_advices"], rows)
    for row in rows:
        print(*row)
    draw_convergence(panels, arguments.out / "advice.png", "regret of an episode", True,
                     f"Learning adherence ({arguments.runs} runs: mean, 5 to 95 % band)", floor=1e-3,
                     xlabel="episode")  # fmt: skip


if __name__ == "__main__":
    main()
