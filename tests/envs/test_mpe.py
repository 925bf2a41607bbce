"""The cooperative particle environments in torch, held equal to mpe2's step by step in float64."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch

from rlopt.envs import SyncVectorEnv, TorchEnv, make_env
from rlopt.envs.factory import EnvFactory, find_spec
from rlopt.envs.teams.mpe import ParticleEnv, Reference, SpeakerListener, Spread
from rlopt.types import RloptError

TASKS = {"spread": Spread, "reference": Reference, "speaker_listener": SpeakerListener}
MODULES = {Spread: "simple_spread_v3", Reference: "simple_reference_v3", SpeakerListener: "simple_speaker_listener_v4"}


def _state(env: ParticleEnv, world: Any) -> Any:
    """Return the state of a world of mpe2 as the torch version writes it down."""
    parts = [agent.state.p_pos for agent in world.agents] + [agent.state.p_vel for agent in world.agents]
    parts += [landmark.state.p_pos for landmark in world.landmarks]
    parts += [agent.state.c[:words] for agent, words in zip(world.agents, env.said, strict=True)]
    goals = [agent.goal_b for agent in world.agents if getattr(agent, "_goal_b", None) is not None]
    parts += [goal.color for goal in goals] + [goal.state.p_pos for goal in goals]
    return np.concatenate([*parts, [0.0]])


@pytest.mark.parametrize("cls", list(MODULES))
@pytest.mark.parametrize("continuous", [False, True])
def test_states_rewards_and_observations_equal_mpe2s(cls: type[ParticleEnv], continuous: bool) -> None:
    pytest.importorskip("mpe2")
    module = importlib.import_module(f"mpe2.{MODULES[cls]}")
    n = 3
    env = cls(n, continuous_actions=continuous)
    env.reset()
    others = [module.parallel_env(continuous_actions=continuous, max_cycles=100) for _ in range(n)]
    for i, other in enumerate(others):
        other.reset(seed=i)
    worlds = [other.unwrapped.world for other in others]
    state = torch.from_numpy(np.stack([_state(env, world) for world in worlds]))
    if cls is Spread:  # two that collide
        worlds[0].agents[1].state.p_pos = worlds[0].agents[0].state.p_pos + 0.1
        state[0] = torch.from_numpy(_state(env, worlds[0]))
    generator, exact = np.random.default_rng(0), {"rtol": 0.0, "atol": 1e-12}
    for _ in range(30):
        drawn = generator.uniform(0.0, 1.0, (n, len(env.agents), 16)).astype(np.float32)
        own = [[own.action for own in env.spec.agent_spaces] for _ in range(n)]
        acts = [
            [
                drawn[i, j, : space.shape[0]] if continuous else int(drawn[i, j, 0] * space.n)
                for j, space in enumerate(o)
            ]
            for i, o in enumerate(own)
        ]
        shape = env.spec.action_space.shape
        joint = torch.zeros(n, *shape, dtype=torch.float32 if continuous else torch.int64)
        for i, row in enumerate(acts):
            for j, action in enumerate(row):
                joint[(i, j, slice(len(action))) if continuous else (i, j)] = torch.as_tensor(action)
        state, reward, terminated = env.dynamics(state, joint)
        seen = env.observe(state)
        assert isinstance(seen, dict)
        assert not terminated.any()
        for i, other in enumerate(others):
            _, rewards, *_ = other.step(dict(zip(env.agents, acts[i], strict=True)))
            np.testing.assert_allclose(state[i], _state(env, worlds[i]), **exact)
            np.testing.assert_allclose(reward[i], list(rewards.values()), **exact)
            views = [other.unwrapped.scenario.observation(agent, worlds[i]) for agent in worlds[i].agents]
            np.testing.assert_allclose(seen["state"][i], np.concatenate(views), **exact)
            for j, view in enumerate(views):
                np.testing.assert_allclose(seen["obs"][i, j, : len(view)], view, **exact)
                assert not seen["obs"][i, j, len(view) :].any()


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("actions", ["", "-continuous"])
def test_both_backends_are_the_same_task(task: str, actions: str) -> None:
    pytest.importorskip("mpe2")
    first, second = make_env(f"mpe/{task}{actions}", 2), make_env(f"mpe/{task}{actions}", 2, backend="sync")
    assert isinstance(first, TorchEnv)
    assert isinstance(second, SyncVectorEnv)
    assert first.spec == second.spec
    for env in (first, second):
        env.reset()
        for k in range(25):
            action = torch.zeros(2, *env.spec.action_space.shape)
            step = env.step(action if actions else action.long())
            assert step.truncated.tolist() == [k == 24] * 2
            assert not step.terminated.any()


def test_first_states_and_goals_are_drawn_as_mpe2_does() -> None:
    env = Reference(4000)
    env.reset()
    place, goals = env.state[:, :4], env.state[:, env._goal : env._goal + 3].argmax(1)
    assert place.min() >= -1.0
    assert place.max() < 1.0
    assert abs(place.mean()) < 0.03
    assert (goals.bincount() / 4000 - 1 / 3).abs().max() < 0.03
    assert not env.state[:, 4:8].any()


def test_options_of_the_tasks() -> None:
    env = make_env("mpe/spread", 2, kwargs={"N": 5, "local_ratio": 0.0, "max_episode_steps": 3})
    obs = env.reset()
    assert isinstance(obs, dict)
    assert obs["obs"].shape == (2, 5, 4 + 10 + 8 + 8)
    rewards = [env.step(torch.zeros(2, 5, dtype=torch.int64)) for _ in range(3)]
    assert (rewards[0].reward == rewards[0].reward[:, :1]).all(), "all of it is shared"
    assert rewards[2].truncated.all()
    for kwargs, words in (({"N": 0}, "N=0 must be a whole number"), ({"local_ratio": 2.0}, "local_ratio=2.0 in")):
        with pytest.raises(RloptError, match=words):
            make_env("mpe/spread", kwargs=kwargs)


def test_a_film_is_drawn_by_mpe2() -> None:
    pytest.importorskip("mpe2")
    env = EnvFactory(find_spec("mpe/spread"), {"render_mode": "rgb_array", "N": 4})()
    env.reset(seed=0)
    assert env.render().shape == (700, 700, 3)  # type: ignore[union-attr]
    assert env.metadata["render_fps"] == 10
