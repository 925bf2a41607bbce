"""Several agents in one environment: how their spaces, observations and actions lie side by side in joint ones, padded
with zeros, and how a learner takes them apart again.

Tensors may have any leading axes, written …: none, (N,), (B,), (R, B). ``spec`` is the joint ``EnvSpec``; agent i's
own is ``spec.of_agent(i)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor

from rlopt.types import (
    EnvSpec,
    Obs,
    RloptError,
    Space,
    action_count,
    binary,
    encoded_leaves,
    is_state,
    obs_leaves,
    own_index,
    own_leaves,
    row_space,
    seen_leaves,
    shape_of,
)

# What one agent sees and does


def own_obs(spec: EnvSpec, obs: Obs, i: int) -> Obs:
    """Return what agent i sees, views (…, *own shape), out of joint leaves (…, n, *padded shape)."""
    assert isinstance(obs, dict)
    own = spec.agent_spaces[i].observation
    found = {key: _own(obs[key], i, shape_of(leaf)) for key, leaf in own_leaves(own).items()}
    return found if isinstance(own, spaces.Dict) else found["obs"]


def own_action(spec: EnvSpec, action: Tensor, i: int) -> Tensor:
    """Return agent i's part of joint actions (…, n, *padded shape), a view (…, *own shape)."""
    return _own(action, i, shape_of(spec.agent_spaces[i].action))


def join_actions(spec: EnvSpec, actions: Sequence[Tensor]) -> Tensor:
    """Return joint actions (…, n, *padded shape) from each agent's own (…, *own shape), padded with zeros."""
    shape = shape_of(spec.action_space)[1:]
    if shape:
        actions = [F.pad(action, (0, shape[0] - action.shape[-1])) for action in actions]
    return torch.stack(list(actions), -1 - len(shape))


def _own(x: Tensor, i: int, shape: tuple[int, ...]) -> Tensor:
    x = x.select(-1 - len(shape), i)
    for axis, size in enumerate(shape, -len(shape)):
        x = x.narrow(axis, 0, size)
    return x


def own_entries(spec: EnvSpec, leaf: str | None = None) -> Tensor:
    """Return a bool tensor of the shape of the action space, or of the observation ``leaf``: true where an entry is an
    agent's own, false where it is padding."""
    joint = spec.action_space if leaf is None else obs_leaves(spec.observation_space)[leaf]
    entries = torch.zeros(shape_of(joint), dtype=torch.bool)
    for i, (observation, action) in enumerate(spec.agent_spaces):
        own = action if leaf is None else own_leaves(observation).get(leaf)
        if own is not None:
            entries[own_index(i, shape_of(own))] = True
    return entries


# What a team's learner and its critics see


def alive(spec: EnvSpec, obs: Obs) -> Tensor | None:
    """Return who acts, (…, n) bool, or None where every agent always does.

    Agent i's losses, its critic's too, are weighted by it at the observation; its bootstrap is cut by
    ``terminated | ~alive[…, i]`` of the next observation.
    """
    return obs["alive"] if spec.agents and isinstance(obs, dict) and "alive" in obs else None


def team_reward(spec: EnvSpec, reward: Tensor) -> Tensor:
    """Return the reward (…,) of the team: the sum over agents where they are paid apart, (…, n)."""
    return reward.sum(-1) if spec.reward_shape else reward


