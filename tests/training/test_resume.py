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
from rlopt.registry import SAMPLERS as REGISTERED_SAMPLERS
from rlopt.runs.checkpoint import Checkpoints
from rlopt.state import states_equal
from rlopt.training import TrainConfig
from rlopt.training.evaluate import evaluate_path
from rlopt.training.setup import begin, make_loop
from tests.agents.cases import AGENTS, short_run
from tests.buffers.cases import SAMPLERS
from tests.training.killed_runs import Killer
from tests.training.small_runs import run_to_end

pytestmark = pytest.mark.usefixtures("without_curves")
TIMES = {"steps_per_second", "env_seconds", "learn_seconds"}

GYM = {"backend": "auto"}
"""Gymnasium's own, stepped one by one."""
FEATURES = {
    "hand-written-gradients": {"agent": {"fused": True}, "env": GYM},
    "halfcheetah": {"env": {"id": "HalfCheetah-v4", **GYM}},
    "ant-contact-forces": {"env": {"id": "Ant-v5", **GYM}},
    "three-envs-normalised-n-step": {
        "agent": {"n_step": 3, "update_ratio": [2, 5], "policy_delay": 2},
        "env": {"id": "Hopper-v4", **GYM, "normalize_obs": True, "normalize_reward": True},
        "num_envs": 3,
    },
    "ring-overwritten": {"env": GYM, "buffer": {"name": "uniform", "capacity": 60}},
    "single-frames": {
        "agent": {"n_step": 2}, "num_envs": 2,
        "env": {
            "id": "rlopt-tests/Screen-v0", **GYM,
            "wrappers": [{"class": "FrameStackObservation", "kwargs": {"stack_size": 3}}],
        },
        "buffer": {"name": "reshuffled", "capacity": 90, "frame_stack": 3},
    },
    "three-runs-side-by-side": {
        "agent": {"max_grad_norm": 1.0}, "env": GYM, "num_envs": 2, "num_runs": 3,
        "buffer": {"name": "prioritized_reshuffled", "capacity": 90},
    },
    "budgets-of-three-runs": {
        "agent": {"name": "mansa", "budget": 2, "epsilon_end": 1.0}, "num_envs": 2, "num_runs": 3,
    },
    "overlap-bf16": {"agent": {"fused": True}, "env": GYM, "num_envs": 2, "overlap": True, "precision": "bf16"},
    "torch-environments": {
        "agent": {"update_ratio": [1, 4]}, "num_envs": 8, "buffer": {"name": "uniform", "capacity": 120},
    },
    "atari-games-played-again": {
        "agent": {"name": "sac_discrete", "update_ratio": [1, 8]}, "num_envs": 2,
        "env": {
            "id": "ALE/Breakout-v5", **GYM, "protocol": "classic",
            "kwargs": {"max_episode_steps": 34, "img_height": 44, "img_width": 44},
        },
        "buffer": {"name": "reshuffled", "capacity": 90},
    },
    "atari-overlap-bf16": {
        "agent": {"name": "ddqn_lap"}, "num_envs": 2, "overlap": True, "precision": "bf16",
        "env": {"id": "ALE/Pong-v5", **GYM, "kwargs": {"max_episode_steps": 34, "img_height": 44, "img_width": 44}},
    },
    "async-workers": {"env": {**GYM, "backend": "async"}, "num_envs": 2},
}  # fmt: skip
"""Runs (of SAC, where nothing else is said) that differ in what must be saved."""
CASES = {
    **{name: {"agent": {"name": name}} for name in AGENTS},
    **{
        f"buffer-{name}": {"env": GYM, "num_envs": 3, "buffer": {"name": name, "capacity": 90, **options}}
        for name, options in SAMPLERS.items()
    },
    **FEATURES,
}


def agent_of(case: str) -> str:
    return CASES[case].get("agent", {}).get("name", "sac")


def config(case: str, run_dir: Path, **options) -> TrainConfig:
    return short_run(agent_of(case), run_dir, **{**CASES[case], **options})


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


@pytest.fixture(scope="module")
def killer():
    """``killer(case, run, at)``: train until past step ``at``, and die."""
    killer = Killer()
    yield killer
    killer.close()


