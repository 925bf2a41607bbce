"""No way out of a run loses what it had: an error, a folder that is moved away, a damaged table, a checkpoint that does
not fit."""

from __future__ import annotations

import csv
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from rlopt import state as state_module
from rlopt.cli import main
from rlopt.files import digest_file
from rlopt.runs.checkpoint import CheckpointFailed, Checkpoints
from rlopt.runs.csv_table import CsvTable
from rlopt.runs.manifest import read_manifest
from rlopt.state import MAX_JSON_BYTES, load_state, save_state, states_equal
from rlopt.training import train_config
from rlopt.training.evaluate import evaluate_path
from rlopt.training.setup import begin, resume
from rlopt.training.trainer import Callback, Trainer
from rlopt.types import RloptError
from tests.training.test_checkpoint_damage import rewrite_manifest
from tests.training.test_resume import config, final_state, run_to_end, table

pytestmark = pytest.mark.usefixtures("without_curves")
TABLES = ("metrics.csv", "episodes.csv", "evaluations.csv")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 150 steps that met nothing."""
    run = tmp_path_factory.mktemp("straight") / "run"
    run_to_end(begin(config("sac", run)))
    return run


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first 100 steps, saved at 65 and 100."""
    run = tmp_path_factory.mktemp("half") / "run"
    run_to_end(begin(config("sac", run, total_steps=100)))
    return run


@pytest.fixture
def run(half: Path, tmp_path: Path) -> Path:
    return shutil.copytree(half, tmp_path / "run")


def assert_equal(run: Path, straight: Path) -> None:
    a, b = (final_state(folder, "sac") for folder in (run, straight))
    assert a[0] == b[0] and states_equal(list(a[1:]), list(b[1:])) is None
    for name in TABLES:
        assert table(run / name) == table(straight / name), name


# Errors


class Failing(Callback):
    """Fails in one hook, once past a step."""

    def __init__(self, hook: str, at: int) -> None:
        self.hook, self.at = hook, at

    def fail(self, hook: str, trainer: Trainer) -> None:
        if hook == self.hook and trainer.loop.step >= self.at:
            raise ValueError(f"{hook} failed")

    def on_start(self, trainer: Trainer) -> None:
        self.fail("on_start", trainer)

    def on_step(self, trainer: Trainer, progress: Any) -> None:
        self.fail("on_step", trainer)

    def on_evaluation(self, trainer: Trainer, episodes: Any) -> None:
        self.fail("on_evaluation", trainer)

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        self.fail("on_checkpoint", trainer)

    def on_end(self, trainer: Trainer, result: Any) -> None:
        self.fail("on_end", trainer)


@pytest.mark.parametrize(
    ("hook", "at", "saved"),
    [
        ("on_step", 90, 90), ("on_step", 100, 100), ("on_step", 150, 150), ("on_end", 150, 150),
        ("on_evaluation", 60, 100), ("on_checkpoint", 60, 65), ("on_start", 0, 0),
    ],
)  # fmt: skip
def test_an_error_in_a_callback_is_raised_once_the_run_is_saved(
    tmp_path: Path, straight: Path, hook: str, at: int, saved: int
) -> None:
    """Resumed, the run is the one that met no error, rows that were due at that very step included. Every other
    callback is told what it would be told without that error."""
    told: list[str] = []

    class Listening(Callback):
        def on_start(self, trainer: Trainer) -> None:
            told.append("on_start")

        def on_end(self, trainer: Trainer, result: Any) -> None:
            told.append("on_end")

    trainer = begin(config("sac", tmp_path / "run"), callbacks=[Failing(hook, at), Listening()])
    with pytest.raises(ValueError, match=f"{hook} failed"):
        run_to_end(trainer)
    assert told == ["on_start"] + ["on_end"] * (hook == "on_end")
    assert Checkpoints(tmp_path / "run/checkpoints").load().step == saved  # type: ignore[union-attr]
    assert (tmp_path / "run/policy/policy.json").is_file()
    run_to_end(resume(tmp_path / "run", {}))
    assert_equal(tmp_path / "run", straight)


