"""Tables as CSV files: those of a run folder, and results."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlopt.errors import RloptError

Cell = int | float | str | None


def read_csv(path: Path) -> dict[str, list[Cell]]:
    """Return a table as columns of one length. A cell is an int, a float (also ``nan``, ``inf``), a str, or None where
    empty.

    A last line that is still being written, or was torn by a crash, is left out.

    Raises:
        RloptError: if the file is missing or no such table.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as e:
        raise RloptError(f"{path} cannot be read: {e.strerror}; name a run folder that holds it") from None
    header, *rows = [cells_of(line) for line in whole_lines(text)] or [[]]
    if len(set(header)) != len(header):
        raise RloptError(f"{path} is no table of rlopt: its first line names a column twice")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise RloptError(f"{path}, line {number}: {len(row)} cells under {len(header)} columns; mend or remove it")
    return {name: [parse_cell(row[i]) for row in rows] for i, name in enumerate(header)}


def as_frame(path: Path) -> Any:
    """Return a table as a pandas DataFrame, or as a list of dicts, one per row, where pandas is not installed."""
    columns = read_csv(path)
    try:
        import pandas
    except ImportError:
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return pandas.DataFrame(columns)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table, the same bytes on every system."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def whole_lines(text: str) -> list[str]:
    """Return the lines of a text that are complete, that is, end in a line break."""
    return text.split("\n")[:-1]


def cells_of(line: str) -> list[str]:
    """Return the cells of one line: a stray quote reaches no further than its end. None where they cannot be told
    apart."""
    if '"' not in line:
        return line.split(",") if line else []
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error:
        return []


def parse_cell(text: str) -> Cell:
    """Return what a cell says: nothing, an int, a float or a word."""
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
