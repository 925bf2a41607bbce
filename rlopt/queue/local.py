"""Trainings as processes of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlopt.errors import RloptError
from rlopt.queue.attend import Assignment, start
from rlopt.queue.executors import Ended, Executor, Handle, refuse_options
from rlopt.queue.jobs import Job


class LocalExecutor(Executor):
    """Processes side by side, each with GPUs of its own where its job needs some."""

    name = "local"
    pause = 0.2
    workers = 2
    at_once = True

    def __init__(self, options: Mapping[str, Any], root: Path) -> None:
        super().__init__(options, root)
        refuse_options(self.name, options, ())
        self.free: list[str] = []
        self.taken: dict[int, list[str]] = {}

    def open(self, jobs: Sequence[Job], workers: int | None, lock: int) -> list[str]:
        self.lock = lock
        most = max(job.needs.gpus for job in jobs)
        if most:
            self.free = visible_gpus()
        if most > len(self.free):
            name = next(job.name for job in jobs if job.needs.gpus == most)
            raise RloptError(
                f"{name} needs {most} GPUs of its own and this machine has {len(self.free)} to give; take them out of "
                "needs, set CUDA_VISIBLE_DEVICES, or take --executor slurm or ray"
            )
        notes = []
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        at_once = min(workers or len(jobs), len(jobs))
        if (cpus := at_once * max(job.needs.cpus for job in jobs)) > cores:
            notes.append(f"{at_once} trainings at a time need up to {cpus} cores; there are {cores}: fewer --workers?")
        unwatched = [name for name in ("memory_gb", "hours") if any(getattr(job.needs, name) for job in jobs)]
        if unwatched:
            notes.append(f"local processes are not limited: needs of {' and '.join(unwatched)} are for clusters")
        return notes

    def has_room(self, job: Job) -> bool:
        return job.needs.gpus <= len(self.free)

    def submit(self, assignment: Assignment, job: Job) -> Handle:
        gpus = [self.free.pop(0) for _ in range(job.needs.gpus)]
        own = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
        # The inherited lock outlives a killed queue: no second one starts while a training goes on.
        process = start(assignment, env=own, pass_fds=(self.lock,))
        self.taken[process.pid] = gpus
        return Handle(process.pid, process)

    def poll(self, handle: Handle) -> Ended | None:
        process: subprocess.Popen[bytes] = handle.inner
        code = process.poll()
        if code is None:
            return None
        self.free += self.taken.pop(process.pid, [])
        return Ended(code)

    def cancel(self, handle: Handle, signum: int) -> None:
        if handle.inner.poll() is None:
            handle.inner.send_signal(signum)


def visible_gpus() -> list[str]:
    """Return this machine's GPUs as ``CUDA_VISIBLE_DEVICES`` names them; no torch is needed to count them."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return done.stdout.split() if done.returncode == 0 else []
