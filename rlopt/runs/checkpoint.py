"""Checkpoints: a save never harms the last good one, and loading never trusts a byte it has not checked.

::

    checkpoints/
        step-000000012345/   manifest.json  state.json  tensors.safetensors
        segments/<log>/<start>-<stop>.safetensors
        best/                the agent alone, as ``Agent.save`` writes it
        damaged-step-…/      what was refused, kept for inspection

A checkpoint is staged in ``.step-….tmp``, fsynced, given its manifest (sizes and SHA-256 of everything, segments
included), fsynced again and renamed. Row logs (replay buffers) are append-only segments that the manifests share, so a
save writes only the rows added since the last one. Nothing is deleted before its successor is safe.
"""

from __future__ import annotations

import logging
import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from rlopt.files import free_bytes, fresh_folder, recover_folder, refuse_links, remove, replace_folder, sync_folder
from rlopt.runs.manifest import (
    LOG_NAME,
    MANIFEST,
    SEGMENT_NAME,
    Manifest,
    SavedLog,
    Segment,
    read_manifest,
    verify_file,
    write_manifest,
)
from rlopt.state import STRUCTURE, CorruptCheckpoint, load_state, read_tensors, save_state, state_bytes, write_tensors
from rlopt.types import RloptError, State

if TYPE_CHECKING:
    from rlopt.state import RowLog

__all__ = ["CheckpointFailed", "Checkpoints", "CorruptCheckpoint", "Loaded", "LostRows", "estimate_bytes", "free_bytes"]

SEGMENT_BYTES = 64 << 20
"""A segment is at most this large, and so is the only temporary that a save needs beside the state."""

_STEP = re.compile(r"step-(\d{12,})")
_log = logging.getLogger(__name__)


class CheckpointFailed(RloptError):
    """A checkpoint could not be written (a full disk, an I/O error). The previous one is intact; training may go on."""


class LostRows(CorruptCheckpoint):
    """Of a checkpoint everything is sound but segments of its row logs."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint whose every byte agreed with its manifest, lost segments excepted."""

    step: int
    state: State
    path: Path
    logs: dict[str, SavedLog]
    tables: dict[str, tuple[int, str]]
    """Marks of the run's tables."""
    lost: frozenset[tuple[str, Segment]] = frozenset()
    """(log, segment) of what is missing or damaged."""


