"""What ``requires_grad_(False)`` has frozen moves on no path, and the rest goes on learning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rlopt.agents import Agent
from rlopt.nn import OptimiserConfig
from tests.agents.cases import every_learning_net

ADAMW = OptimiserConfig(name="adamw", weight_decay=0.5)


def moves(agent: Agent, net: str, update: Any) -> dict[str, bool]:
    """Which leaves of a net three updates move."""
    leaves = dict(zip(getattr(agent, net).params, getattr(agent, net).leaves, strict=False))
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    for i in range(3):
        update(i)
    return {name: not torch.equal(before[name], leaf) for name, leaf in leaves.items()}


@every_learning_net
def test_a_frozen_part_stays_while_the_rest_learns(name: str, net: str, make_agent, make_data) -> None:
    """From the start and later, with momentum and weight decay on their way; unfrozen it learns again."""
    agent = make_agent(name, optimiser=ADAMW, learning_rate=1e-2)
    params = dict(getattr(agent, net).module.named_parameters())

    def update(i: int) -> None:
        agent.update(make_data(agent, i))

    assert all(moves(agent, net, update).values())
    for leaf, p in params.items():
        p.requires_grad_("layers.0" not in leaf)
    assert moves(agent, net, update) == {k: "layers.0" not in k for k in params}
    for p in params.values():
        p.requires_grad_(False)
    assert not any(moves(agent, net, update).values())
    for p in params.values():
        p.requires_grad_(True)
    assert all(moves(agent, net, update).values())
    assert agent.guard.first_bad() is None


@pytest.mark.parametrize("runs", [1, 2])
def test_the_compiled_update_gives_way(runs: int, make_agent, make_batch) -> None:
    agent, plain = (make_agent("sac", runs=runs, fused=fused) for fused in (True, False))
    assert agent.fused is not None
    for each in (agent, plain):
        for module in each.actor.modules:
            module.body.layers[0].weight.requires_grad_(False)
    for i in range(2):
        batch = make_batch(agent, i, size=8 * runs)
        agent.update(batch)
        plain.update(batch)
    assert torch.equal(agent.actor.flat, plain.actor.flat)
    fresh = make_agent("sac", runs=runs)
    key = "body.layers.0.weight"
    assert torch.equal(agent.actor.params[key], fresh.actor.params[key])
    assert not torch.equal(agent.actor.params["body.layers.0.bias"], fresh.actor.params["body.layers.0.bias"])


def test_of_several_runs_one_can_be_frozen_alone(make_agent, make_batch) -> None:
    agent = make_agent("sac_discrete", runs=3, optimiser=ADAMW)
    for p in agent.critic.modules[1].parameters():
        p.requires_grad_(False)
    agent.actor.params["body.layers.0.weight"].requires_grad_(False)
    before = agent.critic.flat.clone(), agent.actor.params["body.layers.0.weight"].detach().clone()
    for i in range(2):
        agent.update(make_batch(agent, i, size=24))
    assert [torch.equal(agent.critic.flat[r], before[0][r]) for r in range(3)] == [False, True, False]
    assert torch.equal(agent.actor.params["body.layers.0.weight"], before[1])
    assert agent.critic.frozen == () and agent.actor.frozen == ("body.layers.0.weight",)


def test_the_gradients_norm_is_that_of_what_learns(make_agent, make_batch) -> None:
    """A clipped step of SGD has the norm that clipping allows, all of it in what is not frozen."""
    sgd = OptimiserConfig(name="sgd", beta1=0.0)
    agent = make_agent("sac_discrete", optimiser=sgd, learning_rate=1.0, max_grad_norm=1e-3)
    agent.critic.params["body.layers.0.weight"].requires_grad_(False)
    before = agent.critic.flat.clone()
    batch = make_batch(agent, 0)
    agent.update(batch._replace(reward=100.0 * batch.reward))
    assert (agent.critic.flat - before).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_a_pretrained_encoder_that_comes_frozen_stays_frozen(make_agent, make_batch) -> None:
    from rlopt.nn import NetworkConfig, register_encoder
    from rlopt.nn.encoders import ENCODERS

    class Pretrained(nn.Module):
        out_features = 6

        def __init__(self, space: Any) -> None:
            super().__init__()
            self.layer = nn.Linear(space.shape[0], 6).requires_grad_(False)

        def forward(self, obs: torch.Tensor) -> torch.Tensor:
            return self.layer(obs)

    register_encoder("pretrained", Pretrained)
    try:
        agent = make_agent("sac", network=NetworkConfig(encoder="pretrained", hidden=(8,)))
        assert agent.fused is None
        found = moves(agent, "critic", lambda i: agent.update(make_batch(agent, i)))
        assert found == {k: "encoders" not in k for k in agent.critic.params}
    finally:
        del ENCODERS["pretrained"]
