"""The commands as a user types them: ``main(argv)`` in this process, and a few in one of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlopt.buffers.storage import Storage
from rlopt.cli import main
from rlopt.cli.environment import PROCESS_SETTINGS, prepare_environment
from rlopt.cli.train import _ended
from rlopt.training import train_config
from rlopt.training.result import Result
from rlopt.types import RloptError
from tests.cli.command_line import ROOT, SHORT, python, refused, rows


def test_training_ends_with_the_evaluation_the_folder_and_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *SHORT, "seed=7"]) == 0
    said = capsys.readouterr().out
    (folder,) = (tmp_path / "runs").iterdir()
    relative = folder.relative_to(tmp_path)
    assert "mean return" in said
    assert "over 2 episodes" in said
    assert f"rlopt evaluate {relative}" in said
    assert f"rlopt train resume={relative}" in said
    assert [p.name for p in tmp_path.iterdir()] == ["runs"], "Hydra must write nothing of its own"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["seed"], config["agent"]["tau"], config["env"]["id"]) == (7, 0.005, "Pendulum-v1")
    assert [row["step"] for row in rows(folder / "evaluations.csv")] == ["60", "60"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["agent.learning_rte=1"], "agent.learning_rte: no such option; did you mean agent.learning_rate?"),
        (["agent.tau=big"], "agent.tau: expected a number, got 'big'"),
        (["agent=sca"], "agent=sca: no such agent; did you mean sac?"),
        (["env=HalfCheeta-v5"], "env=HalfCheeta-v5 is not a registered environment; did you mean HalfCheetah-v5?"),
        (["--config-dir", "nowhere"], "--config-dir nowhere: no such folder"),
        (["--multrun"], "--multrun: no such option; did you mean --multirun?"),
        (["-m", "seed=1,2", "agent.tau=big"], "agent.tau: expected a number, got 'big'"),
        (["resume=nowhere"], "resume=nowhere: no run lies there (no config.yaml)"),
        (["env=Pendulum-v1", "device=gpu"], "device='gpu' is no torch device; use auto, cpu, cuda or cuda:0"),
    ],
)
def test_a_mistake_in_training_is_one_line_and_code_2(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(["train", *arguments], capsys) == line
    assert list(tmp_path.iterdir()) == [], "a run that cannot begin leaves no folder"


def test_an_agent_that_cannot_act_there_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = refused(["train", "agent=sac", "env=CartPole-v1", f"run_dir={tmp_path / 'run'}"], capsys)
    assert "Discrete(2)" in said
    assert "agent=sac_discrete" in said
    assert not (tmp_path / "run").exists()


def test_a_missing_extra_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "mujoco" or "envs.mujoco" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mujoco", None)
    said = refused(["train", "env=HalfCheetah-v5", f"run_dir={tmp_path / 'run'}"], capsys)
    assert 'pip install -c constraints.txt -e ".[mujoco]"' in said


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["trian"], "trian: no such command; did you mean train?"),
        (["agent=sac"], "agent=sac: no such command; write rlopt train agent=sac"),
        (["list", "agent"], "rlopt list agent: no such kind; did you mean agents?"),
        (["list", "envs", "chetah"], "no name contains 'chetah'; did you mean HalfCheetah-v5?"),
        (["evaluate", "nowhere"], "nowhere does not exist; give a policy folder or a run folder"),
        (["evaluate", "x", "--episodes", "0"], "argument --episodes: must be at least 1, got 0"),
        (["evaluate"], "the following arguments are required: RUN|POLICY"),
        (
            ["plot", "/nowhere"],
            "/nowhere is no run folder (it has no config.yaml); give the folder that training printed",
        ),
    ],
)
def test_a_mistake_in_the_other_commands_is_one_line(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(argv, capsys) == line


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("rlopt.cli.train.compose", broken)
    with pytest.raises(ZeroDivisionError):
        main(["train", "env=Pendulum-v1"])


def test_a_failure_inside_a_users_environment_shows_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object) -> None:
        error = RloptError("environment 0 failed: KeyError: 'speed'")
        error.add_note("in worker process 7:\n  mine.py, line 3")
        raise error

    monkeypatch.setattr("rlopt.cli.train.compose", failing)
    assert main(["train", "env=Pendulum-v1"]) == 2
    said = capsys.readouterr().err
    assert said == "error: environment 0 failed: KeyError: 'speed'\nin worker process 7:\n  mine.py, line 3\n"


def test_ctrl_c_while_something_is_imported_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def importing(*_: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("cannot load module more than once per process") from None

    monkeypatch.setattr("rlopt.cli.train.compose", importing)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
    try:
        assert main(["train", "env=Pendulum-v1"]) == 130
        assert capsys.readouterr().err == "interrupted\n"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_before_the_first_step_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as early:
        early.setattr("rlopt.training.trainer.Trainer.run", interrupted)
        assert main(["train", *SHORT, f"run_dir={run}"]) == 130
    said = capsys.readouterr()
    assert said.err == "interrupted; what was saved last is intact\n"
    assert said.out.endswith(f"go on        rlopt train resume={run}\n")
    assert main(["train", f"resume={run}"]) == 0
    assert "(finished at step 60 of 60)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [[], ["--help"], *([command, "--help"] for command in ("train", "evaluate", "plot", "list"))]
)
def test_help_is_there_for_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: rlopt")
    said.encode("ascii")  # any terminal can show it


def test_list_names_everything_with_a_line_about_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["list", "agents"]) == 0
    agents = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {"sac", "sac_2018", "sac_discrete", "reinforce", "value_iteration"} <= set(agents)
    assert agents["sac"] == "Soft actor-critic for bounded Box action spaces."
    assert main(["list", "envs", "cheetah-v5"]) == 0
    assert capsys.readouterr().out == "HalfCheetah-v5  gymnasium.envs.mujoco.half_cheetah_v5:HalfCheetahEnv\n"
    assert main(["list", "networks"]) == 0
    assert "nature_cnn" in capsys.readouterr().out
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "mine.yaml").write_text("# SAC, but mine\nname: sac\n")
    assert main(["list", "--config-dir", str(tmp_path)]) == 0
    everything = capsys.readouterr().out
    for part in ("SAC, but mine", "uniform", "sac_hopper_v4 ", "rlopt list envs"):
        assert part in everything


def test_options_are_listed_with_value_range_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--options", "env=Hopper-v5", "agent.tau=0.25"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["agent.tau"].split()[1] == "0.25"
    assert "[above 0, at most 1]" in lines["agent.tau"]
    assert lines["env.id"].split()[1] == "Hopper-v5"
    assert {"buffer.capacity", "eval.every", "seed", "resume", "agent.network.hidden"} <= set(lines)
    assert main(["train", "--options", "buffer=prioritized"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["buffer.alpha"].split(maxsplit=2)[1:] == ["0.6", "how strongly errors count; 0 is uniform."]
    assert lines["buffer.stratified"].endswith("(Schaul et al., appendix B.2.1), instead of B independent draws.")


def test_print_config_prints_what_a_run_would_be_told(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *SHORT, f"run_dir={trained}", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load((trained / "config.yaml").read_text())
    assert main(["train", f"resume={trained}", "total_steps=99", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["total_steps"] == 99


def test_a_full_disk_at_resume_is_one_line(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlopt.runs.run_folder.replace_file", full)
    said = refused(["train", f"resume={trained}", "total_steps=70"], capsys)
    assert "config.yaml cannot be written: [Errno 28] No space left on device; free some space" in said


def test_output_without_unicode_is_no_error() -> None:
    done = python("-m", "rlopt", "train", "--options", cwd=ROOT, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "cuda:1 ?" in done.stdout


def test_resume_goes_on_and_refuses_what_it_must_keep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(["train", *SHORT, f"run_dir={folder}"]) == 0
    assert main(["train", f"resume={folder}", "total_steps=90", "log.every=10"]) == 0
    capsys.readouterr()
    assert {row["step"] for row in rows(folder / "evaluations.csv")} == {"60", "90"}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["total_steps"], config["log"]["every"], config["agent"]["warmup_steps"]) == (90, 10, 30)
    assert refused(["train", f"resume={folder}", "agent.gamma=0.9"], capsys).startswith(
        "agent.gamma: a resumed run keeps"
    )
    assert refused(["train", f"resume={folder}", "totl_steps=100"], capsys) == (
        "totl_steps: no such option; did you mean total_steps?"
    )
    assert "lies before" in refused(["train", f"resume={folder}", "total_steps=10"], capsys)
    assert "already holds a run" in refused(["train", *SHORT, f"run_dir={folder}"], capsys)


def test_the_size_of_the_buffer_is_told_before_it_is_allocated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(self: Storage, *_: object) -> None:
        raise RloptError(f"allocating after {capsys.readouterr().out!r}")

    monkeypatch.setattr(Storage, "__init__", allocate)
    assert (
        main(["train", *SHORT, "buffer.capacity=10_000_000", "total_steps=500_000", f"run_dir={tmp_path / 'run'}"]) == 2
    )
    planned = "replay buffer: 500,000 of 10,000,000 transitions of 44 bytes, 0.02 GiB on cpu"
    assert f"allocating after '{planned}\\n'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_buffer_that_does_not_fit_names_the_ways_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SHORT, "buffer.capacity=1e12", "total_steps=1e12", f"run_dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr()
    assert said.out.startswith("replay buffer: 1,000,000,000,000 transitions of 44 bytes, 40978.19 GiB on cpu")
    assert said.err.startswith("error: a buffer of 1,000,000,000,000 transitions needs 40978.2 GiB, but cpu has ")
    assert all(way in said.err for way in ("buffer.capacity", "buffer.frame_stack", "buffer.device=disk"))
    assert said.err.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["env=Pendulum-v1", "total_steps=100_000_000", "agent.warmup_steps=100_000_000", "log.every=50"]
    words += ["log.tensorboard=false", "eval.every=null", "buffer.capacity=1000", "run_dir=out"]
    command = [sys.executable, "-m", "rlopt.cli", "train", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("step "):
                child.send_signal(signal.SIGINT)
                break
        rest = child.stdout.read()
    assert child.returncode == 130
    assert "(interrupted at step " in rest
    assert "go on        rlopt train resume=out\n" in rest
    assert main(["train", f"resume={tmp_path / 'out'}", "--print-config"]) == 0
    assert "id: Pendulum-v1" in capsys.readouterr().out


def test_listing_and_help_do_without_torch() -> None:
    code = (
        "import sys\nfrom rlopt.cli import main\n"
        "codes = [main(a) for a in (['--help'], ['train', '--help'], ['list'], ['list', 'envs', 'Pendulum'])]\n"
        "print(codes, 'torch' in sys.modules, file=sys.stderr)"
    )
    done = python("-c", code, cwd=ROOT)
    assert done.stderr.splitlines()[-1] == "[0, 0, 0, 0] False"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m rlopt.cli list envs | head -1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stderr == ""


def test_waiting_threads_sleep_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *rest = PROCESS_SETTINGS
    for name in PROCESS_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(first, "ACTIVE")
    prepare_environment()
    assert os.environ[first] == "ACTIVE"
    assert {name: os.environ[name] for name in rest} == {name: PROCESS_SETTINGS[name] for name in rest}


def test_what_is_compiled_is_told_while_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlopt.fast.fused_sac.compiles", lambda function: True)
    assert main(["train", *SHORT, "total_steps=31", "eval.episodes=1", f"run_dir={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr()
    lines = [line for line in said.out.splitlines() if line.startswith("compiling the update")]
    assert len(lines) == 1, "one update, one line"
    assert "compiling" not in said.err


@pytest.mark.parametrize(
    ("status", "overrides", "line"),
    [
        ("finished", {}, "train on     rlopt train resume='a run' total_steps=200"),
        ("finished", {"agent": {"name": "sac", "lr_schedule": "cosine"}}, None),
        ("nonfinite", {}, "go on        rlopt train resume='a run' on_nonfinite=skip"),
        ("nonfinite", {"on_nonfinite": "skip"}, "go on        rlopt train resume='a run'"),
        ("interrupted", {"num_runs": 2}, "go on        rlopt train resume='a run'"),
    ],
)
def test_the_commands_that_are_printed_are_those_that_work(
    status: str, overrides: dict[str, Any], line: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    _ended(Result(status, 100, [], Path("a run")), train_config({"total_steps": 100, **overrides}))
    said = capsys.readouterr().out.splitlines()
    assert [text for text in said if text.startswith(("train on", "go on"))] == ([] if line is None else [line])
    assert "evaluate     rlopt evaluate 'a run' --episodes 20" in said
