"""Particle environments of which a team of ours plays one side: the other one is scripted, or a saved policy."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces

from rlopt.envs.arrays import Array
from rlopt.envs.teams.particles import MpeEnv
from rlopt.types import RloptError

_POLICY = "rlopt.policy.opponent:load_opponent"
"""Makes an opponent of a policy folder; policies are above environments, so that it is found by its name."""


class OpponentEnv(MpeEnv):
    """``simple_tag_v3`` or ``simple_adversary_v3`` of mpe2 for the agents whose names begin with ``team``.

    Args:
        module: of mpe2.
        team: ``adversary`` or ``agent``.
        opponent: who acts for the others: ``scripted`` (pursuers go for the nearest prey, prey flees from them all and
            keeps inside; who must guess the goal goes to the landmark that has an agent nearest, who hides it covers a
            landmark each), ``module:function``, which for an agent's name, its observation and action space returns a
            function from observations to actions, or a folder with the policy of a run that trained these agents.
        kwargs: of ``PettingZooEnv``.

    Raises:
        RloptError: there is no such side or opponent.
    """

    def __init__(self, module: str, team: str = "adversary", opponent: str = "scripted", **kwargs: Any) -> None:
        super().__init__(module, team=team, **kwargs)
        self._opponents: dict[str, Callable[[Any], Any]] = {}
        for name in self.inner.possible_agents:
            if name not in self.agents:
                self._opponents[name] = self._player(name, str(opponent))

    def _player(self, name: str, opponent: str) -> Callable[[Any], Any]:
        seen, action = self.inner.observation_space(name), self.inner.action_space(name)
        if opponent == "scripted":
            world = self.inner.unwrapped.world
            own = next(agent for agent in world.agents if agent.name == name)
            return lambda _: _moved(_wish(world, own), action)
        module, _, function = opponent.rpartition(":")
        if not module:
            make = getattr(importlib.import_module(_POLICY.partition(":")[0]), _POLICY.partition(":")[2])
            return make(opponent, name, seen, action)  # type: ignore[no-any-return]
        try:
            make = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as e:
            raise RloptError(f"opponent={opponent}: there is no such function ({e})") from e
        return make(name, seen, action)  # type: ignore[no-any-return]

    def _others(self) -> dict[str, Any]:
        return {name: play(self._seen[name]) for name, play in self._opponents.items() if name in self._seen}


def _wish(world: Any, own: Any) -> Array:
    """Return where a scripted agent wants to go, (2,)."""
    place = own.state.p_pos
    rivals = np.array([agent.state.p_pos for agent in world.agents if agent.adversary != own.adversary])
    landmarks = np.array([landmark.state.p_pos for landmark in world.landmarks])
    if hasattr(own, "goal_a"):  # adversary
        if own.adversary:
            apart = np.linalg.norm(landmarks[:, None] - rivals, axis=-1).min(1)
            return landmarks[apart.argmin()] - place  # type: ignore[no-any-return]
        fellows = [agent for agent in world.agents if not agent.adversary]
        return landmarks[fellows.index(own) % len(landmarks)] - place  # type: ignore[no-any-return]
    away = place - rivals
    distance = np.linalg.norm(away, axis=-1, keepdims=True)
    if own.adversary:
        return -away[distance[:, 0].argmin()]  # type: ignore[no-any-return]
    wall = -np.sign(place) * np.maximum(np.abs(place) - 0.8, 0.0) * 10.0
    return (away / np.maximum(distance, 1e-6) ** 2).sum(0) + wall  # type: ignore[no-any-return]


def _moved(wish: Array, space: Any) -> Any:
    """Return the action that goes there: of Discrete, the direction that matters most."""
    x, y = wish / max(float(np.abs(wish).max()), 1e-6)
    if isinstance(space, spaces.Discrete):
        return (2 if x > 0 else 1) if abs(x) >= abs(y) else (4 if y > 0 else 3)
    return np.array([0.0, max(-x, 0.0), max(x, 0.0), max(-y, 0.0), max(y, 0.0)], np.float32)
