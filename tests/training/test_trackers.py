"""Trackers: what reaches them, that a resume goes on in the same run and sends nothing twice, and that none stops a
training. Those that are installed are tried for real, without a network."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rlopt.loops import configuration
from rlopt.runs import trackers
from rlopt.runs.logging import Logger
from rlopt.runs.run_folder import RunFolder
from rlopt.runs.trackers import TRACKERS, Session
from rlopt.training import begin, resume, train_config
from rlopt.types import Episode, RloptError

CONFIG = {"seed": 0, "agent": {"name": "sac"}, "env": {"id": "Pendulum-v1"}}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunFolder]:
    monkeypatch.chdir(tmp_path)
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:
        yield folder


class Recorder:
    """Keeps what it is given, by the run's id."""

    rows: list[tuple[str, int, dict[str, float]]] = []
    pictures: list[tuple[int, str]] = []
    sessions: list[Session] = []
    fails_in = ""

    def __init__(self, session: Session) -> None:
        self.sessions.append(session)
        self._may_fail("init")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._may_fail("log")
        self.rows.append((self.sessions[-1].id, step, dict(values)))

    def picture(self, step: int, name: str, path: Path) -> None:
        assert path.read_bytes().startswith(b"\x89PNG")
        self.pictures.append((step, name))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._may_fail("finish")

    def _may_fail(self, where: str) -> None:
        if self.fails_in == where:
            raise RuntimeError("the server\nis gone")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    class Fresh(Recorder):
        rows, pictures, sessions = [], [], []

    monkeypatch.setitem(TRACKERS, "wandb", Fresh)
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    return Fresh


def write(logger: Logger, *steps: int) -> None:
    for step in steps:
        logger.episodes(step, [Episode(float(step), 10)])
        logger.metrics(step, {"steps_per_second": 50.0, "critic_loss": step / 4})
        if step % 2 == 0:
            logger.evaluation(step, [Episode(step / 2, 10)])


def killed_at_4_and_resumed_from_3(run: RunFolder, name: str) -> None:
    logger = Logger(run, False, resume_step=0, trackers=[name])
    write(logger, 1, 2, 3, 4)
    logger.close()
    logger = Logger(run, False, resume_step=3, trackers=[name])
    write(logger, 4, 5, 6)
    logger.close()


def test_the_words_are_those_of_the_configuration() -> None:
    assert tuple(TRACKERS) == configuration.TRACKERS
    with pytest.raises(RloptError, match=r"log\.to"):
        train_config({"log": {"to": ["wandbb"]}})


def test_a_resume_goes_on_in_the_same_run_and_sends_nothing_twice(run: RunFolder, recorder: type[Recorder]) -> None:
    killed_at_4_and_resumed_from_3(run, "wandb")
    first, second = recorder.sessions
    assert first.id == second.id == json.loads((run.path / "trackers.json").read_text())["wandb"]
    assert first.new and not second.new and first.config["agent"] == {"name": "sac"}
    assert [step for _, step, row in recorder.rows if "train/critic_loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [step for _, step, row in recorder.rows if "eval/mean_reward" in row] == [2, 4, 6]
    assert recorder.rows[-2][2]["rollout/ep_rew_mean"] == 3.5


def test_what_a_kill_took_from_wandb_is_sent_again_and_no_more(run: RunFolder, recorder: type[Recorder]) -> None:
    """It was closed at 2, and killed at 5 with what it had been given since; the checkpoint is that of 4."""
    logger = Logger(run, False, resume_step=0, trackers=["wandb"])
    write(logger, 1, 2)
    logger.close()
    logger = Logger(run, False, resume_step=2, trackers=["wandb"])
    write(logger, 3, 4, 5)
    logger.flush()  # and killed
    sent, recorder.rows = recorder.rows, []
    logger = Logger(run, False, resume_step=4, trackers=["wandb"])
    write(logger, 5, 6)
    logger.close()
    assert [(step, "eval/mean_reward" in row) for _, step, row in recorder.rows] == [
        (3, False), (4, False), (4, True), (5, False), (6, False), (6, True),
    ]  # fmt: skip
    again, before = {}, {}
    for rows, found in ((sent, before), (recorder.rows, again)):
        for _, step, row in rows:
            found.setdefault(step, {}).update(row)
    assert [again[step] for step in (3, 4, 5)] == [before[step] for step in (3, 4, 5)]
    recorder.rows = []
    Logger(run, False, resume_step=6, trackers=["wandb"]).close()
    assert not recorder.rows, "it was closed with all of it"


def test_a_tracker_added_by_a_resume_gets_all_from_there(run: RunFolder, recorder: type[Recorder]) -> None:
    logger = Logger(run, False)
    write(logger, 1, 2, 3, 4)
    logger.close()
    logger = Logger(run, False, resume_step=2, trackers=["wandb"])
    write(logger, 3)
    logger.close()
    assert [step for _, step, _ in recorder.rows] == [3]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_told_once_and_training_goes_on(
    tmp_path: Path, recorder: type[Recorder], where: str, caplog: pytest.LogCaptureFixture, without_curves: Any
) -> None:
    recorder.fails_in = where
    options = {
        "total_steps": 40, "device": "cpu", "run_dir": str(tmp_path / "run"), "buffer": {"capacity": 100},
        "agent": {"name": "sac", "network": {"hidden": [8]}, "batch_size": 4, "warmup_steps": 10},
        "eval": {"every": 20, "episodes": 1, "max_steps": 5},
        "log": {"every": 10, "tensorboard": False, "to": ["wandb"]},
    }  # fmt: skip
    with begin(train_config(options)) as trainer:
        assert trainer.run().status == "finished"
    with resume(tmp_path / "run", {"total_steps": 50}) as trainer:
        assert trainer.run().status == "finished"
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "wandb" in r.getMessage()]
    assert told == ["wandb failed (the server is gone): it is given up, the tables and the run go on"] * 2


