"""Trackers: what reaches them, that a resume goes on in the same run and sends nothing twice, and that none stops a
training. Those that are installed are tried for real, without a network."""

from __future__ import annotations

import io
import json
import logging
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlopt.analysis.tables import read_csv
from rlopt.loops import configuration
from rlopt.runs import trackers
from rlopt.runs.logging import Logger
from rlopt.runs.run_folder import RunFolder
from rlopt.runs.trackers import TRACKERS, Session
from rlopt.training import begin, resume, train_config, video
from rlopt.training.video import Films, films
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
    films: list[tuple[int, str, str]] = []
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

    def film(self, step: int, name: str, path: Path) -> None:
        assert path.is_file()
        self.films.append((step, name, path.name))

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
        rows, pictures, films, sessions = [], [], [], []

    monkeypatch.setitem(TRACKERS, "wandb", Fresh)
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    return Fresh


def write(logger: Logger, *steps: int) -> None:
    for step in steps:
        logger.episodes(step, [Episode(float(step), 10)])
        logger.metrics(step, {"steps_per_second": 50.0, "critic_loss": step / 4})
        if step % 2 == 0:
            logger.evaluation(step, [Episode(step / 2, 10)])


def killed_at_4_and_resumed_from_3(run: RunFolder, name: str, film: Path | None = None) -> None:
    logger = Logger(run, False, resume_step=0, trackers=[name])
    write(logger, 1, 2, 3, 4)
    logger.close()
    logger = Logger(run, False, resume_step=3, trackers=[name])
    write(logger, 4, 5, 6)
    if film is not None:
        logger.film(6, "eval/video", film)
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


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds, at 50 frames a second."""
    imageio = pytest.importorskip("imageio")
    pytest.importorskip("imageio_ffmpeg")
    path = tmp_path_factory.mktemp("film") / "step-4.mp4"
    with imageio.get_writer(str(path), fps=50, codec="libx264", macro_block_size=2) as writer:
        for i in range(102):
            writer.append_data(np.full((300, 480, 3), i, np.uint8))
    return path


def test_tensorboard_plays_a_film_of_the_same_length(run: RunFolder, film: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = Logger(run)
    logger.film(4, "eval/video", film)
    logger.close()
    events = EventAccumulator(str(run.tensorboard)).Reload()
    (shown,) = events.Images("eval/video")
    assert (shown.step, shown.width, shown.height) == (4, 240, 150)
    gif = Image.open(io.BytesIO(shown.encoded_image_string))
    assert gif.n_frames == 51 and gif.info["duration"] == 40


def test_films_of_evaluations(
    tmp_path: Path, recorder: type[Recorder], without_curves: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are of the first episode, as the table has it, and are shown."""
    pytest.importorskip("imageio_ffmpeg")
    found: list[Episode] = []
    real = video.record_episode
    monkeypatch.setattr(video, "record_episode", lambda *given: found.append(real(*given)))
    options = {
        "env": {"id": "CartPole-v1", "kwargs": {"max_episode_steps": 5}}, "total_steps": 30, "device": "cpu",
        "agent": {"name": "sac_discrete", "network": {"hidden": [8]}, "batch_size": 4, "warmup_steps": 50},
        "buffer": {"capacity": 100}, "eval": {"every": 10, "episodes": 2}, "run_dir": str(tmp_path / "run"),
        "log": {"every": 10, "tensorboard": False, "to": ["wandb"], "video_every": 20},
    }  # fmt: skip
    with begin(train_config(options)) as trainer:
        trainer.run()
    assert recorder.films == [(step, "eval/video", f"step-{step}.mp4") for step in (10, 20, 30)]
    rows = read_csv(tmp_path / "run" / "evaluations.csv")
    firsts = zip(rows["step"], rows["episode"], rows["return"], strict=True)
    assert [e.total_reward for e in found] == [reward for step, episode, reward in firsts if step and episode == 0]


