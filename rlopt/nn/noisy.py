"""Layers of Q-networks: noise in the weights (Fortunato et al. 2018, "Noisy Networks for Exploration", arXiv
1706.10295) and two streams (Wang et al. 2016, "Dueling Network Architectures", arXiv 1511.06581).

Noise is an argument, never state: a network with given parameters and noise is a pure function, which ``torch.func``
can map and a graph can replay.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from rlopt.nn.networks import MLP, NetworkConfig, _Perceptron, hidden_product


class NoisyLinear(nn.Linear):
    """A linear layer with weights μ + σ ⊙ ε and biases likewise, ε factorised: f(ε_out) f(ε_in)ᵀ, f(x) = sgn(x) √|x|
    (eq. 10 and 11). Without noise it is the layer of the means.

    Args:
        sigma: σ₀; every σ begins as σ₀ / √in (section 3.2), the means as those of ``nn.Linear``, which are the paper's.
    """

    def __init__(self, in_features: int, out_features: int, sigma: float = 0.5) -> None:
        super().__init__(in_features, out_features)
        start = sigma / math.sqrt(in_features)
        self.weight_sigma = nn.Parameter(torch.full((out_features, in_features), start))
        self.bias_sigma = nn.Parameter(torch.full((out_features,), start))
        self.noise_size = in_features + out_features

    def drawn(self, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return weights and biases under ``noise`` (in + out,), standard normal."""
        if noise is None:
            return self.weight, self.bias
        noise = noise.sign() * noise.abs().sqrt()
        inner, outer = noise[: self.in_features], noise[self.in_features :]
        return torch.addcmul(self.weight, self.weight_sigma, outer[:, None] * inner), torch.addcmul(
            self.bias, self.bias_sigma, outer
        )

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, *self.drawn(noise))


class NoisyMLP(_Perceptron):
    """An ``MLP`` of noisy layers."""

    def __init__(
        self, in_features: int, out_features: int, config: NetworkConfig, gain: float = 1.0, sigma: float = 0.5
    ) -> None:
        sizes = (in_features, *config.widths, out_features)
        super().__init__(sizes, config, gain, partial(NoisyLinear, sigma=sigma), nn.LayerNorm)
        self.noise_sizes = [a + b for a, b in pairwise(sizes)]
        self.noise_size = sum(self.noise_sizes)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return outputs (…, out) of features (…, in); ``noise`` (noise_size,) is that of all layers."""
        parts = [None] * len(self.noise_sizes) if noise is None else torch.split(noise, self.noise_sizes)
        for i, (layer, part) in enumerate(zip(self.layers, parts, strict=True)):
            assert isinstance(layer, NoisyLinear)
            weight, bias = layer.drawn(part)
            last = i == len(self.noise_sizes) - 1
            x = nn.functional.linear(x, weight, bias) if i == 0 or last else hidden_product(x, weight, bias)
            if not last:
                x = self.activation(x if self.norms is None else self.norms[i](x))
        return x


class QBody(nn.Module):
    """Features (…, F) to outputs (…, K, Z) of K actions.

    ``dueling``: a stream for the state's value and one for the actions' advantages, each with hidden layers of its own,
    V + A - mean_a A (Wang et al., eq. 9). ``sigma``: noisy layers that begin with this σ₀.
    """

    def __init__(
        self, features: int, actions: int, size: int, config: NetworkConfig, dueling: bool, sigma: float | None
    ) -> None:
        super().__init__()
        self.size = size
        gain = 1.0 if config.value_gain is None else config.value_gain
        make = MLP if sigma is None else partial(NoisyMLP, sigma=sigma)
        self.main = make(features, actions * size, config, gain)
        self.value = make(features, size, config, gain) if dueling else None
        streams = [stream for stream in (self.main, self.value) if isinstance(stream, NoisyMLP)]
        self.noise_sizes = [stream.noise_size for stream in streams]
        self.noise_size = sum(self.noise_sizes)
        """Numbers of noise that it takes; 0 where no layer is noisy."""

    @property
    def layers(self) -> nn.ModuleList:
        """Those that give the actions' outputs."""
        return self.main.layers

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        parts = [()] * 2 if noise is None else [(part,) for part in torch.split(noise, self.noise_sizes)]
        outputs: Tensor = self.main(x, *parts[0]).unflatten(-1, (-1, self.size))
        if self.value is None:
            return outputs
        value: Tensor = self.value(x, *parts[1])
        return value.unsqueeze(-2) + outputs - outputs.mean(-2, keepdim=True)
