"""The network that estimates the values of all actions, and acts by them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.nn.actors import Options, register_actor
from rlopt.nn.discrete_actors import DiscreteActor
from rlopt.nn.distributions import IMPOSSIBLE, categorical
from rlopt.nn.encoders import fitted
from rlopt.nn.networks import NetworkConfig
from rlopt.nn.noisy import QBody
from rlopt.nn.values import VALUES, CategoricalValues, QuantileValues, ScalarValues, Values
from rlopt.types import Carry, Obs, RloptError, Space, one_line


class QActor(DiscreteActor):
    """Values of the actions of a Discrete space: takes the best one, or explores ε-greedily, or by noisy weights.

    Calling it gives the values (B, K), those of actions that a leaf ``action_mask`` leaves out ``IMPOSSIBLE``, and the
    outputs (B, K, Z) that say them.

    Options: ``values`` (a word of ``VALUES``) with ``size``, ``low`` and ``high``; ``dueling`` and ``sigma`` as
    ``QBody`` has them; ``epsilon``, the fraction of random actions where it explores and nobody says another.
    """

    kind = "greedy"
    own_options: ClassVar[Options] = {
        "values": "scalar", "size": 1, "low": -10.0, "high": 10.0, "dueling": False, "sigma": None, "epsilon": 0.0,
    }  # fmt: skip
    body: QBody

    def __init__(self, observation_space: Space, action_space: Space, options: Options) -> None:
        if not isinstance(action_space, spaces.Discrete):
            fix = "use agent=sac" if isinstance(action_space, spaces.Box) else "choose another agent"
            raise RloptError(f"values are learnt of Discrete action spaces, not of {one_line(action_space)}; {fix}")
        super().__init__(observation_space, int(action_space.n), options)
        self.start, self.epsilon = int(action_space.start), float(self.own["epsilon"])
        self.form = values_of(self.own)

    def fitted(self, config: NetworkConfig, space: Space) -> NetworkConfig:
        return fitted(config, space, streams=bool(self.own["dueling"]) or self.own["sigma"] is not None)

    def make_body(self, features: int, outputs: int, config: NetworkConfig) -> QBody:
        sigma = self.own["sigma"]
        sigma = None if sigma is None else float(sigma)
        return QBody(features, outputs, values_of(self.own).size, config, bool(self.own["dueling"]), sigma)

    def forward(  # type: ignore[override]
        self,
        obs: Obs,
        noise: Tensor | None = None,
        carry: Carry = None,
        ended: Tensor | None = None,
        valid: Tensor | None = None,
        burnt: Tensor | None = None,
    ) -> Any:
        """Return values and outputs; with a memory a pair of those and the next carry, as ``NetworkActor.forward``.

        ``noise`` (``noise_size``,) is that of noisy layers, one for all rows; without it they are their means.
        """
        if self.memory is None:
            return self.head(self.body(self.encoder(obs), noise), obs)
        x, carry = self.memory.read(self.encoder, obs, carry, ended, valid, burnt)
        return self.head(self.body(x, noise), obs), carry

    def head(self, x: Tensor, obs: Obs) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().head(self.form.mean(x), obs), x

    @property
    def noise_size(self) -> int:
        """Numbers of noise that noisy layers take; 0 without any."""
        return self.body.noise_size

    @torch.no_grad()
    def act(
        self, obs: Obs, carry: Carry = None, deterministic: bool = False, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Carry]:
        noise = None if deterministic or not self.noise_size else self.weight_noise(generator)
        outputs, carry = self.read(obs, carry, noise)
        return self.choose(outputs, None if deterministic else self.noise(len(outputs[0]), generator)), carry

    def read(self, obs: Obs, carry: Carry, noise: Tensor | None = None) -> tuple[Any, Carry]:
        if self.memory is None:
            return self(obs, noise), None
        return self(obs, noise, carry)  # type: ignore[no-any-return]

    def weight_noise(self, generator: torch.Generator | None) -> Tensor:
        """Return noise (``noise_size``,) of the noisy layers."""
        return torch.randn(self.noise_size, generator=generator, device=self.device)

    def noise(self, rows: int, generator: torch.Generator | None, epsilon: float | None = None) -> Tensor:
        """Return (rows, 2): negative where a row explores, with probability ``epsilon`` (the actor's own by default),
        and what its random action is drawn with."""
        device = self.device if generator is None else generator.device
        drawn = torch.rand((rows, 2), generator=generator, device=device)
        drawn[:, 0] -= self.epsilon if epsilon is None else epsilon
        return drawn

    def choose(self, outputs: tuple[Tensor, Tensor], noise: Tensor | None) -> Tensor:
        values = outputs[0]
        best = values.argmax(-1)
        if noise is not None:
            best = torch.where(noise[..., 0] < 0, self._random(values, noise[..., 1]), best)
        return best + self.start

    def uniform(self, rows: int, generator: torch.Generator, obs: Obs | None = None) -> Tensor:
        values = torch.zeros((rows, self.actions), device=generator.device)
        if obs is not None:
            values = super().head(values, obs)
        return self._random(values, torch.rand((rows,), generator=generator, device=generator.device)) + self.start

    def _random(self, values: Tensor, uniform: Tensor) -> Tensor:
        """Return one of the actions whose values (…, K) are not ``IMPOSSIBLE``, from ``uniform`` (…,) in [0, 1)."""
        if not self.masked:
            return (uniform * self.actions).long().clamp_(max=self.actions - 1)
        return categorical(torch.zeros_like(values).masked_fill(values <= IMPOSSIBLE, IMPOSSIBLE), uniform)

    @property
    def device(self) -> torch.device:
        return next(self.body.parameters()).device


def values_of(options: Options) -> Values:
    """Return what a network's numbers per action mean, from the ``own_options`` of a ``QActor``."""
    kind, size = options["values"], int(options["size"])
    if kind == "categorical":
        return CategoricalValues(size, float(options["low"]), float(options["high"]))
    if kind == "quantile":
        return QuantileValues(size)
    if kind != "scalar":
        raise RloptError(f"values={kind}: no such form of values; choose from {', '.join(VALUES)}")
    return ScalarValues()


register_actor(QActor.kind, QActor)
