"""Mistakes that once ended in a traceback, were mute for long, were taken in silence or misled: one line each."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.agents import SAC, SACConfig
from rlopt.allocation import memory_told, refuse_unless_free
from rlopt.analysis.plots import draw_runs
from rlopt.cli import main
from rlopt.cli.log import log_shown
from rlopt.envs import make_env
from rlopt.envs.factory import prepare_graphics
from rlopt.loops import evaluation
from rlopt.nn import NetworkConfig
from rlopt.policy import Policy
from rlopt.training import train_config
from rlopt.training.setup import begin
from rlopt.types import RloptError
from rlopt.version import install
from tests.cli.command_line import SHORT, python, refused

MUJOCO = "env=HalfCheetah-v5"
MANY = "must be at most"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["env=Pendulum-v1", "env.kwargs.g=abc"], "env=Pendulum-v1: env.kwargs.g: expected a number, got 'abc'"),
        (["env=Pendulum-v1", "env.kwargs.g=[1]"], "env=Pendulum-v1 does not run with env.kwargs={'g': [1]}: "),
        (["env=Pendulum-v1", "env.kwargs.g=null"], "env=Pendulum-v1 does not run with env.kwargs={'g': None}: "),
        (["env=Pendulum-v1", "env.kwargs.g=nan"], "env.kwargs.g: expected a finite number, got nan"),
        (["env=Pendulum-v1", "env.kwargs.max_episode_steps=abc"], "cannot be built with env.kwargs={'max_"),
        (["env=Pendulum-v1", "env.kwargs.render_mode=nonsense"], "no render_mode='nonsense'; choose from human, rgb_a"),
        (["env=Pendulum-v1", "env.kwargs.render_mode=rgb_aray"], "did you mean rgb_array?"),
        (["env=Pendulum-v1", "env.wrappers=[{class:TimeLimit,kwargs:5}]"], "kwargs of TimeLimit must be a mapping"),
        (["env=Pendulum-v1", "env.wrappers=[sys:exit]"], "env.wrappers: sys:exit refuses this environment: SystemExit"),
        (["agent=sac_discrete", "env=FrozenLake-v1", "env.kwargs.map_name=x"], "KeyError in "),
        (["threads=99999999999"], f"threads: {MANY} 1,024, got 99,999,999,999"),
        (["agent.batch_size=1e9"], f"agent.batch_size: {MANY} 1,048,576, got 1,000,000,000"),
        (["agent.n_step=1e9"], f"agent.n_step: {MANY} 10,000, got 1,000,000,000"),
        (["agent.update_ratio=[1000000000,1]"], f"agent.update_ratio: {MANY} 100,000, got 1,000,000,000"),
        (["agent=ppo", "agent.epochs=1e9"], f"agent.epochs: {MANY} 10,000, got 1,000,000,000"),
        (["agent.network.hidden=[1000000,1000000]"], "a network of 1,000,005,000,000 weights needs 14,901.2 GiB, and "),
        (["num_envs=1000000000"], f"num_envs: {MANY} 1,000,000, got 1,000,000,000"),
        (["agent=reinforce", "env=CartPole-v1", "agent.groups=1e9"], f"num_envs=4000000000 {MANY} "),
        (["num_runs=100000"], f"num_runs: {MANY} 1,024, got 100,000"),
        (["eval.episodes=1e12"], f"eval.episodes: {MANY} 1,000,000, got 1,000,000,000,000"),
        (["buffer.capacity=1e30"], f"buffer.capacity: {MANY} 1,000,000,000,000, got "),
        (["total_steps=1e30"], f"total_steps: {MANY} 1,000,000,000,000,000, got "),
        (["agent.learning_rate=inf"], "agent.learning_rate: expected a finite number, got inf"),
        (["env.timeout=inf"], "env.timeout: expected a finite number, got inf"),
        (["agent.temperature=-.inf"], "agent.temperature: expected "),
        (["device=cpu:7"], "device=cpu:7 is no device: there is one CPU; use device=cpu (and threads=N)"),
        (["buffer.device=cpu:7"], "device=cpu:7 is no device: there is one CPU"),
        (["run_dir="], "run_dir: expected text or null, got ''"),
        (["env="], "env.id: expected text, got ''"),
        (["hydra/sweeper=optuna"], "sweepers and launchers run nothing here; `rlopt train -m KEY=A,B,C` runs"),
        (["hydra/launcher=submitit_local"], "sweepers and launchers run nothing here"),
        (["hydra.run.dir=x"], "hydra.run.dir=x: Hydra writes nothing here; the run folder is run_dir=…"),
        (["agent.lr=1e-3"], "agent.lr: no such option; did you mean agent.learning_rate?"),
        (["lr=1e-3"], "lr: no such option; did you mean agent.learning_rate?"),
        (["agent.buffer_size=1e5"], "agent.buffer_size: no such option; did you mean buffer.capacity?"),
        (["agent.hidden_sizes=[8]"], "did you mean agent.network.hidden?"),
        (["agent=ppo", "agent.n_steps=8"], "agent.n_steps: no such option; did you mean agent.rollout_steps?"),
        (["total_timesteps=8"], "total_timesteps: no such option; did you mean total_steps?"),
        (["agent=drpg", "env=garnet", "env.states=1e9"], "GiB are free; ask for a smaller one"),
    ],
)  # fmt: skip
def test_training_is_refused_in_one_line(
    words: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = [] if any(word.startswith(("env=", "hydra")) for word in words) else ["env=Pendulum-v1"]
    assert line in refused(["train", *first, *words], capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["frame_skip=0"], "env=HalfCheetah-v5: env.kwargs.frame_skip: expected a whole number of at least 1, got 0"),
        (["frame_skip=1.5"], "env.kwargs.frame_skip: expected a whole number of at least 1, got 1.5"),
        (["reset_noise_scale=abc"], "env=HalfCheetah-v5: env.kwargs.reset_noise_scale: expected a number, got 'abc'"),
        (["reset_noise_scale=-1"], "env=HalfCheetah-v5 does not run with env.kwargs={'reset_noise_scale': -1}: "),
        (["ctrl_cost_weight=[1,2]"], "env=HalfCheetah-v5 does not run with env.kwargs={'ctrl_cost_weight': [1, 2]}: "),
        (["xml_file=nowhere.xml"], "nowhere.xml does not exist"),
    ],
)  # fmt: skip
def test_arguments_of_mujoco_tasks_that_do_not_fit(
    words: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mujoco")
    kwargs = [f"env.kwargs.{word}" for word in words]
    assert line in refused(["train", MUJOCO, *kwargs, f"run_dir={tmp_path / 'run'}"], capsys)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["plot", "RUN", "--at", "1e30"], "argument --at: must be at most 1,000,000,000,000,000, got 1e30"),
        (["plot", "RUN", "--out", ""], "'' is no picture's name; name a .png, .pdf or .svg file"),
        (["evaluate", "RUN", "--grid", "m=1:inf"], "--grid m=1:inf: give parameters as NAME=LOW:HIGH, such as"),
        (["evaluate", "RUN", "--grid", "m=1:2", "m=1:3"], "--grid m=1:3: m is given twice; give one range of each"),
        (["evaluate", "RUN", "--grid", "m=1:2", "--points", "1e8"], "at most 1,000,000 are run, so take fewer points"),
        (["evaluate", "RUN", "--grid", "m=1:2", "--video", "x.mp4"], "--video is for single episodes, not for --grid"),
        (["evaluate", "RUN", "--grid", "m=1:2", "--mode", "sample"], "--mode is for single episodes, not for --grid"),
        (["evaluate", "RUN", "--points", "3"], "--points belongs to --grid; add --grid NAME=LOW:HIGH, or leave it out"),
        (["evaluate", "RUN", "--picture", "x.png"], "--picture belongs to --grid; add --grid NAME=LOW:HIGH, or leave"),
        (["evaluate", "RUN", "--json", ""], "--json '': give a name, or leave it out"),
        (["evaluate", "RUN", "--env", ""], "--env '': give a name, or leave it out"),
        (["evaluate", "RUN", "--json", "/"], "--json / is a folder; name a file"),
        (["evaluate", "RUN", "--episodes", "1e12"], "--episodes 1000000000000: must be at most 1,000,000"),
        (["evaluate", "RUN", "--max-steps", "1e30"], "argument --max-steps: must be at most 1,000,000,000,000,000"),
        (["evaluate", "RUN", "--epsilon", "inf"], "epsilon: expected a finite number, got inf"),
        (["evaluate", "RUN", "--device", "cpu:3"], "device=cpu:3 is no device"),
    ],
)  # fmt: skip
def test_the_other_commands_refuse_in_one_line(
    words: list[str], line: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line in refused([str(trained) if word == "RUN" else word for word in words], capsys)


def test_runs_without_an_evaluation_are_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    table = tmp_path / "run" / "evaluations.csv"
    table.write_text(table.read_text().splitlines()[0] + "\n")
    assert "none of these runs has an evaluation yet" in refused(["plot", str(tmp_path / "run")], capsys)


def test_a_film_wrapper_names_its_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "moviepy", None)
    wrapper = f"env.wrappers=[{{class:RecordVideo,kwargs:{{video_folder:{tmp_path}}}}}]"
    words = ["train", "env=Pendulum-v1", "env.kwargs.render_mode=rgb_array", wrapper, f"run_dir={tmp_path / 'run'}"]
    assert "RecordVideo refuses this environment: moviepy is not installed, run `pip install" in refused(words, capsys)


def test_dollars_are_no_formula(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(trained), "--title", "$$ per $_{", "--out", str(tmp_path / "x.png")]) == 0
    assert "Pendulum-v1" in capsys.readouterr().out
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_a_step_beyond_every_number_is_a_step_that_nothing_reaches(trained: Path, tmp_path: Path) -> None:
    assert draw_runs([trained], tmp_path / "x.png", steps=[10**30]) == []


LEAVING = """
import gymnasium, sys
from gymnasium import spaces
class Leaving(gymnasium.Env):
    observation_space = action_space = spaces.Box(-1.0, 1.0, (1,))
    def __init__(self, where="step"):
        self.where = where
        self.leave("make")
    def leave(self, where):
        if where == self.where:
            sys.exit(0)
    def reset(self, *, seed=None, options=None):
        self.leave("reset")
        return self.observation_space.sample(), {}
    def step(self, action):
        self.leave("step")
        return self.observation_space.sample(), 0.0, False, False, {}
