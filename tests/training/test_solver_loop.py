"""Value iteration and the loop that drives it: exact values, certified bounds, convergence, continuation."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from rlopt.agents.value_iteration import ValueIteration, ValueIterationConfig
from rlopt.config import build
from rlopt.envs import make_env
from rlopt.loops.evaluation import Evaluator
from rlopt.loops.solver import SolverLoop
from rlopt.policy import load_policy, save_policy
from rlopt.robust import TabularMDP, from_toy_text, policy_value
from rlopt.runs.display import Display
from rlopt.state import load_state, save_state, states_equal
from rlopt.training import train_config
from rlopt.training.setup import begin, make_loop
from rlopt.types import RloptError

TWO_STATES = ([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.0, 1.0]]], [[1.0, 4.0], [0.0, 0.0]], [1.0, 0.0])


def optimal_value(m: TabularMDP, gamma: float) -> torch.Tensor:
    """By policy iteration with exact linear solves: nothing of the agent's own arithmetic."""
    kernel = m.kernel.numpy()
    reward = (kernel * m.reward.numpy()).sum(-1)
    actions, states = np.zeros(m.num_states, int), np.arange(m.num_states)
    while True:
        p, r = kernel[states, actions], reward[states, actions]
        v = np.linalg.solve(np.eye(m.num_states) - gamma * p, r)
        q = reward + gamma * kernel @ v
        better = q.max(1) > q[states, actions] + 1e-12
        if not better.any():
            return torch.from_numpy(v)
        actions = np.where(better, q.argmax(1), actions)


def frozen_lake(slippery: bool, tolerance: float | None = 1e-6, total_steps: int = 5000, evaluate: bool = False):
    kwargs = {"is_slippery": slippery}
    agent = ValueIteration(from_toy_text("FrozenLake-v1", kwargs), ValueIterationConfig(tolerance=tolerance))
    make = lambda n: make_env("FrozenLake-v1", n, autoreset=False, kwargs=kwargs)  # noqa: E731
    return SolverLoop(agent, total_steps, Evaluator(make, seed=0) if evaluate else None)


def run(loop: SolverLoop) -> SolverLoop:
    while loop.step < loop.total_steps:
        loop.advance()
    return loop


def test_two_iterations_by_hand():
    """γ = 1/2: V₁(0) = max(1, 4) = 4, V₂(0) = max(1 + 2, 4 + 1/2 · 1/2 · 4) = 5; V(1) stays 0."""
    agent = ValueIteration(TabularMDP(*TWO_STATES), ValueIterationConfig(gamma=0.5))
    assert (agent.lower.tolist(), agent.upper.tolist()) == ([0.0, 0.0], [8.0, 8.0])
    first = agent.update().metrics
    assert agent.value.tolist() == [4.0, 0.0]
    assert {k: float(v) for k, v in first.items()} == {"residual": 4.0, "gap": 4.0, "lower": 4.0, "upper": 8.0}
    second = agent.update().metrics
    assert agent.value.tolist() == [5.0, 0.0]
    assert {k: float(v) for k, v in second.items()} == {"residual": 1.0, "gap": 1.0, "lower": 5.0, "upper": 6.0}
    assert agent.table.probabilities.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert agent.clock.updates == 2


@pytest.mark.parametrize("slippery", [False, True])
def test_frozen_lake_is_solved_within_certified_bounds(slippery):
    loop = frozen_lake(slippery)
    agent, m = loop.agent, loop.agent.model
    truth = optimal_value(m, 0.99)
    while loop.step < loop.total_steps:
        loop.advance()
        assert bool((agent.lower <= truth + 1e-12).all()) and bool((truth <= agent.upper + 1e-12).all())
        of_policy = policy_value(m.kernel, m.reward, 0.99, agent.table.probabilities)
        assert bool((agent.lower <= of_policy + 1e-12).all())
    torch.testing.assert_close(agent.value, truth, rtol=0, atol=1e-6)
    torch.testing.assert_close(of_policy, truth, rtol=0, atol=1e-9)
    start = float(truth[0])
    # Six steps to the goal without slipping; with it, the value that textbooks give for the 4 x 4 lake.
    assert start == pytest.approx(0.542026 if slippery else 0.99**5, abs=1e-6)


