"""Encoders: what is read as an image and how, and everything else side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor

from rlopt.envs.spaces import ObservationCodec
from rlopt.nn import (
    Critic,
    Net,
    NetworkConfig,
    build_seeded,
    make_actor,
    make_encoder,
    network_options,
    register_encoder,
)
from rlopt.nn.encoders import (
    EMBEDDING,
    ENCODERS,
    MAX_ONE_HOT,
    Embedding,
    Flatten,
    ImpalaCNN,
    Indices,
    NatureCNN,
    PerLeaf,
    Pixels,
    SmallCNN,
)
from rlopt.nn.networks import hidden_products
from rlopt.policy import Policy, load_policy, save_policy
from rlopt.types import EnvSpec, RloptError


def pixels(*shape: int, low: Any = 0, high: Any = 255, dtype: Any = np.uint8) -> spaces.Box:
    return spaces.Box(low, high, shape, dtype)


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
    torch.testing.assert_close(features[:, :512], encoder.parts[0](left))
    torch.testing.assert_close(features[:, 512:1024], encoder.parts[1](right))


def test_any_name_of_an_image_has_a_network_of_its_own() -> None:
    """Names that look alike, that are attributes of modules, or that no module may have."""
    names = ["a.b", "a_b", "type", "keys", "forward", "training", "0", ".", "a/b"]
    space = spaces.Dict({name: spaces.Box(0, 255, (1, 36, 36), "uint8") for name in names})
    encoder = make_encoder(space)
    assert isinstance(encoder, PerLeaf) and encoder.out_features == 512 * len(names)
    obs = {name: torch.randint(256, (2, 1, 36, 36), dtype=torch.uint8) for name in names}
    features = encoder(obs).split(512, 1)
    for i, name in enumerate(space.spaces):
        torch.testing.assert_close(features[i], encoder.parts[i](obs[name]))
        assert all(not torch.equal(features[i], other) for other in features[:i])
    again = make_encoder(space)
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(obs), encoder(obs))


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


# What an image is, and where its channels are

SHAPES = {
    (84, 84): (1, 84, 84),
    (4, 84, 84): (4, 84, 84),
    (84, 84, 4): (4, 84, 84),
    (40, 40, 64): (64, 40, 40),
    (64, 40, 40): (64, 40, 40),
    (210, 160, 3): (3, 210, 160),
    (3, 210, 160): (3, 210, 160),
    (36, 36, 1): (1, 36, 36),
    (4, 84, 84, 3): (12, 84, 84),
    (4, 3, 84, 84): (12, 84, 84),
    (2, 50, 40, 3): (6, 50, 40),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channels_are_found_wherever_they_are(shape: tuple[int, ...]) -> None:
    reader = Pixels(pixels(*shape))
    assert reader.size == SHAPES[shape]
    x = torch.randint(256, (2, *shape), dtype=torch.uint8)
    image = reader(x)
    assert image.shape == (2, *reader.size)
    frame = shape[-3:]
    if len(shape) == 4:  # the frames of a stack follow each other
        channels = reader.size[0] // shape[0]
        for k in range(shape[0]):
            alone = Pixels(pixels(*frame))(x[:, k])
            assert torch.equal(image[:, k * channels : (k + 1) * channels], alone)
    elif len(shape) == 3 and frame != reader.size:
        assert torch.equal(image, x.permute(0, 3, 1, 2) / 255)
    else:
        assert torch.equal(image, x.reshape(image.shape) / 255)


AUTO = [
    (pixels(84, 84, 4), NatureCNN),
    (pixels(84, 84), NatureCNN),
    (pixels(4, 84, 84, 3), NatureCNN),
    (pixels(3, 40, 35), SmallCNN),
    (pixels(28, 28), SmallCNN),
    (pixels(7, 7, 3), SmallCNN),
    (pixels(10, 10, 4, high=1, dtype=np.float32), SmallCNN),
    (pixels(3, 64, 64, high=1, dtype=np.float32), NatureCNN),
    (pixels(3, 8, 8, low=-5, high=5, dtype=np.float32), SmallCNN),
    (pixels(6, 6, 3), Flatten),
    (pixels(128), Flatten),
    (pixels(2, 40, 40, 3, 3), Flatten),
    (pixels(20, 20, high=1, dtype=np.float32), Flatten),  # a table
    (pixels(3, 40, 40, low=-np.inf, high=np.inf, dtype=np.float32), Flatten),
]


@pytest.mark.parametrize(("space", "kind"), AUTO, ids=str)
def test_which_network_reads_what(space: spaces.Box, kind: type[Any]) -> None:
    encoder = make_encoder(space)
    assert isinstance(encoder if kind is Flatten else encoder.parts[0], kind)
    features = encoder(torch.as_tensor(np.stack([space.sample() for _ in range(2)])))
    assert features.shape == (2, encoder.out_features) and features.isfinite().all()


def test_planes_of_bits_are_images() -> None:
    """MinAtar shows (10, 10, C) booleans, which the environment's edge makes numbers in [0, 1]."""
    for space in (spaces.Box(0, 1, (10, 10, 6), np.bool_), spaces.MultiBinary((10, 10, 6))):
        translated = ObservationCodec(space).space
        encoder = make_encoder(translated)
        assert isinstance(encoder.parts[0], SmallCNN)
        assert encoder.parts[0].body[0].weight.shape == (16, 6, 3, 3)
    direct = make_encoder(spaces.MultiBinary((10, 10, 6)))
    assert direct(torch.ones(2, 10, 10, 6)).shape == (2, 128)


