"""What a report over run folders says: verdicts, statistics over seeds, pictures, clock, versions, configuration.

``report`` collects it, ``rlopt.analysis.report_page`` writes it as one HTML page or as Markdown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rlopt.analysis.comparison import Scale, draw_improvement, draw_profiles, scale_of
from rlopt.analysis.curves import Curve
from rlopt.analysis.expected import Expected, training_means
from rlopt.analysis.games import pool_games
from rlopt.analysis.plots import format_steps, panels_figure, summary_rows
from rlopt.analysis.reference import beside
from rlopt.analysis.run_results import Run, SeedGroup, load_run, seed_groups
from rlopt.analysis.statistics import (
    Array,
    ConfidenceInterval,
    bootstrap_interval,
    iqm,
    probability_of_improvement,
)
from rlopt.analysis.tables import read_csv
from rlopt.types import RloptError

_ENOUGH = 3
"""Runs (over all tasks) that a performance profile needs: with fewer it is a step."""
_MOST_PAIRS = 24
_FEW_SEEDS = 5
_NONE = "\N{EN DASH}"
_NOT_A_SETTING = ("seed", "run_dir", "experiment", "resume")


@dataclass(frozen=True)
class Verdict:
    """Whether runs of an experiment came to what its file expects."""

    status: str
    """``inside``, ``below``, ``above``, ``open`` (no range, or not reached), ``other`` (with other settings)."""
    text: str


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: str = ""
    """Shown only on demand, under these words."""


@dataclass(frozen=True)
class Picture:
    name: str
    alt: str
    figure: Figure


@dataclass
class Section:
    title: str
    text: str = ""
    verdicts: list[Verdict] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    title: str
    about: str
    sections: list[Section]

    @property
    def verdicts(self) -> list[Verdict]:
        return [verdict for section in self.sections for verdict in section.verdicts]


@dataclass(frozen=True)
class Preset:
    """What an experiment's file says: its settings, dotted, as a run would record them, and what it expects."""

    settings: Mapping[str, Any] | None
    expected: Expected | str


def report(
    paths: Iterable[str | Path],
    preset_of: Callable[[str], Preset | None],
    title: str | None = None,
    steps: Sequence[int] | None = None,
    one_picture: bool = False,
) -> Report:
    """Return what is to be said about run folders.

    Args:
        preset_of: gives an experiment by name; None where there is no such file any more.
        steps: where returns are tabled and compared (default: the last step that every seed of every curve of an
            environment has reached).
        one_picture: all learning curves in one picture, instead of one for each environment.

    Raises:
        RloptError: a folder is no run folder, or none has an evaluation.
    """
    runs = [load_run(path) for path in dict.fromkeys(Path(path).resolve() for path in paths)]
    groups = seed_groups(runs)
    if not groups:
        raise RloptError("none of these runs has an evaluation yet; train them further, then report on them")
    panels: dict[str, list[Curve]] = {}
    for group in groups:
        panels.setdefault(group.curve.env_id, []).append(group.curve)
    common = {env: _common_step(own) for env, own in panels.items()}
    at = {env: list(steps) if steps is not None else [s for s in [common[env]] if s is not None] for env in panels}
    compared = {env: found[-1] for env, found in at.items() if found}
    seeds = sum(group.curve.scores.shape[1] for group in groups)
    agents = ", ".join(dict.fromkeys(group.curve.agent for group in groups))
    about = f"{seeds} run{'s' if seeds > 1 else ''} of {agents} on {', '.join(panels)}."
    sections = [
        _verdicts(groups, preset_of),
        _returns(panels, at),
        _learning(panels, one_picture),
        *_comparisons(panels, compared),
        _clock(groups),
        _versions(groups),
        _settings(groups),
        _folders(runs),
    ]
    return Report(title or f"{agents} on {', '.join(panels)}", about, [s for s in sections if s is not None])


# Verdicts


