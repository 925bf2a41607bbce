"""A sample of everything that is broken on purpose: no fault. (``python -m tests.faults`` runs all of it.)"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are POSIX signals")
def test_a_sample_has_no_fault() -> None:
    """In a process of its own, which forks, and so may not have started a thread."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", "--quick"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line[:1].isalpha()}
    assert set(lines) == {"kills", "folders", "json", "weights", "commands", "hostile"}
    assert all(int(cells[1]) > 0 for cells in lines.values())
