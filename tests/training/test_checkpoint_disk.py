"""Neither a failing disk nor a kill harms the last good checkpoint."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rlopt import files
from rlopt.runs.checkpoint import CheckpointFailed, Checkpoints
from rlopt.state import load_state, save_state
from tests.training.saved_runs import Ring, assert_holds, names, save, segments


class FailingDisk:
    """Lets ``allowed`` calls through, then fails one, or all that follow."""

    def __init__(self, allowed: int, error: int, for_good: bool) -> None:
        self.left, self.error, self.for_good, self.failed = allowed, error, for_good, False

    def __call__(self, function: Callable[..., Any], partial: bool = False) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            self.left -= 1
            if self.left == -1 or (self.for_good and self.left < -1):
                self.failed = True
                if partial:
                    file, data = arguments
                    file.write(data[: len(data) // 2])
                raise OSError(self.error, os.strerror(self.error))
            return function(*arguments, **keywords)

        return wrapped


@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
def test_an_error_at_any_call_leaves_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, for_good: bool
) -> None:
    """Every write, fsync, rename and mkdir of a save fails in turn."""
    real = {"_write": files._write, "fsync": os.fsync, "replace": os.replace, "mkdir": Path.mkdir}
    calls = 0
    while True:
        folder = tmp_path / str(calls)
        ring, checkpoints = Ring(10, rows=8), Checkpoints(folder)
        save(checkpoints, 1, ring)
        before = Ring(10, rows=8)
        ring.add(5)
        disk = FailingDisk(calls, errno.ENOSPC if calls % 2 else errno.EIO, for_good)
        with monkeypatch.context() as patch:
            patch.setattr(files, "_write", disk(real["_write"], partial=True))
            patch.setattr(os, "fsync", disk(real["fsync"]))
            patch.setattr(os, "replace", disk(real["replace"]))
            patch.setattr(Path, "mkdir", disk(real["mkdir"]))
            if not disk_fails(checkpoints, ring):
                assert not disk.failed
                break
        assert disk.failed
        assert not list(folder.glob(".*.tmp"))
        renamed = (folder / "step-000000000002").exists()  # only the fsync of the parent came after that
        assert_holds(folder, 2 if renamed else 1, ring if renamed else before)
        if not renamed:
            assert segments(folder) == names((0, 8))
        ring.add(1)
        save(checkpoints, 3, ring)  # the disk has space again
        assert_holds(folder, 3, ring)
        shutil.rmtree(folder)
        calls += 1
    assert calls > 12


def disk_fails(checkpoints: Checkpoints, ring: Ring) -> bool:
    try:
        save(checkpoints, 2, ring)
    except CheckpointFailed as e:
        assert "what was saved before is intact" in str(e) and "\n" not in str(e)
        return True
    return False


@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("call", range(5))
def test_best_survives_an_error_at_any_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, for_good: bool
) -> None:
    """Three writes (header and tensor, structure) and two renames."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_best(1, partial(save_state, state={"x": torch.zeros(4)}))
    disk = FailingDisk(call, errno.ENOSPC, for_good)
    with monkeypatch.context() as patch:
        patch.setattr(files, "_write", disk(files._write, partial=True))
        patch.setattr(os, "replace", disk(os.replace))
        with pytest.raises(CheckpointFailed, match="best agent of step 2"):
            checkpoints.save_best(2, partial(save_state, state={"x": torch.ones(4)}))
    if not for_good:
        assert not list(tmp_path.glob(".*"))  # the old one is back in its place already
    Checkpoints(tmp_path)
    assert load_state(tmp_path / "best")["x"].tolist() == [0.0] * 4


def test_rows_of_a_kept_checkpoint_are_never_overwritten(tmp_path: Path) -> None:
    """A run that starts over in the folder writes rows of the same numbers; until it has saved, the old one holds."""
    save(Checkpoints(tmp_path), 1, Ring(10, rows=6))
    again = Ring(10)
    again.add(6, offset=0.5)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(TypeError):
        checkpoints.save(2, {"oops": object()}, {"replay": again})
    assert_holds(tmp_path, 1, Ring(10, rows=6))
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 2, again)
    assert segments(tmp_path) == [*names((0, 6)), names((0, 6))[0] + ".2"]
    assert_holds(tmp_path, 2, again)
    shutil.rmtree(tmp_path / "step-000000000002")
    assert_holds(tmp_path, 1, Ring(10, rows=6))


def test_a_real_limit_on_file_size_is_reported(tmp_path: Path) -> None:
    """The operating system itself refuses the write, part of the way through a file."""
    resource = pytest.importorskip("resource")
    ring, checkpoints = Ring(10, rows=8), Checkpoints(tmp_path)
    save(checkpoints, 1, ring)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointFailed, match="step 2 could not be written"):
            checkpoints.save(2, {"x": torch.zeros(100_000)}, {"replay": ring})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_holds(tmp_path, 1, ring)


KILLS = """
import os, pathlib, random, signal, sys, time
from functools import partial
import torch
sys.path.insert(0, sys.argv[2])
from tests.training.saved_runs import Ring, run_state
from rlopt.runs.checkpoint import Checkpoints
from rlopt.state import save_state

def train():
    checkpoints, ring, step = Checkpoints(pathlib.Path(sys.argv[1])), Ring(50), 0
    loaded = checkpoints.load()
    if loaded is not None:
        ring.rows_written, step = loaded.state["rows"], loaded.step
        checkpoints.restore_logs(loaded, {"replay": ring})
    while True:
        step += 1
        ring.add(7)
        checkpoints.save(step, run_state(step, ring), {"replay": ring})
        best = {"step": step, "w": torch.full((100,), float(step))}
        checkpoints.save_best(step, partial(save_state, state=best))

torch.set_num_threads(1)
chance = random.Random(0)
for _ in range(8):
    if (child := os.fork()) == 0:
        try:
            train()
        finally:
            os._exit(1)
    time.sleep(chance.uniform(0.05, 0.25))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    print("killed", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are POSIX signals")
def test_kill_at_any_moment_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    last = 0
    arguments = [sys.executable, "-c", KILLS, str(tmp_path), str(Path(__file__).parents[2])]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        for _ in range(8):
            assert process.stdout.readline() == "killed\n"
            loaded = Checkpoints(tmp_path).load()
            assert not list(tmp_path.glob("damaged-*"))
            if loaded is not None:
                assert loaded.step >= last
                last = loaded.step
                assert_holds(tmp_path, last, Ring(50, rows=7 * last))
                if (tmp_path / "best").exists():
                    best = load_state(tmp_path / "best")
                    assert best["w"].tolist() == [float(best["step"])] * 100
            process.stdin.write("\n")
            process.stdin.flush()
    assert process.returncode == 0
    assert last > 2  # on a busy machine few saves fit between two kills
