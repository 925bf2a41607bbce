"""Independent pieces of one update side by side on a few cores.

Splitting every small matrix product between threads pays for a barrier each time; giving each thread whole products of
its own, and a handful of meetings per update, is what two cores are good at. Each lane computes with one thread, so
the numbers do not depend on how many lanes there are.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch

log = logging.getLogger(__name__)

Job = Callable[[], Any]


class Lanes:
    """``count`` lanes, the calling thread among them. A lane that waits sleeps: a busy machine loses no time to it."""

    def __init__(self, count: int | None = None) -> None:
        """``count``: None takes torch's number of threads at this moment."""
        self.count = max(1, torch.get_num_threads() if count is None else count)
        self._inboxes: list[SimpleQueue[Job | None]] = []
        self._process = os.getpid()
        weakref.finalize(self, _end, self._inboxes).atexit = False

    def run(self, jobs: Sequence[Job]) -> list[Any]:
        """Return what each job returns, in order. Job i runs in lane i mod ``count``; the first error is raised again
        here, once every lane has stopped."""
        lanes = min(self.count, len(jobs))
        if lanes <= 1:
            return [job() for job in jobs]
        call = _Call(jobs, lanes)
        with self._single_threaded(lanes):
            for lane in range(1, lanes):
                self._inboxes[lane - 1].put(partial(call.work_and_tell, lane))
            call.work(0)
            for _ in range(1, lanes):
                call.done.get()
        if call.error is not None:
            raise call.error
        return call.results

    def share(self, work: Job) -> None:
        """Call ``work`` in every lane at about the same time, and return once the caller's own call has.

        For compiled work that hands out its pieces itself (``products.claim``) and returns when all are done:
        a lane that comes late finds nothing left, and nobody waits for it.
        """
        if self.count == 1:
            work()
            return
        with self._single_threaded(self.count):
            for inbox in self._inboxes:
                inbox.put(work)
            try:
                work()
            except BaseException:  # an interrupt: what the others have begun must not meet the next call
                self.run([lambda: None] * self.count)
                raise

    @contextmanager
    def _single_threaded(self, lanes: int) -> Iterator[None]:
        """The lanes' threads exist, and torch computes with one thread in this one."""
        if self._process != os.getpid():  # threads do not survive a fork
            self._inboxes.clear()
            self._process = os.getpid()
        while len(self._inboxes) < lanes - 1:
            self._inboxes.append(_start_lane())
        with one_thread():
            yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Call:
    """One ``run``: what to do and what came of it."""

    def __init__(self, jobs: Sequence[Job], lanes: int) -> None:
        self.jobs, self.lanes = jobs, lanes
        self.results: list[Any] = [None] * len(jobs)
        self.error: BaseException | None = None
        self.done: SimpleQueue[None] = SimpleQueue()
        self.grad = torch.is_grad_enabled()  # the mode belongs to a thread, so it has to travel

    def work(self, lane: int) -> None:
        try:
            for i in range(lane, len(self.jobs), self.lanes):
                self.results[i] = self.jobs[i]()
        except BaseException as e:  # told by the caller's thread
            self.error = self.error or e

    def work_and_tell(self, lane: int) -> None:
        with torch.set_grad_enabled(self.grad):
            self.work(lane)
        self.done.put(None)


def _end(inboxes: list[SimpleQueue[Job | None]]) -> None:
    """Let the threads of lanes that nobody uses any more return."""
    for inbox in inboxes:
        inbox.put(None)


def _start_lane() -> SimpleQueue[Job | None]:
    inbox: SimpleQueue[Job | None] = SimpleQueue()

    def live() -> None:
        torch.set_num_threads(1)  # a setting of each thread; the caller's is put back
        while (job := inbox.get()) is not None:
            try:
                job()
            except Exception:  # of ``share``: the caller makes the same call and raises; a dead lane would block it
                log.debug("a lane's work failed", exc_info=True)
            del job

    threading.Thread(target=live, name="rlopt-lane", daemon=True).start()
    return inbox
