"""PPO's compiled update equals the readable one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.agents.ppo import PPO, PPOConfig
from rlopt.buffers import Rollout
from rlopt.fast import elementwise
from rlopt.nn import NetworkConfig, OptimiserConfig
from rlopt.types import EnvSpec

BOX, ONE, DISCRETE = spaces.Box(-2, 2, (2,)), spaces.Box(-2, 2, (1,)), spaces.Discrete(4, start=3)


def make(action_space: Any = BOX, observation_space: Any = None, cls: type[PPO] = PPO, **options: Any) -> PPO:
    network = NetworkConfig(**{"hidden": (16, 12), "activation": "tanh", **options.pop("network", {})})
    options = {"rollout_steps": 10, "batch_size": 8, "epochs": 3, "learning_rate": 0.01, "network": network, **options}
    spec = EnvSpec("test", observation_space or spaces.Box(-9, 9, (3,)), action_space)
    return cls(spec, PPOConfig(**options), seed=0)


def rollout(agent: PPO, seed: int = 0) -> Rollout:
    """Two time lines of ten steps with ends, a lost row, and probabilities of actions that others took."""
    g = torch.Generator().manual_seed(seed)
    obs, next_obs = torch.randn(2, 10, 2, 3, generator=g)
    reward, chance = torch.randn(10, 2, generator=g), torch.rand(10, 2, generator=g)
    width = 0 if isinstance(agent.spec.action_space, spaces.Discrete) else agent.spec.action_space.shape[0]
    sample = torch.randn(10, 2, width, generator=g)
    discrete = isinstance(agent.spec.action_space, spaces.Discrete)
    action = 3 + torch.randint(4, (10, 2), generator=g) if discrete else sample.clamp(-2, 2)
    valid = torch.ones_like(chance, dtype=torch.bool)
    valid[4, 1] = False
    ended = (chance < 0.1) | (chance > 0.9)
    extras = {} if discrete else {"sample": sample}
    return Rollout(obs, action, reward, next_obs, chance < 0.1, chance > 0.9, ended, valid, extras)


def pair(**options: Any) -> tuple[PPO, PPO]:
    fused, plain = (make(fused=f, **options) for f in (True, False))
    assert fused.fused is not None and plain.fused is None
    for agent in (fused, plain):  # biases that are not zero, deviations that differ
        with torch.no_grad():
            agent.networks.flat.add_(
                0.1 * torch.randn(len(agent.networks.flat), generator=torch.Generator().manual_seed(5))
            )
    return fused, plain


@pytest.mark.parametrize("action_space", [BOX, ONE, DISCRETE], ids=["gaussian", "one", "categorical"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"network": {"activation": "relu", "hidden": (16,), "critic_hidden": (8, 8, 8)}},
        {"entropy_coefficient": 0.05, "value_coefficient": 1.3, "clip": 0.02, "max_grad_norm": None},
        {"normalise_advantage": False, "recompute_advantage": True, "batch_size": 1},
        {"optimiser": OptimiserConfig(name="adamw", weight_decay=0.5, epsilon=1e-4), "max_grad_norm": 0.1},
        {"lr_schedule": "linear", "clip_schedule": "linear", "schedule_steps": 100, "target_kl": 0.02},
    ],
    ids=["default", "relu", "entropy", "recompute", "adamw", "schedules"],
)
def test_training_is_the_same_with_and_without(action_space: Any, options: dict[str, Any]) -> None:
    fused, plain = pair(action_space=action_space, **options)
    for k in range(3):
        for agent in (fused, plain):
            agent.clock.env_steps += 20
        ours, theirs = (agent.update(rollout(agent, k)).metrics for agent in (fused, plain))
        assert ours.keys() == theirs.keys()
        torch.testing.assert_close(dict(ours), dict(theirs), rtol=1e-3, atol=1e-5)
        assert fused.clock.updates == plain.clock.updates
        torch.testing.assert_close(fused.networks.flat, plain.networks.flat, rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(fused.optimiser.state_dict(), plain.optimiser.state_dict(), rtol=1e-2, atol=1e-5)


def test_the_gradient_of_one_minibatch_equals_autograds() -> None:
    for space in (BOX, ONE, DISCRETE):
        fused, plain = pair(action_space=space, batch_size=19, epochs=1, entropy_coefficient=0.1, max_grad_norm=None)
        for agent in (fused, plain):
            agent.update(rollout(agent))
        torch.testing.assert_close(fused.optimiser.grad, plain.optimiser.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", ["reward", "obs", "log_prob"])
def test_nothing_moves_by_what_is_not_finite(bad: str) -> None:
    for agent in pair(batch_size=8, epochs=1):
        data = rollout(agent)
        before = [x.clone() for x in (agent.networks.flat, *agent.optimiser.state_dict().values())]
        if bad == "log_prob":  # a sample so far away that its square overflows
            data.extras["sample"][0, 0] = 1e30
        else:
            getattr(data, bad)[0, 0] = float("nan")
        agent.update(data)
        if bad == "log_prob":  # minibatches before the first bad one count
            assert torch.isfinite(agent.networks.flat).all()
            assert agent.guard.first_bad() in ("networks loss", "networks gradient")
            continue
        after = (agent.networks.flat, *agent.optimiser.state_dict().values())
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        assert agent.guard.first_bad() == {"obs": "observation"}.get(bad, bad)


class Louder(PPO):
    def descend(self, *args: Any) -> None:
        super().descend(*args)


@pytest.mark.parametrize(
    "options",
    [
        {"cls": Louder},
        {"value_clip": True},
        {"network": {"activation": "elu"}},
        {"network": {"norm": "layer"}},
        {"network": {"memory": "gru"}, "batch_size": 16},
        {"optimiser": OptimiserConfig(name="sgd", beta1=0.0)},
        {"action_space": spaces.MultiDiscrete([2, 3])},
        {"observation_space": spaces.Dict(a=spaces.Box(-1, 1, (2,)), b=spaces.Box(-1, 1, (1,)))},
        {"observation_space": spaces.Box(0, 255, (3,), np.uint8)},
        {"observation_space": spaces.Discrete(3)},
    ],
)
def test_what_it_does_not_know_takes_the_readable_path(options: dict[str, Any]) -> None:
    assert make(**options).fused is None


def test_what_is_frozen_stays() -> None:
    fused, plain = pair()
    for agent in (fused, plain):
        agent.actor_module.log_std.requires_grad_(False)  # type: ignore[union-attr]
        agent.update(rollout(agent))
    assert torch.equal(fused.networks.flat, plain.networks.flat)


def test_it_goes_on_from_a_state_and_from_a_copy() -> None:
    one = pair()[0]
    one.update(rollout(one))
    other, twin = make(), copy.deepcopy(one)
    other.load_state_dict(one.state_dict())
    for agent in (one, other, twin):
        agent.update(rollout(agent, 1))
    assert torch.equal(one.networks.flat, other.networks.flat) and torch.equal(one.networks.flat, twin.networks.flat)
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(one.fused)


def test_users_may_change_the_rate_between_rollouts() -> None:
    fused, plain = pair()
    for agent in (fused, plain):
        agent.optimiser.learning_rate, agent.optimiser.max_grad_norm = 0.03, 0.2
        agent.update(rollout(agent))
    torch.testing.assert_close(fused.networks.flat, plain.networks.flat, rtol=1e-3, atol=1e-5)


def test_the_compiled_tanh_is_tanh() -> None:
    x = torch.cat([torch.linspace(-12, 12, 100_001), torch.tensor([0.0, 1e-30, -1e30, 1e30, float("inf")])])
    z = x.clone()[None].numpy()
    elementwise.bias_tanh_(z, np.zeros(len(x), np.float32))
    found: Tensor = torch.from_numpy(z)[0]
    torch.testing.assert_close(found, torch.tanh(x.double()).float(), rtol=5e-7, atol=1e-30)
    z = np.full((1, 1), np.nan, np.float32)
    elementwise.bias_tanh_(z, np.zeros(1, np.float32))
    assert np.isnan(z).all()
