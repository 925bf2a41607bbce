"""What all tests share: one thread each, a core each where they run side by side, a key of their own."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import pytest
import torch
from hypothesis import settings

# Runs are signed with a key of the tests, not with the developer's.
os.environ["LOCALAPPDATA" if os.name == "nt" else "XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="rlopt-tests-")

settings.register_profile("rlopt", deadline=None, derandomize=True, database=None)
settings.load_profile("rlopt")


def pytest_configure(config: pytest.Config) -> None:
    """Give every worker of pytest-xdist cores of its own: threads that wait for each other's cores cost ten times."""
    worker, count = os.environ.get("PYTEST_XDIST_WORKER"), os.environ.get("PYTEST_XDIST_WORKER_COUNT")
    if worker and count and hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[int(worker.removeprefix("gw")) % len(allowed) :: int(count)])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let every worker take a stretch of the tests, whose modules share what they build, and steal when it is done."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Undo what a training before this test has set."""
    torch.set_num_threads(1)
