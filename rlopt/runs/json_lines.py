"""Append-only files of JSON objects, one a line, that survive crashes and go on where a resumed run does."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlopt.files import open_own, replace_file


class JsonLines:
    """A file of lines ``{"step": …}``, made when the first is written. Lines wait in memory until ``flush``; where that
    fails (a full disk) they go on waiting.

    Raises:
        OSError: if the file cannot be made or read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: list[str] = []

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line."""
        self._pending.append(json.dumps(line, ensure_ascii=False) + "\n")

    def flush(self, sync: bool = False) -> None:
        """Write the waiting lines, and with ``sync`` wait until the disk has them.

        Raises:
            OSError: if that fails; nothing is lost, and the file keeps whole lines only.
        """
        if not self._pending:
            return
        handle = open_own(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            size, data = os.fstat(handle).st_size, memoryview("".join(self._pending).encode())
            try:
                while data:
                    data = data[os.write(handle, data) :]
            except OSError:
                os.ftruncate(handle, size)
                raise
            self._pending.clear()
            if sync:
                os.fsync(handle)
        finally:
            os.close(handle)

    def truncate_after(self, step: int) -> None:
        """Drop the lines after ``step``, and those that a crash has garbled."""
        if not self.path.is_file():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _is_until(line, step)]
        if len(kept) < len(lines):
            replace_file(self.path, b"".join(kept))


def _is_until(line: bytes, step: int) -> bool:
    with suppress(ValueError, KeyError, TypeError):
        return line.endswith(b"\n") and int(json.loads(line)["step"]) <= step
    return False
