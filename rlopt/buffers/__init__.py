"""Replay: storage (where transitions live) x sampler (which are drawn)."""

from rlopt.buffers.replay import Batch, ReplayBuffer
from rlopt.buffers.samplers import Sampler, UniformSampler

__all__ = ["Batch", "ReplayBuffer", "Sampler", "UniformSampler"]