def own_batch(spec: EnvSpec, batch: Any, i: int, team: bool = True) -> Any:
    """Return the minibatch that agent i alone learns from: what it saw and did, the team's reward (or with
    ``team=False`` its own), ``terminated`` also where it was dead afterwards, and weight 0 where it did not act.

    ``batch`` is a NamedTuple of ``obs``, ``action``, ``reward``, ``next_obs``, ``terminated`` and ``weight``, each
    (…,) and more; the rest of it stays.
    """
    before, after = alive(spec, batch.obs), alive(spec, batch.next_obs)
    weight, terminated = batch.weight, batch.terminated
    if before is not None and after is not None:
        acts = before[..., i].to(terminated.dtype)
        weight = acts if weight is None else weight * acts
        terminated = torch.maximum(terminated, 1.0 - after[..., i].to(terminated.dtype))
    return batch._replace(
        obs=own_obs(spec, batch.obs, i),
        action=own_action(spec, batch.action, i),
        reward=batch.reward[..., i] if spec.reward_shape and not team else team_reward(spec, batch.reward),
        next_obs=own_obs(spec, batch.next_obs, i),
        terminated=terminated,
        weight=weight,
    )


def critic_space(spec: EnvSpec, agent: int | None = None) -> Space:
    """Return what a critic sees: the state where there is one, else all that the agents see.

    With ``agent`` it is a critic of that agent's own, which sees its row of a state (n, S); without, all rows. In a
    single-agent environment it is the observation space.
    """
    if not spec.agents:
        return spec.observation_space
    found = {
        key: row_space(leaf, agent) if agent is not None and _is_each(key, leaf) else leaf
        for key, leaf in _critic_leaves(spec).items()
    }
    return next(iter(found.values())) if len(found) == 1 else spaces.Dict(found)


def critic_obs(spec: EnvSpec, obs: Obs, agent: int | None = None) -> Obs:
    """Return the part of joint observations that ``critic_space`` describes, (…, *its shape)."""
    if not spec.agents:
        return obs
    assert isinstance(obs, dict)
    found = {
        key: obs[key].select(-2, agent) if agent is not None and _is_each(key, leaf) else obs[key]
        for key, leaf in _critic_leaves(spec).items()
    }
    return next(iter(found.values())) if len(found) == 1 else found


def _critic_leaves(spec: EnvSpec) -> dict[str, Space]:
    leaves = encoded_leaves(spec.observation_space)
    return {key: leaf for key, leaf in leaves.items() if is_state(key)} or leaves


def _is_each(key: str, leaf: Space) -> bool:
    """Return whether a leaf is a state (n, S), of each agent one."""
    return is_state(key) and len(shape_of(leaf)) == 2


# One network for all agents


def shared_agent(spec: EnvSpec) -> EnvSpec:
    """Return what any of the agents may see and do, padded, for a network that all of them share: its leaf ``agent``,
    Discrete (n), says which one it is.

    Raises:
        RloptError: they act in different spaces. Discrete actions may differ in number, told by ``action_mask``.
    """
    leaves = {key: _any_row(leaf) for key, leaf in seen_leaves(spec).items()}
    actions = [own.action for own in spec.agent_spaces]
    largest = max(actions, key=action_count)
    masked = "action_mask" in leaves and all(isinstance(one, spaces.Discrete) for one in actions)
    alike = (
        len({getattr(one, "start", 0) for one in actions}) == 1 if masked else all(one == largest for one in actions)
    )
    if not alike:
        raise RloptError(f"{spec.id}: its agents act in different spaces; give each a network of its own")
    seen = spaces.Dict({**leaves, "agent": spaces.Discrete(len(spec.agents))})
    return EnvSpec(spec.id, seen, largest, spec.episode_limit, frame_stack=spec.frame_stack)


def shared_obs(spec: EnvSpec, obs: Obs) -> dict[str, Tensor]:
    """Return joint observations as what ``shared_agent`` sees: leaves (…, n, *padded shape)."""
    assert isinstance(obs, dict)
    joint = seen_leaves(spec)
    key, leaf = next(iter(joint.items()))
    leading = obs[key].shape[: obs[key].dim() - len(shape_of(leaf)) + 1]
    number = torch.arange(len(spec.agents), device=obs[key].device).expand(leading)
    return {**{key: obs[key] for key in joint}, "agent": number}