def last_evaluation(run: Path) -> list[float]:
    """Returns of the last evaluation that a run wrote."""
    rows = table(run / "evaluations.csv")
    return [float(row["return"]) for row in rows if row["step"] == rows[-1]["step"]]


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_equals_never_stopped(case, tmp_path, killer):
    """And the policy that it leaves is evaluated as the trainer evaluated it."""
    from rlopt.training.setup import resume

    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run_to_end(begin(config(case, straight)))
    total = AGENTS[agent_of(case)].steps
    killer(case, broken, at=total * 22 // 30 + 1)
    trainer = resume(broken, {})
    assert total * 13 // 30 <= trainer.loop.step < total
    assert run_to_end(trainer).status == "finished"

    step_a, state_a, rows_a = final_state(straight, case)
    step_b, state_b, rows_b = final_state(broken, case)
    assert step_a == step_b == total
    assert states_equal(state_a, state_b) is None
    assert states_equal(rows_a, rows_b) is None
    for name in ("metrics.csv", "episodes.csv", "evaluations.csv"):
        assert table(straight / name) == table(broken / name), name
    assert table(straight / "metrics.csv")
    if table(broken / "evaluations.csv"):  # robust solvers have no environment to act in
        runs = range(CASES[case]["num_runs"]) if "num_runs" in CASES[case] else [None]
        assert [x for run in runs for x in evaluate_path(broken, run=run).returns] == last_evaluation(broken)


def test_extending_a_finished_run_equals_a_longer_one(tmp_path):
    from rlopt.training.setup import resume

    run_to_end(begin(config("sac", tmp_path / "short", total_steps=110)))
    run_to_end(resume(tmp_path / "short", {"total_steps": 150}))
    run_to_end(begin(config("sac", tmp_path / "long", total_steps=150)))
    _, a, rows_a = final_state(tmp_path / "short", "sac")
    _, b, rows_b = final_state(tmp_path / "long", "sac")
    assert states_equal(a, b) is None
    assert states_equal(rows_a, rows_b) is None


def test_a_second_run_with_the_same_seed_is_the_same_run(tmp_path):
    for name in ("a", "b"):
        run_to_end(begin(config("sac", tmp_path / name)))
    for name in ("metrics.csv", "episodes.csv", "evaluations.csv"):
        assert table(tmp_path / "a" / name) == table(tmp_path / "b" / name)


def test_evaluating_more_often_changes_nothing_in_training(tmp_path):
    from dataclasses import replace

    often = config("sac", tmp_path / "often")
    run_to_end(begin(replace(often, eval=replace(often.eval, every=10))))
    rarely = config("sac", tmp_path / "rarely")
    run_to_end(begin(replace(rarely, eval=replace(rarely.eval, every=None))))
    assert table(tmp_path / "often" / "episodes.csv") == table(tmp_path / "rarely" / "episodes.csv")
    _, a, rows_a = final_state(tmp_path / "often", "sac")
    _, b, rows_b = final_state(tmp_path / "rarely", "sac")
    assert states_equal(a["loop"], b["loop"]) is None
    assert states_equal(rows_a, rows_b) is None


def test_an_environment_that_cannot_be_saved_follows_the_documented_rule(tmp_path, monkeypatch, caplog):
    """New episodes begin, the open one is dropped from the statistics, and no n-step window crosses the cut."""
    from rlopt.envs import SyncVectorEnv
    from rlopt.training.setup import resume

    monkeypatch.setattr(SyncVectorEnv, "state_dict", lambda self: None)
    case = "three-envs-normalised-n-step"
    monkeypatch.setitem(FEATURES[case]["env"], "backend", "sync")
    run_to_end(begin(config(case, tmp_path / "run", total_steps=240)))
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


def test_every_registered_sampler_has_a_row() -> None:
    """Else no walking test would look at it: add a row to ``tests/buffers/cases.py``.

    What stands over others, and needs a goal environment, walks over all of them in ``test_hindsight.py``."""
    assert {*SAMPLERS, "hindsight"} == set(REGISTERED_SAMPLERS)
