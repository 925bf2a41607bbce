"""What a queue asks of the place where its trainings run: to submit one, to tell whether it has ended, to stop it."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rlopt.errors import RloptError
from rlopt.queue.attend import Assignment
from rlopt.queue.jobs import Job

EXECUTORS = {
    "local": "rlopt.queue.local:LocalExecutor",
    "slurm": "rlopt.queue.slurm:SlurmExecutor",
    "ray": "rlopt.queue.ray_cluster:RayExecutor",
    "submitit-local": "rlopt.queue.slurm:SubmititLocalExecutor",
}


@dataclass
class Handle:
    """A training that an executor was given."""

    id: int | str
    """The process's number, or the cluster's."""
    inner: Any
    """What the executor knows it by."""


@dataclass(frozen=True)
class Ended:
    """How a training ended."""

    code: int | None
    """Its exit code; None where whoever attended to it is gone."""
    why: str = ""

    @property
    def lost(self) -> bool:
        """Whether a signal or a lost machine ended it, rather than the training itself."""
        return self.code is None or self.code < 0 or self.code > 128

    def __str__(self) -> str:
        return self.why or f"code {self.code}"


class Executor(ABC):
    """A place where trainings run."""

    name: ClassVar[str]
    pause: ClassVar[float] = 0.5
    """Seconds between two looks."""
    workers: ClassVar[int | None] = None
    """Trainings at a time unless the user says otherwise; None: as many as there are."""
    at_once: ClassVar[bool] = False
    """Whether what is submitted begins at once."""
    takes_up: ClassVar[bool] = False
    """Whether trainings go on when the queue is killed, so that the next queue has to ``attach`` to them."""

    def __init__(self, options: Mapping[str, Any], root: Path) -> None:
        self.options, self.root = dict(options), root

    @abstractmethod
    def open(self, jobs: Sequence[Job], workers: int | None, lock: int) -> list[str]:
        """Check what the jobs need, connect, and return what the user should know. ``lock`` is the descriptor of the
        queue's lock.

        Raises:
            RloptError: it cannot run these jobs; the line says what to change.
        """

    def has_room(self, job: Job) -> bool:
        """Return whether a job may be submitted now."""
        return True

    @abstractmethod
    def submit(self, assignment: Assignment, job: Job) -> Handle:
        """Start a training, or queue it with the cluster.

        Raises:
            RloptError: it was refused.
        """

    def attach(self, known: int | str, job: Job) -> Handle | None:
        """Return the handle of what an earlier queue submitted, or None where it is gone."""
        return None

    @abstractmethod
    def poll(self, handle: Handle) -> Ended | None:
        """Return how a training ended, or None while it has not."""

    @abstractmethod
    def cancel(self, handle: Handle, signum: int) -> None:
        """Let a training save and end, as signal ``signum`` told the queue; one that has not begun never does."""

    def close(self) -> None:  # noqa: B027
        """Let go of the cluster, where there is one."""


def make_executor(name: str, options: Mapping[str, Any], root: Path) -> Executor:
    """Return an executor by its name.

    Raises:
        RloptError: an option that it lacks, a package that is not installed, or no cluster here.
    """
    module, _, cls = EXECUTORS[name].partition(":")
    executor: Executor = getattr(importlib.import_module(module), cls)(options, root)
    return executor


def refuse_options(name: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse options that an executor does not have."""
    from rlopt.config import hint

    for key in options:
        if not known:
            raise RloptError(
                f"--executor-options {key}: --executor {name} has none; say what jobs need in the jobs file"
            )
        if key not in known:
            raise RloptError(f"--executor-options {key}: --executor {name} has no such option; {hint(key, known)}")
