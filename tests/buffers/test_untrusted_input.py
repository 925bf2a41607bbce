"""What users and other programs give is checked before it reaches compiled loops, and states before they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.buffers import (
    DistinctSampler,
    LAPSampler,
    PrioritizedReshuffledSampler,
    PrioritizedSampler,
    ReplayBuffer,
    ReshuffledSampler,
    Sampler,
    SequenceSampler,
    UniformSampler,
)
from rlopt.buffers.samplers.draw_counts import DenseDrawCounts, LazyDrawCounts
from rlopt.buffers.samplers.per_run import RunSamplers
from rlopt.types import RloptError

BOX, TWO = spaces.Box(-1e6, 1e6, (1,)), spaces.Discrete(2)
PRIORITIZED = [PrioritizedSampler, LAPSampler, PrioritizedReshuffledSampler]
NO = torch.tensor([False])


def filled(sampler: Sampler, capacity: int = 12, count: int = 12, space: Any = BOX, **options: Any) -> ReplayBuffer:
    buffer = ReplayBuffer(capacity, space, TWO, sampler=sampler, **options)
    for i in range(count):
        obs = torch.full((1, *space.shape), float(i)).to(torch.uint8 if space.dtype == np.uint8 else torch.float32)
        buffer.add(obs, torch.tensor([0]), torch.tensor([float(i)]), obs, NO, NO)
    return buffer


# --- priorities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PRIORITIZED)
@pytest.mark.parametrize(
    ("index", "priority", "message"),
    [
        (torch.tensor([0, 10**9]), torch.ones(2), r"none of this buffer's, which are 0 … 11"),
        (torch.tensor([3, 16]), torch.ones(2), r"none of this buffer's"),
        (torch.tensor([3, 12]), torch.ones(2), r"none of this buffer's"),
        (torch.tensor([-1, 3]), torch.ones(2), r"none of this buffer's"),
        (torch.arange(12), torch.ones(3), r"int64 \(12,\) and \(3,\)"),
        (torch.arange(3), torch.ones(12), "a real number for each"),
        (torch.arange(4)[:, None], torch.ones(4, 1), "a real number for each"),
        (torch.arange(4), torch.ones(4, 1), "a real number for each"),
        (torch.tensor(3), torch.tensor(1.0), "a real number for each"),
        (torch.tensor([0.0, 1.0]), torch.ones(2), "whole slots"),
        (torch.tensor([True, False]), torch.ones(2), "whole slots"),
        (torch.arange(2), torch.ones(2, dtype=torch.complex64), "a real number for each"),
    ],
)
def test_priorities_that_fit_no_slots_are_refused_and_change_nothing(
    kind: Callable[[], Sampler], index: Any, priority: Any, message: str
) -> None:
    buffer, untouched = filled(kind()), filled(kind())
    with pytest.raises(RloptError, match=message) as error:
        buffer.update_priority(index, priority)
    assert "\n" not in str(error.value)
    for _ in range(5):
        assert torch.equal(buffer.sample(6).index, untouched.sample(6).index)


@pytest.mark.parametrize("kind", PRIORITIZED)
@pytest.mark.parametrize(
    "index",
    [
        np.arange(12),
        torch.arange(12, dtype=torch.int32),
        torch.arange(24)[::2] // 2,
        torch.arange(12).expand(2, 12)[1],
    ],
    ids=["numpy", "int32", "strided", "expanded"],
)
def test_priorities_in_other_forms_count_as_they_should(kind: Callable[[], Sampler], index: Any) -> None:
    ours, theirs = filled(kind()), filled(kind())
    error = np.linspace(0, 5, 12)
    ours.update_priority(index, error)
    theirs.update_priority(torch.arange(12), torch.from_numpy(error).float())
    for _ in range(5):
        assert torch.equal(ours.sample(6).index, theirs.sample(6).index)


def test_priorities_of_runs_are_of_their_own_slots() -> None:
    runs = RunSamplers([PrioritizedSampler(), PrioritizedSampler()], 4)
    runs.bind(24, torch.device("cpu"), 0)
    runs.wrote(0, 24, None)
    runs.update_priority(torch.tensor([0, 5, 2, 7]), torch.ones(4))
    with pytest.raises(RloptError, match="run by run"):
        runs.update_priority(torch.tensor([0, 2, 2, 7]), torch.ones(4))
    with pytest.raises(RloptError, match="3 priorities cannot be shared by 2 runs"):
        runs.update_priority(torch.tensor([0, 1, 2]), torch.ones(3))
    with pytest.raises(RloptError, match="none of this buffer's"):
        runs.update_priority(torch.tensor([0, 400, 2, 7]), torch.ones(4))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([0, 5]), "slots reach from 0 to 5; those written are 0 … 4"),
        (torch.tensor([-1]), "slots reach from -1"),
        (torch.tensor([1.0]), r"slots are int64 \(B,\), not torch.float32"),
        (torch.tensor(1), r"slots are int64 \(B,\)"),
    ],
)
def test_slots_that_hold_nothing_are_not_read(index: Any, message: str) -> None:
    buffer = filled(UniformSampler(), count=5)
    with pytest.raises(RloptError, match=message):
        buffer.batch(index)
    assert buffer.batch(np.array([4])).reward.tolist() == [4.0]  # type: ignore[arg-type]


# --- arrays -----------------------------------------------------------------------------------------------------------


def test_arrays_numbers_and_lists_are_as_good_as_tensors() -> None:
    space = spaces.Dict({"a": BOX, "image": spaces.Box(0, 255, (2, 2), np.uint8)})
    ours, theirs = (ReplayBuffer(6, space, spaces.Box(-1, 1, (2,)), n_step=2) for _ in range(2))
    for i in range(4):
        obs = {"a": np.array([0.5 + i]), "image": np.full((2, 2), i, np.uint8)}
        ours.add(obs, [0.25, -0.25], float(i), obs, False, i == 2)  # one environment: its axis may be left out
        batched = {key: torch.from_numpy(leaf)[None] for key, leaf in obs.items()}
        flags = torch.tensor([False]), torch.tensor([i == 2])
        theirs.add(batched, torch.tensor([[0.25, -0.25]]), torch.tensor([float(i)]), batched, *flags)
    slots = torch.arange(4)
    for a, b in zip(ours.batch(slots)[1:3], theirs.batch(slots)[1:3], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ours.batch(slots).obs["image"], theirs.batch(slots).obs["image"])  # type: ignore[index]
    several = ReplayBuffer(6, BOX, TWO, num_envs=2)
    zero, no = np.zeros((2, 1)), np.zeros(2, bool)
    several.add(zero, np.zeros(2, int), np.ones(2), zero, no, no, ended=no, valid=np.array([True, False]))
    assert several.transitions == 1


def one() -> dict[str, Any]:
    no = torch.tensor([False])
    return {
        "obs": torch.zeros(1, 1), "action": torch.tensor([0]), "reward": torch.zeros(1), "next_obs": torch.zeros(1, 1),
        "terminated": no, "truncated": no,
    }  # fmt: skip


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("obs", torch.zeros(64, 1), r"obs has shape \(64, 1\); .* build it with num_envs=64"),
        ("reward", np.zeros(64), r"reward has shape \(64,\); .* build it with num_envs=64"),
        ("obs", torch.zeros(2, 2), r"obs has shape \(2, 2\); this buffer takes \(1, 1\)$"),
        ("truncated", torch.zeros(64, dtype=torch.bool), r"truncated is torch.bool of shape \(64,\)"),
        ("valid", torch.zeros(2, dtype=torch.bool), r"valid is torch.bool of shape \(2,\)"),
        ("valid", torch.ones(1), r"valid is torch.float32"),
        ("reward", None, "reward is no array of numbers"),
        ("reward", "0.5", "reward is no array of numbers"),
        ("action", ["1", "2"], "action is no array of numbers"),
    ],
)
def test_what_is_no_row_is_refused_in_one_line(late: bool, name: str, value: Any, message: str) -> None:
    buffer = ReplayBuffer(4, BOX, TWO)
    if late:
        buffer.add(**one())
    with pytest.raises(RloptError, match=message) as error:
        buffer.add(**{**one(), name: value})
    assert "\n" not in str(error.value) and len(buffer) == late


def test_a_row_with_its_axes_in_another_order_is_refused() -> None:
    buffer = ReplayBuffer(6, spaces.Box(-1, 1, (3,)), TWO, num_envs=2)
    no, right = torch.zeros(2, dtype=torch.bool), torch.zeros(2, 3)
    with pytest.raises(RloptError, match=r"obs has shape \(3, 2\)"):
        buffer.add(right.T, torch.zeros(2), torch.zeros(2), right, no, no)
    with pytest.raises(RloptError, match=r"ended is torch\.float32"):
        buffer.add(right, torch.zeros(2), torch.zeros(2), right, no, no, ended=torch.zeros(2))
    with pytest.raises(RloptError, match="dict"):
        tree = spaces.Dict({"a": BOX})
        ReplayBuffer(6, tree, TWO).add(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.zeros(1), NO, NO)


@pytest.mark.parametrize("value", [torch.full((1, 2, 2), 0.5), torch.full((1, 2, 2), 300)])
def test_bytes_are_never_made_of_other_numbers(value: torch.Tensor) -> None:
    buffer = ReplayBuffer(4, spaces.Box(0, 255, (2, 2), np.uint8), TWO)
    image = torch.zeros(1, 2, 2, dtype=torch.uint8)
    with pytest.raises(RloptError, match=r"obs is torch\.(float32|int64); this buffer keeps torch.uint8"):
        buffer.add(value, torch.tensor([0]), torch.zeros(1), image, NO, NO)


# --- states ---------------------------------------------------------------------------------------------------------

SAMPLERS = [UniformSampler, DistinctSampler, ReshuffledSampler, *PRIORITIZED]


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize(("capacity", "message"), [(20, "rows 10, this one 20"), (5, "rows 10, this one 5")])
def test_a_state_of_another_capacity_is_refused(kind: Callable[[], Sampler], capacity: int, message: str) -> None:
    saved = filled(kind(), 10).state_dict()
    buffer = filled(kind(), capacity, 3)
    with pytest.raises(RloptError, match=message):
        buffer.load_state_dict(saved)
    assert buffer.sample(8).reward.max() <= 2  # as it was
    sampler = kind()
    sampler.bind(capacity, torch.device("cpu"), 0)
    with pytest.raises(RloptError, match=f"the saved sampler has slots 10, this one {capacity}"):
        sampler.load_state_dict(saved["sampler"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": spaces.Box(-1, 1, (2,))}, r"obs float32 \(1,\), this one float32 \(2,\)"),
        ({"space": spaces.Box(0, 255, (1,), np.uint8)}, r"obs float32 \(1,\), this one uint8 \(1,\)"),
        ({"extra_fields": {"x": ((), torch.float32)}, "count": 0}, r"extras/x none, this one float32 \(\)"),
        ({"sampler": ReshuffledSampler()}, "the saved sampler has kind uniform, this one reshuffled"),
        ({"sampler": {"a": UniformSampler()}}, "has samplers one, this one a"),
    ],
)
def test_a_state_of_another_buffer_is_refused(options: dict[str, Any], message: str) -> None:
    saved = filled(UniformSampler()).state_dict()
    with pytest.raises(RloptError, match=message) as error:
        filled(**{"sampler": UniformSampler(), "count": 0, **options}).load_state_dict(saved)
    assert "\n" not in str(error.value)


def test_rows_of_another_type_and_states_of_other_things_are_refused() -> None:
    buffer = filled(PrioritizedSampler(alpha=0.5))
    rows = buffer.read_rows(0, 2)
    with pytest.raises(ValueError, match="fields"):
        buffer.write_rows(0, {**rows, "block": rows["block"].double()})
    with pytest.raises(RloptError, match="not the state of a replay buffer"):
        buffer.load_state_dict({"rows_written": 3, "invalid": 0})
    with pytest.raises(RloptError, match=r"alpha 0.5, this one 0.6"):
        filled(PrioritizedSampler()).load_state_dict(buffer.state_dict())
    runs = RunSamplers([UniformSampler()] * 2, 2)
    with pytest.raises(RloptError, match="of 0 runs, these of 2"):
        runs.load_state_dict({"samplers": []})
    slices = filled(SequenceSampler(UniformSampler(), 2))
    with pytest.raises(RloptError, match="has kind uniform, this one slices"):
        slices.load_state_dict(filled(UniformSampler()).state_dict())


class OnGpu(PrioritizedReshuffledSampler):
    """The sampler as it is on a GPU."""

    def _make_masses(self) -> Any:
        return DenseDrawCounts(self.slots, self.device)


@pytest.mark.parametrize(
    ("first", "second"), [(OnGpu, PrioritizedReshuffledSampler), (PrioritizedReshuffledSampler, OnGpu)]
)
def test_masked_draws_move_between_devices(first: Any, second: Any) -> None:
    """Their counts are kept otherwise there; what was drawn too often stays hidden."""
    a: Any = filled(first(), 20, 20)
    b: Any = filled(second(), 20, 0)
    for _ in range(7):
        batch = a.sample(5)
        a.update_priority(batch.index, batch.reward / 10)
    b.load_state_dict(a.state_dict())
    assert isinstance(b.sampler.masses, LazyDrawCounts | DenseDrawCounts) and type(a.sampler.masses) is not type(
        b.sampler.masses
    )
    for ours, theirs in zip(a.sampler.counts(), b.sampler.counts(), strict=True):
        torch.testing.assert_close(ours, theirs)
    drawn, expected = a.sampler.counts()
    index = b.sampler.sample(3, 20)[0]
    assert not (drawn[index] > expected[index] + 1e-9).any()


# --- annealing, and a maximum that fades ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PrioritizedSampler, PrioritizedReshuffledSampler])
def test_beta_may_rise_from_zero(kind: Any) -> None:
    """Masses 1 and 4, β = 0, ½, 1 over two draws: the heavier one's weight is 1, ½, ¼."""
    sampler = kind(alpha=1.0, beta=0.0, anneal_draws=2, epsilon=1e-12)
    sampler.bind(2, torch.device("cpu"), 0)
    sampler.wrote(0, 2, None)
    sampler.update_priority(torch.arange(2), torch.tensor([1.0, 4.0]))
    seen = []
    for _ in range(3):
        index, weight = sampler.sample(64, 2)
        assert weight is not None
        seen.append(weight[index == 1].unique().tolist())
    assert seen == [[1.0], [0.5], [0.25]]
    assert kind(beta=0.0, anneal_draws=None).weighted is False


@pytest.mark.parametrize("kind", [*PRIORITIZED, OnGpu])
def test_the_largest_priority_may_fade(kind: Any) -> None:
    """δ = 16, then 1 five times, with a factor of ½: 16 (of the update itself), 8, 4, 2, 1, 1; by default it stays."""
    options = {"alpha": 1.0, "floor": 0.5}
    fading, lasting = filled(kind(**options, max_decay=0.5)), filled(kind(**options))
    for buffer, expected in ((fading, [16, 8, 4, 2, 1, 1]), (lasting, [16] * 6)):
        for error, largest in zip((16.0, 1.0, 1.0, 1.0, 1.0, 1.0), expected, strict=True):
            buffer.update_priority(torch.tensor([3]), torch.tensor([error]))
            assert buffer.sampler.max_mass == pytest.approx(largest, abs=1e-4)  # type: ignore[attr-defined]
    with pytest.raises(RloptError, match=r"buffer\.max_decay"):
        kind(max_decay=0.0)
