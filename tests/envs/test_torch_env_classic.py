"""The classic-control tasks in torch against Gymnasium's, in float64."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.envs import TorchEnv, make_env
from rlopt.envs.classic import CLASSIC

STEPS = 400
CHAOTIC = {"Acrobot-v1"}
"""Rounding grows tenfold in a few steps, so each step starts from Gymnasium's own state."""


def _reference(env_id: str, state: Any, **attributes: float) -> Any:
    env = gymnasium.make(env_id).unwrapped
    env.reset(seed=0)
    for name, value in attributes.items():
        assert hasattr(env, name), name
        setattr(env, name, value)
    env.state = np.array(state)
    return env


def _actions(space: Any, steps: int, n: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    if isinstance(space, spaces.Discrete):
        # runs of one action, so that cars and acrobots get somewhere
        return np.repeat(rng.integers(space.n, size=(steps // 10 + 1, n)), 10, axis=0)[:steps]
    high = 0.999 * float(space.high[0]) if space.high[0] == 1.0 else 1.5 * float(space.high[0])
    return np.repeat(rng.uniform(-high, high, (steps // 10 + 1, n, 1)), 10, axis=0)[:steps]


def _compare(env: TorchEnv, reference: list[Any], actions: Any, chaotic: bool) -> int:
    """Steps both from equal states; an ended row begins again in both. Returns how often an episode ended."""
    state, ends = env.state.clone(), 0
    begin = state.clone()
    for action in actions:
        if chaotic:
            state = torch.tensor(np.array([r.state for r in reference]))
        state, reward, terminated = env.dynamics(state, torch.as_tensor(action))
        observed = env.observe(state)
        for i, r in enumerate(reference):
            obs, gym_reward, gym_terminated, _, _ = r.step(action[i])
            np.testing.assert_allclose(state[i].numpy(), np.asarray(r.state, np.float64), rtol=0, atol=1e-9)
            np.testing.assert_allclose(observed[i].numpy(), obs, rtol=0, atol=2e-6)  # Gymnasium's is float32
            assert float(reward[i]) == pytest.approx(float(gym_reward), abs=1e-9)
            assert bool(terminated[i]) == gym_terminated
            if gym_terminated:
                ends += 1
                dtype = np.asarray(r.state).dtype
                r.reset()
                r.state = begin[i].numpy().astype(dtype)
                state[i] = begin[i]
    return ends


@pytest.mark.parametrize("env_id", CLASSIC)
def test_states_rewards_and_ends_equal_gymnasiums(env_id: str) -> None:
    env = make_env(env_id, 3, seed=2, backend="torch")
    assert isinstance(env, TorchEnv)
    real = gymnasium.make(env_id)
    assert (env.spec.observation_space, env.spec.action_space) == (real.observation_space, real.action_space)
    assert env.spec.episode_limit == real.spec.max_episode_steps
    env.reset()
    dtype = np.float32 if env_id == "MountainCarContinuous-v0" else np.float64
    reference = [_reference(env_id, s.numpy().astype(dtype)) for s in env.state]
    if env_id.startswith("MountainCar"):  # half way up, so that the flag is reached too
        env.state[:, 0] = torch.tensor([-0.5, 0.2, 0.4]).to(env.state)
        env.state[:, 1] = torch.tensor([0.0, 0.03, 0.05]).to(env.state)
        for r, s in zip(reference, env.state, strict=True):
            r.state = s.numpy().astype(dtype)
    ends = _compare(env, reference, _actions(env.action_space, STEPS, 3, 1), env_id in CHAOTIC)
    assert ends > 0 or env_id in ("Pendulum-v1", "Acrobot-v1")


def test_an_acrobot_that_swings_up_ends() -> None:
    env = make_env("Acrobot-v1", 1, backend="torch")
    assert isinstance(env, TorchEnv)
    env.reset()
    env.state.copy_(torch.tensor([[2.6, 0.2, 3.0, 20.0]]))  # fast enough for more than one turn of the second link
    reference = [_reference("Acrobot-v1", env.state[0].numpy())]
    assert _compare(env, reference, np.full((30, 1), 2), chaotic=True) > 0


@pytest.mark.parametrize(
    ("env_id", "parameters", "attributes"),
    [
        (
            "CartPole-v1",
            {"gravity": 12.0, "masscart": 1.3, "masspole": 0.2, "length": 0.7, "force_mag": 8.0},
            {"total_mass": 1.3 + 0.2, "polemass_length": 0.2 * 0.7},
        ),
        ("Pendulum-v1", {"g": 8.0, "m": 1.2, "l": 0.8}, {}),
        ("MountainCar-v0", {"force": 0.0012, "gravity": 0.002, "goal_velocity": 0.01}, {}),
        ("MountainCarContinuous-v0", {"power": 0.001, "goal_velocity": 0.01}, {}),
        (
            "Acrobot-v1",
            {"link_length_1": 1.1, "link_mass_1": 0.9, "link_mass_2": 1.2, "link_com_pos_1": 0.4, "link_com_pos_2": 0.6,
             "link_moi": 1.1},
            {},
        ),
    ],
)  # fmt: skip
def test_parameters_are_per_row_and_mean_what_gymnasiums_attributes_mean(
    env_id: str, parameters: dict[str, float], attributes: dict[str, float]
) -> None:
    env = make_env(env_id, 2, backend="torch")
    assert isinstance(env, TorchEnv)
    env.set_parameters(
        **{k: torch.tensor([v, float(env.parameters[k][1])], dtype=torch.float64) for k, v in parameters.items()}
    )
    env.reset()
    dtype = np.float32 if env_id == "MountainCarContinuous-v0" else np.float64
    named = {k.upper() if k.startswith("link") else k: v for k, v in parameters.items()}
    reference = [
        _reference(env_id, env.state[0].numpy().astype(dtype), **named, **attributes),
        _reference(env_id, env.state[1].numpy().astype(dtype)),
    ]
    _compare(env, reference, _actions(env.action_space, 100, 2, 0), env_id in CHAOTIC)


def test_cart_pole_with_the_rewards_of_sutton_and_barto() -> None:
    env = make_env("CartPole-v1", 2, backend="torch", kwargs={"sutton_barto_reward": True})
    reference = gymnasium.make("CartPole-v1", sutton_barto_reward=True).unwrapped
    reference.reset(seed=0)
    env.reset()
    assert isinstance(env, TorchEnv)
    env.state[:] = torch.tensor(np.array(reference.state))
    for _ in range(10):
        step = env.step(torch.ones(2, dtype=torch.int64))
        _, reward, terminated, _, _ = reference.step(1)
        assert step.reward.tolist() == [reward] * 2
        assert step.terminated.tolist() == [terminated] * 2
        if terminated:
            break
    assert reward == -1.0


def _gap(a: Any, b: Any) -> float:
    """Kolmogorov and Smirnov's distance of two samples."""
    places = np.concatenate((a, b))
    below = [np.searchsorted(np.sort(x), places, side="right") / len(x) for x in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


@pytest.mark.parametrize("env_id", CLASSIC)
def test_episodes_begin_with_gymnasiums_law(env_id: str) -> None:
    n = 600
    real = gymnasium.make(env_id).unwrapped
    theirs = np.array([(real.reset(seed=i), np.asarray(real.state))[1] for i in range(n)])
    env = make_env(env_id, n, seed=1, backend="torch")
    env.reset()
    assert isinstance(env, TorchEnv)
    first = env.state.clone()
    env.reset()
    for ours in (first.numpy(), env.state.numpy()):  # drawn from the rows' first numbers, and from later ones
        for column in range(ours.shape[1]):
            if theirs[:, column].std() == 0:
                assert np.array_equal(ours[:, column], theirs[:, column])
            else:
                assert _gap(ours[:, column], theirs[:, column]) < 1.95 * (2 / n) ** 0.5  # 0.1 %
                assert len(np.unique(ours[:, column])) > 0.99 * n


def test_whole_episodes_equal_gymnasiums_through_the_contract() -> None:
    env = make_env("CartPole-v1", 8, seed=4, backend="torch")
    obs = env.reset()
    real = [_reference("CartPole-v1", s.numpy()) for s in env.state]  # type: ignore[attr-defined]
    generator, ends = torch.Generator().manual_seed(0), 0
    for _ in range(60):
        action = torch.randint(2, (8,), generator=generator)
        step = env.step(action)
        for i, r in enumerate(real):
            theirs, reward, terminated, _, _ = r.step(int(action[i]))
            np.testing.assert_allclose(step.next_obs[i].numpy(), theirs, atol=1e-7)
            assert float(step.reward[i]) == reward
            assert bool(step.terminated[i]) == bool(step.ended[i]) == terminated
            if terminated:
                ends += 1
                r.reset()
                r.state = env.state[i].numpy().copy()  # type: ignore[attr-defined]
            else:
                assert torch.equal(step.obs[i], step.next_obs[i])
        obs = step.obs
    assert obs.abs().max() < 5 and ends > 8
