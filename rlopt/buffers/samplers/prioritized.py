"""Prioritised replay: proportional PER (Schaul et al. 2016, arXiv 1511.05952) and LAP (Fujimoto et al. 2020, arXiv
2007.06049)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rlopt.buffers.samplers.base import Validity, check_identity, checked_slots, identity
from rlopt.buffers.samplers.sum_tree import Masses, make_masses
from rlopt.buffers.samplers.sum_tree_loops import magnitudes
from rlopt.random import generator_state, set_generator_state, torch_generator
from rlopt.types import RloptError, State


class PrioritizedSampler:
    """Draws transition i with probability P(i) = m_i / Σ m, where m_i = (max(|δ_i|, floor) + epsilon)^alpha.

    A new transition has the largest mass seen so far (1 at first), as published; so a single outlier makes the newest
    transitions most of every minibatch for good, unless ``max_decay`` lets it fade. ``update_priority`` takes the raw
    errors δ.

    Args:
        alpha: how strongly errors count; 0 is uniform.
        beta: exponent of the importance weights w_i = (m_i / min m)^-beta, the minimum over the minibatch, which is
            (size · P(i))^-beta scaled to a largest weight of 1; 0 that stays gives no weights.
        anneal_draws: minibatches over which beta rises linearly to 1; None keeps it.
        epsilon: added to every |δ|.
        floor: smallest |δ| told apart.
        stratified: one transition from each of B equal shares of the mass (Schaul et al., appendix B.2.1), instead of
            B independent draws.
        max_decay: factor of the largest mass seen at every update of priorities; 1 keeps it.

    Raises:
        RloptError: where an option is out of range.
    """

    name: ClassVar[str] = "prioritized"

    def __init__(
        self,
        alpha: float = 0.6,
        beta: float = 0.4,
        anneal_draws: int | None = 1_000_000,
        epsilon: float = 1e-6,
        floor: float = 0.0,
        stratified: bool = True,
        max_decay: float = 1.0,
    ) -> None:
        if alpha < 0 or not 0 <= beta <= 1:
            raise RloptError(f"buffer.alpha must be at least 0 and buffer.beta within 0 … 1, not {alpha:g}, {beta:g}")
        if anneal_draws is not None and anneal_draws < 1:
            raise RloptError(f"buffer.anneal_draws must be at least 1 (or null: beta stays), not {anneal_draws}")
        if min(epsilon, floor) < 0 or (epsilon + floor) ** alpha < 1e-30:
            raise RloptError("(buffer.floor + buffer.epsilon)^alpha must be above 0, or perfect transitions vanish")
        if not 0 < max_decay <= 1:
            raise RloptError(f"buffer.max_decay must be above 0 and at most 1, not {max_decay:g}")
        self.alpha, self.beta, self.anneal_draws = alpha, beta, anneal_draws
        self.epsilon, self.floor, self.stratified, self.max_decay = epsilon, floor, stratified, max_decay

    def bind(self, slots: int, device: torch.device, seed: int) -> None:
        self.slots, self.device, self._on_cpu = slots, device, device.type == "cpu"
        self.generator = torch_generator(seed, "sampler", device=device)
        self.validity = Validity(slots, device)
        self.masses = self._make_masses()
        self.draws = 0
        self.written = 0
        self._new: list[tuple[int, int, Tensor | None]] = []

    def _make_masses(self) -> Masses:
        return make_masses(self.slots, self.device)

    def wrote(self, first: int, count: int, valid: Tensor | None) -> None:
        # Entered at the next draw, all at once: neither the largest mass nor the counts change before.
        self.validity.wrote(first, count, valid)
        self.written = max(self.written, first + count)
        if valid is not None:
            self._new.append((first, count, valid.to(self.device, copy=True)))
            return
        if self._new:
            start, length, also = self._new[-1]
            if also is None and start + length == first:
                self._new[-1] = (start, length + count, None)
                return
        self._new.append((first, count, None))

    def _enter_new(self) -> None:
        for new in self._new:
            self.masses.enter(*new)
        self._new.clear()

    def sample(self, batch_size: int, size: int) -> tuple[Tensor, Tensor | None]:
        held = self.validity.count(size)
        if self._new:
            self._enter_new()
        index, weight = self._draw(batch_size, held)
        if weight is not None:
            done = 0.0 if self.anneal_draws is None else min(1.0, self.draws / self.anneal_draws)
            weight.pow_(self.beta + (1.0 - self.beta) * done)
        self.draws += 1
        return index, weight

    def _draw(self, batch_size: int, held: int) -> tuple[Tensor, Tensor | None]:
        return self.masses.draw(batch_size, self.generator, self.stratified, self.weighted)

    @property
    def weighted(self) -> bool:
        """Whether draws come with importance weights: beta is not 0, or will not stay 0."""
        return self.beta > 0 or self.anneal_draws is not None

    @property
    def max_mass(self) -> float:
        """The largest mass seen, which new transitions have."""
        return float(self.masses.largest)

    def update_priority(self, index: Tensor, priority: Tensor) -> None:
        """Take new errors δ (B,) of slots ``index`` (B,). One that is not finite counts as the largest seen, as if the
        transition were new; slots that hold no transition stay so.

        Raises:
            RloptError: these are not as many numbers as slots, or something is no slot.
        """
        index = checked_slots(index, priority)
        if self._new:
            self._enter_new()
        if self.max_decay < 1.0:
            self.masses.largest = self.masses.largest * self.max_decay
        self.masses.change(index, self._mass(priority.detach()))

    def _mass(self, error: Tensor) -> Tensor:
        if self._on_cpu:  # one short call instead of three
            error = error if error.dtype is torch.float32 and error.is_cpu else error.to("cpu", torch.float64)
            return torch.from_numpy(magnitudes(error.numpy(), self.floor, self.epsilon)).pow_(self.alpha)
        error = error.to(self.device, torch.float64)
        return error.abs().clamp_(min=self.floor).add_(self.epsilon).pow_(self.alpha)

    def state_dict(self) -> State:
        # What waits is saved as it waits: entering it now would round otherwise than entering it with what comes next.
        return {
            "of": self._identity(),
            "generator": generator_state(self.generator),
            "validity": self.validity.state_dict(),
            "draws": self.draws,
            "written": self.written,
            "masses": self.masses.state_dict(self.written),
            "new": [
                {"first": first, "count": count, "valid": None if valid is None else valid.clone()}
                for first, count, valid in self._new
            ],
        }

    def _identity(self) -> State:
        return {**identity(self), "alpha": self.alpha}  # the masses in store are powers of it

    def load_state_dict(self, state: State) -> None:
        check_identity(state, self._identity(), "sampler")
        set_generator_state(self.generator, state["generator"])
        self.validity.load_state_dict(state["validity"])
        self.draws, self.written = int(state["draws"]), int(state["written"])
        self.masses.load_state_dict(state["masses"])
        self._new = [
            (int(new["first"]), int(new["count"]), None if new["valid"] is None else new["valid"].to(self.device))
            for new in state["new"]
        ]


class LAPSampler(PrioritizedSampler):
    """Draws by loss-adjusted priority: m_i = max(|δ_i|, floor)^alpha without importance weights.

    It belongs with a Huber loss whose threshold is ``floor`` (1 with alpha 0.4 for continuous control; 0.01 with 0.6 in
    the authors' Atari code).
    """

    name: ClassVar[str] = "lap"
    td_loss: ClassVar[str] = "huber"
    """What ``agent.td_loss=auto`` becomes."""

    def __init__(self, alpha: float = 0.4, floor: float = 1.0, max_decay: float = 1.0) -> None:
        if floor <= 0:
            raise RloptError(f"buffer.floor must be above 0, not {floor:g}")
        super().__init__(alpha, 0.0, None, epsilon=0.0, floor=floor, stratified=False, max_decay=max_decay)
