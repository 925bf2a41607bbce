"""Evaluation: every episode counts once, repeats exactly, and touches nothing else."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import yaml
from gymnasium import spaces
from torch import Tensor

from rlopt.envs import Normalizer, VectorEnv, make_env
from rlopt.loops import evaluation as evaluation_module
from rlopt.loops.evaluation import MAX_SLOTS, Evaluator, run_episodes
from rlopt.nn import make_actor
from rlopt.policy import EvaluationMode, Policy, save_policy
from rlopt.random import derive_seed
from rlopt.training import train_config
from rlopt.training.evaluate import Evaluation, describe, evaluate_path
from rlopt.training.setup import begin
from rlopt.types import Act, Carry, EnvSpec, Episode, Obs, RloptError, Step
from tests.training.evaluated import SMALL, Lengths, endless, policy_for

SAMPLE = EvaluationMode(deterministic=False)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    gymnasium.register("Lengths-v0", entry_point=Lengths)
    yield
    del gymnasium.registry["Lengths-v0"]


def lengths(n: int) -> VectorEnv:
    return make_env("Lengths-v0", n, autoreset=False)


def expected(episodes: int, seed: int) -> list[Episode]:
    """What the episodes must be: k steps pay 1 + 2 + … + k."""
    found = []
    for i in range(episodes):
        env = Lengths()
        env.reset(seed=derive_seed(seed, "evaluation", i))
        found.append(Episode(env.left * (env.left + 1) / 2, env.left))
    return found


class Recording(Policy):
    """Notes the number of rows it is shown, and checks that it gets back the carry it gave; a wave begins with none."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.spec, policy.actor)
        self.rows: list[int] = []
        self.waves = 0

    def initial_carry(self, rows: int = 1) -> Carry:
        return {"calls": torch.zeros(rows)}

    def act(
        self, obs: Obs, carry: Carry = None, deterministic: bool = True, generator: torch.Generator | None = None
    ) -> Act:
        assert isinstance(obs, Tensor) and carry is not None
        self.rows.append(len(obs))
        calls = carry["calls"]
        assert bool((calls <= len(self.rows) - 1).all()) and len(calls) == len(obs)
        self.waves += not bool(calls.any())
        return Act(super().act(obs, None, deterministic, generator).action, {"calls": calls + 1})


@pytest.mark.parametrize("slots", [1, 3, 7, 10, 12])
def test_every_episode_counts_once_whatever_its_length_and_the_number_of_slots(slots: int) -> None:
    found = run_episodes(policy_for("Lengths-v0"), lengths(slots), 10, seed=4)
    assert found == expected(10, seed=4)
    assert len({e.length for e in found}) > 3, "the case must hold episodes of different lengths"


def test_the_policy_always_sees_all_rows() -> None:
    policy = Recording(policy_for("Lengths-v0"))
    found = run_episodes(policy, lengths(4), 6, seed=1)
    assert set(policy.rows) == {4} and policy.waves == 2
    waves = [max(e.length for e in found[:4]), max(e.length for e in found[4:])]
    assert len(policy.rows) == sum(waves), "each wave lasts as long as its longest episode"


def test_the_action_of_the_policy_reaches_the_environment() -> None:
    by_hand = []
    policy = policy_for("Pendulum-v1", kwargs={"max_episode_steps": 20})
    for i in range(3):
        env = gymnasium.make("Pendulum-v1", max_episode_steps=20)
        obs, _ = env.reset(seed=derive_seed(9, "evaluation", i))
        total, over = 0.0, False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(policy(obs))
            total, over = total + float(reward), terminated or truncated
        by_hand.append(total)
    env = make_env("Pendulum-v1", 3, autoreset=False, kwargs={"max_episode_steps": 20})
    found = run_episodes(policy, env, 3, seed=9)
    np.testing.assert_allclose([e.total_reward for e in found], by_hand, rtol=1e-4)
    assert [e.length for e in found] == [20, 20, 20]


def test_an_evaluation_repeats_exactly_and_moves_no_other_stream() -> None:
    policy = policy_for("Pendulum-v1")
    make = lambda n: make_env("Pendulum-v1", n, autoreset=False, kwargs={"max_episode_steps": 30})  # noqa: E731
    before = torch.get_rng_state(), repr(np.random.get_state())
    evaluator = Evaluator(make, seed=3)
    first, between, again = (evaluator.evaluate(policy, n) for n in (5, 5, 5))
    noisy = [evaluator.evaluate(policy, 5, SAMPLE) for _ in range(2)]
    assert first == between == again == Evaluator(make, seed=3).evaluate(policy, 5)
    assert noisy[0] == noisy[1] != first
    assert Evaluator(make, seed=4).evaluate(policy, 5) != first
    assert torch.equal(torch.get_rng_state(), before[0]) and repr(np.random.get_state()) == before[1]


