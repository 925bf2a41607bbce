"""A sample of what ``python -m tests.faults`` breaks on purpose: nothing silent, no traceback, no effect."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_sample_of_damage_and_hostility_ends_well() -> None:
    words = ("--quick", "--share", "0.5", "--only", "folders,json,weights,commands,hostile")
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert all(word in done.stdout for word in ("folders", "json", "weights", "commands", "hostile"))
