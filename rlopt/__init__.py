"""Reinforcement-learning algorithms in PyTorch that reproduce their published curves.

``import rlopt`` is light: the names below are imported when first used. Agents are in ``rlopt.agents``, replay buffers
in ``rlopt.buffers``, environments in ``rlopt.envs``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlopt.envs import make_env
    from rlopt.errors import RloptError
    from rlopt.policy import Policy, load_policy, save_policy
    from rlopt.training.entry import train
    from rlopt.training.sharing import push
    from rlopt.version import __version__

__all__ = ["Policy", "RloptError", "__version__", "load_policy", "make_env", "push", "save_policy", "train"]

_HOMES = {
    "Policy": "rlopt.policy",
    "RloptError": "rlopt.errors",
    "__version__": "rlopt.version",
    "load_policy": "rlopt.policy",
    "make_env": "rlopt.envs",
    "push": "rlopt.training.sharing",
    "save_policy": "rlopt.policy",
    "train": "rlopt.training.entry",
}
_SUBMODULES = ("agents", "analysis", "buffers", "envs", "loops", "nn", "policy", "robust", "runs", "training")


def __getattr__(name: str) -> Any:
    """Import a public name or sub-package when it is first used (PEP 562)."""
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"rlopt.{name}")
    raise AttributeError(f"module 'rlopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
