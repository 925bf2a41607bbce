"""How often each slot was drawn and should have been, and distinct draws that keep the two together (RR-M's core).

``DenseVisits`` touches every slot at every draw, as a GPU likes it. ``LazyVisits``, for the CPU, touches the few slots
that were drawn, written or are about to become eligible, and gives the same counts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlopt.buffers.sum_tree import COMPILED, Floats, Ints, SumTree, compiled
from rlopt.types import State

HIDDEN = 1e-8
"""What is left of the mass of a slot that was drawn too often: drawn only where nothing else remains."""

MASS, DRAWN, EXPECTED, SINCE = range(4)
"""Columns of ``LazyVisits.slot``."""

LOOKAHEAD = 64
"""Minibatches between two looks at the whole queue."""

REFRESH = 4096
"""Minibatches after which the running sum of the masses is made anew."""


class DenseVisits:
    """Counts as plain tensors; a distinct draw is a race of exponential clocks, with no look by the host."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.table = torch.zeros((3, slots), dtype=torch.float64, device=device)
        self.masses, self.drawn, self.expected = self.table

    def mass(self, index: Tensor) -> Tensor:
        """Masses (K,), not masked, of slots ``index`` (K,)."""
        masses: Tensor = self.masses[index]
        return masses

    def enter(self, index: Tensor, mass: Tensor) -> None:
        """Slots ``index`` (K,), all different, now hold new transitions with these masses (K,)."""
        self.masses[index] = mass
        self.drawn[index] = 0.0
        self.expected[index] = 0.0
        total = self.expected.sum()
        self.expected.mul_(torch.where(total > 0, self.drawn.sum() / total, 1.0))

    def change(self, index: Tensor, mass: Tensor) -> None:
        """New masses (K,) of slots ``index`` (K,)."""
        self.masses.scatter_reduce_(0, index, mass, "amax", include_self=False)

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """``batch_size`` different slots (B,), no more than have mass, counted."""
        share = self.masses * (batch_size / self.masses.sum())
        clocks = torch.empty_like(share).exponential_(generator=generator)
        clocks /= torch.where(self.drawn > self.expected, HIDDEN * self.masses, self.masses)
        index = clocks.topk(batch_size, largest=False).indices
        self.expected += share
        self.drawn[index] += 1.0
        return index

    def counts(self) -> tuple[Tensor, Tensor]:
        return self.drawn.clone(), self.expected.clone()

    def state_dict(self, written: int) -> State:
        return {"table": self.table[:, :written].to("cpu", copy=True)}

    def load_state_dict(self, state: State) -> None:
        self.table.zero_()
        self.table[:, : state["table"].shape[1]] = state["table"].to(self.table.device)


