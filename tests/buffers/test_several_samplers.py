"""Several samplers over one storage, each with what it may draw."""

from __future__ import annotations

from collections.abc import Callable

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
from rlopt.types import RloptError

KINDS = [
    UniformSampler,
    DistinctSampler,
    ReshuffledSampler,
    PrioritizedSampler,
    LAPSampler,
    PrioritizedReshuffledSampler,
]
N = 2


def make(one: Sampler, joint: Sampler, rows: int = 10) -> ReplayBuffer:
    return ReplayBuffer(
        N * rows,
        spaces.Box(-1, 1, (1,)),
        spaces.Discrete(2),
        N,
        sampler={"one": one, "joint": joint},
        masks={"joint": "called"},
        extra_fields={"called": ((), torch.bool)},
        seed=3,
    )


def add(buffer: ReplayBuffer, t: int, called: list[bool], valid: list[bool] | None = None) -> None:
    """Rewards count rows and environments."""
    no = torch.zeros(N, dtype=torch.bool)
    reward = 10.0 * t + torch.arange(N)
    given = None if valid is None else torch.tensor(valid)
    buffer.add(
        torch.zeros(N, 1), torch.zeros(N), reward, torch.zeros(N, 1), no, no, valid=given, called=torch.tensor(called)
    )


def is_called(t: int, e: int) -> bool:
    return (3 * t + e) % 7 == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_sampler_draws_its_own_transitions_evenly_and_no_other(kind: Callable[[], Sampler]) -> None:
    """While the ring fills and after it has wrapped; priorities are all equal."""
    buffer = make(UniformSampler(), kind())
    for t in range(24):
        add(buffer, t, [is_called(t, 0), is_called(t, 1)], [t % 4 != 1, True])
        held = [(s, e) for s in range(max(0, t - 9), t + 1) for e in range(N) if s % 4 != 1 or e == 1]
        joint = sorted(10.0 * s + e for s, e in held if is_called(s, e))
        batches = buffer.sample(20)
        assert set(batches["one"].reward.tolist()) <= {10.0 * s + e for s, e in held}
        assert ("joint" in batches) == bool(joint)
        if joint:
            assert set(batches["joint"].reward.tolist()) <= set(joint)
    drawn = torch.cat([buffer.sample(20)["joint"].reward for _ in range(60)])
    assert sorted(set(drawn.tolist())) == joint and len(joint) == 3
    for value in joint:
        assert (drawn == value).float().mean().item() == pytest.approx(1 / 3, abs=0.06)


def test_priorities_go_back_to_the_sampler_they_are_of() -> None:
    buffer = make(PrioritizedSampler(alpha=1.0), PrioritizedSampler(alpha=1.0))
    for t in range(10):
        add(buffer, t, [True, False])
    every = torch.arange(20)
    index = {"one": every, "joint": every[::2]}
    buffer.update_priority(index, {"one": 1.0 * (every == 7), "joint": 1.0 * (every[::2] == 4)})
    batches = buffer.sample(50)
    assert set(batches["one"].index.tolist()) == {7} and set(batches["joint"].index.tolist()) == {4}
    buffer.update_priority(index, {"one": torch.ones(20), "joint": None})
    buffer.update_priority(index, None)
    batches = buffer.sample(50)
    assert len(set(batches["one"].index.tolist())) > 15 and set(batches["joint"].index.tolist()) == {4}


def test_each_has_a_stream_of_its_own() -> None:
    buffer = make(UniformSampler(), UniformSampler())
    for t in range(10):
        add(buffer, t, [True, True])
    batches = buffer.sample(16)
    assert batches["one"].index.tolist() != batches["joint"].index.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_every_sampler_is_saved(kind: Callable[[], Sampler]) -> None:
    buffer, back = make(ReshuffledSampler(), kind()), make(ReshuffledSampler(), kind())
    for t in range(13):
        add(buffer, t, [is_called(t, 0), is_called(t, 1)])
        buffer.sample(5)
    back.load_state_dict(buffer.state_dict())
    back.write_rows(3, buffer.read_rows(3, 13))
    for t in range(13, 30):
        for b in (buffer, back):
            add(b, t, [is_called(t, 0), is_called(t, 1)])
        ours, theirs = buffer.sample(5), back.sample(5)
        assert ours.keys() == theirs.keys()
        for name, batch in ours.items():
            assert torch.equal(batch.index, theirs[name].index) and torch.equal(batch.reward, theirs[name].reward)
            error = batch.reward + 1
            for b in (buffer, back):
                b.update_priority({name: batch.index}, {name: error})


def test_slices_may_be_drawn_beside_single_transitions() -> None:
    buffer = make(SequenceSampler(UniformSampler(), 3), ReshuffledSampler())
    for t in range(6):
        add(buffer, t, [True, True])
    batches = buffer.sample(4)
    assert batches["one"].reward.shape == (4, 3) and batches["joint"].reward.shape == (4,)


def test_mistakes_are_told() -> None:
    space, fields = spaces.Box(-1, 1, (1,)), {"called": ((), torch.bool), "score": ((), torch.float32)}

    def build(sampler: object, masks: dict[str, str]) -> ReplayBuffer:
        return ReplayBuffer(8, space, spaces.Discrete(2), sampler=sampler, masks=masks, extra_fields=fields)  # type: ignore[arg-type]

    both = {"a": UniformSampler(), "b": UniformSampler()}
    with pytest.raises(RloptError, match="names the sampler 'c'; there are a, b"):
        build(both, {"c": "called"})
    with pytest.raises(RloptError, match=r"'score' of the sampler 'a' must be declared .* as \(\(\), bool\)"):
        build(both, {"a": "score"})
    with pytest.raises(RloptError, match="has the samplers a, b; name one"):
        _ = build(both, {}).sampler
    with pytest.raises(RloptError, match="no transition yet"):
        build(both, {}).sample(3)
    for size in (0, -1, 2.5):
        buffer = make(UniformSampler(), UniformSampler())
        add(buffer, 0, [True, True])
        with pytest.raises(RloptError, match="at least 1"):
            buffer.sample(size)  # type: ignore[arg-type]
