"""From run folders to a results folder: tables, curves and intervals of one agent on MuJoCo beside the published ones.

    python experiments/summarise.py --root runs/sac_mujoco --out results/sac_mujoco
    python experiments/summarise.py --root runs/td3_mujoco --out results/td3_mujoco --steps 100000 150000 200000
    python experiments/summarise.py --root runs/ppo --out results/ppo_mujoco --steps 100000 300000 500000 --training
    python experiments/summarise.py --redraw td3 --out results/td3_mujoco      # curves.png from evaluations.csv alone

Reads what ``rlopt queue`` made (``ROOT/<experiment>/seed<seed>``), finished or not, and writes ``evaluations.csv``
(every seed's mean return at every evaluation), ``table.csv`` and ``table.md``, ``curves.png`` and ``README.md``. With
``--training`` the table has the returns of training episodes too, which CleanRL publishes. The README is kept where it
exists, unless ``--readme`` asks for a new one: it is where findings are written by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlopt.analysis.curves import WINDOW, Curve, merge
from rlopt.analysis.plots import draw_panels, format_steps
from rlopt.analysis.reference import TD3_NORMALISATION, beside, td3_normalised
from rlopt.analysis.run_results import Run, load_run
from rlopt.analysis.statistics import Array, ConfidenceInterval, bootstrap_interval, iqm
from rlopt.analysis.tables import read_csv, write_csv
from rlopt.types import RloptError

PRESETS = ("tianshou", "classic")
REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = (100_000, 110_000)
STATISTICS = {
    "single": "The one evaluation nearest to the step",
    "window": f"Each seed's mean over its evaluations in the {format_steps(WINDOW)} steps before",
    "training": f"Each seed's mean over its training episodes in the {format_steps(WINDOW)} steps before",
}
BIN = 10_000
"""Steps whose training episodes are averaged first."""
HARDWARE = "two x86-64 server cores, no GPU, one single-threaded run per core"
_RESAMPLES = 20_000
_NONE = "\N{EN DASH}"
_PACKAGES = ("rlopt", "python", "torch", "numpy", "gymnasium", "mujoco")


@dataclass(frozen=True)
class Cell:
    """One curve at one step by one of ``STATISTICS``."""

    name: str
    env_id: str
    step: int
    statistic: str
    scores: Array

    @property
    def sd(self) -> float:
        return float(self.scores.std(ddof=1)) if len(self.scores) > 1 else math.nan


def find_runs(root: Path) -> dict[tuple[str, str], list[Run]]:
    """Runs with at least one evaluation by (preset, environment), tasks in the order of the paper, seeds in theirs.

    Raises:
        RloptError: there is none.
    """
    found: dict[tuple[str, str], list[Run]] = {}
    for path in sorted(root.glob("*/seed*/config.yaml")):
        run = load_run(path.parent)
        preset = _preset(path.parent.parent.name)
        if run.evaluations:
            found.setdefault((preset, run.env_id), []).append(run)
    if not found:
        raise RloptError(f"{root} has no run with an evaluation yet (looked for {root}/<experiment>/seed<seed>)")
    presets, tasks = list(PRESETS), list(TD3_NORMALISATION)

    def rank(key: tuple[str, str]) -> tuple[int, int]:
        return _place(key[0], presets), _place(_task(key[1]), tasks)

    return {key: sorted(found[key], key=lambda run: int(run.config["seed"])) for key in sorted(found, key=rank)}


def cells(curves: Iterable[Curve], steps: Sequence[int], training: Iterable[Curve] = ()) -> list[Cell]:
    """Every curve at every step that it reaches, by every statistic."""
    found = [(c, step, "single", c.at(step)) for c in curves for step in steps]
    found += [(c, step, "window", c.window(step)) for c, step, *_ in found]
    found += [(c, step, "training", c.window(step)) for c in training for step in steps]
    return [
        Cell(c.name, c.env_id, step, statistic, scores) for c, step, statistic, scores in found if scores is not None
    ]


def training_returns(run: Run) -> list[tuple[list[int], list[float]]]:
    """Of each seed steps and mean returns of the training episodes that ended in the ``BIN`` steps before each."""
    table = read_csv(run.folder / "episodes.csv") if (run.folder / "episodes.csv").is_file() else {"step": []}
    seeds = table.get("run", ["0"] * len(table["step"]))
    found = []
    for i, evaluation in enumerate(run.evaluations):
        bins: dict[int, list[float]] = {}
        for step, total, seed in zip(table["step"], table.get("return", []), seeds, strict=True):
            if int(seed) == i:
                bins.setdefault(-(-int(step) // BIN) * BIN, []).append(float(total))
        # The last bin is whole once an evaluation lies behind it.
        whole = [step for step in sorted(bins) if step <= evaluation.steps[-1]]
        found.append((whole, [sum(bins[step]) / len(bins[step]) for step in whole]))
    return found


def pooled(made: Sequence[Cell], tasks: Sequence[str]) -> ConfidenceInterval | None:
    """TD3-normalised IQM over ``tasks`` and seeds with its stratified bootstrap interval; None without one of them."""
    own = {_task(cell.env_id): cell for cell in made}
    if not set(tasks) <= set(own):
        return None
    scores = [td3_normalised(own[task].env_id, own[task].scores) for task in tasks]
    return bootstrap_interval(scores, iqm, resamples=_RESAMPLES)


def groups(made: Iterable[Cell], statistic: str) -> dict[tuple[str, int], list[Cell]]:
    """Cells of one statistic by (curve, step): the rows of a table."""
    found: dict[tuple[str, int], list[Cell]] = {}
    for cell in made:
        if cell.statistic == statistic:
            found.setdefault((cell.name, cell.step), []).append(cell)
    return found


def task_sets(rows: Iterable[Sequence[Cell]]) -> list[list[str]]:
    """The sets of tasks that some row is complete on, the largest first: IQMs are comparable only over one set."""
    sets = {tuple(t for t in TD3_NORMALISATION if t in {_task(cell.env_id) for cell in row}) for row in rows}
    return [list(tasks) for tasks in sorted(sets, key=lambda tasks: (-len(tasks), tasks)) if tasks]


def summarise(
    root: Path, out: Path, command: str, steps: Sequence[int] = STEPS, new_readme: bool = False, training: bool = False
) -> None:
    """Write the results folder ``out`` from the run folders under ``root``."""
    runs = find_runs(root)
    own = [
        merge(_name(*key), key[1], [(e.steps, e.means) for run in group for e in run.evaluations], group[0].agent)
        for key, group in runs.items()
    ]
    envs = list(dict.fromkeys(curve.env_id for curve in own))
    of_env = {env: [curve for curve in own if curve.env_id == env] for env in envs}
    published = {(curve.name, curve.env_id): curve for curves in of_env.values() for curve in beside(curves)}
    out.mkdir(parents=True, exist_ok=True)
    write_evaluations(out / "evaluations.csv", runs)
    trained = [
        merge(_name(*key), key[1], [seed for run in group for seed in training_returns(run)])
        for key, group in runs.items()
        if training
    ]
    made = cells([*own, *published.values()], steps, trained)
    write_table(out / "table.csv", made)
    agent = own[0].agent.upper()
    (out / "table.md").write_text(markdown(made, agent), encoding="utf-8")
    draw_panels(of_env, out / "curves.png")
    if new_readme or not (out / "README.md").exists():
        (out / "README.md").write_text(readme(runs, root, command), encoding="utf-8")


def redraw(out: Path, agent: str) -> None:
    """Draw ``curves.png`` anew from the ``evaluations.csv`` beside it.

    Raises:
        RloptError: there is none, or it is no table of ``write_evaluations``.
    """
    seeds: dict[tuple[str, str], dict[int, tuple[list[int], list[float]]]] = {}
    table = read_csv(out / "evaluations.csv")
    try:
        rows = zip(*(table[name] for name in ("preset", "env", "seed", "step", "return")), strict=True)
    except KeyError as e:
        raise RloptError(f"{out / 'evaluations.csv'} has no column {e}; name a folder that this script wrote") from e
    for preset, env, seed, step, mean in rows:
        own = seeds.setdefault((preset, env), {}).setdefault(int(seed), ([], []))
        own[0].append(int(step))
        own[1].append(float(mean))
    panels: dict[str, list[Curve]] = {}
    for (preset, env), of_seeds in seeds.items():
        panels.setdefault(env, []).append(merge(_name(preset, env), env, list(of_seeds.values()), agent))
    draw_panels(panels, out / "curves.png")


def write_evaluations(path: Path, runs: dict[tuple[str, str], list[Run]]) -> None:
    """``env, preset, seed, step, episodes, return``: each seed's mean return at each evaluation."""
    rows = [
        [env, preset, e.seed, step, len(returns), f"{mean:.3f}"]
        for (preset, env), group in runs.items()
        for run in group
        for e in run.evaluations
        for step, returns, mean in zip(e.steps, e.returns, e.means, strict=True)
    ]
    write_csv(path, ["env", "preset", "seed", "step", "episodes", "return"], rows)


