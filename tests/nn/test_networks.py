"""Networks against slower ones that say the same thing plainly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor

from rlopt.config import checked
from rlopt.nn import Critic, NetworkConfig, make_actor, network_options
from rlopt.nn.networks import MLP, TALL, EnsembleMLP
from rlopt.types import RloptError

SMALL = NetworkConfig(hidden=(8, 6))


@pytest.mark.parametrize("rows", [7, TALL])
@pytest.mark.parametrize(
    ("activation", "function"), [("relu", F.relu), ("tanh", torch.tanh), ("elu", F.elu), ("silu", F.silu)]
)
def test_an_ensemble_equals_separate_networks(activation: str, function: Any, rows: int) -> None:
    net = EnsembleMLP(3, 5, 2, NetworkConfig(hidden=(8, 6), activation=activation))
    x = torch.randn(rows, 5)
    shared, own = net(x), net(torch.stack([x, x + 1, x + 2]))
    assert shared.shape == own.shape == (3, rows, 2)
    for e in range(3):
        for y, given in ((shared[e], x), (own[e], x + e)):
            h = given
            for i, layer in enumerate(net.layers):
                h = F.linear(h, layer.weight[e].t(), layer.bias[e, 0])
                h = function(h) if i < 2 else h
            torch.testing.assert_close(y, h, rtol=1e-5, atol=1e-6)


def test_an_ensemble_begins_like_linear_layers_and_its_members_differ() -> None:
    net = EnsembleMLP(2, 100, 1, NetworkConfig(hidden=(50,)))
    weight = net.layers[0].weight
    assert weight.abs().max() <= 0.1  # 1/sqrt(100)
    assert weight.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.05)
    assert not torch.equal(weight[0], weight[1])


def test_a_layer_is_normalised_before_its_non_linearity() -> None:
    config = NetworkConfig(hidden=(8, 6), norm="layer")
    alone, many = MLP(5, 2, config), EnsembleMLP(3, 5, 2, config)
    for parameter in (*alone.parameters(), *many.parameters()):
        torch.nn.init.normal_(parameter)
    x = torch.randn(7, 5)

    def by_hand(weights: list[Tensor], biases: list[Tensor], gains: list[Tensor], shifts: list[Tensor]) -> Tensor:
        y = x
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            y = F.linear(y, weight, bias)
            if i < 2:
                y = F.relu(F.layer_norm(y, (len(gains[i]),), gains[i], shifts[i]))
        return y

    own = [[getattr(m, name) for m in part] for part in (alone.layers, alone.norms) for name in ("weight", "bias")]
    torch.testing.assert_close(alone(x), by_hand(*own))
    y = many(x)
    for e in range(3):
        own = [[layer.weight[e].t() for layer in many.layers], [layer.bias[e, 0] for layer in many.layers]]
        own += [[getattr(norm, name)[e, 0] for norm in many.norms] for name in ("weight", "bias")]
        torch.testing.assert_close(y[e], by_hand(*own), rtol=1e-4, atol=1e-5)


def test_orthogonal_weights_have_the_gains_of_their_places() -> None:
    config = NetworkConfig(hidden=(16, 8), init="orthogonal", memory="gru", memory_size=6)
    image = spaces.Box(0, 255, (1, 36, 36), "uint8")
    actor = make_actor("categorical", image, spaces.Discrete(3), network_options(config))
    critic = Critic(image, config)
    other = Critic(image, replace(config, value_gain=0.5, memory="none", memory_size=None))
    lasts = {id(actor.body.layers[2]): 0.01, id(critic.body.layers[2]): 1.0, id(other.body.layers[2]): 0.5}
    for name, layer in [*actor.named_modules(), *critic.named_modules(), *other.named_modules()]:
        if hasattr(layer, "weight"):
            assert not layer.bias.any(), name
            gain = lasts.get(id(layer), 1.0 if name.startswith("memory") else 2.0**0.5)
            for weight in layer.weight.transpose(1, 2) if layer.weight.dim() == 3 else [layer.weight]:
                found = torch.linalg.svdvals(weight.detach().flatten(1))
                torch.testing.assert_close(found, torch.full_like(found, gain), msg=name)
    given = make_actor("categorical", image, spaces.Discrete(3), network_options(replace(config, policy_gain=0.3)))
    torch.testing.assert_close(torch.linalg.svdvals(given.body.layers[2].weight.detach()), torch.full((3,), 0.3))


def test_critics_may_have_layers_of_their_own() -> None:
    config, space = NetworkConfig(hidden=(8,), critic_hidden=(5, 4)), spaces.Box(-1, 1, (3,))
    assert [layer.weight.shape[-1] for layer in Critic(space, config).body.layers] == [5, 4, 1]
    actor = make_actor("categorical", space, spaces.Discrete(3), network_options(config))
    assert [layer.weight.shape[0] for layer in actor.body.layers] == [8, 3]
    assert "critic_hidden" not in actor.options


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({"memory_size": 64}, "memory=gru"),
        ({"policy_gain": 0.1}, "init=orthogonal"),
        ({"value_gain": 0.1, "memory": "gru"}, "init=orthogonal"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(options: dict[str, Any], needed: str) -> None:
    with pytest.raises(RloptError, match=rf"has no effect without agent\.network\.{needed}"):
        checked(NetworkConfig(**options), "agent.network")


def test_critic_shapes() -> None:
    vector = spaces.Box(-1, 1, (4,))
    obs, action = torch.randn(5, 4), torch.randn(5, 2)
    assert Critic(vector, SMALL, action_features=2)(obs, action).shape == (2, 5)
    assert Critic(vector, SMALL, outputs=3)(obs).shape == (2, 5, 3)
    assert Critic(vector, SMALL, ensemble=1)(obs).shape == (1, 5)
    assert Critic(vector, SMALL, action_features=2, ensemble=4)(obs, action).shape == (4, 5)


def test_critics_over_images_share_nothing() -> None:
    space = spaces.Box(0, 255, (1, 36, 36), "uint8")
    critic = Critic(space, SMALL, action_features=2)
    obs, action = torch.randint(256, (3, 1, 36, 36), dtype=torch.uint8), torch.randn(3, 2)
    q = critic(obs, action)
    assert q.shape == (2, 3)
    gradients = torch.autograd.grad(q[0].sum(), list(critic.encoders[1].parameters()), allow_unused=True)
    assert all(g is None or not g.any() for g in gradients)
    for e in range(2):
        features = torch.cat([critic.encoders[e](obs), action], -1)
        torch.testing.assert_close(q[e], critic.body(features.expand(2, -1, -1))[e, :, 0])
