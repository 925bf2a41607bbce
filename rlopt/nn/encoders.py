"""What turns observations into features. Which encoder reads an observation is decided here, never in an agent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from rlopt.nn.networks import NetworkConfig, hidden_dtype, hidden_linear, initialise
from rlopt.types import Obs, RloptError, Space, encoded_leaves, one_line, shape_of

LARGE, SMALL = 36, 7
"""Pixels of the shorter side from which on ``auto`` takes ``nature_cnn``, whose filters fit no smaller image, and
``small_cnn``; what is smaller still is flattened."""
MAX_ONE_HOT = 1024
"""Indices of a Discrete space (or of a part of MultiDiscrete) up to which they are one-hot; beyond, embedded."""
EMBEDDING = 64
"""Features of each of the two tables of an ``Embedding``."""


# Images


class Pixels(nn.Module):
    """Images of a space as (B, C, H, W) and between 0 and 1, by the space's bounds; where it has none, as they are.

    An image is (H, W), (C, H, W) or (H, W, C), or a stack of k such, (k, C, H, W) or (k, H, W, C), whose frames become
    channels. Which of three axes is the channels' is told by the other two being equal, or else by being the smaller
    one of first and last.
    """

    low: Tensor
    span: Tensor

    def __init__(self, space: Space) -> None:
        super().__init__()
        shape = shape_of(space)
        if len(shape) not in (2, 3, 4):
            raise RloptError(f"an image has two, three or four axes, not {shape}")
        frame = (1, *shape) if len(shape) == 2 else shape[-3:]
        first, middle, last = frame
        self.grey, self.stacked = len(shape) == 2, len(shape) == 4
        self.channels_last = len(shape) > 2 and middle != last and (first == middle or last < first)
        channels, height, width = (last, first, middle) if self.channels_last else frame
        self.size = (channels * (shape[0] if self.stacked else 1), height, width)
        low, high = box_bounds(space)
        self.bytes = is_bytes(space)
        finite = bool(np.isfinite(low).all() and np.isfinite(high).all())
        self.scaled = finite and not self.bytes and bool(((low < 0) | (high > 1)).any())
        if self.scaled:
            span = np.where(high > low, high.astype(np.float64) - low, 1.0)
            self.register_buffer("low", torch.as_tensor(low.astype(np.float32)), persistent=False)
            self.register_buffer("span", torch.as_tensor(span.astype(np.float32)), persistent=False)

    def arrange(self, x: Tensor) -> Tensor:
        """Return images (B, …) as (B, C, H, W), of the same numbers."""
        if self.grey:
            return x.unsqueeze(-3)
        if self.channels_last:
            x = x.movedim(-1, -3)
        return x.flatten(-4, -3) if self.stacked else x

    def forward(self, x: Tensor) -> Tensor:
        if self.bytes:
            return self.arrange(x).float() / 255.0
        if self.scaled:
            x = (x.float() - self.low) / self.span
        return self.arrange(x).float()


class Conv(nn.Conv2d):
    """A convolution that is a hidden product: where ``hidden_products`` says so it takes and gives bf16, as
    ``torch.autocast`` has it (rounded once, after its bias; sums inside are float32).

    With the weights of R runs, (R, out, in, k, k), it takes images (R, B, …).
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, hidden_dtype())

    def product(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        assert self.bias is not None
        operands = x.to(dtype), weight.to(dtype), self.bias.to(dtype)
        if weight.dim() == 4:
            return F.conv2d(*operands, self.stride, self.padding)
        return torch.stack([F.conv2d(*run, self.stride, self.padding) for run in zip(*operands, strict=True)])


class FirstConv(Conv):
    """The convolution that reads an image. Of bytes the weights are scaled in the pixels' place, which then lose
    nothing in bf16: it holds whole numbers up to 256. Of other images the product stays in float32."""

    def __init__(self, space: Space, out_channels: int, *args: Any, **kwargs: Any) -> None:
        pixels = Pixels(space)
        super().__init__(pixels.size[0], out_channels, *args, **kwargs)
        self.pixels = pixels

    def forward(self, obs: Tensor) -> Tensor:
        if not self.pixels.bytes:
            return self.product(channels_last(self.pixels(obs)), self.weight, torch.float32)
        dtype = hidden_dtype()
        return self.product(channels_last(self.pixels.arrange(obs).to(dtype)), self.weight / 255.0, dtype)


def channels_last(x: Tensor) -> Tensor:
    """Return images (…, C, H, W) with the channels of a pixel side by side in memory, an order that the convolutions
    behind keep. On a CPU the gradient of the first one's weights is then found in a third of the time, and without it
    bf16 would not pay; a GPU's float32 stays as it is."""
    if x.dtype == torch.float32 and not x.is_cpu:
        return x
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)


