"""Trainings as jobs of Slurm, through submitit; and the same on this machine, to try it."""

from __future__ import annotations

import contextlib
import math
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlopt.errors import RloptError, needed
from rlopt.queue import attend
from rlopt.queue.attend import Assignment, Attendant
from rlopt.queue.executors import Ended, Executor, Handle, refuse_options
from rlopt.queue.jobs import Job

OPTIONS = (
    "partition", "account", "qos", "constraint", "gres", "nodelist", "exclude", "exclusive", "comment", "mail_type",
    "mail_user", "time", "mem", "mem_per_cpu", "mem_per_gpu", "gpus_per_node", "cpus_per_task", "signal_delay_s",
    "setup", "srun_args", "additional_parameters",
)  # fmt: skip
"""Those of sbatch, as submitit names them."""
SAME = {"cpus": "cpus_per_task", "gpus": "gpus_per_node", "memory_gb": "mem", "hours": "time"}
"""A job's needs, and the options that say the same for all jobs."""
SAVING = 300
"""Seconds before the time limit at which a training is told to save, unless signal_delay_s says otherwise."""


class SlurmExecutor(Executor):
    """Jobs of Slurm. At its time limit, or when Slurm wants its machine, a training saves and Slurm queues it again;
    all that Slurm does not queue again is queued by rlopt."""

    name = "slurm"
    pause = 5.0
    takes_up = True
    GRACE = 30.0
    """Seconds in which the result of an ended job may still appear on a network disk."""

    def __init__(self, options: Mapping[str, Any], root: Path) -> None:
        super().__init__(options, root)
        refuse_options(self.name, options, OPTIONS)
        self._refuse_absent()
        if "time" in options and (type(options["time"]) is not int or options["time"] < 1):
            raise RloptError(f"--executor-options time={options['time']}: give whole minutes, such as time=720")
        self.submitit = needed("submitit", "slurm", f"--executor {self.name}")
        needed("cloudpickle", "slurm", "submitit").register_pickle_by_value(attend)
        self.folder = root / "submitit" / "%j"
        self.ended: dict[int | str, float] = {}
        """When jobs without a result were first seen to have ended."""

    def _refuse_absent(self) -> None:
        missing = [name for name in ("sbatch", "srun", "scancel", "squeue", "sacct") if shutil.which(name) is None]
        if missing:
            raise RloptError(
                f"--executor slurm: {missing[0]} is not here; start the queue where one submits to Slurm, "
                "or take --executor local or ray"
            )

    def open(self, jobs: Sequence[Job], workers: int | None, lock: int) -> list[str]:
        for need, option in SAME.items():
            given = [job for job in jobs if getattr(job.needs, need) not in (None, getattr(type(job.needs)(), need))]
            if option in self.options and given:
                raise RloptError(
                    f"--executor-options {option}: {given[0].name} says needs: {{{need}: "
                    f"{getattr(given[0].needs, need):g}}}; leave one of them out"
                )
        if "time" not in self.options and (job := next((job for job in jobs if job.needs.hours is None), None)):
            raise RloptError(
                f"{job.name} has no time limit, which Slurm wants; write needs: {{hours: 12}} under defaults: in the "
                "jobs file, or --executor-options time=720 (minutes)"
            )
        # sacct is asked once for all jobs, twice a minute instead of every ten minutes.
        self.submitit.SlurmJob.watcher = type(self.submitit.SlurmJob.watcher)(delay_s=30)
        return []

    def _minutes(self, job: Job) -> float:
        return int(self.options.get("time") or math.ceil(60 * (job.needs.hours or 0)))

    def parameters(self, job: Job) -> dict[str, Any]:
        """Return the parameters of sbatch for one job."""
        minutes, needs = self._minutes(job), job.needs
        found: dict[str, Any] = {
            "job_name": re.sub(r"[^\w.+-]", "_", job.name), "time": minutes, "cpus_per_task": needs.cpus,
            "signal_delay_s": int(min(SAVING, 15 * minutes)),
        }  # fmt: skip
        if needs.gpus:
            found["gpus_per_node"] = needs.gpus
        if needs.memory_gb is not None:
            found["mem"] = f"{math.ceil(1024 * needs.memory_gb)}M"
        return found | self.options

    def submit(self, assignment: Assignment, job: Job) -> Handle:
        executor = self.submitit.SlurmExecutor(self.folder, max_num_timeout=100)
        try:
            executor.update_parameters(**self.parameters(job))
            submitted = executor.submit(Attendant(assignment))
        except (RuntimeError, ValueError, TypeError, OSError) as e:
            raise RloptError(f"sbatch refused it: {' '.join(str(e).split()) or type(e).__name__}") from e
        return Handle(submitted.job_id, submitted)

    def attach(self, known: int | str, job: Job) -> Handle | None:
        listed = subprocess.run(["squeue", "-h", "-j", str(known)], capture_output=True, text=True, check=False)
        if listed.returncode or not listed.stdout.strip():
            return None
        return Handle(known, self.submitit.SlurmJob(self.folder, str(known)))

    def poll(self, handle: Handle) -> Ended | None:
        job = handle.inner
        if not job.done():
            return None
        if not job.paths.result_pickle.exists():
            since = self.ended.setdefault(handle.id, time.monotonic())
            if time.monotonic() - since < self.GRACE:
                return None
            return Ended(None, f"Slurm: {job.state}" if self.name == "slurm" else "its worker is gone")
        errors = self.submitit.core.utils.UncompletedJobError
        try:
            return Ended(int(job.result()))
        except errors as e:  # the attendant itself failed
            lines = [line for line in str(e).splitlines() if line.strip() and not line.startswith(("You can", "---"))]
            return Ended(1, lines[-1].strip() if lines else "its attendant failed")

    def cancel(self, handle: Handle, signum: int) -> None:
        for how in ("--state=PENDING", "--signal=TERM"):
            subprocess.run(["scancel", how, str(handle.id)], capture_output=True, check=False)


class SubmititLocalExecutor(SlurmExecutor):
    """The same through submitit's own processes on this machine: for trying a jobs file, time limits included."""

    name = "submitit-local"
    pause = 0.5
    workers = 2
    takes_up = False
    GRACE = 10.0

    def _refuse_absent(self) -> None:
        if self.options:
            refuse_options(self.name, self.options, ())

    def submit(self, assignment: Assignment, job: Job) -> Handle:
        executor = self.submitit.LocalExecutor(self.folder, max_num_timeout=100)
        minutes = 60 * (job.needs.hours or 0)
        executor.update_parameters(
            timeout_min=minutes, gpus_per_node=job.needs.gpus, signal_delay_s=int(min(SAVING, 15 * minutes))
        )
        with _interrupts_ignored():
            submitted = executor.submit(Attendant(assignment, tied=True))
        return Handle(submitted.job_id, submitted)

    def cancel(self, handle: Handle, signum: int) -> None:
        handle.inner._process.terminate()  # the controller forwards SIGTERM, and nothing else


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Start processes that a terminal's Ctrl-C does not reach: submitit would kill what they run a second later."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
