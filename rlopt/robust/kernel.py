"""Transition kernels stored on their successors.

Shape letters of ``rlopt.robust``: K instances, S states, A actions, B successors of one state and action.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlopt.allocation import free_memory
from rlopt.types import RloptError

TOLERANCE = 1e-6
"""How far the probabilities of a distribution may be from summing to one: float32 leaves about 1e-7."""
_EXACT = 1e-9
"""A sum as near to one as this is float64's own rounding, and the probabilities stay as they are."""


def normalised(p: Tensor) -> tuple[Tensor, Tensor]:
    """Return distributions (…, n), divided by their sum where rounding is to blame (``TOLERANCE``); (…,) true where
    none."""
    total = p.sum(-1, keepdim=True)
    error = (total - 1.0).abs()
    rough = error > _EXACT
    bad = ~((p >= 0.0).all(-1) & (error[..., 0] <= TOLERANCE))
    return torch.where(rough, p / total, p) if bool(rough.any()) else p, bad


def told(p: Tensor) -> str:
    """Return what is wrong with a row (n,) that is no distribution."""
    return f"(smallest {p.min():g}, sum {p.sum():.9g}); probabilities must be at least 0 and sum to 1"


def check_room(*shape: int) -> None:
    """Check that a dense table of this shape and one more like it fit in memory, before any is made.

    Raises:
        RloptError: they do not.
    """
    free, needed = free_memory(torch.device("cpu")), 2 * 8 * math.prod(shape)
    if free is not None and needed > free:
        size = " x ".join(map(str, shape))
        raise RloptError(
            f"a model of {size} numbers needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; "
            "ask for a smaller one"
        )


