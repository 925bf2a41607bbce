"""The networks that act. Each can be exported, so each is known to a closed registry and rebuilt from plain options."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from rlopt.config import build
from rlopt.nn.boxes import agents_for, bounded_box, bounds, scale
from rlopt.nn.distributions import (
    LOG_STD_MAX,
    LOG_STD_MIN,
    gaussian_entropy,
    gaussian_log_prob,
    log_det_tanh,
)
from rlopt.nn.encoders import encoder_of, features_of, fitted
from rlopt.nn.memory import make_memory
from rlopt.nn.networks import MLP, NetworkConfig
from rlopt.types import Carry, Obs, RloptError, Space, one_line

Options = dict[str, Any]


class Actor(nn.Module):
    """A network that turns observations into actions.

    ``kind`` names it in the registry, ``options`` (plain JSON values) rebuild it: ``make_actor(kind, observation_space,
    action_space, options)``.
    """

    kind: ClassVar[str]
    options: Options
    draws: bool = False
    """Whether it needs random numbers for its most likely actions, too."""
    sees_state: bool = False
    """Whether it acts for a team by the state, which only critics see elsewhere."""

    @torch.no_grad()
    def act(
        self,
        obs: Obs,
        carry: Carry = None,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Carry]:
        """Return actions (N, A) in environment units, or (N,) int64, and the carry to act on next.

        Random actions draw from ``generator``. An episode begins with a row of ``initial_carry``.
        """
        outputs, carry = self.read(obs, carry)
        if deterministic:  # without asking for the number of rows, which an exported graph must leave open
            return self.choose(outputs, None), carry
        rows = len(outputs[0] if isinstance(outputs, tuple) else outputs)
        return self.choose(outputs, self.noise(rows, generator)), carry

    def read(self, obs: Obs, carry: Carry) -> tuple[Any, Carry]:
        """Return what the network gives for N observations, which ``choose`` takes, and the next carry."""
        return self(obs), None

    def initial_carry(self, rows: int) -> Carry:
        """Return the carry with which ``rows`` episodes begin; None of a network without a memory."""
        return None

    def facts(self, carry: Carry) -> dict[str, Tensor]:
        """Return numbers {name: (N,)} of the step that led to ``carry``, whose sums are facts of an episode."""
        return {}

    @property
    def variants(self) -> dict[str, Actor]:
        """Further ways to act with the same networks, by name, which are evaluated beside this one."""
        return {}

    def noise(self, rows: int, generator: torch.Generator | None) -> Tensor:
        """Return what ``choose`` needs for ``rows`` random actions, (rows, …)."""
        raise NotImplementedError

    def choose(self, outputs: Any, noise: Tensor | None) -> Tensor:
        """Return actions (N, …) from what the network gave for N observations; without noise the most likely ones."""
        raise NotImplementedError

    def log_prob(self, outputs: Any, action: Tensor) -> Tensor:
        """Return log π(a|s) (N,) of actions (N, …) in environment units, from what the network gave for N observations.

        Raises:
            RloptError: a policy without a density.
        """
        raise RloptError(f"a {self.kind} policy has no density: it takes one action for sure")

    def entropy(self, outputs: Any) -> Tensor:
        """Return the entropy (N,) of π(·|s) in nats.

        Raises:
            RloptError: it has no closed form.
        """
        raise RloptError(f"the entropy of a {self.kind} policy has no closed form; estimate it by -log_prob of samples")

    def uniform(self, rows: int, generator: torch.Generator, obs: Obs | None = None) -> Tensor:
        """Return uniformly random actions (rows, …), for an off-policy agent's warm-up; of those that are possible at
        ``obs``, where that has a leaf ``action_mask``."""
        raise NotImplementedError


class NetworkActor(Actor):
    """An actor of an encoder, a memory where ``options`` ask for one, hidden layers and a linear output.

    ``options`` are those of ``network_options``, and the ``own_options`` that a kind adds.
    """

    own_options: ClassVar[Options] = {}
    """{name: default} of the options that this kind has beside the network's."""

    def __init__(self, observation_space: Space, outputs: int, options: Options) -> None:
        super().__init__()
        self.options = options
        self.own: Options = {name: options.get(name, default) for name, default in self.own_options.items()}
        config = build(NetworkConfig, {k: v for k, v in options.items() if k not in self.own_options}, "network")
        config = self.fitted(config, observation_space)
        self.encoder = encoder_of(observation_space, config)
        features = features_of(self.encoder)
        self.memory = make_memory(features, config)
        self.body = self.make_body(features if self.memory is None else self.memory.size, outputs, config)

    def fitted(self, config: NetworkConfig, space: Space) -> NetworkConfig:
        """Return the network that ``config`` means for this kind."""
        return fitted(config, space)

    def make_body(self, features: int, outputs: int, config: NetworkConfig) -> nn.Module:
        """Return what follows encoder and memory."""
        return MLP(features, outputs, config, 0.01 if config.policy_gain is None else config.policy_gain)

    def forward(
        self,
        obs: Obs,
        carry: Carry = None,
        ended: Tensor | None = None,
        valid: Tensor | None = None,
        burnt: Tensor | None = None,
    ) -> Any:
        """Return what this kind computes of observations (B, …); with a memory a pair of that and the next carry.

        Of sequences (B, L, …), which are told by ``ended`` (B, L), everything is (B, L, …): see ``GRU.unroll``.
        """
        if self.memory is None:
            return self.head(self.body(self.encoder(obs)), obs)
        x, carry = self.memory.read(self.encoder, obs, carry, ended, valid, burnt)
        return self.head(self.body(x), obs), carry

    def head(self, x: Tensor, obs: Obs) -> Any:
        """Return what the outputs (…, F) of the last layer mean at observations (…,)."""
        return x

    def read(self, obs: Obs, carry: Carry) -> tuple[Any, Carry]:
        if self.memory is not None:
            return self(obs, carry)  # type: ignore[no-any-return]
        return self(obs), None

    def initial_carry(self, rows: int) -> Carry:
        return None if self.memory is None else self.memory.initial_carry(rows)


