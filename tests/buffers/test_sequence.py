"""Slices of consecutive transitions stay inside one episode of one environment."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from rlopt.buffers import ReplayBuffer, SequenceBatch, SequenceSampler
from rlopt.types import RloptError

N = 2


def add(buffer: ReplayBuffer, row: list[str]) -> None:
    """One step of each environment, told by a number that counts rows and environments."""
    number = torch.tensor([float(10 * buffer.rows_written + e) for e in range(len(row))])
    valid = torch.tensor([event != "invalid" for event in row])
    buffer.add(
        number[:, None],
        torch.arange(len(row)),
        number,
        number[:, None] + 10,
        torch.tensor([event in ("terminate", "life") for event in row]),
        torch.tensor([event == "truncate" for event in row]),
        ended=torch.tensor([event in ("terminate", "reset") for event in row]),
        valid=valid,
        state=torch.stack((number, -number), 1),
    )


def make(rows: int) -> ReplayBuffer:
    fields = {"state": ((2,), torch.float32)}
    return ReplayBuffer(N * rows, spaces.Box(-1, 1, (1,)), spaces.Discrete(N), N, extra_fields=fields)


def at(buffer: ReplayBuffer, slots: list[int], length: int) -> SequenceBatch:
    buffer.draw = lambda batch_size: (torch.tensor(slots), None)  # type: ignore[method-assign]
    return SequenceSampler(buffer, length).sample(len(slots))


EVENTS = ["go"] * 6 + ["terminate", "truncate", "life", "reset", "invalid"]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(EVENTS), min_size=N, max_size=N), min_size=1, max_size=25),
    st.integers(1, 6),
    st.integers(1, 9),
)
def test_slices_equal_brute_force(script: list[list[str]], length: int, rows: int) -> None:
    buffer = make(rows)
    for row in script:
        add(buffer, row)
    held = range(max(0, len(script) - rows), len(script))
    where = [(t, e) for t in held for e in range(N) if script[t][e] != "invalid"]
    if not where:
        return
    batch = at(buffer, [(t % rows) * N + e for t, e in where], length)
    for i, (t, e) in enumerate(where):
        expected = [t]
        while len(expected) < length and script[t][e] == "go" and t + 1 < len(script) and script[t + 1][e] != "invalid":
            t += 1
            expected.append(t)
        numbers = [float(10 * t + e) for t in expected]
        padding = [0.0] * (length - len(expected))
        assert batch.mask[i].tolist() == [1.0] * len(expected) + padding
        assert batch.reward[i].tolist() == numbers + padding
        assert batch.obs[i].flatten().tolist() == numbers + padding  # type: ignore[index]
        assert batch.next_obs[i].flatten().tolist() == [n + 10 for n in numbers] + padding  # type: ignore[index]
        assert batch.extras["state"][i, :, 1].tolist() == [-n for n in numbers] + padding
        last = script[expected[-1]][e] in ("terminate", "life")
        assert batch.terminated[i].tolist() == [0.0] * (len(expected) - 1) + [float(last)] + padding


def test_shapes_types_and_slots() -> None:
    buffer = make(10)
    for _ in range(6):
        add(buffer, ["go", "go"])
    batch = SequenceSampler(buffer, 3).sample(5)
    assert isinstance(batch.obs, torch.Tensor) and batch.obs.shape == (5, 3, 1)
    assert batch.action.shape == batch.mask.shape == (5, 3) and batch.action.dtype == torch.int64
    assert batch.extras["state"].shape == (5, 3, 2)
    assert batch.index.shape == (5,) and batch.weight is None
    numbers = (batch.index // N * 10 + batch.index % N).float()
    assert torch.equal(batch.reward[:, 0], numbers)
    buffer.update_priority(batch.index, torch.ones(5))


def test_sequences_of_stacked_images() -> None:
    space = spaces.Box(0, 255, (2, 1, 2), np.uint8)
    framed, whole = (ReplayBuffer(6, space, spaces.Discrete(2), frame_stack=k, seed=4) for k in (2, None))
    rng, no = np.random.default_rng(0), torch.tensor([False])
    frames = torch.from_numpy(rng.integers(0, 256, (12, 1, 2), np.uint8))
    for t in range(10):
        step: list[Any] = [frames[None, t : t + 2], torch.tensor([0]), torch.ones(1), frames[None, t + 1 : t + 3]]
        for buffer in (framed, whole):
            buffer.add(*step, no, no)
    a, b = (SequenceSampler(buffer, 4).sample(8) for buffer in (framed, whole))
    assert isinstance(a.obs, torch.Tensor) and isinstance(b.obs, torch.Tensor)
    assert a.obs.shape == (8, 4, 2, 1, 2) and torch.equal(a.obs, b.obs)
    assert torch.equal(a.next_obs, b.next_obs)  # type: ignore[arg-type]


def test_arguments_that_make_no_sense() -> None:
    with pytest.raises(RloptError, match="length of at least 1"):
        SequenceSampler(make(3), 0)
    with pytest.raises(RloptError, match="no transition yet"):
        SequenceSampler(make(3), 2).sample(4)
