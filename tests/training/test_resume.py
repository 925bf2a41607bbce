"""The promise that matters most: k steps, kill -9, resume, n - k steps equal n steps, bit for bit."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tests.training.screen_env  # noqa: F401 (registers its environment)
from rlopt.registry import AGENTS, get_agent
from rlopt.runs.checkpoint import Checkpoints
from rlopt.state import states_equal
from rlopt.training import train_config
from rlopt.training.setup import make_loop, train

TIMES = {"steps_per_second", "env_seconds", "learn_seconds"}

SHORT = {"max_episode_steps": 70}
SMALL = {"network": {"hidden": [16, 16]}, "batch_size": 8, "warmup_steps": 40}
CASES = {
    "sac-pendulum": {"agent": {"name": "sac", **SMALL}, "env": {"id": "Pendulum-v1"}},
    "sac-halfcheetah": {"agent": {"name": "sac", **SMALL}, "env": {"id": "HalfCheetah-v4", "kwargs": SHORT}},
    "sac-ant-contact-forces": {"agent": {"name": "sac", **SMALL}, "env": {"id": "Ant-v5", "kwargs": SHORT}},
    "sac-three-envs-normalised-n-step": {
        "agent": {"name": "sac", **SMALL, "n_step": 3, "update_ratio": [2, 5], "policy_delay": 2},
        "env": {"id": "Hopper-v4", "kwargs": SHORT, "normalize_obs": True, "normalize_reward": True},
        "num_envs": 3,
    },
    "sac-2018": {"agent": {"name": "sac_2018", **SMALL}, "env": {"id": "Pendulum-v1"}},
    "sac-discrete": {"agent": {"name": "sac_discrete", **SMALL}, "env": {"id": "CartPole-v1"}},
    "ring-overwritten": {
        "agent": {"name": "sac", **SMALL}, "env": {"id": "Pendulum-v1"}, "buffer": {"name": "uniform", "capacity": 70},
    },
    "distinct": {"agent": {"name": "sac", **SMALL}, "env": {"id": "Pendulum-v1"}, "buffer": {"name": "distinct"}},
    "reshuffled": {
        "agent": {"name": "sac", **SMALL}, "env": {"id": "Pendulum-v1"}, "num_envs": 3,
        "buffer": {"name": "reshuffled", "capacity": 150},
    },
    "prioritized": {
        "agent": {"name": "sac", **SMALL}, "env": {"id": "Pendulum-v1"},
        "buffer": {"name": "prioritized", "capacity": 150, "anneal_draws": 400},
    },
    "single-frames": {
        "agent": {"name": "sac", **SMALL, "n_step": 2}, "num_envs": 2,
        "env": {
            "id": "rlopt-tests/Screen-v0",
            "wrappers": [{"class": "FrameStackObservation", "kwargs": {"stack_size": 3}}],
        },
        "buffer": {"name": "reshuffled", "capacity": 150, "frame_stack": 3},
    },
    "three-runs-side-by-side": {
        "agent": {"name": "sac", **SMALL, "max_grad_norm": 1.0}, "env": {"id": "Pendulum-v1"}, "num_envs": 2,
        "num_runs": 3, "buffer": {"name": "prioritized_reshuffled", "capacity": 150},
    },
    "overlap-bf16": {
        "agent": {"name": "sac", **SMALL}, "env": {"id": "Pendulum-v1"}, "num_envs": 2, "overlap": True,
        "precision": "bf16",
    },
    "torch-environments": {
        "agent": {"name": "sac", **SMALL, "update_ratio": [1, 4]}, "env": {"id": "Pendulum-v1", "backend": "torch"},
        "num_envs": 8, "buffer": {"name": "uniform", "capacity": 200},
    },
    "lap": {"agent": {"name": "sac", **SMALL}, "env": {"id": "Pendulum-v1"}, "buffer": {"name": "lap"}},
    "prioritized-reshuffled": {
        "agent": {"name": "sac", **SMALL}, "env": {"id": "Pendulum-v1"}, "num_envs": 3,
        "buffer": {"name": "prioritized_reshuffled", "capacity": 150, "beta": 0.4},
    },
    "async-workers": {
        "agent": {"name": "sac", **SMALL}, "env": {"id": "Pendulum-v1", "backend": "async"}, "num_envs": 2,
    },
    "reinforce": {
        "agent": {"name": "reinforce", "network": {"hidden": [16]}, "groups": 2, "group_size": 2},
        "env": {"id": "CartPole-v1"},
    },
    "value-iteration": {"agent": {"name": "value_iteration"}, "env": {"id": "FrozenLake-v1"}},
}  # fmt: skip


def config(case: str, run_dir: Path, total_steps: int = 300):
    common = {
        "seed": 3,
        "total_steps": total_steps,
        "device": "cpu",
        "run_dir": str(run_dir),
        "eval": {"every": 100, "episodes": 2},
        "log": {"every": 50, "tensorboard": False},
        "checkpoint": {"minutes": None, "every_steps": 130},
    }
    return train_config({**common, **CASES[case]})


def run_to_end(trainer):
    try:
        return trainer.run()
    finally:
        trainer.close()
        trainer.folder.close()


def table(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open() as f:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(f)]


def final_state(run: Path, case: str):
    """State and replay rows of the newest checkpoint."""
    loaded = Checkpoints(run / "checkpoints").load()
    loop = make_loop(config(case, run))
    loop.load_state_dict(loaded.state["loop"])
    Checkpoints(run / "checkpoints").restore_logs(loaded, loop.row_logs())
    rows = {
        name: log.read_rows(max(0, log.rows_written - log.capacity_rows), log.rows_written)
        for name, log in loop.row_logs().items()
    }
    loop.close()
    return loaded.step, loaded.state, rows


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.training.test_resume import config, run_to_end
from rlopt.training.setup import train
from rlopt.training.trainer import Callback

class Kill(Callback):
    def on_step(self, trainer, progress):
        if trainer.loop.step >= {at}:
            os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    run_to_end(train(config({case!r}, Path({run!r})), callbacks=[Kill()]))
"""


