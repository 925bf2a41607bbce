"""Training from a program: the words of the command line, environments as objects, results as tables."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit

import rlopt
from rlopt.analysis.tables import read_csv
from rlopt.cli.compose import compose
from rlopt.envs.torch_env import TorchEnv
from rlopt.training import Callback, Result, train_config
from rlopt.types import RloptError

SAC = {"agent.network.hidden": [8], "agent.fused": False, "agent.warmup_steps": 5, "agent.batch_size": 4}
RUN = {"total_steps": 20, "device": "cpu", "threads": 1, "log.tensorboard": False, "eval.episodes": 1,
       "buffer.capacity": 50, "progress": False}  # fmt: skip


# ---- words


def test_an_experiment_is_what_it_is_on_the_command_line() -> None:
    assert train_config({"experiment": "sac_hopper_v4"}) == compose(["experiment=sac_hopper_v4"])
    words = ["experiment=sac_hopper_v4", "env=Ant-v4", "agent.learning_rate=1e-2", "total_steps=5", "buffer=lap"]
    options = {"experiment": "sac_hopper_v4", "env": "Ant-v4", "agent.learning_rate": 1e-2, "total_steps": 5}
    assert train_config({**options, "buffer": "lap"}) == compose(words)
    assert train_config({**options, "buffer": {"name": "lap"}}).buffer.capacity == 1_000_000


def test_nested_and_dotted_names_are_one_and_the_latter_win() -> None:
    nested = train_config({"agent": {"name": "sac", "tau": 0.1, "network": {"hidden": [8]}}, "env": {"id": "Ant-v5"}})
    dotted = train_config({"agent": "sac", "agent.tau": 0.1, "agent.network.hidden": [8], "env": "Ant-v5"})
    both = train_config(
        {"agent.tau": 0.1, "agent": {"name": "sac", "tau": 0.2, "network": {"hidden": (8,)}}, "env": {"id": "Ant-v5"}}
    )
    assert nested == dotted == both


def test_files_of_config_groups_are_found_as_by_config_dir(tmp_path: Path) -> None:
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "slow.yaml").write_text("name: sac\nlearning_rate: 1e-5\n")
    assert train_config({"agent": "slow", "env": "Ant-v5"}, tmp_path).agent.learning_rate == 1e-5
    assert train_config({"agent": "drpg", "env": "garnet", "agent.gamma": 0.5}).env.kwargs["gamma"] == 0.5


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"experiment": "sac_hoper_v4"}, "experiment='sac_hoper_v4': no such experiment; did you mean sac_hopper_v4?"),
        ({"agent": "sca"}, "agent='sca': no such agent; did you mean sac?"),
        ({"agent": {"tau": 0.1}}, "agent: needs a name; give one of c51, ddqn_lap, "),
        ({"agent": "sac", "agent.tua": 0.1}, "agent.tua: no such option; did you mean agent.tau?"),
        ({"experiment": "sac_hopper_v4", "seeed": 1}, "seeed: no such option; did you mean seed?"),
    ],
)
def test_a_mistake_is_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(RloptError) as caught:
        train_config(options)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


# ---- one call


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    run = tmp_path_factory.mktemp("runs") / "first"
    return rlopt.train("sac", "Pendulum-v1", **SAC, **{**RUN, "run_dir": run, "log.every": 5})


def test_a_result_has_tables(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (result.status, result.step) == ("finished", 20)
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert [row["step"] for row in result.metrics] == [5, 10, 15, 20]
    last = [row["return"] for row in result.evaluations if row["step"] == 20]  # another was made at step 0
    assert last == [e.total_reward for e in result.evaluation]
    assert result.episodes == []
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda columns: ("frame", list(columns))))
    assert result.metrics[0] == "frame" and "critic_loss" in result.metrics[1]


def test_a_run_goes_on_where_it_stopped(result: Result) -> None:
    with pytest.raises(RloptError, match=r"agent\.tau: a resumed run keeps its own"):
        rlopt.train(resume=result.folder, progress=False, **{"agent.tau": 0.1})
    with pytest.raises(RloptError, match="env: a resumed run keeps its own"):
        rlopt.train(resume=result.folder, env="Pendulum-v1", progress=False)
    further = rlopt.train(resume=result.folder, total_steps=40, progress=False, **{"log.every": 10})
    assert (further.folder, further.step) == (result.folder, 40)
    assert list(read_csv(result.folder / "metrics.csv")["step"]) == [5, 10, 15, 20, 30, 40]


def test_without_an_environment_it_says_so() -> None:
    with pytest.raises(RloptError, match="env: name an environment"):
        rlopt.train("sac")


def test_progress_is_shown_unless_it_is_not_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rlopt.train("sac", "Pendulum-v1", **SAC, **{**RUN, "run_dir": tmp_path / "mute"})
    assert capsys.readouterr().out == ""
    rlopt.train("sac", "Pendulum-v1", **SAC, **{**RUN, "run_dir": tmp_path / "told", "progress": True})
    assert "step 20/20" in capsys.readouterr().out


def test_ctrl_c_saves_and_is_raised(tmp_path: Path) -> None:
    class Press(Callback):
        def on_step(self, trainer: Any, progress: Any) -> None:
            if trainer.loop.step == 8:
                signal.raise_signal(signal.SIGINT)

    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step 8; rlopt\.train\(resume="):
        rlopt.train("sac", "Pendulum-v1", callbacks=[Press()], **SAC, **{**RUN, "run_dir": tmp_path / "run"})
    assert rlopt.train(resume=tmp_path / "run", progress=False).step == 20


# ---- environments as objects


class Line(gymnasium.Env[Any, Any]):
    """A point that is pushed along a line."""

    observation_space = spaces.Box(-9.0, 9.0, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, start: float = 0.0) -> None:
        self.start, self.x = start, start

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.x = self.start
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.x = float(np.clip(self.x + action[0], -9.0, 9.0))
        return self._seen(), -abs(self.x), False, False, {}

    def _seen(self) -> Any:
        return np.array([self.x], np.float32)


class Push(TorchEnv):
    """The same by tensors."""

    observation_space = spaces.Box(-9.0, 9.0, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    episode_limit = 7

    def initial(self, streams: Any) -> torch.Tensor:
        return streams.uniform(-1.0, 1.0)

    def dynamics(self, state: Any, action: torch.Tensor) -> Any:
        state = (state + action[:, 0]).clamp(-9.0, 9.0)
        return state, -state.abs(), torch.zeros_like(state, dtype=torch.bool)

    def observe(self, state: Any) -> torch.Tensor:
        return state[:, None]


@pytest.mark.parametrize(
    ("env", "id"),
    [
        (lambda: TimeLimit(Line(2.0), 7), "local/Env-v0"),
        (TimeLimit(Line(2.0), 7), "local/Line-v0"),
        (Push, f"{__name__}:Push"),
    ],
    ids=["function", "instance", "torch"],
)
def test_an_environment_may_be_an_object(env: Any, id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)  # where it is installed, tables are its frames
    run = tmp_path / "run"
    made = rlopt.train("sac", env, num_envs=2, **SAC, **{**RUN, "run_dir": run})
    assert f"id: {id}" in (run / "config.yaml").read_text()
    assert {row["length"] for row in made.episodes} == {7}
    assert rlopt.train(resume=run, env=env, total_steps=30, progress=False).step == 30


def test_an_instance_is_copied_and_not_touched(tmp_path: Path) -> None:
    env = TimeLimit(Line(2.0), 7)
    rlopt.train("sac", env, **SAC, **{**RUN, "run_dir": tmp_path / "run"})
    assert env.unwrapped.x == 2.0 and env._elapsed_steps is None


def test_what_is_no_environment_or_cannot_be_copied_is_told(tmp_path: Path) -> None:
    with pytest.raises(RloptError, match="env=7: expected an id, options, a function"):
        rlopt.train("sac", 7)  # type: ignore[arg-type]
    env = Line()
    env.lock = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(RloptError, match=r"this Line cannot be copied \(.*\); give a function .* env=lambda: MyEnv"):
        rlopt.train("sac", env)


def test_a_run_in_an_object_is_resumed_by_whoever_has_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    rlopt.train("sac", TimeLimit(Line(), 7), **SAC, **{**RUN, "run_dir": run})
    with pytest.raises(RloptError, match=r"was trained in local/Line-v0, not in local/Env-v0"):
        rlopt.train(resume=run, env=lambda: Line(1.0))
    gymnasium.registry.pop("local/Line-v0")
    with pytest.raises(RloptError, match="an environment that its program gave as an object; give env= again"):
        rlopt.train(resume=run)
    assert rlopt.train(resume=run, env=TimeLimit(Line(), 7), total_steps=25, progress=False).step == 25
