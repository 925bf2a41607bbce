"""RR-C: random reshuffling over a circular buffer ("Experience Replay with Random Reshuffling", arXiv 2503.02269)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rlopt.buffers.samplers.base import Validity, check_identity, identity
from rlopt.random import generator_state, set_generator_state, torch_generator
from rlopt.types import State


class ReshuffledSampler:
    """Draws each slot once per epoch: minibatches are taken in turn from a random permutation of the ring's slots.

    What is shuffled are slot numbers, so writing never touches the order: a slot overwritten before its turn gives its
    new content, one overwritten after its turn waits for the next epoch. An empty or invalid slot is skipped, and its
    turn is over for this epoch. A minibatch may straddle two epochs. With r draws per transition written (r a whole
    number) every transition is used r times, give or take one (variance 1/3, against r with replacement).

    While the ring fills, an epoch permutes no more than twice the slots written, and when more come to be written, the
    next slots are shuffled into its rest with the probability that their turn is still to come; this draws like a
    permutation of the whole ring whose empty slots are skipped, but never costs more than a few look-ups per draw.
    A full ring costs one slice per minibatch and one ``torch.randperm`` of the capacity per epoch: about 10 ms for
    a million slots on a CPU, every 3,900 minibatches of 256.

    The order lives on the host wherever the transitions are, so that no draw waits for a device.
    """

    name: ClassVar[str] = "reshuffled"

    def bind(self, slots: int, device: torch.device, seed: int) -> None:
        self.slots, self.device = slots, device
        self.generator = torch_generator(seed, "sampler")
        self.validity = Validity(slots, torch.device("cpu"))
        self.order = torch.empty(0, dtype=torch.int64)
        self.position = 0
        self.window = 0
        self.epochs = 0
        """Epochs begun since."""

    def wrote(self, first: int, count: int, valid: Tensor | None) -> None:
        self.validity.wrote(first, count, valid)

    def sample(self, batch_size: int, size: int) -> tuple[Tensor, Tensor | None]:
        stop = self.position + batch_size
        if self.validity.invalid == 0 and size == self.window and stop <= self.order.numel():
            index = self.order[self.position : stop]
            self.position = stop
            return index.to(self.device, non_blocking=True), None
        held = self.validity.count(size)
        parts: list[Tensor] = []
        missing = batch_size
        while missing > 0:
            if self.position == self.order.numel():
                self.window = min(self.slots, 2 * size)
                self.epochs += 1
                self.order = self._permutation(self.window)
                self.position = 0
            elif size > self.window:
                self._widen(min(self.slots, 2 * size))
            part = self._take(missing, size, held)
            parts.append(part)
            missing -= part.numel()
        return torch.cat(parts).to(self.device, non_blocking=True), None

    def _take(self, missing: int, size: int, held: int) -> Tensor:
        """Return at most ``missing`` valid slots from what is left of this epoch, using up the others met on the
        way."""
        stop = min(self.order.numel(), self.position + -(-missing * self.window // held))
        part = self.order[self.position : stop]
        if self.validity.invalid == 0 and size >= self.window:
            part = part[:missing]
            self.position += part.numel()
            return part
        valid = part < size
        if self.validity.mask is not None:
            valid &= self.validity.mask[part]
        turns = valid.nonzero().flatten()[:missing]
        self.position = stop if turns.numel() < missing else self.position + int(turns[-1]) + 1
        return part[turns]

    def _widen(self, window: int) -> None:
        """Shuffle slots ``self.window … window - 1`` into the epoch; some of their turns are over already."""
        rest = self.order[self.position :]
        over = (self.window - rest.numel()) / (self.window + 1)
        come = torch.rand(window - self.window, generator=self.generator) >= over
        rest = torch.cat((rest, self.window + come.nonzero().flatten()))
        self.order = rest[self._permutation(rest.numel())]
        self.position, self.window = 0, window

    def _permutation(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator)

    def update_priority(self, index: Tensor, priority: Tensor) -> None:
        pass

    def state_dict(self) -> State:
        return {
            "of": identity(self),
            "generator": generator_state(self.generator),
            "validity": self.validity.state_dict(),
            "rest": self.order[self.position :].clone(),
            "window": self.window,
        }

    def load_state_dict(self, state: State) -> None:
        check_identity(state, identity(self), "sampler")
        set_generator_state(self.generator, state["generator"])
        self.validity.load_state_dict(state["validity"])
        self.order = state["rest"].to("cpu", copy=True)
        self.position, self.window = 0, int(state["window"])
