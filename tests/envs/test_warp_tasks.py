"""Observations, rewards, ends and first states of the MuJoCo tasks in torch against Gymnasium's, on MuJoCo's data."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

pytest.importorskip("mujoco")

from torch.utils._python_dispatch import TorchDispatchMode

from rlopt.envs.streams import RowStreams
from rlopt.envs.warp_tasks import TASKS, WarpPusher, WarpTask

IDS = {
    "ant": "Ant-v5", "half_cheetah": "HalfCheetah-v5", "hopper": "Hopper-v5", "humanoid": "Humanoid-v5",
    "humanoidstandup": "HumanoidStandup-v5", "inverted_double_pendulum": "InvertedDoublePendulum-v5",
    "inverted_pendulum": "InvertedPendulum-v5", "pusher": "Pusher-v5", "reacher": "Reacher-v5",
    "swimmer": "Swimmer-v5", "walker2d": "Walker2d-v5",
}  # fmt: skip
OTHERWISE: dict[str, dict[str, Any]] = {
    "ant": {
        "include_cfrc_ext_in_observation": False,
        "contact_force_range": (-0.5, 0.5),
        "healthy_z_range": (0.3, 0.8),
    },
    "half_cheetah": {"exclude_current_positions_from_observation": False, "ctrl_cost_weight": 0.3},
    "hopper": {"terminate_when_unhealthy": False, "healthy_state_range": (-1.5, 1.5), "healthy_reward": 2.0},
    "humanoid": {"include_cvel_in_observation": False, "contact_cost_range": (-1.0, 1e-5), "contact_cost_weight": 1e-3},
    "humanoidstandup": {"include_cinert_in_observation": False, "impact_cost_weight": 1e-3, "uph_cost_weight": 3.0},
    "inverted_double_pendulum": {"healthy_reward": 3.0},
    "pusher": {"reward_near_weight": 2.0, "reward_dist_weight": 3.0, "reward_control_weight": 0.5},
    "reacher": {"reward_dist_weight": 2.0, "reward_control_weight": 0.5},
    "swimmer": {"forward_reward_weight": 2.0, "exclude_current_positions_from_observation": False},
    "walker2d": {"healthy_angle_range": (-0.1, 0.1), "forward_reward_weight": 0.5},
}


def _fields(env: Any, task: WarpTask, begin: bool = False) -> dict[str, torch.Tensor]:
    fields = {}
    for name in ("qpos", "qvel", *task.derived):
        value = np.array(getattr(env.data, name), np.float32)[None]
        fields[name] = torch.from_numpy(value * 0 if begin and name == "cfrc_ext" else value)
    return fields


@pytest.mark.parametrize(("name", "kwargs"), [*((n, {}) for n in IDS), *OTHERWISE.items()])
def test_formulas_are_gymnasiums(name: str, kwargs: dict[str, Any]) -> None:
    env = gymnasium.make(IDS[name], **kwargs).unwrapped
    task = TASKS[name](env, torch.device("cpu"))
    rng, ends, lasted = np.random.default_rng(0), 0, 0
    for episode in range(4):
        obs, _ = env.reset(seed=episode)
        seen = _fields(env, task, begin=True)
        np.testing.assert_allclose(task.observe(seen)[0], obs, rtol=1e-5, atol=1e-5)
        before = task.measure(seen)
        for _ in range(30):
            action = rng.uniform(env.action_space.low, env.action_space.high).astype(np.float32)
            obs, reward, terminated, _, _ = env.step(action)
            seen = _fields(env, task)
            np.testing.assert_allclose(task.observe(seen)[0], obs, rtol=1e-5, atol=1e-5)
            after = task.measure(seen)
            ours, over = task.outcome(seen, torch.from_numpy(action)[None], (after - before) / task.dt)
            assert float(ours) == pytest.approx(float(reward), rel=1e-4, abs=2e-4)
            assert (over is not None and bool(over)) == terminated
            before, lasted = after, lasted + 1
            if terminated:
                ends += 1
                break
    assert lasted > 4
    if name in ("hopper", "walker2d", "inverted_pendulum", "inverted_double_pendulum"):
        assert (ends > 0) == kwargs.get("terminate_when_unhealthy", True)


def _gap(a: Any, b: Any) -> float:
    """Kolmogorov and Smirnov's distance of two samples."""
    places = np.concatenate((a, b))
    below = [np.searchsorted(np.sort(x), places, side="right") / len(x) for x in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


@pytest.mark.parametrize("name", IDS)
def test_episodes_begin_with_gymnasiums_law(name: str) -> None:
    n = 500
    env = gymnasium.make(IDS[name]).unwrapped
    theirs = np.array([(env.reset(seed=i), np.concatenate((env.data.qpos, env.data.qvel)))[1] for i in range(n)])
    task = TASKS[name](gymnasium.make(IDS[name]).unwrapped, torch.device("cpu"))
    streams = RowStreams(n, dtype=torch.float32)
    streams.seed(range(n))
    ours = torch.cat(task.initial(streams), 1).numpy()
    for column in range(ours.shape[1]):
        if theirs[:, column].std() < 1e-12:
            np.testing.assert_allclose(ours[:, column], theirs[:, column], rtol=1e-6, atol=1e-7)
        else:
            assert _gap(ours[:, column], theirs[:, column]) < 2.23 * (2 / n) ** 0.5  # 0.01 %, for many columns
    if isinstance(task, WarpPusher):
        place = ours[:, len(task.init_qpos) - 4 : len(task.init_qpos) - 2]
        assert np.linalg.norm(place, axis=1).min() > 0.17
    if name == "reacher":
        assert np.linalg.norm(ours[:, 2:4], axis=1).max() < 0.2


class _NoWaiting(TorchDispatchMode):
    """Refuses what would make a GPU wait for the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", IDS)
def test_no_formula_looks_into_a_tensor(name: str) -> None:
    env = gymnasium.make(IDS[name]).unwrapped
    env.reset(seed=0)
    task, streams = TASKS[name](env, torch.device("cpu")), RowStreams(1, dtype=torch.float32)
    seen, action = _fields(env, task), torch.zeros(1, *env.action_space.shape)
    with _NoWaiting():
        task.observe(seen)
        task.outcome(seen, action, task.measure(seen))
        task.initial(streams)
