"""From run folders of MANSA to a results folder: return against central steps, and whether it matters where they are.

    python experiments/mansa.py runs/mansa --out results/mansa_lbf
    python experiments/mansa.py runs/mansa --jobs runs/mansa/random.yaml  # random calls at the rates reached

Reads ``ROOT/<task>_<arm>/seed<seed>`` (``coop_cost_mid``), finished or not, with one run or several in each, and writes
``table.csv``, ``improvement.csv``, ``summary.md`` (both, what the paper claims, and which arms are missing) and
``pareto.png``. A seed's numbers are means over its last ``WINDOW`` evaluations; it failed if its return is below
``FAILED`` of the best there is.

``--jobs`` writes a jobs file for ``rlopt queue`` with two arms of each task whose ``cost_mid`` is finished, in which
calls are random: at the rate that ``cost_mid`` came to in the end with the same seed (``random``), and at its rate over
the whole training (``random_training``), which is another one where calls fade.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure

from rlopt.analysis.figures import save_figure
from rlopt.analysis.statistics import Array, ConfidenceInterval, mean_interval, probability_of_improvement
from rlopt.analysis.tables import whole_lines, write_csv
from rlopt.types import RloptError

WINDOW = 3
"""Evaluations at the end of which a mean is taken."""
BEST = {"two_rooms": 20.0}
"""Most that an episode earns, where it is not 1 (level-based foraging)."""
FAILED = 0.9
"""A seed whose mean return is below this share of the best one failed."""
LEAST_RATE = 1e-4
"""Of random calls; with none at all nobody's centralised learner learns, as all runs update together."""
MIDDLE, RANDOM, TRAINING = "cost_mid", "random", "random_training"
ORDER = ("il", "cl", "cost_low", MIDDLE, "cost_high", "budget_2", "budget_5", "budget_6", RANDOM, TRAINING)
CONTROLS = ("il", "cl", RANDOM, TRAINING)
OPTIONS = {"independent_learns": "everything", "centralised_learns": "calls"}
"""Options that random calls are made with as ``cost_mid`` was, and their defaults."""


EVALUATED = ("return", "calls", "length", "distilled/return", "distilled/calls")
WANTED = ("step", "run", "central_updates", *EVALUATED)


