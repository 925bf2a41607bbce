import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from rlopt.types import RloptError

TRAIN = '''
"""Behaves like train.py: a run folder, an evaluation every 10 steps, a checkpoint when asked to stop."""
import json, os, signal, sys, time
from pathlib import Path
given = dict(a.split("=", 1) for a in sys.argv[1:])
folder = Path(given.get("resume") or given["run_dir"])
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "commands", "a") as f:
    f.write(" ".join(sys.argv[1:]) + " OMP=" + os.environ["OMP_NUM_THREADS"] + "\\n")
if "resume" not in given:
    config = {"seed": int(given["seed"]), "total_steps": int(given["total_steps"])}
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "evaluations.csv").write_text("step,episode,return,length\\n")
total = int(given.get("total_steps") or json.loads((folder / "config.yaml").read_text())["total_steps"])
step = int((folder / "checkpoints").read_text()) if (folder / "checkpoints").exists() else 0
if given.get("experiment") == "breaks":
    sys.exit("this one breaks")
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
while step < total and not stop:
    while given.get("experiment") == "waits" and not stop:
        (folder / "waiting").touch()
        time.sleep(0.02)
    step += 10
    with open(folder / "evaluations.csv", "a") as f:
        f.write(f"{step},0,{step / 2},9\\n")
(folder / "checkpoints").write_text(str(step))
(folder / "policy").mkdir(exist_ok=True)
'''