class CNN(nn.Module):
    """Convolutions, then one layer of ``out_features`` or none: images (B, …) to (B, out_features)."""

    smallest: int
    """Pixels that height and width must have."""
    name: str
    head: nn.Linear | None

    def __init__(self, space: Space, out_features: int | None) -> None:
        super().__init__()
        _, height, width = Pixels(space).size
        if min(height, width) < self.smallest:
            raise RloptError(
                f"network.encoder={self.name} needs images of at least {self.smallest}x{self.smallest}, not "
                f"{height}x{width}; use auto or flatten"
            )
        self.body = self.convolutions(space)
        channels, self.head = 0, None
        for layer in self.body:
            if isinstance(layer, nn.Conv2d):
                channels = layer.out_channels
            if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
                height, width = after(layer, height), after(layer, width)
        self.out_features = channels * height * width
        if out_features is not None:
            self.head, self.out_features = nn.Linear(self.out_features, out_features), out_features

    def convolutions(self, space: Space) -> nn.Sequential:
        """Return the layers before the last."""
        raise NotImplementedError

    def forward(self, obs: Tensor) -> Tensor:
        x: Tensor = self.body(obs).flatten(-3)
        return x.float() if self.head is None else F.relu(hidden_linear(self.head, x))


def after(layer: nn.Conv2d | nn.MaxPool2d, side: int) -> int:
    """Return how many pixels of a side are left after a layer."""
    options = (layer.kernel_size, layer.stride, layer.padding)
    kernel, stride, padding = (int(x if isinstance(x, int) else x[0]) for x in options)
    return (side + 2 * padding - kernel) // stride + 1


class NatureCNN(CNN):
    """The network of Mnih et al. 2015, for images of 84x84."""

    name, smallest = "nature_cnn", LARGE

    def __init__(self, space: Space, out_features: int | None = 512) -> None:
        super().__init__(space, out_features)

    def convolutions(self, space: Space) -> nn.Sequential:
        return nn.Sequential(
            FirstConv(space, 32, 8, 4), nn.ReLU(True), Conv(32, 64, 4, 2), nn.ReLU(True), Conv(64, 64, 3), nn.ReLU(True)
        )


class NatureConv(NatureCNN):
    """The convolutions of ``nature_cnn`` alone, for two streams or noisy layers, which begin behind them."""

    name = "nature_conv"

    def __init__(self, space: Space) -> None:
        super().__init__(space, None)


class SmallCNN(CNN):
    """The network of MinAtar (Young and Tian 2019, arXiv 1903.03176), for images of 10x10."""

    name, smallest = "small_cnn", 3

    def __init__(self, space: Space) -> None:
        super().__init__(space, 128)

    def convolutions(self, space: Space) -> nn.Sequential:
        return nn.Sequential(FirstConv(space, 16, 3, 1), nn.ReLU(True))


class ImpalaCNN(CNN):
    """The large network of IMPALA (Espeholt et al. 2018, arXiv 1802.01561), without its LSTM.

    Three sections, each of a convolution, a pooling and two residual blocks.
    """

    name, smallest = "impala_cnn", 1

    def __init__(self, space: Space) -> None:
        super().__init__(space, 256)

    def convolutions(self, space: Space) -> nn.Sequential:
        layers: list[nn.Module] = []
        before = 0
        for channels in (16, 32, 32):
            first = Conv(before, channels, 3, padding=1) if layers else FirstConv(space, channels, 3, padding=1)
            layers += [first, nn.MaxPool2d(3, 2, 1), Residual(channels), Residual(channels)]
            before = channels
        return nn.Sequential(*layers, nn.ReLU())