def test_pixels_are_scaled_by_their_bounds() -> None:
    x = torch.rand(2, 2, 8, 8) * 4 - 1
    wide = Pixels(pixels(2, 8, 8, low=-1, high=3, dtype=np.float32))
    torch.testing.assert_close(wide(x), (x + 1) / 4)
    inside = Pixels(pixels(2, 8, 8, low=0, high=0.5, dtype=np.float32))
    assert torch.equal(inside(x), x)
    few = torch.randint(11, (2, 8, 8, 3), dtype=torch.uint8)  # bytes, but of a game's eleven kinds of things
    torch.testing.assert_close(Pixels(pixels(8, 8, 3, high=10))(few), few.permute(0, 3, 1, 2) / 10)
    low, high = np.zeros((8, 8, 2), np.float32), np.ones((8, 8, 2), np.float32)
    low[..., 1], high[..., 1], high[0, 0, 0] = -2, 6, 0  # a plane of its own, and a pixel that never changes
    x = torch.rand(2, 8, 8, 2)
    each = Pixels(spaces.Box(low, high))(x)
    torch.testing.assert_close(each[:, 1], (x[..., 1] + 2) / 8)
    torch.testing.assert_close(each[:, 0], x[..., 0])
    free = Pixels(pixels(2, 8, 8, low=-np.inf, high=np.inf, dtype=np.float32))
    assert torch.equal(free(100 * x.permute(0, 3, 1, 2)), 100 * x.permute(0, 3, 1, 2))


def test_bytes_are_scaled_in_vectors_too() -> None:
    ram = torch.tensor([[0, 51, 255]], dtype=torch.uint8)
    assert make_encoder(pixels(3))(ram).tolist() == [[0.0, pytest.approx(0.2), 1.0]]
    assert make_encoder(pixels(3, high=254))(ram).tolist() == [[0.0, 51.0, 255.0]]
    both = make_encoder(spaces.Dict({"a": pixels(3), "b": pixels(2, low=-1, high=1, dtype=np.float32)}))
    assert both({"a": ram, "b": torch.tensor([[0.5, -0.5]])})[0].tolist() == [0, pytest.approx(0.2), 1, 0.5, -0.5]


# The networks


