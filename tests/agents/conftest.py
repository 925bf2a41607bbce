"""Small agents of every replay kind and random minibatches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.agents import Agent
from rlopt.buffers import Batch
from rlopt.nn import NetworkConfig
from rlopt.registry import get_agent

OBSERVATION = spaces.Box(-np.inf, np.inf, (4,))
ACTIONS: dict[str, spaces.Space[Any]] = {
    "sac": spaces.Box(-0.4, 0.4, (2,)),
    "sac_2018": spaces.Box(-0.4, 0.4, (2,)),
    "sac_discrete": spaces.Discrete(3, start=2),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_agent() -> Callable[..., Agent]:
    """``make_agent(name, seed=0, observation_space=…, action_space=…, runs=1, precision=…, **options)``,
    with networks of 2 x 16."""

    def make(
        name: str,
        seed: int = 0,
        observation_space: spaces.Space[Any] = OBSERVATION,
        action_space: spaces.Space[Any] | None = None,
        runs: int = 1,
        precision: str = "float32",
        **options: Any,
    ) -> Agent:
        cls = get_agent(name)
        options = {"network": NetworkConfig(hidden=(16, 16)), "batch_size": 8, "warmup_steps": 0, **options}
        space = ACTIONS[name] if action_space is None else action_space
        return cls(observation_space, space, cls.config_class(**options), seed=seed, runs=runs, precision=precision)

    return make


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """``make_batch(agent, seed, size=8)``: a random minibatch in the agent's spaces."""

    def make(agent: Agent, seed: int, size: int = 8) -> Batch:
        g = torch.Generator().manual_seed(seed)
        space = agent.spec.action_space
        if isinstance(space, spaces.Discrete):
            action = torch.randint(int(space.n), (size,), generator=g) + int(space.start)
        else:
            assert isinstance(space, spaces.Box)
            action = torch.as_tensor(space.high) * (2 * torch.rand((size, *space.shape), generator=g) - 1)
        return Batch(
            obs=torch.randn((size, 4), generator=g),
            action=action,
            reward=torch.randn(size, generator=g),
            next_obs=torch.randn((size, 4), generator=g),
            terminated=(torch.rand(size, generator=g) < 0.2).float(),
            discount=torch.full((size,), 0.99),
            weight=None,
            index=torch.arange(size),
        )

    return make
