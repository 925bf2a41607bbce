"""Replay: storage (where transitions live) x sampler (which are drawn)."""

from rlopt.buffers.prioritized import LAPSampler, PrioritizedSampler
from rlopt.buffers.prioritized_reshuffled import PrioritizedReshuffledSampler
from rlopt.buffers.replay import Batch, ReplayBuffer
from rlopt.buffers.reshuffled import ReshuffledSampler
from rlopt.buffers.rollout import Rollout, RolloutBuffer
from rlopt.buffers.samplers import DistinctSampler, Sampler, UniformSampler
from rlopt.buffers.sequence import SequenceBatch, SequenceSampler

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
