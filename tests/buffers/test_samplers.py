"""Samplers without priorities: who is drawn how often, against slow oracles and against theory."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlopt.buffers import DistinctSampler, ReshuffledSampler, Sampler, UniformSampler
from rlopt.state import load_state, save_state, states_equal
from rlopt.types import RloptError

CPU = torch.device("cpu")


def bound(sampler: Sampler, slots: int, seed: int = 0) -> Sampler:
    sampler.bind(slots, CPU, seed)
    return sampler


def use_counts(sampler: Sampler, slots: int, draws_per_add: int, lifetimes: int = 4) -> Tensor:
    """How often each transition was drawn before it was overwritten, one add at a time in a full ring."""
    bound(sampler, slots)
    sampler.wrote(0, slots, None)
    uses = torch.zeros(slots, dtype=torch.int64)
    finished = []
    for i in range(lifetimes * slots):
        slot = i % slots
        if i >= 2 * slots:  # its whole life lies behind the start
            finished.append(int(uses[slot]))
        uses[slot] = 0
        sampler.wrote(slot, 1, None)
        index, weight = sampler.sample(draws_per_add, slots)
        assert weight is None
        uses.index_add_(0, index, torch.ones_like(index))
    return torch.tensor(finished, dtype=torch.float64)


@pytest.mark.parametrize("ratio", [2, 8])
def test_reshuffling_uses_every_transition_as_often_as_the_replay_ratio_says(ratio: int) -> None:
    """Variance 1/3 for a whole ratio r, and never more than one use away; with replacement Poisson's r."""
    reshuffled = use_counts(ReshuffledSampler(), 1500, ratio)
    uniform = use_counts(UniformSampler(), 1500, ratio)
    assert (reshuffled - ratio).abs().max() <= 1
    assert reshuffled.mean().item() == pytest.approx(ratio, abs=0.05)
    assert reshuffled.var().item() == pytest.approx(1 / 3, abs=0.04)
    assert uniform.mean().item() == pytest.approx(ratio, rel=0.05)
    assert uniform.var().item() == pytest.approx(ratio, rel=0.1)


def test_a_full_ring_is_drawn_once_per_epoch_in_a_new_order() -> None:
    sampler = bound(ReshuffledSampler(), 12)
    sampler.wrote(0, 12, None)
    epochs = [torch.cat([sampler.sample(4, 12)[0] for _ in range(3)]).tolist() for _ in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    straddling = torch.cat([sampler.sample(8, 12)[0] for _ in range(3)]).tolist()
    assert sorted(straddling[:12]) == sorted(straddling[12:]) == list(range(12))


def test_every_place_in_the_order_is_equally_likely() -> None:
    """χ² over (slot, place) of 3,000 epochs of 6; 25 degrees of freedom, 60 is beyond the 0.01 % tail."""
    sampler = bound(ReshuffledSampler(), 6)
    sampler.wrote(0, 6, None)
    counts = torch.zeros(6, 6)
    for _ in range(3000):
        counts[sampler.sample(6, 6)[0], torch.arange(6)] += 1
    assert ((counts - 500).square() / 500).sum() < 60


class SlowReshuffling:
    """RR-C as its definition says it, from the permutation that the sampler shuffled: one turn at a time."""

    def __init__(self, slots: int) -> None:
        self.valid = [False] * slots
        self.order: list[int] = []

    def sample(self, batch_size: int, shuffled: list[list[int]]) -> list[int]:
        drawn: list[int] = []
        while len(drawn) < batch_size:
            if not self.order:
                self.order = shuffled.pop(0)
            slot = self.order.pop(0)
            if self.valid[slot]:
                drawn.append(slot)
        return drawn


class Recorded(ReshuffledSampler):
    """Writes down what it shuffles."""

    def __init__(self) -> None:
        self.shuffled: list[list[int]] = []
        self.widened = 0

    def _permutation(self, count: int) -> Tensor:
        order = super()._permutation(count)
        if count == self.window:
            self.shuffled.append(order.tolist())
        return order

    def _widen(self, window: int) -> None:
        rest = self.order[self.position :].tolist()
        old = self.window
        super()._widen(window)
        now = self.order.tolist()
        assert sorted(slot for slot in now if slot < old) == sorted(rest) and len(set(now)) == len(now)
        assert all(slot < window for slot in now)
        self.widened += 1
        self.shuffled.append([-1])  # the oracle goes on from here


writes = st.lists(st.lists(st.booleans(), min_size=2, max_size=2), min_size=0, max_size=5)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(writes, st.integers(1, 7)), min_size=1, max_size=12), st.integers(2, 8), st.integers(0, 99))
def test_reshuffling_equals_the_slow_definition(
    script: list[tuple[list[list[bool]], int]], rows: int, seed: int
) -> None:
    """Two environments, random validity, draws at any time: while the ring fills, when it is full, when it wraps."""
    slots, row, size = 2 * rows, 0, 0
    sampler, slow = Recorded(), SlowReshuffling(slots)
    bound(sampler, slots, seed)
    for adds, batch_size in script:
        for valid in adds:
            first = 2 * (row % rows)
            sampler.wrote(first, 2, None if all(valid) else torch.tensor(valid))
            slow.valid[first : first + 2] = valid
            row += 1
            size = min(2 * row, slots)
        if not any(slow.valid):
            with pytest.raises(RloptError, match="no transition yet"):
                sampler.sample(batch_size, size)
            continue
        before = sampler.widened
        if size > sampler.window and sampler.position < sampler.order.numel():
            sampler._widen(min(slots, 2 * size))  # as sample would; the rest of the epoch is then known
            slow.order = sampler.order.tolist()
            sampler.shuffled.clear()
        index = sampler.sample(batch_size, size)[0].tolist()
        assert sampler.widened - before <= 1
        assert index == slow.sample(batch_size, sampler.shuffled)
        assert sampler.order[sampler.position :].tolist() == slow.order


