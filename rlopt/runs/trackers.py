"""Where the numbers of a run can be looked at: TensorBoard, Weights & Biases, MLflow and Trackio behind one protocol.

The tables of the run folder are the record; a tracker shows them. None may stop a training, so each is ``Guarded``.
Rows are named as Stable-Baselines3 names them (``rollout/ep_rew_mean``, ``eval/mean_reward``, ``time/fps`` …), which is
what users and their dashboards search for.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import yaml

from rlopt.analysis.run_results import flatten
from rlopt.files import replace_file
from rlopt.types import RloptError
from rlopt.version import install

__all__ = ["TRACKERS", "Guarded", "Session", "Tracker", "open_trackers", "refuse_missing"]

PROJECT = "rlopt"
_IDS = "trackers.json"
GIF_FRAMES, GIF_SIDE = 100, 240
"""Of films for TensorBoard, which keeps whole ones in its event files."""
_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Shows one run. Any exception means that it is given up."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show ``values`` at an environment step; steps never go down."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """Show a PNG file as it is now."""

    def film(self, step: int, name: str, path: Path) -> None:
        """Show an mp4 file."""

    def flush(self) -> None:
        """Send what waits."""

    def close(self) -> None:
        """Send what waits and end the run's process, not the run: a resume goes on with it."""


class Session(NamedTuple):
    """What a tracker is opened with: the run's ``folder``, its ``id`` in the tracker, its ``config``, whether it is
    ``new`` there (or goes on), and the ``step`` it goes on from, None at a beginning."""

    folder: Path
    id: str
    config: Mapping[str, Any]
    new: bool
    step: int | None


class TensorBoard:
    """Event files below ``tensorboard/``. What lies after the step of a resume is purged."""

    def __init__(self, session: Session) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if session.step is None else session.step + 1
        self._writer: Any = SummaryWriter(str(session.folder / "tensorboard"), purge_step=purge)
        text = "".join(f"    {line}\n" for line in _yaml(session.config).splitlines())  # Markdown's code block
        self._writer.add_text("config", text, session.step or 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        from matplotlib.image import imread

        self._writer.add_image(name, imread(path)[..., :3], step, dataformats="HWC")

    def film(self, step: int, name: str, path: Path) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        gif, width, height = as_gif(path)  # which its page of images plays; mp4 it has no page for
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=gif)
        self._writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases; ``WANDB_MODE=offline`` writes below the run folder for ``wandb sync``, ``WANDB_PROJECT`` and
    its other variables count. It writes in blocks, of which a kill loses the last: a resume sends it again what it was
    given since it was last closed."""

    def __init__(self, session: Session) -> None:
        import wandb

        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=session.id,
            name=session.folder.name,
            resume="allow",
            dir=str(session.folder),
            config=dict(session.config),
            # The console is the display's, and a server that does not answer may not hold up a training.
            settings=wandb.Settings(console="off", init_timeout=30),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._run.step:  # which its server knows; it would complain of earlier ones
            self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def film(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._wandb.Video(str(path), format="mp4")}, step=step)

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """MLflow at ``MLFLOW_TRACKING_URI``, or where MLflow itself puts runs (``mlflow.db`` in the working directory);
    experiment ``MLFLOW_EXPERIMENT_NAME``."""

    def __init__(self, session: Session) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric: Any = Metric
        self._client: Any = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known is not None else self._client.create_experiment(name)
        # MLflow alone gives ids, so ours is a tag to find the run by.
        found = [] if session.new else self._client.search_runs([experiment], f"tags.`rlopt.id` = '{session.id}'")
        if found:
            self._run: str = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        made = self._client.create_run(experiment, run_name=session.folder.name, tags={"rlopt.id": session.id})
        self._run = made.info.run_id
        params = [Param(key, str(value)[:500]) for key, value in flatten(dict(session.config)).items()]
        for start in range(0, len(params), 100):  # the most of one request
            self._client.log_batch(self._run, params=params[start : start + 100])
        self._client.log_text(self._run, _yaml(session.config), "config.yaml")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[self._metric(tag, v, now, step) for tag, v in values.items()])

    def picture(self, step: int, name: str, path: Path) -> None:
        self._client.log_artifact(self._run, str(path))

    def film(self, step: int, name: str, path: Path) -> None:
        self._client.log_artifact(self._run, str(path), "videos")

    def flush(self) -> None:
        """Do nothing: every row was sent when it came."""

    def close(self) -> None:
        self._client.set_terminated(self._run)


class Trackio:
    """Trackio, on this machine below ``TRACKIO_DIR``; its runs are known by their names."""

    def __init__(self, session: Session) -> None:
        import trackio

        self._trackio: Any = trackio
        with redirect_stdout(sys.stderr):  # stdout is for results
            self._run: Any = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=f"{session.folder.name}-{session.id}",
                resume="allow",
                config=flatten(dict(session.config)),
                embed=False,
            )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._trackio.Image(str(path))}, step=step)

    def film(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._trackio.Video(str(path))}, step=step)

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._run.finish()


TRACKERS: dict[str, Callable[[Session], Tracker]] = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}
"""What ``log.to`` names; the module of each has its name, and so has the extra that installs it."""


LOSES_ITS_TAIL = ("wandb",)
"""Those that a kill may rob of rows which they were given long before it."""


class Guarded:
    """Hold one tracker, which is opened when first needed; what fails in it is told once, and it is given up.

    Args:
        seen: the last step that it was given before a resume, by kind of row: those are not sent again.
        replay_from: the step after which it may lack rows of the tables that it was given; None where it has them.
        closed: called with the last step that it was given, once it has surely got that.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Tracker],
        seen: Mapping[str, int] | None = None,
        replay_from: int | None = None,
        closed: Callable[[int], None] | None = None,
    ) -> None:
        self.name, self._make, self._seen = name, make, dict(seen or {})
        self.replay_from, self._closed = replay_from, closed
        self._tracker: Tracker | None = None
        self._given_up = False
        self._last = max(self._seen.values(), default=-1)

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Show ``values``, unless rows of this ``kind`` were shown up to this step already."""
        if values and step > self._seen.get(kind, -1):
            self._try(lambda tracker: tracker.scalars(step, {tag: float(v) for tag, v in values.items()}))
            self._last = max(self._last, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Show a picture."""
        if step > max(self._seen.values(), default=-1):
            self._try(lambda tracker: tracker.picture(step, name, path))

    def film(self, step: int, name: str, path: Path) -> None:
        """Show a film."""
        if step > self._seen.get("eval", -1):
            self._try(lambda tracker: tracker.film(step, name, path))

    def flush(self) -> None:
        """Send what waits."""
        if self._tracker is not None:
            self._try(lambda tracker: tracker.flush())

    def close(self) -> None:
        """Send what waits, and end. Safe to call twice."""
        if self._tracker is not None:
            self._try(lambda tracker: tracker.close())
            if self._tracker is not None and self._closed is not None:
                self._closed(self._last)
        self._tracker, self._given_up = None, True

    def _try(self, call: Callable[[Tracker], None]) -> None:
        if self._given_up:
            return
        try:
            if self._tracker is None:
                self._tracker = self._make()
            call(self._tracker)
        except Exception as e:  # whatever a tracker raises, training goes on
            reason = " ".join(str(e).split()) or type(e).__name__
            _log.warning("%s failed (%s): it is given up, the tables and the run go on", self.name, reason)
            self._tracker, self._given_up = None, True


