"""The run folder: one writer, nothing overwritten, and tables that survive crashes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rlopt.analysis.tables import read_csv
from rlopt.runs import csv_table, run_folder
from rlopt.runs.csv_table import CsvTable
from rlopt.runs.run_folder import Lock, RunFolder, default_run_dir, versions
from rlopt.types import RloptError

CONFIG = {
    "seed": 3,
    "lr": 1e-5,
    "agent": {"name": "sac", "hidden": [256, 256], "clip": None, "word": "1e-3"},
    "on": "ja",
}


def test_create_writes_configuration_and_versions(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "a" / "b", CONFIG) as run:
        assert yaml.safe_load((run.path / "config.yaml").read_text()) == CONFIG
        assert run.config() == CONFIG
        found = json.loads((run.path / "versions.json").read_text())
    assert {"rlopt", "python", "torch", "numpy", "gymnasium", "platform", "cpu", "threads"} <= set(found)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert run.version_changes() == []


def test_a_folder_that_holds_a_run_is_never_overwritten(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, CONFIG).close()
    with pytest.raises(RloptError, match=rf"already holds a run.* resume={tmp_path}, or name another run_dir"):
        RunFolder.create(tmp_path, {"seed": 4})
    assert RunFolder(tmp_path).config() == CONFIG
    RunFolder.open(tmp_path).close()  # the refusal has let the lock go


def test_a_run_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, CONFIG).close()
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").mkdir()  # as on a read-only disk, where the superuser fails too
    with pytest.raises(RloptError, match=rf"^{tmp_path} cannot be written: .*; free some space, or mend its rights$"):
        RunFolder.open(tmp_path)


@pytest.mark.parametrize("left", ["metrics.csv", "checkpoints"])
def test_remains_of_a_run_count_as_one(tmp_path: Path, left: str) -> None:
    (tmp_path / left).mkdir()
    with pytest.raises(RloptError, match="already holds a run"):
        RunFolder.create(tmp_path, CONFIG)


def test_mistakes_about_folders_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RloptError, match=r"cannot be written: .*name another run_dir"):
        RunFolder.create(tmp_path / "file", CONFIG)
    with pytest.raises(RloptError, match="holds no run"):
        RunFolder.open(tmp_path / "nowhere")
    with pytest.raises(RloptError, match="holds no run"):
        RunFolder(tmp_path).config()
    for text in ("a: [", "- 1", "!!python/object/apply:os.system ['true']", "[" * 5000):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(RloptError, match=r"config\.yaml") as info:
            RunFolder(tmp_path).config()
        assert "\n" not in str(info.value)


def test_only_plain_values_are_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="plain values only"):
        RunFolder.create(tmp_path / "run", {"path": tmp_path})
    assert not (tmp_path / "run").exists()


def test_resume_may_replace_the_configuration(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, CONFIG).close()
    with RunFolder.open(tmp_path) as run:
        run.write_config({**CONFIG, "total_steps": 20})
    assert RunFolder(tmp_path).config() == {**CONFIG, "total_steps": 20}


def test_version_changes_are_told(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, CONFIG) as run:
        old = versions() | {"torch": "1.0"}
        run.versions_path.write_text(json.dumps(old))
        assert run.version_changes() == [f"torch 1.0 → {versions()['torch']}"]
        run.versions_path.write_text("[")
        assert run.version_changes() == ["versions.json cannot be read"]


def test_default_run_dir_is_safe_and_unique(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "20260102-030405")
    first = default_run_dir("sac", "HalfCheetah-v5", 3, root=tmp_path)
    assert first.relative_to(tmp_path).parts == ("sac-HalfCheetah-v5-s3-20260102-030405",)
    assert default_run_dir("sac", "HalfCheetah-v5", 3, root=tmp_path).name == f"{first.name}-2"
    atari = default_run_dir("dqn", "ALE/Pong-v5", 0, root=tmp_path)
    assert atari.name == "dqn-ALE-Pong-v5-s0-20260102-030405"
    outside = default_run_dir("dqn", "../../my.mod:Env-v0", 0, root=tmp_path)
    assert outside.parent == tmp_path and outside.name.startswith("dqn-my.mod-Env-v0-s0")
    RunFolder.create(first, CONFIG).close()


def test_default_run_dir_is_under_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_run_dir("sac", "Pendulum-v1", 0).parent == Path("runs")


# One writer

HOLD = """
import os, sys
from rlopt.runs.run_folder import RunFolder
run = RunFolder.open(sys.argv[1])
worker = os.fork()
if worker == 0:
    import time
    time.sleep(60)
    os._exit(0)
