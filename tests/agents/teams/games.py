"""Teams without an environment: specifications and minibatches whose numbers are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor
from torch.utils._pytree import tree_map

from rlopt.agents.teams.hasac import HASAC, HASACConfig
from rlopt.buffers import Batch
from rlopt.joint import join_spaces
from rlopt.nn import NetworkConfig
from rlopt.types import EnvSpec

SMALL = {"network": NetworkConfig(hidden=(8,)), "batch_size": 8, "warmup_steps": 0}
KINDS: dict[str, list[spaces.Space[Any]]] = {
    "box": [spaces.Box(-1.0, 1.0, (k,), np.float32) for k in (1, 3, 2)],
    "discrete": [spaces.Discrete(k) for k in (2, 3, 5)],
    "heads": [spaces.MultiDiscrete(heads) for heads in ([2], [3, 2], [5, 2])],
}


def team_spec(kind: str = "box", alive: bool = False, each_state: bool = False, **more: Any) -> EnvSpec:
    """Three different agents."""
    own = [(spaces.Box(-9.0, 9.0, (2 + i,), np.float32), acts) for i, acts in enumerate(KINDS[kind])]
    state = spaces.Box(-9.0, 9.0, (3, 4) if each_state else (4,), np.float32)
    observation, action = join_spaces(own, state, alive)
    return EnvSpec("Team-v0", observation, action, agents=("a", "b", "c"), agent_spaces=tuple(own), **more)  # type: ignore[arg-type]


def team(spec: EnvSpec, cls: type[HASAC] = HASAC, seed: int = 0, runs: int = 1, **options: Any) -> Any:
    return cls(spec, cls.config_class(**{**SMALL, **options}), seed=seed, runs=runs)


def team_batch(spec: EnvSpec, seed: int = 0, size: int = 8) -> Batch:
    """Random numbers everywhere; without ``alive`` rows in which everybody lives."""
    g = torch.Generator().manual_seed(seed)

    def observed() -> dict[str, Tensor]:
        space: Any = spec.observation_space
        found = {key: torch.randn((size, *leaf.shape), generator=g) for key, leaf in space.spaces.items()}
        for key in ("alive", "action_mask"):
            if key in found:
                found[key] = torch.ones_like(found[key], dtype=torch.bool)
        return found

    space: Any = spec.action_space
    if isinstance(space, spaces.Box):
        action = 2.0 * torch.rand((size, *space.shape), generator=g) - 1.0
        action = action * torch.as_tensor(space.high)
    else:
        action = (torch.rand((size, *space.shape), generator=g) * torch.as_tensor(space.nvec)).long()
    reward = torch.randn((size, *spec.reward_shape), generator=g)
    terminated = (torch.rand(size, generator=g) < 0.2).float()
    return Batch(observed(), action, reward, observed(), terminated, torch.full((size,), 0.9), None, torch.arange(size))


def shared_spec(n: int = 3, alive: bool = False) -> EnvSpec:
    """Agents that are alike, so that they may share a network."""
    own = [(spaces.Box(-9.0, 9.0, (3,), np.float32), spaces.Discrete(4))] * n
    observation, action = join_spaces(own, spaces.Box(-9.0, 9.0, (4,), np.float32), alive)
    names = tuple("abcdef"[:n])
    return EnvSpec("Alike-v0", observation, action, agents=names, agent_spaces=tuple(own))  # type: ignore[arg-type]


def joined(batches: list[Any]) -> Any:
    """The minibatches (or observations) of several runs as one, run by run."""
    return tree_map(lambda *x: torch.cat(x) if isinstance(x[0], Tensor) else x[0], *batches)


def matrix_spec(actions: tuple[int, ...]) -> EnvSpec:
    """One state, in which agent i has ``actions[i]`` discrete actions."""
    one = spaces.Box(0.0, 1.0, (1,), np.float32)
    observation, action = join_spaces([(one, spaces.Discrete(k)) for k in actions], one)
    names = tuple(f"player_{i}" for i in range(len(actions)))
    own = tuple((one, spaces.Discrete(k)) for k in actions)
    return EnvSpec("Matrix-v0", observation, action, agents=names, agent_spaces=own)  # type: ignore[arg-type]


def play(agent: HASAC, payoff: Tensor, updates: int, size: int = 32) -> list[list[Tensor]]:
    """Learn a one-shot game from random play; return the probabilities of every run's agents."""
    n, g = payoff.dim(), torch.Generator().manual_seed(1)
    rows = size * agent.runs
    obs = {"obs": torch.ones(rows, n, 1), "state": torch.ones(rows, 1)}
    for agent.clock.env_steps in range(updates):
        action = torch.stack([torch.randint(k, (rows,), generator=g) for k in payoff.shape], -1)
        reward = payoff[tuple(action.T)]
        ones = torch.ones(rows)
        agent.update(Batch(obs, action, reward, obs, ones, ones, None, torch.arange(rows)))
    assert agent.guard.first_bad() is None
    with torch.no_grad():
        return [[net.modules[r](torch.ones(1, 1)).softmax(-1)[0] for net in agent.actors] for r in range(agent.runs)]


def config(**options: Any) -> HASACConfig:
    return HASACConfig(**{**SMALL, **options})
