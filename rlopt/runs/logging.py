"""What a run writes down: CSV tables, and what trackers show of them."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rlopt.analysis.tables import read_csv
from rlopt.runs.csv_table import CsvTable, Mark, check_table
from rlopt.runs.display import Display
from rlopt.runs.json_lines import JsonLines
from rlopt.runs.run_folder import RunFolder
from rlopt.runs.trackers import open_trackers
from rlopt.types import Episode, RloptError

__all__ = ["Display", "Logger"]

METRICS = ("step", "steps_per_second", "env_seconds", "learn_seconds")

TIMES = {"steps_per_second": "time/fps", "env_seconds": "time/env_seconds", "learn_seconds": "time/learn_seconds"}
"""What trackers call a column of ``metrics.csv`` that is no number of ``train/``."""
WINDOW = 100
"""Episodes that ``rollout/ep_rew_mean`` is the mean of, as in Stable-Baselines3 and Monitor."""
_log = logging.getLogger(__name__)


class Logger:
    """Writes ``metrics.csv``, ``episodes.csv``, ``evaluations.csv`` (and ``trajectories.jsonl`` of policies that write)
    into a run folder, and gives their numbers to trackers.

    A disk that is full or fails is reported once and does not stop the run: rows of the tables wait until they can be
    written, a tracker is given up.

    Args:
        folder: the run, whose writer this process is.
        tensorboard: whether to write TensorBoard files too.
        resume_step: the step of the checkpoint that the run goes on from; rows after it are dropped.
        marks: what ``marks`` gave when that checkpoint was saved: a table that differs is told.
        num_runs: with more than one, episodes and evaluations name their ``run``.
        trackers: names of ``rlopt.runs.trackers.TRACKERS``, besides TensorBoard.
    """

    def __init__(
        self,
        folder: RunFolder,
        tensorboard: bool = True,
        resume_step: int | None = None,
        *,
        marks: Mapping[str, tuple[int, str]] | None = None,
        num_runs: int = 1,
        trackers: Sequence[str] = (),
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
        self._trajectories = JsonLines(folder.trajectories)
        self._many = num_runs > 1
        self._failing = False
        # A kill leaves rows after the checkpoint, which trackers have too: a resume would send them again.
        seen = {"train": _last_step(folder.metrics), "eval": _last_step(folder.evaluations)} if trackers else {}
        if resume_step is not None:
            self.truncate(resume_step, rows)
        self._trackers = []
        if tensorboard or trackers:
            self._trackers = open_trackers(
                folder.path,
                folder.config() if folder.config_path.is_file() else {},
                tensorboard=tensorboard,
                names=trackers,
                step=resume_step,
                seen=seen,
            )
        self._recent: dict[int, deque[Episode]] = defaultdict(lambda: deque(maxlen=WINDOW))
        if self._trackers and resume_step is not None:
            told = self._retrace(folder)
            for tracker in self._trackers:
                for kind, step, values in told:
                    if tracker.replay_from is not None and step > tracker.replay_from:
                        tracker.scalars(kind, step, values)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row of ``metrics.csv``; new names become new columns."""
        self._metrics.append({"step": step, **values})
        if self._trackers:
            self._show("train", step, self._told(step, values))
        self._flush(self._metrics)

    def episodes(self, step: int, episodes: Sequence[Episode]) -> None:
        """Write training episodes that ended at ``step``, one row each; trackers get means with the next metrics."""
        for episode in episodes:
            self._episodes.append(self._row(step, episode))
            self._recent[episode.run].append(episode)
        if episodes:
            self._flush(self._episodes)

    def evaluation(self, step: int, episodes: Sequence[Episode]) -> None:
        """Write an evaluation: one row per episode, numbered from 0 within its run; trackers get the means."""
        number: Counter[int] = Counter()
        of_runs: dict[int, list[Episode]] = defaultdict(list)
        for episode in episodes:
            self._evaluations.append(self._row(step, episode) | {"episode": number[episode.run]})
            number[episode.run] += 1
            of_runs[episode.run].append(episode)
        self._show("eval", step, self._evaluated(of_runs))
        self._flush(self._evaluations)

    def trajectories(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write episodes of a policy that writes, one line each, as they were seen, said and paid."""
        for line in lines:
            self._trajectories.append({"step": step, **line})
        self._flush(self._trajectories)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Show a PNG file in the trackers."""
        for tracker in self._trackers:
            tracker.picture(step, name, path)

    def film(self, step: int, name: str, path: Path) -> None:
        """Show an mp4 file in the trackers."""
        for tracker in self._trackers:
            tracker.film(step, name, path)

    def flush(self) -> None:
        """Wait until the disk has all rows. Call it before a checkpoint, which promises the rows up to its step."""
        for table in (*self._tables, self._trajectories):
            self._flush(table, sync=True)
        for tracker in self._trackers:
            tracker.flush()

    def marks(self) -> dict[str, tuple[int, str]]:
        """Return what the tables hold, by their files' names."""
        return {table.path.name: (table.mark.rows, table.mark.sha256) for table in self._tables}

    def truncate(self, step: int, rows: Mapping[str, int | None] | None = None) -> None:
        """Drop every row after ``step``, and what is beyond the ``rows`` that a table had then."""
        for table in self._tables:
            table.truncate_after(step, (rows or {}).get(table.path.name))
        self._trajectories.truncate_after(step)

    def close(self) -> None:
        """Write what waits. Safe to call twice."""
        for table in self._tables:
            self._try(table.close)
        self._flush(self._trajectories, sync=True)
        for tracker in self._trackers:
            tracker.close()

    def _told(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Return what trackers get of a row of ``metrics.csv``, and of the episodes before it."""
        told = {"time/total_timesteps": float(step)}
        for name, value in values.items():
            if name != "episode_return":  # ``rollout/ep_rew_mean`` tells it
                told[TIMES.get(name, f"train/{name}")] = value
        return told | self._means("rollout", "ep_rew_mean", "ep_len_mean", self._recent)

    def _evaluated(self, of_runs: Mapping[int, Sequence[Episode]]) -> dict[str, float]:
        return self._means("eval", "mean_reward", "mean_ep_length", of_runs)

    def _retrace(self, folder: RunFolder) -> list[tuple[str, int, dict[str, float]]]:
        """Bring the episodes that means are of to where they stood, and return, in order, all that trackers got on the
        way: kind of row, step, values. What a damaged table lacks is left out."""
        told: list[tuple[str, int, dict[str, float]]] = []
        waiting = deque(_episodes_of(folder.episodes))
        for step, values in _rows_of(folder.metrics):
            while waiting and waiting[0][0] <= step:
                episode = waiting.popleft()[1]
                self._recent[episode.run].append(episode)
            told.append(("train", step, self._told(step, values)))
        for _, episode in waiting:
            self._recent[episode.run].append(episode)
        for step, group in groupby(_episodes_of(folder.evaluations), key=lambda row: row[0]):
            of_runs: dict[int, list[Episode]] = defaultdict(list)
            for _, episode in group:
                of_runs[episode.run].append(episode)
            told.append(("eval", step, self._evaluated(of_runs)))
        return sorted(told, key=lambda row: row[1])

    def _means(
        self, group: str, reward: str, length: str, of_runs: Mapping[int, Sequence[Episode]]
    ) -> dict[str, float]:
        """Return the means of all episodes by their tags, and of several runs each run's below ``run0/`` … as well."""
        found = {f"{group}/": [e for episodes in of_runs.values() for e in episodes]}
        if self._many:
            found |= {f"{group}/run{run}/": list(episodes) for run, episodes in sorted(of_runs.items())}
        told: dict[str, list[float]] = {}
        for prefix, episodes in found.items():
            for e in episodes:
                facts = {"success_rate" if name == "success" else name: value for name, value in e.facts.items()}
                for name, value in {reward: e.total_reward, length: e.length, **facts}.items():
                    told.setdefault(prefix + name, []).append(float(value))
        return {tag: sum(values) / len(values) for tag, values in told.items()}

    def _row(self, step: int, episode: Episode) -> dict[str, Any]:
        row = {"step": step, "return": episode.total_reward, "length": episode.length, **episode.facts}
        return row | {"run": episode.run} if self._many else row

    def _flush(self, table: CsvTable | JsonLines, sync: bool = False) -> None:
        self._try(lambda: table.flush(sync))

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
            self._failing = False
        except OSError as e:
            if not self._failing:
                _log.warning("the run's tables cannot be written (%s): rows wait in memory until they can", e)
            self._failing = True

    def _show(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.scalars(kind, step, values)


def _last_step(table: Path) -> int:
    """Return the last step of a table, -1 where it has none."""
    try:
        return max((step for step in read_csv(table).get("step", []) if isinstance(step, int)), default=-1)
    except RloptError:
        return -1


def _rows_of(table: Path) -> list[tuple[int, dict[str, float]]]:
    """Return the rows of ``metrics.csv``, each with its step; none where it is damaged."""
    try:
        columns: dict[str, list[Any]] = dict(read_csv(table))
        steps = columns.pop("step")
        return [
            (int(step), {name: float(values[i]) for name, values in columns.items() if values[i] is not None})
            for i, step in enumerate(steps)
        ]
    except (RloptError, KeyError, TypeError, ValueError):
        return []


def _episodes_of(table: Path) -> list[tuple[int, Episode]]:
    """Return the episodes of ``episodes.csv`` or ``evaluations.csv``, each with its step; none where it is damaged."""
    try:
        columns: dict[str, list[Any]] = dict(read_csv(table))
        facts = [name for name in columns if name not in ("step", "episode", "return", "length", "run")]
        steps = columns["step"]
        rows = zip(columns["return"], columns["length"], columns.get("run", [0] * len(steps)), strict=True)
        episodes = [
            Episode(float(reward), int(length), int(run), {n: v for n in facts if (v := columns[n][i]) is not None})
            for i, (reward, length, run) in enumerate(rows)
        ]
        return [(int(step), episode) for step, episode in zip(steps, episodes, strict=True)]
    except (RloptError, KeyError, TypeError, ValueError):
        return []
