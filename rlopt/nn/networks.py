"""Encoders, bodies, critics. Which encoder reads an observation is decided here, never in an agent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from rlopt.types import Obs, RloptError, Space, encoded_leaves, option

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
"""What ``precision=`` may say, and the type of the products between hidden layers."""

_hidden_dtype: ContextVar[torch.dtype] = ContextVar("hidden_dtype", default=torch.float32)


@contextmanager
def hidden_products(dtype: torch.dtype) -> Iterator[None]:
    """Inside, networks multiply between hidden layers in ``dtype``. What touches an input, an output or a bias stays
    float32, and so do the parameters: eight bits of mantissa are too few for a value or an observation."""
    token = _hidden_dtype.set(dtype)
    try:
        yield
    finally:
        _hidden_dtype.reset(token)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "tanh": torch.tanh, "elu": F.elu, "silu": F.silu}


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The shape of actor and critics."""

    encoder: str = option("auto", "how observations are read: auto, flatten, nature_cnn, or a registered name")
    hidden: tuple[int, ...] = option((256, 256), "widths of the hidden layers", low=1)
    activation: str = option("relu", "non-linearity of the hidden layers", choices=tuple(ACTIVATIONS))


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


class MLP(nn.Module):
    """Hidden layers and a linear output: (B, in_features) to (B, out_features)."""

    def __init__(self, in_features: int, out_features: int, config: NetworkConfig) -> None:
        super().__init__()
        sizes = (in_features, *config.hidden, out_features)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers[:-1]):
            x = self.activation(layer(x) if i == 0 else self._hidden(layer, x))
        return self.layers[-1](x)  # type: ignore[no-any-return]

    @staticmethod
    def _hidden(layer: nn.Module, x: Tensor) -> Tensor:
        dtype = _hidden_dtype.get()
        if dtype == torch.float32:
            return layer(x)  # type: ignore[no-any-return]
        assert isinstance(layer, nn.Linear)
        return F.linear(x.to(dtype), layer.weight.to(dtype)).float() + layer.bias


class EnsembleLinear(nn.Module):
    """E linear layers as one batched product: (E, B, in) to (E, B, out). Initialised like ``nn.Linear``."""

    def __init__(self, ensemble: int, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(ensemble, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(ensemble, 1, out_features).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class EnsembleMLP(nn.Module):
    """E independent MLPs as one batched network: (B, in) or (E, B, in) to (E, B, out)."""

    def __init__(self, ensemble: int, in_features: int, out_features: int, config: NetworkConfig) -> None:
        super().__init__()
        sizes = (in_features, *config.hidden, out_features)
        self.layers = nn.ModuleList(EnsembleLinear(ensemble, a, b) for a, b in pairwise(sizes))
        self.activation = ACTIVATIONS[config.activation]
        self.ensemble = ensemble

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            x = x.expand(self.ensemble, *x.shape)
        for i, layer in enumerate(self.layers[:-1]):
            x = self.activation(layer(x) if i == 0 else self._hidden(layer, x))
        return self.layers[-1](x)  # type: ignore[no-any-return]

    @staticmethod
    def _hidden(layer: nn.Module, x: Tensor) -> Tensor:
        dtype = _hidden_dtype.get()
        if dtype == torch.float32:
            return layer(x)  # type: ignore[no-any-return]
        assert isinstance(layer, EnsembleLinear)
        return torch.bmm(x.to(dtype), layer.weight.to(dtype)).float() + layer.bias


class Critic(nn.Module):
    """E independent value functions that share nothing: Q(s, a) or V(s) (E, B), or Q(s, ·) (E, B, K).

    ``action_features`` is A for Q(s, a), 0 for Q(s, ·) and V(s); ``outputs`` is K for Q(s, ·) over K discrete actions.
    """

    def __init__(
        self,
        space: Space,
        config: NetworkConfig,
        action_features: int = 0,
        outputs: int | None = None,
        ensemble: int = 2,
    ) -> None:
        super().__init__()
        first = make_encoder(space, config.encoder)
        shared = next(first.parameters(), None) is None
        rest = [] if shared else [make_encoder(space, config.encoder) for _ in range(ensemble - 1)]
        self.encoders = nn.ModuleList([first, *rest])
        features = int(first.out_features)  # type: ignore[arg-type]
        self.scalar = outputs is None
        self.body = EnsembleMLP(ensemble, features + action_features, outputs or 1, config)

    def forward(self, obs: Obs, action: Tensor | None = None) -> Tensor:
        if len(self.encoders) == 1:
            x = self.encoders[0](obs)
        else:
            x = torch.stack([encoder(obs) for encoder in self.encoders])
        if action is not None:
            x = torch.cat([x, action if x.dim() == 2 else action.expand(x.shape[0], *action.shape)], -1)
        q: Tensor = self.body(x)
        return q.squeeze(-1) if self.scalar else q
