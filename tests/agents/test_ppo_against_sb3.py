"""PPO makes Stable-Baselines3's updates: equal networks and rollouts give equal losses, gradients and networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gymnasium import spaces
from torch import Tensor

pytest.importorskip("stable_baselines3")

import gymnasium
from stable_baselines3 import PPO as TheirPPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import RolloutBufferSamples

from rlopt.agents.ppo import PPO, PPOConfig, Samples, ppo_loss
from rlopt.agents.rollout_agent import generalised_advantages
from rlopt.buffers import Rollout
from rlopt.nn import NetworkConfig, OptimiserConfig

OBS = spaces.Box(-10, 10, (5,))
CONTINUOUS, DISCRETE, SEVERAL = spaces.Box(-1, 1, (2,)), spaces.Discrete(3), spaces.MultiDiscrete([2, 3])
ROWS = 64


def agents(action_space: Any) -> tuple[Any, PPO]:
    """Theirs and ours, at the same settings and with the same weights."""

    class Nowhere(gymnasium.Env[Any, Any]):
        observation_space = OBS

    Nowhere.action_space = action_space
    # Adam's epsilon is raised: with 1e-5 a first step is ± the learning rate where a gradient is rounding alone.
    theirs = TheirPPO(
        "MlpPolicy", Nowhere(), learning_rate=1e-3, n_steps=ROWS, batch_size=ROWS, n_epochs=1, ent_coef=0.01, 
        vf_coef=0.25, max_grad_norm=0.3, seed=3, device="cpu",
        policy_kwargs={"net_arch": [16, 16], "optimizer_kwargs": {"eps": 1e-3}},
    )  # fmt: skip
    theirs.set_logger(Logger(None, []))
    config = PPOConfig(
        learning_rate=1e-3, rollout_steps=ROWS, batch_size=ROWS, epochs=1, entropy_coefficient=0.01, max_grad_norm=0.3,
        value_coefficient=0.5, optimiser=OptimiserConfig(epsilon=1e-3),
        **({"unit_box": False} if action_space is CONTINUOUS else {}),
        network=NetworkConfig(hidden=(16, 16), activation="tanh", init="orthogonal"),
    )  # fmt: skip
    ours = PPO(OBS, action_space, config, seed=4)
    policy, (actor, critic) = theirs.policy, (ours.module.actor, ours.module.critic)
    extractor = policy.mlp_extractor
    with torch.no_grad():
        mine = zip(
            actor.body.layers, (extractor.policy_net[0], extractor.policy_net[2], policy.action_net), strict=True
        )
        for layer, their in mine:
            layer.weight.copy_(their.weight)
            layer.bias.copy_(their.bias)
        values = zip(
            critic.body.layers, (extractor.value_net[0], extractor.value_net[2], policy.value_net), strict=True
        )
        for layer, their in values:
            layer.weight[0].copy_(their.weight.T)
            layer.bias[0, 0].copy_(their.bias)
    return theirs, ours


def their_parameters(theirs: Any) -> list[Tensor]:
    """Theirs in the order of ours."""
    policy = theirs.policy
    extractor = policy.mlp_extractor
    found = [policy.log_std] if hasattr(policy, "log_std") else []
    for layer in (extractor.policy_net[0], extractor.policy_net[2], policy.action_net):
        found += [layer.weight, layer.bias]
    for layer in (extractor.value_net[0], extractor.value_net[2], policy.value_net):
        found += [layer.weight.T, layer.bias]
    return [x.detach() for x in found]


def samples(theirs: Any, action_space: Any, i: int) -> Samples:
    """A rollout that another policy, near to the present one, might have made; its ratios leave the clip's range."""
    g = torch.Generator().manual_seed(i)
    obs = torch.randn(ROWS, 5, generator=g)
    if action_space is CONTINUOUS:
        action = 1.5 * torch.randn(ROWS, 2, generator=g)
    elif action_space is DISCRETE:
        action = torch.randint(3, (ROWS,), generator=g)
    else:
        action = torch.stack([torch.randint(k, (ROWS,), generator=g) for k in (2, 3)], 1)
    with torch.no_grad():
        value, log_prob, _ = theirs.policy.evaluate_actions(obs, action)
    log_prob = log_prob + 0.2 * torch.randn(ROWS, generator=g)
    advantage = obs[:, 0] + torch.randn(ROWS, generator=g)
    return Samples(obs, action, log_prob, value.flatten(), advantage, advantage + value.flatten())


