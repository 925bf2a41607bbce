"""SAC's hand-written gradients equal what autograd makes of the readable losses."""

from __future__ import annotations

import pytest
import torch
from gymnasium import spaces

from rlopt.agents.sac import actor_loss, critic_loss
from rlopt.nn import NetworkConfig


@pytest.mark.parametrize("hidden", [(16,), (16, 16), (8, 12, 16)])
@pytest.mark.parametrize("weighted", [False, True])
def test_fused_gradients_equal_the_losses(hidden: tuple[int, ...], weighted: bool, make_agent, make_batch) -> None:
    agent = make_agent("sac", network=NetworkConfig(hidden=hidden), batch_size=8)
    assert agent.fused is not None
    with torch.no_grad():
        # Biases that are not zero, and log standard deviations beyond both clamps in some rows and inside in others.
        agent.actor.flat.add_(0.3 * torch.randn(agent.actor.flat.shape, generator=torch.Generator().manual_seed(5)))
        agent.actor_module.body.layers[-1].weight[2].mul_(60.0)
    batch = make_batch(agent, 1)
    batch = batch._replace(action=agent.actor_module.normalise(batch.action))
    if weighted:
        batch = batch._replace(weight=torch.linspace(0.1, 1.0, 8))
    raw = agent.actor_module.body(torch.cat([batch.obs, batch.next_obs]))[:, 2]
    assert (raw > 2).any() and (raw < 2).any()
    temperature = torch.tensor(0.3)
    noise = torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(2))

    loss, metrics = critic_loss(
        agent.nets, agent.critic.params, agent.actor.params, agent.target.params, temperature, batch, noise[0]
    )
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, agent.critic.leaves)])
    fused_loss, fused_metrics = agent.fused.critic_gradient(temperature, batch, *noise)
    torch.testing.assert_close(fused_loss, loss.detach())
    torch.testing.assert_close(fused_metrics, metrics)
    torch.testing.assert_close(agent.critic_optimiser.grad, expected, rtol=1e-4, atol=1e-6)

    loss, metrics = actor_loss(agent.nets, agent.actor.params, agent.critic.params, temperature, batch.obs, noise[1])
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, agent.actor.leaves)])
    fused_loss, fused_metrics = agent.fused.actor_gradient(temperature)
    torch.testing.assert_close(fused_loss, loss.detach())
    torch.testing.assert_close(fused_metrics["log_prob"], metrics["log_prob"].detach())
    torch.testing.assert_close(agent.actor_optimiser.grad, expected, rtol=1e-4, atol=1e-6)


def test_training_is_the_same_with_and_without(make_agent, make_batch) -> None:
    options = {"policy_delay": 2, "max_grad_norm": 0.7}
    fused, plain = (make_agent("sac", fused=f, **options) for f in (True, False))
    assert fused.fused is not None and plain.fused is None
    for i in range(10):
        a, b = fused.update(make_batch(fused, i)), plain.update(make_batch(plain, i))
        assert a.metrics.keys() == b.metrics.keys()
        torch.testing.assert_close(a.metrics, b.metrics, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(a.priority, b.priority, rtol=1e-3, atol=1e-4)
    for net in ("actor", "critic", "target"):
        torch.testing.assert_close(getattr(fused, net).flat, getattr(plain, net).flat, rtol=1e-3, atol=1e-4)


def test_a_batch_of_another_size_takes_the_readable_path(make_agent, make_batch) -> None:
    fused, plain = (make_agent("sac", fused=f) for f in (True, False))
    fused.update(make_batch(fused, 0, size=5))
    plain.update(make_batch(plain, 0, size=5))
    assert torch.equal(fused.critic.flat, plain.critic.flat)
    assert torch.equal(fused.actor.flat, plain.actor.flat)


@pytest.mark.parametrize(
    ("space", "network"),
    [
        (spaces.Dict({"a": spaces.Box(-1, 1, (4,))}), NetworkConfig(hidden=(8,))),
        (spaces.Box(0, 255, (3, 36, 36), "uint8"), NetworkConfig(hidden=(8,))),
        (spaces.Box(-1, 1, (2, 2)), NetworkConfig(hidden=(8,))),
        (spaces.Box(-1, 1, (4,)), NetworkConfig(hidden=(8,), activation="tanh")),
    ],
)
def test_networks_the_formulas_do_not_cover_take_the_readable_path(space, network, make_agent) -> None:
    assert make_agent("sac", observation_space=space, network=network).fused is None


@pytest.mark.parametrize("hidden", [(16,), (16, 16), (24, 16, 8)])
@pytest.mark.parametrize("name", ["critic", "actor"])
def test_bfloat16_products_agree_with_the_readable_networks(name, hidden, make_agent, make_batch) -> None:
    options = {"network": NetworkConfig(hidden=hidden), "precision": "bf16"}
    fused, plain = (make_agent("sac", fused=f, **options) for f in (True, False))
    exact = make_agent("sac", fused=False, network=NetworkConfig(hidden=hidden))
    for agent in (fused, plain, exact):
        agent.update(make_batch(agent, 3))
    ours, theirs, full = (getattr(a, f"{name}_optimiser").grad for a in (fused, plain, exact))
    scale = full.abs().max()
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=0.0, atol=0.02)
    torch.testing.assert_close(ours / scale, full / scale, rtol=0.0, atol=0.05)
    # One hidden layer has no product between hidden layers; more have, and then rounding shows.
    assert torch.allclose(theirs, full, rtol=1e-5, atol=1e-7) == (len(hidden) == 1)


def test_two_lanes_compute_the_same_bits_as_one(make_agent, make_batch) -> None:
    agents = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        agent = make_agent("sac")
        assert agent.fused.lanes.count == threads
        for i in range(5):
            agent.update(make_batch(agent, i))
        agents.append(agent)
    torch.set_num_threads(1)
    for net in ("actor", "critic", "target"):
        assert torch.equal(getattr(agents[0], net).flat, getattr(agents[1], net).flat)
