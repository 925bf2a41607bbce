"""MuJoCo's tasks by mujoco-warp, on warp's CPU device, against Gymnasium's.

One model only: its kernels compile for tens of seconds the first time, and are then kept.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from rlopt.envs import VectorEnv, make_env
from rlopt.types import RloptError

TASK = "Hopper-v5"


@pytest.fixture(scope="module")
def mujoco_warp() -> Any:
    return pytest.importorskip("mujoco_warp")


def _make(n: int = 3, **options: Any) -> Any:
    return make_env(TASK, n, seed=2, backend="warp", **options)


def _actions(env: VectorEnv, steps: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(steps, env.num_envs, *env.spec.action_space.shape, generator=generator) * 2 - 1  # type: ignore[misc]


def _put(real: Any, qpos: torch.Tensor, qvel: torch.Tensor) -> None:
    real.reset(seed=0)
    real.set_state(qpos.double().numpy(), qvel.double().numpy())


def test_it_follows_gymnasium_through_falls_and_resets(mujoco_warp: Any) -> None:
    env = _make()
    reference = [gymnasium.make(TASK).unwrapped for _ in range(3)]
    assert env.spec.observation_space.shape == reference[0].observation_space.shape
    assert env.spec.action_space == reference[0].action_space
    assert env.spec.episode_limit == 1000
    obs, ends = env.reset(), 0
    assert obs.dtype == torch.float32
    for i, real in enumerate(reference):
        _put(real, env.state["qpos"][i], env.state["qvel"][i])
        np.testing.assert_allclose(obs[i], real._get_obs(), atol=1e-6)
    for action in _actions(env, 50, 0):
        step = env.step(action)
        assert step.valid.all()
        assert not step.truncated.any()
        assert torch.equal(step.ended, step.terminated)
        for i, real in enumerate(reference):
            theirs, reward, terminated, _, _ = real.step(action[i].numpy())
            np.testing.assert_allclose(step.next_obs[i], theirs, rtol=1e-3, atol=1e-3)
            assert float(step.reward[i]) == pytest.approx(reward, abs=1e-3)
            assert bool(step.terminated[i]) == terminated
            if terminated:
                ends += 1
                assert not torch.equal(step.obs[i], step.next_obs[i])
                _put(real, env.state["qpos"][i], env.state["qvel"][i])
                np.testing.assert_allclose(step.obs[i], real._get_obs(), atol=1e-6)
            else:
                assert torch.equal(step.obs[i], step.next_obs[i])
    assert ends >= 3
    assert env.restarts == 0


def test_a_world_that_is_no_longer_finite_begins_anew_and_harms_no_other(mujoco_warp: Any) -> None:
    env, twin = _make(), _make()
    assert torch.equal(env.reset(), twin.reset())
    actions = _actions(env, 4, 1)
    env.state["qvel"][1] = torch.nan
    for k, action in enumerate(actions):
        step, other = env.step(action), twin.step(action)
        assert step.valid.tolist() == [True, k > 0, True]
        assert step.ended.tolist() == [False, k == 0, False]
        for a, b in zip(step[:-1], other[:-1], strict=True):
            assert torch.equal(a[[0, 2]], b[[0, 2]])
        assert step.obs.isfinite().all()
        assert step.next_obs.isfinite().all()
        assert step.reward.isfinite().all()
        if k == 0:
            assert step.reward[1] == 0.0
            assert not step.terminated[1]
            assert torch.equal(step.next_obs[1], step.obs[1])
    assert env.restarts == 1


def test_a_world_that_overflows_begins_anew(mujoco_warp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mujoco_warp, "make_data", partial(mujoco_warp.make_data, njmax=1))
    env = _make(2)
    env.reset()
    env.state["qpos"][:, 1] += torch.tensor([-0.3, 1.0])  # deep in the floor, with several contacts; flying, with none
    step = env.step(torch.zeros(2, 3))
    assert step.valid.tolist() == [False, True]
    assert env.restarts == 1


def test_rows_are_frozen_saved_and_restored(mujoco_warp: Any) -> None:
    env = _make(autoreset=False, kwargs={"max_episode_steps": 12})
    env.reset()
    env.state["qpos"][0, 2] = 0.3  # leans too far: ends at once
    actions = _actions(env, 16, 3)
    first = env.step(actions[0])
    assert first.terminated.tolist() == [True, False, False]
    for action in actions[1:8]:
        step = env.step(action)
        assert step.valid.tolist() == [False, True, True]
        assert torch.equal(step.obs[0], first.obs[0])
    saved = env.state_dict()
    expected = [env.step(action)[:-1] for action in actions[8:]]
    again = _make(autoreset=False, kwargs={"max_episode_steps": 12})
    assert torch.equal(again.load_state_dict(saved), step.obs)
    found = [again.step(action)[:-1] for action in actions[8:]]
    assert all(torch.equal(a, b) for s, t in zip(expected, found, strict=True) for a, b in zip(s, t, strict=True))
    assert [bool(s[4].any()) for s in expected] == [k == 3 for k in range(8)]
    # A reset by hand goes on with the row's own stream, whatever the number of rows.
    seeds = [11, 12, 13]
    obs = env.reset(seeds=seeds, mask=torch.tensor([True, False, True]))
    assert torch.equal(obs[1], expected[-1][0][1])
    assert torch.equal(obs[[0, 2]], _make(3).reset(seeds=seeds)[[0, 2]])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"id": "Hopper-v4"}, "tasks of version 5"),
        ({"id": "CartPole-v1"}, "tasks of version 5"),
        ({"id": TASK, "wrappers": ["FlattenObservation"]}, "use env.backend=sync"),
        ({"id": TASK, "kwargs": {"render_mode": "rgb_array"}}, "draws no pictures"),
    ],
)
def test_mistakes_in_a_request_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(RloptError) as caught:
        make_env(**arguments, backend="warp")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mujoco_warp", None)
    with pytest.raises(RloptError, match=r'pip install -c constraints.txt -e "\.\[gpu\]"'):
        make_env(TASK, backend="warp")
