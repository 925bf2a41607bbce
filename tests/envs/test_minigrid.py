"""MiniGrid's cells and missions as numbers."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.agents import GiGPO, GiGPOConfig
from rlopt.envs import make_env
from rlopt.envs.minigrid import LENGTH, WORDS, Symbols, has_mission, mission_numbers
from rlopt.loops.group import GroupLoop


class MissionSpace(spaces.Space[str]):
    """As MiniGrid's."""

    def __init__(self) -> None:
        super().__init__(None, None)


class Grid(gym.Env):
    """Shows one cell and a mission, or pixels."""

    action_space = spaces.Discrete(2)

    def __init__(self, side: int = 2) -> None:
        self.observation_space = spaces.Dict(
            {"image": spaces.Box(0, 255, (side, side, 3), np.uint8), "mission": MissionSpace()}
        )

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        image = np.zeros(self.observation_space["image"].shape, np.uint8)  # type: ignore[index]
        image[0, 0] = (10, 5, 3)
        return {"image": image, "mission": "Go to the RED ball, then zigzag"}, {}

    def step(self, action: Any) -> Any:
        return self.reset()[0], 1.0, True, False, {}


def test_missions_are_the_numbers_of_their_words() -> None:
    numbers = mission_numbers("go to the RED ball, then zigzag")
    words = [WORDS[n - 2] if n > 1 else str(n) for n in numbers[:8]]
    assert words == ["go", "to", "the", "red", "ball", "then", "1", "0"] and numbers.shape == (LENGTH,)
    assert sorted(WORDS) == WORDS and len(mission_numbers("go " * 99)) == LENGTH


def test_cells_are_numbers_and_pixels_stay_pixels() -> None:
    env = Symbols(Grid())
    obs, _ = env.reset()
    assert env.observation_space.contains(obs) and obs["image"][0, 0].tolist() == [10, 5, 3]
    assert not has_mission(env.observation_space) and has_mission(Grid().observation_space)
    assert Symbols(Grid(64)).observation_space["image"] == Grid(64).observation_space["image"]  # type: ignore[index]


def test_it_is_there_by_itself_and_learnt_from() -> None:
    gym.register("rlopt-tests/Grid-v0", entry_point=Grid)
    env = make_env("rlopt-tests/Grid-v0", 4, autoreset=False)
    config = GiGPOConfig(groups=2, group_size=2)
    loop = GroupLoop(GiGPO(env.spec, config), env, 100)
    before = loop.agent.actor.flat.clone()  # type: ignore[attr-defined]
    progress = loop.advance()
    assert [e.total_reward for e in progress.episodes] == [1.0] * 4 and progress.updates == 1
    # All were paid alike, so nothing is to be learnt, and nothing moves.
    assert loop.agent.actor.flat.equal(before)  # type: ignore[attr-defined]


def test_minigrid_itself() -> None:
    pytest.importorskip("minigrid")
    env = make_env("MiniGrid-DoorKey-5x5-v0", 3, autoreset=False)
    obs = env.reset(seeds=[0, 0, 1])
    assert isinstance(obs, dict) and obs["image"].shape == (3, 7, 7, 3) and obs["mission"].shape == (3, LENGTH)
    assert torch.equal(obs["image"][0], obs["image"][1]) and not torch.equal(obs["image"][0], obs["image"][2])
    assert bool((obs["mission"] != 1).all()) and env.step(torch.tensor([2, 2, 2])).reward.tolist() == [0.0] * 3