def test_nature_cnn_is_the_network_of_the_paper() -> None:
    first, last = NatureCNN(pixels(4, 84, 84)), NatureCNN(pixels(84, 84, 4))
    last.load_state_dict(first.state_dict())
    x = torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8)
    torch.testing.assert_close(first(x), last(x.movedim(1, -1)))
    convolutions = 8 * 8 * 4 * 32 + 32 + 4 * 4 * 32 * 64 + 64 + 9 * 64 * 64 + 64
    assert sum(p.numel() for p in first.parameters()) == convolutions + 3136 * 512 + 512
    h = x.float() / 255
    for layer, stride in zip(first.body[0::2], (4, 2, 1), strict=True):
        h = F.relu(F.conv2d(h, layer.weight, layer.bias, stride))
    torch.testing.assert_close(first(x), F.relu(first.head(h.flatten(1))))


def test_convolutions_go_on_with_channels_last() -> None:
    """In this order alone they are fast on a CPU, there and back."""
    for space in (pixels(4, 84, 84), pixels(4, 84, 84, high=1, dtype=np.float32)):
        net = NatureCNN(space)
        h = torch.as_tensor(np.stack([space.sample() for _ in range(3)]))
        for layer in net.body:
            h = layer(h)
            assert h.is_contiguous(memory_format=torch.channels_last) and not h.is_contiguous()


def test_small_cnn_is_the_network_of_minatar() -> None:
    net = SmallCNN(pixels(10, 10, 4, high=1, dtype=np.float32))
    x = torch.rand(3, 10, 10, 4)
    layer = net.body[0]
    h = F.relu(F.conv2d(x.permute(0, 3, 1, 2), layer.weight, layer.bias))
    assert h.shape == (3, 16, 8, 8)
    assert torch.equal(net(x), F.relu(net.head(h.flatten(1)))) and net.out_features == 128


def test_impala_cnn_is_the_network_of_the_paper() -> None:
    net = ImpalaCNN(pixels(3, 64, 72))
    x = torch.randint(256, (2, 3, 64, 72), dtype=torch.uint8)
    layers = iter([m for m in net.body.modules() if isinstance(m, torch.nn.Conv2d)])

    def convolved(h: Tensor) -> Tensor:
        layer = next(layers)
        return F.conv2d(h, layer.weight, layer.bias, padding=1)

    h = x / 255
    for _ in range(3):
        h = F.max_pool2d(convolved(h), 3, 2, 1)
        for _ in range(2):
            h = h + convolved(F.relu(convolved(F.relu(h))))
    assert h.shape == (2, 32, 8, 9) and next(layers, None) is None
    torch.testing.assert_close(net(x), F.relu(net.head(F.relu(h).flatten(1))))


@pytest.mark.parametrize("name", ["nature_cnn", "small_cnn", "impala_cnn"])
def test_a_named_network_reads_every_image_and_flattens_the_rest(name: str) -> None:
    space = spaces.Dict({"camera": pixels(40, 40, 3), "arm": pixels(2, low=-1, high=1, dtype=np.float32)})
    encoder = make_encoder(space, name)
    obs = {"camera": torch.randint(256, (2, 40, 40, 3), dtype=torch.uint8), "arm": torch.tensor([[1.0, 2.0]] * 2)}
    assert encoder.parts[0].name == name
    assert encoder(obs)[:, -2:].tolist() == [[1.0, 2.0]] * 2
    # Alone, anything of the shape of an image is one: here without bounds.
    alone = make_encoder(pixels(3, 40, 40, low=-np.inf, high=np.inf, dtype=np.float32), name)
    assert alone(torch.randn(2, 3, 40, 40)).shape == (2, alone.out_features)


REFUSED = [
    (pixels(4), "nature_cnn", r"nature_cnn reads images, and there is none in Box\(0, 255, \(4,\), uint8\); use auto"),
    (spaces.Discrete(3), "impala_cnn", "there is none in Discrete"),
    (spaces.Dict({"a": pixels(6, 6, 3)}), "small_cnn", "there is none in Dict"),
    (pixels(36, 35, 3), "nature_cnn", "needs images of at least 36x36, not 36x35; use auto or flatten"),
    (pixels(28, 28), "nature_cnn", "not 28x28"),
    (pixels(4), "resnet", "no such encoder; there are auto, flatten, nature_cnn, nature_conv, small_cnn, impala_cnn"),
    (spaces.Dict({"text": spaces.Text(5)}), "auto", "supported are"),
]


