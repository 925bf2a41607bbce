"""RR-M: reshuffling by masking, against counting slot by slot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlopt.buffers import PrioritizedReshuffledSampler, PrioritizedSampler
from rlopt.buffers.samplers.draw_count_loops import FULL
from rlopt.buffers.samplers.draw_counts import DenseDrawCounts, DrawCounts
from rlopt.state import states_equal

CPU = torch.device("cpu")


def bound(sampler: PrioritizedSampler, slots: int, seed: int = 0) -> Any:
    sampler.bind(slots, CPU, seed)
    return sampler


class SlowMasking:
    """The counts of RR-M, every slot at every step, as the paper's pseudocode has them."""

    def __init__(self, slots: int) -> None:
        self.p, self.a, self.e = np.zeros(slots), np.zeros(slots), np.zeros(slots)
        self.max_mass = 1.0

    def add(self, slots: list[int], valid: list[bool]) -> None:
        self.p[slots] = self.max_mass * np.array(valid)
        had = self.e[slots].sum() > 0
        self.a[slots] = self.e[slots] = 0
        if had and self.e.sum() > 0:
            self.e *= self.a.sum() / self.e.sum()

    def draw(self, index: np.ndarray[Any, Any]) -> None:
        """``index`` must be distinct, not hidden while others remain, and is counted."""
        assert len(set(index.tolist())) == len(index)
        assert (self.p[index] > 0).all()
        ahead = self.a - self.e
        free = (self.p > 0) & (ahead <= 1e-9)
        hidden = ahead[index] > 1e-9
        # A hidden slot is only drawn where the free ones run out.
        assert not hidden.any() or int(free.sum()) - int((ahead[free] > -1e-9).sum()) <= int((~hidden).sum())
        self.e += len(index) * self.p / self.p.sum()
        self.a[index] += 1

    def update(self, index: np.ndarray[Any, Any], mass: np.ndarray[Any, Any]) -> None:
        self.max_mass = max(self.max_mass, mass.max())
        self.p[index] = np.where(self.p[index] > 0, mass, 0)


class Dense(PrioritizedReshuffledSampler):
    """The sampler as it is on a GPU."""

    def _make_masses(self) -> DrawCounts:
        return DenseDrawCounts(self.slots, self.device)


actions = st.one_of(
    st.lists(st.booleans(), min_size=2, max_size=2).map(lambda valid: ("add", valid)),
    st.just(("add", [True, True])),
    st.integers(1, 5).map(lambda size: ("draw", size)),
    st.integers(0, 10**6).map(lambda seed: ("update", seed)),
)
histories = st.lists(actions, min_size=1, max_size=60)


