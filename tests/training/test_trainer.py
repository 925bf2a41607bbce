"""The trainer: exact steps, callbacks, guards against non-finite values, failures of the disk."""

import csv
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from rlopt.state import states_equal
from rlopt.training import checkpoint as checkpoint_module
from rlopt.training.checkpoint import CheckpointFailed, Checkpoints
from rlopt.training.config import train_config
from rlopt.training.setup import make_loop, resume, train
from rlopt.training.trainer import Callback
from rlopt.types import RloptError

SMALL = {"name": "sac", "network": {"hidden": [16]}, "batch_size": 8, "warmup_steps": 20}


def config(run_dir: Path, **more):
    base = {
        "total_steps": 100,
        "device": "cpu",
        "run_dir": str(run_dir),
        "agent": SMALL,
        "env": {"id": "Pendulum-v1"},
        "eval": {"every": 50, "episodes": 2},
        "log": {"every": 25, "tensorboard": False},
    }
    return train_config({**base, **more})


def run_to_end(trainer):
    try:
        return trainer.run()
    finally:
        trainer.close()
        trainer.folder.close()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("num_envs", [1, 3, 7])
def test_total_steps_is_reached_exactly(tmp_path, num_envs):
    trainer = train(config(tmp_path / "run", num_envs=num_envs))
    result = run_to_end(trainer)
    assert result.status == "finished" and result.step == 100
    assert trainer.loop.buffer.transitions == 100
    assert trainer.loop.agent.clock.env_steps == 100


@pytest.mark.parametrize(("ratio", "updates"), [((1, 1), 80), ((1, 4), 20), ((3, 2), 120), ((2, 1), 160)])
def test_the_update_ratio_is_exact(tmp_path, ratio, updates):
    """The 80 steps after the 20 of the warm-up owe updates."""
    trainer = train(config(tmp_path / "run", agent={**SMALL, "update_ratio": list(ratio)}))
    run_to_end(trainer)
    assert trainer.loop.agent.clock.updates == updates


def test_the_run_folder_holds_what_it_promises(tmp_path):
    run = tmp_path / "run"
    result = run_to_end(train(config(run, log={"every": 25, "tensorboard": True})))
    for name in (
        "config.yaml",
        "metrics.csv",
        "evaluations.csv",
        "curve.png",
        "policy/policy.json",
        "policy_best/policy.json",
    ):
        assert (run / name).is_file(), name
    assert list((run / "tensorboard").iterdir())
    evaluations = rows(run / "evaluations.csv")
    assert [(r["step"], r["episode"]) for r in evaluations] == [("50", "0"), ("50", "1"), ("100", "0"), ("100", "1")]
    assert [float(r["return"]) for r in evaluations[2:]] == [e.total_reward for e in result.evaluation]
    assert {r["length"] for r in evaluations} == {"200"}
    metrics = rows(run / "metrics.csv")
    assert [r["step"] for r in metrics] == ["25", "50", "75", "100"]
    assert all(float(r["critic_loss"]) > 0 for r in metrics[1:])


def test_a_second_run_into_the_same_folder_is_refused(tmp_path):
    run_to_end(train(config(tmp_path / "run", total_steps=30)))
    with pytest.raises(RloptError, match="resume="):
        train(config(tmp_path / "run"))


def test_callbacks_see_everything_and_can_stop(tmp_path):
    seen: list[str] = []

    class Watch(Callback):
        def on_start(self, trainer):
            seen.append("start")

        def on_step(self, trainer, progress):
            return trainer.loop.step >= 60

        def on_evaluation(self, trainer, episodes):
            seen.append(f"evaluation of {len(episodes)}")

        def on_checkpoint(self, trainer, path):
            seen.append(f"checkpoint {trainer.loop.step}")

        def on_end(self, trainer, result):
            seen.append(result.status)

    result = run_to_end(train(config(tmp_path / "run"), callbacks=[Watch()]))
    assert result.status == "stopped" and result.step == 60
    assert seen == ["start", "evaluation of 2", "checkpoint 60", "stopped"]


