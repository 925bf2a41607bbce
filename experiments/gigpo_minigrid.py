"""Curves and a table of GiGPO, GRPO and PPO on the same group rollouts (experiments/jobs/gigpo_minigrid.yaml).

    python experiments/gigpo_minigrid.py --root runs/gigpo_minigrid --out results/gigpo_minigrid

Runs that are not finished are left out, and the page says how many are missing.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rlopt.analysis.figures import COLOURS, save_figure
from rlopt.analysis.plots import draw_mean, format_steps
from rlopt.analysis.ranking import as_markdown
from rlopt.analysis.statistics import mean_interval
from rlopt.analysis.tables import read_csv
from rlopt.types import RloptError
from rlopt.version import __version__

TASKS = {"doorkey": "MiniGrid-DoorKey-5x5-v0", "multiroom": "MiniGrid-MultiRoom-N2-S4-v0"}
WAYS = ("gigpo", "grpo", "ppo")
SEEDS = 5
WINDOW = 20_000
"""Environment steps over which the returns of training episodes are averaged."""
PAGE = """# GiGPO, GRPO and PPO with a network on two sparse tasks of MiniGrid

`rlopt queue experiments/jobs/gigpo_minigrid.yaml --root runs/gigpo_minigrid`, then
`python experiments/gigpo_minigrid.py --root runs/gigpo_minigrid --out results/gigpo_minigrid` · rlopt {version} · CPU

{missing}The return is 1 - 0.9 x (share of the episode limit used) at the goal and 0 otherwise. All learn from 8 groups
x 8 whole episodes by the same loss at the same rates and the same number of environment steps; PPO has a critic. *At
the end*: episodes of the last {window} steps of training. *On the whole*: all windows of {window} steps. "GiGPO ahead"
is paired by seed, where both have been run. Means and 95 % intervals by Student's t. Settings were not tuned for any of
the three.

"""


def main(argv: Iterable[str] | None = None) -> None:
    """Write the table, the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="where the run folders are")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results")
    args = parser.parse_args(None if argv is None else list(argv))
    found = {(task, way): curves(args.root / f"{task}_{way}") for task in TASKS for way in WAYS}
    if not any(found.values()):
        raise RloptError(f"{args.root} has no finished run yet; rlopt queue makes them")
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "curves.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["env", "agent", "seed", "step", "return"])
        for (task, way), seeds in found.items():
            for seed, curve in seeds.items():
                rows = [[TASKS[task], way, seed, (i + 1) * WINDOW, f"{x:.4g}"] for i, x in enumerate(curve)]
                writer.writerows(rows)
    (args.out / "README.md").write_text(report(found), encoding="utf-8")
    draw(found, args.out / "curves.png")


def curves(folder: Path) -> dict[int, np.ndarray[Any, Any]]:
    """Return, by seed, the mean return of the training episodes that ended in each window."""
    found = {}
    for run in sorted(folder.glob("seed*"), key=lambda path: int(path.name.removeprefix("seed"))):
        if not (run / "policy").is_dir():
            continue  # not finished
        episodes = read_csv(run / "episodes.csv")
        step, total = np.array(episodes["step"], float), np.array(episodes["return"], float)
        window = ((step - 1) // WINDOW).astype(int)
        found[int(run.name.removeprefix("seed"))] = np.array(
            [total[window == i].mean() if (window == i).any() else np.nan for i in range(int(window.max()) + 1)]
        )
    return found


Found = dict[tuple[str, str], dict[int, np.ndarray[Any, Any]]]


def report(found: Found) -> str:
    """Return what was found, as a page."""
    head = [
        "task",
        "agent",
        "seeds",
        "at the end",
        "on the whole",
        "GiGPO ahead at the end",
        "GiGPO ahead on the whole",
    ]
    rows = [head]
    for (task, way), mine in found.items():
        best = found[task, "gigpo"]
        ahead = ["", ""]
        if way != "gigpo" and (both := sorted(mine.keys() & best.keys())):
            ahead = [f"{mean_interval([f(best[s]) - f(mine[s]) for s in both]):+.2f}" for f in (at_the_end, np.nanmean)]
        numbers = [
            str(mean_interval([f(curve) for curve in mine.values()])) if mine else "-" for f in (at_the_end, np.nanmean)
        ]
        rows.append([TASKS[task], way, str(len(mine)), *numbers, *ahead])
    table = "\n".join(as_markdown(rows))
    done, every = sum(map(len, found.values())), len(found) * SEEDS
    missing = f"**Unfinished: {done} of {every} runs so far.** " if done < every else ""
    return (
        f"{PAGE.format(version=__version__, window=f'{WINDOW:,}', missing=missing)}{table}\n\n![curves](curves.png)\n"
    )


def at_the_end(curve: np.ndarray[Any, Any]) -> float:
    """Return the mean of the last window in which an episode ended."""
    return float(curve[~np.isnan(curve)][-1])


def draw(found: Found, path: Path) -> None:
    """Draw training returns over steps, with 95 % intervals of the mean."""
    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=110)
    for ax, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        for way, colour in zip(WAYS, COLOURS, strict=False):
            if seeds := list(found[task, way].values()):
                y = np.array([curve[: min(map(len, seeds))] for curve in seeds])
                label = f"{way} ({len(seeds)} seed{'s' * (len(seeds) > 1)})"
                draw_mean(ax, (np.arange(y.shape[1]) + 1) * WINDOW, y, label, colour)
        ax.set(title=TASKS[task], xlabel="environment steps", ylabel="return in training", ylim=(0, 1.02))
        ax.xaxis.set_major_formatter(lambda value, _: format_steps(value))
        if ax.lines:
            ax.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    main()
