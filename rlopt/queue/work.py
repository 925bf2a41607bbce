"""The queue: gives jobs to an executor, sees how they end, and starts again what was lost."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import rlopt
from rlopt.errors import RloptError
from rlopt.queue import tied
from rlopt.queue.attend import Assignment
from rlopt.queue.executors import Executor, Handle
from rlopt.queue.jobs import Job
from rlopt.queue.progress import QueueRecord, progress

TRIES = 3
"""How often a training may be lost without having got a step further."""
TOLD = 5
"""Lines of a failed training's output that are shown."""


@dataclass
class Running:
    """A job that an executor has."""

    job: Job
    handle: Handle
    log_size: int
    """Of the job's log before it was submitted."""
    begun: bool
    """Whether it is being trained, rather than waiting with a cluster."""


class Queue:
    """Works through jobs in order, ``workers`` at a time (None: as many as the executor takes).

    ``program`` is what the words of a training are given to, as ``python -m rlopt train``.
    """

    def __init__(
        self, jobs: Sequence[Job], root: Path, executor: Executor, workers: int | None, program: Sequence[str]
    ) -> None:
        self.jobs, self.root, self.executor, self.program = list(jobs), root, executor, list(program)
        self.workers = executor.workers if workers is None else workers
        self.waiting: list[Job] = []
        self.running: dict[str, Running] = {}
        self.failed: dict[str, int | str] = {}
        self.losses: dict[str, tuple[int, int]] = {}
        """The furthest step at which a job was lost, and how often without getting further."""
        self.stopping = 0
        """The signal that ended the queue."""
        self.submitted = False
        self.out = sys.stdout
        self.started = time.monotonic()

    def run(self) -> int:
        """Work through the jobs; return 0 when every one is finished, 1 when some failed, 130 after a signal.

        Raises:
            RloptError: another queue, or a training that one left behind, still works in this root; or the executor
                cannot run these jobs.
        """
        try:
            (self.root / "logs").mkdir(parents=True, exist_ok=True)
            lock = open(self.root / "queue.lock", "w")  # noqa: SIM115
        except OSError as e:
            raise RloptError(f"--root {self.root} cannot be written: {e.strerror}") from e
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise RloptError(
                    f"{self.root} has a queue or its trainings at work; stop those, or use --status"
                ) from e
            before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                self._work(lock.fileno())
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
        done = sum(progress(job, self.root).finished for job in self.jobs)
        failed = f", failed: {', '.join(self.failed)}" if self.failed else ""
        self._say(f"{done} of {len(self.jobs)} finished{failed}")
        return 130 if self.stopping else int(bool(self.failed))

    def _work(self, lock: int) -> None:
        left = self._left_behind()
        for note in self.executor.open(self.jobs, self.workers, lock):
            self._say(note)
        for number in (signal.SIGINT, signal.SIGTERM):  # not before: Ray takes SIGTERM for itself when it connects
            signal.signal(number, self._stop)
        try:
            for job in self.jobs:
                if progress(job, self.root).finished:
                    self._say(f"{job.name}: finished before")
                elif not self._attached(job, left):
                    self.waiting.append(job)
            told = False
            while self.running or (self.waiting and not self.stopping):
                if self.stopping and not told:
                    told = True
                    self._pass_on()
                self._fill()
                for name in list(self.running):
                    self._look(name)
                self._sleep(told)
        finally:
            self.executor.close()

    def _left_behind(self) -> dict[str, int | str]:
        """What an earlier queue gave to a cluster that goes on without it."""
        record = QueueRecord.read(self.root)
        left = {**record.running, **record.submitted}
        if left and record.executor == "slurm" and self.executor.name != "slurm":
            raise RloptError(
                f"{self.root} has {len(left)} jobs with Slurm from an earlier queue; go on with --executor slurm, or "
                f"scancel them and remove {self.root / 'queue.json'}"
            )
        return left if record.executor == self.executor.name and self.executor.takes_up else {}

    def _attached(self, job: Job, left: dict[str, int | str]) -> bool:
        handle = self.executor.attach(left[job.name], job) if job.name in left else None
        if handle is None:
            return False
        self.running[job.name] = Running(job, handle, self._log_size(job), begun=job.folder(self.root).is_dir())
        self._say(f"{job.name}: found again as {handle.id}")
        return True

    def _fill(self) -> None:
        """Submit what there is room for; a job that must wait for a GPU lets others pass."""
        for job in list(self.waiting):
            if self.stopping or (self.workers is not None and len(self.running) >= self.workers):
                return
            if not self.executor.has_room(job):
                continue
            self.waiting.remove(job)
            self._submit(job)

    def _submit(self, job: Job) -> None:
        step, log_size = progress(job, self.root).step, self._log_size(job)
        try:
            handle = self.executor.submit(self._assignment(job), job)
        except RloptError as e:
            if not self.submitted:  # what is wrong with the first one is wrong with all
                raise
            self.failed[job.name] = "not submitted"
            self._say(f"{job.name}: {e}")
            return
        self.submitted = True
        begun = self.executor.at_once
        self.running[job.name] = Running(job, handle, log_size, begun)
        verb = ("resumed" if step else "started") if begun else f"submitted as {handle.id}"
        self._say(f"{job.name}: {verb} at step {step}")
        self._record()

    def _assignment(self, job: Job) -> Assignment:
        new, more = job.words(self.root)
        # The same rlopt as this one, and one thread per core: idle ones that spin would take the others' cores.
        package = str(Path(next(iter(rlopt.__path__))).resolve().parent)
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        return Assignment(
            begin=(*self.program, *new),
            go_on=(*self.program, *more),
            folder=str(job.folder(self.root)),
            log=str(job.log(self.root)),
            cwd=os.getcwd(),
            tied=str(Path(tied.__file__).resolve()),
            environment={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": path},
        )

    def _look(self, name: str) -> None:
        at = self.running[name]
        if not at.begun and self._log_size(at.job) > at.log_size:
            at.begun = True
            self._record()
        ended = self.executor.poll(at.handle)
        if ended is None:
            return
        del self.running[name]
        state = progress(at.job, self.root)
        if state.finished:
            self._say(
                f"{name}: finished" + (f", return {state.last_return:.1f}" if state.last_return is not None else "")
            )
        elif self.stopping:
            self._say(f"{name}: stopped at step {state.step}")
        elif ended.lost and self._may_try_again(name, state.step):
            self.waiting.insert(0, at.job)
            self._say(f"{name}: lost at step {state.step} ({ended}); goes on from its last checkpoint")
        else:
            self.failed[name] = ended.code if ended.code is not None else ended.why
            often = f" for the {TRIES}rd time without getting further" if ended.lost else ""
            self._say(f"{name}: ended with {ended} at step {state.step}{often}; see {at.job.log(self.root)}")
            for line in self._last_lines(at):
                self._say(f"    {line}")
        self._record()

    def _may_try_again(self, name: str, step: int) -> bool:
        furthest, often = self.losses.get(name, (-1, 0))
        often = 1 if step > furthest else often + 1
        self.losses[name] = (max(step, furthest), often)
        return often < TRIES

    def _last_lines(self, at: Running) -> list[str]:
        """The end of what the training has said since it was submitted."""
        try:
            with at.job.log(self.root).open("rb") as file:
                file.seek(max(at.log_size, os.fstat(file.fileno()).st_size - 10_000))
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        lines = [line.rstrip() for line in text.replace("\r", "\n").splitlines()]
        return [line[:300] for line in lines if line and not line.startswith("$ ")][-TOLD:]

    def _log_size(self, job: Job) -> int:
        try:
            return job.log(self.root).stat().st_size
        except OSError:
            return 0

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self.stopping = self.stopping or number

    def _pass_on(self) -> None:
        self._say(f"{signal.Signals(self.stopping).name}: the {len(self.running)} running trainings save and end")
        for at in self.running.values():
            self.executor.cancel(at.handle, self.stopping)

    def _sleep(self, told: bool) -> None:
        """Wait for the next look, but not for long once a signal has come."""
        until = time.monotonic() + self.executor.pause
        while (left := until - time.monotonic()) > 0 and bool(self.stopping) == told:
            time.sleep(min(0.2, left))

    def _record(self) -> None:
        begun = {name: at.handle.id for name, at in self.running.items() if at.begun}
        waiting = {name: at.handle.id for name, at in self.running.items() if not at.begun}
        try:
            QueueRecord(self.executor.name, begun, waiting, self.failed).write(self.root)
        except OSError as e:  # a full disk, say: those who train save and wait by themselves
            self._say(f"{self.root / 'queue.json'} cannot be written ({e.strerror}); the queue goes on")

    def _say(self, text: str) -> None:
        print(f"[{(time.monotonic() - self.started) / 60:7.1f} min] {text}", file=self.out, flush=True)
