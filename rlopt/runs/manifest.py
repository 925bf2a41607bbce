"""The manifest of a checkpoint: which files belong to it, how large they are, and what they hash to.

Its own checksum tells damage from a newer format. It defends against accidents, not against a forger; a forged manifest
still cannot name a file outside the checkpoints' folder, nor make reading run code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlopt.files import Digest, digest_file, write_file
from rlopt.state import STRUCTURE, TENSORS, CorruptCheckpoint, checksum, read_json
from rlopt.types import RloptError, State
from rlopt.version import __version__

MANIFEST = "manifest.json"
FORMAT = 1
MIGRATIONS: dict[int, Callable[[Manifest, State], State]] = {}
"""Format v → what turns a state of format v into one of v + 1."""

LOG_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
SEGMENT_NAME = re.compile(r"\d{12,}-\d{12,}(\.\d+)?\.safetensors")


@dataclass(frozen=True)
class Segment:
    """Rows ``start`` … ``stop - 1`` of a log, in ``segments/<log>/<file>``."""

    file: str
    start: int
    stop: int
    bytes: int
    sha256: str

    @property
    def digest(self) -> Digest:
        return Digest(self.bytes, self.sha256)


@dataclass(frozen=True)
class SavedLog:
    """What a manifest says of a row log."""

    rows_written: int
    capacity_rows: int
    segments: tuple[Segment, ...]

    @property
    def first_row(self) -> int:
        """The oldest row that the ring still holds."""
        return max(0, self.rows_written - self.capacity_rows)


@dataclass(frozen=True)
class Manifest:
    step: int
    kind: str
    """``last``, or what the caller named it."""
    files: dict[str, Digest]
    logs: dict[str, SavedLog]
    format: int = FORMAT
    rlopt: str = ""
    config: str | None = None
    """The run's ``config.yaml`` as it was when the process that saved this began."""
    tables: dict[str, tuple[int, str]] = field(default_factory=dict)
    """The marks of the run's tables (``csv_table.Mark``), by their files' names."""

    def segment_names(self) -> set[tuple[str, str]]:
        """Return (log, file) of every segment it needs."""
        return {(name, segment.file) for name, log in self.logs.items() for segment in log.segments}

    def migrate(self, state: State) -> State:
        """Bring a state of an older format to the present one."""
        for version in range(self.format, FORMAT):
            state = MIGRATIONS[version](self, state)
        return state


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest`` into ``folder`` and wait for the disk."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "rlopt": __version__,
        "kind": manifest.kind,
        "step": manifest.step,
        "files": {name: digest._asdict() for name, digest in manifest.files.items()},
        "logs": {name: asdict(log) for name, log in manifest.logs.items()},
        "config": manifest.config,
        "tables": manifest.tables,
    }
    content["checksum"] = checksum(content)
    write_file(folder / MANIFEST, [json.dumps(content, indent=1).encode()])


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint folder.

    Raises:
        CorruptCheckpoint: if it is missing, damaged, or names what no manifest of ours would.
        RloptError: if its format is newer than this rlopt, or too old.
    """
    path = folder / MANIFEST
    content = read_json(path)
    if not isinstance(content, dict) or content.get("checksum") != checksum(content):
        raise CorruptCheckpoint(f"{path} is damaged: its checksum does not agree")
    version = content.get("format")
    if type(version) is not int or version < 1:
        raise CorruptCheckpoint(f"{path} is damaged: it names no format")
    if version > FORMAT:
        raise RloptError(
            f"{folder} was written by a newer rlopt (format {version}, this one reads up to {FORMAT}); upgrade rlopt"
        )
    if any(older not in MIGRATIONS for older in range(version, FORMAT)):
        raise RloptError(f"{folder} has format {version}, which this rlopt no longer reads; use an older rlopt")
    try:
        files = {name: Digest(**digest) for name, digest in content["files"].items()}
        if set(files) != {STRUCTURE, TENSORS}:
            raise ValueError("it does not list the files of a checkpoint")
        if type(content["step"]) is not int:
            raise ValueError("it names no step")
        logs = {name: _saved_log(name, entry) for name, entry in content["logs"].items()}
        config = content.get("config")  # the first checkpoints had none
        if config is not None and type(config) is not str:
            raise ValueError("its configuration is no text")
        tables = {str(name): (int(rows), str(sha256)) for name, (rows, sha256) in content.get("tables", {}).items()}
        kind, rlopt = str(content["kind"]), str(content["rlopt"])
        return Manifest(content["step"], kind, files, logs, version, rlopt, config, tables)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise CorruptCheckpoint(f"{path} is damaged: {e}") from None


def _saved_log(name: str, entry: dict[str, Any]) -> SavedLog:
    """Return a log whose segments join and cover every living row."""
    segments = tuple(Segment(**segment) for segment in entry["segments"])
    log = SavedLog(entry["rows_written"], entry["capacity_rows"], segments)
    if not LOG_NAME.fullmatch(name) or not all(SEGMENT_NAME.fullmatch(segment.file) for segment in segments):
        raise ValueError("it names a segment that rlopt does not write")
    numbers = [log.rows_written, log.capacity_rows, *(n for s in segments for n in (s.start, s.stop))]
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"the row numbers of {name} are no numbers")
    if not segments:
        covered = log.first_row == log.rows_written
    else:
        covered = (
            segments[0].start <= log.first_row
            and all(segment.start < segment.stop for segment in segments)
            and all(a.stop == b.start for a, b in pairwise(segments))
            and segments[-1].stop == log.rows_written
        )
    if not covered:
        raise ValueError(f"the segments of {name} do not cover its rows")
    return log


def verify_file(path: Path, expected: Digest) -> None:
    """Raise CorruptCheckpoint unless ``path`` has the size and SHA-256 expected."""
    try:
        if not path.is_file():
            raise CorruptCheckpoint(f"{path} is missing")
        if (size := path.stat().st_size) != expected.bytes:
            raise CorruptCheckpoint(f"{path} has {size} bytes instead of {expected.bytes}")
        if digest_file(path) != expected:
            raise CorruptCheckpoint(f"{path} is damaged: its checksum does not agree")
    except OSError as e:
        raise CorruptCheckpoint(f"{path} cannot be read: {e}") from None