def _any_row(leaf: Space) -> Space:
    """Return a space that holds every agent's row of a joint leaf."""
    if isinstance(leaf, spaces.Box):
        return spaces.Box(leaf.low.min(0), leaf.high.max(0), dtype=leaf.dtype.type)
    if isinstance(leaf, spaces.MultiBinary):
        return binary(shape_of(leaf)[1:])
    assert isinstance(leaf, spaces.MultiDiscrete)
    first, last = leaf.start.min(0), (leaf.start + leaf.nvec).max(0)
    if leaf.nvec.ndim == 1:
        return spaces.Discrete(last - first, start=first)
    return spaces.MultiDiscrete(last - first, start=first)


# Building an environment of several agents


def join_spaces(
    agent_spaces: Sequence[tuple[Space, Space]], state: Space | None = None, alive: bool = False
) -> tuple[spaces.Dict, Space]:
    """Return the joint observation and action space of agents with these own ones, padded to the largest.

    Args:
        agent_spaces: each agent's own observation and action space (see ``AgentSpaces``).
        state: of the leaf ``state``, Box (S,) or Box (n, S).
        alive: whether there is a leaf ``alive``.

    Raises:
        RloptError: leaves of one name, or actions, are of different kinds.
    """
    every = [own_leaves(observation) for observation, _ in agent_spaces]
    names = dict.fromkeys(key for leaves in every for key in leaves)
    joint = {key: _join(f"leaves {key}", [leaves.get(key) for leaves in every]) for key in names}
    if state is not None:
        joint["state"] = state
    if alive:
        joint["alive"] = binary((len(every),))
    return spaces.Dict(joint), _join("actions", [action for _, action in agent_spaces])


def join_rows(space: Space, rows: Mapping[int, Any]) -> Any:
    """Return an array of a joint space's shape: the agents' own values by their numbers, zeros elsewhere."""
    joint = np.zeros(shape_of(space), space.dtype)
    for i, value in rows.items():
        joint[own_index(i, np.shape(value))] = value
    return joint


def join_index(shapes: Sequence[tuple[int, ...]]) -> Any:
    """Return the index (``EnvSpec.derived``) of observations (n, O) that the state holds one after the other, agent i's
    being of ``shapes[i]``, (its size,)."""
    index, start = np.full((len(shapes), max(size for (size,) in shapes)), -1), 0
    for i, (size,) in enumerate(shapes):
        index[i, :size] = start + np.arange(size)
        start += size
    return index


def _join(what: str, own: Sequence[Space | None]) -> Space:
    there = {i: space for i, space in enumerate(own) if space is not None}
    first = next(iter(there.values()))
    if len({(type(one), one.dtype, len(shape_of(one))) for one in there.values()}) > 1:
        raise RloptError(f"the {what} of the agents are of different kinds: {', '.join(map(str, there.values()))}")
    shape = (len(own), *map(max, zip(*map(shape_of, there.values()), strict=True)))
    where: dict[int, Any] = {i: own_index(i, shape_of(space)) for i, space in there.items()}
    if isinstance(first, spaces.MultiBinary):
        return binary(shape)
    if isinstance(first, spaces.Box):
        low, high = np.zeros(shape, first.dtype), np.zeros(shape, first.dtype)
        for i, one in there.items():
            low[where[i]], high[where[i]] = one.low, one.high  # type: ignore[attr-defined]
        return spaces.Box(low, high, dtype=first.dtype.type)
    sizes, starts = np.ones(shape, np.int64), np.zeros(shape, np.int64)
    for i, one in there.items():
        if not isinstance(one, spaces.Discrete | spaces.MultiDiscrete):
            raise RloptError(f"the {what} cannot be {one}; use Box, Discrete, MultiDiscrete or MultiBinary")
        sizes[where[i]] = one.n if isinstance(one, spaces.Discrete) else one.nvec
        starts[where[i]] = one.start
    return spaces.MultiDiscrete(sizes, start=starts)