class Breaking(gymnasium.Env[Any, Any]):
    """Fails at its 75th step, in training or in evaluation, while a file is there."""

    def __init__(self, flag: str, evaluation: bool = False) -> None:
        self.observation_space, self.action_space = spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (1,))
        self.flag, self.evaluation, self.steps = flag, evaluation, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        if os.path.exists(self.flag) and self.steps == (20 if self.evaluation else 75):
            raise ZeroDivisionError("a bug")
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), 1.0, self.steps % 20 == 0, False, {}


@pytest.mark.parametrize(("backend", "kind"), [("sync", ZeroDivisionError), ("async", RloptError)])
def test_an_error_in_the_environment_is_raised_once_the_run_is_saved(
    tmp_path: Path, backend: str, kind: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    flag = tmp_path / "broken"
    flag.touch()
    env = {"id": f"{__name__}:Breaking-v0", "backend": backend, "kwargs": {"flag": str(flag)}, "wrappers": []}
    made = train_config(
        {
            "total_steps": 120,
            "num_envs": 1,
            "device": "cpu",
            "run_dir": str(tmp_path / "run"),
            "env": env,
            "agent": {"name": "sac", "network": {"hidden": [8]}, "batch_size": 4, "warmup_steps": 10, "fused": False},
            "eval": {"every": None, "episodes": 1},
            "log": {"every": 25, "tensorboard": False},
            "checkpoint": {"minutes": None, "every_steps": 40},
        }
    )
    with pytest.raises(kind, match="a bug"):
        run_to_end(begin(made))
    assert "the run was saved at step 74, where this error ends it" in caplog.text
    flag.unlink()
    trainer = resume(tmp_path / "run", {})
    assert trainer.loop.step == 74 and "new episodes begin here" in caplog.text
    assert run_to_end(trainer).step == 120


gymnasium.register("Breaking-v0", entry_point=Breaking)


def test_an_error_in_an_evaluation_leaves_it_to_the_resumed_run(tmp_path: Path, straight: Path) -> None:
    trainer = begin(config("sac", tmp_path / "run"))
    evaluate, calls = trainer.loop.evaluate, []

    def broken(episodes: int) -> Any:
        calls.append(trainer.loop.step)
        if len(calls) == 3:
            raise ZeroDivisionError("a bug")
        return evaluate(episodes)

    trainer.loop.evaluate = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        run_to_end(trainer)
    assert calls == [0, 50, 100]
    run_to_end(resume(tmp_path / "run", {}))
    assert_equal(tmp_path / "run", straight)


# A folder that is moved away


def gone(action: Callable[[Path], object], at: int = 70) -> Callback:
    class Gone(Callback):
        def on_step(self, trainer: Trainer, progress: Any) -> None:
            if trainer.loop.step == at:
                action(trainer.folder.path)

    return Gone()


def replace(path: Path) -> None:
    """Another run takes its place."""
    path.rename(path.with_name("moved"))
    run_to_end(begin(config("sac", path, total_steps=30)))


@pytest.mark.parametrize("action", [shutil.rmtree, lambda path: path.rename(path.with_name("moved")), replace])
def test_a_run_whose_folder_is_removed_or_renamed_is_not_finished(
    tmp_path: Path, straight: Path, action: Callable[[Path], object]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(RloptError, match=rf"{run} was removed or renamed while its run was going on.* resume= and its"):
        run_to_end(begin(config("sac", run), callbacks=[gone(action)]))
    if action is replace:
        assert len(table(run / "metrics.csv")) == 2 and Checkpoints(run / "checkpoints").load().step == 30  # type: ignore[union-attr]
    else:
        assert not run.exists()
    if (tmp_path / "moved").exists():
        run_to_end(resume(tmp_path / "moved", {}))
        assert_equal(tmp_path / "moved", straight)


def test_the_command_ends_with_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, words = tmp_path / "run", ["env=Pendulum-v1", "agent.fused=false", "agent.network.hidden=[8]"]
    train, took = Trainer.run, []

    def vandalised(self: Trainer) -> Any:
        self.callbacks.append(gone(lambda path: took.append(path.rename(tmp_path / "moved")), at=5))
        return train(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run", vandalised)
        assert main(["train", *words, "total_steps=10", "eval.episodes=1", f"run_dir={run}"]) == 2
    said = capsys.readouterr()
    assert took and "was removed or renamed" in said.err and "finished" not in said.out


def test_what_is_deleted_inside_the_folder_is_written_again(
    tmp_path: Path, straight: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``rm -rf RUN/*`` in the middle."""

    def clear(path: Path) -> None:
        for child in path.iterdir():
            if not child.name.startswith("."):
                shutil.rmtree(child) if child.is_dir() else child.unlink()

    run = tmp_path / "run"
    run_to_end(begin(config("sac", run), callbacks=[gone(clear)]))
    assert caplog.text.count("was removed or replaced by another program; it is written again") == len(TABLES)
    assert "config.yaml was removed; it is written again" in caplog.text
    assert_equal(run, straight)
    resume(run, {}).close()


def test_a_table_that_an_editor_replaced_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = CsvTable(path, ("step",))
    rows.append({"step": 1})
    rows.flush()
    (tmp_path / "edited").write_text("step\n9\n")
    os.replace(tmp_path / "edited", path)
    rows.append({"step": 2, "new": 3})
    rows.close()
    assert path.read_text() == "step,new\n1,\n2,3\n"


# Damaged tables


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.write_bytes(data)


def quote(path: Path) -> None:
    text = path.read_text()
    middle = text.index("\n") + 3
    path.write_text(text[:middle] + '"' + text[middle:])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flip": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": Path.unlink,
    "a stray quote": quote,
    "a lost line": lambda path: path.write_text("".join(path.read_text().splitlines(True)[:-1])),
    "another header": lambda path: path.write_text(path.read_text().replace("step", "stop", 1)),
    "a long field": lambda path: path.write_text(path.read_text() + '1,"' + "x" * 200_000 + '"\n'),
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [*(("episodes.csv", damage) for damage in DAMAGES), ("metrics.csv", "flip"), ("evaluations.csv", "deleted")],
)
def test_a_damaged_table_is_told_and_kept(
    run: Path, straight: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = table(run / name)
    DAMAGES[damage](run / name)
    found = (run / name).read_bytes() if (run / name).exists() else None
    with caplog.at_level(logging.WARNING):
        run_to_end(resume(run, {"total_steps": 150}))
    told = [
        m for m in caplog.messages if f"{run / name} is damaged or was changed since the run was saved at step" in m
    ]
    if damage == "a long field":
        assert not told, "the rows that were saved are all there"
        assert table(run / name) == table(straight / name)
        return
    assert len(told) == 1 and f"of its {len(before)} rows" in told[0]
    if found is None:
        assert not (run / f"damaged-{name}").exists()
    else:
        assert (run / f"damaged-{name}").read_bytes() == found and f"is damaged-{name}" in told[0]
    assert table(run / name)[-1] == table(straight / name)[-1], "new rows are written as ever"
    for other in TABLES:
        if other != name:
            assert table(run / other) == table(straight / other)
    caplog.clear()
    resume(run, {"total_steps": 160}).close()
    assert "damaged" not in caplog.text, "told once"


def test_rows_that_are_there_twice_are_dropped(run: Path, straight: Path) -> None:
    """A block that was written twice: the rows of before the checkpoint are known."""
    for name in TABLES:
        lines = (run / name).read_text().splitlines(True)
        torn = [lines[-1][:8], "\n"] if name == "metrics.csv" else []  # the same in the middle of a line
        (run / name).write_text("".join([*lines[:-1], *torn, lines[-1], *lines[-2:]]))
    run_to_end(resume(run, {"total_steps": 150}))
    assert_equal(run, straight)


def test_a_newest_checkpoint_that_is_gone_is_told(run: Path, straight: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(run / "checkpoints/step-000000000100")
    run_to_end(resume(run, {"total_steps": 150}))
    assert "was saved at step 100, but that checkpoint is gone: the run goes on from step 65" in caplog.text
    assert_equal(run, straight)


def test_a_run_without_its_configuration_is_told_when_it_is_evaluated(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "config.yaml").unlink()
    evaluate_path(run, 1)
    assert f"{run} has no config.yaml: what its policy says of itself is used" in caplog.text
    caplog.clear()
    evaluate_path(run / "policy", 1)
    assert not caplog.messages


def test_a_sound_run_is_told_nothing(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    for total in (101, 150):
        run_to_end(resume(run, {"total_steps": total}))
    assert not [m for m in caplog.messages if "damaged" in m] and not list(run.glob("damaged-*"))


def test_tables_of_an_older_checkpoint_are_compared_as_they_were_then(
    run: Path, straight: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The newest is damaged, so that rows after step 65, with columns that came later, are dropped."""
    (run / "checkpoints/step-000000000100/state.json").write_text("{}")
    run_to_end(resume(run, {"total_steps": 150}))
    assert "step 65 is used instead" in caplog.text and "since the run was saved" not in caplog.text
    assert_equal(run, straight)


# Checkpoints that do not fit


def forge(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a checkpoint's state, and make every checksum agree."""
    state = load_state(path)
    change(state)
    digests = {name: digest._asdict() for name, digest in save_state(path, state).items()}
    rewrite_manifest(path, lambda content: content["files"].update(digests))


def put(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


MISFITS = [
    put("loop", "step", value=None),
    put("loop", "step", value=99),
    put("loop", "step", value=10**15),
    put("loop", value=[]),
    put("loop", "agent", value={}),
    put("loop", "buffer", "rows_written", value="many"),
    put("loop", "buffer", "rows_written", value=99),
    put("loop", "counter", value=None),
    put("loop", "env", value={"id": 3}),
    put("window", "returns", value=[None]),
    put("best", value="good"),
    put("last_evaluation", value=[[1]]),
]


@pytest.mark.parametrize("change", MISFITS)
def test_a_checkpoint_that_does_not_fit_falls_back_like_a_damaged_one(
    run: Path, straight: Path, change: Callable[[dict[str, Any]], None], caplog: pytest.LogCaptureFixture
) -> None:
    newest = run / "checkpoints/step-000000000100"
    forge(newest, change)
    trainer = resume(run, {"total_steps": 150})
    refused = [m for m in caplog.messages if "checkpoint step-000000000100 is refused" in m]
    assert len(refused) == 1 and "does not fit this run" in refused[0] and "step 65 is used instead" in refused[0]
    assert "\n" not in refused[0] and newest.with_name("damaged-step-000000000100").is_dir()
    if change is MISFITS[0]:
        run_to_end(trainer)
        assert_equal(run, straight)
    trainer.close()


def test_where_none_fits_all_stay_where_they_are(run: Path) -> None:
    for path in (run / "checkpoints").glob("step-*"):
        forge(path, put("loop", "agent", value={}))
    with pytest.raises(RloptError, match=r"no checkpoint in .* is sound: .*00100 does not fit .*00065 does not fit"):
        resume(run, {"total_steps": 150})
    assert len(list((run / "checkpoints").glob("step-*"))) == 2


def test_a_huge_structure_is_not_read(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its objects would take some 25 times the file's size."""
    newest = run / "checkpoints/step-000000000100"
    with open(newest / "state.json", "ab") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    digest = digest_file(newest / "state.json")._asdict()
    rewrite_manifest(newest, lambda content: content["files"].update({"state.json": digest}))
    resume(run, {"total_steps": 150}).close()
    assert f"more than the {MAX_JSON_BYTES} that are read; step 65 is used instead" in caplog.text


def test_a_structure_that_would_not_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": 1}, {})
    with monkeypatch.context() as patch:
        patch.setattr(state_module, "MAX_JSON_BYTES", 100)
        with pytest.raises(CheckpointFailed, match=r"would have 1002 bytes, more than 100; .*; make num_envs smaller$"):
            checkpoints.save(2, {"x": "y" * 994}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000001"]
    assert read_manifest(tmp_path / "step-000000000001").step == 1


def test_rows_are_counted_as_they_are_written(tmp_path: Path) -> None:
    """The mark of a table is that of its rows, whatever columns come later, and a table read anew has it too."""
    rows = CsvTable(tmp_path / "t.csv", ("step", "x"))
    rows.append({"step": 1, "x": 0.5})
    first = rows.mark
    rows.append({"step": 2, "x": None, "later": 3})
    rows.close()
    again = CsvTable(tmp_path / "t.csv", ("step", "x"))
    assert again.mark == rows.mark != first
    again.truncate_after(1)
    assert again.mark == first
    again.close()
    with (tmp_path / "t.csv").open() as file:
        assert list(csv.reader(file)) == [["step", "x"], ["1", "0.5"]]