@pytest.fixture
def queue(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("run_queue")


def _jobs(tmp_path: Path, *jobs: dict[str, Any], **defaults: Any) -> Path:
    path = tmp_path / "jobs.yaml"
    path.write_text(yaml.safe_dump({"defaults": {"overrides": ["total_steps=20"], **defaults}, "jobs": list(jobs)}))
    return path


def _command(jobs: Path, root: Path, *more: str) -> list[str]:
    script = root.parent / "train.py"
    script.write_text(TRAIN)
    return [str(jobs), "--root", str(root), "--script", str(script), *more]


@pytest.fixture(autouse=True)
def _signals_stay_as_they_were() -> Any:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_every_job_runs_once(tmp_path: Path, queue: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    jobs, root = _jobs(tmp_path, {"experiment": "a", "seeds": [0, 3]}, {"experiment": "b"}), tmp_path / "root"
    assert queue.main(_command(jobs, root)) == 0
    folder = root / "a" / "seed3"
    own = f"experiment=a seed=3 threads=1 run_dir={folder} total_steps=20 OMP=1\n"
    assert (folder / "commands").read_text() == own
    assert "3 of 3 finished" in capsys.readouterr().out
    # Again: nothing is left to do.
    assert queue.main(_command(jobs, root)) == 0
    assert (folder / "commands").read_text() == own
    assert "a/seed3: finished before" in capsys.readouterr().out


def test_jobs_go_seed_by_seed_with_names_and_overrides_of_their_own(tmp_path: Path, queue: ModuleType) -> None:
    a = {"experiment": "a", "seeds": [1, 0]}
    b = {"name": "other", "experiment": "a", "overrides": ["buffer=lap", "total_steps=30"]}
    jobs = queue.load_jobs(_jobs(tmp_path, a, b, seeds=[0, 1]))
    assert [job.name for job in jobs] == ["a/seed0", "other/seed0", "a/seed1", "other/seed1"]
    assert jobs[1].experiment == "a" and jobs[1].folder(tmp_path) == tmp_path / "other" / "seed0"
    assert jobs[1].overrides == ("total_steps=20", "buffer=lap", "total_steps=30")
    assert (jobs[0].total_steps, jobs[1].total_steps) == (20, 30)


def test_more_steps_extend_a_finished_run(tmp_path: Path, queue: ModuleType) -> None:
    root = tmp_path / "root"
    queue.main(_command(_jobs(tmp_path, {"experiment": "a"}), root))
    longer = _jobs(tmp_path, {"experiment": "a", "overrides": ["total_steps=50"]})
    assert queue.main(_command(longer, root)) == 0
    folder = root / "a" / "seed0"
    assert (folder / "commands").read_text().splitlines()[1] == f"resume={folder} total_steps=50 OMP=1"
    assert (folder / "evaluations.csv").read_text().splitlines()[-1] == "50,0,25.0,9"
    # The shorter list still counts it as finished.
    assert queue.progress(queue.load_jobs(_jobs(tmp_path, {"experiment": "a"}))[0], root).finished


def test_a_run_that_was_cut_off_is_not_finished(tmp_path: Path, queue: ModuleType) -> None:
    root = tmp_path / "root"
    jobs = _jobs(tmp_path, {"experiment": "a"})
    queue.main(_command(jobs, root))
    (job,) = queue.load_jobs(jobs)
    folder = job.folder(root)
    (folder / "policy").rmdir()
    assert not queue.progress(job, root).finished
    (folder / "policy").mkdir()
    (folder / "evaluations.csv").write_text("step,episode,return,length\n10,0,5.0,9\n20,0,1")  # torn
    assert not queue.progress(job, root).finished
    assert queue.progress(job, root).step == 10


def test_a_failing_job_does_not_stop_the_others(
    tmp_path: Path, queue: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs, root = _jobs(tmp_path, {"experiment": "breaks"}, {"experiment": "b"}), tmp_path / "root"
    assert queue.main(_command(jobs, root, "--workers", "1")) == 1
    assert "breaks/seed0: ended with code 1" in capsys.readouterr().out
    assert "this one breaks" in (root / "logs" / "breaks_seed0.log").read_text()
    assert (root / "b" / "seed0" / "policy").is_dir()
    queue.main(_command(jobs, root, "--status"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["breaks/seed0", "failed", "(1)", "0"]
    assert lines[2].split() == ["b/seed0", "finished", "20", "20", "10.0", "-"]


def test_sigterm_reaches_the_trainings_and_a_new_queue_resumes(
    tmp_path: Path, queue: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    jobs = _jobs(tmp_path, {"experiment": "waits", "seeds": [0, 1]}, {"experiment": "b", "seeds": [2]})
    command = _command(jobs, root, "--workers", "2")
    process = subprocess.Popen([sys.executable, queue.__file__, *command], stdout=subprocess.PIPE, text=True)
    try:
        _until((root / "waits" / "seed0" / "waiting").exists)
        _until((root / "waits" / "seed1" / "waiting").exists)
        queue.main([*command, "--status"])
        assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]] == [
            "running",
            "running",
            "waiting",
        ]
        assert queue.main(command) == 2  # one queue at a time
        assert "has a queue or its trainings at work" in capsys.readouterr().err
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "waits/seed1: stopped at step 10" in output
    assert not (root / "b").exists()
    assert json.loads((root / "queue.json").read_text()) == {"running": {}, "failed": {}}
    queue.main([*command, "--status"])
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]] == ["interrupted"] * 2 + ["waiting"]
    assert queue.main(command) == 0
    assert (root / "waits" / "seed1" / "commands").read_text().splitlines()[1].startswith("resume=")
    assert (root / "waits" / "seed1" / "evaluations.csv").read_text().splitlines()[1:] == ["10,0,5.0,9", "20,0,10.0,9"]


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_jobs_files_with_mistakes(tmp_path: Path, queue: ModuleType) -> None:
    for jobs, message in [
        ([{"experiment": "a", "seed": 1}], "seed is no key of a job; use name, experiment, seeds, overrides"),
        ([{"seeds": [1]}], "lacks its experiment"),
        ([{"experiment": "a"}, {"experiment": "a", "seeds": [1, 0]}], "a/seed0 is there twice"),
    ]:
        with pytest.raises(RloptError, match=message):
            queue.load_jobs(_jobs(tmp_path, *jobs))
    with pytest.raises(RloptError, match="cannot be read"):
        queue.load_jobs(tmp_path / "none.yaml")


def test_the_shipped_jobs_name_experiments_that_exist(queue: ModuleType) -> None:
    repository = Path(queue.__file__).parents[1]
    files = sorted((repository / "experiments" / "jobs").glob("*.yaml"))
    jobs = {file.stem: queue.load_jobs(file) for file in files}
    known = {
        "classic_control": 3 * 3, "sac_300k": 1 + 3, "sac_halfcheetah_500k": 1, "sac_mujoco_100k": 8 * 3,
        "pendulum_overlap": 2, "pendulum_precision": 2, "pendulum_replay": 8,
        "sac_precision": 4 * 3, "sac_replay": 12 * 3, "ppo": 4 * 3, "td3_mujoco": 2 * 3,
        "teams_mpe": 4 * 3, "teams_mamujoco": 3 * 3, "teams_lbf": 3 + 1,
    }  # fmt: skip
    assert known.items() <= {name: len(j) for name, j in jobs.items()}.items()
    assert {job.total_steps for job in jobs["sac_mujoco_100k"]} == {110_000}
    for job in (job for name, j in jobs.items() for job in j if name != "cleanrl"):  # another script's, of environments
        assert (repository / "configs" / "experiment" / f"{job.experiment}.yaml").is_file()
