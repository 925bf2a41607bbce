"""How policies act where they are evaluated, and in which environments: what agents, runs and policies say of it."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.agents.sac_discrete import DiscreteSAC
from rlopt.envs import Backend, SyncVectorEnv, make_env, register_backend
from rlopt.envs import make as make_module
from rlopt.loops.evaluation import Evaluator, run_episodes
from rlopt.nn import NetworkConfig, make_actor, network_options
from rlopt.policy import EvaluationMode, Policy, save_policy
from rlopt.training import begin, train_config
from rlopt.training.evaluate import evaluate_path
from rlopt.types import Episode, RloptError
from tests.training.evaluated import Lengths, policy_for
from tests.training.test_evaluate import expected

SAMPLE = EvaluationMode(deterministic=False)


class Echo(gymnasium.Env[Any, Any]):
    """Pays 1 for action 1, in episodes of 200 steps; ``bonus`` comes on top."""

    observation_space, action_space = spaces.Box(-1.0, 1.0, (1,), np.float32), spaces.Discrete(2)

    def __init__(self, bonus: float = 0.0) -> None:
        self.bonus, self.t = bonus, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return np.zeros(1, np.float32), action + self.bonus, self.t == 200, False, {}


@pytest.fixture(autouse=True)
def echo() -> Iterator[None]:
    gymnasium.register("Echo-v0", entry_point=Echo)
    yield
    del gymnasium.registry["Echo-v0"]


def leaning(mode: EvaluationMode) -> Policy:
    """A policy that takes action 0 with probability 3/4."""
    spec = make_env("Echo-v0").spec
    options = network_options(NetworkConfig(hidden=(4,)))
    policy = Policy(spec, make_actor("categorical", spec.observation_space, spec.action_space, options))
    with torch.no_grad():
        for parameter in policy.actor.parameters():
            parameter.zero_()
        last = [p for p in policy.actor.parameters() if p.shape == (2,)][-1]
        last.copy_(torch.tensor([math.log(3.0), 0.0]))
    policy.evaluation_mode = mode
    return policy


@pytest.mark.parametrize(
    ("mode", "share"),
    [(EvaluationMode(), 0.0), (SAMPLE, 0.25), (EvaluationMode(True, 0.4), 0.2), (EvaluationMode(False, 1.0), 0.5)],
)
def test_a_policy_acts_in_its_own_mode(tmp_path: Path, mode: EvaluationMode, share: float) -> None:
    policy = leaning(mode)
    evaluator = Evaluator(lambda n: make_env("Echo-v0", n, autoreset=False), seed=0)
    found = evaluator.evaluate(policy, 10)
    assert np.mean([e.total_reward for e in found]) == pytest.approx(200 * share, abs=8)
    assert found == evaluator.evaluate(policy, 10), "random actions draw from the evaluation's own stream"
    save_policy(policy, tmp_path / "p")
    again = evaluate_path(tmp_path / "p", 10)
    assert (again.episodes, again.mode) == (found, mode)
    assert again.to_json()["epsilon"] == mode.epsilon
    assert evaluate_path(tmp_path / "p", 10, mode="deterministic", epsilon=0.0).returns == [0.0] * 10
    assert evaluate_path(tmp_path / "p", 10, mode="deterministic", epsilon=1.0).mean == pytest.approx(100, abs=8)


def echo_config(path: Path, **changes: Any) -> Any:
    return train_config({
        "seed": 3, "total_steps": 20, "run_dir": str(path), "device": "cpu", "threads": 1,
        "agent": {"name": "sac_discrete", "warmup_steps": 30, "batch_size": 4, "network": {"hidden": [4]}},
        "buffer": {"name": "uniform", "capacity": 50}, "log": {"tensorboard": False},
        "env": {"id": "Echo-v0"}, "eval": {"episodes": 3}, **changes,
    })  # fmt: skip


def trained(config: Any) -> list[Episode]:
    trainer = begin(config)
    try:
        return trainer.run().evaluation
    finally:
        trainer.close()


def test_the_agent_or_the_protocol_says_how_evaluations_act(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trained(echo_config(tmp_path / "plain"))
    assert {e.total_reward for e in plain} <= {0.0, 200.0}
    sampled = trained(echo_config(tmp_path / "sampled", eval={"episodes": 3, "mode": "sample"}))
    assert len({e.total_reward for e in sampled}) > 1
    greedy = trained(echo_config(tmp_path / "greedy", eval={"episodes": 3, "epsilon": 1.0}))
    assert all(60 < e.total_reward < 140 for e in greedy)
    monkeypatch.setattr(DiscreteSAC, "evaluation_mode", SAMPLE)
    assert trained(echo_config(tmp_path / "agent")) == sampled
    again = trained(echo_config(tmp_path / "both", eval={"episodes": 3, "mode": "deterministic"}))
    assert again == plain
    for name, mode in {"sampled": SAMPLE, "greedy": EvaluationMode(True, 1.0), "both": EvaluationMode()}.items():
        assert evaluate_path(tmp_path / name).mode == mode
    with begin(echo_config(tmp_path / "told", eval={"episodes": 1, "epsilon": 0.5})) as trainer:
        assert trainer.run().mode == EvaluationMode(False, 0.5)


def test_evaluations_may_run_by_another_protocol(tmp_path: Path) -> None:
    stacked = {"wrappers": [{"class": "FrameStackObservation", "kwargs": {"stack_size": 2}}]}
    with pytest.raises(RloptError, match="this policy sees"):
        trained(echo_config(tmp_path / "other", env={"id": "Echo-v0", "evaluation": stacked}))
    env = {"id": "Echo-v0", "evaluation": {"kwargs": {"bonus": 2.0}}}
    found = trained(echo_config(tmp_path / "run", env=env, eval={"episodes": 2, "max_steps": 10}))
    assert all(e.total_reward >= 20.0 and e.length == 10 for e in found)
    for path in (tmp_path / "run", tmp_path / "run" / "policy"):
        assert evaluate_path(path, 2).episodes == found
    with open(tmp_path / "run" / "episodes.csv", encoding="utf-8") as file:
        assert all(float(row["return"]) <= 200.0 for row in csv.DictReader(file))


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        ({"backend": "sync"}, r"env\.evaluation\.backend: no such option; choose from"),
        ({"kwarg": {}}, r"did you mean env\.evaluation\.kwargs"),
        ({"wrappers": 3}, r"env\.evaluation\.wrappers: expected a list"),
    ],
)
def test_what_cannot_differ_in_evaluations_is_told(evaluation: Any, words: str) -> None:
    with pytest.raises(RloptError, match=words):
        train_config({"env": {"evaluation": evaluation}})


def test_a_backend_is_told_what_its_environments_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(make_module, "_BACKENDS", dict(make_module._BACKENDS))

    def backend(request: Any) -> Any:
        asked.append(request.evaluation)
        return SyncVectorEnv([request.factory] * request.num_envs, autoreset=request.autoreset)

    register_backend("mine", Backend(backend))
    make_env("Echo-v0", 1, backend="mine")
    make_env("Echo-v0", 1, backend="mine", autoreset=False, evaluation=True)
    assert asked == [False, True]


@pytest.mark.parametrize(("max_steps", "longest"), [(None, 30), (5, 5), (1000, 30)])
def test_a_limit_of_the_evaluation_cuts_what_is_longer(max_steps: int | None, longest: int) -> None:
    gymnasium.register("Limited-v0", entry_point=Lengths, max_episode_steps=40)
    try:
        env = make_env("Limited-v0", 4, autoreset=False)
        found = run_episodes(policy_for("Limited-v0"), env, 12, seed=4, max_steps=max_steps)
    finally:
        del gymnasium.registry["Limited-v0"]
    whole = expected(12, seed=4)
    assert max(e.length for e in whole) > 5
    assert [e.length for e in found] == [min(e.length, longest) for e in whole]
    assert [e.total_reward for e in found] == [e.length * (e.length + 1) / 2 for e in found]
