"""A resumable queue of long trainings: single-threaded runs side by side, each in its own folder.

    python experiments/run_queue.py experiments/jobs/sac_mujoco_100k.yaml --root runs/sac_mujoco --workers 2
    python experiments/run_queue.py experiments/jobs/sac_mujoco_100k.yaml --root runs/sac_mujoco --status

A job is an experiment with a seed; its run folder is ``ROOT/<name>/seed<seed>``, its output is in ``ROOT/logs``. Jobs
are taken seed by seed, each seed's in the order of the file.
Starting the queue again skips finished runs (evaluated at their last step, policy exported), resumes those that were
cut off and extends those that now ask for more steps. Ctrl-C and SIGTERM are passed on to every training, which saves
and ends; then the queue ends too.

A jobs file is YAML::

    defaults: {seeds: [0, 1, 2], overrides: [total_steps=110000]}
    jobs:
      - experiment: sac_hopper_v4
      - {experiment: sac_ant_v4, seeds: [0], overrides: [total_steps=500000]}  # own seeds; more overrides, which win
      - {name: hopper_rr, experiment: sac_hopper_v4, overrides: [buffer=reshuffled]}  # name: default is experiment
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from rlopt.analysis.tables import read_csv
from rlopt.types import RloptError

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Job:
    folder_name: str
    experiment: str
    seed: int
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.folder_name}/seed{self.seed}"

    @property
    def total_steps(self) -> int | None:
        """As overridden here; None leaves it to the experiment."""
        given = [o.split("=", 1)[1] for o in self.overrides if o.startswith("total_steps=")]
        return int(float(given[-1])) if given else None

    def folder(self, root: Path) -> Path:
        return root / self.folder_name / f"seed{self.seed}"

    def command(self, root: Path, script: Path) -> list[str]:
        """A new run, or the continuation of the one that is there (whose configuration only total_steps may change)."""
        folder = self.folder(root)
        start = [sys.executable, str(script)]
        if (folder / "config.yaml").is_file():
            more = [] if self.total_steps is None else [f"total_steps={self.total_steps}"]
            return [*start, f"resume={folder}", *more]
        own = [f"experiment={self.experiment}", f"seed={self.seed}", "threads=1", f"run_dir={folder}"]
        return [*start, *own, *self.overrides]


def load_jobs(path: Path) -> list[Job]:
    """The jobs of a file, seed by seed.

    Raises:
        RloptError: the file cannot be read, holds an unknown key, or names one run twice.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as e:
        raise RloptError(f"{path} cannot be read: {' '.join(str(e).split())}") from e
    if not isinstance(tree, dict) or not isinstance(tree.get("jobs"), list):
        raise RloptError(f"{path} has no list of jobs; see the head of run_queue.py for the format")
    jobs: list[Job] = []
    defaults = {"seeds": [0], "overrides": [], **tree.get("defaults", {})}
    for entry in tree["jobs"]:
        job = {**defaults, **entry}
        if unknown := set(job) - {"name", "experiment", "seeds", "overrides"}:
            raise RloptError(f"{path}: {unknown.pop()} is no key of a job; use name, experiment, seeds, overrides")
        if "experiment" not in job:
            raise RloptError(f"{path}: a job lacks its experiment")
        overrides = tuple(map(str, [*defaults["overrides"], *entry.get("overrides", [])]))
        name = str(job.get("name", job["experiment"]))
        jobs += [Job(name, job["experiment"], int(seed), overrides) for seed in job["seeds"]]
    jobs.sort(key=lambda job: job.seed)
    names = [job.name for job in jobs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise RloptError(f"{path}: {twice.pop()} is there twice; both would write to one run folder")
    return jobs


@dataclass(frozen=True)
class Progress:
    """How far a run folder is."""

    step: int = 0
    total: int | None = None
    last_return: float | None = None
    speed: float | None = None
    finished: bool = False


def progress(job: Job, root: Path) -> Progress:
    """What the run folder says; a table that is missing or empty counts as step 0."""
    folder = job.folder(root)
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except OSError:
        return Progress(total=job.total_steps)
    total = job.total_steps or int(config["total_steps"])
    evaluations, metrics = _table(folder / "evaluations.csv"), _table(folder / "metrics.csv")
    steps, returns = evaluations.get("step", []), evaluations.get("return", [])
    last = [value for step, value in zip(steps, returns, strict=True) if step == steps[-1]]
    speeds = [value for value in metrics.get("steps_per_second", [])[-10:] if value is not None]
    return Progress(
        step=max([0, *steps[-1:], *metrics.get("step", [])[-1:]]),
        total=total,
        last_return=sum(last) / len(last) if last else None,
        speed=sum(speeds) / len(speeds) if speeds else None,
        finished=total in steps and (folder / "policy").is_dir(),
    )


def _table(path: Path) -> dict[str, list[Any]]:
    return dict(read_csv(path)) if path.is_file() else {}


class Queue:
    """Works through jobs in order, ``workers`` at a time."""

    def __init__(self, jobs: Sequence[Job], root: Path, workers: int, script: Path) -> None:
        self.jobs, self.root, self.workers, self.script = list(jobs), root, workers, script
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.failed: dict[str, int] = {}
        self.stopping = False
        self.started = time.monotonic()

    def run(self) -> int:
        """0 when every job is finished, 1 when some failed, 130 after a signal.

        Raises:
            RloptError: another queue, or a training that one left behind, still works in this root.
        """
        (self.root / "logs").mkdir(parents=True, exist_ok=True)
        with open(self.root / "queue.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise RloptError(
                    f"{self.root} has a queue or its trainings at work; stop those, or use --status"
                ) from e
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._stop)
            waiting = list(self.jobs)
            while waiting or self.running:
                while waiting and len(self.running) < self.workers and not self.stopping:
                    self._start(waiting.pop(0), lock)
                if self.stopping:
                    waiting.clear()
                self._reap()
                time.sleep(0.2)
        done = sum(progress(job, self.root).finished for job in self.jobs)
        self._say(
            f"{done} of {len(self.jobs)} finished" + (f", failed: {', '.join(self.failed)}" if self.failed else "")
        )
        return 130 if self.stopping else int(bool(self.failed))

    def _start(self, job: Job, lock: IO[str]) -> None:
        state = progress(job, self.root)
        if state.finished:
            self._say(f"{job.name}: finished before")
            return
        command = job.command(self.root, self.script)
        log = self.root / "logs" / f"{job.name.replace('/', '_')}.log"
        with open(log, "ab") as output:
            output.write(f"$ {' '.join(command)}\n".encode())
            output.flush()
            # Its own session, so that a terminal's Ctrl-C arrives once, from here. The inherited lock outlives a killed
            # queue: no second one starts while a training goes on.
            self.running[job.name] = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                start_new_session=True,
                pass_fds=(lock.fileno(),),
            )
        if self.stopping:  # the signal came while it was being started
            self.running[job.name].terminate()
        self._say(f"{job.name}: {'resumed at' if state.step else 'started at'} step {state.step}")
        self._record()

    def _reap(self) -> None:
        for name, process in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[name]
            job = next(job for job in self.jobs if job.name == name)
            state = progress(job, self.root)
            if state.finished:
                self._say(f"{name}: finished, return {state.last_return:.1f}")
            elif self.stopping:
                self._say(f"{name}: stopped at step {state.step}")
            else:
                self.failed[name] = code
                self._say(f"{name}: ended with code {code} at step {state.step}; see {self.root / 'logs'}")
            self._record()

    def _stop(self, number: int, _frame: object) -> None:
        self.stopping = True
        self._say(f"{signal.Signals(number).name}: the {len(self.running)} running trainings save and end")
        for process in self.running.values():
            if process.poll() is None:
                process.send_signal(number)

    def _record(self) -> None:
        text = json.dumps({"running": {n: p.pid for n, p in self.running.items()}, "failed": self.failed})
        temporary = self.root / "queue.json.new"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.root / "queue.json")

    def _say(self, text: str) -> None:
        print(f"[{(time.monotonic() - self.started) / 60:7.1f} min] {text}", flush=True)


