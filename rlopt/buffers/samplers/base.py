"""Which transitions are drawn. A sampler returns slots and weights, hears of every write, and owns its generator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from rlopt.random import generator_state, set_generator_state, torch_generator
from rlopt.types import RloptError, State

if TYPE_CHECKING:
    from rlopt.buffers.replay import ReplayBuffer
    from rlopt.buffers.transition import Batch


class Sampler(Protocol):
    """Chooses slots of a ring of ``slots`` transitions. Slot numbers are flat: ``row * num_envs + environment``."""

    def bind(self, slots: int, device: torch.device, seed: int) -> None:
        """Begin anew for a ring of ``slots`` on ``device``; called once by the buffer that owns this sampler."""
        ...

    def wrote(self, first: int, count: int, valid: Tensor | None) -> None:
        """Hear that slots ``first … first + count - 1`` (no wrap-around) hold new transitions; ``valid`` (count,) bool
        says which of them may be drawn, None that all may."""
        ...

    def sample(self, batch_size: int, size: int) -> tuple[Tensor, Tensor | None]:
        """Return ``batch_size`` slots (B,) int64 among the first ``size`` written ones, only such as may be drawn, and
        importance weights (B,) or None for 1. Raises NothingToDraw where there is none."""
        ...

    def update_priority(self, index: Tensor, priority: Tensor) -> None:
        """Take new priorities (B,) of slots ``index`` (B,); samplers without priorities ignore them."""
        ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


class NothingToDraw(RloptError):
    """No slot may be drawn."""

    def __init__(self) -> None:
        super().__init__("the replay buffer holds no transition yet; add some before sampling")


def identity(sampler: Any) -> State:
    """Return what the state of a sampler must fit: its kind, and the ring that it draws from."""
    return {"kind": sampler.name, "slots": sampler.slots}


def check_identity(state: State, own: State, what: str) -> None:
    """Raise RloptError where a saved ``state`` says that it is ``of`` something else than ``own``."""
    saved = state.get("of")
    if not isinstance(saved, dict):
        raise RloptError(f"this is not the state of a {what}")
    for key in [*own, *(key for key in saved if key not in own)]:
        if saved.get(key) != own.get(key):
            raise RloptError(
                f"the saved {what} has {key} {saved.get(key, 'none')}, this one {own.get(key, 'none')}; make one alike"
            )


class SamplerOver:
    """Makes batches of its own of the slots that another sampler, ``inner``, chooses.

    A subclass writes ``batch`` and ``identity``; ``attach`` is called once by the buffer, after ``bind``.
    """

    def __init__(self, inner: Sampler) -> None:
        self.inner = inner

    def attach(self, buffer: ReplayBuffer) -> None:
        """Learn whose slots these are. Raises RloptError where they do not go together."""
        self.buffer = buffer

    def batch(self, index: Tensor, weight: Tensor | None) -> Batch:
        """Return the minibatch that ``inner`` chose the slots ``index`` (B,) and ``weight`` (B,) for."""
        raise NotImplementedError

    def bind(self, slots: int, device: torch.device, seed: int) -> None:
        self.inner.bind(slots, device, seed)

    def wrote(self, first: int, count: int, valid: Tensor | None) -> None:
        self.inner.wrote(first, count, valid)

    def sample(self, batch_size: int, size: int) -> tuple[Tensor, Tensor | None]:
        return self.inner.sample(batch_size, size)

    def update_priority(self, index: Tensor, priority: Tensor) -> None:
        self.inner.update_priority(index, priority)

    def identity(self) -> State:
        """Return what a state must fit beside the inner sampler's."""
        raise NotImplementedError

    def state_dict(self) -> State:
        return {"of": self.identity(), "inner": self.inner.state_dict()}

    def load_state_dict(self, state: State) -> None:
        check_identity(state, self.identity(), "sampler")
        self.inner.load_state_dict(state["inner"])


