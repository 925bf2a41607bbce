"""Environment specifications as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlopt.envs.spaces import space_from_json, space_to_json
from rlopt.types import AgentSpaces, EnvSpec

MAX_SPACE_ELEMENTS = 1 << 24
"""Numbers in one observation or action, all leaves together: a 4096 x 4096 image."""
MAX_AGENTS = 1 << 12


def spec_to_json(spec: EnvSpec) -> dict[str, Any]:
    """Return an ``EnvSpec`` as JSON."""
    return {
        "id": spec.id,
        "observation_space": space_to_json(spec.observation_space),
        "action_space": space_to_json(spec.action_space),
        "episode_limit": spec.episode_limit,
        "agents": list(spec.agents),
        "agent_spaces": [[space_to_json(space) for space in own] for own in spec.agent_spaces],
        "reward_shape": list(spec.reward_shape),
        "derived": dict(spec.derived),
        "frame_stack": spec.frame_stack,
        "facts": list(spec.facts),
    }


def spec_from_json(data: Mapping[str, Any]) -> EnvSpec:
    """Return the ``EnvSpec`` that ``spec_to_json`` described.

    Raises:
        RloptError: a damaged description, or agents that do not fit their joint spaces.
        KeyError, TypeError, ValueError: something is missing or of the wrong type, or too large to be meant.
    """
    own, agents = data["agent_spaces"], data["agents"]
    if not all(isinstance(part, list) for part in (own, agents)) or max(len(own), len(agents)) > MAX_AGENTS:
        raise ValueError(f"its agents are no list of {MAX_AGENTS} at most")
    described = [data["observation_space"], data["action_space"], *(space for pair in own for space in pair)]
    if sum(_elements(space, 0) for space in described) > MAX_SPACE_ELEMENTS:
        raise ValueError(f"its spaces hold more than {MAX_SPACE_ELEMENTS} numbers")
    limit, stack = data["episode_limit"], data["frame_stack"]
    return EnvSpec(
        id=str(data["id"]),
        observation_space=space_from_json(data["observation_space"]),
        action_space=space_from_json(data["action_space"]),
        episode_limit=None if limit is None else int(limit),
        agents=tuple(str(name) for name in agents),
        agent_spaces=tuple(AgentSpaces(space_from_json(seen), space_from_json(done)) for seen, done in own),
        reward_shape=tuple(int(n) for n in data["reward_shape"]),
        derived={str(leaf): index for leaf, index in data["derived"].items()},
        frame_stack=None if stack is None else int(stack),
        facts=tuple(str(name) for name in data["facts"]),
    )


def _elements(space: Any, depth: int) -> int:
    """Return numbers in an element of a described space, found without building the space."""
    if not isinstance(space, dict) or depth > 8:
        raise ValueError("a space is an object of its own")
    if isinstance(children := space.get("spaces"), dict):
        return sum(_elements(child, depth + 1) for child in children.values())
    shape = space.get("shape", [])
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 8:
        raise ValueError("a shape is a list of whole numbers")
    return math.prod(shape)