def status(jobs: Sequence[Job], root: Path) -> str:
    """A table of every job's state."""
    path = root / "queue.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"running": {}, "failed": {}}
    lines = [f"{'job':<44}{'state':<13}{'step':>9}{'of':>9}{'return':>10}{'steps/s':>9}"]
    for job in jobs:
        state = progress(job, root)
        if state.finished:
            word = "finished"
        elif job.name in known["running"] and _alive(known["running"][job.name]):
            word = "running"
        elif job.name in known["failed"]:
            word = f"failed ({known['failed'][job.name]})"
        else:
            word = "interrupted" if job.folder(root).is_dir() else "waiting"
        numbers = [_cell(state.total, ".0f"), _cell(state.last_return, ".1f"), _cell(state.speed, ".0f")]
        lines.append(f"{job.name:<44}{word:<13}{state.step:>9}{numbers[0]:>9}{numbers[1]:>10}{numbers[2]:>9}")
    return "\n".join(lines)


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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run a list of trainings, resumably.")
    parser.add_argument("jobs", type=Path, help="YAML file, see the head of this script")
    parser.add_argument("--root", type=Path, required=True, help="folder of the run folders and logs")
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time, each on one core (default 2)")
    parser.add_argument("--status", action="store_true", help="print how far each job is, and end")
    parser.add_argument("--script", type=Path, default=REPOSITORY / "train.py", help="what trains (default train.py)")
    given = parser.parse_args(arguments)
    try:
        jobs = load_jobs(given.jobs)
        if given.status:
            print(status(jobs, given.root.resolve()))
            return 0
        return Queue(jobs, given.root.resolve(), given.workers, given.script.resolve()).run()
    except RloptError as e:
        print(e, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
