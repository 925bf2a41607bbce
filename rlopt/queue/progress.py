"""How far the jobs of a queue are, from what their run folders say."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlopt.analysis.tables import read_csv
from rlopt.errors import RloptError
from rlopt.queue.jobs import Job


@dataclass(frozen=True)
class RunProgress:
    """How far a run folder is."""

    step: int = 0
    total: int | None = None
    last_return: float | None = None
    speed: float | None = None
    """Steps per second, lately."""
    finished: bool = False


def progress(job: Job, root: Path) -> RunProgress:
    """Return what the run folder says; a table that is missing or empty counts as step 0."""
    folder = job.folder(root)
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        total = job.total_steps or int(config["total_steps"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):  # none yet, or damaged: its training tells of it
        return RunProgress(total=job.total_steps)
    try:
        return _told(folder, total)
    except (TypeError, ValueError):  # words where numbers were: one run must not stop the queue of all
        return RunProgress(total=total)


def _told(folder: Path, total: int) -> RunProgress:
    evaluations, metrics = _table(folder / "evaluations.csv"), _table(folder / "metrics.csv")
    steps, returns = evaluations.get("step", []), evaluations.get("return", [])
    last = [value for step, value in zip(steps, returns, strict=True) if step == steps[-1]]
    speeds = [value for value in metrics.get("steps_per_second", [])[-10:] if value is not None]
    return RunProgress(
        step=max([0, *steps[-1:], *metrics.get("step", [])[-1:]]),
        total=total,
        last_return=sum(last) / len(last) if last else None,
        speed=sum(speeds) / len(speeds) if speeds else None,
        finished=total in steps and (folder / "policy").is_dir(),
    )


def _table(path: Path) -> dict[str, list[Any]]:
    """A table, or nothing where it is damaged."""
    with suppress(RloptError):
        return dict(read_csv(path)) if path.is_file() else {}
    return {}


@dataclass
class QueueRecord:
    """What ``ROOT/queue.json`` says about a queue, also after it was killed."""

    executor: str = "local"
    running: dict[str, Any] = field(default_factory=dict)
    """What is being trained: the process's number, or the cluster's."""
    submitted: dict[str, Any] = field(default_factory=dict)
    """What a cluster has not begun yet."""
    failed: dict[str, Any] = field(default_factory=dict)
    """How what failed ended."""

    def write(self, root: Path) -> None:
        """Write it so that no reader sees half of it."""
        temporary = root / "queue.json.new"
        temporary.write_text(json.dumps(vars(self)), encoding="utf-8")
        temporary.replace(root / "queue.json")

    @classmethod
    def read(cls, root: Path) -> QueueRecord:
        """Return what was written last; of a queue that never ran, nothing.

        Raises:
            RloptError: the file is damaged.
        """
        path = root / "queue.json"
        if not path.is_file():
            return cls()
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
            if not all(isinstance(part, dict) for part in (found.running, found.submitted, found.failed)):
                raise ValueError("it names no jobs")
            return found
        except (TypeError, ValueError, OSError) as e:
            raise RloptError(f"{path} is damaged ({e}); remove it, the run folders are what counts") from e


def status(jobs: Sequence[Job], root: Path) -> str:
    """Return a table of every job's state, and how many are in each."""
    record = QueueRecord.read(root)
    lines = [f"{'job':<44}{'state':<13}{'step':>9}{'of':>9}{'return':>10}{'steps/s':>9}"]
    states: list[str] = []
    for job in jobs:
        state = progress(job, root)
        word = "finished" if state.finished else _unfinished(job, root, record)
        states.append(word.partition(" ")[0])
        numbers = [_cell(state.total, ".0f"), _cell(state.last_return, ".1f"), _cell(state.speed, ".0f")]
        lines.append(f"{job.name:<44}{word:<13}{state.step:>9}{numbers[0]:>9}{numbers[1]:>10}{numbers[2]:>9}")
    lines.append(f"{len(jobs)} jobs: " + ", ".join(f"{states.count(word)} {word}" for word in dict.fromkeys(states)))
    return "\n".join(lines)


def _unfinished(job: Job, root: Path, record: QueueRecord) -> str:
    for word, known in (("running", record.running), ("submitted", record.submitted)):
        if job.name in known and (record.executor != "local" or _alive(known[job.name])):
            return word
    if job.name in record.failed:
        return f"failed ({record.failed[job.name]})"
    return "interrupted" if job.folder(root).is_dir() else "waiting"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