for where in ("make", "reset", "step"):
    gymnasium.register(f"Leave-{where}-v0", entry_point=Leaving, kwargs={"where": where})
"""


@pytest.mark.parametrize("where", ["make", "reset", "step"])
def test_code_that_ends_the_process_is_no_success(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rlopt_leaving.py").write_text(LEAVING)
    monkeypatch.syspath_prepend(tmp_path)
    words = [word for word in SHORT if not word.startswith("env=")]
    assert main(["train", f"env=rlopt_leaving:Leave-{where}-v0", *words, f"run_dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert "rlopt_leaving.py, line 11" in said and "sys.exit(0)" in said


class Acting(gymnasium.Env[Any, Any]):
    observation_space = spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.action_space = space


@pytest.mark.parametrize(
    ("agent", "space", "advice"),
    [
        ("sac", spaces.MultiDiscrete([2, 3]), "use agent=ppo"),
        ("sac_discrete", spaces.MultiBinary(3), "use agent=ppo"),
        ("td3", spaces.Discrete(2), "use agent=sac_discrete or ppo"),
        ("sac_discrete", spaces.Box(-1.0, 1.0, (2,)), "use agent=sac, td3 or ppo"),
        ("sac_discrete", spaces.Box(-np.inf, np.inf, (2,)), "use agent=ppo"),
    ],
)
def test_an_agent_that_does_not_fit_names_those_that_do(
    agent: str, space: spaces.Space[Any], advice: str, tmp_path: Path
) -> None:
    gymnasium.register("Acting-v0", entry_point=Acting, kwargs={"space": space})  # type: ignore[arg-type]
    try:
        with pytest.raises(RloptError, match=f"{advice}$"):
            begin(train_config({"agent": agent, "env": "Acting-v0", "run_dir": str(tmp_path / "run")}))
    finally:
        gymnasium.registry.pop("Acting-v0")


def test_memory_that_is_refused_is_told_in_one_line() -> None:
    with (
        pytest.raises(RloptError, match=r"^out of memory: 3,725\.3 GiB at once .*; take less$"),
        memory_told("take less"),
    ):
        torch.empty(10**12)
    with pytest.raises(RloptError, match=r"^out of memory: .*; take less$"), memory_told("take less"):
        np.empty(10**15, np.float64)
    with pytest.raises(ValueError, match=r"^mine$"), memory_told("take less"):
        raise ValueError("mine")
    refuse_unless_free(1000, "this", "take less")
    with pytest.raises(RloptError, match=r"^this needs 931,322\.6 GiB, and .* GiB are free on cpu; take less$"):
        refuse_unless_free(10**15, "this", "take less")


def test_a_training_that_runs_out_of_memory_is_saved_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes.")

    monkeypatch.setattr("rlopt.agents.sac.SAC.prepare", refusing)
    monkeypatch.setattr("rlopt.agents.sac.SAC.update", refusing)
    assert main(["train", *SHORT, f"run_dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr()
    assert said.err == (
        "error: out of memory: 4.0 GiB at once are more than there is; make agent.batch_size, agent.network.hidden, "
        "num_envs or num_runs smaller\n"
    )
    assert "the run was saved at step 31, where this error ends it" in said.out


def test_a_long_evaluation_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "PATIENCE", 0.0)
    env = make_env("Pendulum-v1", 2, autoreset=False, kwargs={"max_episode_steps": 2})
    policy: Policy = SAC(env.spec, SACConfig(network=NetworkConfig(hidden=(8,)))).policy
    said: list[str] = []
    with log_shown(said.append):
        evaluation.run_episodes(policy, env, 5, seed=0)
    assert said == ["evaluating: 2 of 5 episodes", "evaluating: 4 of 5 episodes"]


def test_a_screen_or_the_users_choice_decide_how_mujoco_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")

    def chosen(**given: str) -> str | None:
        for name in ("MUJOCO_GL", "SDL_VIDEODRIVER", "DISPLAY", "WAYLAND_DISPLAY"):
            monkeypatch.setenv(name, "")  # so that it is put back
            monkeypatch.delenv(name)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        prepare_graphics()
        return os.environ.get("MUJOCO_GL")

    assert chosen() == "egl" and os.environ["SDL_VIDEODRIVER"] == "dummy"
    assert chosen(DISPLAY=":0") is None and "SDL_VIDEODRIVER" not in os.environ
    assert chosen(WAYLAND_DISPLAY="wayland-0") is None
    assert chosen(MUJOCO_GL="osmesa") == "osmesa"


def test_a_graphics_library_that_is_not_there_is_told(tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    code = (
        "from rlopt.cli import main\n"
        f"print([main(['train', '{MUJOCO}', f'env.backend={{b}}', 'run_dir=run']) for b in ('auto', 'sync')])"
    )
    done = python("-c", code, cwd=tmp_path, MUJOCO_GL="nonsense")
    assert done.stdout == "[2, 2]\n"
    assert done.stderr.count("\n") == 2
    for line in done.stderr.splitlines():
        assert line.startswith("error: env=HalfCheetah-v5")
        assert "MUJOCO_GL=nonsense cannot be used here (" in line and "unset it, or install " in line


def test_hints_never_install_a_strangers_package() -> None:
    """PyPI's rlopt is somebody else's; until rlopt-torch is published, what is installed is the checkout."""
    assert install("mujoco") == 'in the checkout: pip install -c constraints.txt -e ".[mujoco]"'
    root = Path(__file__).resolve().parents[2]
    files = [*(root / "rlopt").rglob("*.py"), *(root / "examples").glob("*.py"), *root.glob("*.md")]
    wrong = [
        file.name for file in files if "pip install rlopt" in (text := file.read_text()) or 'pip install "rlopt' in text
    ]
    assert wrong == []
