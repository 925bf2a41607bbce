"""mpe2's environments, which can be saved: their worlds are places, velocities, words, colours and goals."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlopt.envs.teams.pettingzoo import PettingZooEnv
from rlopt.random import numpy_state, set_numpy_state
from rlopt.types import State

_GOALS = ("_goal_a", "_goal_b")


class MpeEnv(PettingZooEnv):
    """An environment of mpe2; arguments are those of ``PettingZooEnv``."""

    def state_dict(self) -> State:
        """Return the world, between two steps."""
        raw: Any = self.inner.unwrapped
        things = raw.world.entities
        return {
            "place": [np.array(thing.state.p_pos) for thing in things],
            "velocity": [np.array(thing.state.p_vel) for thing in things],
            "color": [np.array(thing.color) for thing in things],
            "words": [np.array(agent.state.c) for agent in raw.world.agents],
            "goals": [[_number(getattr(agent, name, None), things) for name in _GOALS] for agent in raw.world.agents],
            "steps": int(raw.steps),
            "over": not self.inner.agents,
            "alive": self._alive.copy(),
            "generator": numpy_state(raw.np_random),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue where ``state_dict`` stood."""
        raw: Any = self.inner.unwrapped
        self.inner.reset(seed=0)
        things = raw.world.entities
        for i, thing in enumerate(things):
            thing.state.p_pos, thing.state.p_vel = np.array(state["place"][i]), np.array(state["velocity"][i])
            thing.color = np.array(state["color"][i])
        for agent, words, goals in zip(raw.world.agents, state["words"], state["goals"], strict=True):
            agent.state.c = np.array(words)
            for name, goal in zip(_GOALS, goals, strict=True):
                if hasattr(agent, name):
                    setattr(agent, name, None if goal is None else things[goal])
        raw.steps = state["steps"]
        set_numpy_state(raw.np_random, state["generator"])
        self._alive = np.array(state["alive"])
        self._seen = {} if state["over"] else {name: raw.observe(name) for name in raw.possible_agents}


def _number(thing: Any, things: list[Any]) -> int | None:
    return next((i for i, one in enumerate(things) if one is thing), None)
