"""What a run writes and shows, and that neither a disk nor a terminal can stop it."""

from __future__ import annotations

import errno
import io
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlopt.analysis.tables import read_csv
from rlopt.runs import csv_table, display
from rlopt.runs.logging import Display, Logger
from rlopt.runs.run_folder import RunFolder
from rlopt.types import Episode


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def test_tables_of_a_run(run: RunFolder) -> None:
    logger = Logger(run, tensorboard=False)
    logger.episodes(200, [Episode(-1234.5, 200)])
    logger.episodes(300, [])
    logger.metrics(500, {"steps_per_second": 80.0, "env_seconds": 0.5, "learn_seconds": 0.0})
    logger.metrics(1000, {"steps_per_second": 81.0, "env_seconds": 0.5, "learn_seconds": 4.0, "critic_loss": 0.125})
    logger.evaluation(1000, [Episode(-150.0, 200), Episode(-250.5, 200)])
    logger.close()
    logger.close()
    assert run.episodes.read_text() == "step,return,length\n200,-1234.5,200\n"
    assert run.metrics.read_text() == (
        "step,steps_per_second,env_seconds,learn_seconds,critic_loss\n500,80.0,0.5,0.0,\n1000,81.0,0.5,4.0,0.125\n"
    )
    assert run.evaluations.read_text() == "step,episode,return,length\n1000,0,-150.0,200\n1000,1,-250.5,200\n"
    assert not run.tensorboard.exists()


def test_every_row_is_on_disk_at_once(run: RunFolder) -> None:
    """A kill must not take rows that a checkpoint promises."""
    logger = Logger(run, tensorboard=False)
    logger.episodes(1, [Episode(1.0, 1)])
    logger.metrics(1, {"loss": 2.0})
    logger.evaluation(1, [Episode(1.0, 1)])
    assert [len(read_csv(path)["step"]) for path in (run.episodes, run.metrics, run.evaluations)] == [1, 1, 1]
    logger.close()


def test_several_runs_are_told_apart(run: RunFolder) -> None:
    logger = Logger(run, tensorboard=False, num_runs=2)
    logger.episodes(10, [Episode(1.0, 5, run=1)])
    logger.evaluation(10, [Episode(1.0, 5, 0), Episode(2.0, 5, 1), Episode(3.0, 5, 0), Episode(4.0, 5, 1)])
    logger.close()
    assert read_csv(run.episodes) == {"step": [10], "return": [1.0], "length": [5], "run": [1]}
    table = read_csv(run.evaluations)
    assert table["run"] == [0, 1, 0, 1] and table["episode"] == [0, 0, 1, 1]


def test_resume_drops_what_came_after_the_checkpoint(run: RunFolder) -> None:
    def write(logger: Logger, *steps: int) -> None:
        for step in steps:
            logger.episodes(step, [Episode(float(step), 1)])
            logger.metrics(step, {"loss": step / 4} if step > 1 else {})
            logger.evaluation(step, [Episode(step / 2, 1)])

    logger = Logger(run, tensorboard=False)
    write(logger, 1, 2, 3, 4)
    logger.close()
    straight = [path.read_bytes() for path in (run.metrics, run.episodes, run.evaluations)]
    for checkpoint in (0, 1, 3):
        logger = Logger(run, tensorboard=False, resume_step=checkpoint)
        assert read_csv(run.episodes)["step"] == list(range(1, checkpoint + 1))
        write(logger, *range(checkpoint + 1, 5))
        logger.close()
        assert [path.read_bytes() for path in (run.metrics, run.episodes, run.evaluations)] == straight


