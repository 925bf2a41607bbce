"""Observation statistics that travel with a policy, frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlopt.envs.normalize import Normalizer
from rlopt.types import EnvSpec, State


def check_tensors(found: Any, wanted: Mapping[str, Tensor], owner: str) -> None:
    """Check that ``found`` holds exactly these tensors, of these shapes and dtypes, and finite numbers in them.

    Raises:
        ValueError: it does not; the message says what differs.
    """
    if not isinstance(found, dict):
        raise ValueError("it holds no tensors")
    if missing := wanted.keys() - found.keys():
        raise ValueError(f"the tensor {sorted(missing)[0]!r} is missing")
    if surplus := found.keys() - wanted.keys():
        raise ValueError(f"the tensor {sorted(surplus)[0]!r} belongs nowhere")
    for name, like in wanted.items():
        tensor = found[name]
        if not isinstance(tensor, Tensor) or tensor.shape != like.shape or tensor.dtype != like.dtype:
            got = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"the tensor {name!r} is {got}; {owner} {tuple(like.shape)} {like.dtype}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"the tensor {name!r} holds numbers that are not finite")


def frozen_statistics(normalizer: Normalizer) -> State:
    """Return what a policy sees through: nothing about rewards, nothing that would let the statistics go on growing."""
    return {
        "clip": normalizer.clip,
        "epsilon": normalizer.epsilon,
        "moments": {key: moments.state_dict() for key, moments in normalizer.moments.items()},
    }


def load_statistics(spec: EnvSpec, state: State, device: torch.device) -> Normalizer:
    clip, epsilon, saved = float(state["clip"]), float(state["epsilon"]), state["moments"]
    if not (clip > 0.0 and 0.0 <= epsilon < math.inf):
        raise ValueError(f"its statistics have clip={clip} and epsilon={epsilon}")
    normalizer = Normalizer(spec, obs=bool(saved), reward=False, clip=clip, epsilon=epsilon, device=device)
    if saved.keys() != normalizer.moments.keys():
        raise ValueError("its statistics are of other observations")
    for key, moments in normalizer.moments.items():
        check_tensors(saved[key], moments.state_dict(), "the statistics have")
        moments.load_state_dict(saved[key])
    return normalizer