def test_while_the_ring_fills_turns_fall_as_in_a_permutation_of_all_of_it() -> None:
    """Half of an epoch of 8 of 32 slots is drawn, then the ring fills: the mean number of newcomers whose turn is still
    to come is half of them, and they come in any order."""
    due, firsts = [], Counter[bool]()
    for seed in range(400):
        sampler = ReshuffledSampler()
        bound(sampler, 32, seed)
        sampler.wrote(0, 8, None)
        sampler.sample(8, 8)  # an epoch of 16 slots was permuted, about half are used up
        sampler.wrote(8, 24, None)
        left = sampler.window - (sampler.order.numel() - sampler.position)
        sampler.sample(1, 32)
        rest = sampler.order[sampler.position - 1 :] if sampler.window == 32 else torch.empty(0)
        if rest.numel() and left < 16:
            new = int((rest >= 16).sum())
            due.append(new - 16 * (1 - left / 17))
            firsts[bool(rest[0] >= 16)] += 1
    assert abs(sum(due) / len(due)) < 0.5
    assert min(firsts.values()) > 20


@pytest.mark.parametrize("sampler_class", [DistinctSampler, ReshuffledSampler])
def test_invalid_slots_are_never_drawn(sampler_class: type[DistinctSampler] | type[ReshuffledSampler]) -> None:
    sampler = bound(sampler_class(), 10)
    sampler.wrote(0, 5, torch.tensor([True, False, True, False, True]))
    drawn = torch.cat([sampler.sample(3, 5)[0] for _ in range(20)])
    assert set(drawn.tolist()) == {0, 2, 4}
    sampler.wrote(5, 5, None)
    sampler.wrote(0, 2, torch.tensor([False, True]))
    drawn = torch.cat([sampler.sample(7, 10)[0] for _ in range(20)])
    assert set(drawn.tolist()) == {1, 2, 4, 5, 6, 7, 8, 9}


# --- distinct -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "batch_size"), [(50, 40), (2000, 64)])
def test_a_minibatch_is_distinct_and_uniform(size: int, batch_size: int) -> None:
    sampler = bound(DistinctSampler(), size)
    counts = torch.zeros(size)
    draws = 200 * size // batch_size
    for _ in range(draws):
        index, weight = sampler.sample(batch_size, size)
        assert weight is None and index.numel() == batch_size == len(set(index.tolist()))
        counts[index] += 1
    p = batch_size / size
    # The counts are binomial, and sum to a constant.
    assert (counts - draws * p).abs().max() < 5.5 * (draws * p * (1 - p)) ** 0.5 + 1


def test_a_minibatch_larger_than_the_buffer_takes_everything_evenly() -> None:
    sampler = bound(DistinctSampler(), 10)
    sampler.wrote(0, 4, torch.tensor([True, True, False, True]))
    index, _ = sampler.sample(8, 4)
    assert set(Counter(index.tolist()).values()) <= {2, 3} and set(index.tolist()) == {0, 1, 3}


# --- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler_class", [UniformSampler, DistinctSampler, ReshuffledSampler])
@pytest.mark.parametrize("written", [5, 30])
def test_a_restored_sampler_goes_on_with_the_same_draws(sampler_class, written, tmp_path) -> None:
    original = bound(sampler_class(), 30, seed=1)
    original.wrote(0, written, None if sampler_class is UniformSampler else torch.arange(written) != 2)
    original.sample(17, written)
    save_state(tmp_path, original.state_dict())
    restored = bound(sampler_class(), 30, seed=2)
    restored.load_state_dict(load_state(tmp_path))
    assert states_equal(original.state_dict(), restored.state_dict()) is None
    for i in range(20):
        size = min(30, written + 2 * i)
        for sampler in (original, restored):
            sampler.wrote((written + 2 * i) % 30 // 2 * 2, 2, None)
        assert torch.equal(original.sample(7, size)[0], restored.sample(7, size)[0])
    assert states_equal(original.state_dict(), restored.state_dict()) is None


def test_a_saved_state_is_a_copy() -> None:
    sampler = bound(ReshuffledSampler(), 8)
    sampler.wrote(0, 8, torch.tensor([False] + [True] * 7))
    sampler.sample(3, 8)
    state = sampler.state_dict()
    before = state["rest"].clone()
    sampler.wrote(0, 8, None)
    sampler.sample(20, 8)
    assert torch.equal(state["rest"], before)
    assert state["validity"]["mask"].tolist() == [False] + [True] * 7