def test_when_a_film_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations every 10 steps to 100, films every 25; the run is killed at 60 and goes on from 40."""
    filmed: list[int] = []
    monkeypatch.setattr(video, "record_episode", lambda policy, make, path, *_: filmed.append(path.name))
    loop = SimpleNamespace(step=0, total_steps=100, policy=lambda: None, evaluation_mode=None)
    trainer = SimpleNamespace(loop=loop, folder=RunFolder(tmp_path), logger=None)
    for start, end in ((0, 60), (40, 100)):
        loop.step = start
        films = Films(25, lambda: None, 0, None)
        films.on_start(trainer)
        for loop.step in range(start + 10, end + 1, 10):
            films.on_evaluation(trainer, [])
    assert filmed == [f"step-{step}.mp4" for step in (10, 30, 50, 50, 80, 100)]


def test_films_that_cannot_be_made_are_refused_before_a_run_and_end_none(
    tmp_path: Path,
    recorder: type[Recorder],
    without_curves: Any,
    film: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {
        "total_steps": 40, "device": "cpu", "run_dir": str(tmp_path / "run"),
        "env": {"id": "CartPole-v1"}, "eval": {"every": 20, "episodes": 1, "max_steps": 5},
        "agent": {"name": "sac_discrete", "network": {"hidden": [8]}, "batch_size": 4, "warmup_steps": 10},
        "log": {"every": 10, "tensorboard": False, "video_every": 1},
    }  # fmt: skip
    undrawn = train_config({**options, "env": {"id": "rlopt.envs.counting:rlopt/Count-v0"}, "agent": {"name": "ppo"}})
    with pytest.raises(RloptError, match=r"log\.video_every: env=rlopt/Count-v0 .* it cannot be drawn"):
        begin(undrawn)
    with pytest.raises(RloptError, match=r"log\.video_every: agent=gigpo_llm has no episodes"):
        films(replace(undrawn, agent=SimpleNamespace(name="gigpo_llm")), SimpleNamespace(evaluator=None))
    assert not (tmp_path / "run").exists()

    def fail(*_: Any) -> None:
        raise RuntimeError("the disk\nis full")

    with begin(train_config(options)) as trainer:
        monkeypatch.setattr(video, "record_episode", fail)
        assert trainer.run().status == "finished"
    told = [record.getMessage() for record in caplog.records if "no film" in record.getMessage()]
    assert told == ["no film at step 20 (the disk is full): there will be none"]


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


def test_mlflow_for_real(run: RunFolder, film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (run.path.parent / "store").as_uri())
    killed_at_4_and_resumed_from_3(run, "mlflow", film)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("rlopt")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["agent.name"] == "sac"
    rows = client.get_metric_history(found.info.run_id, "train/critic_loss")
    assert [(row.step, row.value) for row in rows] == [(step, step / 4) for step in range(1, 7)]
    assert [row.step for row in client.get_metric_history(found.info.run_id, "eval/mean_reward")] == [2, 4, 6]
    assert [one.path for one in client.list_artifacts(found.info.run_id)] == ["config.yaml", "videos"]
    assert [one.path for one in client.list_artifacts(found.info.run_id, "videos")] == ["videos/step-4.mp4"]


def test_wandb_for_real(
    run: RunFolder, film: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    killed_at_4_and_resumed_from_3(run, "wandb", film)
    id = json.loads((run.path / "trackers.json").read_text())["wandb"]
    folders = [path for path in (run.path / "wandb").iterdir() if path.name.startswith("offline-run-")]
    assert len(list(run.path.glob(f"wandb/offline-run-*/run-{id}.wandb"))) == len(folders) >= 1
    data = b"".join(path.read_bytes() for path in run.path.glob("wandb/offline-run-*/*.wandb"))
    assert b"rollout/ep_rew_mean" in data and b"eval/video" in data
    (shown,) = run.path.glob("wandb/offline-run-*/files/media/videos/eval/*.mp4")
    assert shown.read_bytes() == film.read_bytes()
    assert not [message for message in caplog.messages if "given up" in message]


def test_trackio_for_real(
    run: RunFolder, film: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(run.path.parent / "trackio"))
    pytest.importorskip("trackio")
    killed_at_4_and_resumed_from_3(run, "trackio", film)
    (store,) = (run.path.parent / "trackio").glob("rlopt*.db")
    with sqlite3.connect(store) as base:
        rows = [(name, step, json.loads(values)) for name, step, values in base.execute(
            "select run_name, step, metrics from metrics order by id"
        )]  # fmt: skip
    assert len({name for name, _, _ in rows}) == 1
    (shown,) = (run.path.parent / "trackio").rglob("*.mp4")
    assert shown.read_bytes() == film.read_bytes()
    assert [step for _, step, values in rows if "train/critic_loss" in values] == [1, 2, 3, 4, 5, 6]
    assert not [message for message in caplog.messages if "given up" in message]
