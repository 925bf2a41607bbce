"""Sums over slots that make a draw in proportion to mass cheap: a tree on the CPU, a two-level scan on a GPU.

Mass is float64. Every sum is made anew from its terms and never changed by a difference, so errors do not build up: a
total is within 1e-14 of the true one however long training lasts, where float32 would already miss single slots of a
million (its spacing at a sum of 1e6 is 0.06).

With numba installed (``pip install "rlopt[fast]"``) the tree is compiled; without it NumPy walks the same levels with
the same additions in the same order, so both give the same bits.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

try:
    njit: Any = import_module("numba").njit
except ImportError:
    njit = None

COMPILED = njit is not None
"""Whether numba is installed."""


def compiled(loop: Any, arrays: Any) -> Any:
    """``loop`` compiled by numba, or where that is missing ``arrays``, which does the same with NumPy."""
    return njit(cache=True)(loop) if COMPILED else arrays


FAN = 8
"""Children of a node: as many as a cache line holds."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Masses(Protocol):
    """A mass for each of ``slots`` slots, zero at first."""

    def get(self, index: Tensor) -> Tensor:
        """Masses (K,) float64 of slots ``index`` (K,) int64."""
        ...

    def set(self, index: Tensor, mass: Tensor) -> None:
        """Give slots ``index`` (K,) the masses (K,) float64, finite and >= 0; of several for one slot, one counts."""
        ...

    def find(self, fraction: Tensor) -> Tensor:
        """The slots (K,) in which the fractions (K,) in [0, 1) of the total mass fall; never one without mass."""
        ...

    def dump(self, count: int) -> Tensor:
        """A copy of the masses of the first ``count`` slots, on the CPU."""
        ...

    def load(self, mass: Tensor) -> None:
        """Give the first slots the masses (K,) and all others none."""
        ...


def make_masses(slots: int, device: torch.device) -> Masses:
    """The fastest implementation on ``device``."""
    return SumTree(slots) if device.type == "cpu" else MassScan(slots, device)


