"""The folder of one run: what lies where in it, its one writer, and its tables.

::

    config.yaml  versions.json           what was asked for, and what it ran on
    metrics.csv  episodes.csv  evaluations.csv  curve.png  tensorboard/
    checkpoints/  policy/  policy_best/
    solution.safetensors                 of a solver: what its agent's ``results`` are, once the run is complete
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rlopt.analysis.tables import read_csv
from rlopt.files import refuse_links, remove, replace_file
from rlopt.runs.lock import Lock
from rlopt.settings import Settings, read_settings, write_settings
from rlopt.types import RloptError
from rlopt.version import __version__

_FOLDERS = ("checkpoints", "policy", "policy_best", "tensorboard", "videos")
_PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "ale-py", "safetensors")
_log = logging.getLogger(__name__)


class RunFolder:
    """Paths of a run. ``create`` and ``open`` make this process the one writer, until ``close`` or its end, however
    it ends; ``RunFolder(path)`` itself only names the paths, for readers.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.yaml"
        self.versions_path = self.path / "versions.json"
        self.metrics = self.path / "metrics.csv"
        self.episodes = self.path / "episodes.csv"
        self.evaluations = self.path / "evaluations.csv"
        self.trajectories = self.path / "trajectories.jsonl"
        self.curve = self.path / "curve.png"
        self.checkpoints = self.path / "checkpoints"
        self.policy = self.path / "policy"
        self.policy_best = self.path / "policy_best"
        self.solution = self.path / "solution.safetensors"
        self.tensorboard = self.path / "tensorboard"
        self.videos = self.path / "videos"
        self._lock: Lock | None = None
        self._config_file = b""

    @classmethod
    def create(cls, run_dir: str | Path, config: dict[str, Any]) -> RunFolder:
        """Begin a run in ``run_dir`` (made if need be) and write its configuration and versions.

        Raises:
            RloptError: if the folder holds a run already or a link, if another process writes there, or if it cannot be
                written.
            TypeError: if ``config`` is not made of plain values.
        """
        folder = cls(run_dir)
        text = write_settings(config)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            refuse_links(folder.path, _FOLDERS)
            folder._lock = Lock(folder.path)
            if any(path.exists() for path in (folder.config_path, folder.metrics, folder.checkpoints)):
                raise RloptError(
                    f"{folder.path} already holds a run: go on with it by resume={folder.path}, or name another run_dir"
                )
            replace_file(folder.versions_path, json.dumps(versions(), indent=1).encode())
            replace_file(folder.config_path, text)
            folder._config_file = text
        except BaseException as e:
            folder.close()
            if isinstance(e, OSError):
                raise RloptError(f"run_dir={folder.path} cannot be written: {e}; name another run_dir") from e
            raise
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Become the writer of a run that exists, to resume it.

        Raises:
            RloptError: if there is no run, if it holds a link, if another process writes there, or if it cannot be
                written.
        """
        folder = cls(path)
        if not folder.config_path.is_file():
            raise RloptError(
                f"{folder.path} holds no run (no config.yaml); resume= wants the folder that a run printed"
            )
        with told_as_one_line(folder.path):
            refuse_links(folder.path, _FOLDERS)
            folder._lock = Lock(folder.path)
            folder._config_file = folder.config_path.read_bytes()
        return folder

    def config(self) -> dict[str, Any]:
        """Return the run's resolved configuration.

        Raises:
            RloptError: ``config.yaml`` is missing or cannot be read.
        """
        return self.settings().values

    def settings(self) -> Settings:
        """Return the configuration, and whether it is as rlopt wrote it, and this user's. Raises as ``config`` does."""
        return read_settings(self.config_path)

    def write_config(self, config: dict[str, Any]) -> None:
        """Replace the configuration: what a resume may change, it writes.

        Raises:
            RloptError: the disk is full, or the folder may not be written.
        """
        with told_as_one_line(self.config_path):
            replace_file(self.config_path, write_settings(config))

    def draw_curve(self, unit: str = "environment steps") -> None:
        """Redraw ``curve.png`` from the tables. What goes wrong is logged: no picture is worth a run."""
        from rlopt.analysis.plots import draw_run  # Matplotlib takes a second to import

        staged = self.curve.with_name(".curve.tmp.png")
        try:
            if any(
                path.is_file() and len(read_csv(path).get("step", [])) for path in (self.evaluations, self.episodes)
            ):
                remove(staged)
                draw_run(self.path, staged, unit)
                os.replace(staged, self.curve)
        except (OSError, ValueError, RuntimeError, RloptError) as e:
            _log.warning("%s could not be drawn: %s", self.curve, e)
        finally:
            with suppress(OSError):
                staged.unlink(missing_ok=True)

    def version_changes(self) -> list[str]:
        """Return what differs from the machine and packages the run began on, such as ``torch 2.12.0 → 2.13.0``: where
        this is not empty, a resumed run goes on correctly but is not promised to be bit-identical."""
        try:
            before = json.loads(self.versions_path.read_text(encoding="utf-8"))
            return [f"{name} {before.get(name)} → {now}" for name, now in versions().items() if before.get(name) != now]
        except (OSError, ValueError, AttributeError):
            return ["versions.json cannot be read"]

    def check(self) -> None:
        """Check, for its writer, that the folder is still where it was; a ``config.yaml`` that was removed is written
        again.

        Raises:
            RloptError: it was removed or renamed, so that nothing can be saved under its name.
        """
        if self._lock is None or not self._lock.in_place():
            raise RloptError(
                f"{self.path} was removed or renamed while its run was going on, so nothing more can be saved there; "
                "where it was only renamed, go on with resume= and its new name"
            )
        if not os.path.lexists(self.config_path):
            _log.warning("%s was removed; it is written again", self.config_path)
            with suppress(OSError):  # a full disk: the next check tries again
                replace_file(self.config_path, self._config_file)

    def close(self) -> None:
        """Let another process write here. Safe to call twice."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def told_as_one_line(path: Path) -> Iterator[None]:
    """Return what fails while ``path`` or something in it is written: a RloptError that names it."""
    try:
        yield
    except OSError as e:
        raise RloptError(f"{path} cannot be written: {e}; free some space, or mend its rights") from e


def default_run_dir(agent: str, env_id: str, seed: int, root: str | Path = "runs") -> Path:
    """Return ``runs/<agent>-<env>-s<seed>-<YYYYmmdd-HHMMSS>``, made here so that no other process gets the same."""
    words = [re.sub(r"[^A-Za-z0-9_.]+", "-", word).strip("-.") for word in (agent, env_id)]
    stem = f"{words[0]}-{words[1]}-s{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 1
    while True:
        path = Path(root) / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1
        except OSError as e:
            raise RloptError(f"{path} cannot be made: {e}; name a run_dir that can be written") from e


def versions() -> dict[str, str]:
    """Return the packages and the machine, as ``versions.json`` records them."""
    found = {"rlopt": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found |= {"platform": platform.platform(), "cpu": _cpu(), "threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()
