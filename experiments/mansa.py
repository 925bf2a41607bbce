"""From run folders of MANSA to a results folder: return against central steps, and whether it matters where they are.

    python experiments/mansa.py runs/mansa --out results/mansa
    python experiments/mansa.py runs/mansa --jobs runs/mansa/random.yaml  # random calls at the rates reached

Reads ``ROOT/<task>_<arm>/seed<seed>`` (``coop_cost_mid``), finished or not, with one run or several in each, and writes
``table.csv``, ``table.md`` and ``pareto.png``. A seed's numbers are means over its last ``WINDOW`` evaluations, and a
failure is an episode that did not earn all there was (1, on level-based foraging). ``--jobs`` writes a jobs file for
``rlopt queue`` with an arm ``random`` of each task whose ``cost_mid`` is finished: each seed's share of random calls
is the one that ``cost_mid`` reached with the same seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure

from rlopt.analysis.figures import save_figure
from rlopt.analysis.statistics import Array, mean_interval
from rlopt.analysis.tables import read_csv, write_csv
from rlopt.types import RloptError

WINDOW = 3
"""Evaluations at the end of which a mean is taken."""
WHOLE = 0.999
"""Returns below it are failures."""
MIDDLE, RANDOM = "cost_mid", "random"
ORDER = ("il", "cl", "cost_low", MIDDLE, "cost_high", "budget_2", "budget_6", RANDOM)


@dataclass(frozen=True)
class Arm:
    """What the seeds of one arm reached, each (seeds,) in the order of ``seeds``."""

    task: str
    name: str
    env_id: str
    config: dict[str, Any]
    """Of the first run folder."""
    step: int
    finished: bool
    seeds: list[int]
    returns: Array
    calls: Array
    """Central steps per episode."""
    rate: Array
    """Share of central steps."""
    failures: Array
    """Share of episodes that failed."""
    distilled: tuple[Array, Array] | None
    """Returns and calls where each agent switches for itself."""


def load_arms(root: Path) -> list[Arm]:
    """Return all arms with at least one evaluation, task by task.

    Raises:
        RloptError: there is none.
    """
    folders: dict[str, list[Path]] = {}
    for path in sorted(root.glob("*_*/seed*/evaluations.csv")):
        folders.setdefault(path.parent.parent.name, []).append(path.parent)
    found = [arm for name, own in folders.items() if (arm := _load(name, own)) is not None]
    if not found:
        raise RloptError(f"{root} has no run with an evaluation yet (looked for {root}/<task>_<arm>/seed<seed>)")
    place = {name: i for i, name in enumerate(ORDER)}
    return sorted(found, key=lambda arm: (arm.task, place.get(arm.name, len(ORDER)), arm.name))


def _load(name: str, folders: Sequence[Path]) -> Arm | None:
    rows: dict[int, dict[str, float]] = {}
    steps, totals, configs = [], [], []
    for folder in folders:
        table = read_csv(folder / "evaluations.csv")
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        if not table["step"]:
            continue
        columns = {key: np.array([np.nan if x is None else x for x in column], float) for key, column in table.items()}
        run = columns.get("run", np.zeros(len(columns["step"])))
        last = np.unique(columns["step"])[-WINDOW:]
        configs.append(config)
        steps.append(int(last[-1]))
        totals.append(int(config["total_steps"]))
        for r in np.unique(run):
            mine = {key: column[(run == r) & (columns["step"] >= last[0])] for key, column in columns.items()}
            rows[int(config["seed"]) + int(r)] = _numbers(mine)
    if not rows:
        return None
    task, _, arm = name.partition("_")
    seeds = sorted(rows)
    every = {key: np.array([rows[seed][key] for seed in seeds]) for key in rows[seeds[0]]}
    distilled = (every["distilled/return"], every["distilled/calls"]) if "distilled/return" in every else None
    return Arm(
        task, arm, configs[0]["env"]["id"], configs[0], min(steps), steps == totals, seeds, every["return"],
        every["calls"], every["rate"], every["failures"], distilled,
    )  # fmt: skip


def _numbers(table: dict[str, Array]) -> dict[str, float]:
    """Return the means of one seed's last evaluations."""
    found = {key: float(column.mean()) for key, column in table.items() if key.startswith("distilled/")}
    calls = table.get("calls", np.zeros(len(table["return"])))
    return {
        **found,
        "return": float(table["return"].mean()),
        "calls": float(calls.mean()),
        "rate": float(calls.sum() / table["length"].sum()),
        "failures": float((table["return"] < WHOLE).mean()),
    }