class SumTree:
    """A sum-tree with ``FAN`` children per node in one array, leaves first, the children of the root last."""

    def __init__(self, slots: int, use_numba: bool = COMPILED) -> None:
        self.use_numba = use_numba
        sizes = [-(-slots // FAN) * FAN]
        while sizes[-1] > FAN:
            sizes.append(-(-sizes[-1] // FAN**2) * FAN)
        self.offsets = np.concatenate(([0], np.cumsum(sizes)[:-1])).astype(np.int64)
        self.nodes: Floats = np.zeros(sum(sizes))
        self.leaves = self.nodes[:slots]

    def get(self, index: Tensor) -> Tensor:
        return torch.from_numpy(self.leaves[index.numpy()])

    def set(self, index: Tensor, mass: Tensor) -> None:
        self.put(index.numpy(), mass.numpy())

    def find(self, fraction: Tensor) -> Tensor:
        return torch.from_numpy(self.search(fraction.numpy()))

    def dump(self, count: int) -> Tensor:
        return torch.from_numpy(self.leaves[:count].copy())

    def load(self, mass: Tensor) -> None:
        self.fill(mass.numpy())

    def put(self, index: Ints, mass: Floats) -> None:
        """``set`` on arrays."""
        if self.use_numba:
            _put(self.nodes, self.offsets, index, mass)
        else:
            _put_levels(self.nodes, self.offsets, index, mass)

    def search(self, fraction: Floats) -> Ints:
        """``find`` on arrays."""
        value = fraction * self.sum()
        search = _search if self.use_numba else _search_levels
        found: Ints = search(self.nodes, self.offsets, value)
        return found

    def sum(self) -> float:
        """The sum of all masses."""
        return float(np.add.accumulate(self.nodes[self.offsets[-1] :])[-1])

    def fill(self, mass: Floats) -> None:
        """``load`` on arrays."""
        self.leaves[:] = 0.0
        self.leaves[: len(mass)] = mass
        for level in range(len(self.offsets) - 1):
            below, above = self.offsets[level], self.offsets[level + 1]
            blocks = self.nodes[below:above].reshape(-1, FAN)
            self.nodes[above : above + len(blocks)] = np.add.accumulate(blocks, axis=1)[:, -1]


class MassScan:
    """Masses in rows of about the square root of the slots, summed at each draw: few launches, no look by the host."""

    def __init__(self, slots: int, device: torch.device) -> None:
        width = max(32, 1 << (max(slots - 1, 1).bit_length() + 1) // 2)
        self.rows = torch.zeros((-(-slots // width), width), dtype=torch.float64, device=device)
        self.leaves = self.rows.view(-1)[:slots]

    def get(self, index: Tensor) -> Tensor:
        return self.leaves[index]

    def set(self, index: Tensor, mass: Tensor) -> None:
        # The largest of several: an order of writes is not defined on a GPU.
        self.leaves.scatter_reduce_(0, index, mass, "amax", include_self=False)

    def find(self, fraction: Tensor) -> Tensor:
        sums = self.rows.sum(1)
        row, value = _choose(sums.expand(len(fraction), -1), fraction * sums.cumsum(0)[-1])
        column, _ = _choose(self.rows[row], value)
        return row * self.rows.shape[1] + column

    def dump(self, count: int) -> Tensor:
        return self.leaves[:count].to("cpu", copy=True)

    def load(self, mass: Tensor) -> None:
        self.leaves.zero_()
        self.leaves[: len(mass)] = mass.to(self.leaves.device)


def _choose(mass: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The column (K,) of ``mass`` (K, W) in which ``value`` (K,) falls, and how far into it."""
    sums = mass.cumsum(1)
    column = (sums <= value[:, None]).sum(1)
    # Rounding may carry a value past the end: the last column with mass is meant.
    last = mass.shape[1] - 1 - (mass.flip(1) > 0).to(torch.uint8).argmax(1)
    column = torch.minimum(column, last)
    before = sums.gather(1, column[:, None])[:, 0] - mass.gather(1, column[:, None])[:, 0]
    return column, value - before


def _put_levels(nodes: Floats, offsets: Ints, index: Ints, mass: Floats) -> None:
    nodes[index] = mass
    blocks = nodes.reshape(-1, FAN)
    for level in range(len(offsets) - 1):
        index = index // FAN
        nodes[offsets[level + 1] + index] = np.add.accumulate(blocks[offsets[level] // FAN + index].T.copy())[-1]


def _search_levels(nodes: Floats, offsets: Ints, value: Floats) -> Ints:
    blocks = nodes.reshape(-1, FAN)
    index = np.zeros(len(value), dtype=np.int64)
    each = np.arange(len(value))
    sums = np.zeros((FAN + 1, len(value)))
    for offset in offsets[::-1]:
        mass = blocks[offset // FAN + index].T.copy()
        np.add.accumulate(mass, out=sums[1:])
        child = np.count_nonzero(sums[1:] <= value, axis=0)
        if child.max(initial=0) == FAN:  # rounding carried a value past the end: the last child with mass is meant
            past = child == FAN
            child[past] = FAN - 1 - (mass[::-1, past] > 0).argmax(0)
        value = value - sums[child, each]
        index = index * FAN + child
    return index


def _put_loop(nodes: Any, offsets: Any, index: Any, mass: Any) -> None:
    count = len(index)
    block = np.empty(count, dtype=np.int64)
    for k in range(count):
        nodes[index[k]] = mass[k]
        block[k] = index[k] // FAN
    # Level by level: the additions of different nodes overlap, and a node touched twice in a row is summed once.
    for level in range(len(offsets) - 1):
        last = -1
        kept = 0
        for k in range(count):
            b = block[k]
            if b == last:
                continue
            last = b
            start = offsets[level] + b * FAN
            total = nodes[start]
            for j in range(1, FAN):
                total += nodes[start + j]
            nodes[offsets[level + 1] + b] = total
            block[kept] = b // FAN
            kept += 1
        count = kept


def _search_loop(nodes: Any, offsets: Any, values: Any) -> Any:
    found = np.zeros(len(values), dtype=np.int64)
    value = values.copy()
    for level in range(len(offsets) - 1, -1, -1):
        for k in range(len(value)):
            start = offsets[level] + found[k] * FAN
            child = 0
            upto = 0.0
            before = 0.0
            for j in range(FAN):  # no early exit: a mispredicted branch costs more than the additions
                upto += nodes[start + j]
                passed = upto <= value[k]
                child += passed
                before = upto if passed else before
            if child == FAN:  # rounding carried a value past the end: the last child with mass is meant
                child = FAN - 1
                while child > 0 and nodes[start + child] == 0.0:
                    child -= 1
                before = 0.0
                for j in range(child):
                    before += nodes[start + j]
            value[k] -= before
            found[k] = found[k] * FAN + child
    return found


_put = compiled(_put_loop, _put_levels)
_search = compiled(_search_loop, _search_levels)