def test_tensorboard_has_the_names_users_search_for_and_resume_purges(run: RunFolder) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = Logger(run)
    logger.episodes(1, [Episode(7.0, 5, facts={"success": 1.0})])
    for step in (1, 2, 3):
        logger.metrics(step, {"steps_per_second": 80.0, "critic_loss": float(step), "episode_return": 7.0})
    logger.evaluation(3, [Episode(1.0, 5), Episode(2.0, 6)])
    logger.close()
    logger = Logger(run, resume_step=2)
    logger.episodes(3, [Episode(9.0, 7)])
    logger.metrics(3, {"critic_loss": 30.0})
    logger.flush()
    logger.close()
    events = EventAccumulator(str(run.tensorboard)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/critic_loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [e.value for e in events.Scalars("rollout/ep_rew_mean")] == [7.0, 7.0, 8.0]  # also of episodes before
    assert set(events.Tags()["scalars"]) <= {
        "train/critic_loss", "time/fps", "time/total_timesteps", "rollout/ep_rew_mean", "rollout/ep_len_mean",
        "rollout/success_rate", "eval/mean_reward", "eval/mean_ep_length",
    }  # fmt: skip
    assert "config/text_summary" in events.Tags()["tensors"]


def test_tensorboard_means_and_tags(run: RunFolder) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = Logger(run, num_runs=2)
    logger.evaluation(3, [Episode(1.0, 5, 0), Episode(2.0, 5, 0), Episode(9.0, 5, 1)])
    logger.close()
    events = EventAccumulator(str(run.tensorboard)).Reload()
    assert events.Scalars("eval/run0/mean_reward")[0].value == 1.5
    assert events.Scalars("eval/run1/mean_reward")[0].value == 9.0
    assert events.Scalars("eval/mean_reward")[0].value == 4.0


def test_a_full_disk_is_told_once_and_loses_no_row(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = Logger(run, tensorboard=False)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(csv_table.os, "write", full)
        for step in (1, 2, 3):
            logger.metrics(step, {"loss": 0.5})
            logger.episodes(step, [Episode(1.0, 1)])
        logger.flush()
        assert len(caplog.messages) == 1 and "No space left" in caplog.text
        assert read_csv(run.metrics)["step"] == []
    logger.metrics(4, {"loss": 0.5})
    logger.close()
    assert read_csv(run.metrics)["step"] == [1, 2, 3, 4]
    assert read_csv(run.episodes)["step"] == [1, 2, 3]


def test_tensorboard_that_fails_is_given_up(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    run.tensorboard.write_text("a file where the folder should be")
    logger = Logger(run)
    for step in (1, 2):
        logger.metrics(step, {"loss": 0.5})
    logger.close()
    assert caplog.text.count("TensorBoard") == 1
    assert read_csv(run.metrics)["step"] == [1, 2]


def test_curve_is_drawn_where_there_is_one_and_never_stops_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = {"seed": 0, "agent": {"name": "sac"}, "env": {"id": "Pendulum-v1"}}
    with RunFolder.create(tmp_path, config) as run:
        logger = Logger(run, tensorboard=False)
        run.draw_curve()
        assert not run.curve.exists()
        logger.evaluation(1, [Episode(1.0, 1), Episode(2.0, 1)])
        logger.evaluation(2, [Episode(2.0, 1), Episode(3.0, 1)])
        run.draw_curve()
        assert run.curve.read_bytes().startswith(b"\x89PNG")
        assert caplog.messages == []
        logger.close()
        run.evaluations.write_text("step\n1,2\n")
        run.draw_curve()
        assert "could not be drawn" in caplog.text
        assert run.curve.read_bytes().startswith(b"\x89PNG")
        assert not list(tmp_path.glob(".curve*"))


# The display


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(display, "_now", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


VALUES = {
    "steps_per_second": 120.0,
    "episode_return": 532.14,
    "critic_loss": 1.23456,
    "env_seconds": 1.0,
    "learn_seconds": 9.0,
    "updates": 1000.0,
}


def test_a_plain_line(clock: Clock) -> None:
    out = io.StringIO()
    shown = Display(100_000, "environment steps", out)
    shown.update(12_000, VALUES)
    assert out.getvalue() == (
        "step 12000/100000 (12%)  120 steps/s  return 532.1  critic_loss 1.235  env 10% learn 90%  left 12m13s\n"
    )


def test_plain_lines_come_at_most_every_ten_seconds_and_the_last_always(clock: Clock) -> None:
    out = io.StringIO()
    shown = Display(100, stream=out)
    for step in range(1, 100):
        clock.now += 1.0
        shown.update(step, {"steps_per_second": 1.0})
    shown.update(100, {"evaluation_return": -7.0})
    shown.close()
    shown.close()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"{s}/100" for s in (*range(1, 100, 10), 100)]
    assert lines[0] == "step 1/100 (1%)  1 steps/s  left 1m39s"
    assert lines[-1] == "step 100/100 (100%)  1 steps/s  evaluation -7.0  left 0s"


def test_a_total_that_was_lowered_is_what_is_shown(clock: Clock) -> None:
    out = io.StringIO()
    shown = Display(1_000_000, stream=out)
    shown.update(10, {"steps_per_second": 1.0})
    shown.total_steps = 438
    shown.update(438, {})
    shown.close()
    assert out.getvalue().splitlines()[-1] == "step 438/438 (100%)  1 steps/s  left 0s"


def test_speed_is_measured_where_none_is_given(clock: Clock) -> None:
    out = io.StringIO()
    shown = Display(100, stream=out)
    shown.update(20, {})
    clock.now += 20.0
    shown.update(60, {})
    assert out.getvalue().splitlines() == ["step 20/100 (20%)", "step 60/100 (60%)  2 steps/s  left 20s"]


def test_a_notebook_has_one_panel_that_changes(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []

    def show(panel: Any, display_id: bool = False) -> Any:
        shown.append(panel._repr_mimebundle_([], [])["text/plain"])
        return SimpleNamespace(update=show)

    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=show))
    panel = Display(100)
    panel.message("run folder: runs/a")
    for step in (20, 60):
        clock.now += 20.0
        panel.update(step, {"critic_loss": 0.5})
    panel.close()
    assert capsys.readouterr().out == "run folder: runs/a\n"
    assert len(shown) == 2 and "20/100 steps" in shown[0] and "60/100 steps" in shown[1]
    shell.__dict__.clear()  # IPython on a terminal
    assert Display(100)._live is None


def test_a_time_left_that_is_given_wins_over_the_speed(clock: Clock) -> None:
    out = io.StringIO()
    shown = Display(100, stream=out)
    for step, left in ((20, math.nan), (60, 90.0)):
        clock.now += 20.0
        shown.update(step, {"steps_per_second": 2.0, "seconds_left": left})
    assert out.getvalue().splitlines() == ["step 20/100 (20%)  2 steps/s", "step 60/100 (60%)  2 steps/s  left 1m30s"]


def test_the_time_left_of_runs_side_by_side(clock: Clock) -> None:
    """Their speed is that of all together, their steps are each run's own."""
    out = io.StringIO()
    shown = Display(100, stream=out, runs=4)
    shown.update(60, {"steps_per_second": 8.0})
    clock.now += 20.0
    shown.update(80, {"steps_per_second": 8.0})
    lines = out.getvalue().splitlines()
    assert lines == [
        "step 60/100 (60%)  8 steps/s of 4 runs  left 20s", "step 80/100 (80%)  8 steps/s of 4 runs  left 10s",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (59.4, "59s"), (59.6, "1m00s"), (734, "12m14s"), (11_100, "3h05m"), (198_000, "2d07h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert display._duration(seconds) == text


def test_messages_are_lines(clock: Clock) -> None:
    out = io.StringIO()
    shown = Display(10, stream=out)
    shown.message("[bold]saved[/bold] to {x}")
    assert out.getvalue() == "[bold]saved[/bold] to {x}\n"


def test_a_terminal_without_utf8_shows_question_marks(clock: Clock) -> None:
    raw = io.BytesIO()
    shown = Display(10, stream=io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    shown.message("naïve → done")
    shown.update(1, {"∂": 0.5})
    shown.close()
    assert raw.getvalue() == b"na?ve ? done\nstep 1/10 (10%)  ? 0.5\n"


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_a_terminal_gets_a_panel(clock: Clock, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    raw = io.BytesIO()
    shown = Display(100_000, "environment steps", Terminal(raw, encoding=encoding, write_through=True))
    shown.update(12_000, VALUES)
    shown.message("a line [that] stays ∇")
    clock.now += 1.0
    shown.update(13_000, {"evaluation_return": 498.0, "∂": 0.25})
    shown.close()
    text = raw.getvalue().decode(encoding)
    assert "12000/100000 environment steps (12%)" in text
    for part in ("120 steps/s", "532.1", "critic_loss", "1.235", "env 10% learn 90%", "a line [that] stays", "498.0"):
        assert part in text, part
    if encoding == "utf-8":
        assert "\x1b[" in text and "left 12m05s" in text


def test_a_dumb_terminal_gets_plain_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    raw = io.BytesIO()
    shown = Display(10, stream=Terminal(raw, encoding="utf-8", write_through=True))
    shown.update(1, {})
    shown.close()
    assert raw.getvalue() == b"step 1/10 (10%)\n"


def test_no_stream_a_closed_one_and_a_failing_one(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # a service without a console
    closed = io.StringIO()
    closed.close()

    class Failing(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "the terminal is gone")

    for stream in (None, closed, Failing()):
        shown = Display(10, stream=stream)
        shown.message("hello")
        shown.update(1, VALUES)
        shown.close()


def test_a_closed_pipe_does_not_stop_a_run(tmp_path: Path) -> None:
    """``python train.py | head -1``: the reader goes away, the run ends well."""
    code = """
from rlopt.runs import display
display.PLAIN_SECONDS = 0.0
shown = display.Display(100000)
for step in range(100000):
    shown.update(step, {"loss": 1.0})
shown.close()
open("finished", "w").close()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == b"step 0/100000 (0%)  loss 1\n"
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0, errors
    assert errors == b""
    assert (tmp_path / "finished").exists()