@pytest.mark.parametrize(("space", "name", "words"), REFUSED)
def test_encoders_refuse_what_they_cannot_read(space: spaces.Space[Any], name: str, words: str) -> None:
    with pytest.raises(RloptError, match=words):
        make_encoder(space, name)


def test_nothing_is_made_elsewhere_than_the_observation_is() -> None:
    """torch's default device is ``meta`` meanwhile, which mixes with no other."""
    space = spaces.Dict({
        "bytes": pixels(40, 40, 3),
        "wide": pixels(3, 8, 8, low=-2, high=2, dtype=np.float32),
        "many": spaces.MultiDiscrete([5_000, 3]),
        "ram": pixels(4),
    })  # fmt: skip
    encoder = make_encoder(space)
    obs = {k: torch.as_tensor(np.stack([s.sample(), s.sample()])) for k, s in space.spaces.items()}
    expected = encoder(obs)
    with torch.device("meta"):
        found = encoder(obs)
        with hidden_products(torch.bfloat16):
            assert encoder(obs).device.type == "cpu"
    assert torch.equal(found, expected)


# bf16


@pytest.mark.parametrize("name", ["nature_cnn", "small_cnn", "impala_cnn"])
def test_bf16_rounds_weights_and_never_bytes(name: str) -> None:
    net = build_seeded(lambda: make_encoder(pixels(3, 40, 40), name), 0)
    x = torch.randint(256, (4, 3, 40, 40), dtype=torch.uint8)
    exact = net(x)
    with hidden_products(torch.bfloat16):
        rounded = net(x)
        first = net.body[0](x)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.03 * exact.abs().max()
    layer = net.body[0]
    weight = (layer.weight / 255).bfloat16().float()
    expected = F.conv2d(x.float(), weight, layer.bias, layer.stride, layer.padding)
    torch.testing.assert_close(first, expected.bfloat16(), rtol=1e-2, atol=1e-3)
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert all(g is not None for g in torch.autograd.grad(rounded.sum(), list(net.parameters())))


