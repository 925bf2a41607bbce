"""How a run ended, and what it found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlopt.analysis.tables import as_frame
from rlopt.policy import EvaluationMode
from rlopt.runs.run_folder import RunFolder
from rlopt.types import Episode

FINISHED, STOPPED, INTERRUPTED, NONFINITE = "finished", "stopped", "interrupted", "nonfinite"


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    status: str
    """``finished``, ``stopped`` (by a callback), ``interrupted`` (by a signal), or ``nonfinite``."""
    step: int
    evaluation: list[Episode]
    """The last evaluation's episodes."""
    folder: Path
    signal: int | None = None
    first_bad: str | None = None
    saved: bool = True
    """Whether the last checkpoint was written."""
    mode: EvaluationMode = EvaluationMode()  # noqa: RUF009 - a tuple
    """How the policy acted in the last evaluation."""

    @property
    def evaluations(self) -> Any:
        """Every evaluation episode of the run: a pandas DataFrame, or a list of dicts where pandas is not installed."""
        return as_frame(RunFolder(self.folder).evaluations)

    @property
    def episodes(self) -> Any:
        """Every training episode of the run, like ``evaluations``."""
        return as_frame(RunFolder(self.folder).episodes)

    @property
    def metrics(self) -> Any:
        """Losses, speed and other numbers over the run's steps, like ``evaluations``."""
        return as_frame(RunFolder(self.folder).metrics)
