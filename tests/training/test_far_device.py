"""Runs ``far_device_cases.py`` in processes of their own: torch takes a device only before its first backward pass."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("far_device_cases.py")
_, *PARTS = re.split(r"^# ---- (.*)$", CASES.read_text(), flags=re.M)
SECTIONS = dict(zip(PARTS[::2], PARTS[1::2], strict=True))
GROUPS = [["the tool", "the same run"], ["waits"], ["recorded updates"], ["saved far away"]]
"""What runs in one process: sections of the file. Each of them imports torch, so they are few."""


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group[-1])
def test_training_on_a_device_that_is_not_the_cpu(group: list[str]) -> None:
    assert sorted(SECTIONS) == sorted(title for each in GROUPS for title in each)
    names = [name for title in group for name in re.findall(r"^def (test_\w+)", SECTIONS[title], flags=re.M)]
    words = [sys.executable, "-m", "pytest", "-q", *(f"{CASES}::{name}" for name in names)]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    run = subprocess.run(words, capture_output=True, text=True, check=False, timeout=1_200, env=alone)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-8_000:] + run.stderr[-2_000:]
