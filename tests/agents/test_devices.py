"""Every tensor of an update is made on its agent's device, checked without a GPU: torch's default device is ``meta``
meanwhile, so a tensor made without naming a device mixes with none of the others and the update fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gymnasium import spaces

from rlopt.buffers import Batch
from rlopt.envs import Normalizer
from rlopt.nn import NetworkConfig
from rlopt.registry import get_agent
from rlopt.types import Step, map_obs
from tests.agents.cases import GRADIENT_LEARNERS, LEARNERS, every_learner, make_agent, make_data

VECTOR = spaces.Box(-1, 1, (3,), "float32")
DICT = spaces.Dict({"a": spaces.Discrete(4), "b": VECTOR})
BOX, DISCRETE = spaces.Box(-1, 1, (2,), "float32"), spaces.Discrete(3)
B = 6


@contextmanager
def no_default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def observations() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    vector = torch.linspace(-1, 1, 3 * B).view(B, 3)
    return {"a": torch.arange(B) % 4, "b": vector}, vector


@pytest.mark.parametrize("space", [VECTOR, DICT], ids=["vector", "dict"])
@every_learner
def test_off_policy_agents(space: Any, name: str) -> None:
    options = {"fused": False} if hasattr(get_agent(name).config_class, "fused") else {}
    agent = make_agent(name, observation_space=space, batch_size=B, warmup_steps=1, n_step=3, **options)
    normalizer = Normalizer(agent.spec, obs=True, reward=True)
    obs = observations()[0 if space is DICT else 1]
    ones, yes = torch.ones(B), torch.ones(B, dtype=torch.bool)
    with no_default_device():
        uniform = agent.act(obs).action
        agent.clock.env_steps = 1
        action = agent.act(obs).action
        normalizer.observe(obs, Step(obs, obs, ones, ~yes, ~yes, ~yes, yes, {}))
        batch = normalizer.normalize_batch(Batch(obs, action, ones, obs, 0 * ones, 0.9 * ones, ones, yes))
        priority = agent.update(batch).priority
        agent.load_state_dict(agent.state_dict())
        assert agent.guard.first_bad() is None
    assert {t.device.type for t in (uniform, action, priority)} == {"cpu"}


ON_POLICY = [name for name in GRADIENT_LEARNERS if name not in LEARNERS]


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        (name, memory)
        for name in ON_POLICY
        for memory in ("none", "gru")
        if memory == "none" or get_agent(name).supports_memory
    ],
)
@pytest.mark.parametrize("actions", [BOX, DISCRETE], ids=["box", "discrete"])
@pytest.mark.parametrize("space", [VECTOR, DICT], ids=["vector", "dict"])
def test_on_policy_agents(name: str, space: Any, actions: Any, memory: str) -> None:
    network = NetworkConfig(hidden=(8,), memory=memory, norm="layer", init="orthogonal")
    agent = make_agent(name, observation_space=space, action_space=actions, network=network, entropy_coefficient=0.1)
    data = make_data(agent, 0)
    normalizer = Normalizer(agent.spec, obs=True, reward=True)
    first = map_obs(lambda x: x[0], data.obs)
    with no_default_device():
        action = agent.act(first, agent.initial_carry(len(data.reward[0]))).action
        normalizer.observe_obs(first, data.valid[0])
        agent.update(data if data.next_obs is None else normalizer.normalize_batch(data))
        agent.load_state_dict(agent.state_dict())
        assert agent.guard.first_bad() is None
    assert action.device.type == "cpu" and agent.clock.updates >= 1