def _verdicts(groups: Sequence[SeedGroup], preset_of: Callable[[str], Preset | None]) -> Section | None:
    found = []
    for group in groups:
        for name in dict.fromkeys(str(run.config["experiment"]) for run in group.runs if run.config.get("experiment")):
            own = [run for run in group.runs if run.config.get("experiment") == name]
            found.append(
                _verdict(name, SeedGroup(own, group.curve) if len(own) == len(group.runs) else group, preset_of)
            )
    if not found:
        return None
    text = "Each `experiment=` of these runs beside the range that its file expects (a mean over seeds)."
    return Section("Verdict", text, verdicts=found)


def _verdict(name: str, group: SeedGroup, preset_of: Callable[[str], Preset | None]) -> Verdict:
    label = f"experiment={name}"
    if group.curve.name != group.curve.agent:
        label += f" ({group.curve.name})"
    preset = preset_of(name)
    if preset is None:
        return Verdict("open", f"{label}: there is no such experiment any more.")
    expected = preset.expected
    env = (preset.settings or {}).get("env.id")
    if env is not None and env != group.curve.env_id:
        return Verdict("open", f"{label}: these runs are of {group.curve.env_id}, its range is of {env}.")
    if isinstance(expected, str):
        return Verdict("open", f"{label}: no range to judge by ({expected.rstrip('.')}).")
    wanted = f"{_number(expected.low)} to {_number(expected.high)} at {format_steps(expected.step)} steps"
    wanted += f" ({expected.measure})"
    scores = expected.measured(group)
    if scores is None:
        reached = format_steps(int(group.curve.steps[-1]))
        return Verdict("open", f"{label}: expected {wanted}; these runs are at {reached}.")
    mean = float(scores.mean())
    place = expected.place(mean)
    spread = f" ± {_number(float(scores.std(ddof=1)))}" if len(scores) > 1 else ""
    came = f"{_number(mean)}{spread}, {len(scores)} seed{'s' if len(scores) > 1 else ''}"
    changes = _changes(group, preset.settings)
    if changes:
        return Verdict("other", f"{label}: {came}: {place} of {wanted}, but with other settings: {changes}.")
    unknown = "" if preset.settings is not None else " Its settings could not be compared."
    words = "inside" if place == "inside" else f"{place} what is expected,"
    return Verdict(place, f"{label}: {came}: {words} {wanted}.{unknown}")


def _changes(group: SeedGroup, settings: Mapping[str, Any] | None) -> str:
    """Return in which settings the runs depart from their experiment; those that only one side knows do not count."""
    if settings is None:
        return ""
    own = group.runs[0].identity
    told = [f"{key}={own[key]}" for key in own if _counts(key) and key in settings and settings[key] != own[key]]
    return ", ".join([*told[:4], *(["…"] if len(told) > 4 else [])])


def _counts(key: str) -> bool:
    """Whether a setting changes what is measured: no backend does, nor where things are computed."""
    return not key.endswith((".backend", ".device", ".fused", ".folder"))


# Returns and comparisons


