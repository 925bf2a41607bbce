"""The simplest loop of one's own is right: the clock, and vectors whose reset rows are no transitions."""

from __future__ import annotations

import logging
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from rlopt.agents import PPO, SAC, SACConfig
from rlopt.agents.base import Agent
from rlopt.buffers import ReplayBuffer
from rlopt.envs import VectorAdapter, make_env
from rlopt.nn import NetworkConfig
from rlopt.types import Clock, RloptError
from tests.agents.cases import AGENTS, known, make_agent, random_obs

SMALL = NetworkConfig(hidden=(8,))


def pendulum(**options: Any) -> SAC:
    env = gym.make("Pendulum-v1")
    config = SACConfig(warmup_steps=6, network=SMALL, fused=False, **options)
    return SAC(env.observation_space, env.action_space, config, seed=3)


def random_rows(agent: Agent, moved: int = 0) -> list[bool]:
    """Whether each of six acts on two rows was drawn without a look at the observation."""
    found = []
    for _ in range(6):
        before = agent.state_dict()
        one = agent.act(torch.zeros(2, 3)).action
        agent.load_state_dict(before)
        found.append(bool(torch.equal(one, agent.act(torch.full((2, 3), 0.7)).action)))
        agent.clock.env_steps += moved
    return found


def test_the_warm_up_ends_where_nobody_moves_the_clock() -> None:
    assert random_rows(pendulum()) == [True, True, True, False, False, False]


def test_a_clock_that_is_moved_is_what_counts() -> None:
    assert random_rows(pendulum(), moved=1) == [True] * 6
    assert random_rows(pendulum(), moved=3) == [True, True, False, False, False, False]


def test_an_evaluation_does_not_move_it_and_a_state_remembers() -> None:
    agent = pendulum(lr_schedule="linear", schedule_steps=10)
    for _ in range(3):
        agent.act(torch.zeros(2, 3), deterministic=True)
    assert (agent.clock.steps, agent.rate()) == (0, 1.0)
    agent.act(torch.zeros(2, 3))
    again = pendulum(lr_schedule="linear", schedule_steps=10)
    again.load_state_dict(agent.state_dict())
    assert (again.clock.steps, again.rate()) == (agent.clock.steps, agent.rate()) == (2, 0.8)
    assert Clock(7, 1, 900).steps == 7
    assert Clock(7, 1, 900).state_dict() == {"env_steps": 7, "updates": 1}


ACTING = [name for name, case in AGENTS.items() if case.actions is not None and known(name, warmup_steps=0)]


@pytest.mark.parametrize("name", ACTING)
def test_every_agent_with_a_warm_up_counts_what_it_acts_on(name: str) -> None:
    agent = make_agent(name, warmup_steps=6)
    obs = random_obs(agent.spec.observation_space, (2,), torch.Generator().manual_seed(0))
    seen = []
    for _ in range(4):
        seen.append(agent.clock.steps)
        agent.act(obs, agent.initial_carry(2))
    assert seen == [0, 2, 4, 6] and agent.clock.env_steps == 0


@pytest.mark.parametrize("name", [name for name, case in AGENTS.items() if case.actions is not None])
def test_arrays_are_as_good_as_tensors(name: str) -> None:
    obs = random_obs(make_agent(name).spec.observation_space, (2,), torch.Generator().manual_seed(0))
    assert isinstance(obs, torch.Tensor)
    ways = (obs, obs.numpy(), obs.double().numpy(), obs.tolist())
    acts = [(agent := make_agent(name)).act(way, agent.initial_carry(2), False).action for way in ways]
    assert all(torch.equal(acts[0], other) for other in acts[1:])
    agent = make_agent(name)
    with pytest.raises(RloptError, match=r"obs has shape .*, of one observation; .* \(N, …\): give obs\[None\]$"):
        agent.act(obs[0], agent.initial_carry(1))
    with pytest.raises(RloptError, match="of one observation"):
        agent.act(obs[0].numpy(), agent.initial_carry(1))
    for method in (agent.q, agent.log_prob):
        try:
            wanted = method(obs, acts[0])
        except RloptError:  # a policy without a density, an agent without values
            continue
        assert torch.equal(wanted, method(obs.numpy(), acts[0].numpy()))


