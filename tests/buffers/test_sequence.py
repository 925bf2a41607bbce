"""Slices of consecutive transitions stay inside one episode of one environment."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from rlopt.buffers import (
    Batch,
    PrioritizedSampler,
    ReplayBuffer,
    ReshuffledSampler,
    SequenceConfig,
    SequenceSampler,
    UniformSampler,
    slice_priority,
)
from rlopt.buffers.samplers.per_run import RunSamplers
from rlopt.types import RloptError

N = 2


def add(buffer: ReplayBuffer, row: list[str]) -> None:
    """One step of each environment, told by a number that counts rows and environments."""
    number = torch.tensor([float(10 * buffer.rows_written + e) for e in range(len(row))])
    buffer.add(
        number[:, None],
        torch.arange(len(row)),
        number,
        number[:, None] + 10,
        torch.tensor([event in ("terminate", "life") for event in row]),
        torch.tensor([event == "truncate" for event in row]),
        ended=torch.tensor([event in ("terminate", "ended") for event in row]),
        valid=torch.tensor([event != "invalid" for event in row]),
        **{"carry/h": torch.stack((number, -number), 1), "score": -number},
    )


def make(rows: int, length: int, inner: Any = None, **options: Any) -> ReplayBuffer:
    fields = {"carry/h": ((2,), torch.float32), "score": ((), torch.float32)}
    sampler = SequenceSampler(inner or UniformSampler(), length, **options)
    return ReplayBuffer(N * rows, spaces.Box(-1, 1, (1,)), spaces.Discrete(N), N, sampler, extra_fields=fields)


EVENTS = ["go"] * 6 + ["terminate", "truncate", "life", "ended", "invalid"]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(EVENTS), min_size=N, max_size=N), min_size=1, max_size=25),
    st.integers(1, 6),
    st.integers(0, 4),
    st.integers(1, 9),
)
def test_slices_equal_brute_force(script: list[list[str]], learnt: int, burn_in: int, rows: int) -> None:
    buffer, length = make(rows, learnt + burn_in, burn_in=burn_in), learnt + burn_in
    for row in script:
        add(buffer, row)
    held = range(max(0, len(script) - rows), len(script))
    where = [(t, e) for t in held for e in range(N) if script[t][e] != "invalid"]
    if not where:
        return
    batch = buffer.batch(torch.tensor([(t % rows) * N + e for t, e in where]))
    assert isinstance(batch, Batch) and batch.valid is not None and batch.mask is not None and batch.carry is not None
    for i, (t, e) in enumerate(where):
        before = 0
        while before < burn_in and t - before - 1 in held and script[t - before - 1][e] == "go":
            before += 1
        expected, last = list(range(t - before, t + 1)), t
        while (
            last - t + 1 < learnt
            and script[last][e] == "go"
            and last + 1 < len(script)
            and script[last + 1][e] != "invalid"
        ):
            last += 1
            expected.append(last)
        numbers, padding = [float(10 * t + e) for t in expected], [0.0] * (length - len(expected))
        assert batch.valid[i].tolist() == [1.0] * len(expected) + padding
        assert batch.mask[i].tolist() == [0.0] * before + [1.0] * (len(expected) - before) + padding
        assert batch.reward[i].tolist() == numbers + padding
        assert batch.discount[i].tolist() == pytest.approx([0.99] * len(expected) + padding)
        assert batch.obs[i].flatten().tolist() == numbers + padding  # type: ignore[index]
        assert batch.next_obs[i].flatten().tolist() == [n + 10 for n in numbers] + padding  # type: ignore[index]
        assert batch.extras["score"][i].tolist() == [-n for n in numbers] + padding
        assert batch.carry["h"][i].tolist() == [numbers[0], -numbers[0]]
        cut = script[last][e] in ("terminate", "life")
        assert batch.terminated[i].tolist() == [0.0] * (len(expected) - 1) + [float(cut)] + padding


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(EVENTS), min_size=N, max_size=N), min_size=1, max_size=25),
    st.integers(1, 9),
)
def test_slices_from_the_start_of_episodes(script: list[list[str]], rows: int) -> None:
    buffer = make(rows, 3, ReshuffledSampler(), start="episode")
    for row in script:
        add(buffer, row)
    expected = {
        float(10 * t + e)
        for t in range(max(0, len(script) - rows), len(script))
        for e in range(N)
        if script[t][e] != "invalid" and (t == 0 or rows == 1 or script[t - 1][e] != "go")
    }
    if not expected:
        with pytest.raises(RloptError, match="no transition yet"):
            buffer.sample(1)
        return
    drawn = buffer.sample(2 * rows * N).reward[:, 0]
    assert set(drawn.tolist()) == expected


def test_shapes_types_and_slots() -> None:
    buffer = make(10, 3)
    for _ in range(6):
        add(buffer, ["go", "go"])
    batch = buffer.sample(5)
    assert isinstance(batch.obs, torch.Tensor) and batch.obs.shape == (5, 3, 1)
    assert batch.action.shape == batch.mask.shape == (5, 3) and batch.action.dtype == torch.int64
    assert batch.extras.keys() == {"score"} and batch.carry["h"].shape == (5, 2)
    assert batch.index.shape == (5,) and batch.weight is None
    assert torch.equal(batch.reward[:, 0], (batch.index // N * 10 + batch.index % N).float())
    assert batch.map(lambda x: x[:2]).carry["h"].shape == (2, 2)


def test_the_priority_of_a_slice_by_hand() -> None:
    """.9 · 4 + .1 · (1 + 4)/2, and of one step -3."""
    error, mask = torch.tensor([[9.0, 1.0, -4.0], [-3.0, 8.0, 8.0]]), torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(slice_priority(error, mask), torch.tensor([3.6 + 0.25, 3.0]))


def test_priorities_of_slices_are_those_of_their_first_learnt_transition() -> None:
    buffer = make(10, 4, PrioritizedSampler(alpha=1.0, beta=1.0, anneal_draws=None), burn_in=1)
    for _ in range(8):
        add(buffer, ["go", "go"])
    every = torch.arange(16)
    buffer.update_priority(every, torch.where(every == 6, 3.0, 1e-3))
    batch = buffer.sample(200)
    counted = batch.index == 6
    assert counted.float().mean().item() > 0.9
    assert (batch.reward[counted, :2] == torch.tensor([20.0, 30.0])).all()
    assert (batch.mask[counted] == torch.tensor([0.0, 1.0, 1.0, 1.0])).all()
    assert batch.weight.shape == (200,) and (batch.weight[counted] < batch.weight[~counted].min()).all()


def test_slices_of_several_runs() -> None:
    buffer = make(10, 3, RunSamplers([ReshuffledSampler(), ReshuffledSampler()], N))
    for _ in range(6):
        add(buffer, ["go", "go"])
    first = buffer.sample(6).reward[:, 0] % 10
    assert first.tolist() == [0.0] * 3 + [1.0] * 3


@pytest.mark.parametrize("start", ["any", "episode"])
def test_a_restored_buffer_goes_on_with_the_same_slices(start: str) -> None:
    buffer, back = (make(10, 4, ReshuffledSampler(), start=start) for _ in range(2))
    script = [["go", "truncate" if t % 3 == 0 else "go"] for t in range(40)]
    for row in script[:14]:
        add(buffer, row)
    buffer.sample(3)
    back.load_state_dict(buffer.state_dict())
    back.write_rows(4, buffer.read_rows(4, 14))
    for row in script[14:]:
        for b in (buffer, back):
            add(b, row)
        ours, theirs = buffer.sample(3), back.sample(3)
        assert torch.equal(ours.reward, theirs.reward) and torch.equal(ours.index, theirs.index)


def test_sequences_of_stacked_images() -> None:
    space = spaces.Box(0, 255, (2, 1, 2), np.uint8)
    framed, whole = (
        ReplayBuffer(
            6, space, spaces.Discrete(2), sampler=SequenceSampler(UniformSampler(), 4, burn_in=1), frame_stack=k, seed=4
        )
        for k in (2, None)
    )
    rng, no = np.random.default_rng(0), torch.tensor([False])
    frames = torch.from_numpy(rng.integers(0, 256, (12, 1, 2), np.uint8))
    for t in range(10):
        step: list[Any] = [frames[None, t : t + 2], torch.tensor([0]), torch.ones(1), frames[None, t + 1 : t + 3]]
        for buffer in (framed, whole):
            buffer.add(*step, no, no)
    a, b = framed.sample(8), whole.sample(8)
    assert a.obs.shape == (8, 4, 2, 1, 2) and torch.equal(a.obs, b.obs) and torch.equal(a.next_obs, b.next_obs)


def test_arguments_that_make_no_sense() -> None:
    for length, burn_in in ((0, 0), (3, 3), (3, -1)):
        with pytest.raises(RloptError, match="leaves nothing to learn from"):
            SequenceSampler(UniformSampler(), length, burn_in=burn_in)
    with pytest.raises(RloptError, match="nothing comes before an episode's start"):
        SequenceSampler(UniformSampler(), 4, "episode", burn_in=1)
    with pytest.raises(RloptError, match="choose any or episode"):
        SequenceSampler(UniformSampler(), 4, "middle")
    with pytest.raises(RloptError, match=r"agent\.n_step=2 is not combined with buffer\.sequence_length"):
        sampler = SequenceSampler(UniformSampler(), 2)
        ReplayBuffer(8, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), sampler=sampler, n_step=2)
    with pytest.raises(RloptError, match="no transition yet"):
        make(3, 2).sample(4)


def test_the_options_wrap_a_sampler() -> None:
    inner = UniformSampler()
    assert SequenceConfig().wrap(inner) is inner
    slices = SequenceConfig(sequence_length=5, burn_in=2).wrap(inner)
    assert isinstance(slices, SequenceSampler) and (slices.length, slices.burn_in, slices.inner) == (5, 2, inner)
    with pytest.raises(RloptError, match=r"give buffer\.sequence_length"):
        SequenceConfig(burn_in=2).wrap(inner)
