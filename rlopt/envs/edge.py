"""What comes from a Gymnasium environment is checked here, once, before it is a number of rlopt's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlopt.envs.arrays import Array
from rlopt.types import EnvSpec, RloptError


def told_facts(info: Mapping[str, Any], spec: EnvSpec) -> list[float]:
    """Return the ``spec.facts`` of an episode from the ``info`` of its last step.

    Raises:
        RloptError: one is missing or is no number.
    """
    found = []
    for name in spec.facts:
        if name not in info:
            there = ", ".join(map(str, info)) or "nothing"
            raise RloptError(f"{spec.id}: the last info of an episode lacks the fact {name!r}; there is {there}")
        try:
            found.append(float(info[name]))
        except (TypeError, ValueError) as e:
            raise RloptError(f"{spec.id}: the fact {name!r} must be a number, not {info[name]!r}") from e
    return found


def facts_info(names: Sequence[str], facts: Array | None, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the facts (N, F) float32 as entries of ``Step.info``; none where no episode has ended."""
    if facts is None:
        return {}
    return dict(zip(names, torch.from_numpy(facts).to(device).unbind(1), strict=True))
