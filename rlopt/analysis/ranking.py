"""Settings ranked by their last evaluations: the table at the end of a multirun and of a sweep."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlopt.analysis.run_results import EvaluationCurve, load_run
from rlopt.analysis.statistics import ConfidenceInterval, bootstrap_interval, mean_interval
from rlopt.errors import RloptError

DONE = "done"
HEAD = ("rank", "IQM [95 % interval]", "mean ± sd", "seeds", "step", "minutes", "ended", "settings")


@dataclass(frozen=True)
class Setting:
    """What several seeds of the same options came to."""

    words: tuple[str, ...]
    """The options that set it apart."""
    scores: tuple[float, ...] = ()
    """(seeds,) mean return of each seed's last evaluation."""
    score: ConfidenceInterval = ConfidenceInterval(math.nan, math.nan, math.nan)  # noqa: RUF009 - a tuple
    """``score_of`` its seeds."""
    step: int | None = None
    """Where its last evaluation was; of several seeds the earliest."""
    seconds: float | None = None
    """Wall-clock, all seeds together."""
    ended: str = DONE
    """``done``, or why it is no whole result."""
    name: str = ""


def once_trained(curves: Iterable[EvaluationCurve]) -> list[EvaluationCurve]:
    """Return evaluations without those of untrained policies (step 0), and no curve that has no other."""
    found = []
    for curve in curves:
        first = int(curve.steps[0] == 0)
        if len(curve.steps) > first:
            found.append(EvaluationCurve(curve.seed, curve.steps[first:], curve.returns[first:]))
    return found


def score_of(seeds: Sequence[EvaluationCurve]) -> ConfidenceInterval:
    """Return the interquartile mean over seeds of their last evaluations (the mean below four seeds), with its
    bootstrap interval; one seed has the t interval of its episodes, which does not say how seeds vary."""
    if len(seeds) == 1:
        return mean_interval(seeds[0].returns[-1])
    return bootstrap_interval([seed.means[-1] for seed in seeds])


def ranked(settings: Iterable[Setting]) -> list[Setting]:
    """Return whole results, the best first, then those that ended early, and last those without an evaluation."""

    def place(one: Setting) -> tuple[bool, bool, float]:
        unknown = math.isnan(one.score.estimate)
        return unknown, one.ended != DONE, 0.0 if unknown else -one.score.estimate

    return sorted(settings, key=place)


def rows_of(settings: Iterable[Setting], named: str = "") -> list[tuple[str, ...]]:
    """Return the cells of the table, its head first; ``named`` heads a column of the settings' names."""
    rows = [(HEAD[0], *([named] if named else []), *HEAD[1:])]
    for rank, one in enumerate(ranked(settings), start=1):
        known = not math.isnan(one.score.estimate)
        low_high = "" if math.isnan(one.score.low) else f" [{one.score.low:.1f}, {one.score.high:.1f}]"
        spread = f" ± {_deviation(one.scores):.1f}" if len(one.scores) > 1 else ""
        rows.append(
            (
                str(rank) if known and one.ended == DONE else "-",
                *([one.name] if named else []),
                f"{one.score.estimate:.1f}{low_high}" if known else "",
                f"{_mean(one.scores):.1f}{spread}" if known else "",
                str(len(one.scores)),
                "" if one.step is None else f"{one.step:,}",
                "" if one.seconds is None else f"{one.seconds / 60:.1f}",
                one.ended,
                " ".join(one.words) or "as given",
            )
        )
    return rows


def as_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table for a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def as_markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table of Markdown."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def rank_runs(runs: Mapping[Path, tuple[tuple[str, ...], float, str]]) -> list[str]:
    """Return lines that rank run folders, each environment's apart; nothing where no run has been evaluated.

    ``runs`` gives each folder the words in which it differs from the others (its seed left out: folders of the same
    words are seeds of one setting), its seconds, and how it ended.
    """
    tables: dict[str, dict[tuple[str, ...], list[tuple[list[EvaluationCurve], float, str]]]] = {}
    for folder, (words, seconds, ended) in runs.items():
        try:
            run = load_run(folder)
        except RloptError:
            continue
        if curves := once_trained(run.evaluations):
            tables.setdefault(run.env_id, {}).setdefault(words, []).append((curves, seconds, ended))
    lines: list[str] = []
    for env, settings in tables.items():
        found = []
        for words, seeds in settings.items():
            curves = [curve for of_run, _, _ in seeds for curve in of_run]
            found.append(
                Setting(
                    words,
                    tuple(curve.means[-1] for curve in curves),
                    score_of(curves),
                    min(curve.steps[-1] for curve in curves),
                    sum(seconds for _, seconds, _ in seeds),
                    next((ended for _, _, ended in seeds if ended != DONE), DONE),
                )
            )
        lines += ["", f"{env}, last evaluations:", *as_lines(rows_of(found))]
    return lines


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)


def _deviation(scores: Sequence[float]) -> float:
    """Return the sample standard deviation."""
    centre = _mean(scores)
    return math.sqrt(sum((score - centre) ** 2 for score in scores) / (len(scores) - 1))