def improvement(one: Arm, other: Arm) -> tuple[float, int] | None:
    """Return the share of common seeds with which ``one`` did better than ``other`` (as well counts half), and how many
    there are; None without any."""
    seeds = [seed for seed in one.seeds if seed in other.seeds]
    if not seeds:
        return None
    a, b = (np.array([arm.returns[arm.seeds.index(seed)] for seed in seeds]) for arm in (one, other))
    return float(((a > b) + 0.5 * (a == b)).mean()), len(seeds)


def table_rows(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return the rows of the table."""
    rows = []
    by_name = {(arm.task, arm.name): arm for arm in arms}
    for arm in arms:
        row: dict[str, Any] = {
            "task": arm.env_id, "arm": arm.name, "step": arm.step, "finished": "yes" if arm.finished else "no",
            "seeds": len(arm.seeds), "return": _interval(arm.returns), "calls": f"{arm.calls.mean():.1f}",
            "call rate": f"{arm.rate.mean():.3f}", "failures": f"{arm.failures.mean():.2f}",
            "distilled return": "", "distilled calls": "",
        }  # fmt: skip
        if arm.distilled is not None:
            row["distilled return"], row["distilled calls"] = (
                _interval(arm.distilled[0]), f"{arm.distilled[1].mean():.1f}"
            )  # fmt: skip
        for word in (RANDOM, "il"):
            beside = by_name.get((arm.task, word))
            found = None if beside is None or beside is arm else improvement(arm, beside)
            row[f"P(better than {word})"] = "" if found is None else f"{found[0]:.2f} of {found[1]}"
        rows.append(row)
    return rows


def _interval(values: Array) -> str:
    if len(values) < 2:
        return f"{values.mean():.3f}"
    found = mean_interval(values)
    return f"{found.estimate:.3f} [{found.low:.3f}, {found.high:.3f}]"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def draw(arms: Sequence[Arm]) -> Figure:
    """Draw return against central steps per episode: every seed, and each arm's mean."""
    tasks = list(dict.fromkeys(arm.task for arm in arms))
    figure = Figure(figsize=(5.5 * len(tasks), 4.2), layout="constrained")
    for place, task in enumerate(tasks, 1):
        axes = figure.add_subplot(1, len(tasks), place)
        own = [arm for arm in arms if arm.task == task]
        for i, arm in enumerate(own):
            colour = f"C{i % 10}"
            axes.scatter(arm.calls, arm.returns, s=12, color=colour, alpha=0.5)
            label = arm.name if arm.finished else f"{arm.name} (so far)"
            axes.scatter(arm.calls.mean(), arm.returns.mean(), s=70, color=colour, marker="D", label=label)
        axes.set_title(own[0].env_id)
        axes.set_xlabel("central steps per episode")
        axes.set_ylabel("return")
        axes.legend(fontsize="small")
    return figure


def random_jobs(arms: Sequence[Arm]) -> dict[str, Any]:
    """Return a jobs file of random calls, at the rates of the finished ``cost_mid`` of each task.

    Raises:
        RloptError: none is finished.
    """
    jobs = []
    for arm in arms:
        if arm.name != MIDDLE or not arm.finished:
            continue
        rates = ",".join(f"{rate:.6g}" for rate in arm.rate)
        if arm.seeds != list(range(arm.seeds[0], arm.seeds[0] + len(arm.seeds))):
            raise RloptError(f"{arm.task}_{arm.name} lacks seeds between {arm.seeds[0]} and {arm.seeds[-1]}; run them")
        jobs.append({
            "name": f"{arm.task}_{RANDOM}", "experiment": "mansa_lbf_6x6_2p_1f_coop", "seeds": [arm.seeds[0]],
            "overrides": [
                f"env.id={arm.env_id}", f"num_runs={len(arm.seeds)}", f"total_steps={arm.config['total_steps']}",
                "agent.rule=random", "~agent.cost", f"agent.rates=[{rates}]", "log.tensorboard=false",
            ],
        })  # fmt: skip
    if not jobs:
        raise RloptError(f"no task has a finished {MIDDLE} yet; its rate is what random calls are made at")
    return {"jobs": jobs}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Summarise runs of MANSA.")
    parser.add_argument("root", type=Path, help="folder of the run folders")
    parser.add_argument("--out", type=Path, help="results folder")
    parser.add_argument("--jobs", type=Path, help="jobs file of random calls to write")
    given = parser.parse_args(arguments)
    try:
        arms = load_arms(given.root)
        if given.jobs is not None:
            given.jobs.write_text(yaml.safe_dump(random_jobs(arms), sort_keys=False), encoding="utf-8")
        rows = table_rows(arms)
        print(markdown(rows), end="")
        if given.out is not None:
            given.out.mkdir(parents=True, exist_ok=True)
            write_csv(given.out / "table.csv", list(rows[0]), [list(row.values()) for row in rows])
            (given.out / "table.md").write_text(markdown(rows), encoding="utf-8")
            save_figure(draw(arms), given.out / "pareto.png")
    except RloptError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
