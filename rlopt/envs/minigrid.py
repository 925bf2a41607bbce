"""MiniGrid and BabyAI (Chevalier-Boisvert et al. 2023, arXiv 2306.13831) as numbers: what stands in a cell is a kind, a
colour and a state, no brightness of pixels, and a mission is words of a fixed vocabulary."""

from __future__ import annotations

import re
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

KINDS, COLOURS, STATES = 11, 6, 4
"""What the three numbers of a cell count: kinds of object, colours, and states of doors, or where the agent looks."""
_TEXT = """
a after and at avoid ball behind blue box door end fetch find from front get go goal green grey
hallway in key lava left matching must near next object of on open opening pick purple put reach red
right room rooms square the then to traverse unlock up use yellow you your
"""
WORDS = _TEXT.split()
"""Every word of a mission; 0 is no word, 1 one that stands not here, and the first of these is 2."""
LENGTH = 40
"""Words of a mission that are read; the longest of BabyAI has 37."""
_NUMBERS = {word: i for i, word in enumerate(WORDS, 2)}


def has_mission(space: spaces.Space[Any]) -> bool:
    """Return whether an observation space has a leaf ``mission`` of text, as MiniGrid's have."""
    return isinstance(space, spaces.Dict) and type(space.spaces.get("mission")).__name__ == "MissionSpace"


def mission_numbers(mission: str) -> np.ndarray[Any, Any]:
    """Return a mission as the numbers of its words (``LENGTH``,) int64, 0 behind the last."""
    found = [_NUMBERS.get(word, 1) for word in re.findall(r"[a-z]+", mission.lower())[:LENGTH]]
    return np.array(found + [0] * (LENGTH - len(found)))


class Symbols(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Cells and missions as MultiDiscrete numbers, of which encoders make one column for each value.

    An ``image`` of cells (W, H, 3) becomes (W, H, 3) kinds, colours and states, ``mission`` the numbers of its words.
    It is put around every environment that still shows a mission once its other wrappers are in place; images of pixels
    stay what they are.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        assert isinstance(env.observation_space, spaces.Dict)
        leaves = dict(env.observation_space.spaces)
        image = leaves.get("image")
        self._cells = isinstance(image, spaces.Box) and image.shape[-1] == 3 and image.shape[0] < 32
        if self._cells:
            assert isinstance(image, spaces.Box)
            leaves["image"] = spaces.MultiDiscrete(np.broadcast_to([KINDS, COLOURS, STATES], image.shape).copy())
        leaves["mission"] = spaces.MultiDiscrete(np.full(LENGTH, len(WORDS) + 2))
        self.observation_space = spaces.Dict(leaves)

    def observation(self, observation: Any) -> Any:
        """Return an observation with its cells and its mission as numbers."""
        seen = {**observation, "mission": mission_numbers(observation["mission"])}
        if self._cells:
            seen["image"] = observation["image"].astype(np.int64)
        return seen
