"""Keeps non-finite numbers out of the weights without the host ever waiting for the device."""

from __future__ import annotations

import copy
from typing import Self

import torch
from torch import Tensor

from rlopt.types import Obs, State


class Guard:
    """Watches the quantities of an update as they are computed.

    ``begin`` opens an update; ``passes(name, value)`` adds a quantity and returns, as a boolean on the device, whether
    everything of this update has been finite so far. The first quantity that was not leaves its number in a sticky
    code, 0 for none, which the host reads when it logs. All of it happens in place, in the order of the calls: pieces
    of an update may be recorded and replayed in any order.

    Of several runs each has a flag and a code of its own: quantities and flags are then (R,).
    """

    def __init__(self, device: torch.device, runs: int = 1) -> None:
        shape = (runs,) if runs > 1 else ()
        self.code = torch.zeros(shape, dtype=torch.int64, device=device)
        """Number of the first quantity that was not finite since ``clear``; complete once ``remember`` was called."""
        self.prefix = ""
        self._numbers: dict[str, int] = {}  # by the whole name, in the order of the codes
        self._open = [False]  # whether ``remember`` has something to say; shared with children, as the tensors are
        self._own: dict[str, int] = {}  # the same by the name without this guard's prefix
        self._poison = torch.zeros(shape, device=device)  # 0; NaN once something of this update was not finite
        self._ok = torch.ones(shape, dtype=torch.bool, device=device)
        self._latest = torch.zeros_like(self.code)  # the quantity that was begun last while all was well

    def child(self, name: str) -> Self:
        """Return a guard whose quantities are called ``name/…`` and whose flags and code are this one's."""
        child = copy.copy(self)
        child.prefix, child._own = f"{self.prefix}{name}/", {}
        return child

    @property
    def scratch(self) -> tuple[Tensor, ...]:
        """What ``begin`` overwrites: the state of an update that is under way."""
        return self._poison, self._ok, self._latest

    def number(self, name: str) -> int:
        """Return the code that stands for the quantity ``name``."""
        if name not in self._own:
            self._own[name] = self._numbers.setdefault(self.prefix + name, len(self._numbers) + 1)
        return self._own[name]

    @property
    def is_open(self) -> bool:
        """Whether an update was begun that is not settled; read by compiled code, which writes the code itself."""
        return self._open[0]

    def begin(self) -> None:
        """Open an update."""
        self.remember()
        self._open[0] = True
        self._poison.zero_()
        self._ok.fill_(True)

    def passes(self, name: str, value: Obs | Tensor) -> Tensor:
        """Add a quantity; return () or (R,) bool, true where this and all before it in this update are finite.

        A tensor or observation with further axes stands for its sum, which is finite only if every element is; one that
        overflows errs on the safe side. Integers are finite by nature.
        """
        total = _total(value, self.code)
        if total is not None:
            self._latest.masked_fill_(self._ok, self.number(name))
            self._poison.add_(total, alpha=0.0)  # x·0 is NaN exactly where x is not finite
            torch.logical_not(self._poison, out=self._ok)  # of NaN it is false
        return self._ok

    def remember(self) -> None:
        """Remember what was first not finite in this update, if nothing is remembered from before."""
        torch.where((self.code != 0) | self._ok, self.code, self._latest, out=self.code)
        self._open[0] = False

    def first_bad(self) -> str | None:
        """Return the name of the first non-finite quantity since ``clear``, or None. Waits for the device."""
        self.remember()
        code = next((c for c in self.code.flatten().tolist() if c), 0)
        return list(self._numbers)[code - 1] if code else None

    def clear(self) -> None:
        """Forget it, once it has been told."""
        self._ok.fill_(True)
        self.code.zero_()

    def state_dict(self) -> State:
        """Return the code, and the names it stands for: another process may number them otherwise."""
        self.remember()
        return {"code": self.code.clone(), "names": list(self._numbers)}

    def load_state_dict(self, state: State) -> None:
        """Continue with a saved code."""
        code, names = state["code"], state["names"]
        if names != list(self._numbers)[: len(names)]:
            known = [0, *(self._numbers.setdefault(name, len(self._numbers) + 1) for name in names)]
            code = torch.tensor([known[c] for c in code.flatten().tolist()]).view(code.shape)
        self._ok.fill_(True)
        self.code.copy_(code)


def _total(value: Obs | Tensor, like: Tensor) -> Tensor | None:
    """Return the sum of all floating leaves, () or (R,); None where there is none."""
    leaves = value.values() if isinstance(value, dict) else (value,)
    floating = [leaf.detach() for leaf in leaves if leaf.is_floating_point()]
    sums = [leaf.sum(tuple(range(like.dim(), leaf.dim()))) if leaf.dim() > like.dim() else leaf for leaf in floating]
    return torch.stack(sums).sum(0) if len(sums) > 1 else sums[0] if sums else None
