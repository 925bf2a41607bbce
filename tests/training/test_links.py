"""No write under a run folder follows a link or leaves the folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlopt.analysis.tables import read_csv
from rlopt.files import replace_file, replace_folder, write_file
from rlopt.policy import load_policy, save_policy
from rlopt.runs.checkpoint import Checkpoints
from rlopt.runs.csv_table import CsvTable
from rlopt.runs.lock import Lock
from rlopt.runs.run_folder import RunFolder
from rlopt.training.setup import begin, resume
from rlopt.types import RloptError
from tests.test_policy_files import policy
from tests.training.saved_runs import Ring, save
from tests.training.test_resume import config, run_to_end

pytestmark = pytest.mark.skipif(os.name == "nt", reason="making a link takes a right of its own on Windows")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    run_to_end(begin(config("sac", run, total_steps=50)))
    return run


def tree(folder: Path) -> dict[str, bytes | str]:
    """Everything in a folder, by name."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else "" if path.is_dir() else path.read_bytes()
    return found


SEGMENTS = "checkpoints/segments/replay"


@pytest.mark.parametrize(
    "name",
    [
        ".lock", ".metrics.csv.tmp", "metrics.csv", "config.yaml", ".config.yaml.tmp", "curve.png", ".curve.tmp.png",
        ".policy.new", "policy/.x", "policy", "policy_best", "tensorboard", "checkpoints", "checkpoints/best",
        "checkpoints/.step-000000000080.tmp", "checkpoints/segments", SEGMENTS, f"{SEGMENTS}/000000000050-x",
    ],
)  # fmt: skip
def test_a_run_that_holds_a_link_is_not_resumed_and_what_it_leads_to_stays(
    finished: Path, tmp_path: Path, name: str
) -> None:
    """A linked folder holds a whole copy of what it stands for: another run's."""
    run, other = shutil.copytree(finished, tmp_path / "run"), tmp_path / "other"
    link = run / name
    if link.is_dir():
        shutil.move(link, other)
    else:
        other.write_bytes(link.read_bytes() if link.exists() else b"precious")
        link.unlink(missing_ok=True)
    link.symlink_to(other)
    before = tree(tmp_path)
    with pytest.raises(RloptError, match=rf"{link} is a link \(to {other}\), .*; remove it( or .*)?$"):
        resume(run, {"total_steps": 80})
    assert tree(tmp_path) == before


def test_pipes_and_second_names_are_refused_too(finished: Path, tmp_path: Path) -> None:
    run, precious = shutil.copytree(finished, tmp_path / "run"), tmp_path / "precious"
    os.mkfifo(run / "episodes.csv.x")
    with pytest.raises(RloptError, match=r"episodes\.csv\.x is no plain file"):
        resume(run, {})
    (run / "episodes.csv.x").unlink()
    precious.write_text("precious")
    (run / ".lock").unlink()
    os.link(precious, run / ".lock")
    with pytest.raises(RloptError, match="a plain file with one name is wanted there; remove it"):
        resume(run, {})
    assert precious.read_text() == "precious"


def test_a_new_run_begins_in_no_folder_with_links(tmp_path: Path) -> None:
    (tmp_path / "policy").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RloptError, match="is a link"):
        RunFolder.create(tmp_path, {"seed": 0})
    assert os.listdir(tmp_path) == ["policy"]


def test_a_run_folder_may_itself_be_reached_by_a_link(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "latest").symlink_to(run)
    assert run_to_end(resume(tmp_path / "latest", {"total_steps": 60})).step == 60
    assert (tmp_path / "latest").is_symlink() and read_csv(run / "metrics.csv")["step"][-1] == 60


# Each way of writing, by itself


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "file").write_text("precious")
    return folder


def write_a_table(path: Path) -> None:
    table = CsvTable(path, ("step",))
    table.append({"step": 1, "new": 2})
    table.close()


WAYS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "file": ("a", lambda path: write_file(path, [b"new"])),
    "replaced": ("a", lambda path: replace_file(path, b"new")),
    "staged": (".a.tmp", lambda path: replace_file(path.with_name("a"), b"new")),
    "table": ("a", write_a_table),
    "staged table": (".a.tmp", lambda path: write_a_table(path.with_name("a"))),
    "policy": ("p", lambda path: save_policy(policy(), path)),
    "staged policy": (".p.new", lambda path: save_policy(policy(), path.with_name("p"))),
    "old policy": (".p.old", lambda path: save_policy(policy(), path.with_name("p"))),
}


@pytest.mark.parametrize("leads_to", ["file", "folder", "nothing"])
@pytest.mark.parametrize("way", WAYS)
def test_a_link_where_something_is_written_is_replaced_or_refused(
    tmp_path: Path, precious: Path, way: str, leads_to: str
) -> None:
    name, write = WAYS[way]
    target = precious / {"file": "file", "folder": "", "nothing": "missing"}[leads_to]
    (tmp_path / name).symlink_to(target)
    try:
        write(tmp_path / name)
    except (OSError, RloptError):
        assert leads_to != "nothing", "the name was free"
    assert tree(precious) == {"file": b"precious"}


def test_a_folder_takes_the_place_of_a_link_to_one(tmp_path: Path, precious: Path) -> None:
    (tmp_path / "p").symlink_to(precious)
    (tmp_path / "staged").mkdir()
    replace_folder(tmp_path / "staged", tmp_path / "p")
    assert (tmp_path / "p").is_dir() and not (tmp_path / "p").is_symlink()
    assert tree(precious) == {"file": b"precious"} and sorted(os.listdir(tmp_path)) == ["p", "precious"]


def test_a_lock_is_no_link(tmp_path: Path, precious: Path) -> None:
    (tmp_path / ".lock").symlink_to(precious / "file")
    with pytest.raises(OSError):
        Lock(tmp_path)
    assert tree(precious) == {"file": b"precious"}


def test_a_segment_takes_no_name_of_a_link(tmp_path: Path) -> None:
    ring, checkpoints = Ring(10, rows=4), Checkpoints(tmp_path / "checkpoints")
    save(checkpoints, 1, ring)
    ring.add(2)
    link = tmp_path / SEGMENTS / "000000000004-000000000006.safetensors"
    link.symlink_to(tmp_path / "missing")
    save(checkpoints, 2, ring)
    assert not (tmp_path / "missing").exists()
    with pytest.raises(RloptError, match="is a link"):
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / "missing")
        Checkpoints(tmp_path / "checkpoints")


def test_a_policy_of_a_loaded_link_is_read(tmp_path: Path) -> None:
    """Caches of model hubs are made of links; reading writes nothing."""
    save_policy(policy(), tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert load_policy(tmp_path / "snapshot").spec.id == "Test-v0"
