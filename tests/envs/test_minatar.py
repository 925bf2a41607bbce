"""MinAtar's games through their registration with Gymnasium."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rlopt.buffers import ReplayBuffer
from rlopt.envs import make_env
from rlopt.nn.encoders import SmallCNN, make_encoder
from rlopt.training import train_config
from rlopt.training.setup import make_loop
from rlopt.types import RloptError

pytest.importorskip("minatar")


def test_planes_of_bits_are_seen_and_stored_as_bytes() -> None:
    env: Any = make_env("MinAtar/Breakout-v1", 2, seed=1)
    space = env.spec.observation_space
    assert space.shape == (10, 10, 4) and space.dtype == np.uint8 and space.high.max() == 1
    assert env.spec.action_space.n == 3  # -v0 has all six actions
    assert isinstance(make_encoder(space).parts[0], SmallCNN)
    obs = env.reset()
    assert obs.dtype == torch.uint8 and obs.sum() > 0 and obs.max() == 1
    buffer = ReplayBuffer(100, space, env.spec.action_space, num_envs=2)
    assert buffer.nbytes < 100 * 1000  # and not 4 times as much
    ends = 0
    for _ in range(40):
        action = torch.zeros(2, dtype=torch.int64)
        step = env.step(action)
        buffer.add(obs, action, step.reward, step.next_obs, step.terminated, step.truncated)
        obs, ends = step.obs, ends + int(step.terminated.sum())
    assert ends and set(buffer.sample(50).obs.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("agent", ["c51", "qr_dqn", "rainbow", "sac_discrete", "ppo"])
def test_agents_learn_from_them(agent: str) -> None:
    options: dict[str, Any] = {
        "agent": agent, "env": "MinAtar/Breakout-v1", "device": "cpu", "threads": 1, "total_steps": 48, "num_envs": 2,
        "agent.network.hidden": [8],
    }  # fmt: skip
    if agent == "ppo":
        options |= {"agent.rollout_steps": 12, "agent.epochs": 1, "agent.batch_size": 12}
    else:
        options |= {"agent.warmup_steps": 24, "agent.batch_size": 8, "agent.update_ratio": [1, 8]}
        options |= {"buffer.capacity": 100}
    loop = make_loop(train_config(options))
    before = [p.clone() for p in loop.policy().actor.parameters()]
    updates = episodes = 0
    while loop.step < loop.total_steps:
        progress = loop.advance()
        updates, episodes = updates + progress.updates, episodes + len(progress.episodes)
    after = list(loop.policy().actor.parameters())
    loop.close()
    assert (loop.step, updates) == (48, 4 if agent == "ppo" else 3) and episodes
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert loop.first_bad() is None


def test_another_way_of_writing_it_is_told() -> None:
    for name in ("minatar/breakout", "MinAtar/breakout-v1"):
        with pytest.raises(RloptError, match=r"did you mean MinAtar/Breakout-v1\?"):
            make_env(name)
