"""Folders and policies made to do harm: nothing they name is imported, and nothing is written outside of them."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from rlopt.analysis.plots import draw_runs
from rlopt.files import digest_file
from rlopt.policy import load_policy
from rlopt.state import checksum
from rlopt.training.evaluate import evaluate_path
from rlopt.training.setup import begin, resume
from rlopt.types import RloptError
from tests.faults.outcomes import Outcome
from tests.training.test_resume import config, run_to_end

EVIL = "evil_module_of_the_faults"
SECONDS = 20.0
"""What one attempt may take."""

ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "a module": {"id": f"{EVIL}:Pendulum-v1"},
    "a module and an option": {"id": f"{EVIL}:Pendulum-v1", "states": 3},
    "a class": {"id": f"{EVIL}:Env"},
    "a wrapper of a module": {"id": "Pendulum-v1", "wrappers": [f"{EVIL}:Wrapper"]},
    "a wrapper in a mapping": {"id": "Pendulum-v1", "wrappers": [{"class": f"{EVIL}:Wrapper", "kwargs": {}}]},
    "a wrapper that records": {
        "id": "Pendulum-v1", "wrappers": [{"class": "RecordVideo", "kwargs": {"video_folder": "films"}}],
    },
    "a file": {"id": "Ant-v5", "kwargs": {"xml_file": "/etc/passwd"}},
    "a module as an argument": {"id": "Pendulum-v1", "kwargs": {"env": f"{EVIL}:Env"}},
    "168 GiB": {"id": "RiverSwim-v0", "kwargs": {"states": 150_000}},
    "10^12 steps": {"id": "Pendulum-v1", "kwargs": {"max_episode_steps": 10**12}},
    "words": {"id": 3, "kwargs": "x", "wrappers": {}},
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "10^12 episodes": {"eval": {"episodes": 10**12}},
    "10^11 threads": {"threads": 99_999_999_999},
    "a buffer elsewhere": {"buffer": {"name": "uniform", "device": "disk", "folder": "OUTSIDE"}},
}
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
LINKS = [
    ".lock", ".config.yaml.tmp", ".metrics.csv.tmp", "metrics.csv", "episodes.csv", "curve.png", ".curve.tmp.png",
    "versions.json", ".policy.new", ".policy.old", "policy", "policy_best", "tensorboard", "checkpoints",
    "checkpoints/best", "checkpoints/.best.tmp", "checkpoints/segments", "checkpoints/segments/replay",
    "checkpoints/.step-000000000066.tmp", "checkpoints/step-000000000066", "checkpoints/damaged-step-000000000060",
    "solution.safetensors", ".solution.safetensors.tmp",
]  # fmt: skip
PIPES = ("metrics.csv", ".lock", "config.yaml", "policy/policy.json")


def run(share: float, chance: random.Random, folder: Path) -> Iterator[Outcome]:
    """Every hostile folder (or a share of them), met by everything that reads one."""
    sound, outside = folder / "sound", folder / "outside"
    run_to_end(begin(config("sac", sound, total_steps=60)))
    (folder / "modules").mkdir()
    marker = folder / "modules" / "imported"
    (folder / "modules" / f"{EVIL}.py").write_text(f"open({str(marker)!r}, 'a').write('x')\n")
    sys.path.insert(0, str(folder / "modules"))
    # A home of somebody else, to whom the run is a stranger.
    os.environ["XDG_STATE_HOME"] = str(folder / "home")
    cases: list[tuple[str, Callable[[Path], None]]] = []
    cases += [(f"config.yaml with {name}", _configured({"env": env})) for name, env in ENVIRONMENTS.items()]
    cases += [(f"config.yaml with {name}", _configured(more)) for name, more in SETTINGS.items()]
    cases += [(f"policy.json with {name}", _described(env)) for name, env in ENVIRONMENTS.items()]
    cases += [("a bomb of aliases", lambda path: (path / "config.yaml").write_text(BOMB))]
    cases += [("a huge configuration", lambda path: (path / "config.yaml").write_text("a: 1\n" * 4_000_000))]
    cases += [("a huge description", _huge("policy/policy.json")), ("a huge state", _huge("policy/state.json"))]
    cases += [(f"a link {name}", _linked(name, outside)) for name in LINKS]
    cases += [
        (f"a pipe {name}", _piped(name)) for name in ("metrics.csv", ".lock", "config.yaml", "policy/policy.json")
    ]
    chance.shuffle(cases)
    for i, (name, spoil) in enumerate(cases[: max(1, round(share * len(cases)))]):
        path = shutil.copytree(sound, folder / f"hostile{i}" / "run")
        shutil.rmtree(outside, ignore_errors=True)
        outside.mkdir()
        (outside / "file").write_text("precious")
        spoil(path)
        yield from _met(name, path, outside, marker)
        shutil.rmtree(path.parent)


def _met(name: str, path: Path, outside: Path, marker: Path) -> Iterator[Outcome]:
    attempts: dict[str, Callable[[], Any]] = {
        "evaluated": lambda: evaluate_path(path, device="cpu"),
        "loaded": lambda: load_policy(path),
        "drawn": lambda: draw_runs([str(path)], str(path.parent / "curves.png")),
        "resumed": lambda: run_to_end(resume(path, {"total_steps": 66})),
    }
    before = _tree(outside)
    for how, attempt in attempts.items():
        case, begin_at = f"{name}, {how}", time.monotonic()
        try:
            attempt()
            outcome = Outcome("equal", case)
        except RloptError as e:
            outcome = Outcome("traceback" if "\n" in str(e) else "refused", case, str(e))
        except Exception as e:
            outcome = Outcome("traceback", case, f"{type(e).__name__}: {e}")
        if marker.exists():
            marker.unlink()
            outcome = Outcome("effect", case, "a module was imported")
        elif _tree(outside) != before:
            outcome = Outcome("effect", case, "something outside was changed")
        elif time.monotonic() - begin_at > SECONDS:
            outcome = Outcome("effect", case, f"it took {time.monotonic() - begin_at:.0f} s")
        yield outcome


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def _configured(more: dict[str, Any]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        values = yaml.safe_load((path / "config.yaml").read_text())
        text = yaml.safe_dump({**values, **more}).replace("OUTSIDE", str(path.parent.parent / "outside"))
        (path / "config.yaml").write_text(text)
        shutil.rmtree(path / "checkpoints")  # which would tell what it was

    return spoil


def _described(env: dict[str, Any]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        policy = path / "policy" / "policy.json"
        data = json.loads(policy.read_text())
        data["meta"]["env"] = env
        data["checksum"] = checksum(data)
        policy.write_text(json.dumps(data))
        (path / "config.yaml").unlink()

    return spoil


def _huge(name: str) -> Callable[[Path], None]:
    """200 MB of objects, with every checksum right."""

    def spoil(path: Path) -> None:
        (path / name).write_text("[" + "[],[[]]," * 25_000_000 + "0]")
        if name != "policy/policy.json":
            policy = path / "policy" / "policy.json"
            data = json.loads(policy.read_text())
            data["files"]["state.json"] = digest_file(path / name)._asdict()
            data["checksum"] = checksum(data)
            policy.write_text(json.dumps(data))

    return spoil


def _linked(name: str, outside: Path) -> Callable[[Path], None]:
    """What stands there (or an empty folder, or a file) lies outside, and a link to it in its place."""

    def spoil(path: Path) -> None:
        link, target = path / name, outside / "target"
        if link.is_dir():
            shutil.move(link, target)
        elif link.exists():
            target.write_bytes(link.read_bytes())
            link.unlink()
        elif "." in Path(name).suffix and "step" not in name:
            target.write_text("precious")
        else:
            target.mkdir()
            (target / "file").write_text("precious")
        link.symlink_to(target)

    return spoil


def _piped(name: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        os.mkfifo(path / name)

    return spoil
