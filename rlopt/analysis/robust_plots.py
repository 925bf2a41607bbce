"""Pictures of robust MDPs: convergence with bands, value against radius, worst-case kernels, policies on grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from rlopt.analysis.figures import COLOURS, save_figure
from rlopt.analysis.statistics import Array
from rlopt.analysis.tables import read_csv
from rlopt.types import RloptError

ARROWS = ((-1.0, 0.0), (0.0, -1.0), (1.0, 0.0), (0.0, 1.0))
"""Left, down, right, up, in the order of ``rlopt.robust.problems.domains.MOVES``, as (x, y)."""


def draw_convergence(
    panels: Mapping[str, Mapping[str, ArrayLike]],
    out: str | Path,
    ylabel: str = "error",
    log: bool = True,
    title: str | None = None,
    floor: float = 1e-6,
    xlabel: str = "iteration",
) -> None:
    """Draw iterations (or what ``xlabel`` calls them) against values (T, K) over instances, a panel per key and a line
    per entry: the mean, and a band from the 5th to the 95th percentile (the bands of the DRPG paper's figures). On a
    log scale values end at ``floor``."""
    figure, axes = _grid(len(panels), title)
    for place, (name, lines) in zip(axes, panels.items(), strict=True):
        for colour, (label, given) in zip(COLOURS, lines.items(), strict=False):
            values = np.asarray(given, dtype=np.float64)
            values = values[:, None] if values.ndim == 1 else values
            values = values.clip(min=floor) if log else values
            t = np.arange(len(values))
            if values.shape[1] > 1:
                low, high = np.percentile(values, (5, 95), axis=1)
                place.fill_between(t, low, high, color=colour, alpha=0.2, linewidth=0)
            place.plot(t, values.mean(1), color=colour, linewidth=1.5, label=label)
        if log:
            place.set_yscale("log")
        place.set_title(name, fontsize=10)
        place.set_xlabel(xlabel)
        place.set_ylabel(ylabel)
        if list(lines) != [ylabel]:
            place.legend(frameon=False, fontsize=8)
        _bare(place)
    save_figure(figure, out)


def certified(run_folder: Path) -> dict[str, Array] | None:
    """Return the bounds over iterations in ``metrics.csv``: ``step``, ``lower``, ``upper``, ``gap`` and what else a
    solver tells; None where the run has no such columns."""
    path = run_folder / "metrics.csv"
    table = read_csv(path) if path.is_file() else {}
    if not {"step", "lower", "upper", "gap"} <= table.keys() or not table["step"]:
        return None
    numbers = ((name, np.array(cells)) for name, cells in table.items())
    return {name: x.astype(np.float64) for name, x in numbers if x.dtype != object}


def draw_bounds(bounds: Mapping[str, Array], out: str | Path, title: str | None = None) -> None:
    """Draw certified bounds over iterations and, on a log scale, their gap: the mean over instances, and its 5 to 95 %
    band where ``gap_5`` and ``gap_95`` are given. ``bounds`` are the columns that ``certified`` reads."""
    figure, (left, right) = _grid(2, title)
    step = bounds["step"]
    lower, upper = bounds["lower"], bounds["upper"]
    left.fill_between(step, lower, upper, color=COLOURS[0], alpha=0.2, linewidth=0, label="certified")
    if "value" in bounds:
        left.plot(step, bounds["value"], color=COLOURS[0], linewidth=1.5, label="policy against its adversary")
    # The first bounds are those of the costs alone, and so wide that they would hide the rest.
    settled = slice(len(step) // 10, None)
    low, high = lower[settled].min(), upper[settled].max()
    margin = 0.5 * (high - low) + 1e-9 * (1.0 + abs(high))
    left.set_ylim(low - margin, high + margin)
    left.set_ylabel("expected discounted value")
    right.set_yscale("log")
    if {"gap_5", "gap_95"} <= bounds.keys():
        few, most = (bounds[name].clip(min=1e-12) for name in ("gap_5", "gap_95"))
        right.fill_between(step, few, most, color=COLOURS[1], alpha=0.2, linewidth=0, label="5 to 95 % of instances")
    right.plot(step, bounds["gap"].clip(min=1e-12), color=COLOURS[1], linewidth=1.5, label="certified gap")
    for place in (left, right):
        place.set_xlabel("iteration")
        place.legend(frameon=False, fontsize=8)
        _bare(place)
    save_figure(figure, out)


def draw_radius(
    radii: ArrayLike,
    lines: Mapping[str, ArrayLike],
    out: str | Path,
    ylabel: str = "robust cost",
    title: str | None = None,
) -> None:
    """Draw values (R,), or (R, K) as mean and 5 to 95 % band, against the radius of the ambiguity set (R,)."""
    figure, (place,) = _grid(1, title)
    x = np.asarray(radii, dtype=np.float64)
    for colour, (label, given) in zip(COLOURS, lines.items(), strict=False):
        values = np.asarray(given, dtype=np.float64)
        values = values[:, None] if values.ndim == 1 else values
        if values.shape[1] > 1:
            place.fill_between(x, *np.percentile(values, (5, 95), axis=1), color=colour, alpha=0.2, linewidth=0)
        place.plot(x, values.mean(1), color=colour, marker="o", markersize=3, linewidth=1.4, label=label)
    place.set_xlabel("radius of the ambiguity set")
    place.set_ylabel(ylabel)
    place.legend(frameon=False, fontsize=8)
    _bare(place)
    save_figure(figure, out)


def draw_worst_kernel(
    nominal: ArrayLike, worst: ArrayLike, policy: ArrayLike, out: str | Path, title: str | None = None
) -> None:
    """Draw what the adversary did to the chain of a policy (S, A): P_π under the nominal kernel (S, A, S), under the
    worst one, and their difference."""
    p, q, pi = (np.asarray(x, dtype=np.float64) for x in (nominal, worst, policy))
    before, after = (np.einsum("sa,sat->st", pi, x) for x in (p, q))
    figure, axes = _grid(3, title, size=3.1)
    reach = max(float(np.abs(after - before).max()), 1e-12)
    for place, name, image, limits, colours, what in (
        (axes[0], "nominal", before, (0.0, 1.0), "Greys", "probability"),
        (axes[1], "worst case", after, (0.0, 1.0), "Greys", "probability"),
        (axes[2], "worst case − nominal", after - before, (-reach, reach), "PuOr_r", "difference"),
    ):
        shown = place.imshow(image, cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="nearest")
        place.set_title(name, fontsize=10)
        place.set_xlabel("next state")
        place.set_ylabel("state")
        place.xaxis.set_major_locator(MaxNLocator(integer=True))
        place.yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(shown, ax=place, shrink=0.75, label=what)
    save_figure(figure, out)


def draw_grid_policy(
    rows: Sequence[str],
    policies: Mapping[str, ArrayLike],
    values: Mapping[str, ArrayLike],
    out: str | Path,
    title: str | None = None,
) -> None:
    """Draw policies (S, 4) and costs (S,) on the map ``rows`` of a grid world, a panel per key: cells coloured by cost,
    with an arrow for every action as long as its probability."""
    if policies.keys() != values.keys():
        raise RloptError("every policy map needs its values: give both under the same names")
    height, width = len(rows), len(rows[0])
    figure, axes = _grid(len(policies), title, size=3.4)
    cells = np.array([list(row) for row in rows])
    free = np.isin(cells, ("S", "."))
    everything = np.concatenate(
        [np.asarray(v, dtype=np.float64).reshape(-1)[free.reshape(-1)] for v in values.values()]
    )
    edge = [withStroke(linewidth=3.0, foreground="black")]  # white alone fades on the bright end of the scale
    arrow = {"arrowstyle": "->", "color": "white", "lw": 1.4, "path_effects": edge}
    for place, (name, given) in zip(axes, policies.items(), strict=True):
        image = np.asarray(values[name], dtype=np.float64).reshape(height, width)
        shown = place.imshow(
            np.ma.masked_array(image, ~free), cmap="viridis_r", vmin=everything.min(), vmax=everything.max()
        )
        policy = np.asarray(given, dtype=np.float64)
        for s in range(height * width):
            r, c = divmod(s, width)
            if not free[r, c]:
                mark, colour = {"#": ("", "#555555"), "H": ("hole", "#000000"), "G": ("goal", "#009E73")}[
                    str(cells[r, c])
                ]
                place.add_patch(_square(c, r, colour))
                place.text(c, r, mark, ha="center", va="center", color="white", fontsize=8)
                continue
            for (x, y), p in zip(ARROWS, policy[s], strict=True):
                if p > 0.02:
                    place.annotate("", (c + 0.42 * p * x, r - 0.42 * p * y), (c, r), arrowprops=arrow)
        place.set_title(name, fontsize=10)
        place.set_xticks([])
        place.set_yticks([])
    figure.colorbar(shown, ax=axes, shrink=0.75, label="cost from here on")
    save_figure(figure, out)


def _square(column: int, row: int, colour: str) -> Rectangle:
    return Rectangle((column - 0.5, row - 0.5), 1.0, 1.0, color=colour)


def _grid(panels: int, title: str | None, size: float = 3.6) -> tuple[Figure, list[Axes]]:
    columns = min(panels, 3)
    rows = -(-panels // columns)
    wide = 6.0 if panels == 1 else size * columns
    figure = Figure(figsize=(wide, (4.0 if panels == 1 else 0.85 * size) * rows + 0.3), dpi=150, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]


def _bare(place: Axes) -> None:
    place.grid(alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        place.spines[side].set_visible(False)
