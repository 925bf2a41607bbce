"""One random stream per row of a batched environment, on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlopt.types import State


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    return z ^ _shift(z, 31)


class RowStreams:
    """N independent streams of random numbers, row i's set by its seed alone.

    The numbers are SplitMix64's (Steele, Lea, Flood 2014), computed from a key and a counter per row with integer
    tensor operations. So a row's numbers depend neither on how many rows there are nor on the device; the state is two
    tensors; and drawing neither waits for the host nor branches, which lets a CUDA graph hold it. A torch generator
    gives one stream for all rows and none of this.

    Drawing does not move the streams: ``commit(mask)`` moves the rows that used what was drawn since the last one.
    So every row may be drawn for at each step, and only those that begin a new episode spend their numbers.
    """

    def __init__(self, n: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> None:
        self.n, self.dtype = n, dtype
        self._key = torch.zeros(n, dtype=torch.int64, device=device)
        self._count = torch.zeros(n, dtype=torch.int64, device=device)
        self._drawn = 0

    def seed(self, seeds: Sequence[int], mask: Tensor | None = None) -> None:
        """Begin all rows' streams, or those where ``mask`` (N,) is true, at their seeds (one for each of the N)."""
        key = _mix(torch.tensor(seeds, dtype=torch.int64, device=self._key.device) + _GAMMA)
        self._key.copy_(key if mask is None else torch.where(mask, key, self._key))
        self._count.copy_(torch.zeros_like(key) if mask is None else torch.where(mask, 0, self._count))

    def uniform(self, low: float | Tensor = 0.0, high: float | Tensor = 1.0, size: int | None = None) -> Tensor:
        """Draw uniformly from [low, high): (N,), or (N, size). Bounds broadcast."""
        count = 1 if size is None else size
        places = torch.arange(self._drawn + 1, self._drawn + 1 + count, device=self._key.device)
        self._drawn += count
        bits = _mix(self._key[:, None] + (self._count[:, None] + places) * _GAMMA)
        unit = (_shift(bits, 11).to(torch.float64) * 2.0**-53).to(self.dtype)
        return low + (high - low) * (unit[:, 0] if size is None else unit)

    def normal(self, size: int | None = None) -> Tensor:
        """Return standard normal: (N,), or (N, size) (Box and Muller 1958)."""
        radius = (-2.0 * torch.log1p(-self.uniform(size=size))).sqrt()
        return radius * (2.0 * math.pi * self.uniform(size=size)).cos()

    def of(self, rows: Tensor) -> RowStreams:
        """Return the streams of some rows (k,), to be drawn from instead of these; see ``commit``."""
        few = RowStreams(len(rows), self._key.device, self.dtype)
        few._key, few._count, few._drawn = self._key[rows], self._count[rows], self._drawn
        return few

    def commit(self, mask: Tensor, drawn: RowStreams | None = None) -> None:
        """Move the streams of the rows where ``mask`` (N,) is true past what was drawn, from these or from the part of
        them ``drawn``; the others give it again."""
        used = (self if drawn is None else drawn)._drawn
        if used:
            self._count.add_(mask, alpha=used)
        self._drawn = 0

    def state_dict(self) -> State:
        return {"key": self._key.clone(), "count": self._count.clone()}

    def load_state_dict(self, state: State) -> None:
        self._key.copy_(state["key"])
        self._count.copy_(state["count"])
        self._drawn = 0