class LazyVisits:
    """Counts that are brought up to date when looked at.

    With p_i the mass, the expected count grows by B·p_i/Σp per minibatch, so for a slot last looked at when the
    global ``time`` T = Σ B·unit/Σp stood at s_i it is e_i = (x_i + p_i·(T - s_i)) / unit. Scaling all expected counts
    by f is ``unit /= f``. A slot is hidden while a_i·unit > x_i + p_i·(T - s_i).

    Hidden slots queue by a lower bound of the ``clock`` at which they become eligible, and are looked at again
    when it comes. Without scaling that is the exact time. Scaling moves ``unit`` a little both ways at every write;
    ``low`` ≤ unit follows it with some play, and only a fall of ``low`` by d can bring slots forward: by at most
    a_i·d, for which the clock advances by ``reach``·d. As max(p_i, a_i/reach) bounds what a step of the clock can
    bring a slot, and ``reach`` never falls, no slot is woken late.
    """

    def __init__(self, slots: int, use_numba: bool = COMPILED) -> None:
        self.tree = SumTree(slots, use_numba)
        self._look = _look_compiled if use_numba else _look_arrays
        self._replace = _replace_compiled if use_numba else _replace_arrays
        self._change = _change_compiled if use_numba else _change_arrays
        self._behind = _behind_compiled if use_numba else _behind_arrays
        self.slot: Floats = np.zeros((slots, 4))
        self.wake: Floats = np.full(slots, np.inf)
        """The clock at which a hidden slot is looked at again; infinite where a slot is not hidden."""
        self.mass_sum = 0.0
        self.total_drawn = 0.0
        self.time, self.unit = 0.0, 1.0
        self.draws = 0
        self.changed: list[Ints] = []
        self._restart_queue()

    def _restart_queue(self) -> None:
        """Every hidden slot is looked at before the next draw."""
        self.clock, self.low, self.reach = 0.0, self.unit, 0.0
        self.horizon = -1.0
        self.late: Ints = np.empty(0, dtype=np.int64)
        self.wake[np.isfinite(self.wake)] = 0.0

    def mass(self, index: Tensor) -> Tensor:
        return torch.from_numpy(self.slot[index.numpy(), MASS])

    def counts(self) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.slot[:, DRAWN].copy()), torch.from_numpy(self._expected(self.slot) / self.unit)

    def _expected(self, rows: Floats) -> Floats:
        """Expected counts in units of ``unit``."""
        now: Floats = rows[:, EXPECTED] + rows[:, MASS] * (self.time - rows[:, SINCE])
        return now

    def enter(self, index: Tensor, mass: Tensor) -> None:
        where = index.numpy()
        expected, drawn, rise = self._replace(self.slot, where, mass.numpy(), self.time)
        self.mass_sum += rise
        self.changed.append(where)
        if expected > 0:
            left = self.total_drawn - expected / self.unit
            self.total_drawn -= drawn
            if left < 1e-6 * self.total_drawn:  # the difference has lost its digits
                left = float(self._expected(self.slot).sum()) / self.unit
            self._rescale(self.total_drawn / left if left > 0 else 1.0)

    def _rescale(self, factor: float) -> None:
        """Multiply every expected count."""
        self.unit = self.unit / factor if factor > 0 else math.inf
        if not 1e-6 < self.unit < 1e6:
            self.slot[:, EXPECTED] = self._expected(self.slot) / self.unit
            self.slot[:, SINCE] = 0.0
            self.time, self.unit = 0.0, 1.0
            self._restart_queue()
        play = min(0.25, 32.0 / max(self.total_drawn, 1.0)) * self.unit
        if self.unit < self.low:
            self.clock += self.reach * (self.low - self.unit + play)
            self.low = self.unit - play
        elif self.unit > self.low + 3.0 * play:
            self.low = self.unit - play

    def change(self, index: Tensor, mass: Tensor) -> None:
        where, new = index.numpy(), mass.numpy()
        if _repeats(where):
            where, first = np.unique(where, return_index=True)
            new = new[first]
        self.mass_sum += self._change(self.slot, where, new, self.time)
        if len(self.changed) != 1 or not np.array_equal(self.changed[0], where):  # mostly what was just drawn
            self.changed.append(where)

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        if self.draws % REFRESH == 0:
            self.mass_sum = float(self.slot[:, MASS].sum())
        self.draws += 1
        step = batch_size * self.unit / self.mass_sum
        self.reach = max(self.reach, 4.0 * self.total_drawn / self.mass_sum)
        self._look_at(np.concatenate((*self.changed, *self._due(step))))
        parts: list[Ints] = []
        missing = batch_size
        while missing > 0:
            fraction = torch.rand(missing, generator=generator, dtype=torch.float64).numpy()
            found = self._eligible(_first_occurrences(self.tree.search(fraction)))
            parts.append(found)
            missing -= len(found)
            if missing > 0:
                self.tree.put(found, np.zeros(len(found)))
        index = parts[0] if len(parts) == 1 else np.concatenate(parts)
        self.slot[index, DRAWN] += 1.0
        self.total_drawn += batch_size
        self.time += step
        self.clock += step
        self.changed = [index]
        return torch.from_numpy(index)

    def _look_at(self, index: Ints) -> None:
        """Settle which of the slots ``index`` (K,) are hidden, give them their mass in the tree and a place to wait."""
        mass = self._look(self.slot, self.wake, index, (self.time, self.unit, self.low, self.clock, self.reach))
        self.tree.put(index, mass)
        soon = index[self.wake[index] <= self.horizon]
        if len(soon):
            self.late = np.concatenate((self.late, soon))

    def _due(self, step: float) -> tuple[Ints, Ints]:
        """The slots whose time has come."""
        if self.clock >= self.horizon:
            self.horizon = self.clock + LOOKAHEAD * step
            near = (self.wake <= self.horizon).nonzero()[0]
            self.near = near[np.argsort(self.wake[near])]
            self.near_wake = self.wake[self.near]
            self.passed = 0
            self.late = self.late[:0]
        passed = int(np.searchsorted(self.near_wake, self.clock, side="right"))
        near = self.near[self.passed : passed]
        self.passed = passed
        late = self.late[:0]
        if len(self.late):
            due = self.wake[self.late] <= self.clock
            late, self.late = self.late[due], self.late[~due]
        return near[self.wake[near] <= self.clock], late

    def _eligible(self, index: Ints) -> Ints:
        """``index`` (K,) without slots that scaling has pushed behind since they were looked at, which are hidden
        now."""
        wrong = self._behind(self.slot, self.wake, index, self.time, self.unit)
        if not wrong.any():
            return index
        self._look_at(index[wrong])
        return index[~wrong]

    def state_dict(self, written: int) -> State:
        changed = np.concatenate((*self.changed, np.empty(0, dtype=np.int64)))
        return {
            "slot": torch.from_numpy(self.slot[:written].copy()),
            "hidden": torch.from_numpy(np.isfinite(self.wake[:written])),
            "changed": torch.from_numpy(changed),
            "mass_sum": self.mass_sum,
            "total_drawn": self.total_drawn,
            "time": self.time,
            "unit": self.unit,
            "draws": self.draws,
        }

    def load_state_dict(self, state: State) -> None:
        slot, hidden = state["slot"].numpy(), state["hidden"].numpy()
        self.slot[:] = 0.0
        self.slot[: len(slot)] = slot
        self.wake[:] = np.inf
        self.wake[: len(hidden)][hidden] = 0.0
        self.tree.fill(slot[:, MASS] * np.where(hidden, HIDDEN, 1.0))
        self.changed = [state["changed"].numpy().copy()]
        self.mass_sum, self.total_drawn = float(state["mass_sum"]), float(state["total_drawn"])
        self.time, self.unit, self.draws = float(state["time"]), float(state["unit"]), int(state["draws"])
        self._restart_queue()


