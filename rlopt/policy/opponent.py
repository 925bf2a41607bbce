"""A saved policy that acts for one agent of an environment which others learn in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rlopt.policy.folder import load_policy
from rlopt.types import RloptError, Space, own_leaves, shape_of


def load_opponent(path: str | Path, agent: str, observation: Space, action: Space) -> Callable[[Any], Any]:
    """Return a function from what ``agent`` sees to what it does, by the policy in a policy or run folder, without
    chance.

    Raises:
        RloptError: there is no policy, or it was not trained for such an agent.
    """
    whole = load_policy(path)
    policy = whole.of_agent(agent) if whole.spec.agents else whole
    if policy.recurrent:
        raise RloptError(f"opponent={path}: a policy with a memory cannot be an opponent")
    wanted = [shape_of(leaf) for leaf in own_leaves(observation).values()]
    found = [shape_of(leaf) for leaf in own_leaves(policy.spec.observation_space).values()]
    if wanted != found or shape_of(policy.spec.action_space) != shape_of(action):
        raise RloptError(
            f"opponent={path}: it sees {policy.spec.observation_space} and acts in {policy.spec.action_space}, but "
            f"{agent} sees {observation} and acts in {action}"
        )
    return partial(policy, deterministic=True)