def _returns(panels: Mapping[str, Sequence[Curve]], at: Mapping[str, Sequence[int]]) -> Section:
    rows = []
    one_seed = few = False
    for env, own in panels.items():
        ends = {int(c.steps[c.common()][-1]) for c in own if c.common().any()}
        steps = sorted({*at[env], *(ends if len(at[env]) < 2 else ())})
        names = {curve.name for curve in own}
        for row in summary_rows([*own, *beside(own)], steps):
            mine = row["name"] in names
            one_seed, few = one_seed or (mine and row["seeds"] == 1), few or (mine and 1 < row["seeds"] < _FEW_SEEDS)
            sd = "" if math.isnan(row["sd"]) else f" ± {_number(row['sd'])}"
            ends_of = "" if math.isnan(row["low"]) else f" [{_number(row['low'])}, {_number(row['high'])}]"
            over = " over episodes" if mine and row["seeds"] == 1 and ends_of else ""
            rows.append([env, row["name"], format_steps(row["step"]), str(row["seeds"]),
                         f"{_number(row['mean'])}{sd}", f"{_number(row['iqm'])}{ends_of}{over}"])  # fmt: skip
    text = (
        "Mean return of an evaluation (the one nearest to the step), over seeds: mean ± standard deviation, and the "
        "interquartile mean with its 95 % bootstrap interval. Published curves stand beside where there are any."
    )
    if one_seed:
        text += " The interval of a single seed is that of its mean over evaluation episodes: it says nothing of seeds."
    if few:
        text += f" With fewer than {_FEW_SEEDS} seeds a bootstrap interval is too narrow."
    head = ("environment", "curve", "step", "seeds", "mean ± sd", "IQM [95 % interval]")
    return Section("Returns", text, tables=[Table(head, rows)])


def _learning(panels: Mapping[str, list[Curve]], one_picture: bool) -> Section:
    pooled = pool_games(curve for own in panels.values() for curve in own)
    if one_picture:
        drawn = [Picture("curves", "learning curves", panels_figure(panels, pooled=pooled))]
    else:
        drawn = [Picture(f"curves-{env}", f"learning curves on {env}", panels_figure({env: own}))
                 for env, own in panels.items()]  # fmt: skip
        for label in dict.fromkeys(curve.label for curve in pooled):
            of_games = [curve for curve in pooled if curve.label == label]
            drawn.append(Picture("curves-pooled", label, panels_figure({}, pooled=of_games)))
    return Section("Learning curves", pictures=drawn)


def _comparisons(panels: Mapping[str, list[Curve]], compared: Mapping[str, int]) -> list[Section]:
    """Return what is said across curves: pooled scores, probability of improvement, performance profiles."""
    scores: dict[str, dict[str, Array]] = {}
    mine = list(dict.fromkeys(curve.name for own in panels.values() for curve in own))
    for env, own in panels.items():
        for curve in [*own, *beside(own)]:
            if env in compared and (found := curve.at(compared[env])) is not None:
                scores.setdefault(curve.name, {})[env] = found
    where = ", ".join(f"{env} at {format_steps(step)}" for env, step in compared.items())
    sections = []
    scales: dict[Scale, list[str]] = {}
    for env in compared:
        scales.setdefault(scale_of(env), []).append(env)
    pooled = [row for scale, envs in scales.items() if len(envs) > 1 and scale.name != "return"
              for row in _pooled(scale, envs, scores)]  # fmt: skip
    if pooled:
        text = "Interquartile mean over tasks and seeds pooled, with its bootstrap interval, stratified by task."
        head = ("scale", "tasks", "curve", "runs", "IQM [95 % interval]")
        sections.append(Section("All tasks together", f"{text} Steps: {where}.", tables=[Table(head, pooled)]))
    if pairs := _pairs(mine, scores):
        text = (
            f"How likely a run of X returns more than a run of Y on a task drawn at random (ties count half), with its "
            f"95 % bootstrap interval, at equal steps: {where}. An interval that holds 0.5 decides nothing."
        )
        rows = [[x, y, ", ".join(tasks), str(found)] for x, y, tasks, found in pairs]
        figure = draw_improvement([(x, y, found) for x, y, _, found in pairs])
        picture = Picture("improvement", "probability of improvement", figure)
        table = Table(("X", "Y", "tasks", "P(X > Y)"), rows)
        sections.append(Section("Probability of improvement", text, pictures=[picture], tables=[table]))
    drawn = []
    for scale, envs in scales.items():
        for tasks in [envs] if scale.name != "return" else [[env] for env in envs]:
            lines = {name: [of[env] for env in tasks if env in of] for name, of in scores.items()}
            lines = {name: rows for name, rows in lines.items() if sum(map(len, rows)) >= _ENOUGH}
            lines = {name: rows for name, rows in lines.items() if len(rows) == len(tasks) or name in mine}
            if any(name in mine for name in lines):
                told = {name: [scale(env, row) for env, row in zip(tasks, rows, strict=False)]
                        for name, rows in lines.items()}  # fmt: skip
                label = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"
                stem = f"profile-{label.replace(' ', '-')}"
                drawn.append(
                    Picture(stem, f"performance profile, {label}", draw_profiles(told, scale.label, label, mine))
                )
    if drawn:
        text = (
            "The fraction of runs whose return is above each value (Agarwal et al. 2021), with 95 % bootstrap bands. "
            f"A curve above another one everywhere is the better agent. Steps: {where}."
        )
        sections.append(Section("Performance profiles", text, pictures=drawn))
    return sections


