"""The true state beside the observation, for anchors of groups and for counting what observations confuse (GiGPO)."""

from __future__ import annotations

import hashlib
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from rlopt.types import RloptError

BITS = 64


class ExactState(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Adds the leaf ``exact``, (64,) bits of a hash of all that decides what comes next, which no policy reads.

    It asks the environment's ``exact_state() -> str``, or reads MiniGrid's grid and the ``s`` of toy text; the number
    of steps taken is no part of it. An observation that is no Dict becomes its leaf ``obs``.

    Raises:
        RloptError: it is an environment of none of these kinds, or has a leaf ``exact`` already.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        base: Any = env.unwrapped
        if not (hasattr(base, "exact_state") or hasattr(base, "agent_dir") or hasattr(base, "P")):
            raise RloptError(
                f"{type(base).__name__} does not tell its true state; give it a method exact_state() that returns a str"
            )
        space = env.observation_space
        self._leaves = isinstance(space, spaces.Dict)
        leaves = dict(space.spaces) if isinstance(space, spaces.Dict) else {"obs": space}
        if "exact" in leaves:
            raise RloptError(f"{type(base).__name__} has a leaf exact already; leave ExactState out")
        self.observation_space = spaces.Dict({**leaves, "exact": spaces.MultiBinary(BITS)})

    def observation(self, observation: Any) -> Any:
        """Return the observation with the leaf ``exact``."""
        seen = observation if self._leaves else {"obs": observation}
        digest = hashlib.blake2b(_state(self.unwrapped), digest_size=BITS // 8).digest()
        return {**seen, "exact": np.unpackbits(np.frombuffer(digest, np.uint8)).astype(np.int8)}


def _state(env: Any) -> bytes:
    if hasattr(env, "exact_state"):
        return str(env.exact_state()).encode()
    if hasattr(env, "agent_dir"):  # MiniGrid, whose own hash leaves out what is carried
        carried = None if env.carrying is None else env.carrying.encode()
        return repr((env.grid.encode().tolist(), [int(x) for x in env.agent_pos], int(env.agent_dir), carried)).encode()
    return str(int(env.s)).encode()