def write_table(path: Path, made: Sequence[Cell]) -> None:
    """One row per curve, environment, step and statistic, then the pooled, TD3-normalised ones."""
    rows: list[list[object]] = []
    for c in made:
        interval = bootstrap_interval(c.scores, iqm, resamples=_RESAMPLES)
        rows.append([c.env_id, c.name, c.step, c.statistic, len(c.scores), f"{c.scores.mean():.1f}", f"{c.sd:.1f}"])
        rows[-1] += [f"{value:.1f}" for value in interval]
    for statistic in STATISTICS:
        rows_of = groups(made, statistic)
        for tasks in task_sets(rows_of.values()):
            for (name, step), row in rows_of.items():
                if (result := pooled(row, tasks)) is not None:
                    seeds = sum(len(cell.scores) for cell in row if _task(cell.env_id) in tasks)
                    rows.append([f"pooled: {' '.join(tasks)}", name, step, statistic, seeds, "", ""])
                    rows[-1] += [f"{value:.4f}" for value in result]
    write_csv(path, ["env", "name", "step", "statistic", "seeds", "mean", "sd", "iqm", "low", "high"], rows)


def markdown(made: Sequence[Cell], agent: str) -> str:
    """A table per statistic: curves and steps down, tasks and the pooled IQM across."""
    envs = list(dict.fromkeys(_task(cell.env_id) for cell in made))
    parts = []
    for statistic, heading in STATISTICS.items():
        if not (rows_of := groups(made, statistic)):
            continue
        sets = task_sets(rows_of.values())
        names = [f"IQM, {len(tasks)} task{'s' if len(tasks) > 1 else ''}" for tasks in sets]
        lines = [f"| {agent} | at | " + " | ".join([*envs, *names]) + " |", "|---" * (2 + len(envs) + len(sets)) + "|"]
        for (name, step), row in rows_of.items():
            by_task = {_task(cell.env_id): _mean_sd(cell) for cell in row}
            texts = [by_task.get(task, _NONE) for task in envs]
            texts += [str(interval) if (interval := pooled(row, tasks)) else _NONE for tasks in sets]
            lines.append(f"| {name} | {format_steps(step)} | " + " | ".join(texts) + " |")
        parts.append(f"**{heading}**\n\n" + "\n".join(lines) + "\n\n")
        parts += [f"{name}: {', '.join(tasks)}.  \n" for name, tasks in zip(names, sets, strict=True)] + ["\n"]
    parts.append(
        "Tasks: mean ± standard deviation over seeds (number of seeds). IQM: the interquartile mean over tasks and\n"
        "seeds pooled, normalised so that 0 is a random policy and 1 is TD3's published return, with its 95 %\n"
        "bootstrap interval, stratified by task. Only IQMs over the same tasks are comparable.\n"
    )
    return "".join(parts)


