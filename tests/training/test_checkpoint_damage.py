"""A damaged checkpoint is refused loudly and the one before used; a forged one reaches nothing."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlopt.runs import manifest
from rlopt.runs.checkpoint import Checkpoints, CorruptCheckpoint
from rlopt.state import states_equal
from rlopt.types import RloptError
from tests.training.saved_runs import Ring, assert_holds, names, save, segments


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def hostile(path: Path) -> None:
    class Exploding:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(path.parent.parent / "exploded"),)

    path.write_bytes(pickle.dumps(Exploding()))


DAMAGES = [flip, cut, empty, hostile, Path.unlink]
FILES = ["manifest.json", "state.json", "tensors.safetensors", "segment"]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_is_refused_loudly_and_the_previous_used(
    tmp_path: Path,
    name: str,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ring, checkpoints = Ring(20, rows=6), Checkpoints(tmp_path)
    save(checkpoints, 1, ring)
    old = Ring(20, rows=6)
    ring.add(4)
    newest = save(checkpoints, 2, ring)
    segment = tmp_path / "segments/replay" / (names((6, 10))[0] + ".safetensors")
    damage(segment if name == "segment" else newest / name)
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("loading must not unpickle"))
    monkeypatch.setattr(pickle, "load", lambda *_: pytest.fail("loading must not unpickle"))
    with caplog.at_level(logging.WARNING):
        checkpoints = assert_holds(tmp_path, 1, old)
    assert len(caplog.messages) == 1 and "\n" not in caplog.text.strip()
    assert "step-000000000002 is refused" in caplog.text and "step 1 is used instead" in caplog.text
    assert (segment.name if name == "segment" else name) in caplog.text
    assert (tmp_path / "damaged-step-000000000002").is_dir() and not newest.exists()
    assert not (tmp_path / "exploded").exists()

    old.add(4, offset=0.5)  # another future than the damaged one's, with the same row numbers
    save(checkpoints, 3, old)
    assert_holds(tmp_path, 3, old)
    assert [s[:25] for s in segments(tmp_path)] == names((0, 6), (6, 10))


def test_every_byte_of_a_checkpoint_is_guarded(tmp_path: Path) -> None:
    """A flipped bit anywhere is noticed, or (white space of the manifest) changes nothing."""
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, {"x": torch.arange(3.0), "y": 2}, {})
    for file in sorted(path.iterdir()):
        sound = file.read_bytes()
        for place in range(0, len(sound), 7 if file.name == MANIFEST_NAME else 1):
            file.write_bytes(sound[:place] + bytes([sound[place] ^ 2]) + sound[place + 1 :])
            try:
                loaded = Checkpoints(tmp_path).load()
            except CorruptCheckpoint:
                continue
            assert file.name == MANIFEST_NAME and loaded is not None
            assert states_equal(loaded.state, {"x": torch.arange(3.0), "y": 2}) is None
        file.write_bytes(sound)


MANIFEST_NAME = "manifest.json"


def test_none_sound_is_an_error_that_names_every_reason(tmp_path: Path) -> None:
    ring, checkpoints = Ring(20, rows=6), Checkpoints(tmp_path)
    for step in (1, 2):
        save(checkpoints, step, ring)
    empty(tmp_path / "step-000000000001/state.json")
    (tmp_path / "step-000000000002/manifest.json").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"000002/manifest\.json is missing.*000001/state\.json has 0 bytes"):
        Checkpoints(tmp_path).load()
    assert len(list(tmp_path.glob("step-*"))) == 2


def test_refusal_reaches_stderr_where_no_logging_is_set_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": 1}, {})
    flip(checkpoints.save(2, {"x": 2}, {}) / "state.json")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    checkpoints.load()
    assert "step-000000000002 is refused" in capsys.readouterr().err


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """What a forger would do: change the manifest and make its checksum agree."""
    content = json.loads((path / "manifest.json").read_text())
    change(content)
    content["checksum"] = manifest.checksum(content)
    (path / "manifest.json").write_text(json.dumps(content))


def forge(*keys: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        node: Any = content
        for key in keys[:-1]:
            node = node[key]
        if value is KeyError:
            del node[keys[-1]]
        else:
            node[keys[-1]] = value

    return change


SEGMENT = ("logs", "replay", "segments", 0)


@pytest.mark.parametrize(
    "change",
    [
        forge(*SEGMENT, "file", value="../../../secret"),
        forge(*SEGMENT, "file", value="/etc/passwd"),
        forge(*SEGMENT, "file", value=3),
        forge(*SEGMENT, "start", value=1),
        forge(*SEGMENT, "stop", value=10**15),
        forge(*SEGMENT, "start", value=-5),
        forge(*SEGMENT, "stop", value=True),
        forge(*SEGMENT, "extra", value=1),
        forge("logs", "replay", "segments", value=[]),
        forge("logs", "replay", "rows_written", value=7.5),
        forge("logs", value={"..": {"rows_written": 0, "capacity_rows": 1, "segments": []}}),
        forge("logs", value=[]),
        forge("files", "../secret", value={"bytes": 6, "sha256": ""}),
        forge("files", "state.json", value=KeyError),
        forge("files", "state.json", value=[]),
        forge("files", value=None),
        forge("step", value="1"),
        forge("format", value=0),
        forge("format", value=KeyError),
        forge("kind", value=KeyError),
    ],
)
def test_a_forged_manifest_names_nothing_outside(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    (tmp_path / "secret").write_text("secret")
    path = save(Checkpoints(tmp_path / "checkpoints"), 1, Ring(10, rows=4))
    rewrite_manifest(path, change)
    with pytest.raises(CorruptCheckpoint, match=r"manifest\.json is damaged"):
        Checkpoints(tmp_path / "checkpoints").load()
    assert (tmp_path / "secret").read_text() == "secret"


def test_a_segment_of_other_rows_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = save(checkpoints, 1, Ring(10, rows=4))

    def change(content: dict[str, Any]) -> None:
        content["logs"]["replay"]["rows_written"] = content["logs"]["replay"]["segments"][0]["stop"] = 5

    rewrite_manifest(path, change)
    loaded = checkpoints.load()
    assert loaded is not None
    with pytest.raises(CorruptCheckpoint, match="does not hold the rows it names"):
        checkpoints.restore_logs(loaded, {"replay": Ring(10)})


def test_a_newer_format_is_no_damage(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": 1}, {})
    newest = checkpoints.save(2, {"x": 2}, {})
    rewrite_manifest(newest, forge("format", value=99))
    with pytest.raises(RloptError, match=r"newer rlopt \(format 99, this one reads up to 1\); upgrade rlopt"):
        checkpoints.load()
    assert newest.exists()


def test_older_formats_are_migrated_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": 1}, {})
    monkeypatch.setattr(manifest, "FORMAT", 3)
    with pytest.raises(RloptError, match="format 1, which this rlopt no longer reads"):
        checkpoints.load()
    monkeypatch.setitem(manifest.MIGRATIONS, 1, lambda m, state: {**state, "from_1": m.step})
    monkeypatch.setitem(manifest.MIGRATIONS, 2, lambda m, state: {**state, "from_2": state["from_1"] + 1})
    loaded = checkpoints.load()
    assert loaded is not None and loaded.state == {"x": 1, "from_1": 1, "from_2": 2}
