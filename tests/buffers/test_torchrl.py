"""RR-C and RR-M as samplers of TorchRL's replay buffers; TorchRL's compiled extension is not needed."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchrl")

from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ListStorage, ReplayBuffer, TensorDictReplayBuffer
from torchrl.data.replay_buffers.scheduler import LinearScheduler

from rlopt.buffers.interop.torchrl import PrioritizedReshuffledSampler, ReshuffledSampler
from rlopt.buffers.samplers import prioritized_reshuffled
from rlopt.types import RloptError

CPU = torch.device("cpu")


def data(first: int, count: int) -> TensorDict:
    return TensorDict({"number": torch.arange(first, first + count)}, [count])


def make(sampler: Any, capacity: int = 60, batch_size: int = 20, **options: Any) -> TensorDictReplayBuffer:
    return TensorDictReplayBuffer(
        storage=LazyTensorStorage(capacity), sampler=sampler, batch_size=batch_size, priority_key="td_error", **options
    )


def numbers(buffer: Any, *size: int) -> list[int]:
    return buffer.sample(*size)["number"].tolist()


def test_an_epoch_draws_every_entry_once() -> None:
    buffer = make(ReshuffledSampler(seed=1))
    for first in range(0, 150, 25):
        buffer.extend(data(first, 25))
    assert sorted(n for _ in range(3) for n in numbers(buffer)) == list(range(90, 150))
    batch = buffer.sample()
    assert (batch["index"] == batch["number"] % 60).all()


def use_counts(sampler: Any, capacity: int, ratio: int, batch_size: int) -> Tensor:
    """How often each entry was drawn between being written and overwritten, ``ratio`` draws for each write."""
    buffer, steps = make(sampler, capacity, batch_size), 8 * capacity
    counts = torch.zeros(steps)
    buffer.extend(data(0, capacity))
    for first in range(capacity, steps, 10):
        buffer.extend(data(first, 10))
        for _ in range(10 * ratio // batch_size):
            batch = buffer.sample()
            counts.index_add_(0, batch["number"], torch.ones(batch_size))
            if isinstance(sampler, PrioritizedReshuffledSampler):
                batch["td_error"] = torch.ones(batch_size)
                buffer.update_tensordict_priority(batch)
    return counts[2 * capacity : -capacity]


@pytest.mark.parametrize("sampler", [ReshuffledSampler, PrioritizedReshuffledSampler])
def test_use_counts_vary_by_a_third_and_not_like_poisson(sampler: Any) -> None:
    """Eight draws per write, of equal priorities: reshuffling has variance 1/3, draws with replacement have 8."""
    counts = use_counts(sampler(seed=1), capacity=400, ratio=8, batch_size=40)
    assert counts.mean().item() == pytest.approx(8, abs=0.1)
    assert counts.var().item() < 0.6


def oracle(**options: Any) -> prioritized_reshuffled.PrioritizedReshuffledSampler:
    sampler = prioritized_reshuffled.PrioritizedReshuffledSampler(**options)
    sampler.bind(60, CPU, 1)
    return sampler


def test_masking_draws_exactly_as_rlopts_own_sampler_told_the_same() -> None:
    options = {"alpha": 0.7, "beta": 0.4, "floor": 0.1}
    buffer, own = make(PrioritizedReshuffledSampler(seed=1, **options)), oracle(**options)
    written, generator = 0, torch.Generator().manual_seed(0)
    for step, count in enumerate([25, 25, 25, 7, 60, 1]):
        buffer.extend(data(written, count))
        for i in range(written, written + count):  # one by one, so across the ring's end too
            own.wrote(i % 60, 1, None)
        written += count
        for _ in range(4):
            batch = buffer.sample()
            index, weight = own.sample(20, min(written, 60))
            assert torch.equal(batch["index"], index)
            assert weight is not None and torch.equal(batch["priority_weight"], weight)
            priority = torch.rand(20, generator=generator) * 3
            own.update_priority(index, priority)
            if step % 2:
                buffer.update_priority(batch["index"], priority)
            else:
                batch["td_error"] = priority
                buffer.update_tensordict_priority(batch)
    assert buffer._sampler.default_priority == pytest.approx(float(own.max_mass) ** (1 / 0.7))


def test_priorities_may_come_with_the_data() -> None:
    buffer = make(PrioritizedReshuffledSampler(alpha=1.0, floor=1e-3, seed=1), batch_size=1)
    first = data(0, 40)
    first["td_error"] = torch.full((40,), 1e-3)
    first["td_error"][7] = 1000.0
    buffer.extend(first)
    assert numbers(buffer) == [7]
    buffer.add(TensorDict({"number": torch.tensor(40), "td_error": torch.tensor(1e6)}, []))
    assert numbers(buffer) == [40]


def test_without_importance_weights_all_are_one() -> None:
    buffer = make(PrioritizedReshuffledSampler(seed=1))
    buffer.extend(data(0, 30))
    assert buffer.sample()["priority_weight"].tolist() == [1.0] * 20


@pytest.mark.parametrize("sampler", [ReshuffledSampler, PrioritizedReshuffledSampler])
@pytest.mark.parametrize("way", ["state_dict", "dumps", "pickle"])
def test_a_restored_buffer_goes_on_with_its_order(sampler: Any, way: str, tmp_path: Path) -> None:
    buffer, again = make(sampler(seed=1)), make(sampler())
    buffer.extend(data(0, 50))
    for _ in range(3):
        batch = buffer.sample()
        batch["td_error"] = batch["number"].float()
        buffer.update_tensordict_priority(batch)
    if way == "state_dict":
        again.load_state_dict(buffer.state_dict())
    elif way == "dumps":
        buffer.dumps(tmp_path / "buffer")
        assert {p.name for p in (tmp_path / "buffer" / "sampler").iterdir()} == {"state.json", "tensors.safetensors"}
        again.loads(tmp_path / "buffer")
    else:
        again = make(pickle.loads(pickle.dumps(buffer._sampler)))
        again._storage.load_state_dict(buffer._storage.state_dict())
        again._writer.load_state_dict(buffer._writer.state_dict())
    for first in range(50, 120, 7):
        for b in (buffer, again):
            b.extend(data(first, 7))
        assert numbers(buffer) == numbers(again)


def test_before_the_first_draw_there_is_no_state_and_a_storage_may_be_filled_already(tmp_path: Path) -> None:
    buffer, again = make(ReshuffledSampler(seed=1)), make(ReshuffledSampler(seed=1))
    for b in (buffer, again):
        b.extend(data(0, 60))
    again._sampler.load_state_dict(buffer._sampler.state_dict())
    assert numbers(again) == numbers(buffer)
    shared = TensorDictReplayBuffer(
        storage=buffer._storage, sampler=PrioritizedReshuffledSampler(seed=1), batch_size=60
    )
    assert sorted(numbers(shared)) == list(range(60))


def test_a_state_of_another_capacity_is_refused() -> None:
    buffer, other = make(ReshuffledSampler()), make(ReshuffledSampler(), capacity=30)
    for b in (buffer, other):
        b.extend(data(0, 30))
        b.sample()
    other._sampler.load_state_dict(buffer._sampler.state_dict())
    with pytest.raises(RloptError, match="storage of 60 entries, not of 30"):
        other.sample()


@pytest.mark.parametrize("sampler", [ReshuffledSampler, PrioritizedReshuffledSampler])
def test_an_emptied_buffer_begins_anew(sampler: Any) -> None:
    buffer = make(sampler(seed=1))
    buffer.extend(data(0, 60))
    first = [numbers(buffer) for _ in range(3)]
    buffer.empty()
    with pytest.raises(RuntimeError, match="empty storage"):
        buffer.sample()
    buffer.extend(data(0, 60))
    assert [numbers(buffer) for _ in range(3)] == first


@pytest.mark.parametrize("sampler", [ReshuffledSampler, PrioritizedReshuffledSampler])
def test_a_storage_of_two_dimensions_is_one_ring(sampler: Any) -> None:
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(60, ndim=2), sampler=sampler(seed=1), batch_size=20, priority_key="td_error"
    )
    for first in range(0, 90, 12):  # 4 environments x 3 steps at a time, of which the newest 15 steps stay
        buffer.extend(data(first, 12).reshape(3, 4).transpose(0, 1))
        batch = buffer.sample()
        assert (batch["index"] * torch.tensor([4, 1])).sum(-1).tolist() == (batch["number"] % 60).tolist()
        batch["td_error"] = torch.ones(20)
        buffer.update_tensordict_priority(batch)
    drawn = [n for _ in range(9) for n in numbers(buffer)]
    assert set(drawn) == set(range(36, 96))
    if sampler is ReshuffledSampler:
        assert all(drawn.count(n) in (2, 3, 4) for n in set(drawn))


def test_a_list_storage_and_single_adds() -> None:
    buffer = ReplayBuffer(storage=ListStorage(10), sampler=ReshuffledSampler(seed=1), batch_size=5, collate_fn=list)
    for n in range(17):
        buffer.add(n)
        assert max(buffer.sample()) <= n
    assert {n for _ in range(4) for n in buffer.sample()} == set(range(7, 17))


def test_the_seed_is_the_buffers_generator_or_torchs() -> None:
    def order(generator: torch.Generator | None) -> list[int]:
        buffer = make(ReshuffledSampler(), generator=generator)
        buffer.extend(data(0, 60))
        return numbers(buffer)

    assert order(torch.Generator().manual_seed(3)) == order(torch.Generator().manual_seed(3))
    assert order(torch.Generator().manual_seed(3)) != order(torch.Generator().manual_seed(4))
    torch.manual_seed(3)
    first = order(None)
    torch.manual_seed(3)
    assert order(None) == first != order(None)


def test_mistakes_about_priorities_are_told() -> None:
    sampler = PrioritizedReshuffledSampler()
    with pytest.raises(RloptError, match="through the replay buffer"):
        sampler.update_priority(torch.arange(3), torch.ones(3))
    buffer = make(sampler)
    buffer.extend(data(0, 30))
    with pytest.raises(RloptError, match="4 priorities came with 3 indices"):
        buffer.update_priority(torch.arange(3), torch.ones(4))
    buffer.update_priority(torch.tensor([-1, 2]), torch.tensor([1e9, 1.0]))  # -1: an entry that was not written
    assert sampler.default_priority == pytest.approx(1.0)


def test_without_torchrl_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "rlopt.buffers.interop.torchrl")
    monkeypatch.setitem(sys.modules, "torchrl.data.replay_buffers.samplers", None)
    with pytest.raises(RloptError, match="pip install"):
        import rlopt.buffers.interop.torchrl  # noqa: F401


def test_iterating_ends_with_each_epoch() -> None:
    """As with TorchRL's own sampler without replacement: 60 entries are three minibatches of 20, 50 are three, too."""
    buffer = make(ReshuffledSampler(seed=1))
    buffer.extend(data(0, 60))
    for _ in range(3):
        drawn = [batch["number"].tolist() for batch in buffer]
        assert len(drawn) == 3 and sorted(n for numbers in drawn for n in numbers) == list(range(60))
    buffer = make(ReshuffledSampler(seed=1), capacity=50)
    buffer.extend(data(0, 50))
    lengths = [sum(1 for _ in buffer) for _ in range(4)]
    assert lengths == [3, 2, 3, 2]  # a minibatch may hold the next epoch's first entries
    buffer = make(ReshuffledSampler(seed=1), capacity=8)
    buffer.extend(data(0, 8))
    assert sum(1 for _ in buffer) == 1  # one minibatch of 20 holds two epochs and a half


