"""How often each slot was drawn and should have been, and distinct draws that keep the two together (RR-M's core).

``DenseDrawCounts`` touches every slot at every draw, as a GPU likes it. ``LazyDrawCounts``, for the CPU, touches the
few slots that were drawn, written or are about to become eligible, and gives the same counts.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from rlopt.buffers.samplers import draw_count_loops, sum_tree
from rlopt.buffers.samplers.draw_count_loops import DRAWN, EXPECTED, FULL, HIDDEN, MASS, SINCE
from rlopt.buffers.samplers.sum_tree import Floats, Ints, Masses, SumTree
from rlopt.types import State

LOOKAHEAD = 512
"""Minibatches between two looks at the whole queue."""

REFRESH = 4096
"""Minibatches after which the running sum of the masses is made anew."""


class DrawCounts(Masses, Protocol):
    """Keeps masses and counts of draws. A minibatch holds no slot twice, and must be no larger than the slots with
    mass; where ``stratified`` draws fall on one slot, all but one of them are made again, over all that is left."""

    def rarity(self, index: Tensor) -> Tensor:
        """Return the smallest mass of slots ``index`` (K,) over each, (K,) float32."""
        ...

    def counts(self) -> tuple[Tensor, Tensor]:
        """Return actual and expected counts (slots,) float64."""
        ...


def make_draw_counts(slots: int, device: torch.device) -> DrawCounts:
    """Return the fastest implementation on ``device``."""
    return LazyDrawCounts(slots) if device.type == "cpu" else DenseDrawCounts(slots, device)


class DenseDrawCounts:
    """Counts in plain tensors; a distinct draw is a race of exponential clocks, with no look by the host."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.table = torch.zeros((3, slots), dtype=torch.float64, device=device)
        self.masses, self.drawn, self.expected = self.table
        self.largest = torch.ones((), dtype=torch.float64, device=device)

    def enter(self, first: int, count: int, valid: Tensor | None) -> None:
        new = slice(first, first + count)
        self.masses[new] = self.largest if valid is None else self.largest * valid
        self.drawn[new] = 0.0
        self.expected[new] = 0.0
        total = self.expected.sum()
        self.expected.mul_(torch.where(total > 0, self.drawn.sum() / total, 1.0))

    def change(self, index: Tensor, mass: Tensor) -> None:
        mass, self.largest = sum_tree.finite_tensor(mass, self.largest)
        sum_tree.put_largest(self.masses, index, mass)

    def draw(
        self, batch_size: int, generator: torch.Generator, stratified: bool, weighted: bool
    ) -> tuple[Tensor, Tensor | None]:
        share = self.masses * (batch_size / self.masses.sum())
        clocks = torch.empty_like(share).exponential_(generator=generator)
        shown = torch.where(self.drawn > self.expected, HIDDEN * self.masses, self.masses)
        clocks /= shown
        if stratified:
            index = self._strata(batch_size, shown, clocks, generator)
        else:
            index = clocks.topk(batch_size, largest=False).indices
        self.expected += share
        self.drawn[index] += 1.0
        return index, self.rarity(index) if weighted else None

    @staticmethod
    def _strata(batch_size: int, masses: Tensor, clocks: Tensor, generator: torch.Generator) -> Tensor:
        """Return a slot from each of B equal shares of the mass; in place of repetitions those of the others whose
        ``clocks`` (slots,) ring first."""
        reach = masses.cumsum(0)
        at = torch.arange(batch_size, device=masses.device)
        at = at + torch.rand(batch_size, generator=generator, device=masses.device, dtype=masses.dtype)
        index = torch.searchsorted(reach, at * (reach[-1] / batch_size), right=True).clamp_(max=len(masses) - 1)
        again = torch.zeros_like(index, dtype=torch.bool)
        again[1:] = index[1:] == index[:-1]  # shares are in order, so what is equal stands side by side
        others = clocks.index_fill(0, index, torch.inf).topk(batch_size, largest=False).indices
        return torch.where(again, others[again.cumsum(0) - 1], index)

    def rarity(self, index: Tensor) -> Tensor:
        return sum_tree.rarity(self.masses[index])

    def counts(self) -> tuple[Tensor, Tensor]:
        return self.drawn.clone(), self.expected.clone()

    def state_dict(self, written: int) -> State:
        return {"table": self.table[:, :written].to("cpu", copy=True), "largest": float(self.largest)}

    def load_state_dict(self, state: State) -> None:
        table = state["table"] if "table" in state else _table_of(state)
        self.table.zero_()
        self.table[:, : table.shape[1]] = table.to(self.table.device)
        self.largest.fill_(state["largest"])


BUCKETS = 4 * LOOKAHEAD
"""Buckets of the queue, a quarter of a minibatch's time each."""


