"""Runs of every agent, killed at random moments, resumed, killed again, and compared with those that never stopped."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from rlopt.training.setup import begin, resume
from tests.faults.outcomes import Outcome, digest
from tests.training.test_resume import CASES, config, run_to_end

LIMIT, FIRST = 120.0, 600.0
"""Seconds that one process may take, and the first one of a case, which may have to compile."""


def run(count: int, chance: random.Random, folder: Path) -> Iterator[Outcome]:
    """``count`` runs, the cases in turn, each killed once to three times. Every process is forked from this one, which
    has imported everything."""
    cases = [case for case in CASES if case != "async-workers"]  # whose workers a forked process cannot start
    chance.shuffle(cases)
    known: dict[str, tuple[float, str]] = {}
    for i in range(count):
        case = cases[i % len(cases)]
        where = folder / f"{i:03d}-{case}"
        where.mkdir(parents=True)
        if case not in known:
            begun = time.monotonic()
            code = _wait(_fork(partial(_to_end, case, where / "straight"), where / "straight.log"), FIRST)
            if code != 0:
                yield _failed(code, case, where / "straight.log")
                continue
            known[case] = time.monotonic() - begun, digest(where / "straight")
        yield _one(case, where / "run", chance, *known[case])


def _one(case: str, path: Path, chance: random.Random, seconds: float, wanted: str) -> Outcome:
    kills, log = 0, path.with_name("run.log")
    for _ in range(chance.choice([1, 1, 1, 2, 2, 3])):
        child = _fork(partial(_to_end, case, path), log)
        time.sleep(chance.uniform(0.0, 0.9 * seconds))
        os.kill(child, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    if (code := _wait(_fork(partial(_to_end, case, path), log))) != 0:
        return _failed(code, case, log)
    found = digest(path)
    return Outcome("equal" if found == wanted else "silent", f"{case} ({kills} kills)", str(path))


def _to_end(case: str, path: Path) -> None:
    """Begin the run, or go on with it."""
    begun = (path / "config.yaml").exists()
    run_to_end(resume(path, {}) if begun else begin(config(case, path)))


def _fork(work: Callable[[], None], log: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        work()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _failed(code: int, case: str, log: Path) -> Outcome:
    if code == -signal.SIGKILL:
        return Outcome("effect", case, f"no end; {_tail(log)}")
    return Outcome("traceback", case, _tail(log))


def _wait(child: int, limit: float = LIMIT) -> int:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _tail(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:]) if log.exists() else ""
