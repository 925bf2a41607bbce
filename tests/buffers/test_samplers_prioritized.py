"""Trees, prioritised draws, and reshuffling by masking: against theory and against counting slot by slot."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlopt.buffers import LAPSampler, PrioritizedReshuffledSampler, PrioritizedSampler
from rlopt.buffers.kernels import COMPILED
from rlopt.buffers.sum_tree import Masses, ScanMasses, SumTree, TreeMasses
from rlopt.buffers.visits import CompiledVisits, DenseVisits, LazyVisits, Visits
from rlopt.state import load_state, save_state, states_equal
from rlopt.types import RloptError

CPU = torch.device("cpu")
NUMBA = [False, True] if COMPILED else [False]


def bound(sampler: PrioritizedSampler, slots: int, seed: int = 0) -> Any:
    sampler.bind(slots, CPU, seed)
    return sampler


# --- sums over slots ------------------------------------------------------------------------------------------------


class Tree:
    """``SumTree`` and the masses of ``ScanMasses`` behind one face, for tests of what they share."""

    def __init__(self, masses: TreeMasses | ScanMasses) -> None:
        self.masses = masses

    def put(self, index: Any, mass: Any) -> None:
        if isinstance(self.masses, TreeMasses):
            self.masses.tree.put(index, mass)
        else:
            self.masses.leaves[torch.from_numpy(index)] = torch.from_numpy(mass)

    def find(self, fraction: Any) -> Any:
        if isinstance(self.masses, TreeMasses):
            return self.masses.tree.search(fraction)
        return self.masses.find(torch.from_numpy(fraction)).numpy()

    def mass(self) -> Any:
        leaves = self.masses.tree.leaves if isinstance(self.masses, TreeMasses) else self.masses.leaves.numpy()
        return leaves.copy()


def implementations(slots: int) -> list[Masses]:
    return [*(TreeMasses(slots, compiled) for compiled in NUMBA), ScanMasses(slots, CPU)]


@pytest.mark.parametrize("slots", [1, 7, 8, 9, 64, 65, 1000, 5000])
def test_fractions_find_their_slots(slots: int) -> None:
    """Whole-number masses add without rounding, so every implementation must agree with a cumulative sum."""
    rng = np.random.default_rng(slots)
    mass = np.zeros(slots)
    trees = [Tree(masses) for masses in implementations(slots)]
    for round in range(4):
        index = rng.permutation(slots)[: slots // (round + 1) + 1]
        mass[index] = rng.integers(0, 5, len(index)) * (rng.random(len(index)) < 0.7)
        mass[index[0]] = 3
        total = mass.sum()
        targets = np.concatenate((rng.integers(0, int(total), 50), [0, total - 1, total - 1 + 0.999]))
        expected = np.searchsorted(np.cumsum(mass), targets, side="right")
        for tree in trees:
            tree.put(index, mass[index])
            assert tree.find((targets + 1e-4) / total).tolist() == expected.tolist()
            assert tree.mass().tolist() == mass.tolist()


def test_a_slot_without_mass_is_never_found_whatever_the_rounding() -> None:
    """Masses over 30 orders of magnitude, and the largest fraction below one, which rounds up to the total."""
    rng = np.random.default_rng(0)
    for tree in map(Tree, implementations(300)):
        for _ in range(200):
            mass = 10.0 ** rng.uniform(-20, 10, 300) * (rng.random(300) < 0.3)
            mass[rng.integers(300)] = 1e-20
            tree.put(np.arange(300), mass)
            found = tree.find(np.concatenate((rng.random(50), [0.0, 0.5, 1 - 2**-53])))
            assert (mass[found] > 0).all()


def test_every_table_keeps_and_restores_its_masses() -> None:
    """Entering, changing (not finite: the largest seen; without mass: none), one count of several, saving."""
    for slots in (3, 40):
        for masses, fresh in zip(implementations(slots), implementations(slots), strict=True):
            masses.enter(0, 3, torch.tensor([True, False, True]))
            masses.change(torch.tensor([0, 1, 0]), torch.tensor([4.0, 9.0, 4.0], dtype=torch.float64))
            masses.change(torch.tensor([2]), torch.tensor([float("nan")], dtype=torch.float64))
            assert masses.state_dict(3)["mass"].tolist() == [4, 0, 9]
            masses.enter(1, 1, None)
            index, rare = masses.draw(60, torch.Generator().manual_seed(0), True, True)
            assert rare.tolist() == pytest.approx([{0: 1, 1: 4 / 9, 2: 4 / 9}[i] for i in index.tolist()])
            fresh.enter(0, slots, None)
            fresh.load_state_dict(masses.state_dict(3))
            assert states_equal(fresh.state_dict(slots), masses.state_dict(slots)) is None


@pytest.mark.skipif(not COMPILED, reason="needs numba")
def test_the_compiled_tree_has_the_same_bits() -> None:
    rng = np.random.default_rng(1)
    plain, compiled = SumTree(700, False), SumTree(700, True)
    for _ in range(50):
        index = rng.integers(0, 700, 40)
        mass = 10.0 ** rng.uniform(-8, 4, 40)
        plain.put(index, mass)
        compiled.put(index, mass)
        assert np.array_equal(plain.nodes, compiled.nodes)
        fraction = rng.random(100)
        for stratified in (False, True):
            assert np.array_equal(plain.search(fraction, stratified), compiled.search(fraction, stratified))


def test_sums_do_not_drift() -> None:
    """A huge mass that comes and goes leaves nothing behind."""
    tree = SumTree(100)
    tree.put(np.arange(100), np.full(100, 1e-3))
    before = tree.nodes.copy()
    for _ in range(10):
        tree.put(np.array([37]), np.array([1e15]))
        tree.put(np.array([37]), np.array([1e-3]))
    assert np.array_equal(tree.nodes, before)


# --- PER and LAP ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stratified", [False, True])
def test_frequencies_are_proportional_to_the_power_of_the_errors(stratified: bool) -> None:
    sampler = bound(PrioritizedSampler(alpha=0.5, epsilon=0.01, stratified=stratified), 40)
    sampler.wrote(0, 32, None)
    error = torch.linspace(-3, 3, 32)
    sampler.update_priority(torch.arange(32), error)
    counts = torch.zeros(40)
    for _ in range(4000):
        counts.index_add_(0, sampler.sample(16, 32)[0], torch.ones(16))
    probability = torch.cat(((error.abs() + 0.01) ** 0.5, torch.zeros(8)))
    probability /= probability.sum()
    expected = 64000 * probability
    deviation = (counts - expected)[:32] / (expected * (1 - probability))[:32].sqrt()
    assert counts[32:].sum() == 0
    assert deviation.abs().max() < 4
    if stratified:
        assert deviation.square().mean() < 0.9  # less than the 1 of independent draws


def test_stratified_draws_take_one_from_each_share() -> None:
    sampler = bound(PrioritizedSampler(alpha=0.0), 64)
    sampler.wrote(0, 64, None)
    for _ in range(20):
        assert (sampler.sample(16, 64)[0] // 4).tolist() == list(range(16))


def test_importance_weights_by_hand() -> None:
    """Masses 1, 1, 2, 4 of N = 4: P = ⅛, ⅛, ¼, ½, N·P = ½, ½, 1, 2; β = ½ gives √2, √2, 1, 1/√2 over √2."""
    sampler = bound(PrioritizedSampler(alpha=1.0, beta=0.5, anneal_draws=None, epsilon=1e-12), 4)
    sampler.wrote(0, 4, None)
    sampler.update_priority(torch.arange(4), torch.tensor([1.0, -1.0, 2.0, 4.0]))
    expected = torch.tensor([1.0, 1.0, 0.5**0.5, 0.5])
    for _ in range(50):
        index, weight = sampler.sample(8, 4)
        assert weight.dtype == torch.float32
        assert torch.allclose(weight, expected[index] / expected[index].max())


def test_weights_undo_the_preference_when_beta_is_one() -> None:
    """The weighted mean of any function then equals its uniform mean, up to the common scale."""
    sampler = bound(PrioritizedSampler(alpha=1.0, beta=1.0, stratified=False), 20)
    sampler.wrote(0, 20, None)
    sampler.update_priority(torch.arange(20), torch.linspace(0.5, 4, 20))
    value = torch.arange(20).double()
    index, weight = sampler.sample(200_000, 20)
    weight = weight.double()
    assert ((weight * value[index]).sum() / weight.sum()).item() == pytest.approx(9.5, abs=0.1)


def test_beta_rises_to_one() -> None:
    sampler = bound(PrioritizedSampler(alpha=1.0, beta=0.4, anneal_draws=10, epsilon=1e-12), 2)
    sampler.wrote(0, 2, None)
    sampler.update_priority(torch.arange(2), torch.tensor([1.0, 2.0]))
    seen = []
    for _ in range(13):
        _, weight = sampler.sample(64, 2)  # half of the strata lie in each
        seen.append(-np.log2(weight.min().item()))
    assert seen == pytest.approx([*np.linspace(0.4, 1.0, 11), 1.0, 1.0], abs=1e-6)


def test_new_transitions_have_the_largest_mass_seen() -> None:
    sampler = bound(PrioritizedSampler(alpha=1.0, epsilon=1e-9), 6)
    sampler.wrote(0, 2, None)
    assert sampler.state_dict()["masses"]["mass"].tolist() == [1, 1]
    sampler.update_priority(torch.tensor([0]), torch.tensor([5.0]))
    sampler.wrote(2, 1, None)
    sampler.update_priority(torch.tensor([0]), torch.tensor([0.5]))
    sampler.wrote(3, 2, torch.tensor([False, True]))
    assert sampler.state_dict()["masses"]["mass"].tolist() == pytest.approx([0.5, 1, 5, 0, 5])


@pytest.mark.parametrize("sampler_class", [PrioritizedSampler, LAPSampler, PrioritizedReshuffledSampler])
def test_no_priority_brings_an_invalid_slot_back_and_none_poisons_the_tree(sampler_class: Any) -> None:
    sampler = bound(sampler_class(), 6)
    sampler.wrote(0, 6, torch.tensor([True, False, True, True, True, True]))
    sampler.update_priority(torch.arange(6), torch.tensor([1.0, 9.0, torch.nan, torch.inf, 0.5, 2.0]))
    seen: set[int] = set()
    for _ in range(200):
        index, _ = sampler.sample(4, 6)
        seen |= set(index.tolist())
        sampler.update_priority(index, torch.ones(4))
    assert seen == {0, 2, 3, 4, 5}
    sampler.wrote(0, 6, torch.zeros(6, dtype=torch.bool))
    with pytest.raises(RloptError, match="no transition yet"):
        sampler.sample(1, 6)


def test_lap_masses_by_hand() -> None:
    sampler = bound(LAPSampler(alpha=0.5, floor=1.0), 4)
    sampler.wrote(0, 4, None)
    sampler.update_priority(torch.arange(4), torch.tensor([0.0, -0.5, 4.0, -9.0]))
    assert sampler.state_dict()["masses"]["mass"].tolist() == pytest.approx([1, 1, 2, 3])
    index, weight = sampler.sample(7000, 4)
    assert weight is None
    assert torch.bincount(index).double().div(1000).tolist() == pytest.approx([1, 1, 2, 3], abs=0.15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "alpha"),
        ({"beta": 1.5}, "beta"),
        ({"anneal_draws": 0}, "anneal_draws"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": -1.0, "floor": 2.0}, "epsilon"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RloptError, match=message):
        PrioritizedSampler(**options)
    with pytest.raises(RloptError, match="floor"):
        LAPSampler(floor=0.0)


# --- RR-M -----------------------------------------------------------------------------------------------------------


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

    def _make_masses(self) -> Visits:
        return DenseVisits(self.slots, self.device)


class Plain(PrioritizedReshuffledSampler):
    """The sampler as it is without numba."""

    def _make_masses(self) -> Visits:
        return LazyVisits(self.slots)


class PlainPrioritized(PrioritizedSampler):
    def _make_masses(self) -> Masses:
        return TreeMasses(self.slots, use_numba=False)


actions = st.one_of(
    st.lists(st.booleans(), min_size=2, max_size=2).map(lambda valid: ("add", valid)),
    st.just(("add", [True, True])),
    st.integers(1, 5).map(lambda size: ("draw", size)),
    st.integers(0, 10**6).map(lambda seed: ("update", seed)),
)
histories = st.lists(actions, min_size=1, max_size=60)


@pytest.mark.parametrize("sampler_class", [PrioritizedReshuffledSampler, Plain, Dense])
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
    pick = visits._pick

    def check(fraction: Any) -> Any:
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

    visits._pick = check
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
    settle = visits._settle

    def count(step: float) -> None:
        before = visits.wake.copy()
        settle(step)
        looks.append(int((before != visits.wake).sum()))

    for i in range(400):
        visits._settle = count if i >= 100 else settle
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


# --- state ----------------------------------------------------------------------------------------------------------

CLASSES: list[Any] = [PrioritizedSampler, PlainPrioritized, LAPSampler, PrioritizedReshuffledSampler, Plain, Dense]


@pytest.mark.parametrize("sampler_class", CLASSES)
@pytest.mark.parametrize("capacity", [31, 90])
def test_a_restored_sampler_goes_on_with_the_same_bits(sampler_class: Any, capacity: int, tmp_path: Any) -> None:
    """Saved in the middle of everything: after a draw whose priorities have not come, with writes not yet entered."""
    original = bound(sampler_class(), capacity, seed=1)
    restored = bound(sampler_class(), capacity, seed=2)
    rows = itertools.count()

    def go_on(samplers: list[Any], steps: int) -> None:
        for _ in range(steps):
            row = next(rows)
            first, size = row % capacity, min(row + 1, capacity)
            valid = None if row % 7 else torch.tensor([False]) if row else None
            index: list[Tensor] = []
            for sampler in samplers:
                sampler.wrote(first, 1, valid)
                if row % 3:
                    index.append(sampler.sample(6, size)[0])
                    if row % 5:
                        error = torch.rand(6, generator=torch.Generator().manual_seed(row)) * 3
                        sampler.update_priority(index[-1], error)
            if len(index) == 2:
                assert torch.equal(*index)

    go_on([original], 50)
    original.wrote(50 % capacity, 1, None)
    next(rows)
    original.sample(4, min(51, capacity))
    original.wrote(51 % capacity, 1, None)
    next(rows)
    save_state(tmp_path, original.state_dict())
    restored.wrote(3, 5, None)
    restored.sample(2, 8)
    restored.load_state_dict(load_state(tmp_path))
    assert states_equal(original.state_dict(), restored.state_dict()) is None
    go_on([original, restored], 60)
    assert states_equal(original.state_dict(), restored.state_dict()) is None


@pytest.mark.skipif(not COMPILED, reason="needs numba")
@pytest.mark.parametrize("classes", [(PlainPrioritized, PrioritizedSampler), (Plain, PrioritizedReshuffledSampler)])
@pytest.mark.parametrize(("capacity", "room"), [(200, None), (3000, None), (3000, 40)])
def test_compiled_loops_have_the_same_bits(classes: Any, capacity: int, room: int | None) -> None:
    """While the ring fills and after, with errors over four orders of magnitude, repeated slots, and errors of slots
    that were not drawn; also where the queue has no room for all who come late."""
    plain, compiled = (bound(sampler_class(beta=0.5), capacity) for sampler_class in classes)
    if room is not None and isinstance(compiled.masses, CompiledVisits):
        queue = compiled.masses.queue
        compiled.masses.queue = queue._replace(late=queue.late[:room], after=queue.after[:room])
    rng = np.random.default_rng(capacity)
    adds = capacity // 40
    for i in range(600):
        size = min((i + 1) * adds, capacity)
        error = torch.from_numpy(rng.lognormal(0, 2, 32)) if i % 90 else torch.full((32,), torch.inf)
        other = torch.from_numpy(rng.integers(0, size, 32))
        batches = []
        for sampler in (plain, compiled):
            if i < 60 or i % 20 == 0:
                sampler.wrote(i * adds % capacity, min(adds, capacity - i * adds % capacity), None)
            batches.append(sampler.sample(min(32, size), size))
            sampler.update_priority(batches[-1][0], error[: len(batches[-1][0])])
            if i % 7 == 0:
                sampler.update_priority(other, error)
        assert torch.equal(batches[0][0], batches[1][0])
        assert torch.equal(batches[0][1], batches[1][1])
    assert states_equal(plain.state_dict(), compiled.state_dict()) is None


HISTORY = """
import sys
from pathlib import Path
if sys.argv[2] == "plain":
    sys.modules["numba"] = None
