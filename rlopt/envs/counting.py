"""Counting environments: every number they return can be written down by hand, so they show what a backend does wrong.

In all of them the observation is the number of steps taken in this episode, and the reward of a step is that number
too. Registered on import as ``rlopt/Count-v0``, ``rlopt/CountSpaces-v0``, ``rlopt/CountTeam-v0``:
``make_env("rlopt.envs.counting:rlopt/Count-v0", kwargs={"length": 3})``.
"""

from __future__ import annotations

import math
import os
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from rlopt.joint import join_rows, join_spaces
from rlopt.types import action_count

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


class CountTeamEnv(CountEnv):
    """Three different agents count together, and one of them dies on the way.

    Agent i (``agent_0`` … ``agent_2``) sees ``obs``: the count, the episodes finished, and i times its own number
    (2 + i numbers); a dead one sees zeros. ``state`` holds what all of them see, one after the other (9 numbers). An
    agent is paid i + 1 times the count, and the sum of its own action; a dead one nothing.
    The last discrete action (of heads: of the first) is impossible at odd counts, as ``action_mask`` says.

    Args:
        length: as of ``CountEnv``; so is end.
        actions: ``discrete``: 2, 3 and 5 actions; ``heads``: MultiDiscrete([2]), ([3, 2]) and ([5, 2]); ``box``: 1, 3
            and 2 numbers in [-1, 1].
        dies: the count with which agent 1 dies; None: never.
        paid_apart: whether the reward is one number per agent (``reward_shape`` (3,)), not their sum.
        derived: whether ``obs`` is declared as a gather of ``state``.

    Raises:
        ValueError: an action that its mask leaves out, or a padded entry that is not 0.
    """

    agents = ("agent_0", "agent_1", "agent_2")

    def __init__(
        self,
        length: int | tuple[int, ...] = 3,
        end: str | tuple[str, ...] = "terminate",
        actions: str = "discrete",
        dies: int | None = 2,
        paid_apart: bool = True,
        derived: bool = False,
    ) -> None:
        super().__init__(length, end)
        self.dies, self.paid_apart = dies, paid_apart
        kinds: dict[str, list[spaces.Space[Any]]] = {
            "discrete": [spaces.Discrete(k) for k in (2, 3, 5)],
            "heads": [spaces.MultiDiscrete(heads) for heads in ([2], [3, 2], [5, 2])],
            "box": [spaces.Box(-1.0, 1.0, (size,), np.float32) for size in (1, 3, 2)],
        }
        acts = kinds[actions]
        sizes = (2, 3, 4)
        seen: list[spaces.Space[Any]] = [spaces.Box(0.0, np.inf, (size,), np.float64) for size in sizes]
        if actions != "box":
            masks = [spaces.MultiBinary(action_count(space)) for space in acts]
            seen = [spaces.Dict({"obs": o, "action_mask": m}) for o, m in zip(seen, masks, strict=True)]
        self.own = list(zip(seen, acts, strict=True))
        state = spaces.Box(0.0, np.inf, (sum(sizes),), np.float64)
        self.observation_space, self.action_space = join_spaces(self.own, state, alive=True)
        self.metadata = {"agents": self.agents, "agent_spaces": self.own}
        if paid_apart:
            self.metadata["reward_shape"] = (3,)
        if derived:
            index = np.full(self.observation_space["obs"].shape or (), -1)
            for i, size in enumerate(sizes):
                index[i, :size] = sum(sizes[:i]) + np.arange(size)
            self.metadata["derived"] = {"obs": index}

    @property
    def alive(self) -> list[bool]:
        """Who acts next."""
        return [i != 1 or self.dies is None or self.count < self.dies for i in range(3)]

    def _masks(self) -> dict[int, Any]:
        """Of those who act, the discrete actions that are possible now."""
        masks = {}
        for i, (_, space) in enumerate(self.own):
            if self.alive[i] and not isinstance(space, spaces.Box):
                first = action_count(space) if isinstance(space, spaces.Discrete) else int(space.nvec[0])  # type: ignore[attr-defined]
                masks[i] = np.ones(action_count(space), np.int8)
                masks[i][first - 1] = self.count % 2 == 0
        return masks

    def _observation(self) -> Any:
        space: Any = self.observation_space
        seen = [np.array([self.count, self.episodes, *[i] * i], np.float64) for i in range(3)]
        seen = [obs * there for obs, there in zip(seen, self.alive, strict=True)]
        found = {"obs": join_rows(space["obs"], dict(enumerate(seen))), "state": np.concatenate(seen)}
        if "action_mask" in space.spaces:
            found["action_mask"] = join_rows(space["action_mask"], self._masks())
        return {**found, "alive": np.array(self.alive, np.int8)}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self._check(action)
        before = self.alive
        obs, count, terminated, truncated, info = super().step(np.zeros(1))
        paid = np.array([((i + 1) * count + np.sum(action[i])) * before[i] for i in range(3)])
        return obs, paid if self.paid_apart else float(paid.sum()), terminated, truncated, info

    def _check(self, action: Any) -> None:
        masks = self._masks()
        for i, (_, space) in enumerate(self.own):
            given = np.ravel(action[i])
            if given[math.prod(space.shape or ()) :].any():
                raise ValueError(f"the padding of agent {i}'s action {given} is not 0")
            if masks and self.alive[i] and not masks[i][int(given[0])]:
                raise ValueError(f"agent {i} took the action {given}, which was impossible")


gymnasium.register("rlopt/Count-v0", entry_point="rlopt.envs.counting:CountEnv")
gymnasium.register("rlopt/CountSpaces-v0", entry_point="rlopt.envs.counting:CountSpacesEnv")
gymnasium.register("rlopt/CountTeam-v0", entry_point="rlopt.envs.counting:CountTeamEnv")