def test_a_scheduler_may_change_beta() -> None:
    buffer = make(PrioritizedReshuffledSampler(alpha=1.0, beta=0.0, floor=1e-6, seed=1), batch_size=30)
    buffer.extend(data(0, 30))
    buffer.update_priority(torch.arange(30), torch.where(torch.arange(30) < 15, 1.0, 4.0))
    schedule = LinearScheduler(buffer, param_name="beta", final_value=1.0, num_steps=2)
    least = []
    for _ in range(3):
        least.append(buffer.sample()["priority_weight"].min().item())
        schedule.step()
    assert least == pytest.approx([1.0, 0.5, 0.25])
    sampler = PrioritizedReshuffledSampler(alpha=1.0, floor=1e-6)
    sampler.load_state_dict(buffer._sampler.state_dict())
    assert sampler.beta == 1.0
    with pytest.raises(RloptError, match="leave that out to schedule it"):
        PrioritizedReshuffledSampler(beta=0.4, anneal_draws=10).beta = 0.5
    with pytest.raises(RloptError, match="within 0 … 1"):
        sampler.beta = 1.5
    with pytest.raises(RloptError, match="alpha is fixed"):
        sampler.alpha = 0.5


@pytest.mark.parametrize(
    ("index", "priority", "message"),
    [
        (torch.tensor([0, 10**9]), torch.ones(2), "none of this buffer's"),
        (torch.tensor([61]), torch.ones(1), "none of this buffer's"),
        (torch.tensor([0.5]), torch.ones(1), r"indices are whole numbers, not torch\.float32"),
        (torch.tensor([1, 2]), torch.ones(2, dtype=torch.complex64), "a real number for each"),
    ],
)
def test_priorities_that_fit_no_entries_are_refused(index: Tensor, priority: Tensor, message: str) -> None:
    sampler = PrioritizedReshuffledSampler(seed=1)
    buffer = make(sampler)
    buffer.extend(data(0, 60))
    buffer.sample()
    with pytest.raises(RloptError, match=message):
        sampler.update_priority(index, priority)


def test_the_largest_priority_may_fade() -> None:
    buffer = make(PrioritizedReshuffledSampler(alpha=1.0, floor=0.5, max_decay=0.5, seed=1))
    buffer.extend(data(0, 30))
    for error, largest in ((16.0, 16.0), (1.0, 8.0), (1.0, 4.0)):
        buffer.update_priority(torch.tensor([3]), torch.tensor([error]))
        assert buffer._sampler.default_priority == pytest.approx(largest)
