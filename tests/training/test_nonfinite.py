"""Values that are not finite never reach the weights: runs stop and name them, or leave them out."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from rlopt.state import states_equal
from rlopt.training import trainer as trainer_module
from rlopt.training.setup import begin, resume
from rlopt.training.trainer import Callback
from rlopt.types import RloptError
from tests.training.small_runs import PLAIN, SMALL, config, rows, run_to_end


class Poisoned(gym.Env):
    """A bounded walk whose reward or observation is not finite at one step of each episode; ``at=0`` is its first."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, where: str = "reward", at: int = 5) -> None:
        self.where, self.at, self.episodes = where, at, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.episodes += 1
        poisoned = self.at == 0 and self.episodes % 2 == 0
        return np.full(2, np.nan if poisoned else 0.0, np.float32), {}

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
    trainer = begin(
        config(tmp_path / "run", env={"id": "rlopt-tests/Poisoned-v0", "kwargs": {"where": where, "at": 5}})
    )
    before = trainer.loop.agent.state_dict()
    result = run_to_end(trainer)
    assert result.status == "nonfinite" and result.first_bad == where and result.step == 4
    assert where in caplog.text
    after = trainer.loop.agent.state_dict()
    assert all(states_equal(before[k], after[k]) is None for k in ("actor", "critic", "target"))
    batch = trainer.loop.buffer.sample(200)
    assert trainer.loop.buffer.transitions == 4 == len(batch.reward.unique())
    assert bool(batch.reward.isfinite().all()) and bool(batch.next_obs.isfinite().all())


@pytest.mark.parametrize("where", ["reward", "observation"])
def test_a_run_that_stopped_for_a_non_finite_value_goes_on_as_its_message_says(tmp_path, where, caplog):
    env = {"id": "rlopt-tests/Poisoned-v0", "kwargs": {"where": where, "at": 5}}
    run = tmp_path / "a run"
    result = run_to_end(begin(config(run, env=env, agent=PLAIN, total_steps=40)))
    assert (result.status, result.step) == ("nonfinite", 4)
    assert "stopping; resume with on_nonfinite=skip to go on without it" in caplog.text
    again = run_to_end(resume(run, {}))
    assert (again.status, again.step) == ("nonfinite", 8), "a new episode begins, not the poisoned one"
    again = run_to_end(resume(run, {"on_nonfinite": "skip"}))
    assert (again.status, again.step) == ("finished", 40)
    assert bool(trainer_module.read_csv(run / "evaluations.csv")["step"])


def test_a_run_that_stopped_at_its_last_step_is_evaluated_by_a_resume(tmp_path):
    class Bad(Callback):
        def on_step(self, trainer, progress):
            trainer.loop._bad = "reward" if trainer.loop.step == 30 else None

    settings = config(tmp_path / "run", agent=PLAIN, total_steps=30, eval={"every": None, "episodes": 2})
    result = run_to_end(begin(settings, callbacks=[Bad()]))
    assert (result.status, result.step, result.evaluation) == ("nonfinite", 30, [])
    for _ in range(2):
        again = run_to_end(resume(tmp_path / "run", {}))
        assert (again.status, again.step, len(again.evaluation)) == ("finished", 30, 2)
        assert [row["step"] for row in rows(tmp_path / "run" / "evaluations.csv")] == ["30", "30"]
    assert (tmp_path / "run" / "policy_best" / "policy.json").is_file()


@pytest.mark.parametrize("where", ["reward", "observation"])
def test_skipping_leaves_the_poisoned_rows_out_and_goes_on(tmp_path, where):
    env = {"id": "rlopt-tests/Poisoned-v0", "kwargs": {"where": where, "at": 5}}
    trainer = begin(
        config(tmp_path / "run", env=env, on_nonfinite="skip", eval={"every": None, "episodes": 1}, num_envs=2)
    )
    result = run_to_end(trainer)
    agent, buffer = trainer.loop.agent, trainer.loop.buffer
    assert result.status == "finished" and result.step == 100 == buffer.transitions
    assert all(bool(net.flat.isfinite().all()) for net in (agent.actor, agent.critic, agent.target))
    batch = buffer.sample(500)
    assert bool(batch.reward.isfinite().all()) and bool(batch.next_obs.isfinite().all())
    assert agent.clock.updates == 80


