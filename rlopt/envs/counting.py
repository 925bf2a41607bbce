"""Counting environments: every number they return can be written down by hand, so they show what a backend does wrong.

In all of them the observation is the number of steps taken in this episode, and the reward of a step is that number
too. Registered on import as ``rlopt/Count-v0``, ``rlopt/CountSpaces-v0``:
``make_env("rlopt.envs.counting:rlopt/Count-v0", kwargs={"length": 3})``.
"""

from __future__ import annotations

import os
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

_ENDS = ("terminate", "truncate", "both")


class CountEnv(gymnasium.Env[Any, Any]):
    """Counts to ``length`` and ends.

    Observation: Box (2,) of (steps taken in this episode, episodes finished). Action: Box (1,) in [-1, 1], ignored
    unless it is above ``trouble_above``. Reward: the count after the step.

    Args:
        length: steps of an episode; a sequence gives the lengths of successive episodes, in turn.
        end: ``terminate``, ``truncate`` or ``both`` (both flags at once); a sequence gives those of successive
            episodes.
        trouble: what an action above ``trouble_above`` does: ``exit`` ends the process, ``stall`` sleeps for an hour,
            ``raise`` raises ValueError, and None nothing.
    """

    def __init__(
        self,
        length: int | tuple[int, ...] = 3,
        end: str | tuple[str, ...] = "terminate",
        trouble: str | None = None,
        trouble_above: float = 0.5,
    ) -> None:
        self.lengths = (length,) if isinstance(length, int) else tuple(length)
        self.ends = (end,) if isinstance(end, str) else tuple(end)
        if not set(self.ends) <= set(_ENDS):
            raise ValueError(f"end must be one of {', '.join(_ENDS)}")
        self.trouble, self.trouble_above = trouble, trouble_above
        self.observation_space = spaces.Box(0.0, np.inf, (2,), np.float64)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.count = 0
        self.episodes = -1

    def _observation(self) -> Any:
        return np.array([self.count, self.episodes], np.float64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        self.episodes += 1
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.trouble is not None and np.ravel(action)[0] > self.trouble_above:
            self._make_trouble()
        self.count += 1
        over = self.count >= self.lengths[self.episodes % len(self.lengths)]
        end = self.ends[self.episodes % len(self.ends)]
        return self._observation(), float(self.count), over and end != "truncate", over and end != "terminate", {}

    def _make_trouble(self) -> None:
        if self.trouble == "exit":
            os._exit(3)
        if self.trouble == "stall":
            time.sleep(3600.0)
        raise ValueError("the counting environment was told to fail")


class CountSpacesEnv(CountEnv):
    """``CountEnv`` seen through nested observations and discrete actions.

    Observation: a Dict of ``image`` (uint8, 4 x 4 x 1, filled with the count), ``parts`` (a Tuple of a Discrete
    that starts at 5 and a MultiDiscrete, both showing the count modulo 4) and ``deep/flags`` (a MultiBinary of the
    count's two lowest bits).
    The action that arrived (the sum of its components) is added to the reward.

    Args:
        length: as of ``CountEnv``; so is end.
        actions: ``discrete``: Discrete(3, start=-1); ``multi_discrete``: MultiDiscrete([3, 2], start=[-1, 0]);
            ``multi_binary``: MultiBinary(3).
    """

    def __init__(
        self,
        length: int | tuple[int, ...] = 3,
        end: str | tuple[str, ...] = "terminate",
        actions: str = "discrete",
    ) -> None:
        super().__init__(length, end)
        self.observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, (4, 4, 1), np.uint8),
                "parts": spaces.Tuple((spaces.Discrete(4, start=5), spaces.MultiDiscrete([4, 4]))),
                "deep": spaces.Dict({"flags": spaces.MultiBinary(2)}),
            }
        )
        self.action_space = {
            "discrete": spaces.Discrete(3, start=-1),
            "multi_discrete": spaces.MultiDiscrete([3, 2], start=[-1, 0]),
            "multi_binary": spaces.MultiBinary(3),
        }[actions]

    def _observation(self) -> Any:
        count = self.count % 4
        return {
            "image": np.full((4, 4, 1), self.count, np.uint8),
            "parts": (np.int64(count + 5), np.array([count, 3 - count])),
            "deep": {"flags": np.array([self.count & 1, self.count >> 1 & 1], np.int8)},
        }

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward + float(np.sum(action)), terminated, truncated, info


gymnasium.register("rlopt/Count-v0", entry_point="rlopt.envs.counting:CountEnv")
gymnasium.register("rlopt/CountSpaces-v0", entry_point="rlopt.envs.counting:CountSpacesEnv")
