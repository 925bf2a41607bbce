"""Replay: storage (where transitions live) x sampler (which are drawn). And rollouts, which are learnt from at once."""

from rlopt.buffers.replay import ReplayBuffer
from rlopt.buffers.rollout import Rollout, minibatches
from rlopt.buffers.samplers.base import DistinctSampler, Sampler, UniformSampler
from rlopt.buffers.samplers.hindsight import HindsightSampler
from rlopt.buffers.samplers.prioritized import LAPSampler, PrioritizedSampler
from rlopt.buffers.samplers.prioritized_reshuffled import PrioritizedReshuffledSampler
from rlopt.buffers.samplers.reshuffled import ReshuffledSampler
from rlopt.buffers.samplers.sequence import SequenceConfig, SequenceSampler, slice_priority
from rlopt.buffers.transition import REWARD_TRANSFORMS, Batch, Transition, make_reward_transform

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
