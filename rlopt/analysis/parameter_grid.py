"""Pictures of a policy's return over a grid of simulator parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from rlopt.analysis.figures import COLOURS, save_figure
from rlopt.types import RloptError


def draw_parameter_grid(
    panels: Mapping[str, ArrayLike],
    parameters: Mapping[str, ArrayLike],
    out: str | Path,
    nominal: Mapping[str, float] | None = None,
    title: str | None = None,
) -> None:
    """Draw mean returns (k₁, …, k_d) against the parameters {name: (k_i,)}, in their order, for each method in
    ``panels``.

    One parameter gives a line per method. Two give a map per method, in one colour scale, with a cross at the worst
    point and a ring at ``nominal`` if it is on the map; a legend tells them. Of more the first two are shown, each cell
    the worst over the others.

    Raises:
        RloptError: returns whose shape is not that of the grid, or a file name of unknown kind.
    """
    names = list(parameters)
    axes = [np.asarray(values, dtype=np.float64) for values in parameters.values()]
    shape = tuple(len(values) for values in axes)
    grids = {label: np.asarray(values, dtype=np.float64) for label, values in panels.items()}
    for label, grid in grids.items():
        if grid.shape != shape:
            raise RloptError(f"{label}: returns of shape {grid.shape} do not fit a grid of {shape} parameters")
    if len(names) == 1:
        figure = Figure(figsize=(6.0, 4.0), dpi=150, layout="constrained")
        _lines(figure.add_subplot(), grids, names[0], axes[0], nominal)
    else:
        figure = Figure(figsize=(3.3 * len(grids) + 0.9, 3.7), dpi=150, layout="constrained")
        _maps(figure, {k: g.min(tuple(range(2, g.ndim))) for k, g in grids.items()}, names, axes, nominal)
    if title:
        figure.suptitle(title, fontsize=11, parse_math=False)
    save_figure(figure, out)


def _lines(
    place: Axes, grids: Mapping[str, np.ndarray], name: str, x: np.ndarray, nominal: Mapping[str, float] | None
) -> None:  # fmt: skip
    for colour, (label, grid) in zip(COLOURS, grids.items(), strict=False):
        place.plot(x, grid, color=colour, marker="o", markersize=3, linewidth=1.4, label=label)
    if nominal is not None:
        place.axvline(nominal[name], color="#888888", linewidth=1.0, linestyle=":", label="nominal")
    place.set_xlabel(name)
    place.set_ylabel("mean return")
    place.grid(alpha=0.25, linewidth=0.6)
    place.legend(frameon=False, fontsize=8)


def _maps(
    figure: Figure,
    grids: Mapping[str, np.ndarray],
    names: list[str],
    axes: list[np.ndarray],
    nominal: Mapping[str, float] | None,
) -> None:
    low, high = min(float(g.min()) for g in grids.values()), max(float(g.max()) for g in grids.values())
    y, x = axes[0], axes[1]
    places = figure.subplots(1, len(grids), squeeze=False, sharey=True)[0]
    for place, (label, grid) in zip(places, grids.items(), strict=True):
        shown = place.pcolormesh(x, y, grid, cmap="viridis", vmin=low, vmax=high, shading="nearest")
        i, j = np.unravel_index(int(grid.argmin()), grid.shape)
        drawn = place.plot(x[j], y[i], "x", color="#D55E00", markersize=9, markeredgewidth=2, label="worst point")
        if nominal is not None and all(a[0] <= nominal[n] <= a[-1] for n, a in zip(names[:2], axes, strict=False)):
            # White on the bright end of the scale cannot be seen, black on the dark one: a black ring in a white one.
            at = (nominal[names[1]], nominal[names[0]])
            place.plot(*at, "o", color="white", fillstyle="none", markersize=8, markeredgewidth=3)
            drawn += place.plot(*at, "o", color="black", fillstyle="none", markersize=8, label="nominal parameters")
        place.set_title(f"{label}\nworst {grid.min():.0f}, mean {grid.mean():.0f}", fontsize=9, parse_math=False)
        place.set_xlabel(names[1])
    places[0].set_ylabel(names[0])
    label = "mean return" if len(names) == 2 else "worst mean return"
    figure.colorbar(shown, ax=list(places), shrink=0.85, label=label)
    figure.legend(handles=drawn, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
