"""What an episode was beside its return: from the environment or the agent to the columns of tables."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from rlopt.agents.sac_discrete import DiscreteSAC, DiscreteSACConfig
from rlopt.envs import AsyncVectorEnv, SyncVectorEnv, TorchEnv, VectorAdapter, VectorEnv, make_env
from rlopt.envs.factory import EnvFactory, find_spec
from rlopt.loops.episodes import EpisodeCounter
from rlopt.loops.evaluation import run_episodes
from rlopt.nn import NetworkConfig
from rlopt.policy import load_policy
from rlopt.training import train_config
from rlopt.training.evaluate import Evaluation, describe, evaluate_path
from rlopt.training.setup import begin, resume
from rlopt.types import Act, EnvSpec, Episode, RloptError, Step


class Task(gymnasium.Env[Any, Any]):
    """Episodes of 2 and 3 steps in turn; the longer ones succeed. The last info tells the success and the length."""

    observation_space = spaces.Box(-9.0, 9.0, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, leave_out: str = "", success: Any = None) -> None:
        self.t, self.episode, self.leave_out, self.success = 0, -1, leave_out, success

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t, self.episode = 0, self.episode + 1
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        over = self.t == 2 + self.episode % 2
        success = bool(self.episode % 2) if self.success is None else self.success
        info = {"success": success, "steps": np.array([self.t])[0], "text": "x"} if over else {}
        info.pop(self.leave_out, None)
        return np.full(1, self.t, np.float32), 1.0, over, False, info


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    gymnasium.register("rlopt-tests/Task-v0", entry_point=Task)
    yield
    del gymnasium.registry["rlopt-tests/Task-v0"]


FACTS = ("success", "steps")


def _factory() -> EnvFactory:
    return EnvFactory(find_spec("rlopt-tests/Task-v0"), {}, (), FACTS)


def _adapter(mode: AutoresetMode) -> Callable[[bool], VectorEnv]:
    def build(autoreset: bool) -> VectorEnv:
        env = gymnasium.vector.SyncVectorEnv([_factory()] * 2, autoreset_mode=mode)
        env.metadata = {**env.metadata, "facts": FACTS}
        return VectorAdapter(env, autoreset=autoreset)

    return build


BACKENDS: dict[str, Callable[[bool], VectorEnv]] = {
    "sync": lambda autoreset: SyncVectorEnv([_factory()] * 2, autoreset=autoreset),
    "async": lambda autoreset: AsyncVectorEnv([_factory()] * 2, autoreset=autoreset),
    **{mode.value: _adapter(mode) for mode in AutoresetMode},
}


@pytest.mark.parametrize("autoreset", [True, False])
@pytest.mark.parametrize("name", BACKENDS)
def test_facts_are_read_on_the_row_that_ends(name: str, autoreset: bool) -> None:
    env = BACKENDS[name](autoreset)
    assert env.spec.facts == FACTS
    env.reset()
    counter, found = EpisodeCounter(env.spec, 2), []
    for _ in range(9):
        step = env.step(torch.zeros(2, dtype=torch.int64))
        found += counter.count(step).values()
        if not autoreset and step.ended.any():
            env.reset(mask=step.ended)
    env.close()
    short = Episode(2.0, 2, 0, {"success": 0.0, "steps": 2.0})
    long = Episode(3.0, 3, 0, {"success": 1.0, "steps": 3.0})
    twice = name == "SameStep" and not autoreset  # resets underneath skip every other episode
    assert found[:2] == [short, short] and (twice or long in found)
    assert all(episode in (short, long) for episode in found)


class Walk(TorchEnv):
    observation_space, action_space = Task.observation_space, Task.action_space
    facts = ("half",)

    def initial(self, streams: Any) -> Any:
        return torch.arange(self.num_envs, dtype=torch.float64)

    def dynamics(self, state: Any, action: Any) -> Any:
        return state + 1, torch.ones_like(state), state >= 2, None, None, {"half": state / 2}

    def observe(self, state: Any) -> Any:
        return state[:, None]


def test_facts_of_an_environment_in_torch() -> None:
    env = Walk(2)
    env.reset()
    counter = EpisodeCounter(env.spec, 2)
    found = [counter.count(env.step(torch.zeros(2, dtype=torch.int64))) for _ in range(3)]
    assert found == [{}, {1: Episode(2.0, 2, 0, {"half": 1.0})}, {0: Episode(3.0, 3, 0, {"half": 1.0})}]


def test_what_an_agent_tells_of_steps_is_summed_and_survives_a_resume() -> None:
    spec = EnvSpec("test", spaces.Discrete(2), spaces.Discrete(2))
    no, yes, obs = torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool), torch.zeros(2)
    ordinary = Step(obs, obs, torch.ones(2), no, no, no, yes, {})
    surplus = ordinary._replace(valid=torch.tensor([True, False]), reward=torch.tensor([1.0, 0.0]))
    counter = EpisodeCounter(spec, 2)
    calls = {"calls": torch.tensor([1, 2])}
    assert counter.count(ordinary, calls) == {} == counter.count(surplus, calls)
    resumed = EpisodeCounter(spec, 2)
    resumed.load_state_dict(counter.state_dict())
    for each in (counter, resumed):
        end = ordinary._replace(terminated=yes, ended=yes)
        assert each.count(end, calls) == {0: Episode(3.0, 3, 0, {"calls": 3.0}), 1: Episode(2.0, 2, 0, {"calls": 4.0})}
        assert each.count(end, calls)[0] == Episode(1.0, 1, 0, {"calls": 1.0})


def test_agents_that_are_paid_apart_have_returns_of_their_own() -> None:
    space = spaces.Dict(obs=spaces.Box(-1.0, 1.0, (2, 3)))
    spec = EnvSpec("team", space, spaces.MultiDiscrete([2, 2]), agents=("a", "b"), reward_shape=(2,))
    counter, no, yes, obs = EpisodeCounter(spec, 1), torch.tensor([False]), torch.tensor([True]), torch.zeros(1, 2, 3)
    reward = torch.tensor([[1.0, 2.5]])
    assert counter.count(Step(obs, obs, reward, no, no, no, yes, {})) == {}
    found = counter.count(Step(obs, obs, -3 * reward, yes, no, yes, yes, {}))
    assert found == {0: Episode(-7.0, 2, 0, {"return/a": -2.0, "return/b": -5.0})}


@pytest.mark.parametrize(
    ("facts", "kwargs", "words"),
    [
        (["sucess"], {}, "lacks the fact 'sucess'; there is success, steps, text"),
        (["success"], {"leave_out": "success"}, "rlopt-tests/Task-v0: the last info of an episode lacks the fact"),
        (["text"], {}, "the fact 'text' must be a number, not 'x'"),
        (["return"], {}, "a fact cannot be called return"),
        (["success", 3], {}, "facts=('success', 3) must be a list of names"),
    ],
)
@pytest.mark.parametrize("backend", ["sync", "async"])
def test_mistakes_are_told_in_one_line(backend: str, facts: Any, kwargs: Any, words: str) -> None:
    with pytest.raises(RloptError) as caught:
        env = make_env("rlopt-tests/Task-v0", 1, backend=backend, kwargs=kwargs, facts=facts)
        env.reset()
        for _ in range(2):
            env.step(torch.zeros(1, dtype=torch.int64))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_backend_without_info_refuses_facts_and_auto_takes_another() -> None:
    pytest.importorskip("mujoco.batch")
    for backend in ("native", "torch"):
        with pytest.raises(RloptError, match=r"info|no fact"):
            make_env("InvertedPendulum-v5" if backend == "native" else "Pendulum-v1", 1, backend=backend, facts=["x"])
    assert isinstance(make_env("InvertedPendulum-v5", 1, facts=["reward_survive"]), SyncVectorEnv)


def config(path: Path, **changes: Any) -> Any:
    return train_config({
        "total_steps": 40, "run_dir": str(path), "device": "cpu", "threads": 1,
        "agent": {"name": "sac_discrete", "warmup_steps": 10, "batch_size": 4, "network": {"hidden": [4]}},
        "env": {"id": "rlopt-tests/Task-v0", "facts": list(FACTS)}, "buffer": {"name": "uniform", "capacity": 100},
        "eval": {"every": 20, "episodes": 2}, "log": {"tensorboard": False}, **changes,
    })  # fmt: skip


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def finish(trainer: Any) -> Any:
    try:
        return trainer.run()
    finally:
        trainer.close()


def test_facts_are_columns_of_the_tables_and_of_a_resumed_run_too(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = finish(begin(config(whole)))
    assert result.evaluation[0].facts == {"success": 1.0, "steps": 3.0}
    finish(begin(config(parts, total_steps=21)))
    finish(resume(parts, {"total_steps": 40}))
    episodes, evaluations = (rows(whole / f"{name}.csv") for name in ("episodes", "evaluations"))
    assert list(episodes[0]) == ["step", "return", "length", "success", "steps"]
    assert list(evaluations[0]) == ["step", "episode", "return", "length", "success", "steps"]
    assert [(r["step"], r["success"]) for r in episodes[:3]] == [("2", "0.0"), ("5", "1.0"), ("7", "0.0")]
    assert rows(parts / "episodes.csv") == episodes
    assert [r for r in rows(parts / "evaluations.csv") if r["step"] != "21"] == evaluations
    found = evaluate_path(whole)
    assert found.episodes == result.evaluation
    assert load_policy(whole).spec.facts == FACTS


def test_facts_of_an_agent_are_columns_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that tells how often it chose its second action."""
    act_of = DiscreteSAC.act

    def act(*args: Any, **kwargs: Any) -> Act:
        found = act_of(*args, **kwargs)
        return found._replace(facts={"calls": found.action})

    monkeypatch.setattr(DiscreteSAC, "act", act)
    trainer = begin(config(tmp_path / "run", env={"id": "rlopt-tests/Task-v0"}))
    finish(trainer)
    stored = trainer.loop.buffer.storage.held("action", 40).flatten()  # type: ignore[attr-defined]
    calls = sum(float(r["calls"]) for r in rows(tmp_path / "run" / "episodes.csv"))
    assert calls == float(stored[: int(rows(tmp_path / "run" / "episodes.csv")[-1]["step"])].sum()) > 0