def _pooled(scale: Scale, envs: Sequence[str], scores: Mapping[str, Mapping[str, Array]]) -> list[list[str]]:
    rows = []
    for name, of in scores.items():
        tasks = [env for env in envs if env in of]
        if len(tasks) > 1:
            found = bootstrap_interval([scale(env, of[env]) for env in tasks], iqm)
            count = sum(len(of[env]) for env in tasks)
            rows.append([scale.label, ", ".join(tasks), name, str(count), str(found)])
    return rows


def _pairs(
    mine: Sequence[str], scores: Mapping[str, Mapping[str, Array]]
) -> list[tuple[str, str, list[str], ConfidenceInterval]]:
    """Return own curves against one another, and against published ones, on the tasks that both have."""
    own = [name for name in mine if name in scores]
    published = [name for name in scores if name not in own]
    found = []
    for x, y in [*combinations(own, 2), *((x, y) for x in own for y in published)][:_MOST_PAIRS]:
        tasks = [env for env in scores[x] if env in scores[y]]
        if tasks:
            of_x, of_y = ([scores[name][env] for env in tasks] for name in (x, y))
            found.append((x, y, tasks, probability_of_improvement(of_x, of_y)))
    return found


def _common_step(own: Sequence[Curve]) -> int | None:
    """Return the last step that every seed of every curve has reached; None where a curve has none."""
    ends = [int(curve.steps[curve.common()][-1]) for curve in own if curve.common().any()]
    return min(ends) if ends else None


# Clock, versions, configuration


def _clock(groups: Sequence[SeedGroup]) -> Section | None:
    rows = []
    for group in groups:
        taken = [found for run in group.runs if (found := _seconds(run)) is not None]
        if not taken:
            continue
        steps, total, env, learn = np.array(taken).sum(0)
        config = group.runs[0].config
        per_run = total / len(taken)
        together = f" ({config['num_runs']} seeds together)" if int(config.get("num_runs", 1)) > 1 else ""
        rows.append([group.curve.env_id, group.curve.name, f"{_duration(per_run)}{together}",
                     f"{steps / total:,.0f}", f"{env / total:.0%}", f"{learn / total:.0%}",
                     str(config.get("device", "")), str(config.get("threads", ""))])  # fmt: skip
    text = (
        "Training time of a run on the average, evaluations and saves apart, and its shares in environments and in "
        "updates. Times compare only where machines and what else they did were the same."
    )
    head = ("environment", "curve", "time of a run", "steps per second", "environments", "updates", "device", "threads")
    return Section("Wall-clock", text, tables=[Table(head, rows)]) if rows else None


