"""Append-only CSV tables that survive crashes, full disks and columns that appear later."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from rlopt.analysis.tables import whole_lines
from rlopt.files import open_own, replace_file


class CsvTable:
    """A table that grows at its end. Numbers are written so that they read back exactly: two runs are bit-identical
    where their tables are.

    A table that exists is continued: its header is kept and a torn last line dropped. Rows wait in memory until
    ``flush``; if that fails (a full disk) they go on waiting, and the file keeps whole lines only.

    Args:
        path: the file.
        columns: what every row has, in order. Later rows may bring new columns: the header then grows.

    Raises:
        OSError: if the file cannot be made or read.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = list(columns)
        self._base = tuple(columns)
        self._pending: list[dict[str, str]] = []
        self._fd = -1
        rows: list[list[str]] = []
        if path.exists():
            header, rows = self._read()
            self.columns = header + [name for name in columns if name not in header]
        self._rewrite(self.columns, rows)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row. Columns that it lacks stay empty; columns that are new will be added to the table."""
        self._pending.append({name: _cell(value) for name, value in row.items()})

    def flush(self, sync: bool = False) -> None:
        """Hand the waiting rows to the operating system, and with ``sync`` wait until the disk has them.

        Raises:
            OSError: if that fails. No row is lost: the next ``flush`` tries again.
        """
        new = dict.fromkeys(name for row in self._pending for name in row if name not in self.columns)
        if new:
            self._rewrite([*self.columns, *new], self._read()[1])
        if self._pending:
            lines = (_line(row.get(name, "") for name in self.columns) for row in self._pending)
            data = memoryview("".join(lines).encode())
            size = os.fstat(self._fd).st_size
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
            except OSError:
                os.ftruncate(self._fd, size)
                raise
            self._pending.clear()
        if sync:
            os.fsync(self._fd)

    def truncate_after(self, step: int) -> None:
        """Drop the rows whose ``step`` is greater, those a crash has garbled, and columns that only they had."""
        self.flush()
        header, rows = self._read()
        at = header.index("step")
        rows = [row for row in rows if len(row) == len(header) and row[at].isdecimal() and int(row[at]) <= step]
        keep = [i for i, name in enumerate(header) if name in self._base or any(row[i] for row in rows)]
        self._rewrite([header[i] for i in keep], [[row[i] for i in keep] for row in rows])

    def close(self) -> None:
        """Write what waits and close the file. Safe to call twice."""
        if self._fd >= 0:
            try:
                self.flush(sync=True)
            finally:
                os.close(self._fd)
                self._fd = -1

    def _read(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows as text, without a torn last line."""
        text = self.path.read_text(encoding="utf-8", errors="replace").replace("\0", "")
        header, *rows = list(csv.reader(whole_lines(text))) or [self.columns]
        return header, rows

    def _rewrite(self, columns: list[str], rows: list[list[str]]) -> None:
        padded = (row + [""] * (len(columns) - len(row)) for row in rows)
        if self._fd >= 0:
            os.close(self._fd)  # Windows replaces no open file
            self._fd = -1
        try:
            replace_file(self.path, "".join(map(_line, (columns, *padded))).encode())
            self.columns = columns
        finally:
            if self.path.exists():
                self._fd = open_own(self.path, os.O_WRONLY | os.O_APPEND)


def _line(cells: Iterable[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _cell(value: Any) -> str:
    """Text that reads back as the same value; NumPy's numbers are written like Python's."""
    if value is None:
        return ""
    if isinstance(value, Integral):
        return str(int(value))
    return repr(float(value)) if isinstance(value, Real) else str(value)
