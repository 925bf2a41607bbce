"""The true state beside the observation: where it comes from, that no policy reads it, what observations confuse."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.agents import GiGPO, GiGPOConfig
from rlopt.agents.group_advantages import Rows, group_metrics
from rlopt.envs import make_env
from rlopt.envs.exact import ExactState
from rlopt.loops.group import GroupLoop
from rlopt.types import RloptError, encoded_leaves


class Fog(gym.Env):
    """Walks three places, of which the last two look alike; the end pays by the first action."""

    observation_space, action_space = spaces.Discrete(2), spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.place, self.first = 0, None
        return 0, {}

    def step(self, action: Any) -> Any:
        self.first = int(action) if self.first is None else self.first
        self.place += 1
        return min(self.place, 1), float(self.first == 0 and self.place == 3), self.place == 3, False, {}

    def exact_state(self) -> str:
        return f"{self.place} {self.first}"


gym.register("rlopt-tests/Fog-v0", entry_point=Fog)


def test_aliasing_is_the_share_of_steps_whose_anchor_stands_for_several_states() -> None:
    group = torch.tensor([0, 0])
    episode = torch.tensor([0, 0, 1, 1, 1])
    rows = Rows(torch.zeros(5), episode, group, (torch.tensor([0, 1, 0, 1, 2]),), exact=torch.tensor([0, 1, 0, 2, 3]))
    assert float(group_metrics(rows, 0.9)["aliasing"]) == pytest.approx(2 / 5)
    assert "aliasing" not in group_metrics(rows._replace(exact=None), 0.9)


@pytest.mark.parametrize(("anchor", "aliasing"), [("observation", 2 / 3), ("exact", 0.0)])
def test_the_true_state_is_an_anchor_and_is_compared_with_others(anchor: str, aliasing: float) -> None:
    env = make_env("rlopt-tests/Fog-v0", 8, autoreset=False, wrappers=["rlopt.envs.exact:ExactState"])
    assert list(encoded_leaves(env.spec.observation_space)) == ["obs"]
    loop = GroupLoop(GiGPO(env.spec, GiGPOConfig(groups=1, group_size=8, anchor=anchor)), env, 1_000)
    total, count = loop.advance().metrics["aliasing"]
    assert float(total / count) == pytest.approx(aliasing)


def test_toy_text_and_minigrid_are_known() -> None:
    lake = ExactState(gym.make("FrozenLake-v1"))
    first, _ = lake.reset(seed=0)
    assert lake.observation_space.contains(first) and set(first) == {"obs", "exact"}
    pytest.importorskip("minigrid")
    grid = ExactState(gym.make("MiniGrid-Empty-5x5-v0"))
    seen = [grid.reset(seed=0)[0]["exact"], *(grid.step(action)[0]["exact"] for action in (0, 1))]
    assert np.array_equal(seen[0], seen[2]) and not np.array_equal(seen[0], seen[1])


def test_what_has_no_true_state_is_refused() -> None:
    with pytest.raises(RloptError, match="CartPoleEnv does not tell its true state; give it a method exact_state"):
        ExactState(gym.make("CartPole-v1"))
    with pytest.raises(RloptError, match="has a leaf exact already"):
        ExactState(ExactState(Fog()))
    with pytest.raises(RloptError, match=r"agent\.anchor=exact: observations have no leaf exact"):
        env = make_env("rlopt-tests/Fog-v0", 2, autoreset=False)
        GroupLoop(GiGPO(env.spec, GiGPOConfig(groups=1, group_size=2, anchor="exact")), env, 100).advance()
