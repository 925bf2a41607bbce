"""What acts on images by compiled code equals the network."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.agents.dqn import DQN, DQNConfig
from rlopt.nn import NetworkConfig

ACTIONS = spaces.Discrete(3, start=2)
IMAGES = {
    "stack": spaces.Box(0, 255, (4, 40, 44), np.uint8),
    "bits": spaces.Box(0, 1, (10, 10, 4), np.uint8),
    "floats": spaces.Box(0, 1, (12, 10, 3), np.float32),
    "grey": spaces.Box(0, 255, (36, 36), np.uint8),
}
CONFIG = DQNConfig(warmup_steps=0, epsilon_steps=1, epsilon_end=0.4)


def seen(space: spaces.Box, rows: int) -> torch.Tensor:
    return torch.as_tensor(np.stack([space.sample() for _ in range(rows)]))


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("values", ["scalar", "categorical"])
@pytest.mark.parametrize("name", IMAGES)
def test_actions_are_those_of_the_network(name: str, values: str, runs: int) -> None:
    hidden = (16,) if name == "bits" else None
    config = replace(CONFIG, values=values, network=NetworkConfig(hidden=hidden))
    compiled, readable = (DQN(IMAGES[name], ACTIONS, config, seed=3, runs=runs) for _ in range(2))
    assert compiled.fast_act is not None
    readable.fast_act = None
    for agent in (compiled, readable):
        agent.clock.env_steps = 10
        with torch.no_grad():
            agent.actor.flat.add_(0.1 * torch.randn(agent.actor.flat.shape, generator=torch.Generator().manual_seed(5)))
    actions = set()
    for rows in (3, 1, 3):
        obs = seen(IMAGES[name], rows * runs)
        found = compiled.act(obs).action
        assert torch.equal(found, readable.act(obs).action)
        found = compiled.act(obs, deterministic=True).action
        assert torch.equal(found, readable.act(obs, deterministic=True).action)
        actions |= set(found.tolist())
    assert actions <= {2, 3, 4}


def outputs(agent: Any, obs: torch.Tensor) -> torch.Tensor:
    """Return the values that are chosen by."""
    found = []
    agent.actor_module.choose = lambda values, noise: found.append(values[0])
    agent.fast_act(obs, None)
    return found[0]


@pytest.mark.parametrize("encoder", ["nature_cnn", "small_cnn"])
def test_its_values_are_those_of_the_network(encoder: str) -> None:
    agent = DQN(IMAGES["stack"], ACTIONS, replace(CONFIG, network=NetworkConfig(encoder=encoder, hidden=(8,))))
    obs = seen(IMAGES["stack"], 3)
    torch.testing.assert_close(outputs(agent, obs), agent.actor_module(obs)[0], rtol=1e-4, atol=1e-5)
    agent.load_state_dict({**agent.state_dict(), "critic": DQN(agent.spec, agent.config, seed=1).critic.state_dict()})
    torch.testing.assert_close(outputs(agent, obs), agent.actor_module(obs)[0], rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # what was put in another order is renewed whichever way it changes
        next(p for p in agent.actor_module.parameters() if p.dim() == 4).data[0, 0, 0, 0] += 1.0
    torch.testing.assert_close(outputs(agent, obs), agent.actor_module(obs)[0], rtol=1e-4, atol=1e-5)


OTHERS: list[tuple[Any, dict[str, Any]]] = [
    (IMAGES["stack"], {"dueling": True}),
    (IMAGES["stack"], {"noisy": 0.5}),
    (IMAGES["stack"], {"network": NetworkConfig(hidden=(8,), norm="layer")}),
    (IMAGES["stack"], {"network": NetworkConfig(hidden=(8,), activation="tanh")}),
    (IMAGES["stack"], {"network": NetworkConfig(encoder="impala_cnn")}),
    (IMAGES["stack"], {"network": NetworkConfig(hidden=(8,), memory="gru")}),
    (spaces.Box(-1, 1, (10, 10, 4), np.float32), {}),
    (spaces.Dict(a=IMAGES["bits"], b=IMAGES["bits"]), {}),
]


@pytest.mark.parametrize(("space", "options"), OTHERS)
def test_other_networks_act_as_they_are(space: Any, options: dict[str, Any]) -> None:
    assert DQN(space, ACTIONS, replace(CONFIG, **options)).fast_act is None


def test_it_is_not_pickled() -> None:
    agent = DQN(IMAGES["bits"], ACTIONS, CONFIG)
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(agent.fast_act)
