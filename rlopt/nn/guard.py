"""Keeps non-finite numbers out of the weights without the host ever waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from rlopt.types import Obs, State


class Guard:
    """Watches the quantities of an update in the order they are computed.

    ``begin`` opens an update, ``passes`` adds quantities and says (0-d boolean) whether everything so far is finite,
    ``end`` remembers the first that was not: a sticky code, 0 for none, which the host reads when it logs. Sums stand
    for their tensors, since a sum is finite only if every element is; one that overflows errs on the safe side.
    Of several runs each has a flag and a code of its own: quantities and flags are then (R,).
    """

    def __init__(self, names: tuple[str, ...], device: torch.device, runs: int = 1) -> None:
        self.names = names
        shape = (runs,) if runs > 1 else ()
        self.code = torch.zeros(shape, dtype=torch.int64, device=device)
        self._values: list[Tensor] = []
        self._health = torch.zeros(shape, device=device)

    def begin(self, *values: Obs | Tensor) -> None:
        """Open an update with its inputs; integer leaves are finite by nature and pass."""
        self._values = [_total(v, self.code) for v in values]
        self._health = self._values[0]
        for v in self._values[1:]:
            self._health = self._health + v

    def passes(self, *values: Tensor) -> Tensor:
        """Add 0-d quantities; true where these and all before them in this update are finite."""
        for v in values:
            self._values.append(v.detach())
            self._health = self._health + self._values[-1]
        return self._health.isfinite()

    def end(self) -> None:
        """Remember the first non-finite quantity of this update, if there is none from before."""
        bad = torch.stack(self._values).isfinite().logical_not()
        first = torch.where(bad.any(0), bad.byte().argmax(0) + 1, 0)
        self.code.copy_(torch.where(self.code == 0, first, self.code))

    def first_bad(self) -> str | None:
        """The name of the first non-finite quantity, or None. Waits for the device."""
        code = next((c for c in self.code.flatten().tolist() if c), 0)
        return self.names[code - 1] if code else None

    def clear(self) -> None:
        """Forget it, once it has been told."""
        self.code.zero_()

    def state_dict(self) -> State:
        return {"code": self.code.clone()}

    def load_state_dict(self, state: State) -> None:
        self.code.copy_(state["code"])


def _total(value: Obs, like: Tensor) -> Tensor:
    """The sum of all floating leaves, () or (R,)."""
    leaves = value.values() if isinstance(value, dict) else (value,)
    sums = [leaf.sum(tuple(range(like.dim(), leaf.dim()))) for leaf in leaves if leaf.is_floating_point()]
    return (
        torch.stack(sums).sum(0) if len(sums) > 1 else sums[0] if sums else torch.zeros(like.shape, device=like.device)
    )
