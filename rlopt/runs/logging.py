"""What a run writes down: CSV tables and TensorBoard."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlopt.runs.csv_table import CsvTable, Mark, check_table
from rlopt.runs.display import Display
from rlopt.runs.run_folder import RunFolder
from rlopt.types import Episode

__all__ = ["Display", "Logger"]

METRICS = ("step", "steps_per_second", "env_seconds", "learn_seconds")

_log = logging.getLogger(__name__)


class Logger:
    """Writes ``metrics.csv``, ``episodes.csv``, ``evaluations.csv`` and TensorBoard scalars into a run folder.

    A disk that is full or fails is reported once and does not stop the run: rows of the tables wait until they can be
    written, TensorBoard is given up.

    Args:
        folder: the run, whose writer this process is.
        tensorboard: whether to write TensorBoard files too.
        resume_step: the step of the checkpoint that the run goes on from; rows after it are dropped.
        marks: what ``marks`` gave when that checkpoint was saved: a table that differs is told.
        num_runs: with more than one, episodes and evaluations name their ``run``.
    """

    def __init__(
        self,
        folder: RunFolder,
        tensorboard: bool = True,
        resume_step: int | None = None,
        *,
        marks: Mapping[str, tuple[int, str]] | None = None,
        num_runs: int = 1,
    ) -> None:
        run = ("run",) if num_runs > 1 else ()
        rows: dict[str, int | None] = {}
        for path in (folder.metrics, folder.episodes, folder.evaluations):
            if resume_step is not None and marks is not None and path.name in marks:
                rows[path.name] = check_table(path, resume_step, Mark(*marks[path.name]))
        self._metrics = CsvTable(folder.metrics, METRICS)
        self._episodes = CsvTable(folder.episodes, ("step", "return", "length", *run))
        self._evaluations = CsvTable(folder.evaluations, ("step", "episode", "return", "length", *run))
        self._tables = (self._metrics, self._episodes, self._evaluations)
        self._many = num_runs > 1
        self._scalars = _Scalars(str(folder.tensorboard)) if tensorboard else None
        self._failing = False
        if resume_step is not None:
            self.truncate(resume_step, rows)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row of ``metrics.csv``; new names become new columns."""
        self._metrics.append({"step": step, **values})
        self._add(step, {name if "/" in name else f"metrics/{name}": value for name, value in values.items()})
        self._flush(self._metrics)

    def episodes(self, step: int, episodes: Sequence[Episode]) -> None:
        """Write training episodes that ended at ``step``, one row each."""
        for episode in episodes:
            self._episodes.append(self._row(step, episode))
            told = {"return": episode.total_reward, "length": episode.length, **episode.facts}
            self._add(step, {f"episodes/{self._tag(episode)}{name}": value for name, value in told.items()})
        if episodes:
            self._flush(self._episodes)

    def evaluation(self, step: int, episodes: Sequence[Episode]) -> None:
        """Write an evaluation: one row per episode, numbered from 0 within its run; TensorBoard gets the means."""
        number: Counter[int] = Counter()
        told: dict[str, list[float]] = {}
        for episode in episodes:
            self._evaluations.append(self._row(step, episode) | {"episode": number[episode.run]})
            number[episode.run] += 1
            for name, value in {"return": episode.total_reward, **episode.facts}.items():
                told.setdefault(f"evaluation/{self._tag(episode)}{name}", []).append(value)
        self._add(step, {tag: sum(values) / len(values) for tag, values in told.items()})
        self._flush(self._evaluations)

    def flush(self) -> None:
        """Wait until the disk has all rows. Call it before a checkpoint, which promises the rows up to its step."""
        for table in self._tables:
            self._flush(table, sync=True)
        if self._scalars is not None:
            self._try_scalars(self._scalars.flush)

    def marks(self) -> dict[str, tuple[int, str]]:
        """Return what the tables hold, by their files' names."""
        return {table.path.name: (table.mark.rows, table.mark.sha256) for table in self._tables}

    def truncate(self, step: int, rows: Mapping[str, int | None] | None = None) -> None:
        """Drop every row after ``step``, and what is beyond the ``rows`` that a table had then; have TensorBoard do the
        same."""
        for table in self._tables:
            table.truncate_after(step, (rows or {}).get(table.path.name))
        if self._scalars is not None:
            self._scalars.purge_after(step)

    def close(self) -> None:
        """Write what waits. Safe to call twice."""
        for table in self._tables:
            self._try(table.close)
        if self._scalars is not None:
            self._try_scalars(self._scalars.close)
            self._scalars = None

    def _tag(self, episode: Episode) -> str:
        return f"run{episode.run}/" if self._many else ""

    def _row(self, step: int, episode: Episode) -> dict[str, Any]:
        row = {"step": step, "return": episode.total_reward, "length": episode.length, **episode.facts}
        return row | {"run": episode.run} if self._many else row

    def _flush(self, table: CsvTable, sync: bool = False) -> None:
        self._try(lambda: table.flush(sync))

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
            self._failing = False
        except OSError as e:
            if not self._failing:
                _log.warning("the run's tables cannot be written (%s): rows wait in memory until they can", e)
            self._failing = True

    def _add(self, step: int, values: Mapping[str, float]) -> None:
        scalars = self._scalars
        if scalars is not None:
            self._try_scalars(lambda: scalars.add(step, values))

    def _try_scalars(self, write: Callable[[], None]) -> None:
        try:
            write()
        except (OSError, ValueError) as e:  # ValueError: the writer's thread has closed its file
            _log.warning("TensorBoard files cannot be written (%s): they are given up, the tables go on", e)
            self._scalars = None


class _Scalars:
    """TensorBoard's writer, imported and opened when first needed: that takes a second or two."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._purge_step: int | None = None
        self._writer: Any = None

    def add(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._folder, purge_step=self._purge_step)
        for tag, value in values.items():
            self._writer.add_scalar(tag, float(value), step)

    def purge_after(self, step: int) -> None:
        self.close()
        self._purge_step = step + 1

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