def test_statistics_are_used_but_do_not_grow() -> None:
    plain = policy_for("Pendulum-v1")
    normalizer = Normalizer(plain.spec)
    normalizer.moments[""].update(
        torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * 5, torch.ones(50) > 0
    )
    policy = Policy(plain.spec, plain.actor, normalizer)
    saved = {k: v.clone() for k, v in normalizer.moments[""].state_dict().items()}
    env = make_env("Pendulum-v1", 2, autoreset=False, kwargs={"max_episode_steps": 30})
    found = run_episodes(policy, env, 2, seed=0)
    assert found != run_episodes(plain, env, 2, seed=0)
    assert all(torch.equal(saved[k], v) for k, v in normalizer.moments[""].state_dict().items())


def test_training_environments_are_refused() -> None:
    with pytest.raises(ValueError, match="autoreset=False"):
        run_episodes(policy_for("Lengths-v0"), make_env("Lengths-v0", 2), 2, seed=0)


class Lossy:
    """Two rows that pay 1 a step for 4 steps; row 1's worker is replaced at the given steps."""

    num_envs, autoreset, device = 2, False, torch.device("cpu")

    def __init__(self, lost_at: set[int]) -> None:
        self.spec = EnvSpec("Lossy-v0", spaces.Box(-1, 1, (2,)), spaces.Discrete(3))
        self.lost_at, self.now, self.counts = lost_at, 0, [0, 0]

    def reset(self, seeds: Any = None, mask: Any = None, options: Any = None) -> Obs:
        return torch.zeros(2, 2)

    def step(self, action: Tensor) -> Step:
        self.now += 1
        lost = torch.tensor([False, self.now in self.lost_at])
        self.counts = [c + 1 for c in self.counts]
        if bool(lost[1]):
            self.counts[1] = 0
        over = torch.tensor([c == 4 for c in self.counts])
        no = torch.zeros(2, dtype=torch.bool)
        valid = torch.tensor([self.counts[0] <= 4, not bool(lost[1])])
        return Step(torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(2), over, no, over | lost, valid, {})

    def state_dict(self) -> None:
        return None

    def load_state_dict(self, state: Any) -> Obs:
        raise NotImplementedError

    def close(self) -> None:
        pass


def test_an_episode_whose_worker_died_begins_anew() -> None:
    policy = policy_for("Lengths-v0")
    assert run_episodes(policy, Lossy({3}), 2, seed=0) == [Episode(4.0, 4), Episode(4.0, 4)]
    with pytest.raises(RloptError, match="died 10 times"):
        run_episodes(policy, Lossy(set(range(1, 100))), 2, seed=0)


def test_an_evaluator_builds_its_environments_once_and_closes_them() -> None:
    made: list[int] = []
    closed: list[int] = []

    def make(n: int) -> VectorEnv:
        env = lengths(n)
        made.append(n)
        real = env.close
        env.close = lambda: (closed.append(n), real())  # type: ignore[method-assign, func-returns-value]
        return env

    evaluator, policy = Evaluator(make, seed=2), policy_for("Lengths-v0")
    assert made == []
    for n in (2, 2, 3, MAX_SLOTS + 1):
        assert evaluator.evaluate(policy, n) == expected(n, seed=2)
    assert made == [2, 3, MAX_SLOTS] and closed == [2, 3]
    evaluator.close()
    evaluator.close()
    assert closed == made


@pytest.mark.parametrize("backend", ["sync", "async"])
def test_what_survives_a_reset_does_not_make_evaluations_depend_on_each_other(backend: str) -> None:
    """Episodes of this environment last 3 and 5 steps in turn, whatever the seed."""
    make = lambda n: make_env(  # noqa: E731
        "rlopt.envs.counting:rlopt/Count-v0", n, backend=backend, autoreset=False, kwargs={"length": (3, 5)}
    )
    env = make(1)
    policy = Policy(env.spec, make_actor("squashed_gaussian", env.spec.observation_space, env.spec.action_space, SMALL))
    env.close()
    evaluator, fresh = Evaluator(make, seed=0), Evaluator(make, seed=0)
    try:
        found = [evaluator.evaluate(policy, 2) for _ in range(3)]
        assert found[0] == found[1] == found[2] == fresh.evaluate(policy, 2)
    finally:
        evaluator.close()
        fresh.close()


# The result


def test_the_interval_is_students() -> None:
    found = Evaluation([Episode(float(r), 7) for r in (1, 2, 3, 4, 5)], "E-v0", seed=0)
    assert found.mean == 3.0 and found.std == pytest.approx(math.sqrt(2.5)) and (found.min, found.max) == (1.0, 5.0)
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)  # t(4) at 97.5 %
    assert found.interval == pytest.approx((3 - half, 3 + half), abs=1e-5)
    assert describe(found) == "mean return 3.0, 95% interval [1.0, 5.0] over 5 episodes (E-v0)"


