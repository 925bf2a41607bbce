"""What the tests of the commands share."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlopt.cli import main

ROOT = Path(__file__).resolve().parents[2]
SHORT = [
    "env=Pendulum-v1",
    "total_steps=60",
    "agent.warmup_steps=30",
    "agent.batch_size=8",
    "agent.network.hidden=[8]",
    "eval.every=null",
    "eval.episodes=2",
    "log.tensorboard=false",
    "buffer.capacity=100",
]


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as handle:
        return list(csv.DictReader(handle))


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that ends with code 2 and prints nothing else, but what it had planned."""
    assert main(argv) == 2
    said = capsys.readouterr()
    assert all(line.startswith("replay buffer: ") for line in said.out.splitlines())
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err.removeprefix("error: ").rstrip("\n")


def python(*words: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    full = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(command, cwd=cwd, env=full, capture_output=True, text=True, timeout=300, check=False)
