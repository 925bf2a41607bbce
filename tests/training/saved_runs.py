"""A small run to save: a ring of rows made from their numbers, and what a checkpoint of it must give back."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rlopt.runs.checkpoint import Checkpoints
from rlopt.state import states_equal
from rlopt.types import State

WIDTH = 3


class Ring:
    """A small replay buffer: row r is made from r alone, and lies at slot r % capacity."""

    def __init__(self, capacity: int, rows: int = 0) -> None:
        self.capacity_rows, self.rows_written = capacity, 0
        self.block = torch.zeros(capacity, WIDTH)
        self.image = torch.zeros(capacity, 2, 2, dtype=torch.uint8)
        self.reads: list[tuple[int, int]] = []
        self.add(rows)

    def add(self, count: int, offset: float = 0.0) -> None:
        for row in range(self.rows_written, self.rows_written + count):
            self.block[row % self.capacity_rows] = row + offset + torch.arange(WIDTH) / 4
            self.image[row % self.capacity_rows] = row % 256
        self.rows_written += count

    def read_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        self.reads.append((start, stop))
        slots = torch.arange(start, stop) % self.capacity_rows
        return {"block": self.block[slots], "image": self.image[slots]}

    def write_rows(self, start: int, rows: dict[str, Tensor]) -> None:
        assert start >= self.rows_written - self.capacity_rows
        slots = torch.arange(start, start + len(rows["block"])) % self.capacity_rows
        self.block[slots], self.image[slots] = rows["block"], rows["image"]

    def forget_rows(self, start: int, stop: int) -> None:
        slots = torch.arange(start, stop) % self.capacity_rows
        self.block[slots], self.image[slots] = -1.0, 0


def run_state(step: int, ring: Ring) -> State:
    generator = torch.Generator().manual_seed(step)
    return {"step": step, "rows": ring.rows_written, "net": {"w": torch.randn(4, 5, generator=generator)}, "lr": 3e-4}


def save(checkpoints: Checkpoints, step: int, ring: Ring) -> Path:
    return checkpoints.save(step, run_state(step, ring), {"replay": ring})


def assert_holds(folder: Path, step: int, ring: Ring) -> Checkpoints:
    """The newest sound checkpoint of ``folder`` is that of ``step``, and restores ``ring`` exactly."""
    checkpoints = Checkpoints(folder)
    loaded = checkpoints.load()
    assert loaded is not None
    assert loaded.step == step
    assert states_equal(loaded.state, run_state(step, ring)) is None
    back = Ring(ring.capacity_rows)
    back.rows_written = loaded.state["rows"]
    checkpoints.restore_logs(loaded, {"replay": back})
    assert states_equal([back.block, back.image], [ring.block, ring.image]) is None
    return checkpoints


def segments(folder: Path) -> list[str]:
    return sorted(path.name.removesuffix(".safetensors") for path in folder.glob("segments/replay/*"))


def names(*ranges: tuple[int, int]) -> list[str]:
    return [f"{start:012d}-{stop:012d}" for start, stop in ranges]