def test_a_result_is_plain_json() -> None:
    data = json.loads(
        json.dumps(Evaluation([Episode(-2.5, 3)], "E-v0", 4, meta={"step": 9}).to_json(), allow_nan=False)
    )
    assert data["episodes"] == [{"return": -2.5, "length": 3}] and data["mean"] == -2.5
    assert data["std"] is None and data["interval_low"] is None
    assert (data["env"], data["seed"], data["policy"]) == ("E-v0", 4, {"step": 9})
    assert describe(Evaluation([Episode(-2.5, 3)], "E-v0", 4)) == "return -2.5 in 1 episode (E-v0)"


# Saved policies

WRAPPERS = [{"class": "RescaleAction", "kwargs": {"min_action": -1.0, "max_action": 1.0}}]
PENDULUM = {"id": "Pendulum-v1", "kwargs": {"max_episode_steps": 25, "g": 9.0}, "wrappers": WRAPPERS}


def in_training(policy: Policy, env: dict[str, Any], episodes: int, seed: int) -> list[Episode]:
    make = lambda n: make_env(  # noqa: E731
        env["id"], n, seed=99, autoreset=False, kwargs=env.get("kwargs"), wrappers=env.get("wrappers", ())
    )
    return Evaluator(make, seed).evaluate(policy, episodes)


def test_a_run_repeats_its_final_evaluation(tmp_path: Path) -> None:
    policy = policy_for("Pendulum-v1", wrappers=WRAPPERS)
    save_policy(policy, tmp_path / "policy", {"env": PENDULUM, "seed": 6, "step": 100, "selected": "last"})
    config = {"seed": 6, "threads": "auto", "env": PENDULUM, "eval": {"episodes": 4}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    found = evaluate_path(tmp_path)
    assert found.episodes == in_training(policy, PENDULUM, 4, seed=6)
    assert (found.env_id, found.seed, found.meta["step"]) == ("Pendulum-v1", 6, 100)
    assert evaluate_path(tmp_path / "policy", 4).episodes == found.episodes, "the policy folder alone knows as much"
    other = evaluate_path(tmp_path, 2, seed=7).episodes
    assert other == in_training(policy, PENDULUM, 2, seed=7) != found.episodes[:2]
    noisy = [evaluate_path(tmp_path, mode="sample").episodes for _ in range(2)]
    assert noisy[0] == noisy[1] != found.episodes


def test_the_trainers_last_evaluation_is_repeated_from_the_run_folder(tmp_path: Path) -> None:
    config = train_config({
        "seed": 3, "total_steps": 40, "run_dir": str(tmp_path / "run"), "device": "cpu",
        "agent": {"name": "sac", "warmup_steps": 10, "batch_size": 8, "network": {"hidden": [16]}},
        "env": {"id": "Pendulum-v1", "kwargs": {"max_episode_steps": 15}, "normalize_obs": True},
        "buffer": {"name": "uniform", "capacity": 100},
        "eval": {"every": 20, "episodes": 3}, "log": {"tensorboard": False},
    })  # fmt: skip
    threads = torch.get_num_threads()
    trainer = begin(config)
    try:
        trainer.run()
    finally:
        trainer.close()
        torch.set_num_threads(threads)
    with open(tmp_path / "run" / "evaluations.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["step"] == "40"]
    found = evaluate_path(tmp_path / "run")
    assert [e.total_reward for e in found.episodes] == [float(row["return"]) for row in rows]
    assert [e.length for e in found.episodes] == [15, 15, 15]
    assert found.meta["step"] == 40 and found.meta["selected"] == "last"


def test_an_infinite_argument_reaches_the_environment(tmp_path: Path) -> None:
    save_policy(policy_for("Lengths-v0"), tmp_path, {"env": {"id": "Lengths-v0", "kwargs": {"shift": -math.inf}}})
    found = evaluate_path(tmp_path, 3)
    assert found.returns == [-math.inf] * 3
    assert "Infinity" not in json.dumps(found.to_json()["policy"])


def test_returns_that_are_all_nan_are_told() -> None:
    found = Evaluation([Episode(math.nan, 3)] * 3, "Lengths-v0", seed=0)
    assert describe(found) == "mean return nan, 95% interval [nan, nan] over 3 episodes (Lengths-v0)"
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data["mean"] is data["interval_low"] is data["episodes"][0]["return"] is None


def test_a_policy_inside_its_run_is_evaluated_as_often_as_the_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{seed: 0, env: {id: Lengths-v0}, eval: {episodes: 4}}")
    for folder in ("policy/run0", "policy_best", "other"):
        save_policy(policy_for("Lengths-v0"), tmp_path / folder)
        assert len(evaluate_path(tmp_path / folder).episodes) == (20 if folder == "other" else 4)


def test_threads_are_the_runs_and_are_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_policy(policy_for("Lengths-v0"), tmp_path / "policy")
    (tmp_path / "config.yaml").write_text("{seed: 0, threads: 2, env: {id: Lengths-v0}, eval: {episodes: 1}}")
    asked: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    evaluate_path(tmp_path)
    assert asked == [2, 5]


def test_a_policy_without_a_run_evaluates_where_it_was_made(tmp_path: Path) -> None:
    save_policy(policy_for("Lengths-v0"), tmp_path / "p")
    found = evaluate_path(tmp_path / "p")
    assert found.episodes == expected(20, seed=0)
    assert found.env_id == "Lengths-v0"


def test_another_environment_with_the_same_spaces(tmp_path: Path) -> None:
    gymnasium.register("Shifted-v0", entry_point=Lengths, kwargs={"shift": 1.0})
    try:
        save_policy(policy_for("Lengths-v0"), tmp_path, {"env": {"id": "Lengths-v0", "kwargs": {"shift": 5.0}}})
        plain = expected(3, seed=0)
        assert [e.total_reward for e in evaluate_path(tmp_path, 3).episodes] == [r + 5 * n for r, n, *_ in plain]
        shifted = evaluate_path(tmp_path, 3, env_id="Shifted-v0")
        assert [e.total_reward for e in shifted.episodes] == [r + n for r, n, *_ in plain], "no kwargs of the other one"
    finally:
        del gymnasium.registry["Shifted-v0"]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"env_id": "CartPole-v1"}, r"sees Box\(.*\(2,\), float32\), but CartPole-v1 has Box\("),
        ({"env_id": "Lenghts-v0"}, "did you mean Lengths-v0"),
        ({"episodes": 0}, "episodes: must be at least 1, got 0"),
        ({"video": "film.avi"}, r"ends in \.mp4"),
    ],
)
def test_what_cannot_be_evaluated_is_one_clear_line(tmp_path: Path, kwargs: dict[str, Any], words: str) -> None:
    save_policy(policy_for("Lengths-v0"), tmp_path)
    with pytest.raises(RloptError, match=words) as e:
        evaluate_path(tmp_path, **kwargs)
    assert "\n" not in str(e.value)


