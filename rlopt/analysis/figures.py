"""What every picture shares: colours, and how it becomes a file."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rlopt.errors import RloptError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, told apart by colour-blind readers too. Published curves are grey."""


def save_figure(figure: Figure, out: str | Path) -> None:
    """Write a figure, in a folder that is made where it is missing.

    Raises:
        RloptError: the name has no ending, or one that is no kind of picture.
    """
    path = Path(out)
    if path.suffix[1:].lower() not in FigureCanvasAgg(figure).get_supported_filetypes():
        raise RloptError(f"{str(out)!r} is no picture's name; name a .png, .pdf or .svg file")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