@pytest.mark.parametrize("action_space", [CONTINUOUS, DISCRETE, SEVERAL], ids=["box", "discrete", "multi_discrete"])
def test_twenty_updates_are_theirs(action_space: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = agents(action_space)
    norms: list[float] = []
    clip = torch.nn.utils.clip_grad_norm_

    def clipped(*args: Any) -> Any:
        norms.append(float(clip(*args)))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    for i in range(20):
        s = samples(theirs, action_space, i)
        batch = RolloutBufferSamples(s.obs, s.sample.float(), s.value, s.log_prob, s.advantage, s.target)
        monkeypatch.setattr(theirs.rollout_buffer, "get", lambda _, batch=batch: [batch])
        theirs.rollout_buffer.values, theirs.rollout_buffer.returns = s.value.numpy(), s.target.numpy()
        theirs.train()

        ours.open_update()
        loss, terms = ppo_loss(ours.networks, ours.networks.params, s, ours.config, ours.config.clip)
        ours.descend("loss", ours.optimiser, loss, ours.networks)
        told = theirs.logger.name_to_value
        for mine, name, factor in (
            (terms.policy, "policy_gradient_loss", 1.0),
            (2.0 * terms.value, "value_loss", 1.0),  # they keep the ½ in the coefficient
            (terms.entropy, "entropy_loss", -1.0),
            (loss.detach(), "loss", 1.0),
        ):
            assert float(mine) == pytest.approx(factor * told[f"train/{name}"], rel=1e-4, abs=1e-5), (i, name)
        clipped_to = min(norms[-1], 0.3)
        assert float(ours.optimiser.grad.norm()) == pytest.approx(clipped_to, rel=1e-4)
        if i in (0, 19):
            for mine, leaf in zip(ours.networks.leaves, their_parameters(theirs), strict=True):
                torch.testing.assert_close(mine.detach().flatten(), leaf.flatten(), rtol=0.0, atol=2e-6 * (i + 1))
    assert max(norms) > 0.3


def test_advantages_are_theirs_with_time_limits() -> None:
    """They add γ V(s') to the reward where a limit cut an episode; we bootstrap there."""
    steps, envs = 30, 3
    g = torch.Generator().manual_seed(0)
    reward, value, next_value = torch.randn(3, steps, envs, generator=g)
    ended = torch.rand(steps, envs, generator=g) < 0.2
    truncated = ended & (torch.rand(steps, envs, generator=g) < 0.5)
    follows = torch.cat((value[1:], next_value[-1:]))
    next_value = torch.where(ended, next_value, follows)  # V(s') is the next row's within an episode
    buffer = RolloutBuffer(steps, OBS, CONTINUOUS, device="cpu", gae_lambda=0.9, gamma=0.95, n_envs=envs)
    begins = torch.cat((torch.ones(1, envs, dtype=torch.bool), ended[:-1]))
    buffer.rewards = (reward + 0.95 * next_value * truncated).numpy()
    buffer.values, buffer.episode_starts = value.numpy(), begins.float().numpy()
    buffer.compute_returns_and_advantage(next_value[-1], ended[-1].numpy())
    no = torch.zeros(steps, envs)
    rollout = Rollout(no, no, reward, no, ended & ~truncated, truncated, ended, torch.ones_like(ended))
    found = generalised_advantages(rollout, value, next_value, 0.95, 0.9)
    torch.testing.assert_close(found, torch.from_numpy(buffer.advantages), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found + value, torch.from_numpy(buffer.returns), rtol=1e-5, atol=1e-5)