class Residual(nn.Module):
    """x + two convolutions of it, each after a ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(), Conv(channels, channels, 3, padding=1), nn.ReLU(), Conv(channels, channels, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)  # type: ignore[no-any-return]


def is_image(space: Space) -> bool:
    """Return whether ``auto`` reads a leaf as an image: bytes of two to four axes, or other numbers with finite bounds
    of three or four, of at least ``SMALL`` pixels each way. (A bounded matrix is more often a table.)"""
    if not isinstance(space, spaces.Box | spaces.MultiBinary):
        return False
    axes, low_high = len(shape_of(space)), box_bounds(space)
    if axes not in ((2, 3, 4) if space.dtype == np.uint8 else (3, 4)) or not np.isfinite(low_high).all():
        return False
    return min(Pixels(space).size[1:]) >= SMALL


def image_cnn(space: Space) -> CNN:
    """Return the network that ``auto`` takes for an image."""
    return NatureCNN(space) if min(Pixels(space).size[1:]) >= LARGE else SmallCNN(space)


# Everything else


class Embedding(nn.Module):
    """Features (…, 2 · 64) of an index below n, by quotient and remainder (Shi et al. 2019, arXiv 1909.02107).

    Two tables of about √n rows give every index features of its own, where one of n rows would make every step of an
    optimiser as slow as n.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.base = math.isqrt(n - 1) + 1
        bound = math.sqrt(3.0)  # of variance 1
        self.quotient = nn.Parameter(torch.empty(-(-n // self.base), EMBEDDING).uniform_(-bound, bound))
        self.remainder = nn.Parameter(torch.empty(self.base, EMBEDDING).uniform_(-bound, bound))

    def forward(self, index: Tensor) -> Tensor:
        quotient = F.embedding(index.div(self.base, rounding_mode="floor"), self.quotient)
        return torch.cat([quotient, F.embedding(index.remainder(self.base), self.remainder)], -1)


class Flatten(nn.Module):
    """Numbers as they are, bytes divided by 255, indices one-hot or embedded, side by side.

    (B, out_features), of all leaves but masks. Bytes are uint8 from 0 to 255; more indices than ``MAX_ONE_HOT`` are
    embedded.
    """

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.leaves = encoded_leaves(space)
        self.parts = nn.ModuleList(leaf_encoder(leaf, key) for key, leaf in self.leaves.items())
        self.out_features = sum(features_of(part) for part in self.parts)
        only = self.leaves.get("")
        self.identity = isinstance(only, spaces.Box) and len(only.shape) == 1 and not is_bytes(only)

    def forward(self, obs: Obs) -> Tensor:
        if self.identity and isinstance(obs, Tensor):
            return obs.float()
        return side_by_side(self.leaves, self.parts, obs)


class PerLeaf(nn.Module):
    """Images through a network each, everything else flattened, all side by side."""

    def __init__(self, space: Space, cnn: Callable[[Space], nn.Module] = image_cnn) -> None:
        super().__init__()
        self.leaves = encoded_leaves(space)
        # Images first. By their order: a name such as a.b or type cannot be a key of nn.ModuleDict.
        self.leaves = dict(sorted(self.leaves.items(), key=lambda item: not is_image(item[1])))
        self.parts = nn.ModuleList(
            cnn(leaf) if is_image(leaf) else leaf_encoder(leaf, key) for key, leaf in self.leaves.items()
        )
        self.out_features = sum(features_of(part) for part in self.parts)

    def forward(self, obs: Obs) -> Tensor:
        return side_by_side(self.leaves, self.parts, obs)


def features_of(encoder: nn.Module) -> int:
    """Return how many features an encoder gives."""
    return int(encoder.out_features)  # type: ignore[arg-type]


def side_by_side(leaves: dict[str, Space], parts: nn.ModuleList, obs: Obs) -> Tensor:
    """Return the features (B, F) of all leaves."""
    found = [part(obs[key] if isinstance(obs, dict) else obs) for key, part in zip(leaves, parts, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found, -1)


class Numbers(nn.Module):
    """Numbers (…, *shape) as features (…, F)."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.bytes, self.out_features, self.axes = is_bytes(space), math.prod(shape_of(space)), len(shape_of(space))

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(*x.shape[: x.dim() - self.axes], self.out_features).float()
        return x / 255.0 if self.bytes else x


class Indices(nn.Module):
    """One index (…,), or several (…, *shape), each one-hot or embedded: (…, F)."""

    def __init__(self, space: spaces.Discrete | spaces.MultiDiscrete) -> None:
        super().__init__()
        sizes = [space.n] if isinstance(space, spaces.Discrete) else space.nvec.ravel()
        self.sizes, self.starts = [int(n) for n in sizes], [int(start) for start in np.ravel(space.start)]
        self.axes = len(shape_of(space))
        self.embeddings = nn.ModuleList(Embedding(n) for n in self.sizes if n > MAX_ONE_HOT)
        self.out_features = sum(n if n <= MAX_ONE_HOT else 2 * EMBEDDING for n in self.sizes)
        # Cells of a grid, or words, are alike: all kinds at once, then all colours, is a call each instead of hundreds.
        kinds = list(zip(self.sizes, self.starts, strict=True))
        first = len(kinds) if len(self.embeddings) else 1
        self.period = next(k for k in range(first, len(kinds) + 1) if kinds == kinds[:k] * (len(kinds) // k))

    def forward(self, x: Tensor) -> Tensor:
        leading = x.shape[: x.dim() - self.axes]
        columns = x.long().reshape(*leading, len(self.sizes) // self.period, self.period).unbind(-1)
        embeddings = iter(self.embeddings)
        found = []
        for column, start, n in zip(columns, self.starts, self.sizes, strict=False):
            found.append(one_hot(column - start, n) if n <= MAX_ONE_HOT else next(embeddings)(column - start))
        return (found[0] if len(found) == 1 else torch.cat(found, -1)).reshape(*leading, self.out_features)


def one_hot(index: Tensor, n: int) -> Tensor:
    """Return float vectors (…, n) with a 1 at ``index`` (…,); ``F.one_hot`` makes integers of eight bytes first."""
    zeros = torch.zeros(*index.shape, n, dtype=torch.float32, device=index.device)
    return zeros.scatter(-1, index.unsqueeze(-1), 1.0)


def leaf_encoder(space: Space, key: str = "") -> nn.Module:
    """Return what flattens one leaf."""
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return Indices(space)
    if isinstance(space, spaces.Box | spaces.MultiBinary):
        return Numbers(space)
    raise RloptError(
        f"observation {key or 'space'} is {space}; supported are Box, Discrete, MultiDiscrete, MultiBinary, Dict"
    )


def is_bytes(space: Space) -> bool:
    """Return whether a leaf is uint8 from 0 to 255, which networks see divided by 255."""
    low, high = box_bounds(space)
    return space.dtype == np.uint8 and bool((low == 0).all() and (high == 255).all())


def box_bounds(space: Space) -> tuple[Any, Any]:
    """Return the bounds of a leaf of numbers."""
    if isinstance(space, spaces.Box):
        return space.low, space.high
    return np.zeros(shape_of(space)), np.ones(shape_of(space))


# By name


def _of_images(cnn: type[CNN]) -> Callable[[Space], nn.Module]:
    def make(space: Space) -> nn.Module:
        leaves = encoded_leaves(space)
        if list(leaves) == [""] and isinstance(leaves[""], spaces.Box) and len(shape_of(leaves[""])) in (2, 3, 4):
            return cnn(leaves[""])  # type: ignore[call-arg]
        if not any(is_image(leaf) for leaf in leaves.values()):
            raise RloptError(
                f"network.encoder={cnn.name} reads images, and there is none in {one_line(space)}; use auto or flatten"
            )
        return PerLeaf(space, cnn)

    make.__doc__ = cnn.__doc__
    return make


CNNS: dict[str, type[CNN]] = {cnn.name: cnn for cnn in (NatureCNN, NatureConv, SmallCNN, ImpalaCNN)}
ENCODERS: dict[str, Callable[[Space], nn.Module]] = {
    "flatten": Flatten,
    **{name: _of_images(cnn) for name, cnn in CNNS.items()},
}


def register_encoder(name: str, factory: Callable[[Space], nn.Module]) -> None:
    """Make ``network.encoder=name`` available. ``factory(observation_space)`` returns a module with
    ``out_features``."""
    if name in ENCODERS or name == "auto":
        raise RloptError(f"an encoder called {name!r} is registered already; choose another name")
    ENCODERS[name] = factory


def make_encoder(space: Space, name: str = "auto") -> nn.Module:
    """Return the encoder called ``name``; ``auto`` has a network for every image, by its size, and flattens the
    rest."""
    if name == "auto":
        return PerLeaf(space) if any(is_image(s) for s in encoded_leaves(space).values()) else Flatten(space)
    if name not in ENCODERS:
        raise RloptError(f"agent.network.encoder={name}: no such encoder; there are auto, {', '.join(ENCODERS)}")
    return ENCODERS[name](space)


def fitted(config: NetworkConfig, space: Space, streams: bool = False) -> NetworkConfig:
    """Return the network that ``config`` means for a space where it leaves the hidden layers open: none behind an
    image's network, which ends in one; where ``streams`` begin behind the convolutions, theirs is in each of them."""
    images = [leaf for leaf in encoded_leaves(space).values() if is_image(leaf)]
    if config.hidden is not None or not images:
        return config
    large = len(encoded_leaves(space)) == 1 and min(Pixels(images[0]).size[1:]) >= LARGE
    if streams and large and config.encoder == "auto":
        config = replace(config, encoder=NatureConv.name)
    if config.encoder != "auto" and config.encoder not in CNNS:
        return config
    return replace(config, hidden=(512,) if config.encoder == NatureConv.name else ())


def encoder_of(space: Space, config: NetworkConfig) -> nn.Module:
    """Return the encoder that ``config`` describes, with its initial weights."""
    encoder = make_encoder(space, config.encoder)
    initialise(encoder, config)
    return encoder
