"""RR-M: random reshuffling by masking ("Experience Replay with Random Reshuffling", arXiv 2503.02269)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rlopt.buffers.prioritized import PrioritizedSampler
from rlopt.buffers.visits import DenseVisits, LazyVisits
from rlopt.types import State


class PrioritizedReshuffledSampler(PrioritizedSampler):
    """Prioritised draws, with transitions hidden while they have been drawn more often than they should have been.

    For each transition i two counts are kept: how often it was drawn, a_i, and how often it should have been,
    e_i = Σ over minibatches of B·m_i/Σm. One with a_i > e_i weighs 1e-8 of its mass until e_i has caught up. A
    minibatch holds no transition twice. A new transition begins with a = e = 0, and all e are scaled so that Σa = Σe
    again.

    Masses are those of ``PrioritizedSampler``; the defaults are the paper's, LAP's on Atari: max(|δ|, 0.01)^0.6 without
    importance weights. Where the authors' code gives a new transition's priority to the slot after it, here the slot
    just written has it.

    Differences to counting slot by slot, none above 1e-7 in probability: a transition that became over-drawn only
    because others were overwritten is found out when it is drawn, and then another is drawn in its place.
    """

    name: ClassVar[str] = "prioritized_reshuffled"

    def __init__(
        self,
        alpha: float = 0.6,
        beta: float = 0.0,
        anneal_draws: int | None = None,
        epsilon: float = 0.0,
        floor: float = 0.01,
    ) -> None:
        super().__init__(alpha, beta, anneal_draws, epsilon, floor, stratified=False)

    def _allocate(self) -> None:
        cpu = self.device.type == "cpu"
        self.visits: LazyVisits | DenseVisits = LazyVisits(self.slots) if cpu else DenseVisits(self.slots, self.device)

    def _enter(self, index: Tensor, mass: Tensor) -> None:
        self.visits.enter(index, mass)

    def sample(self, batch_size: int, size: int) -> tuple[Tensor, Tensor | None]:
        held = self._begin_draw(size)
        if batch_size <= held:
            index = self.visits.draw(batch_size, self.generator)
        else:
            counts = [held] * (batch_size // held) + [batch_size % held] * (batch_size % held > 0)
            index = torch.cat([self.visits.draw(count, self.generator) for count in counts])
        return index, None if self.beta == 0 else self._weight(self.visits.mass(index))

    def _change(self, index: Tensor, mass: Tensor) -> None:
        if self.validity.invalid:
            mass = mass * (self.visits.mass(index) > 0)
        self.visits.change(index, mass)

    def counts(self) -> tuple[Tensor, Tensor]:
        """How often each slot's transition was drawn and should have been drawn: (slots,) float64 each."""
        if self._new:
            self._enter_new()
        return self.visits.counts()

    def _table_state(self) -> State:
        return {"visits": self.visits.state_dict(self.written)}

    def _load_table(self, state: State) -> None:
        self.visits.load_state_dict(state["visits"])
