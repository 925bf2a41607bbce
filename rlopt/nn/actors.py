"""The networks that act. Each can be exported, so each is known to a closed registry and rebuilt from plain options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from rlopt.nn.distributions import LOG_STD_MAX, LOG_STD_MIN, categorical
from rlopt.nn.networks import MLP, NetworkConfig, make_encoder
from rlopt.types import Carry, Obs, RloptError, Space, one_line

Options = dict[str, Any]


class Actor(nn.Module):
    """A network that turns observations into actions.

    ``kind`` names it in the registry, ``options`` (plain JSON values) rebuild it: ``make_actor(kind, observation_space,
    action_space, options)``.
    """

    kind: ClassVar[str]
    options: Options

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
        outputs = self(obs)
        rows = len(outputs[0] if isinstance(outputs, tuple) else outputs)
        return self.choose(outputs, None if deterministic else self.noise(rows, generator)), carry

    def initial_carry(self, rows: int) -> Carry:
        """Return the carry with which ``rows`` episodes begin; None of a network without a memory."""
        return None

    def noise(self, rows: int, generator: torch.Generator | None) -> Tensor:
        """What ``choose`` needs for ``rows`` random actions, (rows, …)."""
        raise NotImplementedError

    def choose(self, outputs: Any, noise: Tensor | None) -> Tensor:
        """Actions (N, …) from what the network gave for N observations; without noise the most likely ones."""
        raise NotImplementedError

    def uniform(self, rows: int, generator: torch.Generator) -> Tensor:
        """Uniformly random actions (rows, …), for an off-policy agent's warm-up."""
        raise NotImplementedError


class SquashedGaussianActor(Actor):
    """tanh of a Gaussian with state-dependent mean and standard deviation, scaled to a bounded Box."""

    kind = "squashed_gaussian"
    half_range: Tensor
    divisor: Tensor
    centre: Tensor

    def __init__(self, observation_space: Space, action_space: Space, options: Options) -> None:
        super().__init__()
        box = bounded_box(action_space)
        self.options = options
        config = NetworkConfig(**{**options, "hidden": tuple(options["hidden"])})
        self.encoder = make_encoder(observation_space, config.encoder)
        self.action_features = int(np.prod(box.shape))
        self.action_shape = box.shape
        self.body = MLP(int(self.encoder.out_features), 2 * self.action_features, config)  # type: ignore[arg-type]
        low = torch.as_tensor(box.low, dtype=torch.float32).flatten()
        high = torch.as_tensor(box.high, dtype=torch.float32).flatten()
        self.register_buffer("centre", (low + high) / 2, persistent=False)
        self.register_buffer("half_range", (high - low) / 2, persistent=False)
        # A dimension whose bounds are equal has one action, which is 0 in normalised space.
        self.register_buffer("divisor", torch.where(high > low, (high - low) / 2, 1.0), persistent=False)

    def forward(self, obs: Obs) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation, (B, A) each."""
        mean, log_std = self.body(self.encoder(obs)).chunk(2, -1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def normalise(self, action: Tensor) -> Tensor:
        """Environment units (B, …) to [-1, 1] (B, A)."""
        return (action.flatten(1) - self.centre) / self.divisor

    def to_env(self, action: Tensor) -> Tensor:
        """[-1, 1] (B, A) to environment units (B, …)."""
        return torch.addcmul(self.centre, self.half_range, action).view(-1, *self.action_shape)

    def noise(self, rows: int, generator: torch.Generator | None) -> Tensor:
        return torch.randn((rows, self.action_features), generator=generator, device=self.centre.device)

    def choose(self, outputs: tuple[Tensor, Tensor], noise: Tensor | None) -> Tensor:
        mean, log_std = outputs
        return self.to_env(torch.tanh(mean if noise is None else torch.addcmul(mean, log_std.exp(), noise)))

    def uniform(self, rows: int, generator: torch.Generator) -> Tensor:
        draw = torch.rand((rows, self.action_features), generator=generator, device=self.centre.device)
        return self.to_env(2.0 * draw - 1.0)


class CategoricalActor(Actor):
    """A categorical distribution over a Discrete action space."""

    kind = "categorical"

    def __init__(self, observation_space: Space, action_space: Space, options: Options) -> None:
        super().__init__()
        if not isinstance(action_space, spaces.Discrete):
            fix = "use agent=sac" if isinstance(action_space, spaces.Box) else "choose another agent"
            raise RloptError(
                f"a categorical policy acts in Discrete action spaces, not in {one_line(action_space)}; {fix}"
            )
        self.options = options
        config = NetworkConfig(**{**options, "hidden": tuple(options["hidden"])})
        self.encoder = make_encoder(observation_space, config.encoder)
        self.start, self.actions = int(action_space.start), int(action_space.n)
        self.body = MLP(int(self.encoder.out_features), self.actions, config)  # type: ignore[arg-type]

    def forward(self, obs: Obs) -> Tensor:
        """Logits (B, K)."""
        logits: Tensor = self.body(self.encoder(obs))
        return logits

    def noise(self, rows: int, generator: torch.Generator | None) -> Tensor:
        return torch.rand((rows,), generator=generator, device=next(self.body.parameters()).device)

    def choose(self, outputs: Tensor, noise: Tensor | None) -> Tensor:
        return (outputs.argmax(-1) if noise is None else categorical(outputs, noise)) + self.start

    def uniform(self, rows: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.actions, (rows,), generator=generator, device=generator.device) + self.start


class TabularActor(Actor):
    """A table of action probabilities over Discrete observations: what a solver exports."""

    kind = "tabular"

    def __init__(self, observation_space: Space, action_space: Space, options: Options) -> None:
        super().__init__()
        if not (isinstance(observation_space, spaces.Discrete) and isinstance(action_space, spaces.Discrete)):
            raise RloptError(f"a tabular policy needs Discrete spaces, not {observation_space} and {action_space}")
        self.options = options
        self.start = (int(observation_space.start), int(action_space.start))
        n, k = int(observation_space.n), int(action_space.n)
        self.probabilities = nn.Parameter(torch.full((n, k), 1.0 / k, dtype=torch.float64), requires_grad=False)

    def forward(self, obs: Obs) -> Tensor:
        """Probabilities (B, K)."""
        assert isinstance(obs, Tensor)
        return self.probabilities[obs.long() - self.start[0]]

    def noise(self, rows: int, generator: torch.Generator | None) -> Tensor:
        table = self.probabilities
        return torch.rand((rows,), generator=generator, device=table.device, dtype=table.dtype)

    def choose(self, outputs: Tensor, noise: Tensor | None) -> Tensor:
        return (outputs.argmax(-1) if noise is None else categorical(outputs.log(), noise)) + self.start[1]


ACTORS: dict[str, Callable[[Space, Space, Options], Actor]] = {
    cls.kind: cls for cls in (SquashedGaussianActor, CategoricalActor, TabularActor)
}


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


def network_options(config: NetworkConfig) -> Options:
    """A network configuration as plain JSON values."""
    return {**asdict(config), "hidden": list(config.hidden)}


def bounded_box(space: Space) -> spaces.Box:
    """The action space as a bounded Box, or one clear line."""
    if not isinstance(space, spaces.Box):
        hint = "use agent=sac_discrete" if isinstance(space, spaces.Discrete) else "choose another agent"
        raise RloptError(f"this agent acts in Box action spaces, not in {one_line(space)}; {hint}")
    if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        raise RloptError(
            f"this agent needs finite bounds on every action, not {one_line(space)}; set them in the environment, "
            "or by env.wrappers=[module:Wrapper]"
        )
    return space