class Poisoned(gym.Env):
    """A bounded walk whose reward or observation is not finite at one step of each episode."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, where: str = "reward", at: int = 5) -> None:
        self.where, self.at = where, at

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        obs, reward = np.full(2, 0.1 * self.t, np.float32), float(self.t)
        if self.t == self.at:
            if self.where == "reward":
                reward = float("inf")
            else:
                obs[1] = np.nan
        return obs, reward, False, self.t == 8, {}


gym.register("rlopt-tests/Poisoned-v0", entry_point=Poisoned)


@pytest.mark.parametrize("where", ["reward", "observation"])
def test_a_non_finite_value_stops_the_run_by_default_and_is_named(tmp_path, where, caplog):
    trainer = train(
        config(tmp_path / "run", env={"id": "rlopt-tests/Poisoned-v0", "kwargs": {"where": where, "at": 5}})
    )
    before = trainer.loop.agent.state_dict()
    result = run_to_end(trainer)
    assert result.status == "nonfinite" and result.first_bad == where and result.step == 4
    assert where in caplog.text
    after = trainer.loop.agent.state_dict()
    assert all(states_equal(before[k], after[k]) is None for k in ("actor", "critic", "target"))
    assert bool(trainer.loop.buffer.block[:5].isfinite().all()) or trainer.loop.buffer.transitions == 4


@pytest.mark.parametrize("where", ["reward", "observation"])
def test_skipping_leaves_the_poisoned_rows_out_and_goes_on(tmp_path, where):
    env = {"id": "rlopt-tests/Poisoned-v0", "kwargs": {"where": where, "at": 5}}
    trainer = train(
        config(tmp_path / "run", env=env, on_nonfinite="skip", eval={"every": None, "episodes": 1}, num_envs=2)
    )
    result = run_to_end(trainer)
    agent, buffer = trainer.loop.agent, trainer.loop.buffer
    assert result.status == "finished" and result.step == 100 == buffer.transitions
    assert all(bool(net.flat.isfinite().all()) for net in (agent.actor, agent.critic, agent.target))
    batch = buffer.sample(500)
    assert bool(batch.reward.isfinite().all()) and bool(batch.next_obs.isfinite().all())
    assert agent.clock.updates == 80


def test_a_poisoned_weight_is_caught_by_the_agents_own_guard(tmp_path):
    class Poison(Callback):
        def on_step(self, trainer, progress):
            if trainer.loop.step == 40:
                trainer.loop.buffer.block[:, :, trainer.loop.buffer.slices["reward"]] = float("nan")

    trainer = train(config(tmp_path / "run"), callbacks=[Poison()])
    result = run_to_end(trainer)
    assert result.status == "nonfinite" and result.first_bad == "reward" and result.step == 50
    assert all(bool(net.flat.isfinite().all()) for net in (trainer.loop.agent.actor, trainer.loop.agent.critic))


def test_a_full_disk_is_reported_and_training_goes_on(tmp_path, monkeypatch, caplog):
    good = Checkpoints.save
    calls = []

    def full_at_second(self, step, *args, **kwargs):
        calls.append(step)
        if len(calls) == 2:
            raise CheckpointFailed("no space left on device")
        return good(self, step, *args, **kwargs)

    monkeypatch.setattr(checkpoint_module.Checkpoints, "save", full_at_second)
    trainer = train(config(tmp_path / "run", checkpoint={"minutes": None, "every_steps": 30}))
    result = run_to_end(trainer)
    assert result.status == "finished" and result.saved
    assert calls == [30, 60, 90, 100]
    assert "no space left" in caplog.text and "intact" in caplog.text
    assert Checkpoints(tmp_path / "run" / "checkpoints").load().step == 100


def test_a_damaged_newest_checkpoint_falls_back_loudly(tmp_path, capfd, caplog):
    run_to_end(train(config(tmp_path / "run", checkpoint={"minutes": None, "every_steps": 60})))
    folders = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    victim = next(folders[-1].rglob("*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    trainer = resume(tmp_path / "run", {})
    assert trainer.loop.step == 60
    said = caplog.text + capfd.readouterr().err
    assert "checksum" in said or "damaged" in said
    assert run_to_end(trainer).step == 100


def test_resume_refuses_to_go_backwards(tmp_path):
    run_to_end(train(config(tmp_path / "run")))
    with pytest.raises(RloptError, match="total_steps=50"):
        resume(tmp_path / "run", {"total_steps": 50})


def test_global_generators_are_never_used(tmp_path):
    torch.manual_seed(1)
    np.random.seed(1)
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    run_to_end(train(config(tmp_path / "run")))
    assert torch.equal(torch_before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()


def test_an_agent_that_cannot_act_there_says_so(tmp_path):
    with pytest.raises(RloptError, match="sac_discrete"):
        make_loop(config(tmp_path / "run", env={"id": "CartPole-v1"}))
