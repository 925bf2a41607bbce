"""Where transitions live: exact types, memory-mapped files, sizes told before they are taken."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.allocation import _left_to_group
from rlopt.buffers import ReplayBuffer
from rlopt.buffers.placement import Placement
from rlopt.registry import get_sampler
from rlopt.types import RloptError

SCALAR = spaces.Box(-np.inf, np.inf, (1,))
NO = torch.tensor([False])


def one(buffer: ReplayBuffer, obs: torch.Tensor, action: torch.Tensor, **extras: torch.Tensor) -> None:
    buffer.add(obs[None], action[None], torch.zeros(1), obs[None], NO, NO, **extras)


# --- integers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "value", "apart"),
    [
        (spaces.Discrete(2**24 + 1), 2**24, False),
        (spaces.Discrete(2**24 + 2), 2**24 + 1, True),
        (spaces.Discrete(10, start=2**53), 2**53 + 1, True),
        (spaces.Discrete(10, start=-(2**24) - 1), -(2**24) - 1, True),
        (spaces.MultiDiscrete([3, 2**40]), [2, 2**40 - 1], True),
        (spaces.MultiDiscrete([3, 300]), [2, 299], False),
    ],
)
def test_integers_beyond_what_float32_holds_come_back_exactly(space: Any, value: Any, apart: bool) -> None:
    """2**24 + 1 is the first integer that float32 rounds."""
    given = torch.tensor(value)
    as_action = ReplayBuffer(4, SCALAR, space)
    one(as_action, torch.zeros(1), given)
    as_obs = ReplayBuffer(4, space, spaces.Discrete(2))
    one(as_obs, given, torch.tensor(0))
    assert torch.equal(as_action.sample(1).action[0], given)
    batch = as_obs.sample(1)
    assert torch.equal(batch.obs[0], given) and torch.equal(batch.next_obs[0], given)  # type: ignore[index]
    assert ("action" in as_action.storage.apart) == ("obs" in as_obs.storage.apart) == apart


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.int64, 2**60 + 1),
        (torch.int32, 2**31 - 1),
        (torch.float64, 1 / 3),
        (torch.int16, -(2**15)),
        (torch.bool, True),
        (torch.uint8, 255),
        (torch.float16, 0.333),
        (torch.bfloat16, 0.333),
    ],
)
def test_extras_come_back_exactly_in_their_own_type(dtype: torch.dtype, value: float) -> None:
    buffer = ReplayBuffer(4, SCALAR, spaces.Discrete(2), extra_fields={"x": ((2,), dtype)})
    given = torch.tensor([[value, 0]], dtype=dtype)
    one(buffer, torch.zeros(1), torch.tensor(0), x=given)
    got = buffer.sample(1).extras["x"]
    assert got.dtype == dtype and torch.equal(got, given)


def test_values_that_carry_gradients_are_stored_as_they_are() -> None:
    buffer = ReplayBuffer(4, SCALAR, spaces.Box(-1, 1, (2,)))
    one(buffer, torch.zeros(1), torch.tensor([0.5, -0.5], requires_grad=True) * 1)
    action = buffer.sample(1).action
    assert action.tolist() == [[0.5, -0.5]] and not action.requires_grad


def test_a_field_of_another_size_is_an_error() -> None:
    buffer = ReplayBuffer(4, spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)))
    with pytest.raises(RloptError, match="shape"):
        one(buffer, torch.zeros(3), torch.zeros(1))


# --- disk -----------------------------------------------------------------------------------------------------------


def fill(buffer: ReplayBuffer, count: int) -> None:
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        obs = {
            "camera": torch.randint(256, (1, 2, 3, 3), generator=g, dtype=torch.uint8),
            "arm": torch.rand(1, 2, generator=g),
        }
        buffer.add(obs, torch.tensor([2**40 + i]), torch.rand(1, generator=g), obs, NO, torch.tensor([i % 5 == 4]))


def mixed(**options: Any) -> ReplayBuffer:
    space = spaces.Dict({"camera": spaces.Box(0, 255, (2, 3, 3), np.uint8), "arm": spaces.Box(-1, 1, (2,))})
    return ReplayBuffer(10, space, spaces.Discrete(2**50), n_step=2, **options)


def assert_same_draws(a: ReplayBuffer, b: ReplayBuffer) -> None:
    for _ in range(3):
        x, y = a.sample(16), b.sample(16)
        assert isinstance(x.obs, dict) and isinstance(y.obs, dict)
        pairs = [(x.obs[k], y.obs[k]) for k in x.obs] + [(x.action, y.action), (x.reward, y.reward), (x.index, y.index)]
        assert all(torch.equal(p, q) for p, q in pairs)


def test_a_buffer_on_disk_draws_the_same_bits_and_leaves_no_file(tmp_path: Path) -> None:
    disk, memory = mixed(device="disk", folder=tmp_path), mixed()
    for buffer in (disk, memory):
        fill(buffer, 13)
    assert_same_draws(disk, memory)
    assert disk.device == torch.device("cpu") and f"disk ({tmp_path})" in disk.describe()
    assert list(tmp_path.iterdir()) == []  # it has no name from the beginning, so not even a killed run leaves it


def test_a_buffer_on_disk_is_saved_and_restored(tmp_path: Path) -> None:
    disk = mixed(device="disk", folder=tmp_path)
    fill(disk, 13)
    rows = disk.read_rows(3, 13)
    for back in (mixed(device="disk", folder=tmp_path, seed=1), mixed(seed=1)):
        state = disk.state_dict()
        back.load_state_dict(state)
        back.write_rows(3, rows)
        again = mixed()
        again.load_state_dict(state)
        again.write_rows(3, rows)
        assert_same_draws(back, again)


def test_the_space_on_disk_is_reserved_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a full disk would end the run with SIGBUS days later."""
    reserved: list[int] = []
    monkeypatch.setattr("os.posix_fallocate", lambda handle, start, size: reserved.append(size), raising=False)
    monkeypatch.setattr("torch.from_file", lambda path, shared, size, dtype: torch.zeros(size, dtype=dtype))
    Placement("disk", tmp_path).empty((3, 5), torch.int64)
    assert reserved == [120]


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(RloptError, match="is no folder"):
        mixed(device="disk", folder=tmp_path / "missing")