class Checkpoints:
    """The checkpoints of one run, for its one writer: making this object tidies what a crash left behind.

    Args:
        folder: the run's ``checkpoints`` folder; made if need be.
        keep: how many checkpoints stay (2: the last and the previous); the best one is not counted.
        config: the text of the run's configuration, kept in the manifests.
    """

    def __init__(self, folder: Path, keep: int = 2, config: str | None = None) -> None:
        if keep < 1:
            raise ValueError("keep at least one checkpoint")
        self.folder = folder
        self.keep, self.config = keep, config
        self.unfit: dict[Path, str] = {}
        """Checkpoints that were loaded and did not fit the run, and why; ``load`` passes them by."""
        self._logs: dict[str, SavedLog] = {}
        self._lost: frozenset[tuple[str, Segment]] = frozenset()
        folder.mkdir(parents=True, exist_ok=True)
        refuse_links(folder)
        self._tidy()

    def save(
        self,
        step: int,
        state: State,
        logs: dict[str, RowLog],
        *,
        kind: str = "last",
        tables: Mapping[str, tuple[int, str]] | None = None,
    ) -> Path:
        """Save ``state`` and the new rows of ``logs`` as the checkpoint of ``step``, then drop what is not kept.
        ``tables`` are the marks of the run's tables.

        Raises:
            CheckpointFailed: if the disk fails or is full; what was there before is as it was.
            TypeError: if ``state`` holds something that cannot be saved.
        """
        target = self.folder / f"step-{step:012d}"
        new_files: list[Path] = []
        try:
            self.folder.mkdir(exist_ok=True)
            saved = {name: self._save_log(name, log, new_files) for name, log in logs.items()}
            manifest = Manifest(step, kind, {}, saved, tables=dict(tables or {}), config=self.config)

            def write(staged: Path) -> None:
                write_manifest(staged, replace(manifest, files=save_state(staged, state)))

            self._write_folder(target, write)
        except BaseException as e:
            if not self._refers(target, new_files):
                for path in new_files:
                    with suppress(OSError):
                        path.unlink(missing_ok=True)
            if isinstance(e, OSError):
                # A structure grows with the states of the environments; a disk's own limit says nothing of it.
                advice = "make num_envs smaller" if STRUCTURE in str(e.strerror) else "free some space there"
                raise CheckpointFailed(
                    f"the checkpoint of step {step} could not be written to {self.folder}: {e}; "
                    f"what was saved before is intact; {advice}"
                ) from e
            raise
        self._logs = saved
        self._prune(target)
        return target

    def save_best(self, step: int, write: Callable[[Path], object]) -> Path:
        """Replace ``best/`` by what ``write`` puts into an empty folder: the agent. Raises as ``save`` does."""
        target = self.folder / "best"
        try:
            self.folder.mkdir(exist_ok=True)
            self._write_folder(target, write)
        except OSError as e:
            raise CheckpointFailed(
                f"the best agent of step {step} could not be written to {target}: {e}; "
                "what was saved before is intact; free some space there"
            ) from e
        return target

    def load(self, without_lost_rows: bool = False) -> Loaded | None:
        """Return the newest sound checkpoint, or None where there is none at all. ``accept`` it once it is in use.

        A damaged one is reported, moved aside, and the one before is used; the next save continues from that one.
        Where all are damaged, ``without_lost_rows`` takes the newest of which only segments are.

        Raises:
            LostRows: none is sound, but one would be taken without its lost rows.
            CorruptCheckpoint: none is sound, or none fits.
            RloptError: the newest was written by a newer rlopt.
        """
        refused: list[tuple[Path, CorruptCheckpoint]] = []
        incomplete: list[tuple[Path, LostRows]] = []
        for path in _steps(self.folder):
            if path in self.unfit:
                continue
            try:
                loaded = self._read(path)
            except LostRows as e:
                incomplete.append((path, e))
                refused.append((path, e))
            except CorruptCheckpoint as e:
                refused.append((path, e))
            else:
                return self._chosen(loaded, refused)
        if incomplete and without_lost_rows:
            path, lost = incomplete[0]
            _log.warning("checkpoint %s is used WITHOUT all its rows: %s", path.name, lost)
            newer = refused[: [refused_path for refused_path, _ in refused].index(path)]
            return self._chosen(self._read(path, without_lost_rows=True), newer)
        if not (refused or self.unfit):
            return None
        reasons = "; ".join([*self.unfit.values(), *(str(error) for _, error in refused)])
        none = f"no checkpoint in {self.folder} is sound: {reasons}"
        if incomplete:
            raise LostRows(f"{none}; resume with --without-lost-rows (from Python: without_lost_rows=True) to go on so")
        raise CorruptCheckpoint(f"{none}; start again in a new run_dir")

    def _chosen(self, loaded: Loaded, refused: list[tuple[Path, CorruptCheckpoint]]) -> Loaded:
        """``loaded``, from which the next save continues, once those newer than it have stepped aside."""
        for damaged, error in refused:
            _log.warning("checkpoint %s is refused: %s; step %d is used instead", damaged.name, error, loaded.step)
            self._set_aside(damaged)
        self._logs, self._lost = dict(loaded.logs), loaded.lost
        return loaded

    def accept(self, loaded: Loaded) -> None:
        """Say that ``loaded`` fits the run: those that did not step aside."""
        self._chosen(loaded, [(path, CorruptCheckpoint(reason)) for path, reason in self.unfit.items()])

    def restore_logs(self, loaded: Loaded, logs: dict[str, RowLog]) -> None:
        """Write the rows that ``loaded`` refers to back into ``logs``, oldest first, dead rows left out, and have them
        forget those that are lost.

        Raises:
            RloptError: the logs are not those that were saved, or cannot go on without the rows that are lost.
            CorruptCheckpoint: a segment does not hold the rows it should.
        """
        if set(logs) != set(loaded.logs):
            raise RloptError(f"{loaded.path} holds the logs {sorted(loaded.logs)}, the run has {sorted(logs)}")
        for name, log in logs.items():
            saved = loaded.logs[name]
            if log.capacity_rows != saved.capacity_rows:
                raise RloptError(
                    f"{loaded.path} was saved with a {name} of {saved.capacity_rows} rows, the run's has "
                    f"{log.capacity_rows}; resume with the capacity it had"
                )
            lost = [segment for of, segment in loaded.lost if of == name]
            for segment in saved.segments:
                start = max(segment.start, saved.first_row)
                if segment in lost:
                    continue
                rows = read_tensors(self._segments(name) / segment.file)
                if any(t.ndim < 1 or t.shape[0] != segment.stop - segment.start for t in rows.values()):
                    raise CorruptCheckpoint(f"{self._segments(name) / segment.file} does not hold the rows it names")
                try:
                    log.write_rows(start, {key: t[start - segment.start :] for key, t in rows.items()})
                except ValueError as e:
                    raise RloptError(f"{loaded.path} cannot be resumed with this configuration: {name}: {e}") from e
            for segment in lost:
                log.forget_rows(max(segment.start, saved.first_row), segment.stop)

    # Writing

    def _write_folder(self, target: Path, write: Callable[[Path], object]) -> None:
        staged = self.folder / f".{target.name}.tmp"
        try:
            write(fresh_folder(staged))
            sync_folder(staged)
            replace_folder(staged, target)
        finally:
            _try_remove(staged)

    def _save_log(self, name: str, log: RowLog, new_files: list[Path]) -> SavedLog:
        """Write the rows that no segment holds yet, and list the segments that still have a living row."""
        if not LOG_NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot name a log; use letters, digits, _, - and .")
        before = self._logs.get(name)
        first = max(0, log.rows_written - log.capacity_rows)
        living: list[Segment] = []
        if before is not None and before.rows_written <= log.rows_written:
            living = [s for s in before.segments if s.stop > first]
        folder = self._segments(name)
        for parent in (folder.parent, folder):
            parent.mkdir(exist_ok=True)
        segments: list[Segment] = []
        for segment in living:
            if self._holds(name, segment):
                segments.append(segment)
                continue
            _log.warning("%s is gone or cut: its rows are written again", folder / segment.file)
            again = self._write_range(folder, max(segment.start, first), segment.stop, log, new_files)
            if [each.digest for each in again] == [segment.digest]:  # checkpoints that need the old one have it again
                os.replace(folder / again[0].file, folder / segment.file)
                new_files.remove(folder / again[0].file)
                again = [segment]
            segments += again
        segments += self._write_range(
            folder, segments[-1].stop if segments else first, log.rows_written, log, new_files
        )
        for parent in (folder, folder.parent, self.folder):
            sync_folder(parent)
        return SavedLog(log.rows_written, log.capacity_rows, tuple(segments))

    def _holds(self, name: str, segment: Segment) -> bool:
        """Return whether a segment that a save counts on is there, by its size: reading it all would cost too much."""
        if (name, segment) in self._lost:
            return False
        try:
            found = os.lstat(self._segments(name) / segment.file)
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == segment.bytes

    def _write_range(self, folder: Path, start: int, stop: int, log: RowLog, new_files: list[Path]) -> list[Segment]:
        step = max(1, SEGMENT_BYTES // max(1, _row_bytes(log)))
        cuts = [*range(start, stop, step), stop]
        return [self._write_segment(folder, low, high, log, new_files) for low, high in pairwise(cuts)]

    def _write_segment(self, folder: Path, start: int, stop: int, log: RowLog, new_files: list[Path]) -> Segment:
        # A name may be taken by rows of a time line that was given up (a checkpoint that was refused). It is never
        # overwritten: an older manifest might refer to it.
        stem, suffix = f"{start:012d}-{stop:012d}", ""
        while os.path.lexists(path := folder / f"{stem}{suffix}.safetensors"):
            suffix = f".{int(suffix[1:] or 1) + 1}"
        new_files.append(path)
        digest = write_tensors(path, log.read_rows(start, stop))
        return Segment(path.name, start, stop, *digest)

    def _refers(self, target: Path, files: list[Path]) -> bool:
        """Return whether ``target`` is complete and needs ``files``: a failure after the rename must not delete
        them."""
        try:
            needed = read_manifest(target).segment_names()
        except RloptError:
            return False
        return not needed.isdisjoint((path.parent.name, path.name) for path in files)

    # Reading

    def _read(self, path: Path, without_lost_rows: bool = False) -> Loaded:
        manifest = read_manifest(path)
        for name, digest in manifest.files.items():
            verify_file(path / name, digest)
        lost: dict[tuple[str, Segment], CorruptCheckpoint] = {}
        for name, log in manifest.logs.items():
            for segment in log.segments:
                try:
                    verify_file(self._segments(name) / segment.file, segment.digest)
                except CorruptCheckpoint as e:
                    lost[name, segment] = e
        if lost and not without_lost_rows:
            raise LostRows(_told(manifest, lost))
        state = manifest.migrate(load_state(path))
        return Loaded(manifest.step, state, path, manifest.logs, manifest.tables, frozenset(lost))

    def _segments(self, name: str) -> Path:
        return self.folder / "segments" / name

    # Keeping the folder tidy

    def _tidy(self) -> None:
        for path in list(self.folder.glob(".*.old")):
            recover_folder(self.folder / path.name[1 : -len(".old")])
        for path in list(self.folder.glob(".*.tmp")):
            _try_remove(path)

    def _set_aside(self, path: Path) -> None:
        target = path.with_name(f"damaged-{path.name}")
        number = 2
        while os.path.lexists(target):
            target, number = path.with_name(f"damaged-{path.name}.{number}"), number + 1
        try:
            os.replace(path, target)
        except OSError as e:
            _log.warning("%s could not be moved aside: %s", path, e)

    def _prune(self, newest: Path) -> None:
        """Delete old checkpoints and the segments that no kept one refers to. Failures are reported, not raised: the
        save has succeeded."""
        try:
            steps = _steps(self.folder)
            kept = [newest, *(path for path in steps if path != newest)][: self.keep]
            for path in steps:
                if path not in kept:
                    _try_remove(path)
            needed = set[tuple[str, str]]().union(*(read_manifest(path).segment_names() for path in kept))
            for path in self.folder.glob("segments/*/*"):
                if SEGMENT_NAME.fullmatch(path.name) and (path.parent.name, path.name) not in needed:
                    path.unlink(missing_ok=True)
        except (OSError, RloptError) as e:
            _log.warning("old checkpoints in %s were left where they are: %s", self.folder, e)


def _told(manifest: Manifest, lost: Mapping[tuple[str, Segment], CorruptCheckpoint]) -> str:
    """Return what of a checkpoint is lost."""
    reason = next(iter(lost.values()))
    parts = []
    for name, log in manifest.logs.items():
        first = log.first_row
        rows = sum(segment.stop - max(segment.start, first) for of, segment in lost if of == name)
        if rows:
            parts.append(f"{rows} of {log.rows_written - first} rows of the {name} are lost")
    more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
    return f"{reason}{more}: {', '.join(parts)}"


def saved_config(folder: Path) -> tuple[str, Path] | None:
    """Return the configuration in the newest manifest under ``folder`` that is readable and holds one, and where it
    was."""
    for path in _steps(folder) if folder.is_dir() else []:
        with suppress(CorruptCheckpoint):
            if (config := read_manifest(path).config) is not None:
                return config, path / MANIFEST
    return None


def _steps(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, newest first."""
    found = [(int(m[1]), path) for path in folder.iterdir() if (m := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def estimate_bytes(state: State, logs: dict[str, RowLog], keep: int = 2, rows: int | None = None) -> int:
    """Return the disk space that a run's checkpoints need at most: ``keep`` states and the one being staged, the best,
    and every log once, full or with as many ``rows`` as the run will write."""
    lengths = {name: min(log.capacity_rows, rows or log.capacity_rows) for name, log in logs.items()}
    return state_bytes(state) * (keep + 2) + sum(lengths[name] * _row_bytes(log) for name, log in logs.items())


def _try_remove(path: Path) -> None:
    """What cannot be deleted now is deleted by the next writer."""
    with suppress(OSError):
        remove(path)


def _row_bytes(log: RowLog) -> int:
    rows = log.read_rows(log.rows_written - 1, log.rows_written) if log.rows_written else log.read_rows(0, 0)
    return sum(math.prod(t.shape[1:]) * t.element_size() for t in rows.values())
