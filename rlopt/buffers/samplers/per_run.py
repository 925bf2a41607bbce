"""One sampler for each of several runs that share a ring of transitions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlopt.buffers.samplers.base import Sampler, checked_slots
from rlopt.types import RloptError, State


class RunSamplers:
    """Draws for R runs from a ring whose rows hold R·N environments, run by run; run r draws from its own N alone.

    A minibatch of R·B slots has run r's in its r-th part. To its run each sampler is what it would be alone: it counts
    that run's slots from 0 and has the stream of the run's seed, ``seed + r``.

    Args:
        samplers: one of each run, all of one kind.
        num_envs: R·N.
    """

    def __init__(self, samplers: Sequence[Sampler], num_envs: int) -> None:
        if num_envs % len(samplers):
            raise ValueError(f"{num_envs} environments cannot be shared by {len(samplers)} runs")
        self.samplers, self.width, self.each = list(samplers), num_envs, num_envs // len(samplers)

    def bind(self, slots: int, device: torch.device, seed: int) -> None:
        runs = len(self.samplers)
        for r, sampler in enumerate(self.samplers):
            sampler.bind(slots // runs, device, seed + r)
        self._first = self.each * torch.arange(runs, device=device)[:, None]

    def wrote(self, first: int, count: int, valid: Tensor | None) -> None:
        runs = len(self.samplers)
        by_run = None if valid is None else valid.view(-1, runs, self.each).transpose(0, 1).reshape(runs, -1)
        for r, sampler in enumerate(self.samplers):
            mine = None if by_run is None or bool(by_run[r].all()) else by_run[r]
            sampler.wrote(first // runs, count // runs, mine)

    def sample(self, batch_size: int, size: int) -> tuple[Tensor, Tensor | None]:
        runs = len(self.samplers)
        drawn = [sampler.sample(batch_size // runs, size // runs) for sampler in self.samplers]
        local = torch.stack([index for index, _ in drawn])
        if self.each == 1:
            slots = torch.add(self._first, local, alpha=self.width)
        else:
            slots = (local // self.each) * self.width + local % self.each + self._first
        weights = [weight for _, weight in drawn if weight is not None]
        return slots.flatten(), torch.cat(weights) if weights else None

    def update_priority(self, index: Tensor, priority: Tensor) -> None:
        runs, index = len(self.samplers), checked_slots(index, priority)
        if index.numel() % runs:
            raise RloptError(f"{index.numel()} priorities cannot be shared by {runs} runs; give each as many")
        slots = index.view(runs, -1)
        own = slots % self.width - self._first
        if index.is_cpu and not bool(((own >= 0) & (own < self.each)).all()):
            raise RloptError("priorities of several runs come run by run, each for its own environments' slots")
        local = (slots // self.width) * self.each + own
        for sampler, numbers, values in zip(self.samplers, local, priority.view(runs, -1), strict=True):
            sampler.update_priority(numbers, values)

    def state_dict(self) -> State:
        return {"samplers": [sampler.state_dict() for sampler in self.samplers]}

    def load_state_dict(self, state: State) -> None:
        if len(saved := state.get("samplers", [])) != len(self.samplers):
            raise RloptError(f"the saved samplers are of {len(saved)} runs, these of {len(self.samplers)}")
        for sampler, saved in zip(self.samplers, state["samplers"], strict=True):
            sampler.load_state_dict(saved)
