"""What turns observations into features. Which encoder reads an observation is decided here, never in an agent."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from rlopt.nn.networks import NetworkConfig, initialise
from rlopt.types import Obs, RloptError, Space, encoded_leaves


class Flatten(nn.Module):
    """Vectors as they are, indices one-hot, all leaves but masks side by side: (B, out_features). No parameters."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.leaves = encoded_leaves(space)
        self.out_features = sum(leaf_features(leaf, key) for key, leaf in self.leaves.items())
        only = self.leaves.get("")
        self.identity = isinstance(only, spaces.Box) and len(only.shape) == 1

    def forward(self, obs: Obs) -> Tensor:
        if self.identity and isinstance(obs, Tensor):
            return obs.float()
        parts = [flatten_leaf(leaf, obs[key] if isinstance(obs, dict) else obs) for key, leaf in self.leaves.items()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class NatureCNN(nn.Module):
    """The three convolutions and one layer of Mnih et al. 2015 over uint8 images (B, C, H, W) or (B, H, W, C)."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        if not is_image(space):
            raise RloptError(
                f"encoder=nature_cnn reads uint8 images (C, H, W), not {space}; use encoder=auto or flatten"
            )
        assert space.shape is not None
        self.channels_last = space.shape[0] > space.shape[-1]
        channels, height, width = (space.shape[i] for i in ((2, 0, 1) if self.channels_last else (0, 1, 2)))
        if min(height, width) < 36:
            raise RloptError(
                f"encoder=nature_cnn needs images of at least 36x36, not {height}x{width}; use encoder=flatten"
            )
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3, 1),
            nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        with torch.no_grad():
            size = self.body(torch.zeros(1, channels, height, width)).shape[1]
        self.head = nn.Linear(size, 512)
        self.out_features = 512

    def forward(self, obs: Tensor) -> Tensor:
        x = obs.movedim(-1, 1) if self.channels_last else obs
        return F.relu(self.head(self.body(x.float() / 255.0)))


class PerLeaf(nn.Module):
    """Images through NatureCNN, everything else flattened, all side by side."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        leaves = encoded_leaves(space)
        # By their order: a name such as a.b or type cannot be a key of nn.ModuleDict.
        self.images = nn.ModuleList(NatureCNN(s) for s in leaves.values() if is_image(s))
        self.rest = {k: s for k, s in leaves.items() if not is_image(s)}
        self.order = [k for k, s in leaves.items() if is_image(s)]
        self.out_features = 512 * len(self.order) + sum(leaf_features(s, k) for k, s in self.rest.items())

    def forward(self, obs: Obs) -> Tensor:
        tree = obs if isinstance(obs, dict) else {"": obs}
        parts = [image(tree[k]) for k, image in zip(self.order, self.images, strict=True)]
        parts += [flatten_leaf(s, tree[k]) for k, s in self.rest.items()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


ENCODERS: dict[str, Callable[[Space], nn.Module]] = {"flatten": Flatten, "nature_cnn": NatureCNN}


def register_encoder(name: str, factory: Callable[[Space], nn.Module]) -> None:
    """Make ``network.encoder=name`` available. ``factory(observation_space)`` returns a module with
    ``out_features``."""
    if name in ENCODERS or name == "auto":
        raise RloptError(f"an encoder called {name!r} is registered already; choose another name")
    ENCODERS[name] = factory


def make_encoder(space: Space, name: str = "auto") -> nn.Module:
    """The encoder called ``name``; ``auto`` takes NatureCNN for images and flattens the rest."""
    if name == "auto":
        return PerLeaf(space) if any(is_image(s) for s in encoded_leaves(space).values()) else Flatten(space)
    if name not in ENCODERS:
        raise RloptError(f"agent.network.encoder={name}: no such encoder; there are auto, {', '.join(ENCODERS)}")
    return ENCODERS[name](space)


def encoder_of(space: Space, config: NetworkConfig) -> nn.Module:
    """Return the encoder that ``config`` describes, with its initial weights."""
    encoder = make_encoder(space, config.encoder)
    initialise(encoder, config)
    return encoder


def is_image(space: Space) -> bool:
    """Whether a leaf is a uint8 image of three axes, at least 36 pixels wide and high."""
    if not isinstance(space, spaces.Box) or space.dtype != "uint8" or len(space.shape) != 3:
        return False
    return sorted(space.shape)[1] >= 36


def leaf_features(space: Space, key: str = "") -> int:
    """How many features ``flatten_leaf`` makes of a leaf."""
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return int(space.nvec.sum())
    if isinstance(space, spaces.Box | spaces.MultiBinary):
        return math.prod(space.shape)
    raise RloptError(
        f"observation {key or 'space'} is {space}; supported are Box, Discrete, MultiDiscrete, MultiBinary, Dict"
    )


def flatten_leaf(space: Space, x: Tensor) -> Tensor:
    """One leaf (B, …) as features (B, F): indices one-hot, everything else flattened to float32."""
    if isinstance(space, spaces.Discrete):
        return F.one_hot(x.long() - int(space.start), int(space.n)).float()
    if isinstance(space, spaces.MultiDiscrete):
        parts = zip(x.flatten(1).unbind(-1), space.start.ravel(), space.nvec.ravel(), strict=True)
        columns = [F.one_hot(c.long() - int(start), int(n)) for c, start, n in parts]
        return torch.cat(columns, -1).float()
    return x.reshape(x.shape[0], math.prod(space.shape or ())).float()
