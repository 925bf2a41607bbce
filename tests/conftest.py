"""What all tests share: one thread each, a core each where they run side by side, a key of their own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# Runs are signed with a key of the tests, not with the developer's.
os.environ["LOCALAPPDATA" if os.name == "nt" else "XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="rlopt-tests-")

settings.register_profile("rlopt", deadline=None, derandomize=True, database=None)
settings.load_profile("rlopt")

CORE = (
    "test_config.py", "test_imports.py", "test_joint.py", "test_policy.py",
    "agents/test_every_agent.py", "agents/test_losses.py", "agents/test_td.py",
    "analysis/test_statistics.py",
    "buffers/test_replay.py", "buffers/test_rollout.py", "buffers/test_samplers.py",
    "cli/test_arguments.py",
    "envs/test_edge.py", "envs/test_spaces.py",
    "nn/test_networks.py", "nn/test_optim.py",
    "queue/test_jobs.py",
    "robust/test_mdp.py",
    "search/test_space.py",
    "training/test_checkpoint.py", "training/test_flags.py", "training/test_resume.py", "training/test_run_folder.py",
)  # fmt: skip
"""The files that ``-m core`` runs: a little of every layer, in under two minutes on two cores."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is ``core``."""
    for item in items:
        if item.path.relative_to(Path(__file__).parent).as_posix() in CORE:
            item.add_marker(pytest.mark.core)


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
