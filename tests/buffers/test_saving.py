"""Saved in segments, a buffer comes back and draws the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.buffers import Batch, PrioritizedReshuffledSampler, PrioritizedSampler, ReplayBuffer, ReshuffledSampler


def step(buffer: ReplayBuffer, number: float) -> None:
    x, no = torch.tensor([number]), torch.tensor([False])
    buffer.add(x[:, None], torch.tensor([0]), x, x[:, None], no, no)


def simple() -> ReplayBuffer:
    return ReplayBuffer(4, spaces.Box(-1, 1, (1,)), spaces.Discrete(4))


@pytest.mark.parametrize("steps", [(3, 2), (7, 2), (7, 9), (20, 3)])
def test_a_restored_buffer_draws_the_same_bits(steps: tuple[int, int]) -> None:
    """Rows are saved as they come, in segments; state and rows together give the buffer back."""
    space = spaces.Dict({"camera": spaces.Box(0, 255, (2, 2, 1), np.uint8), "arm": spaces.Box(-1, 1, (1,))})

    def make(seed: int) -> ReplayBuffer:
        return ReplayBuffer(14, space, spaces.Discrete(3), num_envs=2, n_step=3, seed=seed)

    def fill(buffer: ReplayBuffer, first: int, count: int) -> None:
        for i in range(first, first + count):
            g = torch.Generator().manual_seed(i)
            obs, next_obs = (
                {
                    "camera": torch.randint(256, (2, 2, 2, 1), generator=g, dtype=torch.uint8),
                    "arm": torch.rand(2, 1, generator=g),
                }
                for _ in range(2)
            )
            flags = torch.rand(3, 2, generator=g) < torch.tensor([[0.1], [0.1], [0.8]])
            reward = torch.rand(2, generator=g)
            action = torch.randint(3, (2,), generator=g)
            buffer.add(obs, action, reward, next_obs, flags[0], flags[1], valid=flags[2])

    def flat(batch: Batch) -> list[Tensor]:
        assert isinstance(batch.obs, dict) and isinstance(batch.next_obs, dict)
        return [
            *batch.obs.values(),
            *batch.next_obs.values(),
            batch.action,
            batch.reward,
            batch.terminated,
            batch.discount,
            batch.index,
        ]

    original = make(0)
    segments: list[tuple[int, dict[str, Tensor]]] = []
    saved = 0
    for first, count in ((0, steps[0]), steps):
        fill(original, first, count)
        saved = max(saved, original.rows_written - original.capacity_rows)
        segments.append((saved, original.read_rows(saved, original.rows_written)))
        saved = original.rows_written
        original.sample(4)
    restored = make(1)
    for start, rows in segments:
        restored.write_rows(start, rows)
    restored.load_state_dict(original.state_dict())
    assert (len(restored), restored.transitions) == (len(original), original.transitions)
    for i in range(3):
        for a, b in zip(flat(original.sample(16)), flat(restored.sample(16)), strict=True):
            assert torch.equal(a, b)
        for buffer in (original, restored):
            fill(buffer, 100 + i, 1)


def test_read_rows_takes_copies_on_the_cpu() -> None:
    buffer = simple()
    step(buffer, 1)
    rows = buffer.read_rows(0, 1)
    step(buffer, 2)
    for i in range(4):
        step(buffer, 3 + i)
    assert rows["block"][0, 0, buffer.slices["reward"]].item() == 1.0
    assert all(t.device.type == "cpu" for t in rows.values())


def test_rows_of_another_buffer_are_refused() -> None:
    buffer = simple()
    step(buffer, 1)
    rows = buffer.read_rows(0, 1)
    other = ReplayBuffer(4, spaces.Box(-1, 1, (3,)), spaces.Discrete(4))
    with pytest.raises(ValueError, match="fields"):
        other.write_rows(0, rows)
    with pytest.raises(ValueError, match="fields"):
        buffer.write_rows(0, {**rows, "extra": torch.zeros(1)})


@pytest.mark.parametrize("kind", [ReshuffledSampler, PrioritizedSampler, PrioritizedReshuffledSampler])
def test_saving_changes_nothing(kind: type) -> None:
    """Not even a last bit: a run that was saved at this moment goes on like one that was not, and so does its copy."""

    def play(saved_at: int | None) -> ReplayBuffer:
        buffer = ReplayBuffer(60, spaces.Box(-1, 1, (1,)), spaces.Discrete(4), sampler=kind(), seed=1)
        for i in range(400):
            step(buffer, float(i))
            if i % 4 == 3 and i > 20:
                index, _ = buffer.draw(16)
                error = torch.rand(16, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
                buffer.update_priority(index, error)
            if i == saved_at:
                state, rows = buffer.state_dict(), buffer.read_rows(max(0, i + 1 - 60), i + 1)
                buffer = ReplayBuffer(60, spaces.Box(-1, 1, (1,)), spaces.Discrete(4), sampler=kind(), seed=2)
                buffer.load_state_dict(state)
                buffer.write_rows(max(0, i + 1 - 60), rows)
        return buffer

    def numbers(buffer: ReplayBuffer) -> list[Tensor]:
        state = buffer.state_dict()["sampler"]
        masses = [t for t in state.get("masses", {}).values() if isinstance(t, Tensor) and t.is_floating_point()]
        return [buffer.draw(16)[0], *masses]

    straight = numbers(play(None))
    for saved_at in (202, 205):
        for a, b in zip(straight, numbers(play(saved_at)), strict=True):
            assert torch.equal(a, b)


def test_a_state_of_frames_is_a_copy() -> None:
    space = spaces.Box(0, 255, (2, 1, 1), np.uint8)
    buffer = ReplayBuffer(4, space, spaces.Discrete(2), frame_stack=2)
    no = torch.tensor([False])

    def add(t: int) -> None:
        obs, next_obs = (torch.tensor([i, i + 1], dtype=torch.uint8).view(1, 2, 1, 1) for i in (t, t + 1))
        buffer.add(obs, torch.tensor([0]), torch.ones(1), next_obs, no, no)

    add(0)
    last = buffer.state_dict()["frames"]["0"]["last"]
    add(1)
    assert last.flatten().tolist() == [1, 2]
