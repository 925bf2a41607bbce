"""Runs ``far_device_cases.py`` in a process of its own: torch takes a device only before its first backward pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_training_on_a_device_that_is_not_the_cpu() -> None:
    cases = Path(__file__).with_name("far_device_cases.py")
    words = [sys.executable, "-m", "pytest", "-q", str(cases)]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    run = subprocess.run(words, capture_output=True, text=True, check=False, timeout=1_200, env=alone)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-8_000:] + run.stderr[-2_000:]
