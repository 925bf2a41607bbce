"""Which transitions are drawn. A sampler returns slots and weights, hears of every write, and owns its generator."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from rlopt.random import generator_state, set_generator_state, torch_generator
from rlopt.types import State


class Sampler(Protocol):
    """Chooses slots of a ring of ``slots`` transitions. Slot numbers are flat: ``row * num_envs + environment``."""

    name: ClassVar[str]
    prefetchable: ClassVar[bool]
    """Whether draws depend on nothing but the writes, so that several minibatches can be drawn ahead of their
    updates."""

    def bind(self, slots: int, device: torch.device, seed: int) -> None:
        """Called once by the buffer that owns this sampler."""
        ...

    def wrote(self, first: int, count: int) -> None:
        """Slots ``first … first + count - 1`` (no wrap-around) now hold new transitions."""
        ...

    def sample(self, batch_size: int, size: int) -> tuple[Tensor, Tensor | None]:
        """``batch_size`` slots (B,) int64 among the first ``size`` written ones, and importance weights (B,) or None
        for 1."""
        ...

    def update_priority(self, index: Tensor, priority: Tensor) -> None:
        """New priorities (B,) of slots ``index`` (B,); ignored by samplers without priorities."""
        ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


class UniformSampler:
    """Every stored transition with equal probability, with replacement."""

    name: ClassVar[str] = "uniform"
    prefetchable: ClassVar[bool] = True

    def bind(self, slots: int, device: torch.device, seed: int) -> None:
        self.device = device
        self.generator = torch_generator(seed, "sampler", device=device)

    def wrote(self, first: int, count: int) -> None:
        pass

    def sample(self, batch_size: int, size: int) -> tuple[Tensor, Tensor | None]:
        return torch.randint(size, (batch_size,), generator=self.generator, device=self.device), None

    def update_priority(self, index: Tensor, priority: Tensor) -> None:
        pass

    def state_dict(self) -> State:
        return {"generator": generator_state(self.generator)}

    def load_state_dict(self, state: State) -> None:
        set_generator_state(self.generator, state["generator"])