class BoundedActor(NetworkActor):
    """An actor whose outputs in [-1, 1] are scaled to a bounded Box."""

    half_range: Tensor
    divisor: Tensor
    centre: Tensor

    def __init__(self, observation_space: Space, action_space: Space, options: Options, outputs: int) -> None:
        """``outputs``: of the network, per dimension of the action."""
        box = bounded_box(action_space)
        super().__init__(observation_space, outputs * math.prod(box.shape), options)
        self.action_features, self.action_shape = math.prod(box.shape), box.shape
        low, high = bounds(box)
        centre, half_range = scale(low, high)
        # A dimension whose bounds are equal has one action, which is 0 in normalised space.
        divisor = np.where(half_range > 0, half_range, np.float32(1.0))
        for name, value in (("centre", centre), ("half_range", half_range), ("divisor", divisor)):
            self.register_buffer(name, torch.as_tensor(value), persistent=False)

    def normalise(self, action: Tensor) -> Tensor:
        """Turn environment units (B, …) to [-1, 1] (B, A)."""
        return (action.flatten(1) - self.centre) / self.divisor

    def to_env(self, action: Tensor) -> Tensor:
        """Turn [-1, 1] (B, A) to environment units (B, …)."""
        return torch.addcmul(self.centre, self.half_range, action).view(-1, *self.action_shape)

    def noise(self, rows: int, generator: torch.Generator | None) -> Tensor:
        return torch.randn((rows, self.action_features), generator=generator, device=self.centre.device)

    def uniform(self, rows: int, generator: torch.Generator, obs: Obs | None = None) -> Tensor:
        draw = torch.rand((rows, self.action_features), generator=generator, device=self.centre.device)
        return self.to_env(2.0 * draw - 1.0)


