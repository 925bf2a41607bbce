"""What the sync backend leaves behind when it cannot be built, and what it says of environments that are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import pytest

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


class Spaceless(gymnasium.Env[Any, Any]):
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))


def test_an_environment_without_a_space_is_told_so() -> None:
    with pytest.raises(RloptError, match="has no action_space; set it in its __init__"):
        SyncVectorEnv([Spaceless])
