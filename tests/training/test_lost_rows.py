"""Damaged or missing segments of the replay buffer: a save writes again what is missing, a resume may go on without."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlopt.cli import main
from rlopt.runs import checkpoint
from rlopt.runs.checkpoint import Checkpoints, LostRows
from rlopt.runs.manifest import read_manifest
from rlopt.training.setup import begin, resume
from rlopt.types import RloptError
from tests.training.saved_runs import WIDTH, Ring, assert_holds, names, run_state, save, segments
from tests.training.test_resume import CASES as RESUMED
from tests.training.test_resume import config, run_to_end

pytestmark = pytest.mark.usefixtures("without_curves")

ROW_BYTES = WIDTH * 4 + 4


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SEGMENT_BYTES", 4 * ROW_BYTES)


def segment(folder: Path, start: int, stop: int) -> Path:
    return folder / "segments/replay" / f"{names((start, stop))[0]}.safetensors"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def replace_by_a_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "elsewhere")


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("damage", [Path.unlink, cut, replace_by_a_link], ids=["gone", "cut", "a link"])
def test_a_save_writes_again_what_is_missing_and_heals_the_checkpoint_before(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    ring, checkpoints = Ring(100, rows=10), Checkpoints(tmp_path)
    save(checkpoints, 1, ring)
    before = Ring(100, rows=10)
    damage(segment(tmp_path, 4, 8))
    ring.add(2)
    save(checkpoints, 2, ring)
    assert f"{segment(tmp_path, 4, 8)} is gone or cut: its rows are written again" in caplog.text
    assert segments(tmp_path) == names((0, 4), (4, 8), (8, 10), (10, 12))
    assert_holds(tmp_path, 2, ring)
    shutil.rmtree(tmp_path / "step-000000000002")
    assert_holds(tmp_path, 1, before)


@pytest.mark.usefixtures("small_segments")
def test_only_what_still_lives_is_written_again(tmp_path: Path) -> None:
    """Rows 0 … 5 are overwritten: of the first segment nothing is needed, of the second a half."""
    ring, checkpoints = Ring(10, rows=10), Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1, ring)
    for start, stop in ((0, 4), (4, 8)):
        segment(tmp_path, start, stop).unlink()
    ring.add(6)
    save(checkpoints, 2, ring)
    assert segments(tmp_path) == names((6, 8), (8, 10), (10, 14), (14, 16))
    assert_holds(tmp_path, 2, ring)


@pytest.mark.usefixtures("small_segments")
def test_a_flipped_bit_in_a_shared_segment_leaves_the_offer_to_go_on_without_its_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ring, checkpoints = Ring(100, rows=10), Checkpoints(tmp_path)
    save(checkpoints, 1, ring)
    ring.add(2)
    save(checkpoints, 2, ring)
    flip(segment(tmp_path, 4, 8))
    told = r"4 of 12 rows of the replay are lost; .*4 of 10 rows .*--without-lost-rows .*without_lost_rows=True"
    with pytest.raises(LostRows, match=told) as refused:
        Checkpoints(tmp_path).load()
    assert "\n" not in str(refused.value) and "start again" not in str(refused.value)
    checkpoints = Checkpoints(tmp_path)
    loaded = checkpoints.load(without_lost_rows=True)
    assert loaded is not None and loaded.step == 2
    assert "step-000000000002 is used WITHOUT all its rows" in caplog.text and "4 of 12 rows" in caplog.text
    back = Ring(100)
    back.rows_written = loaded.state["rows"]
    checkpoints.restore_logs(loaded, {"replay": back})
    assert torch.equal(back.block[4:8], torch.full((4, WIDTH), -1.0))
    assert torch.equal(back.block[:4], ring.block[:4]) and torch.equal(back.block[8:], ring.block[8:])
    # The next save does not count on the damaged segment, although it is there and of the right size.
    checkpoints.save(3, run_state(3, back), {"replay": back})
    assert_holds(tmp_path, 3, back)


@pytest.mark.usefixtures("small_segments")
def test_a_sound_older_checkpoint_goes_before_one_without_its_rows(tmp_path: Path) -> None:
    ring, checkpoints = Ring(100, rows=8), Checkpoints(tmp_path)
    save(checkpoints, 1, ring)
    ring.add(4)
    save(checkpoints, 2, ring)
    flip(segment(tmp_path, 8, 12))
    loaded = Checkpoints(tmp_path).load(without_lost_rows=True)
    assert loaded is not None and loaded.step == 1 and not loaded.lost


def test_a_damaged_state_is_not_offered(tmp_path: Path) -> None:
    ring, checkpoints = Ring(100, rows=8), Checkpoints(tmp_path)
    path = save(checkpoints, 1, ring)
    segment(tmp_path, 0, 8).unlink()
    (path / "state.json").write_text("{}")
    with pytest.raises(RloptError, match="start again in a new run_dir") as refused:
        Checkpoints(tmp_path).load(without_lost_rows=True)
    assert not isinstance(refused.value, LostRows)


# Whole runs

EVERY = {"minutes": None, "every_steps": 80}


def damaged_run(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of 120 steps, saved in segments of a few rows, of which one that both checkpoints need is damaged."""
    monkeypatch.setattr(checkpoint, "SEGMENT_BYTES", 1 << 10)
    run_to_end(begin(config(case, tmp_path / "run", total_steps=120)))
    folder = tmp_path / "run/checkpoints"
    shared = set[tuple[str, str]].intersection(*(read_manifest(p).segment_names() for p in folder.glob("step-*")))
    flip(folder / "segments/replay" / max(name for log, name in shared if log == "replay"))
    return tmp_path / "run"