def test_arrays_of_dict_observations() -> None:
    space = gym.spaces.Dict(a=gym.spaces.Box(-1.0, 1.0, (2,)), b=gym.spaces.Discrete(3))
    agent = make_agent("sac", observation_space=space)
    rows = {"a": np.zeros((2, 2)), "b": np.array([0, 2])}
    assert agent.act(rows).action.shape == make_agent("sac", observation_space=space).act(rows).action.shape
    with pytest.raises(RloptError, match=r"^obs lacks 'b'; it has a$"):
        agent.act({"a": rows["a"]})
    with pytest.raises(RloptError, match=r"^obs\['a'\] has shape \(2,\), of one observation"):
        agent.act({"a": rows["a"][0], "b": rows["b"]})
    with pytest.raises(RloptError, match=r"^obs must be a dict of a, b"):
        agent.act(rows["a"])


def test_ppo_counts_its_rollouts_by_its_acts() -> None:
    env = make_env("CartPole-v1", 2)
    agent = PPO(env.spec)
    obs = env.reset()
    for _ in range(5):
        obs = env.step(agent.act(obs).action).obs
    assert (agent.clock.env_steps, agent.clock.steps) == (0, 10)


def filled(vector: Any, steps: int, caplog: pytest.LogCaptureFixture) -> ReplayBuffer:
    """What is stored by somebody who does not know of autoreset modes."""
    buffer = ReplayBuffer(1_000, vector.single_observation_space, vector.single_action_space, num_envs=vector.num_envs)
    chance = np.random.default_rng(0)
    with caplog.at_level(logging.WARNING):
        obs, _ = vector.reset(seed=0)
        for _ in range(steps):
            action = chance.integers(0, 2, vector.num_envs)
            next_obs, reward, terminated, truncated, _ = vector.step(action)
            buffer.add(obs, action, reward, next_obs, terminated, truncated)
            obs = next_obs
    return buffer


def test_reset_rows_that_are_stored_as_transitions_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    filled(gym.make_vec("CartPole-v1", 3), 200, caplog)
    (line,) = caplog.messages
    assert line.startswith("rows that follow an episode's end look like reset rows of a Gymnasium vector in NEXT_STEP")
    assert "rlopt.envs.VectorAdapter" in line


def test_a_loop_without_reset_rows_is_told_nothing(caplog: pytest.LogCaptureFixture) -> None:
    env = gym.make("CartPole-v1")
    buffer = ReplayBuffer(1_000, env.observation_space, env.action_space)
    obs, _ = env.reset(seed=0)
    for _ in range(200):
        action = np.int64(0)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        buffer.add(obs, action, reward, next_obs, terminated, truncated)
        obs = env.reset()[0] if terminated or truncated else next_obs
    assert caplog.messages == [] and buffer.transitions == 200


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_a_vector_of_gymnasiums_gives_no_reset_rows_in_either_mode(
    mode: AutoresetMode, caplog: pytest.LogCaptureFixture
) -> None:
    kwargs = {"autoreset_mode": mode}
    env = VectorAdapter(gym.make_vec("CartPole-v1", 3, vectorization_mode="sync", vector_kwargs=kwargs))
    buffer = ReplayBuffer(2_000, env.spec.observation_space, env.spec.action_space, num_envs=3)
    obs, ends, rows = env.reset(seeds=[0, 1, 2]), 0, 0
    for _ in range(300):
        action = torch.zeros(3, dtype=torch.int64)
        s = env.step(action)
        buffer.add(obs, action, s.reward, s.next_obs, s.terminated, s.truncated, s.ended, s.valid)
        obs, ends, rows = s.obs, ends + int(s.ended.sum()), rows + int(s.valid.sum())
    assert ends > 60 and caplog.messages == []
    assert (
        buffer.transitions
        == rows
        == 900
        - (ends if mode == AutoresetMode.NEXT_STEP else 0)
        + (
            int(s.ended.sum()) if mode == AutoresetMode.NEXT_STEP else 0  # whose reset rows would come next
        )
    )
    batch = buffer.sample(2_000)
    assert (batch.next_obs - batch.obs).abs().max() < 1.0  # no row leads from an end to a beginning
    assert bool((batch.reward == 1.0).all())