print(os.getpid(), worker, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forked workers")
def test_two_processes_never_write_one_folder(tmp_path: Path) -> None:
    """The second is told who the first is; a kill releases the lock, although a forked worker outlives the killed."""
    RunFolder.create(tmp_path, CONFIG).close()
    arguments = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid, worker = map(int, process.stdout.readline().split())
        try:
            for attempt in (RunFolder.open, lambda path: RunFolder.create(path, CONFIG)):
                with pytest.raises(RloptError, match=f"being written by process {pid}; wait for it, stop it, or"):
                    attempt(tmp_path)
            assert RunFolder(tmp_path).config() == CONFIG  # readers need no lock
            process.kill()
            process.wait()
            RunFolder.open(tmp_path).close()
            os.kill(worker, 0)  # it was still there
        finally:
            os.kill(worker, signal.SIGKILL)


def test_one_process_opens_a_run_once_at_a_time(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, CONFIG)
    with pytest.raises(RloptError, match=f"by process {os.getpid()}"):
        RunFolder.open(tmp_path)
    run.close()
    run.close()
    RunFolder.open(tmp_path).close()


@pytest.mark.skipif(sys.platform == "win32", reason="flock")
def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    Lock(tmp_path).release()
    assert "has no locks" in caplog.text


# Tables


def test_a_table_reads_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    table = CsvTable(path, ("step", "x"))
    assert path.read_text() == "step,x\n"
    table.append({"step": 1, "x": 0.1})
    table.append({"step": np.int64(2), "x": np.float32(0.1)})
    table.append({"x": float("nan"), "step": 3})
    table.append({"step": 4, "x": 5e-324})
    table.append({"step": 5})
    table.append({"step": 6, "x": 'a, "b"'})
    table.append({"step": 7, "x": True})
    assert path.read_text() == "step,x\n"
    table.close()
    table.close()
    assert path.read_text() == 'step,x\n1,0.1\n2,0.10000000149011612\n3,nan\n4,5e-324\n5,\n6,"a, ""b"""\n7,1\n'
    back = read_csv(path)
    assert back["step"] == [1, 2, 3, 4, 5, 6, 7]
    assert str(back["x"]) == str([0.1, 0.10000000149011612, float("nan"), 5e-324, None, 'a, "b"', 1])


def test_columns_that_appear_later_extend_the_header(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    table = CsvTable(path, ("step", "speed"))
    table.append({"step": 1, "speed": 2.0})
    table.flush()
    table.append({"step": 2, "speed": 2.0, "loss": 0.5})
    table.append({"step": 3, "speed": 2.0, "alpha": 0.25})
    table.flush(sync=True)
    table.append({"step": 4, "alpha": 0.5, "loss": 0.25, "speed": 1.0})
    table.close()
    assert path.read_text() == "step,speed,loss,alpha\n1,2.0,,\n2,2.0,0.5,\n3,2.0,,0.25\n4,1.0,0.25,0.5\n"
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def test_a_table_is_continued_and_a_torn_line_dropped(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("step,x,extra\n1,2.0,3.0\n2,4.")
    table = CsvTable(path, ("step", "x", "y"))
    table.append({"step": 3, "x": 1.0})
    table.close()
    assert path.read_text() == "step,x,extra,y\n1,2.0,3.0,\n3,1.0,,\n"


def test_truncation_makes_the_table_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    table = CsvTable(path, ("step", "x"))
    for step in (5, 10):
        table.append({"step": step, "x": step / 2})
    table.flush()
    before = path.read_bytes()
    table.append({"step": 15, "x": 7.5, "loss": 1.0})
    table.append({"step": 20, "x": 10.0, "loss": 2.0})
    table.close()
    with open(path, "ab") as file:
        file.write(b"25,1")  # the crash
    table = CsvTable(path, ("step", "x"))
    table.truncate_after(10)
    assert path.read_bytes() == before
    table.append({"step": 15, "x": 7.5, "loss": 1.0})
    table.close()
    assert path.read_text() == "step,x,loss\n5,2.5,\n10,5.0,\n15,7.5,1.0\n"


def test_truncation_keeps_all_rows_of_the_step_and_drops_garbage(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"step,x\n1,1.0\n1,2.0\n\0\0\0\0,\n2,3.0,4.0\nx,1.0\n2,5.0\n")
    table = CsvTable(path, ("step", "x"))
    table.truncate_after(1)
    table.close()
    assert path.read_text() == "step,x\n1,1.0\n1,2.0\n"


def test_rows_wait_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.csv"
    table = CsvTable(path, ("step", "x"))
    table.append({"step": 1, "x": 1.5})
    table.flush()
    real_write = os.write
    calls = 0

    def write_half_then_fail(fd: int, data: memoryview) -> int:
        nonlocal calls
        calls += 1
        if calls % 2:
            return real_write(fd, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(csv_table.os, "write", write_half_then_fail)
        for step in (2, 3):
            table.append({"step": step, "x": 0.5})
            with pytest.raises(OSError, match="No space"):
                table.flush()
            assert path.read_text() == "step,x\n1,1.5\n"
        patch.setattr("rlopt.files.os.replace", lambda *_: write_half_then_fail(-1, memoryview(b"")))
        calls = 1
        table.append({"step": 4, "new": 1.0})
        with pytest.raises(OSError, match="No space"):
            table.flush()
        assert path.read_text() == "step,x\n1,1.5\n"
    table.close()
    assert path.read_text() == "step,x,new\n1,1.5,\n2,0.5,\n3,0.5,\n4,,1.0\n"


def test_reading_a_table_that_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("step,return\n1,-200.5\n2,inf\n3,-1")
    assert read_csv(path) == {"step": [1, 2], "return": [-200.5, float("inf")]}
    path.write_text("")
    assert read_csv(path) == {}
    path.write_text("step,return\n")
    assert read_csv(path) == {"step": [], "return": []}


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with pytest.raises(RloptError, match="cannot be read"):
        read_csv(path)
    path.write_text("step,return\n1,2\n1,2,3\n")
    with pytest.raises(RloptError, match="line 3: 3 cells under 2 columns"):
        read_csv(path)
    path.write_text("step,step\n1,2\n")
    with pytest.raises(RloptError, match="names a column twice"):
        read_csv(path)
