"""Runs without what their tests do not look at."""

from __future__ import annotations

from typing import Any

import pytest

from rlopt.runs.run_folder import RunFolder


def no_curve(self: RunFolder, unit: str = "") -> None:
    """Stand in for ``RunFolder.draw_curve``, which takes a third of a short run."""


@pytest.fixture
def without_curves(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(RunFolder, "draw_curve", no_curve)
