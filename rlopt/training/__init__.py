"""The trainer, its loops and its run folders. What programs use stands here and is imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlopt.training.configuration import TrainConfig, train_config
    from rlopt.training.setup import resume, train
    from rlopt.training.trainer import Callback, Result, Trainer

__all__ = ["Callback", "Result", "TrainConfig", "Trainer", "resume", "train", "train_config"]

_HOMES = {
    "Callback": "trainer", "Result": "trainer", "TrainConfig": "configuration", "Trainer": "trainer", "resume": "setup",
    "train": "setup", "train_config": "configuration",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rlopt.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rlopt.training.{_HOMES[name]}"), name)