def start_and_kill(case: str, run: Path, at: int) -> None:
    """Train in a process that kills itself with SIGKILL once it is past step ``at``."""
    code = KILLED.format(root=str(Path(__file__).parents[2]), at=at, case=case, run=str(run))
    script = run.parent / "killed.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_equals_never_stopped(case, tmp_path):
    from rlopt.training.setup import resume

    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run_to_end(train(config(case, straight)))
    start_and_kill(case, broken, at=221)
    trainer = resume(broken, {})
    if case != "value-iteration":
        assert 130 <= trainer.loop.step < 300
    assert run_to_end(trainer).status == "finished"

    step_a, state_a, rows_a = final_state(straight, case)
    step_b, state_b, rows_b = final_state(broken, case)
    assert step_a == step_b == 300
    assert states_equal(state_a, state_b) is None
    assert states_equal(rows_a, rows_b) is None
    for name in ("metrics.csv", "episodes.csv", "evaluations.csv"):
        assert table(straight / name) == table(broken / name), name
    assert table(straight / "metrics.csv") and table(straight / "evaluations.csv")


def test_extending_a_finished_run_equals_a_longer_one(tmp_path):
    from rlopt.training.setup import resume

    run_to_end(train(config("sac-pendulum", tmp_path / "short", total_steps=200)))
    run_to_end(resume(tmp_path / "short", {"total_steps": 300}))
    run_to_end(train(config("sac-pendulum", tmp_path / "long", total_steps=300)))
    _, a, rows_a = final_state(tmp_path / "short", "sac-pendulum")
    _, b, rows_b = final_state(tmp_path / "long", "sac-pendulum")
    assert states_equal(a, b) is None
    assert states_equal(rows_a, rows_b) is None


def test_a_second_run_with_the_same_seed_is_the_same_run(tmp_path):
    for name in ("a", "b"):
        run_to_end(train(config("sac-pendulum", tmp_path / name)))
    for name in ("metrics.csv", "episodes.csv", "evaluations.csv"):
        assert table(tmp_path / "a" / name) == table(tmp_path / "b" / name)


def test_evaluating_more_often_changes_nothing_in_training(tmp_path):
    from dataclasses import replace

    often = config("sac-pendulum", tmp_path / "often")
    run_to_end(train(replace(often, eval=replace(often.eval, every=10))))
    rarely = config("sac-pendulum", tmp_path / "rarely")
    run_to_end(train(replace(rarely, eval=replace(rarely.eval, every=None))))
    assert table(tmp_path / "often" / "episodes.csv") == table(tmp_path / "rarely" / "episodes.csv")
    _, a, rows_a = final_state(tmp_path / "often", "sac-pendulum")
    _, b, rows_b = final_state(tmp_path / "rarely", "sac-pendulum")
    assert states_equal(a["loop"], b["loop"]) is None
    assert states_equal(rows_a, rows_b) is None


def test_an_environment_that_cannot_be_saved_follows_the_documented_rule(tmp_path, monkeypatch, caplog):
    """New episodes begin, the open one is dropped from the statistics, and no n-step window crosses the cut."""
    from rlopt.envs import SyncVectorEnv
    from rlopt.training.setup import resume

    monkeypatch.setattr(SyncVectorEnv, "state_dict", lambda self: None)
    case = "sac-three-envs-normalised-n-step"
    monkeypatch.setitem(CASES[case]["env"], "backend", "sync")
    run_to_end(train(config(case, tmp_path / "run", total_steps=240)))
    trainer = resume(tmp_path / "run", {"total_steps": 300})
    loop = trainer.loop
    assert "cannot be saved" in caplog.text
    assert loop.counter.lengths.tolist() == [0, 0, 0]
    buffer = loop.buffer
    assert buffer.rows_written == 81 and buffer.transitions == 240
    newest = 79 * 3  # the last real row: its windows must have length 1
    import torch

    index = torch.arange(newest, newest + 3)
    _, discount, last = buffer._returns(index)
    assert torch.equal(last, index)
    assert torch.allclose(discount, torch.full((3,), 0.99))
    result = run_to_end(trainer)
    assert result.step == 300


def test_sigterm_saves_and_says_how_to_resume(tmp_path):
    run = tmp_path / "run"
    arguments = ["agent=sac", "env=Pendulum-v1", "total_steps=200000", "agent.network.hidden=[16]", f"run_dir={run}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", "rlopt.cli", "train", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (run / "episodes.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    child.send_signal(signal.SIGTERM)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM, output
    assert f"resume={run}" in output
    loaded = Checkpoints(run / "checkpoints").load()
    assert loaded is not None and loaded.step > 0
    assert (run / "policy" / "policy.json").exists()


def test_every_agent_that_acts_in_an_environment_has_a_case() -> None:
    """Those that solve models and the deep robust ones are killed in tests of their own."""
    acting = {name for name in AGENTS if get_agent(name).loop in ("replay", "group")}
    assert acting <= {case["agent"]["name"] for case in CASES.values()}
