"""Masses of slots that make a draw in proportion to them cheap: a tree on the CPU, a two-level scan on a GPU.

Mass is float64. Every sum is made anew from its terms and never changed by a difference, so errors do not build up: a
total is within 1e-14 of the true one however long training lasts, where float32 would already miss single slots of a
million (its spacing at a sum of 1e6 is 0.06).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlopt.buffers.samplers import sum_tree_loops
from rlopt.buffers.samplers.base import unfit
from rlopt.buffers.samplers.sum_tree_loops import FAN
from rlopt.types import RloptError, State

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Masses(Protocol):
    """Keeps a mass for each of ``slots`` slots, zero where there is no transition."""

    largest: Any
    """The largest mass seen, 1 at first: a float, or a 0-d tensor."""

    def enter(self, first: int, count: int, valid: Tensor | None) -> None:
        """Give the slots ``first … first + count - 1``, which hold new transitions, the largest mass seen; those not
        ``valid`` (count,) none."""
        ...

    def change(self, index: Tensor, mass: Tensor) -> None:
        """Give slots ``index`` (K,) new masses (K,) float64; those without mass keep none. One that is not finite
        becomes the largest seen before; of several for one slot, one counts. ``mass`` is used up. Raises RloptError
        where one is no slot (on a GPU, torch's own error)."""
        ...

    def draw(
        self, batch_size: int, generator: torch.Generator, stratified: bool, weighted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return slots (B,) int64 in proportion to mass; ``stratified``: one from each of B equal shares. And where
        ``weighted``, the smallest of their masses over each, (B,) float32 up to 1."""
        ...

    def state_dict(self, written: int) -> State:
        """Return everything, where only the first ``written`` slots were ever written."""
        ...

    def load_state_dict(self, state: State) -> None: ...


def make_masses(slots: int, device: torch.device) -> Masses:
    """Return the fastest implementation on ``device``."""
    return TreeMasses(slots) if device.type == "cpu" else ScanMasses(slots, device)


def aligned(shape: Sequence[int]) -> Floats:
    """Return zeros that begin on a cache line, so that a node of the tree lies in one."""
    count = int(np.prod(shape))
    room = np.zeros(count + 8)
    start = -room.ctypes.data // 8 % 8
    return room[start : start + count].reshape(shape)


class SumTree:
    """Sums masses in a tree with ``FAN`` children per node in one array, leaves first, the children of the root
    last."""

    def __init__(self, slots: int) -> None:
        sizes = [-(-slots // FAN) * FAN]
        while sizes[-1] > FAN:
            sizes.append(-(-sizes[-1] // FAN**2) * FAN)
        self.offsets = np.concatenate(([0], np.cumsum(sizes)[:-1])).astype(np.int64)
        self.nodes = aligned([sum(sizes)])
        self.leaves = self.nodes[:slots]

    def put(self, index: Ints, mass: Floats) -> None:
        """Give slots ``index`` (K,) the masses (K,), finite and >= 0; of several for one slot the last counts."""
        sum_tree_loops.put_masses(self.nodes, self.offsets, index, mass)

    def search(self, fraction: Floats, stratified: bool = False) -> Ints:
        """Return the slots (K,) in which the fractions (K,) in [0, 1) of the total mass fall, never one without mass.

        ``stratified``: the k-th fraction is one of the k-th of K equal shares of the mass.
        """
        found: Ints = sum_tree_loops.search(self.nodes, self.offsets, fraction, stratified)
        return found

    def fill(self, mass: Floats) -> None:
        """Give the first slots the masses (K,) and all others none."""
        every = np.zeros(len(self.leaves))
        every[: len(mass)] = mass
        self.put(np.arange(len(every)), every)


def no_slots(index: Tensor, mass: Tensor, slots: int) -> RloptError:
    """Return the error of masses that do not ``fit`` the slots."""
    if index.shape != mass.shape:
        return unfit(index, mass)
    return RloptError(f"priorities came for slots that are none of this buffer's, which are 0 … {slots - 1}")


def fractions(count: int, generator: torch.Generator) -> Floats:
    """Return uniform numbers (K,) in [0, 1)."""
    drawn: Floats = torch.rand(count, generator=generator, dtype=torch.float64).numpy()
    return drawn


def rarity(mass: Tensor) -> Tensor:
    """Return the smallest of some masses (K,) over each, (K,) float32."""
    return (mass.min() / mass).float()


class TreeMasses:
    """Keeps masses in a ``SumTree``."""

    def __init__(self, slots: int) -> None:
        self.tree = SumTree(slots)
        self.largest = 1.0

    def enter(self, first: int, count: int, valid: Tensor | None) -> None:
        mass = np.full(count, self.largest)
        self.tree.put(np.arange(first, first + count), mass if valid is None else mass * valid.numpy())

    def change(self, index: Tensor, mass: Tensor) -> None:
        tree, slots = self.tree, len(self.tree.leaves)
        args = (tree.nodes, tree.offsets, slots, index.numpy(), mass.numpy(), self.largest)
        largest = sum_tree_loops.change_leaves(*args)
        if largest < 0.0:
            raise no_slots(index, mass, slots)
        self.largest = largest

    def draw(
        self, batch_size: int, generator: torch.Generator, stratified: bool, weighted: bool
    ) -> tuple[Tensor, Tensor | None]:
        tree, fraction = self.tree, fractions(batch_size, generator)
        if not weighted:
            return torch.from_numpy(tree.search(fraction, stratified)), None
        found, rare = sum_tree_loops.search_weighted(tree.nodes, tree.offsets, fraction, stratified)
        return torch.from_numpy(found), torch.from_numpy(rare)

    def state_dict(self, written: int) -> State:
        return {"mass": torch.from_numpy(self.tree.leaves[:written].copy()), "largest": self.largest}

    def load_state_dict(self, state: State) -> None:
        self.tree.fill(state["mass"].numpy())
        self.largest = float(state["largest"])


class ScanMasses:
    """Keeps masses in rows of about the square root of the slots, summed at each draw: few launches, no look by the
    host."""

    def __init__(self, slots: int, device: torch.device) -> None:
        width = max(32, 1 << (max(slots - 1, 1).bit_length() + 1) // 2)
        self.rows = torch.zeros((-(-slots // width), width), dtype=torch.float64, device=device)
        self.leaves = self.rows.view(-1)[:slots]
        self.largest = torch.ones((), dtype=torch.float64, device=device)

    def enter(self, first: int, count: int, valid: Tensor | None) -> None:
        self.leaves[first : first + count] = self.largest if valid is None else self.largest * valid

    def change(self, index: Tensor, mass: Tensor) -> None:
        mass, self.largest = finite_tensor(mass, self.largest)
        put_largest(self.leaves, index, mass)

    def draw(
        self, batch_size: int, generator: torch.Generator, stratified: bool, weighted: bool
    ) -> tuple[Tensor, Tensor | None]:
        device = self.rows.device
        fraction = torch.rand(batch_size, generator=generator, device=device, dtype=torch.float64)
        if stratified:
            shares = torch.arange(batch_size, dtype=torch.float64, device=device)
            fraction.add_(shares).mul_(1.0 / batch_size)
        index = self.find(fraction)
        return index, rarity(self.leaves[index]) if weighted else None

    def find(self, fraction: Tensor) -> Tensor:
        """Return the slots (K,) in which the fractions (K,) in [0, 1) of the total mass fall, never one without
        mass."""
        sums = self.rows.sum(1)
        row, value = _choose(sums.expand(len(fraction), -1), fraction * sums.cumsum(0)[-1])
        column, _ = _choose(self.rows[row], value)
        return row * self.rows.shape[1] + column

    def state_dict(self, written: int) -> State:
        return {"mass": self.leaves[:written].to("cpu", copy=True), "largest": float(self.largest)}

    def load_state_dict(self, state: State) -> None:
        self.leaves.zero_()
        self.leaves[: len(state["mass"])] = state["mass"].to(self.leaves.device)
        self.largest.fill_(state["largest"])


def finite_tensor(mass: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``mass`` (K,) with ``largest`` in place of what is not finite, and the largest then; no look by the
    host."""
    mass = torch.where(mass.isfinite(), mass, largest)
    return mass, torch.maximum(largest, mass.max())


def put_largest(masses: Tensor, index: Tensor, mass: Tensor) -> None:
    """Give slots ``index`` (K,) of ``masses``, where they have mass, the largest of theirs in ``mass`` (K,): an order
    of writes is not defined on a GPU."""
    masses.scatter_reduce_(0, index, mass * (masses[index] > 0), "amax", include_self=False)


def _choose(mass: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the column (K,) of ``mass`` (K, W) in which ``value`` (K,) falls, and how far into it."""
    sums = mass.cumsum(1)
    column = (sums <= value[:, None]).sum(1)
    # Rounding may carry a value past the end: the last column with mass is meant.
    last = mass.shape[1] - 1 - (mass.flip(1) > 0).to(torch.uint8).argmax(1)
    column = torch.minimum(column, last)
    before = sums.gather(1, column[:, None])[:, 0] - mass.gather(1, column[:, None])[:, 0]
    return column, value - before
