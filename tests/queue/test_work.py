"""The queue on this machine, with a stand-in for the training; the last test trains for real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlopt.cli import main
from rlopt.queue.jobs import load_jobs
from rlopt.queue.progress import QueueRecord, progress
from rlopt.types import RloptError
from tests.cli.command_line import ROOT, refused
from tests.queue.training import command, jobs_file, until


@pytest.fixture(autouse=True)
def _signals_stay_as_they_were() -> Any:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    assert before == {number: signal.getsignal(number) for number in before}


def states(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main([*words, "--status"]) == 0
    return [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:-1]]


def test_every_job_runs_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs, root = jobs_file(tmp_path, {"experiment": "a", "seeds": [0, 3]}, {"experiment": "b"}), tmp_path / "root"
    assert main(command(jobs, root)) == 0
    folder = root / "a" / "seed3"
    own = f"experiment=a seed=3 threads=1 run_dir={folder} total_steps=20 OMP=1\n"
    assert (folder / "commands").read_text() == own
    assert "3 of 3 finished" in capsys.readouterr().out
    # Again: nothing is left to do.
    assert main(command(jobs, root)) == 0
    assert (folder / "commands").read_text() == own
    assert "a/seed3: finished before" in capsys.readouterr().out


def test_more_steps_extend_a_finished_run(tmp_path: Path) -> None:
    root = tmp_path / "root"
    main(command(jobs_file(tmp_path, {"experiment": "a"}), root))
    longer = jobs_file(tmp_path, {"experiment": "a", "overrides": ["total_steps=50"]})
    assert main(command(longer, root)) == 0
    folder = root / "a" / "seed0"
    assert (folder / "commands").read_text().splitlines()[1] == f"resume={folder} total_steps=50 OMP=1"
    assert (folder / "evaluations.csv").read_text().splitlines()[-1] == "50,0,25.0,9"
    # The shorter list still counts it as finished.
    assert progress(load_jobs(jobs_file(tmp_path, {"experiment": "a"}))[0], root).finished


def test_a_run_that_was_cut_off_is_not_finished(tmp_path: Path) -> None:
    root = tmp_path / "root"
    jobs = jobs_file(tmp_path, {"experiment": "a"})
    main(command(jobs, root))
    (job,) = load_jobs(jobs)
    folder = job.folder(root)
    (folder / "policy").rmdir()
    assert not progress(job, root).finished
    (folder / "policy").mkdir()
    (folder / "evaluations.csv").write_text("step,episode,return,length\n10,0,5.0,9\n20,0,1")  # torn
    assert not progress(job, root).finished
    assert progress(job, root).step == 10
    for damaged in ("step,episode\n1,2,3\n", "step,episode,return,length\nx,0,5.0,9\n", "step,return\n1,\n"):
        (folder / "evaluations.csv").write_text(damaged)  # the queue of all others goes on
        assert progress(job, root).step == 0
    for damaged in ("[]", '{"running": [1]}', "{"):
        (root / "queue.json").write_text(damaged)
        with pytest.raises(RloptError, match="is damaged"):
            QueueRecord.read(root)


def test_a_disk_that_takes_no_record_stops_no_queue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, root: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(QueueRecord, "write", full)
    assert main(command(jobs_file(tmp_path, {"experiment": "a"}), tmp_path / "root")) == 0
    assert "queue.json cannot be written (No space left on device); the queue goes on" in capsys.readouterr().out


def test_a_failing_job_tells_its_last_lines_and_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs, root = jobs_file(tmp_path, {"experiment": "breaks"}, {"experiment": "b"}), tmp_path / "root"
    assert main(command(jobs, root, "--workers", "1")) == 1
    said = capsys.readouterr().out
    assert "breaks/seed0: ended with code 1 at step 0" in said
    assert "    this one breaks\n" in said
    assert len((root / "breaks" / "seed0" / "commands").read_text().splitlines()) == 1, "tried once"
    assert (root / "b" / "seed0" / "policy").is_dir()
    main([*command(jobs, root), "--status"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["breaks/seed0", "failed", "(1)", "0"]
    assert lines[2].split() == ["b/seed0", "finished", "20", "20", "10.0", "-"]
    assert lines[3] == "2 jobs: 1 failed, 1 finished"


def test_a_killed_training_goes_on_from_its_checkpoint_but_not_for_ever(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs, root = jobs_file(tmp_path, {"experiment": "dies_once"}, {"experiment": "dies"}), tmp_path / "root"
    assert main(command(jobs, root)) == 1
    said = capsys.readouterr().out
    assert "dies_once/seed0: lost at step 10 (code -9); goes on from its last checkpoint" in said
    assert "dies_once/seed0: resumed at step 10" in said
    folder = root / "dies_once" / "seed0"
    assert [line.split("=")[0] for line in (folder / "commands").read_text().splitlines()] == ["experiment", "resume"]
    assert (folder / "evaluations.csv").read_text().splitlines()[1:] == ["10,0,5.0,9", "20,0,10.0,9"]
    assert "dies/seed0: ended with code -9 at step 10 for the 3rd time without getting further" in said
    assert len((root / "dies" / "seed0" / "commands").read_text().splitlines()) == 3


def test_sigterm_reaches_the_trainings_and_a_new_queue_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    jobs = jobs_file(tmp_path, {"experiment": "waits", "seeds": [0, 1]}, {"experiment": "b", "seeds": [2]})
    words = command(jobs, root, "--workers", "2")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "rlopt", *words], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        until((root / "waits" / "seed0" / "waiting").exists)
        until((root / "waits" / "seed1" / "waiting").exists)
        assert states(words, capsys) == ["running", "running", "waiting"]
        assert "has a queue or its trainings at work" in refused(words, capsys)  # one queue at a time
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "waits/seed1: stopped at step 10" in output
    assert not (root / "b").exists()
    found = json.loads((root / "queue.json").read_text())
    assert found == {"executor": "local", "running": {}, "submitted": {}, "failed": {}}
    assert states(words, capsys) == ["interrupted", "interrupted", "waiting"]
    (root / "waits").rename(root / "quick")
    again = jobs_file(tmp_path, {"experiment": "quick", "seeds": [0, 1]}, {"experiment": "b", "seeds": [2]})
    assert main(command(again, root)) == 0
    assert (root / "quick" / "seed1" / "commands").read_text().splitlines()[1].startswith("resume=")
    assert (root / "quick" / "seed1" / "evaluations.csv").read_text().splitlines()[1:] == ["10,0,5.0,9", "20,0,10.0,9"]


def test_gpus_are_handed_out_and_what_cannot_matter_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    needs = {"gpus": 1, "cpus": 3, "hours": 2}
    root = tmp_path / "root"
    jobs = jobs_file(tmp_path, {"experiment": "a", "seeds": [0, 1, 2], "needs": needs}, {"experiment": "b"})
    assert main(command(jobs, root, "--workers", "4")) == 0
    gpus = [(root / "a" / f"seed{i}" / "gpus").read_text() for i in range(3)]
    assert gpus[:2] == ["4", "7"] and gpus[2] in ("4", "7")
    assert (root / "b" / "seed0" / "gpus").read_text() == "4,7"
    assert "threads=3" in (root / "a" / "seed0" / "commands").read_text()
    said = capsys.readouterr().out
    assert "local processes are not limited: needs of hours are for clusters" in said
    jobs = jobs_file(tmp_path, {"name": "c", "needs": {"gpus": 3}})
    line = refused(command(jobs, root), capsys)
    assert line.startswith("c/seed0 needs 3 GPUs of its own and this machine has 2 to give")


def test_a_real_training_is_checked_and_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = [
        "env=Pendulum-v1", "total_steps=40", "agent.warmup_steps=20", "agent.batch_size=8", "agent.network.hidden=[8]",
        "eval.every=null", "eval.episodes=1", "log.tensorboard=false", "buffer.capacity=100", "agent.fused=false",
    ]  # fmt: skip
    jobs, root = jobs_file(tmp_path, {"name": "pendulum", "overrides": short}), tmp_path / "with 'space'"
    assert main(["queue", str(jobs), "--root", str(root)]) == 0
    assert "pendulum/seed0: finished, return -" in capsys.readouterr().out
    (job,) = load_jobs(jobs)
    assert progress(job, root).finished
