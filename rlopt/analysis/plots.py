"""Learning curves as figures. Drawn with Matplotlib's objects and its Agg canvas: no window, no state of pyplot's."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from rlopt.analysis.curves import Curve
from rlopt.analysis.figures import COLOURS, save_figure
from rlopt.analysis.games import PooledCurve, in_frames, pool_games, pooled_rows
from rlopt.analysis.reference import PublishedCurve, beside, reference
from rlopt.analysis.robust_plots import certified, draw_bounds
from rlopt.analysis.run_results import Run, curves, load_run
from rlopt.analysis.statistics import Array, bootstrap_curve, bootstrap_interval, iqm, mean_interval
from rlopt.analysis.tables import read_csv
from rlopt.errors import RloptError

_LINES = ("-", (0, (1, 1)), (0, (5, 1, 1, 1)))
"""Of curves, where there are more of them than colours."""
_REFERENCE_STYLES = (("#333333", (0, (5, 2))), ("#8C8C8C", (0, (1, 1.2))), ("#6B6B6B", (0, (6, 1.5, 1, 1.5))))
_TRAINING_POINTS = 400


def draw_run(run_folder: str | Path, out: str | Path, unit: str = "environment steps") -> None:
    """Draw the learning curve of one run folder to the image ``out``.

    Evaluations are their mean with Student's 95 % interval over episodes (over seeds where the folder holds several),
    training episodes lie faintly behind, and published curves beside them where the environment has any. The run of a
    solver with certified bounds is drawn as those bounds and their gap.

    Raises:
        RloptError: the folder is no run folder, or holds neither evaluations nor finished training episodes.
    """
    run = load_run(run_folder)
    if (bounds := certified(run.folder)) is not None:
        draw_bounds(bounds, out, f"{run.agent} on {run.env_id}")
        return
    training = _training_returns(run.folder)
    if not run.evaluations and training is None:
        raise RloptError(f"{run.folder} has no evaluation and no finished episode yet; train it further, then draw it")
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if training is not None:
        axes.plot(*training, color=COLOURS[0], linewidth=0.7, alpha=0.3, label="training episodes")
    if len(run.evaluations) == 1:
        own = run.evaluations[0]
        band = np.array([mean_interval(episodes) for episodes in own.returns]).T
        episodes = max(len(r) for r in own.returns)
        label = f"{run.agent}, seed {own.seed}: mean of {episodes} episodes, 95 % interval"
        _line(axes, np.array(own.steps), band, COLOURS[0], label)
    elif run.evaluations:
        _draw_curve(axes, curves([run])[0], COLOURS[0], _label(run.agent, [len(run.evaluations)]))
    ends = [own.steps[-1] for own in run.evaluations] + ([int(training[0][-1])] if training is not None else [])
    for published, style in zip(reference(run.env_id, [run.agent], run.protocol), _REFERENCE_STYLES, strict=False):
        _draw_reference(axes, published, style)
    _dress(axes, run.env_id, max(ends))
    axes.set_xlabel(unit)
    axes.set_ylabel("return")
    _finish(figure, [axes], caption(curves([run])) if len(run.evaluations) > 1 else None)
    save_figure(figure, out)


def draw_runs(
    paths: Iterable[str | Path],
    out: str | Path,
    title: str | None = None,
    steps: Sequence[int] | None = None,
    frames: bool = False,
) -> list[dict[str, Any]]:
    """Draw several run folders to the image ``out``: a panel per environment, a curve per experiment (runs that differ
    only in their seed), and a panel of human-normalised scores where there are several Atari games. With ``frames`` the
    axis is emulator frames.

    Returns the table of ``summary_rows`` at ``steps`` (default: the last step that all seeds of a curve have reached),
    published curves and pooled games included.

    Raises:
        RloptError: a folder is no run folder, none has an evaluation, or ``frames`` are asked for of what has none.
    """
    runs = _load_all(paths)
    if not any(run.evaluations for run in runs):
        raise RloptError("none of these runs has an evaluation yet; train them further, then plot them")
    panels: dict[str, list[Curve]] = {}
    for curve in curves(runs):
        panels.setdefault(curve.env_id, []).append(curve)
    pooled = pool_games(curve for own in panels.values() for curve in own)
    draw_panels(panels, out, title, pooled, frames)
    rows = []
    for own in panels.values():
        common = [int(curve.steps[curve.common()][-1]) for curve in own if curve.common().any()]
        asked = list(steps) if steps is not None else sorted(set(common))
        rows += summary_rows([*own, *beside(own)], asked)
    return [*rows, *pooled_rows(pooled, steps)]


def draw_panels(
    panels: Mapping[str, Sequence[Curve]],
    out: str | Path,
    title: str | None = None,
    pooled: Sequence[PooledCurve] = (),
    frames: bool = False,
) -> None:
    """Draw ``panels_figure`` to the image ``out``."""
    save_figure(panels_figure(panels, title, pooled, frames), out)


def panels_figure(
    panels: Mapping[str, Sequence[Curve]],
    title: str | None = None,
    pooled: Sequence[PooledCurve] = (),
    frames: bool = False,
) -> Figure:
    """Return a picture of curves, a panel per key (an environment id) with its published curves, and one of games
    ``pooled`` for each of their labels.

    Each curve is the interquartile mean over seeds with its 95 % bootstrap band, where all seeds have been evaluated,
    and a thin line per seed, dashed where it goes on beyond the others; of a single seed the mean over its evaluation
    episodes with their interval. Curves of one name share a colour across panels; the axis ends where the own curves
    end.
    """
    labels_of_pools = list(dict.fromkeys(curve.label for curve in pooled))
    count = len(panels) + len(labels_of_pools)
    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    unit = "emulator frames" if frames else "environment steps"
    size = (6.4, 4.4) if count == 1 else (3.3 * columns + 0.3, 2.7 * rows + 0.9)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    everything = [curve for own in panels.values() for curve in own]
    names = list(dict.fromkeys(curve.name for curve in everything))
    labels = {name: _label(name, [c.scores.shape[1] for c in everything if c.name == name]) for name in names}
    drawn = []
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    styles = {name: _LINES[i // len(COLOURS) % len(_LINES)] for i, name in enumerate(names)}
    for i, (env_id, given) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        own = [in_frames(curve) for curve in given] if frames else given
        for curve in own:
            _draw_curve(axes, curve, colours[curve.name], labels[curve.name], styles[curve.name])
        for published, style in zip(beside(own), _REFERENCE_STYLES, strict=False):
            _draw_reference(axes, in_frames(published) if frames else published, style)
        _dress(axes, env_id, max((int(curve.steps[-1]) for curve in own), default=1_000_000))
        if i + columns >= count:
            axes.set_xlabel(unit)
        if i % columns == 0:
            axes.set_ylabel("evaluation return")
        drawn.append(axes)
    for i, label in enumerate(labels_of_pools, len(panels)):
        axes = figure.add_subplot(rows, columns, i + 1)
        mine = [in_frames(pool) if frames else pool for pool in pooled if pool.label == label]
        for pool in mine:
            _line(axes, pool.steps, pool.band(), colours[pool.name], labels[pool.name], styles[pool.name])
        _dress(axes, label, max(int(pool.steps[-1]) for pool in mine))
        axes.set_xlabel(unit)
        drawn.append(axes)
    if title:
        figure.suptitle(title, fontsize=11, parse_math=False)
    _finish(figure, drawn, caption(everything))
    return figure


def draw_mean(axes: Axes, x: NDArray[Any], scores: Array, label: str, colour: str, seeds: bool = False) -> None:
    """Draw the mean of ``scores`` (seeds, T) over ``x`` (T,) with Student's 95 % interval, of one seed without; with
    ``seeds`` also a thin line for each."""
    if seeds and len(scores) > 1:
        axes.plot(x, scores.T, color=colour, linewidth=0.6, alpha=0.4)
    _line(axes, x, np.array([mean_interval(column) for column in scores.T]).T, colour, label)


def summary_rows(found: Iterable[Curve], steps: Iterable[int]) -> list[dict[str, Any]]:
    """Return each curve at each step that it reaches: ``env, name, step, seeds, mean, sd, iqm, low, high``.

    ``sd`` is over seeds (with n - 1; NaN for one seed); ``low`` and ``high`` are the 95 % bootstrap interval of the
    interquartile mean, and of one seed that of its mean over evaluation episodes. The evaluation nearest to the step
    counts.
    """
    rows = []
    wanted = list(steps)
    for curve in found:
        for step in wanted:
            scores = curve.at(step)
            if scores is None:
                continue
            sd = float(scores.std(ddof=1)) if len(scores) > 1 else float("nan")
            interval = bootstrap_interval(scores)
            if (over_episodes := curve.interval_at(step)) is not None:
                interval = interval._replace(low=float(over_episodes[0]), high=float(over_episodes[1]))
            row = {"env": curve.env_id, "name": curve.name, "step": step, "seeds": len(scores)}
            row |= {"mean": float(scores.mean()), "sd": sd}
            rows.append(row | {"iqm": interval.estimate, "low": interval.low, "high": interval.high})
    return rows


def _load_all(paths: Iterable[str | Path]) -> list[Run]:
    unique = dict.fromkeys(Path(path).resolve() for path in paths)
    return [load_run(path) for path in unique]


def _training_returns(folder: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps and returns of the training episodes, in at most ``_TRAINING_POINTS`` means of neighbours."""
    path = folder / "episodes.csv"
    table = read_csv(path) if path.is_file() else {}
    if not table or not table["step"]:
        return None
    points = np.array([table["step"], table["return"]], dtype=np.float64)
    points = points[:, np.argsort(points[0], kind="stable")]
    bins = np.array_split(points, min(points.shape[1], _TRAINING_POINTS), axis=1)
    steps, returns = np.array([b.mean(axis=1) for b in bins]).T
    return steps, returns


