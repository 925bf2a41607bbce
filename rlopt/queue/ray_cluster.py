"""Trainings as tasks of Ray."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlopt.errors import RloptError, needed
from rlopt.queue import attend
from rlopt.queue.attend import Assignment, Attendant
from rlopt.queue.executors import Ended, Executor, Handle, refuse_options
from rlopt.queue.jobs import Job


class RayExecutor(Executor):
    """Tasks of Ray. A task whose machine or worker is lost is submitted again by the queue and not by Ray
    (``max_retries=0``): so losses are told and bounded in one place, and a killed training is one of them."""

    name = "ray"

    def __init__(self, options: Mapping[str, Any], root: Path) -> None:
        super().__init__(options, root)
        refuse_options(self.name, options, ("address",))
        self.ray = needed("ray", "ray", "--executor ray")
        self.ray.cloudpickle.register_pickle_by_value(attend)
        self.undo = contextlib.ExitStack()

    def open(self, jobs: Sequence[Job], workers: int | None, lock: int) -> list[str]:
        # Ray prints what its machines say to sys.stdout, from a thread, whatever it is told: so not here.
        notices = self.root / "logs" / "ray.log"
        self.undo.enter_context(contextlib.redirect_stdout(self.undo.enter_context(notices.open("a", buffering=1))))
        address = self.options.get("address")
        try:
            self.ray.init(
                address=address, log_to_driver=False, logging_level="error", namespace="rlopt",
                **({"include_dashboard": False} if address is None and "RAY_ADDRESS" not in os.environ else {}),
            )  # fmt: skip
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as e:
            self.undo.close()
            where = f"at {address}" if address else "here"
            raise RloptError(f"--executor ray: no cluster answers {where} ({' '.join(str(e).split())})") from e
        notes = [f"what Ray's machines say is in {notices}"]
        there = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        for job in jobs:
            wanted = {"CPU": job.needs.cpus, "GPU": job.needs.gpus, "memory": _bytes(job)}
            if not any(all(node.get(name, 0) >= value for name, value in wanted.items()) for node in there):
                notes.append(f"no machine of the cluster has what {job.name} needs ({job.needs}): it waits for one")
                break
        if any(job.needs.hours for job in jobs):
            notes.append("Ray has no time limits: needs of hours are for Slurm")
        return notes

    def submit(self, assignment: Assignment, job: Job) -> Handle:
        task = self.ray.remote(attend.attend).options(
            name=job.name, num_cpus=job.needs.cpus, num_gpus=job.needs.gpus, memory=_bytes(job) or None, max_retries=0
        )
        reference = task.remote(Attendant(assignment))
        return Handle(reference.task_id().hex(), reference)

    def poll(self, handle: Handle) -> Ended | None:
        ready, _ = self.ray.wait([handle.inner], timeout=0)
        if not ready:
            return None
        errors = self.ray.exceptions
        try:
            return Ended(int(self.ray.get(handle.inner)))
        except errors.TaskCancelledError:
            return Ended(None, "cancelled")
        except errors.RayTaskError as e:  # the attendant itself failed
            return Ended(1, str(e).strip().splitlines()[-1])
        except errors.RayError as e:
            return Ended(None, f"Ray: {type(e).__name__}")

    def cancel(self, handle: Handle, signum: int) -> None:
        self.ray.cancel(handle.inner)  # SIGINT for the attendant; one that waits for a machine never starts

    def close(self) -> None:
        self.ray.shutdown()
        self.undo.close()


def _bytes(job: Job) -> int:
    return int((job.needs.memory_gb or 0) * 2**30)