def test_taxi_exports_no_more_rows_than_there_are_observations():
    agent = ValueIteration(from_toy_text("Taxi-v4"))
    for _ in range(50):
        agent.update()
    assert agent.table.probabilities.shape == (500, 6)
    assert bool((agent.table.probabilities.sum(1) == 1.0).all())


def test_convergence_ends_the_run_and_a_resume_does_nothing_more(tmp_path):
    loop = run(frozen_lake(True))
    assert 0 < loop.step == loop.total_steps < 5000
    assert float((loop.agent.upper - loop.agent.lower).max()) <= 1e-6
    save_state(tmp_path / "state", loop.state_dict())
    again = frozen_lake(True, total_steps=50_000)
    again.load_state_dict(load_state(tmp_path / "state"))
    assert again.step == again.total_steps == loop.step


def test_the_last_line_of_a_converged_run_says_that_it_is_done(tmp_path):
    settings = train_config({
        "total_steps": 50_000, "device": "cpu", "run_dir": str(tmp_path / "run"), "log": {"tensorboard": False},
        "agent": {"name": "value_iteration"}, "env": {"id": "FrozenLake-v1"}, "eval": {"every": None, "episodes": 1},
    })  # fmt: skip
    out = io.StringIO()
    trainer = begin(settings, display=Display(settings.total_steps, stream=out))
    step = trainer.run().step
    trainer.close()
    assert out.getvalue().splitlines()[-1].startswith(f"step {step}/{step} (100%)  ")
    assert out.getvalue().endswith("left 0s\n")


def test_without_a_tolerance_every_iteration_is_done():
    loop = run(frozen_lake(False, tolerance=None, total_steps=40))
    assert loop.step == loop.total_steps == loop.agent.clock.env_steps == loop.agent.clock.updates == 40
    assert float(loop.agent.upper.max() - loop.agent.lower.max()) == 0.0  # solved after a few


def test_stopped_and_continued_equals_never_stopped(tmp_path):
    straight = run(frozen_lake(True, total_steps=30))
    broken = frozen_lake(True, total_steps=30)
    for _ in range(11):
        broken.advance()
    save_state(tmp_path / "state", broken.state_dict())
    fresh = frozen_lake(True, total_steps=30)
    fresh.load_state_dict(load_state(tmp_path / "state"))
    assert fresh.step == 11
    assert states_equal(run(fresh).state_dict(), straight.state_dict()) is None


def test_progress_of_an_iteration():
    loop = frozen_lake(True)
    progress = loop.advance()
    assert (progress.episodes, progress.updates, loop.row_logs(), loop.unit) == ([], 1, {}, "iterations")
    assert progress.metrics["residual"][1] == 1 and float(progress.metrics["residual"][0]) == pytest.approx(1 / 3)
    assert loop.first_bad() is None and not loop.bad_now()


def test_the_policy_acts_in_the_real_environment_and_survives_export(tmp_path):
    loop = run(frozen_lake(False, evaluate=True))
    episodes = loop.evaluate(3)
    assert [(e.total_reward, e.length) for e in episodes] == [(1.0, 6)] * 3
    save_policy(loop.policy(), tmp_path / "policy")
    policy = load_policy(tmp_path / "policy")
    assert policy(14) == 2  # one step left of the goal: go right
    assert policy.actor.kind == "tabular"
    loop.close()


def test_the_slippery_lake_is_won_as_often_as_it_can_be():
    """The optimal policy reaches the goal in about 74 % of episodes of at most 100 steps."""
    loop = run(frozen_lake(True, evaluate=True))
    wins = sum(e.total_reward for e in loop.evaluate(128))
    assert 0.60 < wins / 128 < 0.88
    loop.close()


def test_user_mistakes_are_one_line():
    with pytest.raises(RloptError, match=r"agent\.gamma=0\.999"):
        build(ValueIterationConfig, {"gamma": 1.0})
    with pytest.raises(RloptError, match="solves a TabularMDP"):
        ValueIteration(make_env("FrozenLake-v1").spec)
    base = {"agent": {"name": "value_iteration"}, "device": "cpu"}
    for more, words in [
        ({"env": {"id": "CartPole-v1"}}, "transition table"),
        ({"env": {"id": "FrozenLake-v1"}, "num_envs": 2}, "leave num_envs out"),
        ({"env": {"id": "FrozenLake-v1", "normalize_obs": True}}, "leave out env.wrappers"),
    ]:
        with pytest.raises(RloptError, match=words):
            make_loop(train_config({**base, **more}))