def _draw_curve(axes: Axes, curve: Curve, colour: str, label: str, style: Any = "-") -> None:
    common = curve.common()
    if curve.scores.shape[1] > 1:
        shared = int(curve.steps[common][-1]) if common.any() else 0
        for column in curve.scores.T:
            here = ~np.isnan(column)
            within, beyond = here & (curve.steps <= shared), here & (curve.steps >= shared)
            axes.plot(curve.steps[within], column[within], color=colour, linewidth=0.6, alpha=0.4)
            if beyond.sum() > 1:
                axes.plot(curve.steps[beyond], column[beyond], color=colour, linewidth=0.9, alpha=0.6, linestyle="--")
    if curve.spread is not None:
        band = np.concatenate([curve.scores[common].T, curve.spread[common].T])
    else:  # with no step that all seeds share, the label must not vanish with the line
        band = bootstrap_curve(curve.scores[common], iqm) if common.any() else np.empty((3, 0))
    _line(axes, curve.steps[common], band, colour, label, style)


def caption(drawn: Sequence[Curve]) -> str:
    """Return what the lines and bands of ``drawn`` are, and nothing that none of them has."""
    told = []
    if many := [curve for curve in drawn if curve.scores.shape[1] > 1]:
        told.append("Line: interquartile mean over seeds; band: 95 % bootstrap interval; thin: single seeds")
        if any(len(curve.steps) and not curve.common()[-1] for curve in many):
            told[-1] += " (dashed: where not all have got to)"
    if any(curve.spread is not None for curve in drawn):
        whose = "of one seed" if many else "one seed"
        told.append(f"{whose}: the mean of its evaluation episodes and their 95 % interval, not that of seeds")
    text = "; ".join(told)
    return text[:1].upper() + text[1:] + "." if text else ""


