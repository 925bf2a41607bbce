"""MinAtar's games through their registration with Gymnasium."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rlopt.buffers import ReplayBuffer
from rlopt.envs import make_env
from rlopt.nn.encoders import SmallCNN, make_encoder
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


def test_another_way_of_writing_it_is_told() -> None:
    for name in ("minatar/breakout", "MinAtar/breakout-v1"):
        with pytest.raises(RloptError, match=r"did you mean MinAtar/Breakout-v1\?"):
            make_env(name)
