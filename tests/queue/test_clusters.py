"""Slurm and Ray: submitit's own processes, a Ray cluster of two machines, and stand-ins for Slurm's programs.

The tests that are not ``slow`` only look at what would be submitted. The others: ``pytest -m slow tests/queue``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlopt.cli import main
from rlopt.queue.jobs import load_jobs
from rlopt.queue.progress import QueueRecord
from tests.cli.command_line import ROOT, refused
from tests.queue import slurm
from tests.queue.training import command, jobs_file, until


def steps(root: Path, name: str) -> list[int]:
    """The steps of a stand-in's evaluations; each is there once where every resume began at the last save."""
    table = (root / name / "evaluations.csv").read_text().splitlines()[1:]
    return [int(line.split(",")[0]) for line in table]


def begun(root: Path, name: str, step: int = 50) -> Callable[[], bool]:
    return lambda: (root / name / "checkpoints").is_file() and steps(root, name)[-1:] >= [step]


def pid(root: Path, name: str) -> int:
    return int((root / name / "pid").read_text())


@contextlib.contextmanager
def queue(words: list[str], out: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    with out.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlopt", *words], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_without_slurm_it_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    words = command(jobs_file(tmp_path, {"experiment": "a"}), tmp_path / "root")
    assert refused([*words, "--executor", "slurm"], capsys).startswith("--executor slurm: sbatch is not here; ")
    assert refused([*words, "--executor-options", "time=3"], capsys).startswith(
        "--executor-options time: --executor local has none"
    )
    assert refused([*words, "--executor-options", "x"], capsys) == (
        "--executor-options x: expected KEY=VALUE, such as partition=gpu"
    )


def test_what_is_submitted_to_slurm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    from rlopt.queue.slurm import SlurmExecutor

    monkeypatch.setenv("PATH", slurm.install(tmp_path / "slurm")["PATH"])
    (tmp_path / "slurm" / "run").write_text("#!/bin/bash\n")
    (tmp_path / "slurm" / "run").chmod(0o755)
    root, needs = tmp_path / "root", {"gpus": 1, "cpus": 4, "memory_gb": 1.5, "hours": 12}
    jobs = jobs_file(tmp_path, {"experiment": "a"})
    words = [*command(jobs, root), "--executor", "slurm"]
    assert "a/seed0 has no time limit, which Slurm wants" in refused(words, capsys)
    jobs_file(tmp_path, {"experiment": "a", "needs": needs})
    for option, line in [
        ("gpus_per_nod=1", "has no such option; did you mean gpus_per_node?"),
        ("time=60", "a/seed0 says needs: {hours: 12}; leave one of them out"),
        ("time=1:00", "give whole minutes, such as time=720"),
    ]:
        assert line in refused([*words, "--executor-options", option], capsys)
    executor = SlurmExecutor({"partition": "gpu", "additional_parameters": {"reservation": "x"}}, root)
    (job,) = load_jobs(jobs)
    from rlopt.queue.work import Queue

    handle = executor.submit(Queue([job], root, executor, None, ["train"])._assignment(job), job)
    script = (root / "submitit" / str(handle.id) / f"{handle.id}_submission.sh").read_text()
    for flag in (
        "job-name=a_seed0", "time=720", "cpus-per-task=4", "gpus-per-node=1", "mem=1536M", "partition=gpu",
        "reservation=x", "signal=USR2@300",
    ):  # fmt: skip
        assert f"#SBATCH --{flag}\n" in script
    assert executor.poll(handle) is None
    assert executor.attach(str(handle.id), job) is not None
    (tmp_path / "slurm" / f"{handle.id}.ended").touch()
    assert executor.attach(str(handle.id), job) is None
    executor.GRACE = 0.0
    until(lambda: executor.poll(handle) is not None)
    ended = executor.poll(handle)
    assert ended is not None and ended.lost


def test_jobs_that_an_earlier_queue_left_with_slurm_are_not_trained_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    QueueRecord("slurm", {"a/seed0": "17"}).write(root)
    words = command(jobs_file(tmp_path, {"experiment": "a"}), root)
    assert "has 1 jobs with Slurm from an earlier queue; go on with --executor slurm" in refused(words, capsys)
    assert main([*words, "--status"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["a/seed0", "running"]


@pytest.mark.slow
def test_submitit_time_limits_and_killed_workers(tmp_path: Path) -> None:
    """The first job meets its time limit; of the others one loses its training, its worker, its worker's parent."""
    pytest.importorskip("submitit")
    psutil = pytest.importorskip("psutil")
    root, out = tmp_path / "root", tmp_path / "out"
    jobs = jobs_file(
        tmp_path, {"name": "slow", "seeds": [0], "needs": {"hours": 0.01}}, {"name": "slow", "seeds": [1, 2, 3]},
        needs={"hours": 1}, overrides=["total_steps=4000"],
    )  # fmt: skip
    words = [*command(jobs, root), "--executor", "submitit-local", "--workers", "4"]
    with queue(words, out) as process:
        for seed in range(4):
            until(begun(root, f"slow/seed{seed}"), 120)
        os.kill(pid(root, "slow/seed1"), signal.SIGKILL)
        psutil.Process(pid(root, "slow/seed2")).parent().kill()
        psutil.Process(pid(root, "slow/seed3")).parent().parent().kill()
        assert process.wait(400) == 0, out.read_text()
    said = out.read_text()
    assert "4 of 4 finished" in said
    for seed in range(4):
        name = f"slow/seed{seed}"
        first, second, *_ = (root / name / "commands").read_text().splitlines()
        assert first.startswith("seed=") and second.startswith("resume=")
        assert steps(root, name) == list(range(10, 4001, 10)), name
        assert (f"{name}: lost at step" in said) == (seed > 0), "the time limit is between Slurm and the training"
        log = (root / "logs" / f"slow_seed{seed}.log").read_text()
        assert ("saved" in log) == (seed != 1), "all but the killed training were told to save"


@pytest.mark.slow
def test_submitit_passes_on_a_signal(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    root, out = tmp_path / "root", tmp_path / "out"
    jobs = jobs_file(tmp_path, {"name": "slow", "seeds": [0, 1]}, needs={"hours": 1}, overrides=["total_steps=99990"])
    with queue([*command(jobs, root), "--executor", "submitit-local"], out) as process:
        until(begun(root, "slow/seed1"), 120)
        until(begun(root, "slow/seed0"), 120)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, out.read_text()
    for seed in (0, 1):
        assert f"slow/seed{seed}: stopped at step {steps(root, f'slow/seed{seed}')[-1]}" in out.read_text()
        assert "saved" in (root / "logs" / f"slow_seed{seed}.log").read_text()


@pytest.mark.slow
def test_slurm_requeues_a_queue_finds_again_and_a_signal_is_passed_on(tmp_path: Path) -> None:
    """submitit's code for Slurm, with stand-ins for Slurm's programs."""
    pytest.importorskip("submitit")
    root, out = tmp_path / "root", tmp_path / "out"
    variables = slurm.install(tmp_path / "slurm")
    jobs = jobs_file(tmp_path, {"name": "slow", "seeds": [0, 1]}, needs={"hours": 1}, overrides=["total_steps=3000"])
    words = [*command(jobs, root), "--executor", "slurm"]
    with queue(words, out, **variables):
        until(begun(root, "slow/seed0"), 120)
        until(begun(root, "slow/seed1"), 120)
        until(lambda: len(QueueRecord.read(root).running) == 2, 60)
    # The queue was killed; its jobs go on. One is taken from its machine meanwhile.
    os.kill(int((tmp_path / "slurm" / "101.pid").read_text()), signal.SIGUSR2)
    with queue(words, out, **variables) as process:
        until(lambda: "slow/seed0: found again as 101" in out.read_text(), 60)
        until(lambda: len((root / "slow/seed0/commands").read_text().splitlines()) == 2, 120)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 130, out.read_text()
    for seed in (0, 1):
        assert f"slow/seed{seed}: stopped at step {steps(root, f'slow/seed{seed}')[-1]}" in out.read_text()
    with queue(words, out, **variables) as process:
        assert process.wait(400) == 0, out.read_text()
    for seed in (0, 1):
        assert steps(root, f"slow/seed{seed}") == list(range(10, 3001, 10))
    assert (tmp_path / "slurm" / "count").read_text() == "104\n", "two jobs, and the two that were stopped once more"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")  # a busy machine needs more than its minute
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield found
    found.shutdown()


@pytest.mark.slow
def test_ray_a_machine_is_removed_and_a_training_killed(tmp_path: Path, cluster: Any) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    leaves = cluster.add_node(num_cpus=1)
    jobs = jobs_file(tmp_path, {"name": "slow", "seeds": [0, 1]}, overrides=["total_steps=3000"])
    words = [*command(jobs, root), "--executor", "ray", "--executor-options", f"address={cluster.address}"]
    with queue(words, out) as process:
        until(begun(root, "slow/seed0"), 200)
        until(begun(root, "slow/seed1"), 200)
        cluster.remove_node(leaves, allow_graceful=False)
        until(lambda: "lost at step" in out.read_text(), 120)
        gone = next(seed for seed in (0, 1) if f"slow/seed{seed}: lost at step" in out.read_text())
        stays = f"slow/seed{1 - gone}"
        os.kill(pid(root, stays), signal.SIGKILL)
        assert process.wait(400) == 0, out.read_text()
    said = out.read_text()
    assert "2 of 2 finished" in said and f"{stays}: lost at step" in said and "code -9" in said
    assert "(raylet" not in said, "what Ray's machines say is in a file of its own"
    for seed in (0, 1):
        first, second, *_ = (root / f"slow/seed{seed}/commands").read_text().splitlines()
        assert first.startswith("seed=") and second.startswith("resume=")
        assert steps(root, f"slow/seed{seed}") == list(range(10, 3001, 10))


@pytest.mark.slow
def test_ray_passes_on_a_signal(tmp_path: Path, cluster: Any) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    jobs = jobs_file(tmp_path, {"name": "slow", "seeds": [0, 1]}, overrides=["total_steps=99990"])
    words = [*command(jobs, root), "--executor", "ray", "--executor-options", f"address={cluster.address}"]
    with queue(words, out) as process:
        until(lambda: any(begun(root, f"slow/seed{seed}")() for seed in (0, 1)), 200)
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 130, out.read_text()
    trained = [seed for seed in (0, 1) if (root / f"slow/seed{seed}").is_dir()]
    assert len(trained) == 1, "the other waited for a machine"
    name = f"slow/seed{trained[0]}"
    assert f"{name}: stopped at step {steps(root, name)[-1]}" in out.read_text()
    assert "saved" in (root / "logs" / f"slow_seed{trained[0]}.log").read_text()
