"""Bar charts of speeds, drawn from the ``table.csv`` that lies beside them.

    python benchmarks/charts.py results/environments results/replay results/team_environments

Bars are medians, lines go from the least to the greatest window, and every panel has a scale of its own.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"


class Chart(NamedTuple):
    """Which columns of a table are drawn, and how."""

    panel: str | None
    """The column with a panel for each of its values; None for one panel."""
    names: tuple[str, ...]
    """The columns that name a bar; of rows with one name the fastest is drawn."""
    speeds: tuple[str, str, str]
    """The columns of the median, the least and the greatest."""
    label: str
    file: str = "chart.png"
    other: Callable[[str], bool] = lambda name: False
    """Whether a bar of rlopt's is of another kind than its first ones."""


ENVIRONMENTS = Chart("environment", ("entrant",), ("steps/s (median)", "min", "max"), "environment steps per second")
TEAMS = Chart("task", ("entrant",), ("steps/s (median)", "min", "max"), "steps per second, each of the whole team")
REPLAY = Chart(
    None, ("library", "sampler"), ("draws/s", "draws/s min", "draws/s max"),
    "minibatches of 256 per second; orange: with priorities, drawn and updated", "replay.png",
    lambda name: name.endswith(("PER", "LAP", "RR-M")),
)  # fmt: skip


def draw(chart: Chart, out: Path) -> Path:
    """Draw the chart of ``out/table.csv`` beside it, and return the picture."""
    from matplotlib.figure import Figure

    with (out / "table.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    panels: dict[str, dict[str, tuple[float, float, float]]] = {}
    for row in rows:
        bars = panels.setdefault("" if chart.panel is None else row[chart.panel], {})
        name = ", ".join(row[column] for column in chart.names)
        median, low, high = (float(row[column] or math.nan) for column in chart.speeds)
        if name not in bars or median > bars[name][0]:
            bars[name] = median, low, high
    columns = min(2, len(panels))
    count = math.ceil(len(panels) / columns)
    longest = max(len(bars) for bars in panels.values())
    size = (7.5 if columns == 1 else 11.0, 0.8 + count * (0.6 + 0.33 * longest))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(count, columns, squeeze=False).flat
    for axes, (title, bars) in zip(grid, panels.items(), strict=False):
        for place, (name, (median, low, high)) in enumerate(bars.items()):
            mine = ORANGE if chart.other(name) else BLUE
            axes.barh(place, median, height=0.7, color=mine if name.startswith("rlopt") else GREY)
            if not math.isnan(low):
                axes.plot([low, high], [place, place], color="black", linewidth=1.2, solid_capstyle="butt")
            end = max(median, 0.0 if math.isnan(high) else high)
            axes.annotate(
                f"{median:,.0f}", (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8
            )  # fmt: skip
        axes.set_yticks(range(len(bars)), list(bars), fontsize=9)
        axes.set_title(title, loc="left", fontsize=9)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(axis="x", labelsize=8)
        axes.margins(x=0.18)
        axes.set_xlim(left=0)
        axes.invert_yaxis()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    for axes in grid:  # where the last row is not full
        axes.set_visible(False)
    figure.supxlabel(f"{chart.label}\nbars: medians; lines: least to greatest window", fontsize=9)
    figure.savefig(out / chart.file, dpi=150)
    return out / chart.file


def chart_of(out: Path) -> Chart:
    """Return how the table in ``out`` is drawn, which its columns tell."""
    with (out / "table.csv").open(newline="", encoding="utf-8") as file:
        head = set(next(csv.reader(file)))
    for chart in (ENVIRONMENTS, TEAMS, REPLAY):
        if {*chart.names, *chart.speeds, *([chart.panel] if chart.panel else [])} <= head:
            return chart
    raise SystemExit(f"{out / 'table.csv'} has the columns {', '.join(sorted(head))}, of which no chart is drawn here")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="+", type=Path, help="folders with a table.csv")
    for out in parser.parse_args(arguments).out:
        print(draw(chart_of(out), out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
