"""Atari games under their protocols: what is stored, what is hidden, what is counted, and exact continuation."""

from __future__ import annotations

from typing import Any

import gymnasium
import pytest
import torch
from torch import Tensor

from rlopt.envs import make_env
from rlopt.envs.make import resolve_backend
from rlopt.types import RloptError

pytest.importorskip("ale_py.vector_env")


def _actions(env: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(int(env.spec.action_space.n), (env.num_envs,), generator=generator)


def _same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:7], b[:7], strict=True) if isinstance(x, Tensor))


def test_a_game_simply_runs_and_tells_what_it_is() -> None:
    env = make_env("ALE/Breakout-v5", 2)
    assert resolve_backend("ALE/Breakout-v5") == "atari"
    assert env.spec.observation_space == gymnasium.spaces.Box(0, 255, (4, 84, 84), "uint8")
    assert (env.spec.frame_stack, env.spec.episode_limit) == (4, 27_000)
    obs: Any = env.reset()
    assert obs.shape == (2, 4, 84, 84) and obs.dtype == torch.uint8
    assert not obs[:, :3].any() and obs[:, 3].any()  # dopamine begins with black frames
    env.close()


@pytest.mark.parametrize("protocol", ["classic", "dopamine"])
def test_a_saved_game_continues_bit_for_bit(protocol: str) -> None:
    env = make_env("ALE/Breakout-v5", 2, protocol=protocol, seed=3)
    env.reset()
    acts = _actions(env)
    for _ in range(150):
        env.step(next(acts))
    state, other = env.state_dict(), make_env("ALE/Breakout-v5", 2, protocol=protocol, seed=4)
    other.load_state_dict(state)
    for _ in range(60):
        action = next(acts)
        assert _same(env.step(action), other.step(action))
    env.close()
    other.close()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"protocol": "clasic"}, "did you mean classic?"),
        ({"kwargs": {"episodic_life": True}}, "what env.protocol decides"),
    ],
)
def test_hostile_words(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(RloptError) as caught:
        make_env("ALE/Pong-v5", backend="atari", **kwargs)
    assert words in str(caught.value)