@pytest.mark.parametrize("sampler_class", [PrioritizedReshuffledSampler, Dense])
@settings(max_examples=120, deadline=None)
@given(history=histories, rows=st.integers(3, 12), seed=st.integers(0, 99))
def test_masking_equals_counting_slot_by_slot(
    sampler_class: Any, history: list[tuple[str, Any]], rows: int, seed: int
) -> None:
    """Random adds of two environments (with invalid rows), draws, and priority updates of any slots."""
    slots, row = 2 * rows, 0
    sampler, slow = bound(sampler_class(alpha=1.0, floor=0.1), slots, seed), SlowMasking(slots)
    for what, value in [("add", [True, True]), *history]:
        size = min(2 * row, slots)
        if what == "add":
            first = 2 * (row % rows)
            sampler.wrote(first, 2, None if all(value) else torch.tensor(value))
            slow.add([first, first + 1], value)
            row += 1
        elif what == "update":
            rng = np.random.default_rng(value)
            index = rng.choice(size, rng.integers(1, size + 1), replace=False)
            error = rng.choice([0.01, 0.3, 1.0, 2.0, 40.0], len(index))
            sampler.update_priority(torch.from_numpy(index), torch.from_numpy(error))
            slow.update(index, np.maximum(error, 0.1))
        else:
            held = int((slow.p > 0).sum())
            if held == 0:
                continue
            index = sampler.sample(value, size)[0].numpy()
            assert len(index) == value
            for part in np.split(index, range(held, value, held)):
                slow.draw(part)
        actual, expected = sampler.counts()
        assert actual.numpy() == pytest.approx(slow.a, abs=1e-9)
        assert expected.numpy() == pytest.approx(slow.e, rel=1e-7, abs=1e-9)
        # Where nothing with an expected count is left, there is nothing to scale.
        if slow.e.sum() > 0:
            assert actual.sum().item() == pytest.approx(expected.sum().item(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("adds", [0, 1, 40])
def test_every_slot_is_hidden_exactly_while_it_is_ahead(adds: int) -> None:
    """The queue against looking at every slot: just before a draw, with few and many writes per draw."""
    slots = 600
    sampler = bound(PrioritizedReshuffledSampler(alpha=1.0), slots, 3)
    sampler.wrote(0, slots, None)
    visits = sampler.masses
    rng = np.random.default_rng(0)
    position = checked = 0
    pick = visits._draw_distinct

    def check(fraction: Any, stratified: bool = False) -> Any:
        nonlocal checked
        checked += 1
        actual, expected = (x.numpy() for x in visits.counts())
        leaves, mass = visits.tree.leaves, visits.slot[:, 0]
        masked = leaves < 1e-3 * mass
        if len(fraction) == 16:  # the first try of a draw: nothing is set aside yet
            margin = 1e-9 * (1 + expected)
            assert not (masked & (actual <= expected - margin)).any()  # nobody wakes late
            free_but_ahead = ~masked & (actual > expected + margin)
            # Only writes can push a free slot behind, by a hair; the draw itself then refuses it.
            assert not free_but_ahead.any() or (adds and (actual - expected)[free_but_ahead].max() < 0.5)
        return pick(fraction)

    visits._draw_distinct = check
    for _ in range(600):
        for _ in range(adds):
            sampler.wrote(position, 1, None)
            position = (position + 1) % slots
        before = sampler.counts()
        index, _ = sampler.sample(16, slots)
        assert (before[0][index] <= before[1][index] + 1e-9).all()
        sampler.update_priority(index, torch.from_numpy(rng.lognormal(0, 0.7, 16)))
    assert checked >= 600


@pytest.mark.parametrize("overwritten", ["behind", "ahead"])
def test_scaling_wakes_and_hides_in_time(overwritten: str) -> None:
    """Overwriting the slots furthest behind raises every other expected count, so that hidden slots must wake early;
    overwriting those furthest ahead lowers them, so that slots found eligible may no longer be drawn."""
    slots = 3000
    sampler = bound(PrioritizedReshuffledSampler(alpha=1.0), slots, 5)
    sampler.wrote(0, slots, None)
    sampler.update_priority(torch.arange(slots), torch.rand(slots, generator=torch.Generator().manual_seed(1)) + 0.5)
    for i in range(400):
        if i >= 300:
            actual, expected = sampler.counts()
            ahead = actual - expected
            for slot in ahead.topk(100, largest=overwritten == "ahead").indices.tolist():
                sampler.wrote(slot, 1, None)
        actual, expected = sampler.counts()
        index, _ = sampler.sample(32, slots)
        assert (actual[index] <= expected[index] + 1e-9).all()
        visits = sampler.masses
        hidden = torch.from_numpy(np.isfinite(visits.wake))
        hidden[index] = False
        assert (actual > expected - 1e-9)[hidden].all()


def test_nobody_is_looked_at_in_vain_once_writing_has_ceased() -> None:
    """One early overwrite leaves room for a large fall of the scale; drawing on, that room must shrink, or every slot
    within it would be looked at again at each draw."""
    sampler = bound(PrioritizedReshuffledSampler(), 2000)
    sampler.wrote(0, 2000, None)
    drawn, _ = sampler.sample(32, 2000)
    sampler.wrote(min(set(range(2000)) - set(drawn.tolist())), 1, None)
    looks, visits = [], sampler.masses
    settle = visits._renew_hidden

    def count(step: float) -> None:
        before = visits.wake.copy()
        settle(step)
        looks.append(int((before != visits.wake).sum()))

    for i in range(400):
        visits._renew_hidden = count if i >= 100 else settle
        sampler.sample(32, 2000)
    # Each slot drawn is looked at once to be hidden, and a few times to wake; it was over a thousand looks a draw.
    assert np.mean(looks) < 8 * 32


@pytest.mark.parametrize("sampler_class", [PrioritizedReshuffledSampler, Dense])
def test_masking_keeps_counts_near_their_expectation(sampler_class: Any) -> None:
    """4,000 fixed priorities, 3,000 minibatches of 32: a - e stays below 1 with a variance of 0.32; independent
    prioritised draws have 25."""
    mass = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.05
    masked = bound(sampler_class(alpha=1.0), 4000)
    plain = bound(PrioritizedSampler(alpha=1.0, stratified=False, epsilon=1e-12), 4000)
    for sampler in (masked, plain):
        sampler.wrote(0, 4000, None)
        sampler.update_priority(torch.arange(4000), mass)
    counts = torch.zeros(4000, dtype=torch.float64)
    draws = 3000 if sampler_class is PrioritizedReshuffledSampler else 800
    for _ in range(draws):
        masked.sample(32, 4000)
        counts.index_add_(0, plain.sample(32, 4000)[0], torch.ones(32, dtype=torch.float64))
    actual, expected = masked.counts()
    assert expected.numpy() == pytest.approx((draws * 32 * mass / mass.sum()).numpy(), rel=1e-9)
    ahead = actual - expected
    assert ahead.max() < 1
    assert 0.2 < ahead.var().item() < 0.45
    assert abs(ahead.sum().item()) < 1e-6
    if draws == 3000:
        assert 22 < (counts - expected).var().item() < 26


def test_masking_without_history_is_prioritised_sampling() -> None:
    """The first slot of the first minibatch falls in proportion to mass."""
    counts = torch.zeros(8)
    mass = torch.arange(1, 9).float()
    sampler = bound(PrioritizedReshuffledSampler(alpha=1.0), 8)
    sampler.wrote(0, 8, None)
    sampler.update_priority(torch.arange(8), mass)
    fresh = sampler.state_dict()["masses"]
    for _ in range(4000):
        counts[sampler.sample(1, 8)[0]] += 1
        sampler.masses.load_state_dict(fresh)
    expected = 4000 * mass / mass.sum()
    assert ((counts - expected).square() / expected).sum() < 30  # χ² with 7 degrees of freedom


def test_a_slot_alone_in_its_mass_is_drawn_all_the_same() -> None:
    """Where everything else is hidden or weighs nothing, the hidden are drawn rather than none; and the batch may be
    larger than what is stored."""
    sampler = bound(PrioritizedReshuffledSampler(alpha=1.0, floor=1e-9), 4)
    sampler.wrote(0, 3, None)
    sampler.update_priority(torch.arange(3), torch.tensor([1e6, 1.0, 1e-9]))
    for _ in range(20):
        index, _ = sampler.sample(8, 3)
        assert torch.bincount(index, minlength=3).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_a_queue_without_room_for_all_who_come_late_changes_nothing() -> None:
    """With errors over four orders of magnitude, repeated slots, and errors of slots that were not drawn."""
    capacity, adds = 3000, 75
    samplers = [bound(PrioritizedReshuffledSampler(beta=0.5), capacity) for _ in range(2)]
    queue = samplers[1].masses.queue
    samplers[1].masses.queue = queue._replace(late=queue.late[:40], after=queue.after[:40])
    rng = np.random.default_rng(capacity)
    full = 0
    for i in range(600):
        size = min((i + 1) * adds, capacity)
        error = torch.from_numpy(rng.lognormal(0, 2, 32)) if i % 90 else torch.full((32,), torch.inf)
        other = torch.from_numpy(rng.integers(0, size, 32))
        batches = []
        for sampler in samplers:
            if i < 60 or i % 20 == 0:
                sampler.wrote(i * adds % capacity, adds, None)
            batches.append(sampler.sample(32, size))
            full += int(sampler.masses.queue.cursor[FULL])
            sampler.update_priority(batches[-1][0], error)
            if i % 7 == 0:
                sampler.update_priority(other, error)
        assert torch.equal(batches[0][0], batches[1][0])
        assert torch.equal(batches[0][1], batches[1][1])
    assert full > 0
    assert states_equal(samplers[0].state_dict(), samplers[1].state_dict()) is None


@pytest.mark.parametrize("dense", [False, True])
def test_a_stratified_minibatch_takes_one_of_each_share(dense: bool) -> None:
    """Equal masses, nothing hidden yet: the k-th slot lies in the k-th share. Afterwards counts stay near."""
    sampler = bound(PrioritizedReshuffledSampler(stratified=True), 160)
    if dense:
        sampler.masses = DenseDrawCounts(160, CPU)
    sampler.wrote(0, 160, None)
    index, _ = sampler.sample(16, 160)
    assert (index // 10).tolist() == list(range(16))
    rng = np.random.default_rng(0)
    for _ in range(300):
        index, _ = sampler.sample(16, 160)
        assert len(index.unique()) == 16
        sampler.update_priority(index, torch.from_numpy(rng.lognormal(0, 0.5, 16)))
    drawn, expected = sampler.counts()
    assert drawn.sum().item() == pytest.approx(expected.sum().item())
    assert (drawn - expected).abs().max() < 3.0 and (drawn - expected).max() < 1.01
