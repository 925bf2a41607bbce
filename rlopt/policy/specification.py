"""Environment specifications as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlopt.envs.spaces import space_from_json, space_to_json
from rlopt.types import EnvSpec

MAX_SPACE_ELEMENTS = 1 << 24
"""Numbers in one observation or action, all leaves together: a 4096 x 4096 image."""


def spec_to_json(spec: EnvSpec) -> dict[str, Any]:
    """An ``EnvSpec`` as JSON."""
    return {
        "id": spec.id,
        "observation_space": space_to_json(spec.observation_space),
        "action_space": space_to_json(spec.action_space),
        "episode_limit": spec.episode_limit,
        "agents": list(spec.agents),
        "state_space": None if spec.state_space is None else space_to_json(spec.state_space),
        "shared_reward": spec.shared_reward,
        "action_mask": spec.action_mask,
    }


def spec_from_json(data: Mapping[str, Any]) -> EnvSpec:
    """The ``EnvSpec`` that ``spec_to_json`` described.

    Raises:
        RloptError: a damaged description, or spaces too large to be meant.
        KeyError, TypeError, ValueError: something is missing or of the wrong type.
    """
    described = [data["observation_space"], data["action_space"], data["state_space"]]
    if sum(_elements(space, 0) for space in described if space is not None) > MAX_SPACE_ELEMENTS:
        raise ValueError(f"its spaces hold more than {MAX_SPACE_ELEMENTS} numbers")
    limit = data["episode_limit"]
    return EnvSpec(
        id=str(data["id"]),
        observation_space=space_from_json(data["observation_space"]),
        action_space=space_from_json(data["action_space"]),
        episode_limit=None if limit is None else int(limit),
        agents=tuple(str(name) for name in data["agents"]),
        state_space=None if data["state_space"] is None else space_from_json(data["state_space"]),
        shared_reward=bool(data["shared_reward"]),
        action_mask=bool(data["action_mask"]),
    )


def _elements(space: Any, depth: int) -> int:
    """Numbers in an element of a described space, found without building the space."""
    if not isinstance(space, dict) or depth > 8:
        raise ValueError("a space is an object of its own")
    if isinstance(children := space.get("spaces"), dict):
        return sum(_elements(child, depth + 1) for child in children.values())
    shape = space.get("shape", [])
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 8:
        raise ValueError("a shape is a list of whole numbers")
    return math.prod(shape)
