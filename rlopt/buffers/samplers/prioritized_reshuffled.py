"""RR-M: random reshuffling by masking ("Experience Replay with Random Reshuffling", arXiv 2503.02269)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rlopt.buffers.samplers.draw_counts import DrawCounts, make_draw_counts
from rlopt.buffers.samplers.prioritized import PrioritizedSampler


class PrioritizedReshuffledSampler(PrioritizedSampler):
    """Draws by priority, with transitions hidden while they have been drawn more often than they should have been.

    For each transition i two counts are kept: how often it was drawn, a_i, and how often it should have been,
    e_i = Σ over minibatches of B·m_i/Σm. One with a_i > e_i weighs 1e-8 of its mass until e_i has caught up. A
    minibatch holds no transition twice. A new transition begins with a = e = 0, and all e are scaled so that Σa = Σe
    again.

    Masses are those of ``PrioritizedSampler``; the defaults are the paper's, LAP's on Atari: max(|δ|, 0.01)^0.6 without
    importance weights. Where the authors' code gives a new transition's priority to the slot after it, here the slot
    just written has it.

    ``stratified`` draws from B equal shares of what is not hidden, and makes repetitions again (the paper's code lets
    them stand and counts them once).

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
        max_decay: float = 1.0,
        stratified: bool = False,
    ) -> None:
        super().__init__(alpha, beta, anneal_draws, epsilon, floor, stratified=stratified, max_decay=max_decay)

    masses: DrawCounts

    def _make_masses(self) -> DrawCounts:
        return make_draw_counts(self.slots, self.device)

    def _draw(self, batch_size: int, held: int) -> tuple[Tensor, Tensor | None]:
        if batch_size <= held:
            return super()._draw(batch_size, held)
        sizes = [held] * (batch_size // held) + [batch_size % held] * (batch_size % held > 0)
        index = torch.cat([self.masses.draw(size, self.generator, False, False)[0] for size in sizes])
        return index, self.masses.rarity(index) if self.weighted else None

    def counts(self) -> tuple[Tensor, Tensor]:
        """Return how often each slot's transition was drawn and should have been drawn: (slots,) float64 each."""
        if self._new:
            self._enter_new()
        return self.masses.counts()