class SquashedGaussianActor(BoundedActor):
    """tanh of a Gaussian with state-dependent mean and standard deviation, scaled to a bounded Box (SAC)."""

    kind = "squashed_gaussian"

    def __init__(self, observation_space: Space, action_space: Space, options: Options) -> None:
        super().__init__(observation_space, action_space, options, outputs=2)

    def head(self, x: Tensor, obs: Obs) -> tuple[Tensor, Tensor]:
        """Return mean and log standard deviation, (B, A) each."""
        mean, log_std = x.chunk(2, -1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def choose(self, outputs: tuple[Tensor, Tensor], noise: Tensor | None) -> Tensor:
        mean, log_std = outputs
        return self.to_env(torch.tanh(mean if noise is None else torch.addcmul(mean, log_std.exp(), noise)))

    def log_prob(self, outputs: tuple[Tensor, Tensor], action: Tensor) -> Tensor:
        """Return log π(a|s) (N,), a density in normalised action space [-1, 1]: the Box's bounds do not enter. Of an
        action at a bound, where the density of a squashed Gaussian is not defined, that just inside."""
        edge = 1.0 - torch.finfo(torch.float32).eps
        u = self.normalise(action).clamp(-edge, edge).atanh()
        return gaussian_log_prob(*outputs, u) - log_det_tanh(u).sum(-1)


class DeterministicActor(BoundedActor):
    """tanh, scaled to a bounded Box; exploring, it adds Gaussian noise and clips (TD3).

    Option ``exploration``: the noise's standard deviation, where every dimension of the Box is [-1, 1].
    """

    kind = "deterministic"
    own_options: ClassVar[Options] = {"exploration": 0.1}

    def __init__(self, observation_space: Space, action_space: Space, options: Options) -> None:
        super().__init__(observation_space, action_space, options, outputs=1)
        self.exploration = float(self.own["exploration"])

    def head(self, x: Tensor, obs: Obs) -> Tensor:
        """Return actions (B, A) in [-1, 1]."""
        return torch.tanh(x)

    def choose(self, outputs: Tensor, noise: Tensor | None) -> Tensor:
        if noise is not None:
            outputs = torch.add(outputs, noise, alpha=self.exploration).clamp(-1.0, 1.0)
        return self.to_env(outputs)


class GaussianActor(NetworkActor):
    """A Gaussian with state-dependent mean and a standard deviation of its own per dimension (PPO).

    Nothing is squashed: a sample may lie outside a bounded Box. ``to_env`` clips it there, at the environment's edge,
    while log-probabilities are those of the sample itself: clipping would put finite mass on the bounds, which no
    density describes.

    Options: ``log_std``, where the logarithm of the standard deviation begins; ``unit_box``, whether samples are in
    units in which every bounded dimension is [-1, 1], instead of the environment's own.
    """

    kind = "gaussian"
    own_options: ClassVar[Options] = {"log_std": 0.0, "unit_box": False}
    low: Tensor
    high: Tensor
    centre: Tensor
    half_range: Tensor

    def __init__(self, observation_space: Space, action_space: Space, options: Options) -> None:
        if not isinstance(action_space, spaces.Box):
            raise RloptError(
                f"a Gaussian policy acts in Box action spaces, not in {one_line(action_space)}; "
                f"{agents_for(action_space)}"
            )
        super().__init__(observation_space, math.prod(action_space.shape), options)
        self.action_features, self.action_shape = math.prod(action_space.shape), action_space.shape
        self.log_std = nn.Parameter(torch.full((self.action_features,), float(self.own["log_std"])))
        low, high = bounds(action_space)
        centre, half_range = scale(low, high)
        if not self.own["unit_box"]:
            half_range = np.full_like(half_range, np.inf)
        centre = np.where(np.isfinite(half_range), centre, np.float32(0.0))
        half_range = np.where(np.isfinite(half_range), half_range, np.float32(1.0))
        for name, value in (("low", low), ("high", high), ("centre", centre), ("half_range", half_range)):
            self.register_buffer(name, torch.as_tensor(value), persistent=False)

    def head(self, x: Tensor, obs: Obs) -> tuple[Tensor, Tensor]:
        """Return mean (B, A) and log standard deviation (B, A), which is the same in every row."""
        return x, self.log_std.expand_as(x)

    def noise(self, rows: int, generator: torch.Generator | None) -> Tensor:
        return torch.randn((rows, self.action_features), generator=generator, device=self.low.device)

    def sample(self, outputs: tuple[Tensor, Tensor], noise: Tensor | None) -> Tensor:
        """Return the unclipped sample (B, A), which log-probabilities are of; without noise the mean."""
        mean, log_std = outputs
        return mean if noise is None else torch.addcmul(mean, log_std.exp(), noise)

    def to_env(self, sample: Tensor) -> Tensor:
        """Return samples (B, A) as actions (B, …) in environment units, clipped to the Box."""
        action = torch.addcmul(self.centre, self.half_range, sample)
        return action.clamp(self.low, self.high).view(-1, *self.action_shape)

    def choose(self, outputs: tuple[Tensor, Tensor], noise: Tensor | None) -> Tensor:
        return self.to_env(self.sample(outputs, noise))

    def log_prob(self, outputs: tuple[Tensor, Tensor], action: Tensor) -> Tensor:
        """Return log π (N,) of the samples that are these actions, in the units of the samples. (Of one that was
        clipped the sample is not known: learn from ``sample``, not from the action.)"""
        return gaussian_log_prob(*outputs, (action.flatten(1) - self.centre) / self.half_range)

    def entropy(self, outputs: tuple[Tensor, Tensor]) -> Tensor:
        return gaussian_entropy(outputs[1])


ACTORS: dict[str, Callable[[Space, Space, Options], Actor]] = {
    cls.kind: cls for cls in (SquashedGaussianActor, GaussianActor, DeterministicActor)
}
"""Every kind by its name; modules that define others add theirs."""


def register_actor(kind: str, factory: Callable[[Space, Space, Options], Actor]) -> None:
    """Make a kind of acting network known, so that exported policies can name it."""
    if kind in ACTORS:
        raise RloptError(f"an actor called {kind!r} is registered already; choose another name")
    ACTORS[kind] = factory


def make_actor(kind: str, observation_space: Space, action_space: Space, options: Options) -> Actor:
    """Build a registered kind of actor; an unknown kind is refused (a file never names a class freely)."""
    if kind not in ACTORS:
        raise RloptError(
            f"unknown kind of policy {kind!r}; known are {', '.join(ACTORS)} (see rlopt.nn.register_actor)"
        )
    return ACTORS[kind](observation_space, action_space, options)