def _seconds(run: Run) -> tuple[float, float, float, float] | None:
    """Return steps (of all seeds), and seconds of training, in environments and in updates."""
    path = run.folder / "metrics.csv"
    table = read_csv(path) if path.is_file() else {}
    if not {"step", "steps_per_second"} <= table.keys() or not table["step"]:
        return None
    at = np.array([0, *table["step"]], dtype=np.float64)
    steps = np.diff(at) * int(run.config.get("num_runs", 1))
    rate = np.array(table["steps_per_second"], dtype=np.float64)
    good = (steps > 0) & (rate > 0)
    env, learn = (
        float(np.nansum(np.array(table[n], np.float64)[good])) if n in table else 0.0
        for n in ("env_seconds", "learn_seconds")
    )
    total = float((steps[good] / rate[good]).sum())
    return (float(steps[good].sum()), total, env, learn) if total > 0 else None


def _versions(groups: Sequence[SeedGroup]) -> Section | None:
    found = {}
    for run in (run for group in groups for run in group.runs):
        path = run.folder / "versions.json"
        try:
            found[run.folder.name] = {str(k): str(v) for k, v in json.loads(path.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, AttributeError):
            found[run.folder.name] = {}
    names = list(dict.fromkeys(name for own in found.values() for name in own))
    rows = []
    for name in names:
        holders: dict[str, int] = {}
        for own in found.values():
            holders[own.get(name, "not recorded")] = holders.get(own.get(name, "not recorded"), 0) + 1
        told = [value if len(holders) == 1 else f"{value} ({count} runs)" for value, count in holders.items()]
        rows.append([name, "; ".join(told)])
    return Section("Versions", tables=[Table(("", "version"), rows)]) if rows else None


def _settings(groups: Sequence[SeedGroup]) -> Section:
    """Return the settings in which curves (or runs of one curve) differ, and all others on demand."""
    keys = list(dict.fromkeys(key for group in groups for run in group.runs for key in run.config))
    keys = [key for key in keys if key not in _NOT_A_SETTING]
    values = {key: [_values(group, key) for group in groups] for key in keys}
    differ = [key for key in keys if len({*values[key]}) > 1 or any(" / " in each for each in values[key])]
    heads = [f"{g.curve.name} on {g.curve.env_id}" for g in groups]
    tables = []
    if differ:
        tables.append(Table(("option", *heads), [[key, *values[key]] for key in differ]))
    same = [[key, values[key][0]] for key in keys if key not in differ]
    tables.append(Table(("option", "value"), same, folded=f"{len(same)} options that all runs share"))
    text = "In which options the runs differ." if differ else "All runs have the same options."
    return Section("Configuration", text, tables=tables)


def _values(group: SeedGroup, key: str) -> str:
    told = dict.fromkeys(_plain(run.config[key]) if key in run.config else _NONE for run in group.runs)
    return " / ".join(told)


def _folders(runs: Sequence[Run]) -> Section:
    rows = []
    for run in runs:
        reached = max((e.steps[-1] for e in run.evaluations), default=0)
        total = int(run.config.get("total_steps", 0) or 0)
        best = [max((m for s, m in zip(e.steps, e.means, strict=True) if s), default=math.nan) for e in run.evaluations]
        last = [e.means[-1] for e in run.evaluations]
        ended = "complete" if total and reached >= total else "" if run.evaluations else "no evaluation yet"
        seeds = str(run.seed) if len(last) < 2 else f"{run.seed} to {run.seed + len(last) - 1}"
        rows.append([f"{run.folder.parent.name}/{run.folder.name}", run.agent, run.env_id, seeds,
                     f"{format_steps(reached)} of {format_steps(total)}", ended,
                     " / ".join(map(_number, last)), " / ".join(map(_number, best)),
                     " / ".join(_number(x) for x in training_means(run, reached))])  # fmt: skip
    text = "The last evaluation, the best one (chosen by its own episodes, so too high), and training episodes."
    head = ("folder", "agent", "environment", "seed", "evaluated at", "", "last", "best", "training")
    return Section("Runs", text, tables=[Table(head, rows)])


def _number(value: float) -> str:
    """Return four significant digits, none of them behind the point of a large number."""
    if math.isnan(value):
        return _NONE
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2
    text = f"{value:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "\N{MINUS SIGN}")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