class Validity:
    """Knows which slots may be drawn. Costs nothing while all may."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.slots, self.device = slots, device
        self.mask: Tensor | None = None
        """(slots,) bool; None while no slot was ever written invalid. Slots never written count as valid."""
        self.invalid = 0
        self.position = 0
        """Where the newest write ended, once there is a mask."""
        self._queue: Tensor | None = None
        """(slots,) a ring of the valid slots, oldest first; made when ``draw`` first needs it."""
        self._head = self._tail = self._filled = 0

    def wrote(self, first: int, count: int, valid: Tensor | None) -> None:
        if self.mask is None:
            if valid is None:
                return
            self.mask = torch.ones(self.slots, dtype=torch.bool, device=self.device)
        before, self.position = self.position, first + count
        if valid is None and self.invalid == 0 and self._queue is None:
            return
        written = self.mask[first : first + count]
        gone = int((~written).sum())
        written.fill_(True) if valid is None else written.copy_(valid)
        come = int((~written).sum())
        self.invalid += come - gone
        if first != before % self.slots:
            self._queue = None  # not the order of a ring
        if self._queue is not None:
            # Rows are overwritten in the order in which they were written: their slots are the oldest of the queue.
            self._head += (count - gone) if first < self._filled else 0
            self._filled = max(self._filled, self.position)
            places = torch.arange(self._tail, self._tail + count - come, device=self.device) % self.slots
            self._queue[places] = first + written.nonzero().flatten()
            self._tail += count - come

    def count(self, size: int) -> int:
        """Return how many of the ``size`` slots written may be drawn. Raises NothingToDraw where none may."""
        if size - self.invalid <= 0:
            raise NothingToDraw
        return size - self.invalid

    def draw(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        """Return slots (``count``,) among the ``size`` written, each valid one with equal probability."""
        held = self.count(size)
        index = torch.randint(held, (count,), generator=generator, device=self.device)
        if self.mask is None:
            return index
        if self._queue is None:
            self._fill_queue(size)
        assert self._queue is not None
        return self._queue[(index + self._head) % self.slots]

    def _fill_queue(self, size: int) -> None:
        assert self.mask is not None
        order = torch.arange(size, device=self.device)
        if size == self.slots:
            order = (order + self.position) % size
        order = order[self.mask[order]]
        self._queue = torch.zeros(self.slots, dtype=torch.int64, device=self.device)
        self._queue[: order.numel()] = order
        self._head, self._tail, self._filled = 0, order.numel(), size

    def state_dict(self) -> State:
        mask = None if self.mask is None else self.mask.clone()
        return {"mask": mask, "position": self.position}

    def load_state_dict(self, state: State) -> None:
        mask = state["mask"]
        self.mask = None if mask is None else mask.to(self.device, copy=True)
        self.invalid = 0 if self.mask is None else int((~self.mask).sum())
        self.position = int(state["position"])
        self._queue = None


class UniformSampler:
    """Draws every stored transition with equal probability, with replacement."""

    name: ClassVar[str] = "uniform"

    def bind(self, slots: int, device: torch.device, seed: int) -> None:
        self.slots, self.device = slots, device
        self.generator = torch_generator(seed, "sampler", device=device)
        self.validity = Validity(slots, device)

    def wrote(self, first: int, count: int, valid: Tensor | None) -> None:
        self.validity.wrote(first, count, valid)

    def sample(self, batch_size: int, size: int) -> tuple[Tensor, Tensor | None]:
        if self.validity.mask is not None:
            return self.validity.draw(batch_size, size, self.generator), None
        return torch.randint(size, (batch_size,), generator=self.generator, device=self.device), None

    def update_priority(self, index: Tensor, priority: Tensor) -> None:
        pass

    def state_dict(self) -> State:
        return {
            "of": identity(self),
            "generator": generator_state(self.generator),
            "validity": self.validity.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        check_identity(state, identity(self), "sampler")
        set_generator_state(self.generator, state["generator"])
        self.validity.load_state_dict(state["validity"])


class DistinctSampler(UniformSampler):
    """Draws every stored transition with equal probability, without replacement inside a minibatch.

    The control of "Experience Replay with Random Reshuffling" (arXiv 2503.02269): it has no epochs. A minibatch larger
    than what is stored takes everything once, then again.
    """

    name: ClassVar[str] = "distinct"

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
            drawn = self.validity.draw(missing, size, self.generator)
            index = first_occurrences(torch.cat((index, drawn)) if index.numel() else drawn)
        return index, None

    def _smallest_keys(self, batch_size: int, size: int) -> Tensor:
        """Return the slots with the smallest of ``size`` random keys: exact, without a look by the host, O(size)."""
        keys = torch.rand(size, generator=self.generator, device=self.device, dtype=torch.float64)
        if self.validity.mask is not None:
            keys.masked_fill_(~self.validity.mask[:size], 2.0)
        return keys.topk(batch_size, largest=False).indices


def checked_slots(index: Tensor, priority: Tensor) -> Tensor:
    """Return ``index`` as int64. Raises RloptError where these are not whole numbers (B,) and one number for each.

    That they are equally many is left to the compiled loops where they are the ordinary kinds.
    """
    if index.dtype is torch.int64 and priority.dtype is torch.float32 and index.dim() == 1 == priority.dim():
        return index
    whole = not index.dtype.is_floating_point and not index.is_complex() and index.dtype != torch.bool
    if whole and index.dim() == 1 and index.shape == priority.shape and not priority.is_complex():
        return index.long()
    raise unfit(index, priority)


def unfit(index: Tensor, priority: Tensor) -> RloptError:
    """Return the error of priorities that do not fit their slots."""
    return RloptError(
        f"update_priority takes whole slots (B,) and a real number for each, not {index.dtype} {tuple(index.shape)} "
        f"and {tuple(priority.shape)}"
    )


def first_occurrences(index: Tensor) -> Tensor:
    """Return ``index`` (K,) without later repetitions, in its own order."""
    ordered, order = index.sort(stable=True)
    again = ordered[1:] == ordered[:-1]
    if not bool(again.any()):
        return index
    keep = torch.ones_like(index, dtype=torch.bool)
    keep[order[1:][again]] = False
    return index[keep]