def open_trackers(
    folder: Path,
    config: Mapping[str, Any],
    *,
    tensorboard: bool,
    names: Sequence[str],
    step: int | None,
    seen: Mapping[str, int],
) -> list[Guarded]:
    """Return TensorBoard and the trackers of ``names``, ready for rows.

    Args:
        folder: the run's; ``trackers.json`` in it keeps the ids of its runs in the trackers.
        config: the run's configuration, plain values.
        step: where a resumed run goes on from.
        seen: the last steps of the tables before they were cut back to ``step``, by kind of row. What a tracker has
            seen it is not sent again; one that is new has seen nothing.
    """
    found = []
    if tensorboard:
        session = Session(folder, "", config, step is None, step)
        found.append(Guarded("TensorBoard", lambda: TensorBoard(session)))
    ids = _Ids(folder / _IDS)
    for name in names:
        known = step is not None and name in ids.runs
        if not known:
            ids.begin(name)
        session = Session(folder.resolve(), ids.runs[name], config, not known, step)
        sure = ids.sent.get(name, -1) if known and name in LOSES_ITS_TAIL else None
        had = {} if not known else seen if sure is None else {kind: min(last, sure) for kind, last in seen.items()}
        make = partial(TRACKERS[name], session)
        found.append(Guarded(name, make, had, sure, partial(ids.note, name)))
    if names:
        ids.write()
    return found


class _Ids:
    """``trackers.json``: the ids of this run in trackers, and up to which step each has surely got all, which is known
    when it was closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            found = json.loads(path.read_bytes())
            self.runs = {k: v for k, v in found.items() if k in TRACKERS and re.fullmatch("[0-9a-f]{8}", str(v))}
            self.sent = {k: int(v) for k, v in found.get("sent", {}).items() if k in self.runs}
        except (OSError, ValueError, TypeError, AttributeError):  # ids that no rlopt wrote are left out
            self.runs, self.sent = {}, {}

    def begin(self, name: str) -> None:
        self.runs[name] = secrets.token_hex(4)
        self.sent.pop(name, None)

    def note(self, name: str, step: int) -> None:
        self.sent[name] = step
        self.write()

    def write(self) -> None:
        try:
            replace_file(self.path, json.dumps({**self.runs, "sent": self.sent}, indent=1).encode())
        except OSError as e:
            _log.warning("%s cannot be written (%s): a resume begins new runs in the trackers", self.path, e)


def as_gif(film: Path) -> tuple[bytes, int, int]:
    """Return an mp4 file as an animated GIF of the same length, width and height: at most ``GIF_FRAMES`` of its frames,
    no side longer than ``GIF_SIDE``."""
    import imageio
    from PIL import Image

    reader: Any = imageio.get_reader(film)
    with reader:
        stride = -(-reader.count_frames() // GIF_FRAMES)
        frames = []
        for i, frame in enumerate(reader):
            if i % stride == 0:
                picture = Image.fromarray(frame)
                picture.thumbnail((GIF_SIDE, GIF_SIDE))
                frames.append(picture)
        milliseconds = round(1000 * stride / reader.get_meta_data()["fps"])
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    return out.getvalue(), *frames[0].size


def refuse_missing(names: Sequence[str]) -> None:
    """Raise RloptError, naming the extra, where a tracker of ``names`` is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise RloptError(f"log.to={name} needs {name}; install it {install(name)}")


def _yaml(config: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