def test_an_evaluation_tells_the_means_of_facts() -> None:
    episodes = [Episode(1.0, 2, 0, {"success": 1.0}), Episode(3.0, 2, 0, {"success": 0.0})]
    found = Evaluation(episodes, "E-v0", seed=0)
    assert found.facts == {"success": 0.5}
    assert describe(found).endswith("over 2 episodes (E-v0); success 0.5")
    data = found.to_json()
    assert data["facts"] == {"success": 0.5} and data["episodes"][0] == {"return": 1.0, "length": 2, "success": 1.0}


def test_an_evaluation_that_is_cut_off_knows_no_facts_that_nobody_told(tmp_path: Path) -> None:
    """This environment tells them where its episode ends. Their cells are empty, and no mean counts them."""
    result = finish(begin(config(tmp_path / "run", eval={"every": 20, "episodes": 3, "max_steps": 1})))
    assert [(e.length, e.facts) for e in result.evaluation] == [(1, {})] * 3
    assert all(row.get("success", "") == "" for row in rows(tmp_path / "run" / "evaluations.csv"))
    assert describe(Evaluation(result.evaluation, "Task", 0)).endswith("(Task)")


class Telling(Task):
    """Tells at every step, and never ends."""

    def step(self, action: Any) -> Any:
        self.t += 1
        return np.full(1, min(self.t, 9), np.float32), 1.0, False, False, {"success": self.t > 2, "steps": self.t}


@pytest.mark.parametrize("name", BACKENDS)
def test_an_evaluation_that_is_cut_off_knows_what_was_told_so_far(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where success does not end an episode, and ``eval.max_steps`` does."""
    monkeypatch.setattr(gymnasium.registry["rlopt-tests/Task-v0"], "entry_point", Telling)
    env = BACKENDS[name](False)
    policy = DiscreteSAC(env.spec, DiscreteSACConfig(network=NetworkConfig(hidden=(4,)))).policy
    for limit, success in ((2, 0.0), (3, 1.0)):
        found = run_episodes(policy, env, 2, seed=0, max_steps=limit)
        assert found == [Episode(float(limit), limit, 0, {"success": success, "steps": float(limit)})] * 2
    env.close()