@dataclass(frozen=True)
class Arm:
    """The evaluations of one arm, in which S seeds got to the same T steps."""

    task: str
    name: str
    config: dict[str, Any]
    """Of the first run folder."""
    seeds: list[int]
    steps: Array
    """(T,)"""
    values: dict[str, Array]
    """(S, T) means over episodes: ``return``, ``calls``, ``length``, and where each agent switches for itself
    ``distilled/return``, ``distilled/calls``."""
    training_rate: Array
    """(S,) share of central steps in training."""
    updates: Array
    """(S,) of the centralised learner."""

    @property
    def step(self) -> int:
        return int(self.steps[-1])

    @property
    def finished(self) -> bool:
        return self.step >= int(self.config["total_steps"])

    @property
    def env_id(self) -> str:
        return str(self.config["env"]["id"])

    @property
    def best(self) -> float:
        return BEST.get(self.env_id, 1.0)

    def trained(self, at: int | None = None) -> Array:
        """Return which evaluations (T,) are of trained policies, up to the step ``at``; of none the untrained."""
        here = self.steps <= (self.step if at is None else at)
        after = here & (self.steps > 0)
        return after if after.any() else here

    def end(self, key: str = "return", at: int | None = None) -> Array:
        """Return means (S,) over the last evaluations, of those up to the step ``at``."""
        found: Array = self.values[key][:, self.trained(at)][:, -WINDOW:].mean(1)
        return found

    def over(self, at: int | None = None) -> Array:
        """Return mean returns (S,) over all evaluations of a training, up to the step ``at``: who learns sooner has
        more."""
        found: Array = self.values["return"][:, self.trained(at)].mean(1)
        return found

    @cached_property
    def rate(self) -> Array:
        """(S,) share of central steps in the last evaluations."""
        return self.end("calls") / self.end("length")

    def failed(self, at: int | None = None) -> int:
        """Return how many seeds failed, in the evaluations up to the step ``at``."""
        return int((self.end(at=at) < FAILED * self.best).sum())

    @cached_property
    def sooner(self) -> float:
        """Return the median of the seeds' first steps at which an evaluation reached ``FAILED`` of the best; NaN where
        fewer than half did."""
        reached = self.values["return"] >= FAILED * self.best
        first = np.where(reached.any(1), self.steps[reached.argmax(1)], np.inf)
        middle = float(np.median(first))
        return middle if np.isfinite(middle) else float("nan")


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
    curves: dict[int, dict[float, dict[str, float]]] = {}
    training: dict[int, tuple[float, float]] = {}
    configs = []
    for folder in folders:
        table = _columns(folder / "evaluations.csv")
        if not len(table["step"]):
            continue
        configs.append(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
        seed, episodes = int(configs[-1]["seed"]), _columns(folder / "episodes.csv")
        for r in np.unique(table["run"]).astype(int):
            mine = {key: column[table["run"] == r] for key, column in table.items()}
            curves[seed + int(r)] = {
                step: {key: float(column[mine["step"] == step].mean()) for key, column in mine.items()}
                for step in np.unique(mine["step"])
            }
            own = {key: column[episodes["run"] == r] for key, column in episodes.items()}
            made, lasted = own["calls"].sum(), own["length"].sum()
            updates = float(own.get("central_updates", np.zeros(1)).sum())
            training[seed + int(r)] = (float(made / lasted) if lasted else 0.0, updates)
    if not configs:
        return None
    seeds = sorted(curves)
    steps = sorted(set.intersection(*(set(curves[seed]) for seed in seeds)))
    if not steps:
        return None
    every = {key for curve in curves.values() for at in curve.values() for key in at}
    wanted = [key for key in EVALUATED if key in every]
    values = {key: np.array([[curves[seed][step][key] for step in steps] for seed in seeds]) for key in wanted}
    rates, updates_made = np.array([training[seed] for seed in seeds]).T
    task, _, arm = name.partition("_")
    return Arm(task, arm, configs[0], seeds, np.array(steps), values, rates, updates_made)


def _columns(path: Path) -> dict[str, Array]:
    """Return the columns ``WANTED`` that a table has (of episodes there are too many to read them all), ``run`` and
    ``calls`` 0 where it has none.

    Raises:
        RloptError: it is no table of numbers.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else "step,length\n"
    head, *lines = whole_lines(text)
    names = head.split(",")
    own = [name for name in WANTED if name in names]
    nothing = np.zeros(len(lines))
    if not lines:
        return {"run": nothing, "calls": nothing, **dict.fromkeys(own, nothing)}
    try:
        numbers = np.loadtxt(lines, delimiter=",", usecols=[names.index(name) for name in own], ndmin=2)
    except ValueError:
        raise RloptError(f"{path} is no table of numbers; mend or remove it") from None
    return {"run": nothing, "calls": nothing, **dict(zip(own, numbers.T, strict=True))}


def missing(arms: Sequence[Arm]) -> list[str]:
    """Return which arms a task lacks that another one has, the two learners alone or the controls, and which are not
    finished."""
    tasks = list(dict.fromkeys(arm.task for arm in arms))
    present = {(arm.task, arm.name) for arm in arms}
    wanted = [name for name in ORDER if name in (*CONTROLS, MIDDLE) or any((task, name) in present for task in tasks)]
    told = [f"{task}_{name}: no run" for task in tasks for name in wanted if (task, name) not in present]
    return told + [
        f"{arm.task}_{arm.name}: at {arm.step} of {arm.config['total_steps']} steps" for arm in arms if not arm.finished
    ]


def table_rows(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return the rows of the table."""
    rows = []
    for arm in arms:
        steps = "" if np.isnan(arm.sooner) else f"{arm.sooner:.0f}"
        row: dict[str, Any] = {
            "task": f"{arm.task} ({arm.env_id})", "arm": arm.name, "step": arm.step, "seeds": len(arm.seeds),
            "return": _interval(arm.end()), "return over training": _interval(arm.over()),
            f"steps to {FAILED:g} of the best": steps, "failed seeds": f"{arm.failed()} of {len(arm.seeds)}",
            "calls per episode": f"{arm.end('calls').mean():.2f}", "call rate": f"{arm.rate.mean():.3f}",
            "call rate in training": f"{arm.training_rate.mean():.3f}",
            "central updates": f"{arm.updates.mean():.0f}", "distilled return": "", "distilled calls": "",
        }  # fmt: skip
        if "distilled/return" in arm.values:
            row["distilled return"] = _interval(arm.end("distilled/return"))
            row["distilled calls"] = f"{arm.end('distilled/calls').mean():.2f}"
        rows.append(row)
    return rows


def _interval(values: Array) -> str:
    return format(mean_interval(values), ".3f")


def improvement_rows(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return how likely a seed of each learnt switch does better than one of each control, by task and over all tasks
    that have both; of unfinished arms at the last step that both reached."""
    by_name = {(arm.task, arm.name): arm for arm in arms}
    tasks = list(dict.fromkeys(arm.task for arm in arms))
    measures: dict[str, Callable[[Arm, int], Array]] = {
        "return": lambda arm, at: arm.end(at=at),
        "return over training": lambda arm, at: arm.over(at),
    }
    rows = []
    for name in dict.fromkeys(arm.name for arm in arms if arm.name not in CONTROLS):
        for beside in CONTROLS:
            pairs = {
                task: (by_name[task, name], by_name[task, beside])
                for task in tasks
                if (task, name) in by_name and (task, beside) in by_name
            }
            for measure, of in measures.items():
                found = {}
                for task, (one, other) in pairs.items():
                    at = min(one.step, other.step)
                    found[task] = (of(one, at), of(other, at))
                groups = {task: [pair] for task, pair in found.items()}
                if len(found) > 1:
                    groups["all"] = list(found.values())
                for task, scores in groups.items():
                    p = probability_of_improvement([x for x, _ in scores], [y for _, y in scores])
                    numbers = {"P(better)": f"{p.estimate:.2f}", "low": f"{p.low:.2f}", "high": f"{p.high:.2f}"}
                    rows.append({"task": task, "arm": name, "beside": beside, "measure": measure, **numbers})
    return rows


def side_by_side(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of ``improvement_rows`` with one of each task and arm."""
    kinds = list(dict.fromkeys((row["measure"], row["beside"]) for row in rows))
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        empty = {"task": row["task"], "arm": row["arm"], **{f"{measure}, beside {name}": "" for measure, name in kinds}}
        own = found.setdefault((row["task"], row["arm"]), empty)
        own[f"{row['measure']}, beside {row['beside']}"] = f"{row['P(better)']} [{row['low']}, {row['high']}]"
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    return sorted(found.values(), key=lambda row: tasks.index(row["task"]))


def claims(arms: Sequence[Arm]) -> list[str]:
    """Return what the paper's abstract claims, each beside what was measured here."""
    learnt = [arm for arm in arms if arm.name not in CONTROLS]
    by_name = {(arm.task, arm.name): arm for arm in arms}
    shares = ((f"{arm.task}_{arm.name}", 100 * arm.rate.mean(), 100 * arm.training_rate.mean()) for arm in learnt)
    rates = "; ".join(f"{name} {end:.1f} % ({training:.1f} %)" for name, end, training in shares)
    better, fails = [], []
    for arm in learnt:
        alone = by_name.get((arm.task, "il"))
        if alone is None:
            continue
        at = min(arm.step, alone.step)
        p: ConfidenceInterval = probability_of_improvement([arm.end(at=at)], [alone.end(at=at)])
        better.append(f"{arm.task}_{arm.name} {p}")
        fails.append(f"{arm.task}_{arm.name} {arm.failed(at)} of {len(arm.seeds)} (alone {alone.failed(at)})")
    nothing = "no il yet"
    return [
        f"“CL at 1 % of calls on LBF”: central steps in the end (in training): {rates or 'nothing measured'}.",
        f"“Better than independent learning”: P(better than il), 95 % intervals: {'; '.join(better) or nothing}.",
        f"“Fewer failures”: seeds below {FAILED:g} of the best return: {'; '.join(fails) or nothing}.",
    ]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table as Markdown."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def summary(arms: Sequence[Arm]) -> str:
    """Return the tables, the claims and what is missing, as Markdown."""
    parts = [markdown(table_rows(arms))]
    if better := improvement_rows(arms):
        parts.append("Probability that a seed of the arm does better than one of a control, with 95 % intervals:\n")
        parts.append(markdown(side_by_side(better)))
    parts.append("What the paper's abstract claims, and what was measured:\n")
    parts.append("".join(f"- {line}\n" for line in claims(arms)))
    if lacking := missing(arms):
        parts.append(f"Missing: {'; '.join(lacking)}.\n")
    return "\n".join(parts)


def draw(arms: Sequence[Arm]) -> Figure:
    """Draw for each task return against central steps, in the end and over the whole training, and learning curves; of
    unfinished arms beside finished ones the curves alone."""
    tasks = list(dict.fromkeys(arm.task for arm in arms))
    names = sorted({arm.name for arm in arms}, key=lambda name: (*ORDER, name).index(name))
    colours = {name: f"C{i}" if i < 10 else "black" for i, name in enumerate(names)}
    figure = Figure(figsize=(5.2 * len(tasks), 9.6), layout="constrained")
    places = figure.subplots(3, len(tasks), squeeze=False)
    for column, task in enumerate(tasks):
        own = [arm for arm in arms if arm.task == task]
        end, over, curve = places[:, column]
        for arm in own:
            colour, marker = colours[arm.name], "o" if arm.name in CONTROLS else "D"
            points = ((end, arm.end("calls"), arm.end()), (over, 100 * arm.training_rate, arm.over()))
            for axes, x, y in points if arm.finished or not any(one.finished for one in own) else ():
                axes.scatter(x, y, s=10, color=colour, alpha=0.4)
                axes.scatter(x.mean(), y.mean(), s=60, color=colour, marker=marker, edgecolor="black", linewidth=0.6)
            style = "--" if arm.name in CONTROLS else "-"
            curve.plot(arm.steps / 1000, arm.values["return"].mean(0), style, color=colour, linewidth=1.3)
        end.set_title(f"{task}: {own[0].env_id}")
        for axes, x, y in (
            (end, "central steps per episode, in the end", "return, in the end"),
            (over, "central steps in training, %", "mean return over training"),
            (curve, "environment steps, thousands", "return, mean over seeds"),
        ):
            axes.set_xlabel(x)
            axes.set_ylabel(y)
            axes.grid(alpha=0.3)
    handles = [
        figure.axes[0].plot([], [], "o" if name in CONTROLS else "D", color=colours[name], label=_label(name, arms))[0]
        for name in names
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(names)), fontsize="small")
    return figure


def _label(name: str, arms: Iterable[Arm]) -> str:
    return name if all(arm.finished for arm in arms if arm.name == name) else f"{name} (so far)"


def random_jobs(arms: Sequence[Arm]) -> dict[str, Any]:
    """Return a jobs file of random calls, at the rates of the finished ``cost_mid`` of each task.

    Raises:
        RloptError: none is finished.
    """
    jobs = []
    for arm in arms:
        if arm.name != MIDDLE or not arm.finished:
            continue
        if arm.seeds != list(range(arm.seeds[0], arm.seeds[0] + len(arm.seeds))):
            raise RloptError(f"{arm.task}_{arm.name} lacks seeds between {arm.seeds[0]} and {arm.seeds[-1]}; run them")
        own = arm.config["agent"]
        options = [f"agent.{key}={own[key]}" for key, default in OPTIONS.items() if own.get(key, default) != default]
        for name, rates in ((RANDOM, arm.rate), (TRAINING, arm.training_rate)):
            shares = ",".join(f"{max(rate, LEAST_RATE):.6g}" for rate in rates)
            jobs.append({
                "name": f"{arm.task}_{name}", "experiment": arm.config["experiment"], "seeds": [arm.seeds[0]],
                "overrides": [
                    f"env.id={arm.env_id}", f"num_runs={len(arm.seeds)}", f"total_steps={arm.config['total_steps']}",
                    "agent.rule=random", "~agent.cost", f"agent.rates=[{shares}]", *options, "log.tensorboard=false",
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
        print(summary(arms), end="")
        if given.out is not None:
            given.out.mkdir(parents=True, exist_ok=True)
            for name, rows in (("table", table_rows(arms)), ("improvement", improvement_rows(arms))):
                if rows:
                    write_csv(given.out / f"{name}.csv", list(rows[0]), [list(row.values()) for row in rows])
            (given.out / "summary.md").write_text(summary(arms), encoding="utf-8")
            save_figure(draw(arms), given.out / "pareto.png")
    except RloptError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