def test_bf16_leaves_the_first_product_of_other_images_exact() -> None:
    net = make_encoder(pixels(3, 40, 40, high=1, dtype=np.float32), "nature_cnn")
    x = torch.rand(4, 3, 40, 40)
    with hidden_products(torch.bfloat16):
        assert torch.equal(net.body[0](x), F.conv2d(x, net.body[0].weight, net.body[0].bias, 4))
        rounded = net(x)
    assert not torch.equal(rounded, net(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["nature_cnn", "small_cnn", "impala_cnn"])
def test_networks_of_images_map_over_runs(name: str, dtype: torch.dtype) -> None:
    factories = [lambda: make_encoder(pixels(36, 36, 3), name)] * 2
    alone = [Net(build_seeded(f, seed)) for seed, f in enumerate(factories)]
    stacked = Net([build_seeded(f, seed) for seed, f in enumerate(factories)])
    x = torch.randint(256, (2, 3, 36, 36, 3), dtype=torch.uint8)
    with hidden_products(dtype):
        together = torch.vmap(stacked)(stacked.params, x)
        for r, net in enumerate(alone):
            tolerance = {"rtol": 1e-2, "atol": 4e-3} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(together[r], net(net.params, x[r]), **tolerance)
        assert stacked.stacks == (name != "impala_cnn")  # which pools
        if stacked.stacks and dtype == torch.float32:
            beside = stacked(stacked.params, x)
            torch.testing.assert_close(beside, together, **tolerance)
            gradients = [torch.autograd.grad(out.square().sum(), stacked.leaves) for out in (beside, together)]
            torch.testing.assert_close(*gradients, **tolerance)


# Many indices


def test_up_to_a_thousand_indices_are_one_hot_and_more_are_embedded() -> None:
    assert make_encoder(spaces.Discrete(MAX_ONE_HOT)).out_features == MAX_ONE_HOT
    encoder = make_encoder(spaces.Discrete(MAX_ONE_HOT + 1, start=5))
    assert encoder.out_features == 2 * EMBEDDING
    index = torch.arange(5, MAX_ONE_HOT + 6)
    features = encoder(index)
    assert len(features.unique(dim=0)) == MAX_ONE_HOT + 1, "every index has features of its own"
    mixed = make_encoder(spaces.MultiDiscrete([3, 10_000, 2]))
    assert mixed.out_features == 3 + 2 * EMBEDDING + 2
    found = mixed(torch.tensor([[1, 9_999, 0]]))[0]
    assert found[:3].tolist() == [0, 1, 0] and found[-2:].tolist() == [1, 0]


@pytest.mark.parametrize(
    "space",
    [
        spaces.MultiDiscrete(np.broadcast_to([11, 6, 4], (7, 7, 3)).copy()),
        spaces.MultiDiscrete(np.full(40, 9)),
        spaces.MultiDiscrete([2, 3, 2, 3, 2], start=[1, 0, 1, 0, 1]),
        spaces.MultiDiscrete([2, 2, 2], start=[0, 5, 0]),
        spaces.MultiDiscrete([2, 5_000, 2, 5_000]),
    ],
)
def test_alike_columns_are_encoded_at_once_in_the_order_of_all(space: spaces.MultiDiscrete) -> None:
    """Column by column is what it must come to."""
    encoder = Indices(space)
    low, high = torch.as_tensor(space.start).ravel(), torch.as_tensor(space.nvec + space.start).ravel()
    index = (low + torch.rand(6, len(low), generator=torch.Generator().manual_seed(0)) * (high - low)).long()
    embeddings = iter(encoder.embeddings)
    expected = [
        next(embeddings)(c - s) if n > MAX_ONE_HOT else torch.nn.functional.one_hot(c - s, n)
        for c, s, n in zip(index.T, encoder.starts, encoder.sizes, strict=True)
    ]
    found = encoder(index.view(6, *space.shape))
    assert found.equal(torch.cat(expected, -1).float()) and found.shape == (6, encoder.out_features)
    assert encoder(index.view(6, *space.shape)[:0]).shape == (0, encoder.out_features)
    with pytest.raises((RuntimeError, IndexError), match=r"out of (bounds|range)"):
        encoder(index.view(6, *space.shape) + 5_000)


@pytest.mark.parametrize("n", [2, 1025, 1_000_000, 1_000_001])
def test_quotient_and_remainder_stay_inside_their_tables(n: int) -> None:
    embedding = Embedding(n)
    assert sum(p.numel() for p in embedding.parameters()) <= EMBEDDING * (2 * n**0.5 + 3)
    index = torch.tensor([0, 1, n // 2, n - 1])
    assert embedding(index).shape == (4, 2 * EMBEDDING)
    assert int(index[-1] // embedding.base) < len(embedding.quotient)


def test_embeddings_map_over_runs_and_are_exported(tmp_path: Path) -> None:
    space, action = spaces.Discrete(1_000_000), spaces.Discrete(3)
    options = network_options(NetworkConfig(hidden=(8,)))
    modules = [build_seeded(lambda: make_actor("categorical", space, action, options), seed) for seed in range(2)]
    policy = Policy(EnvSpec("Test-v0", space, action), modules[0])
    save_policy(policy, tmp_path)
    index = torch.randint(1_000_000, (2, 5))
    expected = torch.stack([m(row) for m, row in zip(modules, index, strict=True)])
    assert np.array_equal(load_policy(tmp_path)(index[0].numpy()), policy(index[0].numpy()))
    stacked = Net(modules)
    together = torch.vmap(stacked)(stacked.params, index)
    torch.testing.assert_close(together, expected)
    gradients = torch.autograd.grad(together.sum(), stacked.leaves)
    assert all(g.isfinite().all() for g in gradients)
    critic = Critic(space, NetworkConfig(hidden=(8,)), outputs=3)
    assert len(critic.encoders) == 2 and critic(index[0]).shape == (2, 5, 3)
