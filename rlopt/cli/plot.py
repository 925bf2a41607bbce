"""``rlopt plot``: learning curves of run folders, and the table behind them."""

from __future__ import annotations

import argparse
import math

from rlopt.errors import RloptError
from rlopt.settings import settings_file


def run(arguments: argparse.Namespace) -> int:
    """Draw, then print one line per curve and step."""
    for folder in arguments.runs:
        settings_file(folder)
    from rlopt.analysis.plots import draw_runs

    try:
        rows = draw_runs(
            arguments.runs, arguments.out, title=arguments.title, steps=arguments.at, frames=arguments.frames
        )
    except OSError as error:
        raise RloptError(f"--out {arguments.out} cannot be written: {error}") from error
    if not rows:
        asked = "every seed has" if arguments.at is None else f"any curve reaches {arguments.at}"
        print(f"no table: there is no step that {asked}")
        print(f"drawn: {arguments.out}")
        return 0
    head = ("env", "curve", "step", "seeds", "mean ± sd", "IQM [95 % interval]")
    cells = [head]
    for r in rows:
        digits = 2 if r["env"].startswith("human-normalised") else 1
        deviation = "" if math.isnan(r["sd"]) else f" ± {r['sd']:.{digits}f}"
        interval = "" if math.isnan(r["low"]) else f" [{r['low']:.{digits}f}, {r['high']:.{digits}f}]"
        cells.append(
            (
                r["env"],
                r["name"],
                str(r["step"]),
                str(r["seeds"]),
                f"{r['mean']:.{digits}f}{deviation}",
                f"{r['iqm']:.{digits}f}{interval}",
            )
        )
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"drawn: {arguments.out}")
    return 0
