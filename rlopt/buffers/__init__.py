"""Replay: storage (where transitions live) x sampler (which are drawn). And rollouts, which are learnt from at once.

Samplers that draw by priority are imported when first used: their machine code takes a while to load.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlopt.buffers.replay import ReplayBuffer
from rlopt.buffers.rollout import Rollout, minibatches
from rlopt.buffers.samplers.base import DistinctSampler, Sampler, UniformSampler
from rlopt.buffers.samplers.hindsight import HindsightSampler
from rlopt.buffers.samplers.reshuffled import ReshuffledSampler
from rlopt.buffers.samplers.sequence import SequenceConfig, SequenceSampler, slice_priority
from rlopt.buffers.transition import REWARD_TRANSFORMS, Batch, Transition, make_reward_transform

if TYPE_CHECKING:
    from rlopt.buffers.samplers.prioritized import LAPSampler, PrioritizedSampler
    from rlopt.buffers.samplers.prioritized_reshuffled import PrioritizedReshuffledSampler

__all__ = [
    "REWARD_TRANSFORMS",
    "Batch",
    "DistinctSampler",
    "HindsightSampler",
    "LAPSampler",
    "PrioritizedReshuffledSampler",
    "PrioritizedSampler",
    "ReplayBuffer",
    "ReshuffledSampler",
    "Rollout",
    "Sampler",
    "SequenceConfig",
    "SequenceSampler",
    "Transition",
    "UniformSampler",
    "make_reward_transform",
    "minibatches",
    "slice_priority",
]

_HOMES = {
    "LAPSampler": "prioritized",
    "PrioritizedReshuffledSampler": "prioritized_reshuffled",
    "PrioritizedSampler": "prioritized",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rlopt.buffers' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rlopt.buffers.samplers.{_HOMES[name]}"), name)
