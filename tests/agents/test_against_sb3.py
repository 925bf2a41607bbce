"""SAC makes Stable-Baselines3's updates: equal networks, transitions and noise give equal losses and equal networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gymnasium import spaces
from torch import Tensor

pytest.importorskip("stable_baselines3")

import gymnasium
from stable_baselines3 import SAC as TheirSAC
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch.distributions import normal

from rlopt.agents import SAC, SACConfig
from rlopt.buffers import Batch
from rlopt.nn import NetworkConfig, OptimiserConfig

OBS, ACTION = spaces.Box(-10, 10, (5,)), spaces.Box(-1, 1, (2,))
ROWS, UPDATES = 64, 20


class Nowhere(gymnasium.Env[Any, Any]):
    observation_space, action_space = OBS, ACTION


def transitions(i: int) -> dict[str, Tensor]:
    """The same minibatch for both; rewards and next observations depend on the action, some rows end."""
    g = torch.Generator().manual_seed(i)
    obs, action = torch.randn(ROWS, 5, generator=g), 2 * torch.rand(ROWS, 2, generator=g) - 1
    next_obs = 0.9 * obs + 0.3 * torch.cat((action, action, action[:, :1]), 1)
    ended = (next_obs[:, 0].abs() > 1.5).float()
    return {"obs": obs, "action": action, "reward": 1.0 - obs[:, 1].square(), "next_obs": next_obs, "ended": ended}


def copy_networks(theirs: Any, ours: SAC) -> None:
    pi = theirs.actor
    layers = ours.actor_module.body.layers
    heads = torch.cat((pi.mu.weight, pi.log_std.weight)), torch.cat((pi.mu.bias, pi.log_std.bias))
    trunk = [(pi.latent_pi[0].weight, pi.latent_pi[0].bias), (pi.latent_pi[2].weight, pi.latent_pi[2].bias)]
    with torch.no_grad():
        for layer, (weight, bias) in zip(layers, [*trunk, heads], strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        for net, critics in ((ours.critic, theirs.critic), (ours.target, theirs.critic_target)):
            for i, layer in enumerate((0, 2, 4)):
                for j, q in enumerate((critics.qf0, critics.qf1)):
                    net.params[f"body.layers.{i}.weight"][j].copy_(q[layer].weight.T)
                    net.params[f"body.layers.{i}.bias"][j, 0].copy_(q[layer].bias)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("temperature", [0.2, None])
def test_twenty_updates_are_theirs(temperature: float | None, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = TheirSAC(
        "MlpPolicy", Nowhere(), learning_rate=1e-3, ent_coef=temperature or "auto", batch_size=ROWS, seed=3,
        policy_kwargs={"net_arch": [16, 16], "optimizer_kwargs": {"eps": 1e-4}}, buffer_size=10, device="cpu",
    )  # fmt: skip
    theirs.set_logger(Logger(None, []))
    # Adam's epsilon is raised: with 1e-8 a first step is ± the learning rate even where a gradient is rounding alone.
    config = SACConfig(
        learning_rate=1e-3, temperature=temperature, batch_size=ROWS, network=NetworkConfig(hidden=(16, 16)),
        optimiser=OptimiserConfig(epsilon=1e-4), fused=fused,
    )  # fmt: skip
    ours = SAC(OBS, ACTION, config, seed=4)
    assert (ours.fused is not None) == fused
    copy_networks(theirs, ours)

    noise: list[Tensor] = []
    monkeypatch.setattr(normal, "_standard_normal", lambda *_, **__: noise.pop(0))
    monkeypatch.setattr(ours, "noise", lambda *_, **__: noise.pop(0))
    for i in range(UPDATES):
        t = transitions(i)
        now, after = torch.randn(2, ROWS, 2, generator=torch.Generator().manual_seed(1000 + i))
        column = {name: x[:, None] for name, x in t.items()}
        samples = ReplayBufferSamples(t["obs"], t["action"], t["next_obs"], column["ended"], column["reward"])
        monkeypatch.setattr(theirs.replay_buffer, "sample", lambda *_, s=samples, **__: s)
        noise[:] = [now, after]  # they draw the actor's first
        theirs.train(1, ROWS)
        noise[:] = [after, now]
        index, discount = torch.arange(ROWS), torch.full((ROWS,), 0.99)
        batch = Batch(
            t["obs"], t["action"], t["reward"], t["next_obs"], t["ended"], discount, None, index, {}
        )  # fmt: skip
        metrics = ours.update(batch).metrics
        logged = theirs.logger.name_to_value
        for name in ("critic_loss", "actor_loss"):
            torch.testing.assert_close(float(metrics[name]), logged[f"train/{name}"], rtol=1e-4, atol=1e-4)
        if temperature is None:
            ent_coef = float(theirs.log_ent_coef.detach().exp())
            torch.testing.assert_close(float(ours.temperature.value), ent_coef, rtol=1e-4, atol=0.0)

    check = SAC(OBS, ACTION, config, seed=4)
    copy_networks(theirs, check)
    for name in ("actor", "critic", "target"):
        torch.testing.assert_close(getattr(ours, name).flat, getattr(check, name).flat, rtol=0.0, atol=1e-4)