def _repeats(index: Ints) -> bool:
    ordered = np.sort(index)
    return bool((ordered[1:] == ordered[:-1]).any())


def _first_occurrences(index: Ints) -> Ints:
    return index[np.sort(np.unique(index, return_index=True)[1])] if _repeats(index) else index


def _replace_arrays(slot: Floats, index: Ints, mass: Floats, time: float) -> tuple[float, float, float]:
    """Begin anew in the slots ``index`` (K,), all different, with masses (K,). Returns the expected (in units of
    ``unit``) and actual counts that were in them, and by how much the sum of all masses rises."""
    rows = slot[index]
    expected = rows[:, EXPECTED] + rows[:, MASS] * (time - rows[:, SINCE])
    columns = np.stack((expected, rows[:, DRAWN], mass - rows[:, MASS]))
    gone, drawn, rise = np.add.accumulate(columns, axis=1)[:, -1].tolist()
    rows[:] = 0.0
    rows[:, MASS], rows[:, SINCE] = mass, time
    slot[index] = rows
    return gone, drawn, rise


def _replace_loop(slot: Any, index: Any, mass: Any, time: Any) -> Any:
    gone = drawn = rise = 0.0
    for k in range(len(index)):
        i = index[k]
        gone += slot[i, EXPECTED] + slot[i, MASS] * (time - slot[i, SINCE])
        drawn += slot[i, DRAWN]
        rise += mass[k] - slot[i, MASS]
        slot[i, MASS], slot[i, DRAWN], slot[i, EXPECTED], slot[i, SINCE] = mass[k], 0.0, 0.0, time
    return gone, drawn, rise


