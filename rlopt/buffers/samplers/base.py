"""Which transitions are drawn. A sampler returns slots and weights, hears of every write, and owns its generator."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from rlopt.random import generator_state, set_generator_state, torch_generator
from rlopt.types import RloptError, State


class Sampler(Protocol):
    """Chooses slots of a ring of ``slots`` transitions. Slot numbers are flat: ``row * num_envs + environment``."""

    name: ClassVar[str]
    excludes_invalid: ClassVar[bool]
    """Whether slots that hold no transition are never returned; where False, the buffer draws those again."""

    def bind(self, slots: int, device: torch.device, seed: int) -> None:
        """Called once by the buffer that owns this sampler."""
        ...

    def wrote(self, first: int, count: int, valid: Tensor | None) -> None:
        """Slots ``first … first + count - 1`` (no wrap-around) now hold new transitions; ``valid`` (count,) bool says
        which of them are transitions at all, None that all are."""
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
    excludes_invalid: ClassVar[bool] = False

    def bind(self, slots: int, device: torch.device, seed: int) -> None:
        self.device = device
        self.generator = torch_generator(seed, "sampler", device=device)

    def wrote(self, first: int, count: int, valid: Tensor | None) -> None:
        pass

    def sample(self, batch_size: int, size: int) -> tuple[Tensor, Tensor | None]:
        return torch.randint(size, (batch_size,), generator=self.generator, device=self.device), None

    def update_priority(self, index: Tensor, priority: Tensor) -> None:
        pass

    def state_dict(self) -> State:
        return {"generator": generator_state(self.generator)}

    def load_state_dict(self, state: State) -> None:
        set_generator_state(self.generator, state["generator"])


class Validity:
    """Which slots hold transitions, for samplers that never return the others. Costs nothing while all do."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.slots, self.device = slots, device
        self.mask: Tensor | None = None
        """(slots,) bool; None while no slot was ever written invalid. Slots never written count as valid."""
        self.invalid = 0

    def wrote(self, first: int, count: int, valid: Tensor | None) -> None:
        if self.mask is None:
            if valid is None:
                return
            self.mask = torch.ones(self.slots, dtype=torch.bool, device=self.device)
        if valid is None and self.invalid == 0:
            return
        written = self.mask[first : first + count]
        self.invalid -= int((~written).sum())
        written.fill_(True) if valid is None else written.copy_(valid)
        self.invalid += int((~written).sum())

    def count(self, size: int) -> int:
        """Transitions among the ``size`` slots written. Raises RloptError where there is none."""
        if size - self.invalid <= 0:
            raise RloptError("the replay buffer holds no transition yet; add some before sampling")
        return size - self.invalid

    def state_dict(self) -> State:
        return {"mask": None if self.mask is None else self.mask.clone()}

    def load_state_dict(self, state: State) -> None:
        mask = state["mask"]
        self.mask = None if mask is None else mask.to(self.device, copy=True)
        self.invalid = 0 if self.mask is None else int((~self.mask).sum())


class DistinctSampler:
    """Every stored transition with equal probability, without replacement inside a minibatch.

    The control of "Experience Replay with Random Reshuffling" (arXiv 2503.02269): it has no epochs. A minibatch larger
    than what is stored takes everything once, then again.
    """

    name: ClassVar[str] = "distinct"
    excludes_invalid: ClassVar[bool] = True

    def bind(self, slots: int, device: torch.device, seed: int) -> None:
        self.device = device
        self.generator = torch_generator(seed, "sampler", device=device)
        self.validity = Validity(slots, device)

    def wrote(self, first: int, count: int, valid: Tensor | None) -> None:
        self.validity.wrote(first, count, valid)

    def sample(self, batch_size: int, size: int) -> tuple[Tensor, Tensor | None]:
        held = self.validity.count(size)
        if batch_size > held:
            rest = self.sample(batch_size - held, size)[0]
            return torch.cat((self._smallest_keys(held, size), rest)), None
        # Redrawing what fell twice needs the host to look, and many rounds where the batch is most of the buffer.
        if self.device.type != "cpu" or held < 4 * batch_size:
            return self._smallest_keys(batch_size, size), None
        index = torch.empty(0, dtype=torch.int64)
        while (missing := batch_size - index.numel()) > 0:
            drawn = torch.randint(size, (missing,), generator=self.generator)
            if self.validity.mask is not None:
                drawn = drawn[self.validity.mask[drawn]]
            index = first_occurrences(torch.cat((index, drawn)) if index.numel() else drawn)
        return index, None

    def _smallest_keys(self, batch_size: int, size: int) -> Tensor:
        """The slots with the smallest of ``size`` random keys: exact, without a look by the host, O(size)."""
        keys = torch.rand(size, generator=self.generator, device=self.device, dtype=torch.float64)
        if self.validity.mask is not None:
            keys.masked_fill_(~self.validity.mask[:size], 2.0)
        return keys.topk(batch_size, largest=False).indices

    def update_priority(self, index: Tensor, priority: Tensor) -> None:
        pass

    def state_dict(self) -> State:
        return {"generator": generator_state(self.generator), "validity": self.validity.state_dict()}

    def load_state_dict(self, state: State) -> None:
        set_generator_state(self.generator, state["generator"])
        self.validity.load_state_dict(state["validity"])


def first_occurrences(index: Tensor) -> Tensor:
    """``index`` (K,) without later repetitions, in its own order."""
    ordered, order = index.sort(stable=True)
    again = ordered[1:] == ordered[:-1]
    if not bool(again.any()):
        return index
    keep = torch.ones_like(index, dtype=torch.bool)
    keep[order[1:][again]] = False
    return index[keep]
