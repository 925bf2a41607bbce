"""Several runs in one process, and environments that step while the agent learns."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import rlopt
from rlopt.cli import main
from rlopt.policy import load_policy, save_policy
from rlopt.runs.display import Display
from rlopt.state import load_state, save_state, states_equal
from rlopt.training import train_config
from rlopt.training.evaluate import evaluate_path
from rlopt.training.setup import begin, make_loop, resolve_config
from rlopt.types import RloptError

AGENT = {"name": "sac", "network": {"hidden": [16, 16]}, "batch_size": 8, "warmup_steps": 20}


def config(run_dir: Path | None = None, **options):
    common = {
        "seed": 4, "total_steps": 30, "device": "cpu", "threads": 1, "env": {"id": "Pendulum-v1"},
        "buffer": {"name": "reshuffled", "capacity": 1000}, "agent": AGENT,
        "run_dir": None if run_dir is None else str(run_dir),
        "eval": {"every": 15, "episodes": 2}, "log": {"every": 10, "tensorboard": False},
    }  # fmt: skip
    return train_config({**common, **options})


def finish(loop):
    while loop.step < loop.total_steps:
        loop.advance()
    return loop


def test_each_run_is_the_single_run_with_its_seed() -> None:
    """Same initial weights, warm-up actions, episodes, draws and noise: equal until rounding grows (ten updates)."""
    options = {"num_envs": 2, "total_steps": 29}  # the last vector step stores one row of each run
    together = finish(make_loop(config(num_runs=3, **options)))
    assert together.step == 29
    assert together.agent.clock.updates == 9
    for r in range(3):
        alone = finish(make_loop(config(**{**options, "seed": 4 + r})))
        for net in ("actor", "critic", "target"):
            stacked, single = getattr(together.agent, net).flat[r], getattr(alone.agent, net).flat
            torch.testing.assert_close(stacked, single, rtol=1e-3, atol=1e-4)
        columns = slice(2 * r, 2 * r + 2)
        rows = together.buffer.read_rows(0, 10)  # the warm-up, where nothing has been learnt
        for name, values in alone.buffer.read_rows(0, 10).items():
            assert torch.equal(rows[name][:, columns], values), name
        alone.close()
    together.close()


def test_a_run_folder_of_several_runs(tmp_path) -> None:
    out = io.StringIO()
    trainer = begin(config(tmp_path / "run", num_runs=2), display=Display(30, stream=out))
    result = trainer.run()
    trainer.close()
    assert " steps/s of 2 runs  " in out.getvalue()
    with (tmp_path / "run" / "evaluations.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert [(row["step"], row["episode"], row["run"]) for row in rows] == [
        (step, episode, run) for step in ("0", "15", "30") for run in "01" for episode in "01"
    ]
    assert (tmp_path / "run" / "curve.png").stat().st_size > 0
    for r in range(2):
        policy = load_policy(tmp_path / "run" / "policy" / f"run{r}")
        assert policy.meta["seed"] == 4 + r
        again = evaluate_path(tmp_path / "run" / "policy" / f"run{r}", 2)
        assert again.returns == [e.total_reward for e in result.evaluation if e.run == r]
        assert (tmp_path / "run" / "policy_best" / f"run{r}").is_dir()
    with pytest.raises(RloptError, match=r"holds the policies of several runs; name one of them, such as .*run0"):
        load_policy(tmp_path / "run")


def test_all_runs_of_a_folder_are_evaluated_in_an_environment_of_the_users(tmp_path, capsys) -> None:
    run, agent = tmp_path / "run", {**AGENT, "network": {"hidden": [8]}, "fused": False}
    env = {"id": "rlopt.envs.counting:rlopt/Count-v0", "kwargs": {"length": [3, 5]}}
    trainer = begin(config(run, num_runs=2, total_steps=10, agent=agent, env=env))
    result = trainer.run()
    trainer.close()
    assert main(["evaluate", str(run), "--json", "-"]) == 0
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "has no time limit" not in line]
    assert [line.split("  ")[:2] for line in lines] == [["run0", "seed 4"], ["run1", "seed 5"]]
    assert all("over 2 episodes (rlopt.envs.counting:rlopt/Count-v0)" in line for line in lines)
    for r, found in enumerate(json.loads(said.out)):
        assert [e["return"] for e in found["episodes"]] == [e.total_reward for e in result.evaluation if e.run == r]
    with pytest.raises(RloptError, match="names a module"):
        evaluate_path(shutil.copytree(run / "policy" / "run0", tmp_path / "elsewhere"))


def test_every_run_has_statistics_of_its_own(tmp_path: Path) -> None:
    """Those of the single run with its seed, as long as both act alike; and so has its policy."""
    env = {"id": "Pendulum-v1", "normalize_obs": True, "normalize_reward": True}
    options = {"num_envs": 2, "total_steps": 24, "env": env, "agent": {**AGENT, "fused": False}}
    together = finish(make_loop(config(num_runs=2, **options)))
    assert together.normalizer is not None
    probe = torch.randn(5, 3)
    for r, policy in enumerate(together.policies()):
        alone = finish(make_loop(config(**{**options, "seed": 4 + r})))
        single, own = alone.normalizer, together.normalizer.of_run(r)
        assert single is not None and single.returns is not None and together.normalizer.returns is not None
        torch.testing.assert_close(own.normalize_obs(probe), single.normalize_obs(probe), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(together.normalizer.returns.variance[r], single.returns.variance)
        torch.testing.assert_close(policy.act(probe).action, alone.policy().act(probe).action, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(together.agent.actor.flat[r], alone.agent.actor.flat, rtol=1e-3, atol=1e-4)
        save_policy(policy, tmp_path / str(r))
        assert torch.equal(load_policy(tmp_path / str(r)).act(probe).action, policy.act(probe).action)
        alone.close()
    state = load_state(save_state(tmp_path / "state", together.state_dict()) and tmp_path / "state")
    again = make_loop(config(num_runs=2, **options))
    again.load_state_dict(state)
    states_equal(again.state_dict(), together.state_dict())
    for loop in (again, together):
        loop.close()


@pytest.mark.parametrize(
    "option", [{"num_runs": 2}, {"overlap": True}, {"precision": "bf16"}, {"update_mode": "captured"}]
)
def test_modes_of_the_replay_loop_are_refused_elsewhere(option) -> None:
    name = next(iter(option))
    with pytest.raises(RloptError, match=f"{name}=.*: agent=value_iteration has no such mode; leave {name} out"):
        make_loop(config(agent={"name": "value_iteration"}, env={"id": "FrozenLake-v1"}, **option))


@pytest.mark.parametrize(
    "options",
    [
        {"agent": {**AGENT, "policy_delay": 2}},
        {"num_runs": 2, "buffer": {"name": "prioritized"}},
        {"overlap": True, "precision": "bf16"},
        {"agent": {**AGENT, "n_step": 3, "lr_schedule": "linear"}},
        {"env": {"id": "Pendulum-v1", "normalize_obs": True}},
    ],
)
def test_a_captured_update_is_the_eager_one(options) -> None:
    """On the CPU the graph is left out; fixed tensors, phases, clock and priorities are the same as on a GPU."""
    eager, captured = (
        finish(make_loop(resolve_config(config(update_mode=mode, **options)))) for mode in ("eager", "captured")
    )
    assert captured.captured is not None and eager.captured is None
    assert captured.agent.clock.updates == eager.agent.clock.updates == 10
    for net in ("actor", "critic", "target"):
        assert torch.equal(getattr(captured.agent, net).flat, getattr(eager.agent, net).flat)
    for loop in (eager, captured):
        loop.close()


@pytest.mark.parametrize("ratio", [[1, 1], [3, 2], [1, 4]])
def test_overlap_makes_every_update_and_only_learns_one_step_later(ratio) -> None:
    agent = {**AGENT, "update_ratio": ratio}
    plain = make_loop(config(agent=agent))
    aside = make_loop(config(agent=agent, overlap=True))
    behind = []
    while plain.step < plain.total_steps:
        plain.advance()
        aside.advance()
        assert plain.step == aside.step
        behind.append(plain.agent.clock.updates - aside.agent.clock.updates)
    assert plain.agent.clock.updates == aside.agent.clock.updates == math.floor(10 * ratio[0] / ratio[1])
    assert max(behind) == math.ceil(ratio[0] / ratio[1])
    assert behind[-1] == 0 and plain.owed == aside.owed
    plain.close()
    aside.close()


def test_overlap_repeats_itself_bit_for_bit() -> None:
    loops = [finish(make_loop(config(overlap=True, num_envs=2))) for _ in range(2)]
    assert torch.equal(loops[0].agent.critic.flat, loops[1].agent.critic.flat)
    for name, values in loops[0].buffer.read_rows(0, 15).items():
        assert torch.equal(values, loops[1].buffer.read_rows(0, 15)[name])
    for loop in loops:
        loop.close()


def test_what_programs_use_of_the_trainer_stands_in_one_place() -> None:
    assert {name: getattr(rlopt.training, name).__name__ for name in rlopt.training.__all__} == {
        name: name for name in rlopt.training.__all__
    }
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        rlopt.training.trian  # noqa: B018


def test_thousands_of_rows_are_collected_stored_and_learnt_from() -> None:
    """4096 torch environments, the last vector step cut to what total_steps leaves of it."""
    agent = {**AGENT, "warmup_steps": 4096, "update_ratio": [1, 512]}
    env = {"id": "Pendulum-v1", "backend": "torch"}
    loop = finish(make_loop(config(num_envs=4096, total_steps=3 * 4096 + 1024, agent=agent, env=env,
                                   buffer={"name": "uniform", "capacity": 8192})))  # fmt: skip
    assert loop.step == loop.agent.clock.env_steps == 3 * 4096 + 1024
    assert loop.agent.clock.updates == (2 * 4096 + 1024) // 512
    newest = loop.buffer.read_rows(3, 4)["block"][0]
    valid = newest[:, loop.buffer.slices["valid"]].flatten()
    assert int(valid.sum()) == 1024 and loop.buffer.transitions == 4096 + 1024
    loop.close()