@pytest.mark.parametrize("agent", [SMALL, {"name": "reinforce", "network": {"hidden": [8]}, "groups": 1}])
def test_skipping_ends_where_nothing_else_ever_comes(tmp_path, monkeypatch, caplog, agent):
    monkeypatch.setattr(trainer_module, "FRUITLESS", 30)
    seen = []

    class Count(Callback):
        def on_step(self, trainer, progress):
            seen.append(trainer.loop.step)

    env = {"id": "rlopt-tests/Poisoned-v0", "kwargs": {"where": "reward", "at": 1}}
    trainer = begin(config(tmp_path / "run", env=env, on_nonfinite="skip", agent=agent), callbacks=[Count()])
    result = run_to_end(trainer)
    assert (result.status, result.step, result.first_bad, result.saved) == ("nonfinite", 0, "reward", True)
    assert seen == [0] * 30
    assert caplog.text.count("was not finite") == 1 and "30 steps in a row" in caplog.text


def test_workers_that_never_give_a_transition_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "FRUITLESS", 30)
    trainer = begin(config(tmp_path / "run"))
    step = trainer.loop.env.step
    monkeypatch.setattr(
        trainer.loop.env, "step", lambda action: (s := step(action))._replace(valid=torch.zeros_like(s.valid))
    )
    with pytest.raises(RloptError, match="30 steps in a row gave no transition"):
        run_to_end(trainer)


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_non_finite_first_observation_is_stored_nowhere(tmp_path, on_nonfinite):
    """Of every second episode; the observations before it are sound."""
    env = {"id": "rlopt-tests/Poisoned-v0", "kwargs": {"where": "observation", "at": 0}, "normalize_obs": True}
    trainer = begin(config(tmp_path / "run", env=env, on_nonfinite=on_nonfinite, eval={"every": None, "episodes": 1}))
    result = run_to_end(trainer)
    assert (result.status, result.step) == (("nonfinite", 8) if on_nonfinite == "stop" else ("finished", 100))
    assert result.first_bad == "observation"
    batch = trainer.loop.buffer.sample(500)
    assert bool(batch.obs.isfinite().all()) and bool(batch.next_obs.isfinite().all())
    assert bool(trainer.loop.normalizer.moments[""].mean.isfinite().all())


def test_a_run_that_stopped_for_a_non_finite_value_says_so_once_and_can_go_on(tmp_path, caplog):
    class Poison(Callback):
        def on_step(self, trainer, progress):
            reward = trainer.loop.buffer.block[:, :, trainer.loop.buffer.slices["reward"]]
            if trainer.loop.step == 40:
                self.before = reward.clone()
                reward.fill_(float("nan"))
            elif trainer.loop.step == 41:
                reward.copy_(self.before)

    result = run_to_end(begin(config(tmp_path / "run"), callbacks=[Poison()]))
    assert (result.status, result.step, result.first_bad) == ("nonfinite", 50, "reward")
    assert caplog.text.count("was not finite") == 1
    result = run_to_end(resume(tmp_path / "run", {}))
    assert (result.status, result.step, result.first_bad) == ("finished", 100, None)


def test_a_poisoned_weight_is_caught_by_the_agents_own_guard(tmp_path):
    class Poison(Callback):
        def on_step(self, trainer, progress):
            if trainer.loop.step == 40:
                trainer.loop.buffer.block[:, :, trainer.loop.buffer.slices["reward"]] = float("nan")

    trainer = begin(config(tmp_path / "run"), callbacks=[Poison()])
    result = run_to_end(trainer)
    assert result.status == "nonfinite" and result.first_bad == "reward" and result.step == 50
    assert all(bool(net.flat.isfinite().all()) for net in (trainer.loop.agent.actor, trainer.loop.agent.critic))
