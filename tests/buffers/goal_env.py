"""A goal environment: walk along a line to where one is told."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Walk(gymnasium.Env[Any, Any]):
    """The reward is 0 within half a step of the goal and -1 elsewhere; an episode has ``length`` steps.

    Args:
        length: of an episode.
        ends: whether reaching the goal ends it.
    """

    def __init__(self, length: int = 6, ends: bool = False) -> None:
        line = spaces.Box(-np.inf, np.inf, (1,))
        self.observation_space = spaces.Dict({"observation": line, "achieved_goal": line, "desired_goal": line})
        self.action_space = spaces.Box(-1, 1, (1,))
        self.length, self.ends = length, ends

    def _see(self) -> dict[str, Any]:
        here = np.array([self.place], np.float32)
        return {"observation": here, "achieved_goal": here.copy(), "desired_goal": self.goal.copy()}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.place, self.steps = 0.0, 0
        self.goal = self.np_random.uniform(-3, 3, 1).astype(np.float32)
        return self._see(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.place += float(np.asarray(action).reshape(-1)[0])
        self.steps += 1
        obs = self._see()
        reward = float(self.compute_reward(obs["achieved_goal"], obs["desired_goal"], {}))
        over = self.compute_terminated(obs["achieved_goal"], obs["desired_goal"], {})
        return obs, reward, over, self.steps >= self.length and not over, {}

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: dict[str, Any]) -> Any:
        far: Any = np.linalg.norm(achieved_goal - desired_goal, axis=-1) > 0.5
        return -far.astype(np.float32)

    def compute_terminated(self, achieved_goal: Any, desired_goal: Any, info: dict[str, Any]) -> bool:
        """As in PointMaze: of one pair of goals only."""
        return self.ends and bool(np.linalg.norm(achieved_goal - desired_goal) <= 0.5)


if "rlopt-tests/Walk-v0" not in gymnasium.registry:
    gymnasium.register("rlopt-tests/Walk-v0", entry_point=Walk)