class WakeQueue(NamedTuple):
    """The slots that wake before ``horizon``, in buckets of ``width`` from ``origin`` on."""

    origin: float
    width: float
    horizon: float
    near: Ints
    """Those known when the queue was last filled, by bucket: bucket b's begin at ``starts[b]``."""
    starts: Ints
    heads: Ints
    """Those who came later: the first entry of each bucket, -1 for none."""
    after: Ints
    """The entry after each entry."""
    late: Ints
    """The slot of each entry."""
    cursor: Ints


class LazyDrawCounts:
    """Brings counts up to date when they are looked at.

    With p_i the mass, the expected count grows by B·p_i/Σp per minibatch, so for a slot last looked at when the
    global ``time`` T = Σ B·unit/Σp stood at s_i it is e_i = (x_i + p_i·(T - s_i)) / unit. Scaling all expected counts
    by f is ``unit /= f``. A slot is hidden while a_i·unit > x_i + p_i·(T - s_i).

    Hidden slots queue by a lower bound of the ``clock`` at which they become eligible, and are looked at again
    when it comes. Without scaling that is the exact time. Scaling moves ``unit`` a little both ways at every write;
    ``low`` ≤ unit follows it with some play, and only a fall of ``low`` by d can bring slots forward: by at most
    a_i·d, for which the clock advances by ``reach``·d. As max(p_i, a_i/reach) bounds what a step of the clock can
    bring a slot, and ``reach`` never falls, no slot is woken late.
    """

    def __init__(self, slots: int) -> None:
        self.tree = SumTree(slots)
        self.slot = sum_tree.aligned([slots, 4])
        self.wake: Floats = np.full(slots, np.inf)
        """The clock at which a hidden slot is looked at again; infinite where a slot is not hidden."""
        self.largest = 1.0
        self.mass_sum = 0.0
        self.total_drawn = 0.0
        self.time, self.unit = 0.0, 1.0
        self.draws = 0
        self.changed: list[Ints] = []
        """Slots to be looked at before the next draw."""
        self.drawn = torch.empty(0, dtype=torch.int64)
        """The last draw, which is among them."""
        none = np.empty(0, dtype=np.int64)
        heads, cursor = np.empty(BUCKETS, dtype=np.int64), np.zeros(4, dtype=np.int64)
        after, late = np.empty((2, max(4096, slots // 8)), dtype=np.int64)
        self.queue = WakeQueue(0.0, 1.0, -1.0, none, none, heads, after, late, cursor)
        self.touched: Ints = np.empty(2 * slots + 1, dtype=np.int64)  # one is written before it is known to count
        self._restart_queue()

    def _restart_queue(self) -> None:
        """Let every hidden slot be looked at before the next draw."""
        self.clock, self.low, self.reach = 0.0, self.unit, 0.0
        self.horizon = -1.0
        self.wake[np.isfinite(self.wake)] = 0.0

    def counts(self) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.slot[:, DRAWN].copy()), torch.from_numpy(self._expected(self.slot) / self.unit)

    def rarity(self, index: Tensor) -> Tensor:
        return sum_tree.rarity(torch.from_numpy(self.slot[index.numpy(), MASS]))

    def _expected(self, rows: Floats) -> Floats:
        """Return expected counts in units of ``unit``."""
        now: Floats = rows[:, EXPECTED] + rows[:, MASS] * (self.time - rows[:, SINCE])
        return now

    def enter(self, first: int, count: int, valid: Tensor | None) -> None:
        index, mass = np.arange(first, first + count), np.full(count, self.largest)
        mass = mass if valid is None else mass * valid.numpy()
        expected, drawn, rise = draw_count_loops.begin_slots(self.slot, index, mass, self.time)
        self.mass_sum += rise
        self.changed.append(index)
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
        if self.unit < self.low:
            play = self._play()
            self.clock += self.reach * (self.low - self.unit + play)
            self.low = self.unit - play

    def _play(self) -> float:
        return min(0.25, 32.0 / max(self.total_drawn, 1.0)) * self.unit

    def change(self, index: Tensor, mass: Tensor) -> None:
        where = index.numpy()
        rise, largest = draw_count_loops.change_slots(self.slot, where, mass.numpy(), self.time, self.largest)
        if largest < 0.0:
            raise sum_tree.no_slots(index, mass, len(self.slot))
        self.largest = largest
        self.mass_sum += rise
        if index is not self.drawn:
            self.changed.append(where.copy())

    def draw(
        self, batch_size: int, generator: torch.Generator, stratified: bool, weighted: bool
    ) -> tuple[Tensor, Tensor | None]:
        if self.draws % REFRESH == 0:
            self.mass_sum = float(self.slot[:, MASS].sum())
        self.draws += 1
        # Raising it wakes nobody late, and nobody is then looked at in vain for long.
        if self.unit > self.low + 3.0 * self._play():
            self.low = self.unit - self._play()
        step = batch_size * self.unit / self.mass_sum
        self.reach = max(self.reach, 4.0 * self.total_drawn / self.mass_sum)
        self._renew_hidden(step)
        found = self._draw_distinct(sum_tree.fractions(batch_size, generator), stratified)
        parts, missing = [found], batch_size - len(found)
        while missing > 0:
            self.tree.put(found, np.zeros(len(found)))
            found = self._draw_distinct(sum_tree.fractions(missing, generator))
            parts.append(found)
            missing -= len(found)
        index = parts[0] if len(parts) == 1 else np.concatenate(parts)
        self.total_drawn += batch_size
        self.time += step
        self.clock += step
        self.changed = [index]
        self.drawn = torch.from_numpy(index)
        return self.drawn, self.rarity(self.drawn) if weighted else None

    def _renew_hidden(self, step: float) -> None:
        """Look at the slots that were changed and at those whose time has come."""
        queue = self.queue
        if self.clock >= self.horizon or queue.cursor[FULL]:
            self.horizon = self.clock + LOOKAHEAD * step
            width = LOOKAHEAD * step / BUCKETS
            queue = queue._replace(origin=self.clock, width=width, horizon=self.horizon)
            near, starts = draw_count_loops.refill_queue(self.wake, self.touched, queue)
            self.queue = queue = queue._replace(near=near, starts=starts)
        changed = self.changed[0] if len(self.changed) == 1 else np.concatenate(self.changed)
        if len(changed) > len(self.slot):
            changed = np.unique(changed)
        draw_count_loops.renew_hidden(self.slot, self.wake, self._arrays, changed, self.touched, self._clocks(), queue)

    def _draw_distinct(self, fraction: Floats, stratified: bool = False) -> Ints:
        """Return the slots of ``draw_count_loops.draw_distinct``."""
        found: Ints = draw_count_loops.draw_distinct(
            self.slot, self.wake, self._arrays, fraction, self._clocks(), self.queue, stratified
        )
        return found

    @property
    def _arrays(self) -> tuple[Floats, Ints]:
        return self.tree.nodes, self.tree.offsets

    def _clocks(self) -> tuple[float, float, float, float, float]:
        return self.time, self.unit, self.low, self.clock, self.reach

    def state_dict(self, written: int) -> State:
        return {
            "slot": torch.from_numpy(self.slot[:written].copy()),
            "hidden": torch.from_numpy(np.isfinite(self.wake[:written])),
            "changed": torch.from_numpy(np.unique(np.concatenate((*self.changed, np.empty(0, dtype=np.int64))))),
            "largest": self.largest,
            "mass_sum": self.mass_sum,
            "total_drawn": self.total_drawn,
            "time": self.time,
            "unit": self.unit,
            "draws": self.draws,
        }

    def load_state_dict(self, state: State) -> None:
        state = _lazy_of(state) if "table" in state else state
        slot, hidden = state["slot"].numpy(), state["hidden"].numpy()
        self.slot[:] = 0.0
        self.slot[: len(slot)] = slot
        self.wake[:] = np.inf
        self.wake[: len(hidden)][hidden] = 0.0
        self.tree.fill(slot[:, MASS] * np.where(hidden, HIDDEN, 1.0))
        self.changed, self.drawn = [state["changed"].numpy().copy()], torch.empty(0, dtype=torch.int64)
        self.largest, self.mass_sum = float(state["largest"]), float(state["mass_sum"])
        self.total_drawn, self.draws = float(state["total_drawn"]), int(state["draws"])
        self.time, self.unit = float(state["time"]), float(state["unit"])
        self._restart_queue()


def _table_of(state: State) -> Tensor:
    """Return the table (3, written) of ``DenseDrawCounts`` that says what a state of ``LazyDrawCounts`` does."""
    mass, drawn, expected, since = state["slot"].unbind(1)
    return torch.stack((mass, drawn, (expected + mass * (state["time"] - since)) / state["unit"]))


def _lazy_of(state: State) -> State:
    """Return the state of ``LazyDrawCounts`` that says what one of ``DenseDrawCounts`` does."""
    mass, drawn, expected = state["table"]
    return {
        "slot": torch.stack((mass, drawn, expected, torch.zeros_like(mass)), 1),
        "hidden": drawn > expected,
        "changed": torch.empty(0, dtype=torch.int64),
        "largest": state["largest"],
        "mass_sum": float(mass.sum()),
        "total_drawn": float(drawn.sum()),
        "time": 0.0,
        "unit": 1.0,
        "draws": 0,
    }
