"""Replay: storage (where transitions live) x sampler (which are drawn)."""

from rlopt.buffers.replay import Batch, ReplayBuffer
from rlopt.buffers.rollout import Rollout, RolloutBuffer
from rlopt.buffers.samplers.base import DistinctSampler, Sampler, UniformSampler
from rlopt.buffers.samplers.prioritized import LAPSampler, PrioritizedSampler
from rlopt.buffers.samplers.prioritized_reshuffled import PrioritizedReshuffledSampler
from rlopt.buffers.samplers.reshuffled import ReshuffledSampler
from rlopt.buffers.samplers.sequence import SequenceBatch, SequenceSampler

__all__ = [
    "Batch",
    "DistinctSampler",
    "LAPSampler",
    "PrioritizedReshuffledSampler",
    "PrioritizedSampler",
    "ReplayBuffer",
    "ReshuffledSampler",
    "Rollout",
    "RolloutBuffer",
    "Sampler",
    "SequenceBatch",
    "SequenceSampler",
    "UniformSampler",
]
