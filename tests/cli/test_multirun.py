"""``rlopt train --multirun``: each job is the run that it would be alone, and told as one would type it."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from rlopt.cli import main
from tests.cli.command_line import SHORT


def test_a_job_of_a_multirun_equals_the_same_run_alone_whatever_the_others_do(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep" / "0").mkdir(parents=True)
    (tmp_path / "sweep" / "0" / "config.yaml").write_text("{}\n")  # job 0 finds a run where its own should go
    assert main(["train", *SHORT, "-m", "seed=3,4", "run_dir=sweep"]) == 2
    said = capfd.readouterr()
    assert said.err.startswith("error: sweep/0 already holds a run")
    assert said.err.count("\n") == 1
    ends = [line.split("  ")[1] for line in said.out.splitlines() if line.startswith("  ")]
    assert ends == ["ended with code 2", "done"]
    head, row = said.out.splitlines()[-2:]
    assert head.startswith("rank  IQM [95 % interval]")
    assert (row.split()[0], row.split()[-3:]) == ("1", ["done", "as", "given"])
    assert main(["train", *SHORT, "seed=4", "run_dir=alone"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "sweep"]
    for name in ("evaluations.csv", "policy/tensors.safetensors"):
        assert (tmp_path / "sweep" / "1" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_jobs_of_a_multirun_are_told_as_one_would_type_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my runs" / "1").mkdir(parents=True)
    (tmp_path / "my runs" / "1" / "config.yaml").write_text("{}\n")
    words = ["-m", "env.kwargs={g: 9.8},{g: 1.0}", "experiment=null", "agent.lr_schedule='linear'", "run_dir=my runs"]
    assert main(["train", "--print-config", *SHORT, *words]) == 0
    said = capfd.readouterr().out
    assert """'env.kwargs={g:9.8}' experiment=null "agent.lr_schedule='linear'" 'run_dir=my runs/0'""" in said
    assert said.endswith(
        "2 jobs:\n"
        "  done               'env.kwargs={g:9.8}' 'run_dir=my runs/0'\n"
        "  done               'env.kwargs={g:1.0}' 'run_dir=my runs/1'\n"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_signal_ends_a_multirun_even_where_its_job_was_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Done:
        """A job that a signal reaches during its last step."""

        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            self.terminated = False

        def terminate(self) -> None:
            self.terminated = True

        def wait(self) -> int:
            if not self.terminated:
                signal.raise_signal(signal.SIGTERM)
            return 0

    monkeypatch.setattr("rlopt.cli.multirun.subprocess.Popen", Done)
    assert main(["train", *SHORT, "-m", "seed=3,4"]) == 0
    ends = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert ends == [["done", "seed=3"], ["not", "started", "seed=4"]]
