"""Worker processes: how they are started, and that they end with the trainer."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

SAFE_PATH = "PYTHONSAFEPATH"


def worker_context() -> Any:
    """Return the way in which workers are started: from a process that has imported what they need, where there is
    one."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlopt.envs.workers"])
    return context


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """Keep the current folder out of what a process that is started meanwhile imports first: a ``torch.py`` that lies
    there stands for nothing. (What the trainer finds there its workers find too, as they take over its ``sys.path``.)
    """
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        restore_safe_path(before)


def restore_safe_path(value: str | None) -> None:
    """Make the environment variable what it was before ``safe_path``."""
    os.environ.pop(SAFE_PATH, None)
    if value is not None:
        os.environ[SAFE_PATH] = value


def end_with_parent(grace: float) -> None:
    """End this worker once the trainer is gone, even by a kill: what waits for the trainer ends by itself, what is in a
    step without an end is ended ``grace`` seconds later."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            time.sleep(grace)
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