def test_other_actions_are_refused(tmp_path: Path) -> None:
    save_policy(policy_for("Pendulum-v1"), tmp_path, {"env": {"id": "Pendulum-v1", "wrappers": WRAPPERS}})
    with pytest.raises(RloptError, match=r"acts in Box\(-2.0, 2.0.* but Pendulum-v1 has Box\(-1.0, 1.0"):
        evaluate_path(tmp_path)


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"id": "antigravity:Lengths-v0"}, "names a module"),
    ({"id": "Lengths-v0", "wrappers": ["os:system"]}, "names the wrapper os:system"),
    ({"id": "Lengths-v0", "wrappers": [{"class": "subprocess:run", "kwargs": {}}]}, "names the wrapper subprocess:run"),
    ({"id": "Lengths-v0", "wrappers": [{"class": "RecordVideo", "kwargs": {"video_folder": "x"}}]}, "RecordVideo"),
    ({"id": "Lengths-v0", "wrappers": [{"kwargs": {}}]}, "names the wrapper None"),
    ({"id": "Lengths-v0", "surprise": 1}, "surprise"),
    ({"id": "Nowhere-v0"}, "not a registered environment"),
]


@pytest.mark.parametrize(("env", "words"), HOSTILE)
def test_a_policy_file_cannot_choose_what_is_imported(tmp_path: Path, env: dict[str, Any], words: str) -> None:
    save_policy(policy_for("Lengths-v0"), tmp_path, {"env": env})
    before = set(sys.modules)
    with pytest.raises(RloptError, match=words) as e:
        evaluate_path(tmp_path, 1)
    assert "\n" not in str(e.value)
    assert "antigravity" not in set(sys.modules) - before


def test_an_episode_without_an_end_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(evaluation_module, "NO_LIMIT", 50)
    env = make_env("CliffWalking-v1", 2, autoreset=False)
    policy = endless(env)
    assert run_episodes(policy, env, 2, seed=0) == [Episode(-50.0, 50)] * 2
    assert caplog.messages == ["CliffWalking-v1: 2 evaluation episodes were cut off after 50 steps"]
    caplog.clear()
    evaluator = Evaluator(lambda n: env, seed=0)
    assert evaluator.evaluate(policy, 2) == evaluator.evaluate(policy, 2) == [Episode(-50.0, 50)] * 2
    assert caplog.text.count("CliffWalking-v1 has no time limit: episodes of evaluations are cut off after 50") == 1