import torch
from rlopt.buffers import PrioritizedReshuffledSampler, PrioritizedSampler
from rlopt.state import save_state

state = {}
for sampler in (PrioritizedSampler(), PrioritizedReshuffledSampler()):
    generator = torch.Generator().manual_seed(0)
    sampler.bind(100, torch.device("cpu"), 0)
    for i in range(150):
        sampler.wrote(i % 100, 1, None if i % 9 else torch.tensor([i == 0]))
        index, _ = sampler.sample(8, min(i + 1, 100))
        sampler.update_priority(index, torch.randn(8, generator=generator))
        sampler.update_priority(torch.tensor([0, 0]), torch.randn(2, generator=generator).bfloat16())
    state[sampler.name] = sampler.state_dict()
save_state(Path(sys.argv[1]), state)
"""


@pytest.mark.skipif(not COMPILED, reason="needs numba")
def test_without_numba_everything_is_the_same(tmp_path: Any) -> None:
    """In processes of their own, as what is installed is found out at import."""
    states = []
    for kind in ("plain", "compiled"):
        (tmp_path / kind).mkdir()
        command = [sys.executable, "-c", HISTORY, str(tmp_path / kind), kind]
        subprocess.run(command, check=True, timeout=120, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
        states.append(load_state(tmp_path / kind))
    assert states_equal(*states) is None
