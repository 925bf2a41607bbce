"""Masses of slots that make a draw in proportion to them cheap: a tree on the CPU, a two-level scan on a GPU.

Mass is float64. Every sum is made anew from its terms and never changed by a difference, so errors do not build up: a
total is within 1e-14 of the true one however long training lasts, where float32 would already miss single slots of a
million (its spacing at a sum of 1e6 is 0.06).

With numba installed the tree is compiled (``kernels``); without it NumPy walks the same levels with the same additions
in the same order, so both give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlopt.buffers import kernels
from rlopt.buffers.kernels import COMPILED, FAN
from rlopt.types import State

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Masses(Protocol):
    """A mass for each of ``slots`` slots, zero where there is no transition."""

    @property
    def largest(self) -> float | Tensor:
        """The largest mass seen, 1 at first."""
        ...

    def enter(self, first: int, count: int, valid: Tensor | None) -> None:
        """Slots ``first … first + count - 1`` hold new transitions, of the largest mass seen; those not ``valid``
        (count,) none."""
        ...

    def change(self, index: Tensor, mass: Tensor) -> None:
        """New masses (K,) float64 of slots ``index`` (K,), of which those without mass keep none. One that is not
        finite becomes the largest seen before; of several for one slot, one counts. ``mass`` is used up."""
        ...

    def draw(
        self, batch_size: int, generator: torch.Generator, stratified: bool, weighted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Slots (B,) int64 in proportion to mass; ``stratified``: one from each of B equal shares. And where
        ``weighted``, the smallest of their masses over each, (B,) float32 up to 1."""
        ...

    def state_dict(self, written: int) -> State:
        """Everything, where only the first ``written`` slots were ever written."""
        ...

    def load_state_dict(self, state: State) -> None: ...


def make_masses(slots: int, device: torch.device) -> Masses:
    """The fastest implementation on ``device``."""
    return TreeMasses(slots) if device.type == "cpu" else ScanMasses(slots, device)


def aligned(shape: Sequence[int]) -> Floats:
    """Zeros that begin on a cache line, so that a node of the tree lies in one."""
    count = int(np.prod(shape))
    room = np.zeros(count + 8)
    start = -room.ctypes.data // 8 % 8
    return room[start : start + count].reshape(shape)


