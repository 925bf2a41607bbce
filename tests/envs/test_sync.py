"""What the sync backend leaves behind when it cannot be built, and what it says of environments that are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from rlopt.envs import SyncVectorEnv
from rlopt.types import RloptError

Env = gymnasium.Env[Any, Any]


class Counted(gymnasium.Wrapper[Any, Any, Any, Any]):
    def __init__(self, env: Env, closed: list[str]) -> None:
        super().__init__(env)
        self.closed = closed

    def close(self) -> None:
        assert self.env.spec is not None
        self.closed.append(self.env.spec.id)
        super().close()


def test_what_was_built_is_closed_when_a_later_one_fails() -> None:
    closed: list[str] = []

    def building(id: str) -> Callable[[], Env]:
        return lambda: Counted(gymnasium.make(id), closed)

    def failing() -> Env:
        raise OSError("no more of them")

    with pytest.raises(OSError, match="no more of them"):
        SyncVectorEnv([building("Pendulum-v1"), building("Pendulum-v1"), failing, building("Pendulum-v1")])
    assert closed == ["Pendulum-v1", "Pendulum-v1"]
    closed.clear()
    with pytest.raises(RloptError, match="equal observation and action spaces"):
        SyncVectorEnv([building("Pendulum-v1"), building("CartPole-v1")])
    assert closed == ["Pendulum-v1", "CartPole-v1"]


class Old(gymnasium.Env[Any, Any]):
    """Steps with four values, as Gym did."""

    observation_space = action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(1, np.float32), 0.0, False, {}


def test_an_environment_of_old_gym_is_told_what_to_give() -> None:
    env = SyncVectorEnv([Old])
    env.reset()
    with pytest.raises(RloptError, match="step gives 4 values; Gymnasium's five are observation, reward, terminated"):
        env.step(torch.zeros(1, 1))


def test_an_environment_without_a_space_is_told_so() -> None:
    class Spaceless(Old):
        action_space = None  # type: ignore[assignment]

    with pytest.raises(RloptError, match="has no action_space; set it in its __init__"):
        SyncVectorEnv([Spaceless])