def _label(name: str, seeds: Sequence[int]) -> str:
    """Return the name with its number of seeds, which may differ between panels."""
    low, high = min(seeds), max(seeds)
    count = f"{low}" if low == high else f"{low}\N{EN DASH}{high}"
    return f"{name} ({count} seed{'s' if high > 1 else ''})"


def _draw_reference(axes: Axes, curve: PublishedCurve, style: tuple[str, Any]) -> None:
    colour, dashes = style
    estimate, low, high = bootstrap_curve(curve.scores, iqm)
    axes.fill_between(curve.steps, low, high, color=colour, alpha=0.12, linewidth=0, zorder=1)
    axes.plot(curve.steps, estimate, color=colour, linestyle=dashes, linewidth=1.2, label=curve.name, zorder=1.5)


def _line(axes: Axes, steps: NDArray[np.int64], band: Array, colour: str, label: str, style: Any = "-") -> None:
    """An estimate with its interval; ``band`` (3, T) is estimate, low and high."""
    estimate, low, high = band
    axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    marker = "o" if len(steps) == 1 else ""
    looks = {"color": colour, "linestyle": style, "linewidth": 1.7, "marker": marker, "markersize": 4}
    axes.plot(steps, estimate, **looks, label=label, zorder=3)


def _dress(axes: Axes, title: str, end: int) -> None:
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.set_xlim(0, max(end, 1))
    _fit_height(axes, end)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_steps(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}".replace("-", "\N{MINUS SIGN}")))
    axes.tick_params(labelsize=8, length=3, color="#666666")
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    axes.grid(color="#E4E4E4", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#666666")


def _fit_height(axes: Axes, end: int) -> None:
    """Fit the vertical axis to what lies left of ``end``: published curves go on far beyond a short run."""
    seen = [np.asarray(line.get_ydata())[np.asarray(line.get_xdata()) <= end] for line in axes.lines]
    for band in axes.collections:
        vertices = np.concatenate([np.asarray(path.vertices) for path in band.get_paths()] or [np.empty((0, 2))])
        seen.append(vertices[vertices[:, 0] <= end, 1])
    values = np.concatenate(seen).astype(np.float64)
    values = values[np.isfinite(values)]
    if len(values):
        low, high = float(values.min()), float(values.max())
        margin = 0.05 * (high - low) or max(1.0, 0.05 * abs(high))
        axes.set_ylim(low - margin, high + margin)


def format_steps(value: float) -> str:
    """Return 250000 as ``250k``, 1500000 as ``1.5M``."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _finish(figure: Figure, drawn: Sequence[Axes], note: str | None) -> None:
    """One legend below all panels, and the note over it."""
    handles = {label: handle for axes in drawn for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    width = len(max(handles, key=len))
    columns = max(1, min(len(handles), int(figure.get_figwidth() * 15 / (width + 6))))
    legend = figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )
    if note:
        # a letter of the small type is about a seventeenth of an inch wide.
        note = textwrap.fill(note, int(figure.get_figwidth() * 17))
        legend.set_title(note, prop=FontProperties(size=7.5))
        legend.get_title().set_color("#555555")
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold dollars
    for line in legend.get_lines():
        line.set_alpha(1.0)
