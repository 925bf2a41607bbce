"""What a sweep came to: its trials as a table, the best command, and which option mattered."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from rlopt.analysis.figures import COLOURS, save_figure
from rlopt.analysis.ranking import DONE, Setting, as_markdown, ranked, rows_of
from rlopt.analysis.statistics import ConfidenceInterval, iqm
from rlopt.analysis.tables import write_csv
from rlopt.search.plan import Sweep
from rlopt.search.study import latest, original

_GREY = "#8C8C8C"
_BEST_PART = 0.25
"""Importance asks what sets the best quarter of the whole trials apart."""
_FEWEST = 4
"""Whole trials below which nobody can tell what mattered."""


def settings(sweep: Sweep, trials: Sequence[FrozenTrial]) -> list[Setting]:
    """Return what each trial came to, by its number."""
    found = []
    for trial in trials:
        if trial.state == TrialState.WAITING and "outcome" not in trial.user_attrs:
            continue
        outcome = trial.user_attrs.get("outcome", {})
        scores = tuple(outcome.get("scores", ()))
        low, high = outcome.get("interval") or (math.nan, math.nan)
        ended = outcome.get("ended", "")
        if trial.state == TrialState.RUNNING:
            ended = "running"
        elif trial.state == TrialState.FAIL and not ended.startswith("failed"):
            ended = "failed: its worker was killed each time"
        found.append(
            Setting(
                tuple(sweep.searched(sweep.params(trial.params))),
                scores,
                ConfidenceInterval(float(iqm(scores)) if scores else math.nan, low, high),
                outcome.get("step"),
                outcome.get("seconds"),
                ended,
                str(original(trial)),
            )
        )
    return found


def best_command(sweep: Sweep, trials: Sequence[FrozenTrial], shell: Callable[[list[str]], str]) -> str | None:
    """Return the command that trains the best trial's settings with seeds that the search has not seen: the best of
    many looks better than it is. None where no trial is whole."""
    best = [one for one in ranked(settings(sweep, trials)) if one.ended == DONE][:1]
    if not best:
        return None
    trial = next(trial for trial in trials if str(original(trial)) == best[0].name)
    last = sweep.run_seeds[-1] + sweep.base.num_runs
    seeds = ",".join(str(last + i * sweep.base.num_runs) for i in range(max(3, sweep.seeds)))
    words = [word for word in sweep.words(sweep.params(trial.params)) if not word.startswith("seed=")]
    return f"rlopt train {shell(words)} -m seed={seeds}"


def write_tables(sweep: Sweep, study: optuna.Study, command: str, shell: Callable[[list[str]], str]) -> None:
    """Write ``trials.csv``, a row for each trial, and ``ranking.md``, beside the trials' folders."""
    trials = latest(study)
    found = {one.name: one for one in settings(sweep, trials)}
    head = ["trial", "iqm", "low", "high", "seeds", "step", "seconds", "ended", "folder", *sweep.space]
    rows: list[list[Any]] = []
    for trial in trials:
        if (one := found.get(str(original(trial)))) is not None:
            numbers = [None if math.isnan(value) else value for value in one.score]
            folder = sweep.folder(original(trial)).name
            values = [trial.params.get(name) for name in sweep.space]
            rows.append([one.name, *numbers, len(one.scores), one.step, one.seconds, one.ended, folder, *values])
    write_csv(sweep.root / "trials.csv", head, rows)
    best = best_command(sweep, trials, shell)
    text = [
        f"# {sweep.root.name}: {len(rows)} trials",
        f"`{command}`",
        "\n".join(as_markdown(rows_of(found.values(), "trial"))),
        "IQM over seeds of their last evaluations, the mean below four seeds; the interval is bootstrapped over seeds "
        "(of one seed: Student's t over its episodes). Pruned trials show what they had come to.",
    ]
    if best is not None:
        text.append(f"The best settings, with seeds that the search has not seen: `{best}`")
    (sweep.root / "ranking.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


def draw_importance(sweep: Sweep, study: optuna.Study) -> bool:
    """Draw ``importance.png``: how much each option mattered, and each trial's result over it. False where there are
    too few whole trials to tell."""
    trials = [trial for trial in latest(study) if trial.user_attrs.get("outcome", {}).get("scores")]
    whole = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if len(whole) < _FEWEST or len({trial.value for trial in whole}) < 2:
        return False
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_BEST_PART)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    names = list(shares)
    columns = 2 if len(names) in (2, 4) else min(3, len(names))
    height = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.0 * columns + 0.6, 0.3 * len(names) + 1.1 + 2.4 * height), dpi=150, layout="constrained")
    top, below = cast(Any, figure.subfigures(2, 1, height_ratios=[0.3 * len(names) + 1.1, 2.4 * height]))
    bars = top.add_subplot()
    bars.barh(range(len(names)), [shares[name] for name in names], color=COLOURS[0], height=0.6)
    bars.set_yticks(range(len(names)), names, parse_math=False)
    bars.invert_yaxis()
    bars.set_xlabel(
        f"importance (PED-ANOVA: what sets the best quarter of {len(whole)} whole trials apart)", fontsize=8
    )
    _bare(bars)
    for i, axes in enumerate(below.subplots(height, columns, squeeze=False, sharey=True).flat):
        if i >= len(names):
            axes.set_visible(False)
            continue
        _slice(axes, names[i], trials, sweep.distributions[names[i]])
        if i % columns == 0:
            axes.set_ylabel("return (IQM over seeds)", fontsize=8)
    below.suptitle("filled: trained to the end; hollow: pruned or stopped, at its last evaluations", fontsize=8)
    save_figure(figure, sweep.root / "importance.png")
    return True


def _slice(axes: Axes, name: str, trials: Sequence[FrozenTrial], distribution: Any) -> None:
    """Show trials over one option; pruned ones grey, at what they had come to."""
    for whole, colour in ((False, _GREY), (True, COLOURS[0])):
        shown = [t for t in trials if name in t.params and (t.state == TrialState.COMPLETE) == whole]
        values = [t.params[name] for t in shown]
        if isinstance(distribution, CategoricalDistribution):
            values = [distribution.choices.index(value) for value in values]
        results = [float(iqm(t.user_attrs["outcome"]["scores"])) for t in shown]
        axes.scatter(values, results, s=22, color=colour if whole else "none", edgecolors=colour, alpha=0.8)
    if isinstance(distribution, CategoricalDistribution):
        axes.set_xticks(range(len(distribution.choices)), [str(one) for one in distribution.choices], parse_math=False)
        axes.set_xlim(-0.5, len(distribution.choices) - 0.5)
    elif distribution.log:
        axes.set_xscale("log")
        axes.set_xlim(distribution.low / 1.2, distribution.high * 1.2)
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        margin = 0.05 * (distribution.high - distribution.low)
        axes.set_xlim(distribution.low - margin, distribution.high + margin)
    axes.set_xlabel(name, fontsize=8, parse_math=False)
    _bare(axes)


def _bare(axes: Axes) -> None:
    axes.grid(color="#E4E4E4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7, length=3, color="#666666")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