def readme(runs: dict[tuple[str, str], list[Run]], root: Path, command: str) -> str:
    """What was run, on what, and how to run it again."""
    queue = Path("experiments") / "jobs" / f"{root.name}.yaml"
    jobs = queue if (REPOSITORY / queue).is_file() else "JOBS"
    every = [run for group in runs.values() for run in group]
    lines = [
        f"# {every[0].agent.upper()} on MuJoCo",
        "",
        "| preset | task | seeds | steps reached |",
        "|---|---|---|---|",
    ]
    for (preset, env), group in runs.items():
        evaluations = [e for run in group for e in run.evaluations]
        seeds = ", ".join(str(e.seed) for e in evaluations)
        reached = sorted({e.steps[-1] for e in evaluations})
        lines.append(f"| {preset} | {env} | {seeds} | {', '.join(format_steps(step) for step in reached)} |")
    episodes = sorted({len(r) for run in every for e in run.evaluations for r in e.returns})
    spacing = sorted({int(run.config["eval.every"]) for run in every if run.config.get("eval.every")})
    warmed = " Step counts include the random warm-up steps." if "agent.warmup_steps" in every[0].config else ""
    lines += [
        "",
        f"- **Evaluation**: every {_words(spacing)} steps, {_words(episodes)} episodes of the deterministic policy on"
        f" environments of their own.{warmed}",
        f"- **Versions**: {_versions(every)}.",
        f"- **Hardware**: {HARDWARE}.",
        f"- **Trained by** `rlopt queue {jobs} --root DIR --workers 2`",
        f"- **Summarised by** `{command}`",
        "",
        "`evaluations.csv` has every seed's mean return at every evaluation; `table.md` and `table.csv` compare with",
        "the published curves, whose provenance is in `rlopt/analysis/data/README.md`; `curves.png` draws them.",
        "",
        "![learning curves](curves.png)",
        "",
    ]
    return "\n".join(lines)


