"""Networks against slower ones that say the same thing plainly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor

from rlopt.nn import Critic, NetworkConfig, make_actor, make_encoder, network_options, register_encoder
from rlopt.nn.encoders import ENCODERS, Flatten, NatureCNN, PerLeaf
from rlopt.nn.networks import MLP, EnsembleMLP
from rlopt.types import RloptError

SMALL = NetworkConfig(hidden=(8, 6))


@pytest.mark.parametrize(
    ("activation", "function"), [("relu", F.relu), ("tanh", torch.tanh), ("elu", F.elu), ("silu", F.silu)]
)
def test_an_ensemble_equals_separate_networks(activation: str, function: Any) -> None:
    net = EnsembleMLP(3, 5, 2, NetworkConfig(hidden=(8, 6), activation=activation))
    x = torch.randn(7, 5)
    shared, own = net(x), net(torch.stack([x, x + 1, x + 2]))
    assert shared.shape == own.shape == (3, 7, 2)
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
    with pytest.raises(RloptError, match=rf"has no effect without network\.{needed}"):
        NetworkConfig(**options)


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


def test_flatten_puts_every_kind_of_leaf_side_by_side() -> None:
    space = spaces.Dict(
        {
            "matrix": spaces.Box(-1, 1, (2, 2)),
            "choice": spaces.Discrete(3, start=10),
            "pair": spaces.MultiDiscrete([2, 3]),
            "bits": spaces.MultiBinary(2),
        }
    )
    encoder = make_encoder(space)
    assert isinstance(encoder, Flatten) and encoder.out_features == 4 + 3 + 5 + 2
    obs = {
        "matrix": torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]),
        "choice": torch.tensor([11]),
        "pair": torch.tensor([[1, 0]]),
        "bits": torch.tensor([[1.0, 0.0]]),
    }
    features = dict(
        zip(space.spaces, encoder(obs)[0].split([space_size(s) for s in space.spaces.values()]), strict=True)
    )
    assert features["matrix"].tolist() == [1, 2, 3, 4]
    assert features["choice"].tolist() == [0, 1, 0]
    assert features["pair"].tolist() == [0, 1, 1, 0, 0]
    assert features["bits"].tolist() == [1, 0]


def space_size(space: spaces.Space[Any]) -> int:
    return int(spaces.flatdim(space))


def test_flatten_of_single_spaces() -> None:
    assert make_encoder(spaces.Discrete(4, start=-1))(torch.tensor([-1, 2])).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert make_encoder(spaces.Box(-1, 1, (2, 3)))(torch.arange(6.0).view(1, 2, 3)).tolist() == [[0, 1, 2, 3, 4, 5]]
    x = torch.randn(2, 3)
    assert torch.equal(make_encoder(spaces.Box(-1, 1, (3,)))(x), x)


def test_a_dict_of_image_vector_and_index() -> None:
    space = spaces.Dict(
        {
            "cam.left": spaces.Box(0, 255, (3, 40, 36), "uint8"),
            "cam/right": spaces.Box(0, 255, (36, 40, 3), "uint8"),
            "arm": spaces.Box(-1, 1, (2,)),
            "goal": spaces.Discrete(3),
        }
    )
    encoder = make_encoder(space)
    assert isinstance(encoder, PerLeaf) and encoder.out_features == 512 * 2 + 2 + 3
    left = torch.randint(256, (2, 3, 40, 36), dtype=torch.uint8)
    right = torch.randint(256, (2, 36, 40, 3), dtype=torch.uint8)
    obs = {
        "cam.left": left,
        "cam/right": right,
        "arm": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "goal": torch.tensor([0, 2]),
    }
    features = encoder(obs)
    assert features.shape == (2, 1029)
    assert features[:, 1024:].tolist() == [[1, 2, 1, 0, 0], [3, 4, 0, 0, 1]]
    torch.testing.assert_close(features[:, :512], encoder.images[0](left))
    torch.testing.assert_close(features[:, 512:1024], encoder.images[1](right))


def test_any_name_of_an_image_has_a_network_of_its_own() -> None:
    """Names that look alike, that are attributes of modules, or that no module may have."""
    names = ["a.b", "a_b", "type", "keys", "forward", "training", "0", ".", "a/b"]
    space = spaces.Dict({name: spaces.Box(0, 255, (1, 36, 36), "uint8") for name in names})
    encoder = make_encoder(space)
    assert isinstance(encoder, PerLeaf) and encoder.out_features == 512 * len(names)
    obs = {name: torch.randint(256, (2, 1, 36, 36), dtype=torch.uint8) for name in names}
    features = encoder(obs).split(512, 1)
    for i, name in enumerate(space.spaces):
        torch.testing.assert_close(features[i], encoder.images[i](obs[name]))
        assert all(not torch.equal(features[i], other) for other in features[:i])
    again = make_encoder(space)
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(obs), encoder(obs))


def test_nature_cnn_reads_both_layouts_and_scales_pixels() -> None:
    first, last = (
        NatureCNN(spaces.Box(0, 255, (4, 84, 84), "uint8")),
        NatureCNN(spaces.Box(0, 255, (84, 84, 4), "uint8")),
    )
    last.load_state_dict(first.state_dict())
    x = torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8)
    torch.testing.assert_close(first(x), last(x.movedim(1, -1)))
    assert (
        sum(p.numel() for p in first.parameters())
        == 8 * 8 * 4 * 32 + 32 + 4 * 4 * 32 * 64 + 64 + 9 * 64 * 64 + 64 + 3136 * 512 + 512
    )
    by_hand = F.relu(first.head(first.body(x.float() / 255)))
    assert torch.equal(first(x), by_hand)


def test_encoders_refuse_what_they_cannot_read() -> None:
    with pytest.raises(RloptError, match="nature_cnn"):
        make_encoder(spaces.Box(-1, 1, (4,)), "nature_cnn")
    with pytest.raises(RloptError, match="flatten"):
        make_encoder(spaces.Box(0, 255, (36, 35, 36), "uint8"), "nature_cnn")
    with pytest.raises(RloptError, match="no such encoder"):
        make_encoder(spaces.Box(-1, 1, (4,)), "resnet")
    with pytest.raises(RloptError, match="supported are"):
        make_encoder(spaces.Dict({"text": spaces.Text(5)}))


def test_small_images_are_flattened() -> None:
    encoder = make_encoder(spaces.Box(0, 255, (2, 3, 1), "uint8"))
    assert encoder(torch.tensor([[[[1], [2], [3]], [[4], [5], [255]]]], dtype=torch.uint8)).tolist() == [
        [1, 2, 3, 4, 5, 255]
    ]


def test_a_registered_encoder_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlopt.nn.encoders.ENCODERS", dict(ENCODERS))

    class Twice(torch.nn.Module):
        def __init__(self, space: spaces.Space[Any]) -> None:
            super().__init__()
            self.out_features = 3

        def forward(self, obs: Tensor) -> Tensor:
            return 2 * obs

    register_encoder("twice", Twice)
    critic = Critic(spaces.Box(-1, 1, (3,)), NetworkConfig(encoder="twice", hidden=(4,)))
    x = torch.randn(2, 3)
    torch.testing.assert_close(critic(x), critic.body(2 * x)[..., 0])
    for taken in ("twice", "auto"):
        with pytest.raises(RloptError, match="registered already"):
            register_encoder(taken, Twice)


def test_discrete_observations_need_no_dtype() -> None:
    """Gymnasium gives NumPy integers of several widths."""
    encoder = make_encoder(spaces.Discrete(3))
    for dtype in (np.int32, np.int64):
        assert encoder(torch.as_tensor(np.array([1], dtype))).tolist() == [[0, 1, 0]]


def test_a_scalar_leaf_is_one_feature() -> None:
    scalar, pair = spaces.Box(0, 1, (), np.float32), spaces.Box(0, 1, (2,), np.float32)
    assert Flatten(scalar)(torch.tensor([3.0, 4.0])).tolist() == [[3.0], [4.0]]
    both = Flatten(spaces.Dict({"a": scalar, "b": pair}))
    assert both.out_features == 3
    assert both({"a": torch.tensor([3.0]), "b": torch.tensor([[1.0, 2.0]])}).tolist() == [[3.0, 1.0, 2.0]]
