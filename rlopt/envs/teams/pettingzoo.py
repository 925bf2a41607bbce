"""Any parallel environment of PettingZoo as one Gymnasium environment whose spaces have the agents as first axis."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from rlopt.envs.arrays import Array
from rlopt.joint import join_index, join_rows, join_spaces
from rlopt.types import RloptError, Space, binary, shape_of

log = logging.getLogger(__name__)


class PettingZooEnv(gymnasium.Env[Any, Any]):
    """A parallel environment of PettingZoo, by the module that has its ``parallel_env``.

    Agents keep their names; ``possible_agents`` are the team, padded with zeros where they differ. Observations that
    are a Dict of ``observation`` and ``action_mask``, PettingZoo's way of saying what can be done, become the leaves
    ``obs`` and ``action_mask``. An agent that has terminated is dead: it sees zeros, is paid nothing and its actions
    go nowhere. The episode ends when no agent is left, by truncation if any of the last ones was truncated. An agent
    that is truncated while others go on counts as terminated, for a row has one time limit: its bootstrap is cut, of
    which a warning tells once. Agents leave an episode, but do not join it. Facts are ``NAME/AGENT``, from each agent's
    last info.

    Args:
        module: ``mpe2.simple_spread_v3`` …
        alive: whether there is the leaf ``alive``; false for environments in which nobody dies.
        shared_reward: whether all agents are given the same reward, which is the team's then.
        joined_state: whether the state is what the agents see, one after the other.
        team: how the names of those begin who are the team; the others' actions are ``_others``, which is a subclass's.
        kwargs: of the environment.

    Raises:
        RloptError: there is no such module, it has no ``parallel_env``, its agents have no common kind of space, or one
            joins after the reset.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}

    def __init__(
        self,
        module: str,
        alive: bool = True,
        shared_reward: bool = False,
        joined_state: bool = False,
        *,
        team: str = "",
        **kwargs: Any,
    ) -> None:
        self.inner, self._module = _build(module, kwargs), module
        self.render_mode = kwargs.get("render_mode")
        inner: Any = self.inner
        every = list(map(str, inner.possible_agents))
        self.agents = tuple(name for name in every if name.startswith(team))
        if not self.agents:
            raise RloptError(f"{module} has no agents whose names begin with {team!r}: they are {', '.join(every)}")
        own = [(_renamed(inner.observation_space(name)), inner.action_space(name)) for name in self.agents]
        self._dies, self._together = alive, shared_reward
        self._has_state = _has_state(inner)
        state = _state_space(inner.state_space) if self._has_state else None
        self.observation_space, self.action_space = join_spaces(own, state, alive)
        self._own, self._alive = own, np.zeros(len(own), np.int8)
        self._shapes = [shape_of(action) for _, action in own]
        self.metadata = {**(getattr(inner, "metadata", None) or {}), "agents": self.agents, "agent_spaces": own}
        if not shared_reward:
            self.metadata["reward_shape"] = (len(own),)
        if joined_state:
            index = join_index([shape_of(inner.observation_space(name)) for name in every])
            index = index[[every.index(name) for name in self.agents], : max(shape_of(seen)[0] for seen, _ in own)]
            self.metadata["derived"] = {"obs": index}
        self._seen: Mapping[str, Any] = {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._seen, _ = self.inner.reset(seed=seed, options=options)
        self._alive = np.array([name in self._seen for name in self.agents], np.int8)
        return self._joined(), {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        acting = [i for i in range(len(self.agents)) if self._alive[i]]
        given = {self.agents[i]: self._own_action(action, i) for i in acting}
        others = self._others()
        self._seen, rewards, terminated, truncated, infos = self.inner.step({**others, **given} if others else given)
        over = not self.inner.agents
        late = [i for i in acting if truncated.get(self.agents[i]) and not terminated.get(self.agents[i])]
        if joined := [name for name in self.agents if name in self.inner.agents and name not in given]:
            raise RloptError(f"{self._module}: {joined[0]} joined after the reset; agents may only leave an episode")
        if not over and any(self.agents[i] not in self.inner.agents for i in late):
            _tell_of_truncation(self._module)
        for i in acting:
            name = self.agents[i]
            out = bool(terminated.get(name)) if over else name not in self.inner.agents
            # Where all end for good ``terminated`` says so, and who lived until then is alive.
            self._alive[i] = not out or (over and not late)
        paid = np.array([float(rewards.get(name, 0.0)) if name in given else 0.0 for name in self.agents])
        info = {f"{key}/{name}": value for name, own in infos.items() for key, value in own.items()} if over else {}
        reward = float(paid.take(acting[:1]).sum()) if self._together else paid
        return self._joined(), reward, over and not late, over and bool(late), info

    def _others(self) -> dict[str, Any]:
        """Return the actions of those who are not in the team."""
        return {}

    def _own_action(self, action: Any, i: int) -> Any:
        own: Array = np.asarray(action[i])
        for axis, size in enumerate(self._shapes[i]):
            own = own.take(range(size), axis) if own.shape[axis] != size else own
        return own if own.ndim else int(own)

    def _joined(self) -> dict[str, Array]:
        """Return what those see who are alive, zeros for the others, the state and who is alive."""
        joint: Any = self.observation_space
        rows: dict[str, dict[int, Any]] = {key: {} for key in joint.spaces if key not in ("state", "alive")}
        for i, name in enumerate(self.agents):
            if self._alive[i] and name in self._seen:
                for key, value in _named(self._seen[name], rows).items():
                    rows[key][i] = value
        found = {key: join_rows(joint[key], own) for key, own in rows.items()}
        if self._has_state:
            found["state"] = np.asarray(self.inner.state(), np.float32).reshape(-1)
        if self._dies:
            found["alive"] = self._alive.copy()
        return found

    def render(self) -> Any:
        return self.inner.render()

    def close(self) -> None:
        self.inner.close()


@cache
def _tell_of_truncation(module: str) -> None:
    log.warning("%s: an agent is truncated while others go on; its bootstrap is cut as if it had terminated", module)


def _build(module: str, kwargs: Mapping[str, Any]) -> Any:
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name in ("mpe2", "pettingzoo"):
            raise  # told with the extra that brings it
        raise RloptError(f"no module named {e.name}; install it or put it on PYTHONPATH") from e
    build = getattr(found, "parallel_env", None)
    if not callable(build):
        raise RloptError(f"{module} has no parallel_env, as the parallel environments of PettingZoo have")
    return build(**kwargs)


def _has_state(inner: Any) -> bool:
    space = getattr(inner, "state_space", None)
    return isinstance(space, spaces.Box)


def _state_space(space: spaces.Box) -> spaces.Box:
    low, high = (bound.reshape(-1).astype(np.float32) for bound in (space.low, space.high))
    return spaces.Box(low, high)


def _renamed(space: Space) -> Space:
    """Return an agent's space with rlopt's names of leaves."""
    if not isinstance(space, spaces.Dict):
        return space
    leaves = {("obs" if key == "observation" else key): leaf for key, leaf in space.spaces.items()}
    if "action_mask" in leaves:
        leaves["action_mask"] = binary(shape_of(leaves["action_mask"]))
    return spaces.Dict(leaves)


def _named(seen: Any, rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return an agent's observation by rlopt's names of leaves."""
    if not isinstance(seen, Mapping):
        return {"obs": seen}
    return {("obs" if key == "observation" and "obs" in rows else key): value for key, value in seen.items()}
