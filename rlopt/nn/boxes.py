"""The bounds of actions, as an agent's float32 sees them."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from rlopt.types import RloptError, Space, one_line

Array = np.ndarray[Any, Any]


def agents_for(space: Space) -> str:
    """Return the end of an error line: who acts in an action space."""
    if isinstance(space, spaces.Box):
        return "use agent=sac, td3 or ppo" if np.isfinite(bounds(space)).all() else "use agent=ppo"
    if isinstance(space, spaces.Discrete):
        return "use agent=sac_discrete or ppo"
    if isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
        return "use agent=ppo"
    return "no agent acts there; translate it by a wrapper (env.wrappers=[module:Wrapper])"


def bounded_box(space: Space) -> spaces.Box:
    """Return the action space as a bounded Box, or one clear line."""
    if not isinstance(space, spaces.Box):
        raise RloptError(f"this agent acts in Box action spaces, not in {one_line(space)}; {agents_for(space)}")
    if not np.isfinite(bounds(space)).all():
        raise RloptError(
            f"this agent needs finite bounds on every action, not {one_line(space)}; set them in the environment, "
            "or by env.wrappers=[module:Wrapper] (beyond 3.4e38 they count as infinite)"
        )
    return space


def bounds(box: spaces.Box) -> tuple[Array, Array]:
    """Return the bounds (A,) of a Box as the agent's float32 sees them."""
    with np.errstate(over="ignore"):
        return box.low.astype(np.float32).ravel(), box.high.astype(np.float32).ravel()


def scale(low: Array, high: Array) -> tuple[Array, Array]:
    """Return centre and half range (A,) such that no x in [-1, 1] puts ``centre + half_range * x`` outside the bounds,
    whatever is rounded. Where a side is infinite they are not finite.

    Halves are taken first, because the width of wide bounds overflows. Rounding may put an end outside by a unit in the
    last place, and as product and sum are monotone it is enough to bring the ends inside.
    """
    with np.errstate(invalid="ignore"):
        centre, half_range = np.clip(low / 2 + high / 2, low, high), high / 2 - low / 2
        while (outside := (centre - half_range < low) | (centre + half_range > high)).any():
            half_range = np.where(outside, np.nextafter(half_range, np.float32(0.0)), half_range)
    return centre, half_range