# --- size -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "disk"])
def test_too_large_is_one_line_with_three_ways_out(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(Placement, "free", lambda self: 10**9)
    monkeypatch.setattr(Placement, "empty", lambda self, shape, dtype: taken.append(0))
    with pytest.raises(RloptError) as error:
        ReplayBuffer(
            10**6, spaces.Box(0, 255, (4, 84, 84), np.uint8), spaces.Discrete(4), device=device, folder=tmp_path
        )
    text = str(error.value)
    assert "\n" not in text and "52.6 GiB" in text
    assert all(way in text for way in ("buffer.capacity", "buffer.frame_stack", "buffer.device=disk"))
    assert not taken


def test_the_planned_size_is_told_before_anything_is_allocated(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    empty: Callable[..., torch.Tensor] = Placement.empty
    told: list[list[str]] = []

    def spy(self: Placement, shape: Any, dtype: Any) -> torch.Tensor:
        told.append([record.getMessage() for record in caplog.records])
        return empty(self, shape, dtype)

    monkeypatch.setattr(Placement, "empty", spy)
    with caplog.at_level(logging.INFO, logger="rlopt"):
        buffer = ReplayBuffer(1000, SCALAR, spaces.Discrete(2))
    assert told[0] == [buffer.describe()]
    assert "1,000 transitions of 28 bytes" in buffer.describe()


def test_a_short_run_takes_what_it_stores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A default buffer of images, 7.28 GiB, for a run of 600 steps; in main memory only what is written is taken."""
    image = spaces.Box(0, 255, (4, 44, 44), np.uint8)
    monkeypatch.setattr(Placement, "free", lambda self: 2**26)
    with pytest.raises(RloptError, match=r"needs 1\.4 GiB"):
        ReplayBuffer(100_000, image, spaces.Discrete(2))
    buffer = ReplayBuffer(100_000, image, spaces.Discrete(2), planned=600)
    assert buffer.describe() == "replay buffer: 600 of 100,000 transitions of 15,508 bytes, 0.01 GiB on cpu"
    with pytest.raises(RloptError, match=r"needs 1\.4 GiB"):  # reserved at once
        ReplayBuffer(100_000, image, spaces.Discrete(2), planned=600, device="disk", folder=tmp_path)
    whole = ReplayBuffer(1_000, image, spaces.Discrete(2), planned=600, device="disk", folder=tmp_path)
    assert whole.describe().endswith(f"0.01 GiB on disk ({tmp_path}) at once; the run stores 600 (buffer.capacity)")


@pytest.mark.parametrize("name", ["uniform", "reshuffled", "prioritized", "prioritized_reshuffled"])
def test_what_is_drawn_does_not_depend_on_what_is_planned(name: str) -> None:
    def drawn(planned: int | None) -> list[torch.Tensor]:
        buffer = ReplayBuffer(100, SCALAR, spaces.Discrete(2), sampler=get_sampler(name)(), planned=planned)
        found = []
        for t in range(150):
            x = torch.full((1,), float(t))
            buffer.add(x, x.long() % 2, x, x, x < 0, x < 0)
            batch = buffer.sample(4)
            buffer.update_priority(batch.index, batch.reward / 100)
            found.append(batch.reward)
        return found

    assert all(torch.equal(a, b) for a, b in zip(drawn(None), drawn(20), strict=True))


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    assert _left_to_group(tmp_path) is None
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 100\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert _left_to_group(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert _left_to_group(tmp_path) == 400
