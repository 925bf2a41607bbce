"""VMAS behind the contract, where it is installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from rlopt.envs import make_env
from rlopt.loops.configuration import EnvConfig
from rlopt.training.video import drawn_environment
from rlopt.types import RloptError


@pytest.mark.skipif(importlib.util.find_spec("vmas") is not None, reason="it is installed")
def test_without_vmas_a_line_says_what_is_missing() -> None:
    with pytest.raises(RloptError, match=r'env=vmas/balance needs the package vmas.*pip install .*\[vmas\]"'):
        make_env("vmas/balance", 2)


@pytest.mark.parametrize("how", ["film", "sync"])
def test_what_needs_a_single_environment_is_refused_in_its_words(how: str) -> None:
    with pytest.raises(RloptError, match=r"^env=vmas/balance takes no wrappers, facts or pictures") as caught:
        if how == "film":
            drawn_environment(EnvConfig(id="vmas/balance"), 0, torch.device("cpu"))
        else:
            make_env("vmas/balance", backend="sync")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("actions", ["", "-discrete"])
def test_a_scenario_steps_ends_and_begins_anew(actions: str) -> None:
    pytest.importorskip("vmas")
    env = make_env(f"vmas/balance{actions}", 4, kwargs={"max_episode_steps": 5, "n_agents": 2})
    assert len(env.spec.agents) == 2
    before = torch.random.get_rng_state()
    obs = env.reset(seeds=[1, 2, 3, 4])
    action = torch.zeros(4, *env.spec.action_space.shape)
    for k in range(5):
        step = env.step(action.long() if actions else action)
        assert step.reward.shape == (4, 2)
        assert (step.terminated | (step.truncated == (k == 4))).all()
    assert step.ended.all()
    again = env.reset(seeds=[1, 2, 3, 4])
    assert isinstance(obs, dict)
    assert isinstance(again, dict)
    assert torch.equal(obs["obs"], again["obs"])
    assert torch.equal(torch.random.get_rng_state(), before), "the process's generator stood still"


def test_evaluations_do_not_move_training() -> None:
    pytest.importorskip("vmas")

    def play(disturbed: bool) -> torch.Tensor:
        env = make_env("vmas/navigation", 3, seed=1, kwargs={"max_episode_steps": 4})
        env.reset()
        found = []
        for _ in range(10):
            if disturbed:
                other = make_env("vmas/navigation", 2, seed=5)
                other.reset()
                other.step(torch.zeros(2, *other.spec.action_space.shape))
            step = env.step(torch.zeros(3, *env.spec.action_space.shape))
            assert isinstance(step.obs, dict)
            found.append(step.obs["obs"])
        return torch.stack(found)

    assert torch.equal(play(False), play(True))


def test_without_autoreset_ended_rows_wait() -> None:
    pytest.importorskip("vmas")
    env = make_env("vmas/balance", 3, autoreset=False, kwargs={"max_episode_steps": 2})
    env.reset()
    action = torch.zeros(3, *env.spec.action_space.shape)
    env.step(action)
    last = env.step(action)
    assert last.ended.all()
    idle = env.step(action)
    assert not (idle.valid | idle.ended | idle.truncated | idle.terminated).any()
    assert torch.equal(idle.obs["obs"], last.next_obs["obs"])  # type: ignore[index]
    assert not idle.reward.any()
    env.reset(mask=torch.tensor([True, False, True]))
    assert env.step(action).valid.tolist() == [True, False, True]


def test_mistakes_are_one_clear_line() -> None:
    pytest.importorskip("vmas")
    with pytest.raises(RloptError, match="VMAS has no scenario 'nothing'"):
        make_env("vmas/nothing")
