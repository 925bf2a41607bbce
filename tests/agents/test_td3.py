"""TD3: its losses by hand, the traps of its units and of its delay, and Stable-Baselines3's update on equal data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.agents import TD3, TD3Config
from rlopt.agents.actor_critic import Nets
from rlopt.agents.td3 import actor_loss, critic_loss
from rlopt.buffers import Batch
from rlopt.nn import NetworkConfig, OptimiserConfig, Params
from tests.agents.cases import make_agent, make_batch

D = torch.float64


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=D)


def actor(params: Params, obs: Tensor) -> Tensor:
    """One action: m·s, inside ±1."""
    return (params["m"] * obs).clamp(-1.0, 1.0)


def critic(params: Params, obs: Tensor, action: Tensor) -> Tensor:
    """Two critics Qᵢ(s, a) = wᵢ s + vᵢ a."""
    return params["w"][:, None] * obs[:, 0] + params["v"][:, None] * action[:, 0]


NETS: Any = Nets(actor, critic)  # type: ignore[arg-type]
CRITIC: Params = {"w": t(1.0, 0.0), "v": t(0.0, 2.0)}
TARGET: Params = {"w": t(1.0, 2.0), "v": t(1.0, -1.0)}
# Three rows: a step that goes on; one that times out (its value goes on); one that terminates.
BATCH = Batch(
    obs=t(1.0, 2.0, -1.0)[:, None],
    action=t(0.5, -0.5, 0.0)[:, None],
    reward=t(1.0, -1.0, 2.5),
    next_obs=t(0.25, 0.5, 3.0)[:, None],
    terminated=t(0.0, 0.0, 1.0),
    discount=t(0.9, 0.9, 0.9),
    weight=None,
    index=torch.arange(3),
)
# With μ̄(s') = 2s' and noise ε = (1, 10, 0): smoothing 0.2·ε = (0.2, 2 → 0.5, 0).
# Row 0: a' = 0.5 + 0.2 = 0.7, Q̄ = (0.25 + 0.7, 0.5 - 0.7), min -0.2, y = 1 - 0.18 = 0.82.
# Row 1: a' = 1 + 0.5 → 1, Q̄ = (0.5 + 1, 1 - 1), min 0, y = -1. (Unclamped, a' = 1.5 would give min -0.5, y = -1.45.)
# Row 2 terminates: y = 2.5.
# Q₁ = s = (1, 2, -1), Q₂ = 2a = (1, -1, 0): residuals (0.18, 3, -3.5) and (0.18, 0, -2.5).
NOISE = t(1.0, 10.0, 0.0)[:, None]
RESIDUALS = ((0.18, 3.0, -3.5), (0.18, 0.0, -2.5))


def test_critic_loss_by_hand() -> None:
    loss, metrics = critic_loss(NETS, CRITIC, {"m": t(2.0)}, TARGET, BATCH, NOISE, 0.2, 0.5)
    assert float(loss) == pytest.approx(sum(0.5 * r * r for row in RESIDUALS for r in row) / 3, abs=1e-12)
    assert metrics["td"].tolist() == pytest.approx([0.18, 1.5, 3.0])


def test_a_weight_scales_its_row_alone() -> None:
    weighted = BATCH._replace(weight=t(0.0, 2.0, 0.0))
    loss, _ = critic_loss(NETS, CRITIC, {"m": t(2.0)}, TARGET, weighted, NOISE, 0.2, 0.5)
    assert float(loss) == pytest.approx(0.5 * 2.0 * 9.0 / 3)


def test_actor_loss_climbs_the_first_critic_alone() -> None:
    m = t(0.25).requires_grad_()
    both: Params = {"w": t(1.0, -5.0), "v": t(3.0, -7.0)}
    loss, _ = actor_loss(NETS, {"m": m}, both, BATCH.obs)
    # Q₁ = s + 3·s/4, mean of s = 2/3; dQ₁/dm = 3 s.
    assert float(loss.detach()) == pytest.approx(-(2 / 3) * 1.75)
    assert float(torch.autograd.grad(loss, m)[0]) == pytest.approx(-3 * 2 / 3)


def test_actor_and_targets_move_on_every_delayed_update_and_on_no_other() -> None:
    agent = make_agent("td3", policy_delay=3)
    assert isinstance(agent, TD3)
    names = ("actor", "target_actor", "target")
    for update in range(1, 7):
        before = {name: getattr(agent, name).flat.clone() for name in (*names, "critic")}
        agent.update(make_batch(agent, update))
        moved = {name: not torch.equal(before[name], getattr(agent, name).flat) for name in before}
        assert moved == {"critic": True, **dict.fromkeys(names, update % 3 == 0)}


@pytest.mark.parametrize(("low", "high"), [(-0.4, 0.4), (-1.0, 3.0)])
def test_noise_is_in_units_of_the_box(low: float, high: float) -> None:
    space = spaces.Box(np.float32(low), np.float32(high), (2,))
    agent = TD3(spaces.Box(-1, 1, (3,)), space, TD3Config(warmup_steps=0, network=NetworkConfig(hidden=(8,))), seed=1)
    obs = torch.zeros(4000, 3)
    centre = agent.act(obs, deterministic=True).action
    explored = agent.act(obs).action
    half = (high - low) / 2
    assert bool((explored >= low).all() and (explored <= high).all())
    assert float((explored - centre).std()) == pytest.approx(0.1 * half, rel=0.06)


def test_evaluation_has_no_noise() -> None:
    agent = make_agent("td3")
    obs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(agent.policy.act(obs).action, agent.act(obs, deterministic=True).action)
    assert not torch.equal(agent.act(obs).action, agent.act(obs, deterministic=True).action)


def test_twenty_updates_are_those_of_stable_baselines3(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("stable_baselines3")
    import gymnasium
    from stable_baselines3 import TD3 as TheirTD3
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    obs_space, action_space, rows = spaces.Box(-10, 10, (5,)), spaces.Box(-1, 1, (2,)), 64

    class Nowhere(gymnasium.Env[Any, Any]):
        observation_space, action_space = obs_space, spaces.Box(-1, 1, (2,))

    theirs: Any = TheirTD3(
        "MlpPolicy", Nowhere(), learning_rate=1e-3, batch_size=rows, seed=3, buffer_size=10, device="cpu",
        policy_kwargs={"net_arch": [16, 16], "optimizer_kwargs": {"eps": 1e-4}},
    )  # fmt: skip
    theirs.set_logger(Logger(None, []))
    theirs.critic.optimizer.param_groups[0]["eps"] = 2e-4  # their loss is twice ours
    config = TD3Config(
        learning_rate=1e-3, batch_size=rows, warmup_steps=0, network=NetworkConfig(hidden=(16, 16)),
        optimiser=OptimiserConfig(epsilon=1e-4),
    )  # fmt: skip
    ours, check = (TD3(obs_space, action_space, config, seed=4) for _ in range(2))

    def copy(agent: TD3) -> None:
        pairs = ((agent.actor, theirs.actor), (agent.target_actor, theirs.actor_target))
        critics = ((agent.critic, theirs.critic), (agent.target, theirs.critic_target))
        with torch.no_grad():
            for net, pi in pairs:
                for i, layer in enumerate((0, 2, 4)):
                    net.params[f"body.layers.{i}.weight"].copy_(pi.mu[layer].weight)
                    net.params[f"body.layers.{i}.bias"].copy_(pi.mu[layer].bias)
            for net, q in critics:
                for i, layer in enumerate((0, 2, 4)):
                    for j, one in enumerate((q.qf0, q.qf1)):
                        net.params[f"body.layers.{i}.weight"][j].copy_(one[layer].weight.T)
                        net.params[f"body.layers.{i}.bias"][j, 0].copy_(one[layer].bias)

    copy(ours)
    noise: list[Tensor] = []
    monkeypatch.setattr(ours, "noise", lambda *_, **__: noise[0])
    monkeypatch.setattr(Tensor, "normal_", lambda self, mean, std: self.copy_(mean + std * noise[0]))
    for i in range(20):
        g = torch.Generator().manual_seed(i)
        obs, action = torch.randn(rows, 5, generator=g), 2 * torch.rand(rows, 2, generator=g) - 1
        next_obs = 0.9 * obs + 0.3 * torch.cat((action, action, action[:, :1]), 1)
        ended, reward = (next_obs[:, 0].abs() > 1.5).float(), 1.0 - obs[:, 1].square()
        noise[:] = [torch.randn(rows, 2, generator=g)]
        samples = ReplayBufferSamples(obs, action, next_obs, ended[:, None], reward[:, None])
        monkeypatch.setattr(theirs.replay_buffer, "sample", lambda *_, s=samples, **__: s)
        theirs.train(1, rows)
        discount = torch.full((rows,), 0.99)
        metrics = ours.update(
            Batch(obs, action, reward, next_obs, ended, discount, None, torch.arange(rows), {})
        ).metrics  # fmt: skip
        logged = theirs.logger.name_to_value
        assert 2 * float(metrics["critic_loss"]) == pytest.approx(logged["train/critic_loss"], rel=1e-4)
        if i % 2:
            assert float(metrics["actor_loss"]) == pytest.approx(logged["train/actor_loss"], rel=1e-4, abs=1e-5)
    copy(check)
    for name in ("actor", "critic", "target", "target_actor"):
        torch.testing.assert_close(getattr(ours, name).flat, getattr(check, name).flat, rtol=0.0, atol=1e-4)
