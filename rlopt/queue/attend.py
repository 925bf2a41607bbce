"""What starts a training, on this machine or another, and attends to it until it has ended.

Clusters get it by value (cloudpickle), so that a worker needs nothing of rlopt before the training itself: this module
imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Assignment:
    """Whatever a machine must know to train a job."""

    begin: tuple[str, ...]
    """The command of a new run."""
    go_on: tuple[str, ...]
    """The command that continues the run that is there."""
    folder: str
    """The run folder, on a disk that all machines see."""
    log: str
    """The file that the training's output is added to."""
    cwd: str
    tied: str
    """``tied.py``."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables on top of the machine's own."""


def start(assignment: Assignment, before: Sequence[str] = (), **how: Any) -> subprocess.Popen[bytes]:
    """Start a training, or its continuation where its run folder has been begun. ``before`` is put before the command,
    ``how`` are further arguments of Popen."""
    begun = os.path.isfile(os.path.join(assignment.folder, "config.yaml"))
    command = assignment.go_on if begun else assignment.begin
    environment = {**os.environ, **assignment.environment, **how.pop("env", {})}
    with open(assignment.log, "ab") as output:
        output.write(f"$ {' '.join(command)}  # on {socket.gethostname()}\n".encode())
        output.flush()
        return subprocess.Popen(
            [*before, *command],
            cwd=assignment.cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C arrives once, from whoever attends
            **how,
        )


class Attendant:
    """Trains a job where a cluster calls it: passes on SIGTERM and SIGINT, so that the training saves and ends, and
    returns its exit code (negative, or 128 and more, where a signal ended it)."""

    PATIENCE = 600.0
    """Seconds that a run folder may still be written by a training that lost its attendant and saves."""

    def __init__(self, assignment: Assignment, tied: bool = False) -> None:
        self.assignment, self.tied = assignment, tied
        self.child: subprocess.Popen[bytes] | None = None
        self.stopping = False

    def __call__(self) -> int:
        """Train to the end, or until told to stop."""
        if self.tied and sys.platform == "linux":  # to what started this process, as tied.py does for the training
            import ctypes

            ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        before = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._wait_for_folder()
            if self.stopping:
                return 128 + signal.SIGTERM
            tie = [sys.executable, "-I", self.assignment.tied, str(os.getpid())]
            self.child = start(self.assignment, tie)
            if self.stopping:  # told while it was being started
                self.child.terminate()
            # Not ``wait``: it holds a lock, on which ``checkpoint`` would wait for ever.
            while (code := self.child.poll()) is None:
                time.sleep(0.2)
            return code
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self, *_: object) -> None:
        """Tell the training once to save and end; a second signal would end it at once."""
        if not self.stopping:
            self.stopping = True
            if self.child is not None:
                self.child.terminate()

    def checkpoint(self) -> Any:
        """Let the training save and end, and return what submitit submits in its place: Slurm takes the machine away,
        or the time limit is near. Called inside of a signal handler."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        if self.child is not None:
            with contextlib.suppress(ChildProcessError):  # it has ended, and ``poll`` knows it
                os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(type(self)(self.assignment, self.tied))

    def _wait_for_folder(self) -> None:
        deadline = time.monotonic() + self.PATIENCE
        while (
            not self.stopping
            and time.monotonic() < deadline
            and _is_held(os.path.join(self.assignment.folder, ".lock"))
        ):
            time.sleep(0.5)


def attend(attendant: Attendant) -> int:
    """Call an attendant: what Ray takes is a function."""
    return attendant()


def _is_held(lock: str) -> bool:
    """Return whether a process writes the run folder of ``lock``."""
    try:
        with open(lock, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or a disk without locks
        return False
    return False
