"""Observations and actions as a user has them, arrays of any kind, as what agents compute with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlopt.types import Obs, RloptError, Space, obs_leaves, shape_of


def takes_arrays(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return an agent's method ``(obs, …)`` that takes arrays, too, wherever it takes tensors."""

    @wraps(method)
    def taking(self: Any, obs: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(obs, Tensor):
            obs = as_obs(obs, self.spec.observation_space, self.device)
        elif obs.dim() == self.observation_dims:
            raise _no_batch("", tuple(obs.shape))
        if args and isinstance(args[0], np.ndarray):
            args = (_tensor(args[0], self.device), *args[1:])
        return method(self, obs, *args, **kwargs)

    return taking


def observation_dims(space: Space) -> int:
    """Return the axes of one observation; -1 of several leaves, whose axes differ."""
    leaves = obs_leaves(space)
    return len(shape_of(leaves[""])) if leaves.keys() == {""} else -1


def as_obs(obs: Any, space: Space, device: torch.device) -> Obs:
    """Return observations (N, …), an array or a dict of arrays, as tensors on ``device``: floats as float32.

    Raises:
        RloptError: there is no batch axis, a leaf is missing, or something holds no numbers.
    """
    leaves = obs_leaves(space)
    if leaves.keys() == {""}:
        return _leaf(obs, leaves[""], "", device)
    if not isinstance(obs, Mapping):
        raise RloptError(f"obs must be a dict of {', '.join(leaves)}, as the observation space is a Dict")
    if missing := [key for key in leaves if key not in obs]:
        raise RloptError(f"obs lacks {missing[0]!r}; it has {', '.join(map(str, obs)) or 'nothing'}")
    if all(isinstance(value, Tensor) for value in obs.values()):
        return obs if isinstance(obs, dict) else dict(obs)
    return {key: _leaf(obs[key], leaf, key, device) for key, leaf in leaves.items()}


def _leaf(value: Any, space: Space, key: str, device: torch.device) -> Tensor:
    found = _tensor(value, device)
    if found.dim() == len(shape_of(space)):
        raise _no_batch(key, tuple(found.shape))
    return found


def _tensor(value: Any, device: torch.device) -> Tensor:
    try:
        found = torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as e:
        raise RloptError(f"no tensor can be made of {type(value).__name__} ({' '.join(str(e).split())[:100]})") from e
    return found.float() if found.dtype == torch.float64 else found


def _no_batch(key: str, shape: tuple[int, ...]) -> RloptError:
    name = f"obs[{key!r}]" if key else "obs"
    return RloptError(f"{name} has shape {shape}, of one observation; agents act on batches (N, …): give obs[None]")
