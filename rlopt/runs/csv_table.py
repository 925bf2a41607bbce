"""Append-only CSV tables that survive crashes, full disks and columns that appear later."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

from rlopt.analysis.tables import cells_of, whole_lines
from rlopt.files import open_own, replace_file

_log = logging.getLogger(__name__)


class Mark(NamedTuple):
    """What a table held at some moment, to be compared with what it holds later."""

    rows: int
    sha256: str


class _Digest:
    """The mark of rows as they come. Empty cells do not count, so that columns which appear later change nothing."""

    def __init__(self) -> None:
        self.rows, self._sha256 = 0, hashlib.sha256()

    def add(self, row: Mapping[str, str]) -> None:
        self.rows += 1
        self._sha256.update(json.dumps(sorted((name, cell) for name, cell in row.items() if cell)).encode())

    @property
    def mark(self) -> Mark:
        return Mark(self.rows, self._sha256.hexdigest())


class CsvTable:
    """A table that grows at its end. Numbers are written so that they read back exactly: two runs are bit-identical
    where their tables are.

    A table that exists is continued: its header is kept and a torn last line dropped. Rows wait in memory until
    ``flush``; if that fails (a full disk) they go on waiting, and the file keeps whole lines only. Where another
    program removes or replaces the file, ``flush`` writes it again.

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
        self._digest = _Digest()
        self._folder = os.stat(path.parent)
        rows: list[list[str]] = []
        if path.exists():
            header, rows = _parse(path.read_bytes(), self.columns)
            rows = [row for row in rows if len(row) == len(header)]  # padded, a garbled row would look sound
            self.columns = header + [name for name in columns if name not in header]
        self._rewrite(self.columns, rows)
        self._digest_anew(rows)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row. Columns that it lacks stay empty; columns that are new will be added to the table."""
        self._pending.append({name: _cell(value) for name, value in row.items()})
        self._digest.add(self._pending[-1])

    @property
    def mark(self) -> Mark:
        """What all rows together are, those that wait included."""
        return self._digest.mark

    def flush(self, sync: bool = False) -> None:
        """Hand the waiting rows to the operating system, and with ``sync`` wait until the disk has them.

        Raises:
            OSError: if that fails. No row is lost: the next ``flush`` tries again.
        """
        self._write_again()
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

    def truncate_after(self, step: int, rows: int | None = None) -> None:
        """Drop the rows whose ``step`` is greater, those a crash has garbled, and columns that only they had; keep no
        more than the first ``rows``, where it is known how many there were."""
        self.flush()
        header, found = self._read()
        found = _rows_until(step, header, found)[:rows]
        keep = [i for i, name in enumerate(header) if name in self._base or any(row[i] for row in found)]
        found = [[row[i] for i in keep] for row in found]
        self._rewrite([header[i] for i in keep], found)
        self._digest_anew(found)

    def close(self) -> None:
        """Write what waits and close the file. Safe to call twice."""
        if self._fd >= 0:
            try:
                self.flush(sync=True)
            finally:
                self._close()

    def _read(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows as text, without a torn last line."""
        return _parse(self.path.read_bytes(), self.columns)

    def _write_again(self) -> None:
        """Write the table anew where its file was removed or replaced: what was written is still open here."""
        folder = os.stat(self.path.parent)
        if not os.path.samestat(folder, self._folder):
            raise OSError(errno.ENOENT, "the folder was removed or renamed", str(self.path.parent))
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._fd)):
                return
        _log.warning("%s was removed or replaced by another program; it is written again", self.path)
        written = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        self._rewrite(self.columns, _parse(written, self.columns)[1])

    def _rewrite(self, columns: list[str], rows: list[list[str]]) -> None:
        padded = (row + [""] * (len(columns) - len(row)) for row in rows)
        text = "".join(map(_line, (columns, *padded)))
        if os.name == "nt":  # which replaces no open file
            self._close()
        try:
            replace_file(self.path, text.encode())
            self._close()
            self.columns = columns
        finally:
            if self._fd < 0 and self.path.exists():
                self._fd = open_own(self.path, os.O_RDWR | os.O_APPEND)

    def _digest_anew(self, rows: Iterable[Sequence[str]]) -> None:
        self._digest = _Digest()
        for row in rows:
            self._digest.add(dict(zip(self.columns, row, strict=False)))

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def check_table(path: Path, step: int, expected: Mark) -> int | None:
    """Compare a table with what it was when a run was saved at ``step``, and return how many of its rows are of before.
    Where it differs, that is None: say so and keep a copy of the file as it is, because the run goes on with what can
    be read of it."""
    header, rows = _parse(path.read_bytes(), []) if path.is_file() else ([], [])
    digest = _Digest()
    for row in _rows_until(step, header, rows)[: expected.rows]:
        digest.add(dict(zip(header, row, strict=True)))
    if digest.mark == expected:
        return expected.rows
    kept = ""
    if path.is_file():
        copy, number = path.with_name(f"damaged-{path.name}"), 2
        while os.path.lexists(copy):
            copy, number = path.with_name(f"damaged-{number}-{path.name}"), number + 1
        shutil.copyfile(path, copy)
        kept = f"; the file as it was is {copy.name}"
    _log.warning(
        "%s is damaged or was changed since the run was saved at step %d: the run goes on with %d of its %d rows, as "
        "they are now%s", path, step, digest.rows, expected.rows, kept,
    )  # fmt: skip
    return None


def _parse(data: bytes, columns: list[str]) -> tuple[list[str], list[list[str]]]:
    """Header (``columns`` where there is none) and rows as text, without a torn last line."""
    text = data.decode(errors="replace").replace("\0", "")
    header, *rows = [cells_of(line) for line in whole_lines(text)] or [columns]
    return header, rows


def _rows_until(step: int, header: list[str], rows: list[list[str]]) -> list[list[str]]:
    """Return the rows that have a cell for every column and a step no greater than ``step``."""
    if "step" not in header:
        return []
    at = header.index("step")
    sound = (row for row in rows if len(row) == len(header) and row[at].isascii() and row[at].isdecimal())
    return [row for row in sound if int(row[at][:20]) <= step]


def _line(cells: Iterable[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _cell(value: Any) -> str:
    """Return text that reads back as the same value; NumPy's numbers are written like Python's."""
    if value is None:
        return ""
    if isinstance(value, Integral):
        return str(int(value))
    return repr(float(value)) if isinstance(value, Real) else str(value)
