"""What a checkpoint holds, what a save writes, and what stays."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import torch

from rlopt.runs import checkpoint
from rlopt.runs.checkpoint import Checkpoints, estimate_bytes, free_bytes
from rlopt.state import load_state, save_state
from rlopt.types import RloptError
from tests.training.saved_runs import WIDTH, Ring, assert_holds, names, save, segments


def test_nothing_to_load(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "new").load() is None


def test_a_save_writes_only_the_rows_added_since_the_last(tmp_path: Path) -> None:
    ring, checkpoints = Ring(100, rows=40), Checkpoints(tmp_path)
    save(checkpoints, 1, ring)
    first = tmp_path / "segments/replay" / (names((0, 40))[0] + ".safetensors")
    before = (first.read_bytes(), first.stat().st_mtime_ns, first.stat().st_ino)
    ring.add(3)
    ring.reads.clear()
    save(checkpoints, 2, ring)
    assert segments(tmp_path) == names((0, 40), (40, 43))
    assert (first.read_bytes(), first.stat().st_mtime_ns, first.stat().st_ino) == before
    assert (40, 43) in ring.reads and min(start for start, _ in ring.reads) >= 40
    save(checkpoints, 3, ring)
    assert segments(tmp_path) == names((0, 40), (40, 43))
    assert_holds(tmp_path, 3, ring)


def test_segments_are_small_however_many_rows_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row_bytes = WIDTH * 4 + 4
    monkeypatch.setattr(checkpoint, "SEGMENT_BYTES", 10 * row_bytes)
    ring = Ring(100, rows=25)
    save(Checkpoints(tmp_path), 1, ring)
    assert segments(tmp_path) == names((0, 10), (10, 20), (20, 25))
    assert_holds(tmp_path, 1, ring)


def test_a_ring_keeps_only_living_rows(tmp_path: Path) -> None:
    ring, checkpoints = Ring(10, rows=4), Checkpoints(tmp_path, keep=1)
    for step in range(8):
        save(checkpoints, step, ring)
        assert_holds(tmp_path, step, ring)
        ring.add(4)
    # 32 rows written: the living ones are 22 … 31, and 20 and 21 share a segment with them.
    assert segments(tmp_path) == names((20, 24), (24, 28), (28, 32))


def test_a_ring_overwritten_more_than_once_between_saves(tmp_path: Path) -> None:
    ring, checkpoints = Ring(10, rows=7), Checkpoints(tmp_path)
    save(checkpoints, 1, ring)
    ring.add(33)
    save(checkpoints, 2, ring)
    assert segments(tmp_path) == names((0, 7), (30, 40))  # the first is still the previous checkpoint's
    checkpoints = assert_holds(tmp_path, 2, ring)
    ring.add(1)
    save(checkpoints, 3, ring)
    assert segments(tmp_path) == names((30, 40), (40, 41))
    assert_holds(tmp_path, 3, ring)


def test_a_resumed_run_goes_on_with_the_segments(tmp_path: Path) -> None:
    ring = Ring(50, rows=8)
    save(Checkpoints(tmp_path), 1, ring)
    for step in (2, 3):
        checkpoints = assert_holds(tmp_path, step - 1, ring)
        ring.add(5)
        save(checkpoints, step, ring)
    assert segments(tmp_path) == names((0, 8), (8, 13), (13, 18))


def test_last_and_previous_are_kept(tmp_path: Path) -> None:
    ring, checkpoints = Ring(10, rows=1), Checkpoints(tmp_path, keep=2)
    for step in (5, 40, 300):
        save(checkpoints, step, ring)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000000000040", "step-000000000300"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    ring, checkpoints = Ring(10, rows=1), Checkpoints(tmp_path)
    checkpoints.save(7, {"first": True}, {"replay": ring})
    ring.add(2)
    assert save(checkpoints, 7, ring) == tmp_path / "step-000000000007"
    assert [path.name for path in tmp_path.glob("*step*")] == ["step-000000000007"]
    assert_holds(tmp_path, 7, ring)


def test_state_without_logs_and_a_log_without_rows(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, {}, {})
    loaded = checkpoints.load()
    assert loaded is not None and loaded.state == {} and loaded.logs == {}
    ring = Ring(10)
    save(checkpoints, 1, ring)
    assert_holds(tmp_path, 1, ring)


def test_logs_that_do_not_fit_are_the_users_mistake(tmp_path: Path) -> None:
    ring, checkpoints = Ring(10, rows=4), Checkpoints(tmp_path)
    save(checkpoints, 1, ring)
    loaded = checkpoints.load()
    assert loaded is not None
    with pytest.raises(RloptError, match="saved with a replay of 10 rows, the run's has 20"):
        checkpoints.restore_logs(loaded, {"replay": Ring(20)})
    with pytest.raises(RloptError, match=r"the logs \['replay'\], the run has \['other'\]"):
        checkpoints.restore_logs(loaded, {"other": ring})
    with pytest.raises(ValueError, match="cannot name a log"):
        checkpoints.save(2, {}, {"../outside": ring})


def test_what_cannot_be_saved_leaves_no_trace(tmp_path: Path) -> None:
    ring, checkpoints = Ring(10, rows=4), Checkpoints(tmp_path)
    save(checkpoints, 1, ring)
    ring.add(2)
    with pytest.raises(TypeError, match="agent/oops"):
        checkpoints.save(2, {"agent": {"oops": object()}}, {"replay": ring})
    assert segments(tmp_path) == names((0, 4))
    assert [path.name for path in tmp_path.iterdir() if path.name != "segments"] == ["step-000000000001"]
    save(checkpoints, 2, ring)
    assert_holds(tmp_path, 2, ring)


def test_best_is_replaced_and_stays_when_others_go(tmp_path: Path) -> None:
    ring, checkpoints = Ring(10, rows=1), Checkpoints(tmp_path, keep=1)
    checkpoints.save_best(1, partial(save_state, state={"w": torch.zeros(3)}))
    checkpoints.save_best(2, partial(save_state, state={"w": torch.ones(3)}))
    for step in range(4):
        save(checkpoints, step, ring)
    assert load_state(tmp_path / "best")["w"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("target", ["best", "step-000000000001"])
def test_a_replacement_cut_in_half_is_undone(tmp_path: Path, target: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": 1}, {})
    checkpoints.save_best(1, partial(save_state, state={"x": 1}))
    os.replace(tmp_path / target, tmp_path / f".{target}.old")  # where a crash may fall
    checkpoints = Checkpoints(tmp_path)
    loaded = checkpoints.load()
    assert loaded is not None and loaded.state == {"x": 1}
    assert load_state(tmp_path / "best") == {"x": 1}
    assert not list(tmp_path.glob(".*"))


def test_what_a_crash_left_is_removed(tmp_path: Path) -> None:
    ring = Ring(10, rows=2)
    save(Checkpoints(tmp_path), 1, ring)
    staged = tmp_path / ".step-000000000002.tmp"
    staged.mkdir()
    (staged / "state.json").write_text("{")
    orphan = tmp_path / "segments/replay" / (names((2, 5))[0] + ".safetensors")
    orphan.write_bytes(b"torn")
    checkpoints = assert_holds(tmp_path, 1, ring)
    assert not staged.exists()
    ring.add(3)
    save(checkpoints, 2, ring)
    assert not orphan.exists()
    assert_holds(tmp_path, 2, ring)


def test_the_estimate_counts_full_logs_and_every_copy(tmp_path: Path) -> None:
    state = {"w": torch.zeros(100), "deep": [{"u": torch.zeros(7, dtype=torch.uint8)}]}
    row_bytes = WIDTH * 4 + 4
    for rows in (0, 3):
        assert estimate_bytes(state, {"replay": Ring(1000, rows)}, keep=2) == 4 * 407 + 1000 * row_bytes
        assert estimate_bytes(state, {"replay": Ring(1000, rows)}, keep=2, rows=60) == 4 * 407 + 60 * row_bytes
    assert free_bytes(tmp_path / "not" / "there") > 0