def test_the_curve_is_shown(run: RunFolder, recorder: type[Recorder]) -> None:
    run.curve.write_bytes(b"\x89PNG")
    logger = Logger(run, False, trackers=["wandb"])
    logger.picture(3, "curve", run.curve)
    logger.close()
    assert recorder.pictures == [(3, "curve")]


def test_a_missing_tracker_is_one_line_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    config = train_config({"run_dir": str(tmp_path / "run"), "log": {"to": ["mlflow"]}})
    with pytest.raises(RloptError, match=r'log\.to=mlflow needs mlflow; install it .*"\.\[mlflow\]"'):
        begin(config)
    assert not (tmp_path / "run").exists()


def test_ids_of_strangers_are_not_taken(run: RunFolder, recorder: type[Recorder]) -> None:
    (run.path / "trackers.json").write_text('{"wandb": "../x", "other": "00000000"}')
    logger = Logger(run, False, resume_step=0, trackers=["wandb"])
    write(logger, 1)
    logger.close()
    assert recorder.sessions[0].new and recorder.sessions[0].id != "../x"


def test_mlflow_for_real(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (run.path.parent / "store").as_uri())
    killed_at_4_and_resumed_from_3(run, "mlflow")
    client = MlflowClient()
    experiment = client.get_experiment_by_name("rlopt")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["agent.name"] == "sac"
    rows = client.get_metric_history(found.info.run_id, "train/critic_loss")
    assert [(row.step, row.value) for row in rows] == [(step, step / 4) for step in range(1, 7)]
    assert [row.step for row in client.get_metric_history(found.info.run_id, "eval/mean_reward")] == [2, 4, 6]
    assert [one.path for one in client.list_artifacts(found.info.run_id)] == ["config.yaml"]


def test_wandb_for_real(run: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    killed_at_4_and_resumed_from_3(run, "wandb")
    id = json.loads((run.path / "trackers.json").read_text())["wandb"]
    folders = [path for path in (run.path / "wandb").iterdir() if path.name.startswith("offline-run-")]
    assert len(list(run.path.glob(f"wandb/offline-run-*/run-{id}.wandb"))) == len(folders) >= 1
    data = b"".join(path.read_bytes() for path in run.path.glob("wandb/offline-run-*/*.wandb"))
    assert b"rollout/ep_rew_mean" in data
    assert not [message for message in caplog.messages if "given up" in message]


def test_trackio_for_real(run: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(run.path.parent / "trackio"))
    pytest.importorskip("trackio")
    killed_at_4_and_resumed_from_3(run, "trackio")
    (store,) = (run.path.parent / "trackio").glob("rlopt*.db")
    with sqlite3.connect(store) as base:
        rows = [(name, step, json.loads(values)) for name, step, values in base.execute(
            "select run_name, step, metrics from metrics order by id"
        )]  # fmt: skip
    assert len({name for name, _, _ in rows}) == 1
    assert [step for _, step, values in rows if "train/critic_loss" in values] == [1, 2, 3, 4, 5, 6]
    assert not [message for message in caplog.messages if "given up" in message]