def _versions(runs: Sequence[Run]) -> str:
    """Every package's version, all of them where runs differ."""
    seen: dict[str, set[str]] = {}
    for run in runs:
        path = run.folder / "versions.json"
        for name, version in (json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}).items():
            seen.setdefault(name, set()).add(str(version))
    shown = [f"{name} {' and '.join(sorted(seen[name]))}" for name in _PACKAGES if name in seen]
    return ", ".join(shown) or "not recorded"


def _words(numbers: Sequence[int]) -> str:
    return " or ".join(str(number) for number in numbers) or "?"


def _mean_sd(cell: Cell) -> str:
    sd = "" if math.isnan(cell.sd) else f" ± {cell.sd:.0f}"
    return f"{cell.scores.mean():.0f}{sd} ({len(cell.scores)})"


def _place(word: str, words: list[str]) -> int:
    """Where it stands; the unknown come last."""
    return words.index(word) if word in words else len(words)


def _preset(experiment: str) -> str:
    """What stands behind ``<agent>_<task>_v<version>``; any other experiment is its own."""
    found = re.fullmatch(r"[a-z0-9]+_[a-z0-9]+_v[45](?:_(\w+))?", experiment)
    return (found[1] or ("classic" if experiment.startswith("sac_") else "default")) if found else experiment


def _name(preset: str, env_id: str) -> str:
    version = env_id.rpartition("-")[2]
    return f"CleanRL's script ({version})" if preset == "script" else f"rlopt ({version}, {preset} preset)"


def _shown(path: Path) -> str:
    """A path as it may stand in a published file: relative to the repository, or its name alone."""
    path = path.resolve()
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else path.name


def _task(env_id: str) -> str:
    return env_id.rpartition("-")[0]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Summarise the run folders of rlopt queue.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--root", type=Path, help="the queue's --root")
    source.add_argument("--redraw", metavar="AGENT", help="only draw curves.png anew, from OUT/evaluations.csv")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="steps of the table")
    parser.add_argument("--training", action="store_true", help="training returns in the table too")
    parser.add_argument("--readme", action="store_true", help="write README.md anew even where it exists")
    given = parser.parse_args(arguments)
    if given.redraw is not None:
        try:
            redraw(given.out, given.redraw)
        except RloptError as e:
            print(e, file=sys.stderr)
            return 2
        print(given.out / "curves.png")
        return 0
    words = ["--root", _shown(given.root), "--out", _shown(given.out)]
    if given.steps != list(STEPS):
        words += ["--steps", *map(str, given.steps)]
    if given.training:
        words += ["--training"]
    command = f"python experiments/summarise.py {shlex.join(words)}"
    try:
        summarise(given.root, given.out, command, given.steps, given.readme, given.training)
    except RloptError as e:
        print(e, file=sys.stderr)
        return 2
    print((given.out / "table.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