class Kernel:
    """Probabilities p(s'|s, a) of many instances, each row on its own list of B successors.

    Row (k, s, a) leads to ``successors[k, s, a, j]`` with probability ``probabilities[k, s, a, j]`` for
    j < ``count[k, s, a]``; what lies behind is padding of probability 0, on which no ambiguity set ever puts mass. So
    the list is the row's *support*: where a worst case may lead, also where the nominal probability is 0. With every
    state as a successor (``dense``) the list is 0 … S-1 and takes no memory.

    A list may name a state several times, and each entry is then an outcome of its own: with its own probability, its
    own cost (``RobustMDP(per_successor=True)``) and its own place in an ambiguity set. An L1 distance adds up over the
    entries, an interval or an L∞ radius bounds each of them, and a weight given per state counts for each. ``to_dense``
    adds the probabilities up.

    Args:
        probabilities: (S, A, B) or (K, S, A, B), kept in float64; a row whose sum is within 1e-6 of one, as float32
            leaves it, is divided by its sum.
        successors: the same shape, or None for 0 … S-1 (then B = S).
        count: (S, A) or (K, S, A) lengths of the lists, 1 … B (default: B).

    Raises:
        RloptError: shapes that do not fit, rows that are no distributions, successors that are no states, lengths
            outside 1 … B.
    """

    def __init__(
        self, probabilities: Any, successors: Any = None, count: Any = None, device: torch.device | str = "cpu"
    ) -> None:
        p = torch.as_tensor(probabilities, dtype=torch.float64, device=device)
        if p.ndim not in (3, 4) or 0 in p.shape:
            raise RloptError(f"kernel has shape {tuple(p.shape)}; it must be (states, actions, successors), with a "
                             "leading axis for instances")  # fmt: skip
        self.batched = p.ndim == 4
        self.probabilities = p if self.batched else p[None]
        k, s, a, b = self.probabilities.shape
        self.num_instances, self.num_states, self.num_actions, self.num_successors = k, s, a, b
        self.dense = successors is None
        if self.dense:
            if b != s:
                raise RloptError(
                    f"kernel has shape {tuple(p.shape)}; without successors the last axis must be {s} long"
                )
            index = torch.arange(s, device=p.device).expand(k, s, a, s)
        else:
            index = torch.as_tensor(successors, dtype=torch.int64, device=device)
            index = (index if index.ndim == 4 else index[None]).expand(k, s, a, b).contiguous()
            if int(index.min()) < 0 or int(index.max()) >= s:
                raise RloptError(f"successors must be states 0 … {s - 1}, not {int(index.min())} … {int(index.max())}")
        self.successors = index
        lengths = torch.full((k, s, a), b) if count is None else torch.as_tensor(count)
        self.count = lengths.to(p.device, torch.int64).expand(k, s, a).contiguous()
        if int(self.count.min()) < 1 or int(self.count.max()) > b:
            raise RloptError(
                f"count must lie between 1 and the {b} successors given, not {int(self.count.min())} … "
                f"{int(self.count.max())}"
            )
        self.mask: Tensor = torch.arange(b, device=p.device) < self.count[..., None]
        self.full = bool((self.count == b).all())
        self._check()

    def _check(self) -> None:
        p = self.probabilities
        self.probabilities, bad = normalised(p)
        bad = bad | ((p * ~self.mask).amax(-1) > 0.0)
        if bool(bad.any()):
            k, s, a = bad.nonzero()[0].tolist()
            where = f"[{k}, {s}, {a}]" if self.batched else f"[{s}, {a}]"
            row = p[k, s, a, : int(self.count[k, s, a])]
            raise RloptError(f"kernel{where} is no distribution on its {len(row)} successors {told(row)}")

    @classmethod
    def from_dense(cls, kernel: Any, support: Any = "nominal", device: torch.device | str = "cpu") -> Kernel:
        """Return a kernel from (S, A, S) or (K, S, A, S) probabilities, kept on as many successors as the widest row
        needs.

        ``support``: ``nominal`` (where the probability is positive), ``all`` (every state), or a mask of its shape.
        """
        p = torch.as_tensor(kernel, dtype=torch.float64, device=device)
        if p.ndim not in (3, 4) or p.shape[-1] != p.shape[-3]:
            raise RloptError(f"kernel has shape {tuple(p.shape)}; it must be (states, actions, states), with a leading "
                             "axis for instances")  # fmt: skip
        if isinstance(support, str):
            if support not in ("nominal", "all"):
                raise RloptError(f"support={support!r}: choose nominal, all, or give a mask of the kernel's shape")
            mask = p > 0.0 if support == "nominal" else torch.ones_like(p, dtype=torch.bool)
        else:
            mask = torch.as_tensor(support, dtype=torch.bool, device=p.device).expand(p.shape)
            if bool((p.masked_fill(mask, 0.0) > 0.0).any()):
                raise RloptError("the nominal kernel leads outside support; add those states to it")
        count = mask.sum(-1)
        width = int(count.max())
        if width == p.shape[-1] and bool((count == width).all()):
            return cls(p, device=device)
        successors = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :width]
        return cls(p.gather(-1, successors), successors, count, device)

    def to(self, device: torch.device | str) -> Kernel:
        """Return the same kernel with its tensors on ``device``."""
        return self.with_rows(self.probabilities, device)

    def with_rows(self, probabilities: Tensor, device: torch.device | str | None = None) -> Kernel:
        """Return other probabilities (K, S, A, B) on the same successors."""
        other = object.__new__(Kernel)
        other.__dict__.update(self.__dict__)
        for name in ("successors", "count", "mask"):
            setattr(other, name, getattr(self, name).to(device or probabilities.device))
        other.probabilities = probabilities.to(device or probabilities.device)
        return other

    def gather(self, value: Tensor) -> Tensor:
        """Return (K, S, A, B) values of the successors, from values of the states (K, S)."""
        k, s, a, b = self.probabilities.shape
        if self.dense:
            return value[:, None, None, :].expand(k, s, a, b)
        return value.gather(-1, self.successors.reshape(k, -1)).reshape(k, s, a, b)

    def pick(self, table: Any, fill: float = 0.0) -> Tensor:
        """Return (K, S, A, B) entries of a table (S,), (S, A, S) or (K, S, A, S) at the successors; ``fill`` in
        padding."""
        t = torch.as_tensor(table, dtype=torch.float64, device=self.probabilities.device)
        k, s, a, _ = self.probabilities.shape
        picked = t.expand(k, s, a, s).gather(-1, self.successors) if not self.dense else t.expand(k, s, a, s)
        return picked.masked_fill(~self.mask, fill)

    def to_dense(self, rows: Tensor | None = None) -> Tensor:
        """Return (K, S, A, S) probabilities: of this kernel, or of other ``rows`` (K, S, A, B) on its successors."""
        p = self.probabilities if rows is None else rows
        if self.dense:
            return p
        k, s, a, _ = p.shape
        return torch.zeros(k, s, a, s, dtype=p.dtype, device=p.device).scatter_add_(-1, self.successors, p)

    def transition(self, policy: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return (K, S, S) P_π(s, s') = Σ_a π(a|s) p(s'|s, a) for a policy (K, S, A)."""
        p = self.probabilities if rows is None else rows
        k, s, a, b = p.shape
        weighted = policy[..., None] * p
        if self.dense:
            return weighted.sum(2)
        out = torch.zeros(k, s, s, dtype=p.dtype, device=p.device)
        return out.scatter_add_(-1, self.successors.reshape(k, s, a * b), weighted.reshape(k, s, a * b))