class SumTree:
    """A sum-tree with ``FAN`` children per node in one array, leaves first, the children of the root last."""

    def __init__(self, slots: int, use_numba: bool = COMPILED) -> None:
        self.use_numba = use_numba
        sizes = [-(-slots // FAN) * FAN]
        while sizes[-1] > FAN:
            sizes.append(-(-sizes[-1] // FAN**2) * FAN)
        self.offsets = np.concatenate(([0], np.cumsum(sizes)[:-1])).astype(np.int64)
        self.nodes = aligned([sum(sizes)])
        self.leaves = self.nodes[:slots]

    def put(self, index: Ints, mass: Floats) -> None:
        """Give slots ``index`` (K,) the masses (K,), finite and >= 0; of several for one slot the last counts."""
        if self.use_numba:
            kernels.put(self.nodes, self.offsets, index, mass)
        else:
            self.nodes[index] = mass
            blocks = self.nodes.reshape(-1, FAN)
            for below, above in zip(self.offsets[:-1], self.offsets[1:], strict=True):
                index = index // FAN
                self.nodes[above + index] = _halves(blocks[below // FAN + index])[-1][:, 0]

    def search(self, fraction: Floats, stratified: bool = False) -> Ints:
        """The slots (K,) in which the fractions (K,) in [0, 1) of the total mass fall, never one without mass.

        ``stratified``: the k-th fraction is one of the k-th of K equal shares of the mass.
        """
        if self.use_numba:
            found: Ints = kernels.search(self.nodes, self.offsets, fraction, stratified)
            return found
        blocks = self.nodes.reshape(-1, FAN)
        each = np.arange(len(fraction))
        share = (fraction + each) * (1.0 / max(len(fraction), 1)) if stratified else fraction
        value = share * _halves(blocks[-1:])[-1][0, 0]
        index = np.zeros(len(fraction), dtype=np.int64)
        for offset in self.offsets[::-1]:
            child = np.zeros(len(fraction), dtype=np.int64)
            for sums in _halves(blocks[offset // FAN + index])[-2::-1]:
                left, rest = sums[each, 2 * child], sums[each, 2 * child + 1]
                right = (value >= left) & (rest > 0)  # never where there is no mass: rounding may carry past the end
                value = value - np.where(right, left, 0.0)
                child = 2 * child + right
            index = index * FAN + child
        return index

    def fill(self, mass: Floats) -> None:
        """Give the first slots the masses (K,) and all others none."""
        self.leaves[:] = 0.0
        self.leaves[: len(mass)] = mass
        for below, above in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            blocks = self.nodes[below:above].reshape(-1, FAN)
            self.nodes[above : above + len(blocks)] = _halves(blocks)[-1][:, 0]


def _halves(blocks: Floats) -> list[Floats]:
    """Terms (K, 8), their sums in pairs (K, 4), the sums of those (K, 2), and of those (K, 1)."""
    sums = [blocks]
    while sums[-1].shape[1] > 1:
        sums.append(sums[-1][:, 0::2] + sums[-1][:, 1::2])
    return sums


def finite(mass: Floats, largest: float) -> tuple[Floats, float]:
    """``mass`` (K,) with ``largest`` in place of what is not finite, and the largest then."""
    mass = np.where(np.isfinite(mass), mass, largest)
    return mass, float(mass.max(initial=largest))


def fractions(count: int, generator: torch.Generator) -> Floats:
    """Uniform numbers (K,) in [0, 1)."""
    drawn: Floats = torch.rand(count, generator=generator, dtype=torch.float64).numpy()
    return drawn


def rarity(mass: Tensor) -> Tensor:
    """The smallest of some masses (K,) over each, (K,) float32."""
    return (mass.min() / mass).float()


class TreeMasses:
    """Masses in a ``SumTree``."""

    def __init__(self, slots: int, use_numba: bool = COMPILED) -> None:
        self.tree = SumTree(slots, use_numba)
        self.largest = 1.0

    def enter(self, first: int, count: int, valid: Tensor | None) -> None:
        mass = np.full(count, self.largest)
        self.tree.put(np.arange(first, first + count), mass if valid is None else mass * valid.numpy())

    def change(self, index: Tensor, mass: Tensor) -> None:
        where, new, tree = index.numpy(), mass.numpy(), self.tree
        if tree.use_numba:
            self.largest = kernels.change_leaves(tree.nodes, tree.offsets, where, new, self.largest)
        else:
            new, self.largest = finite(new, self.largest)
            tree.put(where, np.where(tree.leaves[where] > 0, new, 0.0))

    def draw(
        self, batch_size: int, generator: torch.Generator, stratified: bool, weighted: bool
    ) -> tuple[Tensor, Tensor | None]:
        tree, fraction = self.tree, fractions(batch_size, generator)
        if weighted and tree.use_numba:
            found, rare = kernels.search_weighted(tree.nodes, tree.offsets, fraction, stratified)
            return torch.from_numpy(found), torch.from_numpy(rare)
        found = tree.search(fraction, stratified)
        return torch.from_numpy(found), rarity(torch.from_numpy(tree.leaves[found])) if weighted else None

    def state_dict(self, written: int) -> State:
        return {"mass": torch.from_numpy(self.tree.leaves[:written].copy()), "largest": self.largest}

    def load_state_dict(self, state: State) -> None:
        self.tree.fill(state["mass"].numpy())
        self.largest = float(state["largest"])


class ScanMasses:
    """Masses in rows of about the square root of the slots, summed at each draw: few launches, no look by the host."""

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
        """The slots (K,) in which the fractions (K,) in [0, 1) of the total mass fall, never one without mass."""
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
    """``finite`` on tensors, without a look by the host."""
    mass = torch.where(mass.isfinite(), mass, largest)
    return mass, torch.maximum(largest, mass.max())


def put_largest(masses: Tensor, index: Tensor, mass: Tensor) -> None:
    """Give slots ``index`` (K,) of ``masses``, where they have mass, the largest of theirs in ``mass`` (K,): an order
    of writes is not defined on a GPU."""
    masses.scatter_reduce_(0, index, mass * (masses[index] > 0), "amax", include_self=False)


def _choose(mass: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The column (K,) of ``mass`` (K, W) in which ``value`` (K,) falls, and how far into it."""
    sums = mass.cumsum(1)
    column = (sums <= value[:, None]).sum(1)
    # Rounding may carry a value past the end: the last column with mass is meant.
    last = mass.shape[1] - 1 - (mass.flip(1) > 0).to(torch.uint8).argmax(1)
    column = torch.minimum(column, last)
    before = sums.gather(1, column[:, None])[:, 0] - mass.gather(1, column[:, None])[:, 0]
    return column, value - before
