"""What users hook into a training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlopt.loops.base import Progress
from rlopt.training.result import Result
from rlopt.types import Episode

if TYPE_CHECKING:
    from rlopt.training.trainer import Trainer


class Callback:
    """Hooks for users; every method may be left out. A true answer from ``on_step`` or ``on_evaluation`` stops the
    run. Checkpoints hold nothing of a callback: one that must survive a resume rebuilds itself in ``on_start``."""

    def on_start(self, trainer: Trainer) -> None:
        """Act before the first step, after a resume."""

    def on_step(self, trainer: Trainer, progress: Progress) -> bool | None:
        """Act after every ``advance``."""

    def on_evaluation(self, trainer: Trainer, episodes: list[Episode]) -> bool | None:
        """Act after an evaluation has been logged, but not after that of the untrained policy."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """Act after a checkpoint has been written."""

    def on_end(self, trainer: Trainer, result: Result) -> None:
        """Act after the last checkpoint."""
