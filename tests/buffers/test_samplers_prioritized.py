"""Prioritised draws against theory; and every prioritised sampler saved in the middle of everything."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlopt.buffers import LAPSampler, PrioritizedReshuffledSampler, PrioritizedSampler
from rlopt.buffers.samplers.draw_counts import DenseDrawCounts, DrawCounts
from rlopt.state import load_state, save_state, states_equal
from rlopt.types import RloptError

CPU = torch.device("cpu")


def bound(sampler: PrioritizedSampler, slots: int, seed: int = 0) -> Any:
    sampler.bind(slots, CPU, seed)
    return sampler


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
    sampler.sample(1, 2)  # what was written counts from the next draw on
    assert sampler.state_dict()["masses"]["mass"].tolist() == [1, 1]
    sampler.update_priority(torch.tensor([0]), torch.tensor([5.0]))
    sampler.wrote(2, 1, None)
    sampler.update_priority(torch.tensor([0]), torch.tensor([0.5]))
    sampler.wrote(3, 2, torch.tensor([False, True]))
    sampler.sample(1, 5)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lap_masses_by_hand(dtype: torch.dtype) -> None:
    sampler = bound(LAPSampler(alpha=0.5, floor=1.0), 4)
    sampler.wrote(0, 4, None)
    sampler.update_priority(torch.arange(4), torch.tensor([0.0, -0.5, 4.0, -9.0], dtype=dtype))
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


# --- state ----------------------------------------------------------------------------------------------------------


class Dense(PrioritizedReshuffledSampler):
    """The sampler as it is on a GPU."""

    def _make_masses(self) -> DrawCounts:
        return DenseDrawCounts(self.slots, self.device)


@pytest.mark.parametrize("sampler_class", [PrioritizedSampler, LAPSampler, PrioritizedReshuffledSampler, Dense])
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
