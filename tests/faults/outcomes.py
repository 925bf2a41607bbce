"""What a case can come to, what two runs have in common, and the table of it all."""

from __future__ import annotations

import csv
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlopt.runs.manifest import read_manifest
from rlopt.state import load_state, read_tensors
from rlopt.types import RloptError

GOOD = ("equal", "refused", "told")
"""As if nothing had been; one line that says what is wrong; another result, and a warning that says so."""
BAD = ("silent", "traceback", "effect")
"""Another result without a word; an error that is not told in one line; an import, or a write elsewhere."""
CLOCK = {"steps_per_second", "env_seconds", "learn_seconds"}


class Outcome(NamedTuple):
    kind: str
    case: str
    detail: str = ""


class Result(NamedTuple):
    """What one category came to."""

    category: str
    outcomes: list[Outcome]
    seconds: float

    @property
    def faults(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.kind not in GOOD]


def table_of(results: list[Result]) -> str:
    """One line per category."""
    head = ["", "tried", *GOOD, *BAD, "seconds"]
    rows = [head]
    for result in results:
        counts = Counter(outcome.kind for outcome in result.outcomes)
        numbers = [len(result.outcomes), *(counts[kind] for kind in (*GOOD, *BAD)), round(result.seconds)]
        rows.append([result.category, *map(str, numbers)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


class Warnings(logging.Handler):
    """Collects what a user would be told."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def warnings() -> Iterator[list[str]]:
    handler, logger = Warnings(), logging.getLogger("rlopt")
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def judged(case: str, attempt: Callable[[], Any], wanted: Any, quiet: tuple[str, ...] = ()) -> Outcome:
    """What ``attempt`` comes to, which should give ``wanted``; warnings that hold a word of ``quiet`` tell nothing."""
    with warnings() as lines:
        try:
            found = attempt()
        except RloptError as e:
            line = str(e)
            return Outcome("traceback" if "\n" in line else "refused", case, line)
        except Exception as e:
            return Outcome("traceback", case, f"{type(e).__name__}: {e}")
    if found == wanted:
        return Outcome("equal", case)
    told = [line for line in lines if not any(word in line for word in quiet)]
    return Outcome("told", case, told[0]) if told else Outcome("silent", case, f"{found} is not {wanted}"[:500])


# What a run came to


def digest(run: Path) -> str:
    """All that equal runs share: the newest checkpoint's state, its living rows, the tables without the clock."""
    sha256 = hashlib.sha256()
    newest = max((run / "checkpoints").glob("step-*"))
    manifest = read_manifest(newest)
    _feed(sha256, load_state(newest))
    for name, log in sorted(manifest.logs.items()):
        parts: dict[str, list[Tensor]] = {}
        for segment in log.segments:
            for key, rows in read_tensors(run / "checkpoints/segments" / name / segment.file).items():
                parts.setdefault(key, []).append(rows[max(0, log.first_row - segment.start) :])
        _feed(sha256, {key: torch.cat(rows) for key, rows in sorted(parts.items())})
    for table in ("metrics.csv", "episodes.csv", "evaluations.csv"):
        if (run / table).exists():
            with (run / table).open() as file:
                rows = [{k: v for k, v in row.items() if k not in CLOCK} for row in csv.DictReader(file)]
            _feed(sha256, {"table": table, "rows": [str(row) for row in rows]})
    return sha256.hexdigest()


def _feed(sha256: Any, tree: Any) -> None:
    if isinstance(tree, Tensor):
        sha256.update(f"{tree.dtype}{tuple(tree.shape)}".encode())
        sha256.update(tree.contiguous().flatten().view(torch.uint8).numpy() if tree.numel() else b"")
    elif isinstance(tree, dict):
        for key in sorted(tree):
            sha256.update(repr(key).encode())
            _feed(sha256, tree[key])
    elif isinstance(tree, list | tuple):
        sha256.update(f"{type(tree).__name__}{len(tree)}".encode())
        for child in tree:
            _feed(sha256, child)
    else:
        sha256.update(repr(tree).encode())