CASES = ["sac", *(case for case in RESUMED if case.startswith("buffer-")), "single-frames", "three-runs-side-by-side"]


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_without_lost_rows(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """None of the lost slots is drawn again before it is written again, whatever samples."""
    run = damaged_run(tmp_path, case, monkeypatch)
    with pytest.raises(LostRows, match="rows of the replay are lost"):
        resume(run, {"total_steps": 150})
    with caplog.at_level(logging.WARNING):
        trainer = resume(run, {"total_steps": 150}, without_lost_rows=True)
    assert "is used WITHOUT all its rows" in caplog.text
    buffer = trainer.loop.buffer  # type: ignore[attr-defined]
    held = buffer.block[: len(buffer) // buffer.num_envs, :, buffer.slices["valid"]].squeeze(-1)
    assert 0 < int((held == 0).sum()) == buffer.forgotten + (held.numel() - buffer.transitions - buffer.forgotten)
    drawn: list[torch.Tensor] = []
    update_priority = buffer.update_priority

    def watched(index: torch.Tensor, priority: torch.Tensor | None) -> None:
        drawn.append(buffer.block.view(-1, buffer.layout.width)[index][:, buffer.slices["valid"]])
        update_priority(index, priority)

    monkeypatch.setattr(buffer, "update_priority", watched)
    assert run_to_end(trainer).step == 150
    assert drawn and bool((torch.cat(drawn) == 1.0).all())
    assert run_to_end(resume(run, {"total_steps": 160})).step == 160, "what it saved is whole again"


def test_the_command_line_offers_it_and_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = damaged_run(tmp_path, "sac", monkeypatch)
    assert main(["train", f"resume={run}", "total_steps=140"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "resume with --without-lost-rows" in said
    assert main(["train", f"resume={run}", "total_steps=140", "--without-lost-rows"]) == 0


def test_less_than_a_minibatch_is_not_gone_on_with(tmp_path: Path) -> None:
    run_to_end(begin(config("sac", tmp_path / "run", total_steps=60)))
    for file in (tmp_path / "run/checkpoints/segments/replay").iterdir():
        file.unlink()
    with pytest.raises(RloptError, match="only 0 transitions are left of the replay buffer"):
        resume(tmp_path / "run", {"total_steps": 80}, without_lost_rows=True)


def test_a_running_training_writes_again_what_was_deleted_under_it(tmp_path: Path) -> None:
    """All segments are deleted between two saves; the run that ends so is resumed as if nothing had been."""
    from rlopt.training.trainer import Callback

    folder = tmp_path / "run/checkpoints/segments"

    class Vandal(Callback):
        def on_checkpoint(self, trainer, path):  # type: ignore[no-untyped-def]
            if trainer.loop.step < 100:
                shutil.rmtree(folder)

    run_to_end(begin(config("sac", tmp_path / "run", total_steps=110, checkpoint=EVERY), callbacks=[Vandal()]))
    manifest = read_manifest(tmp_path / "run/checkpoints/step-000000000110")
    assert [(s.start, s.stop) for s in manifest.logs["replay"].segments] == [(0, 80), (80, 110)]
    run_to_end(begin(config("sac", tmp_path / "straight", total_steps=110, checkpoint=EVERY)))
    trainers = [resume(tmp_path / name, {"total_steps": 115}) for name in ("run", "straight")]
    rows = [trainer.loop.buffer.read_rows(0, 110)["block"] for trainer in trainers]  # type: ignore[attr-defined]
    assert torch.equal(*rows)
    for trainer in trainers:
        trainer.close()
