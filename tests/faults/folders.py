"""Run folders with one thing damaged: evaluated and resumed, they are as they were, or say what is wrong."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from rlopt.training.evaluate import evaluate_path
from rlopt.training.setup import begin, resume
from tests.faults.outcomes import Outcome, digest, judged
from tests.training.test_resume import config, run_to_end

STEPS, MORE = 60, 66
QUIET = ("no longer bit for bit",)
"""Other versions, or none, tell nothing of damage."""


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)


def cut(path: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(len(data) + 1)])


def empty(path: Path, chance: random.Random) -> None:
    path.write_bytes(b"")


def delete(path: Path, chance: random.Random) -> None:
    path.unlink()


def zero(path: Path, chance: random.Random) -> None:
    """A block that the disk lost."""
    data = bytearray(path.read_bytes())
    start = chance.randrange(len(data) + 1)
    stop = min(len(data), start + chance.choice([1, 16, 512, 4096]))
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)


def repeat(path: Path, chance: random.Random) -> None:
    """A block that was written twice."""
    data = path.read_bytes()
    start = chance.randrange(len(data) + 1)
    path.write_bytes(data[:start] + data[start : start + 64] + data[start:])


def quote(path: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    at = chance.randrange(len(data) + 1)
    path.write_bytes(data[:at] + b'"' + data[at:])


def drop_line(path: Path, chance: random.Random) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    if lines:
        del lines[chance.randrange(len(lines))]
    path.write_bytes(b"".join(lines))


def another(path: Path, chance: random.Random) -> None:
    """The content of another file of the same folder."""
    others = [other for other in path.parent.iterdir() if other.is_file() and other != path]
    if others:
        path.write_bytes(chance.choice(others).read_bytes())


DAMAGES: list[Callable[[Path, random.Random], None]] = [
    flip, flip, flip, cut, cut, empty, delete, delete, zero, repeat, quote, drop_line, another,
]  # fmt: skip


def run(count: int, chance: random.Random, folder: Path) -> Iterator[Outcome]:
    """``count`` copies of one short run, each with a random file of it damaged at random."""
    sound = folder / "sound"
    settings = {"eval": {"every": 20, "episodes": 2}, "checkpoint": {"minutes": None, "every_steps": 30}}
    run_to_end(begin(config("buffer-reshuffled", sound, total_steps=STEPS, **settings)))
    files = sorted(str(path.relative_to(sound)) for path in sound.rglob("*") if path.is_file())
    straight = shutil.copytree(sound, folder / "straight")
    evaluated = evaluate_path(straight).episodes
    run_to_end(resume(straight, {"total_steps": MORE}))
    wanted = digest(straight)
    for i in range(count):
        name, damage = chance.choice(files), chance.choice(DAMAGES)
        path = shutil.copytree(sound, folder / str(i))
        if chance.random() < 0.05 and "/" in name:
            name = str(Path(name).parent)
            shutil.rmtree(path / name)
        else:
            damage(path / name, chance)
        case = f"{i}: {damage.__name__} {name}"
        if name == "config.yaml" or name.startswith("policy"):
            outcome = judged(f"{case}, evaluated", lambda path=path: evaluate_path(path).episodes, evaluated)
            if outcome.kind not in ("equal", "refused"):
                yield outcome
                continue
        outcome = judged(case, lambda path=path: _resumed(path), wanted, QUIET)
        yield outcome
        if outcome.kind in ("equal", "refused", "told"):
            shutil.rmtree(path)


def _resumed(path: Path) -> str:
    run_to_end(resume(path, {"total_steps": MORE}))
    return digest(path)
