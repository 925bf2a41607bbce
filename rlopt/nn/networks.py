"""Bodies of actors and critics: multilayer perceptrons, alone and in ensembles, and how they begin."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlopt.allocation import refuse_unless_free
from rlopt.types import option

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
"""What ``precision=`` may say, and the type of the products between hidden layers."""

_hidden_dtype: ContextVar[torch.dtype] = ContextVar("hidden_dtype", default=torch.float32)

log = logging.getLogger(__name__)

TALL = 512
"""Rows from which on a CPU computes an ensemble's networks one after the other."""
LARGE = 50_000_000
"""Weights from which on it is said that they are being made."""


@contextmanager
def hidden_products(dtype: torch.dtype) -> Iterator[None]:
    """Let networks multiply in ``dtype`` between hidden layers. What touches an input, an output or a bias stays
    float32, and so do the parameters: eight bits of mantissa are too few for a value or an observation. (Convolutions
    have their biases and what lies between them in ``dtype`` too; bytes it holds exactly.)"""
    token = _hidden_dtype.set(dtype)
    try:
        yield
    finally:
        _hidden_dtype.reset(token)


def hidden_dtype() -> torch.dtype:
    """Return what hidden products are computed in at present."""
    return _hidden_dtype.get()


def hidden_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Return ``layer(x)`` of an ``nn.Linear`` between hidden layers."""
    if hidden_dtype() == torch.float32:
        return layer(x)  # type: ignore[no-any-return]
    assert isinstance(layer, nn.Linear)
    return hidden_product(x, layer.weight, layer.bias)


def hidden_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return x Wᵀ + b of a layer between hidden layers."""
    dtype = hidden_dtype()
    if dtype == torch.float32:
        return F.linear(x, weight, bias)
    return F.linear(x.to(dtype), weight.to(dtype)).float() + bias


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "tanh": torch.tanh, "elu": F.elu, "silu": F.silu}
MEMORIES = ("none", "gru")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The shape of actor and critics, and how their weights begin."""

    encoder: str = option("auto", "how observations are read: auto, flatten, a word of `rlopt list networks`")
    hidden: tuple[int, ...] | None = option(
        (256, 256), "widths of the hidden layers (null: none behind an image's network, else 256, 256)", low=1
    )
    critic_hidden: tuple[int, ...] | None = option(None, "those of critics (null: hidden)", low=1)
    activation: str = option("relu", "non-linearity of the hidden layers", choices=tuple(ACTIVATIONS))
    norm: str = option("none", "what normalises a hidden layer before its non-linearity", choices=("none", "layer"))
    memory: str = option("none", "what stands between encoder and hidden layers", choices=MEMORIES)
    memory_size: int | None = option(
        None, "numbers that the memory keeps (null: 128)", low=1, needs={"memory": MEMORIES[1:]}
    )
    init: str = option("default", "initial weights (default: torch's)", choices=("default", "orthogonal"))
    policy_gain: float | None = option(
        None,
        "init=orthogonal: gain of an actor's last layer (null: 0.01; elsewhere it is √2)",
        above=0.0,
        needs={"init": ("orthogonal",)},
    )
    value_gain: float | None = option(
        None,
        "init=orthogonal: gain of a critic's last layer (null: 1)",
        above=0.0,
        needs={"init": ("orthogonal",)},
    )

    @property
    def widths(self) -> tuple[int, ...]:
        """Those of the hidden layers."""
        return (256, 256) if self.hidden is None else self.hidden

    def of_critic(self) -> NetworkConfig:
        """Return the configuration as critics read it."""
        return self if self.critic_hidden is None else replace(self, hidden=self.critic_hidden, critic_hidden=None)


def network_options(config: NetworkConfig) -> dict[str, Any]:
    """Return what an actor reads of a network configuration, as plain JSON values."""
    options = {**asdict(config), "hidden": None if config.hidden is None else list(config.hidden)}
    return {name: value for name, value in options.items() if name not in ("critic_hidden", "value_gain")}


def initialise(module: nn.Module, config: NetworkConfig, gain: float = math.sqrt(2.0)) -> None:
    """Draw the weights inside ``module`` again as ``config.init`` says.

    ``orthogonal``: orthogonal matrices times ``gain``, biases 0 (PPO as Andrychowicz et al. 2021, arXiv 2006.05990, and
    CleanRL have it); ``default`` leaves everything as torch drew it.
    """
    if config.init == "default":
        return
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | EnsembleLinear):
            members = layer.weight.data.transpose(1, 2) if isinstance(layer, EnsembleLinear) else [layer.weight.data]
            for weight in members:
                nn.init.orthogonal_(weight, gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class EnsembleLinear(nn.Module):
    """E linear layers as one batched product: (E, B, in) to (E, B, out). Initialised like ``nn.Linear``."""

    def __init__(self, ensemble: int, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(ensemble, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(ensemble, 1, out_features).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class EnsembleLayerNorm(nn.Module):
    """E layer normalisations, each with its own gain and offset: (E, B, F) to (E, B, F)."""

    def __init__(self, ensemble: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ensemble, 1, features))
        self.bias = nn.Parameter(torch.zeros(ensemble, 1, features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, self.weight, F.layer_norm(x, x.shape[-1:]))


class _Perceptron(nn.Module):
    """What one network and an ensemble share: hidden layers, each normalised where the configuration says so."""

    layers: nn.ModuleList
    norms: nn.ModuleList | None

    def __init__(
        self, sizes: tuple[int, ...], config: NetworkConfig, gain: float, linear: Any, norm: Callable[[int], nn.Module],
        members: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        weights = members * sum(a * b for a, b in pairwise(sizes))
        # Weights, their gradient and what an optimiser keeps of each.
        drawn = torch.get_default_device().type != "meta"  # else only shapes are asked for
        if drawn:
            refuse_unless_free(16 * weights, f"a network of {weights:,} weights", "make agent.network.hidden smaller")
        if drawn and weights > LARGE:
            log.info("building a network of %s weights", f"{weights:,}")
        self.layers = nn.ModuleList(linear(a, b) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(norm(width) for width in sizes[1:-1]) if config.norm == "layer" else None
        self.activation = ACTIVATIONS[config.activation]
        initialise(self.layers[:-1], config)
        initialise(self.layers[-1], config, gain)

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers  # a slice of a ModuleList would be a new module in every call
        for i, layer in enumerate(hidden):
            x = layer(x) if i == 0 else self._hidden(layer, x)
            x = self.activation(x if self.norms is None else self.norms[i](x))
        return last(x)  # type: ignore[no-any-return]

    @staticmethod
    def _hidden(layer: nn.Module, x: Tensor) -> Tensor:
        raise NotImplementedError


class MLP(_Perceptron):
    """Hidden layers and a linear output: (…, in_features) to (…, out_features)."""

    def __init__(self, in_features: int, out_features: int, config: NetworkConfig, gain: float = 1.0) -> None:
        super().__init__((in_features, *config.widths, out_features), config, gain, nn.Linear, nn.LayerNorm)

    _hidden = staticmethod(hidden_linear)


class EnsembleMLP(_Perceptron):
    """E independent MLPs as one batched network: (B, in) or (E, B, in) to (E, B, out)."""

    def __init__(
        self, ensemble: int, in_features: int, out_features: int, config: NetworkConfig, gain: float = 1.0
    ) -> None:
        linear, norm = partial(EnsembleLinear, ensemble), partial(EnsembleLayerNorm, ensemble)
        super().__init__((in_features, *config.widths, out_features), config, gain, linear, norm, ensemble)
        self.ensemble = ensemble

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(self.ensemble, *x.shape) if x.dim() == 2 else x
        plain = self.ensemble > 1 and self.norms is None and hidden_dtype() == torch.float32
        return self._in_turn(x) if plain and x.is_cpu and x.shape[1] >= TALL else super().forward(x)

    def _in_turn(self, x: Tensor) -> Tensor:
        """Return the same one network after the other: what a layer gives is still in the core's cache when the next
        one reads it."""
        every: Any = self.layers
        weights, biases = [layer.weight.unbind() for layer in every], [layer.bias.unbind() for layer in every]
        found = []
        for e, y in enumerate(x.unbind()):
            for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                y = torch.addmm(bias[e], self.activation(y) if i else y, weight[e])
            found.append(y)
        return torch.stack(found)

    @staticmethod
    def _hidden(layer: nn.Module, x: Tensor) -> Tensor:
        dtype = hidden_dtype()
        if dtype == torch.float32:
            return layer(x)  # type: ignore[no-any-return]
        assert isinstance(layer, EnsembleLinear)
        return torch.bmm(x.to(dtype), layer.weight.to(dtype)).float() + layer.bias
