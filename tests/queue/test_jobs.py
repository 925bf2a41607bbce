"""Jobs files: what they say, and their mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlopt.queue.jobs import Needs, load_jobs
from rlopt.types import RloptError
from tests.cli.command_line import ROOT, python, refused
from tests.queue.training import jobs_file


def test_jobs_go_seed_by_seed_with_names_and_overrides_of_their_own(tmp_path: Path) -> None:
    a = {"experiment": "a", "seeds": [1, 0]}
    b = {"name": "other", "experiment": "a", "overrides": ["buffer=lap", "total_steps=30"]}
    jobs = load_jobs(jobs_file(tmp_path, a, b, seeds=[0, 1]))
    assert [job.name for job in jobs] == ["a/seed0", "other/seed0", "a/seed1", "other/seed1"]
    assert jobs[1].experiment == "a" and jobs[1].folder(tmp_path) == tmp_path / "other" / "seed0"
    assert jobs[1].overrides == ("total_steps=20", "buffer=lap", "total_steps=30")
    assert (jobs[0].total_steps, jobs[1].total_steps) == (20, 30)


def test_needs_of_a_job_win_over_the_defaults_one_by_one(tmp_path: Path) -> None:
    a, b = {"experiment": "a"}, {"experiment": "b", "needs": {"gpus": 0, "cpus": 4}}
    first, second = load_jobs(jobs_file(tmp_path, a, b, needs={"gpus": 1, "hours": 0.5}))
    assert first.needs == Needs(gpus=1, hours=0.5)
    assert second.needs == Needs(cpus=4, hours=0.5)
    assert "threads=4" in second.words(tmp_path)[0]


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ({"experiment": "a", "seed": 1}, "seed is no key of a job; did you mean seeds?"),
        ({"seeds": [1]}, "job 1 lacks its experiment, or a name beside its overrides"),
        ({"experiment": "a", "seeds": 3}, "job 1: seeds is 3; write seeds: [0, 1, 2]"),
        ({"experiment": "a", "seeds": [-1]}, "job 1: seed -1 is no whole number from 0"),
        ({"experiment": "a", "overrides": "x=1"}, "job 1: overrides is 'x=1'; write overrides: ["),
        ({"experiment": "a", "overrides": [{"x": 1}]}, "job 1: override {'x': 1} is no text"),
        ({"experiment": "a", "overrides": ["seed=1"]}, "job 1: seed=1 is the queue's to say; write seeds: [0, 1]"),
        ({"experiment": "a", "overrides": ["total_steps=x"]}, "job 1: total_steps=x is no number"),
        ({"experiment": "a", "needs": {"gpu": 1}}, "job 1: needs.gpu: no such option; did you mean needs.gpus?"),
        ({"experiment": "a", "needs": {"hours": 0}}, "job 1: needs.hours: must be above 0, got 0"),
        ({"experiment": "a", "name": "../b"}, "job 1: name '../b' is a folder's"),
        ({"experiment": "a", "seeds": [1, 1]}, "a/seed1 is there twice; both would write to one run folder"),
        ("a", "job 1: expected keys such as experiment: NAME, got 'a'"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, entry: Any, line: str) -> None:
    with pytest.raises(RloptError) as caught:
        load_jobs(jobs_file(tmp_path, entry))
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "jobs.yaml"
    for text, line in [
        ("jobs: 3", "has no list of jobs"),
        ("jobs: []", "has no jobs"),
        ("{jobs: [], job: 1}", "job is no key of a jobs file; did you mean jobs?"),
        ("{jobs: [{experiment: a}], defaults: {sead: [1]}}", "sead is no key of a job; did you mean seeds?"),
        ("a: [", "cannot be read"),
    ]:
        path.write_text(text)
        with pytest.raises(RloptError, match=line):
            load_jobs(path)
    with pytest.raises(RloptError, match="cannot be read"):
        load_jobs(tmp_path / "none.yaml")


def test_words_are_checked_before_anything_starts_names_first_and_without_torch(tmp_path: Path) -> None:
    """One process for all of them, as it is the modules that count."""
    good = {"name": "good", "overrides": ["env=Pendulum-v1"]}
    option = {"name": "b", "overrides": ["env=Pendulum-v1", "agent.taw=1"]}
    files = []
    for i, wrong in enumerate(({"experiment": "sac_hoper_v4"}, {"name": "a", "overrides": ["agent=sca"]})):
        files.append(str(jobs_file(tmp_path, good, option, wrong).rename(tmp_path / f"{i}.yaml")))
    code = (
        "import sys\nfrom rlopt.cli import main\n"
        f"for file in {files!r}:\n"
        "    assert main(['queue', file, '--check']) == 2\n"
        "    assert main(['queue', file, '--root', 'root']) == 2\n"
        "    assert not {'torch', 'gymnasium', 'numpy'} & set(sys.modules), 'imports torch, Gymnasium or NumPy'\n"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [
        "error: sac_hoper_v4/seed0: experiment=sac_hoper_v4: no such experiment; did you mean sac_hopper_v4?",
        "error: a/seed0: agent=sca: no such agent; did you mean sac?",
    ]
    assert done.stderr.splitlines() == [line for line in lines for _ in range(2)]
    assert not (tmp_path / "root").exists()


def test_options_and_environments_are_checked_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"name": "good", "overrides": ["env=Pendulum-v1"]}
    for word, line in [
        ("agent.taw=1", "b/seed0: agent.taw: no such option; did you mean agent.tau?"),
        ("env=Pendulun-v1", "b/seed0: env=Pendulun-v1 is not a registered environment; did you mean Pendulum-v1?"),
    ]:
        jobs = jobs_file(tmp_path, good, {"name": "b", "overrides": ["env=Pendulum-v1", word]})
        assert refused(["queue", str(jobs), "--check"], capsys) == line


def test_the_shipped_jobs_name_experiments_that_exist() -> None:
    files = sorted((ROOT / "experiments" / "jobs").glob("*.yaml"))
    jobs = {file.stem: load_jobs(file) for file in files}
    known = {
        "classic_control": 3 * 3, "sac_300k": 1 + 3, "sac_halfcheetah_500k": 1, "sac_mujoco_100k": 8 * 3,
        "pendulum_overlap": 2, "pendulum_precision": 2, "pendulum_replay": 8,
        "sac_precision": 4 * 3, "sac_replay": 12 * 3, "ppo": 4 * 3, "td3_mujoco": 2 * 3,
        "teams_mpe": 4 * 3, "teams_mamujoco": 3 * 3, "teams_lbf": 3 + 1, "atari_60": 60 * 5,
    }  # fmt: skip
    assert known.items() <= {name: len(j) for name, j in jobs.items()}.items()
    assert {job.total_steps for job in jobs["sac_mujoco_100k"]} == {110_000}
    for job in (job for name, j in jobs.items() for job in j if name != "cleanrl"):  # another script's, of environments
        assert (ROOT / "configs" / "experiment" / f"{job.experiment}.yaml").is_file()
    for file in files:
        assert yaml.safe_load(file.read_text())["jobs"]
        assert "run_queue" not in file.read_text()


def test_the_atari_study_names_games_that_exist() -> None:
    pytest.importorskip("ale_py")
    from rlopt.envs.factory import find_spec

    games = {word for job in load_jobs(ROOT / "experiments" / "jobs" / "atari_60.yaml") for word in job.overrides}
    ids = [word.removeprefix("env=") for word in games if word.startswith("env=")]
    assert len(ids) == 60
    for name in ids:
        find_spec(name)
