"""The trainer and what makes one. What programs use stands here and is imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlopt.loops.configuration import TrainConfig
    from rlopt.training.callback import Callback
    from rlopt.training.presets import train_config
    from rlopt.training.result import Result
    from rlopt.training.setup import begin, resume
    from rlopt.training.trainer import Trainer

__all__ = ["Callback", "Result", "TrainConfig", "Trainer", "begin", "resume", "train_config"]

_HOMES = {
    "Callback": "rlopt.training.callback",
    "Result": "rlopt.training.result",
    "TrainConfig": "rlopt.loops.configuration",
    "Trainer": "rlopt.training.trainer",
    "resume": "rlopt.training.setup",
    "begin": "rlopt.training.setup",
    "train_config": "rlopt.training.presets",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rlopt.training' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