def _change_arrays(slot: Floats, index: Ints, mass: Floats, time: float) -> float:
    """Give the slots ``index`` (K,), all different, new masses (K,); returns by how much the sum of all rises."""
    rows = slot[index]
    rise = np.add.accumulate(mass - rows[:, MASS])[-1]
    rows[:, EXPECTED] += rows[:, MASS] * (time - rows[:, SINCE])
    rows[:, SINCE] = time
    rows[:, MASS] = mass
    slot[index] = rows
    return float(rise)


def _change_loop(slot: Any, index: Any, mass: Any, time: Any) -> Any:
    rise = 0.0
    for k in range(len(index)):
        i = index[k]
        rise += mass[k] - slot[i, MASS]
        slot[i, EXPECTED] += slot[i, MASS] * (time - slot[i, SINCE])
        slot[i, SINCE] = time
        slot[i, MASS] = mass[k]
    return rise


def _behind_arrays(slot: Floats, wake: Floats, index: Ints, time: float, unit: float) -> NDArray[np.bool_]:
    """Which of the slots ``index`` (K,) are drawn too often and yet not hidden."""
    rows = slot[index]
    expected = rows[:, EXPECTED] + rows[:, MASS] * (time - rows[:, SINCE])
    behind: NDArray[np.bool_] = (rows[:, DRAWN] * unit > expected) & np.isinf(wake[index])
    return behind


def _behind_loop(slot: Any, wake: Any, index: Any, time: Any, unit: Any) -> Any:
    behind = np.empty(len(index), dtype=np.bool_)
    for k in range(len(index)):
        i = index[k]
        expected = slot[i, EXPECTED] + slot[i, MASS] * (time - slot[i, SINCE])
        behind[k] = slot[i, DRAWN] * unit > expected and wake[i] == np.inf
    return behind


def _look_arrays(slot: Floats, wake: Floats, index: Ints, clocks: tuple[float, float, float, float, float]) -> Floats:
    """Masses (K,) for the tree of slots ``index`` (K,), and their times to wake, into ``wake``."""
    time, unit, low, clock, reach = clocks
    rows = slot[index]
    mass, drawn = rows[:, MASS], rows[:, DRAWN]
    expected = rows[:, EXPECTED] + mass * (time - rows[:, SINCE])
    hidden = drawn * unit > expected
    with np.errstate(invalid="ignore", divide="ignore"):
        # A little early, for the rounding of these sums.
        wait = np.maximum(drawn * low - expected, 0.0) / np.maximum(mass, drawn / reach) * (1.0 - 1e-9)
        wake[index] = np.where(hidden, (clock + wait) * (1.0 - 1e-12), np.inf)
    masked: Floats = mass * np.where(hidden, HIDDEN, 1.0)
    return masked


def _look_loop(slot: Any, wake: Any, index: Any, clocks: Any) -> Any:
    time, unit, low, clock, reach = clocks
    masked = np.empty(len(index))
    for k in range(len(index)):
        i = index[k]
        mass, drawn = slot[i, MASS], slot[i, DRAWN]
        expected = slot[i, EXPECTED] + mass * (time - slot[i, SINCE])
        if drawn * unit > expected:
            wait = max(drawn * low - expected, 0.0) / max(mass, drawn / reach) * (1.0 - 1e-9)
            wake[i] = (clock + wait) * (1.0 - 1e-12)
            masked[k] = mass * HIDDEN
        else:
            wake[i] = np.inf
            masked[k] = mass
    return masked


_look_compiled = compiled(_look_loop, _look_arrays)
_replace_compiled = compiled(_replace_loop, _replace_arrays)
_change_compiled = compiled(_change_loop, _change_arrays)
_behind_compiled = compiled(_behind_loop, _behind_arrays)
