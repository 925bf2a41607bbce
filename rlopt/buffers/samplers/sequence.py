"""Slices of consecutive transitions, for agents with memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlopt.buffers.replay import ReplayBuffer
from rlopt.buffers.samplers.base import Sampler, SamplerOver
from rlopt.buffers.transition import Batch
from rlopt.types import RloptError, State, map_obs, option

CARRY = "carry/"
"""Extras of this name hold the carry that the agent had when it acted."""


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """Options of slices; ``buffer.sequence_length=…`` on the command line.

    ``BufferConfig`` inherits them; the loop that builds the buffer hands its sampler through ``wrap`` last, so around
    the samplers of several runs, and several samplers of one buffer each::

        sampler = options.wrap(get_sampler(name)(**…))
    """

    sequence_length: int | None = option(None, "transitions per slice, burn-in included (null: no slices)", low=1)
    sequence_start: str = option(
        "any",
        "where slices begin to be learnt from: any transition, or episode (its first)",
        choices=("any", "episode"),
    )
    burn_in: int = option(0, "transitions of a slice that come before what is learnt from", low=0)

    def wrap(self, sampler: Sampler) -> Sampler:
        """Return ``sampler``, or slices that begin where it says. Raises RloptError where options do not fit."""
        if self.sequence_length is not None:
            return SequenceSampler(sampler, self.sequence_length, self.sequence_start, self.burn_in)
        if self.burn_in or self.sequence_start != "any":
            raise RloptError(
                "buffer.burn_in and buffer.sequence_start are about slices: give buffer.sequence_length too"
            )
        return sampler


class SequenceSampler(SamplerOver):
    """Draws slices, in which the transition that the inner sampler chooses is the first one learnt from.

    Before it come up to ``burn_in`` transitions, fewer where its episode began after that (R2D2's burn-in, Kapturowski
    et al. 2019, which renews a stored carry that has grown stale): they are in the slice, and outside its ``mask``.
    A slice ends with its window (termination, truncation, the episode's end, a lost life), before an invalid row, and
    at the newest transition; shorter than L, it is filled up with zeros. Every transition is the first one learnt from
    with the probability that the inner sampler gives it, so short episodes and the ends of long ones are learnt from.

    An agent with memory declares its carry in ``extra_fields`` as ``carry/<name>`` and gives it as it was *before* the
    step; ``batch.carry`` then holds that of each slice's first transition. Priorities are one per slice: see
    ``slice_priority``. n-step windows are not combined with slices, whose agents have the single steps in order.

    Args:
        inner: which transitions begin: uniform, reshuffled, by priority …
        length: L, burn-in included.
        start: ``any`` transition begins, or the first one of an ``episode`` (or life) alone.
        burn_in: transitions before the chosen one.

    Raises:
        RloptError: arguments that leave nothing to learn from, or a burn-in before the start of episodes.
    """

    def __init__(self, inner: Sampler, length: int, start: str = "any", burn_in: int = 0) -> None:
        super().__init__(inner)
        if not 0 <= burn_in < length:
            raise RloptError(
                f"buffer.sequence_length={length} with buffer.burn_in={burn_in} leaves nothing to learn from; give a "
                "length above the burn-in, both included"
            )
        if start not in ("any", "episode"):
            raise RloptError(f"buffer.sequence_start={start!r} is unknown; choose any or episode")
        if start == "episode" and burn_in:
            raise RloptError(f"buffer.burn_in={burn_in}: nothing comes before an episode's start; leave it out")
        self.length, self.start, self.burn_in = length, start, burn_in

    def attach(self, buffer: ReplayBuffer) -> None:
        super().attach(buffer)
        if buffer.n_step != 1:
            raise RloptError(f"agent.n_step={buffer.n_step} is not combined with buffer.sequence_length; use n_step=1")
        device, extras = buffer.device, buffer.layout.extras
        self._steps = torch.arange(self.length, device=device)
        self._following = buffer.num_envs * torch.arange(self.length - self.burn_in, device=device)
        self._carry = {key.removeprefix(CARRY): name for key, name in extras.items() if key.startswith(CARRY)}
        self._extras = {key: name for key, name in extras.items() if not key.startswith(CARRY)}

    def identity(self) -> State:
        return {"kind": "slices", "start": self.start}

    def wrote(self, first: int, count: int, valid: Tensor | None) -> None:
        if self.start == "episode":
            n = self.buffer.num_envs
            begins = self.buffer.begins_window(first // n, count // n)
            valid = begins if valid is None else begins & valid.to(begins.device)
        super().wrote(first, count, valid)

    def batch(self, index: Tensor, weight: Tensor | None) -> Batch:
        """Return the slices (B, L, …) around the slots ``index`` (B,)."""
        buffer, storage = self.buffer, self.buffer.storage
        before = buffer.run_up(index, self.burn_in) if self.burn_in else torch.zeros_like(index)
        stop = before + buffer.windows(index, self._following).inside.sum(1)
        inside, burnt = self._steps < stop[:, None], self._steps < before[:, None]
        first = (index - buffer.num_envs * before) % buffer.layout.slots
        slots = (first[:, None] + buffer.num_envs * self._steps) % buffer.layout.slots
        # Beyond a slice's end its first transition is read again, so that nothing undefined is ever touched.
        flat = torch.where(inside, slots, first[:, None]).flatten()
        packed = storage.gather(flat)

        def shaped(value: Tensor) -> Tensor:
            value = value.reshape(-1, self.length, *value.shape[1:])
            return torch.where(inside.view(*inside.shape, *[1] * (value.ndim - 2)), value, torch.zeros_like(value))

        def leaf(name: str) -> Tensor:
            return shaped(storage.leaf(name, packed, flat))

        obs, next_obs = storage.observations(flat, packed, buffer.rows_written)
        carry = None
        if self._carry:
            starts = storage.gather(first)
            carry = {key: storage.leaf(name, starts, first) for key, name in self._carry.items()}
        valid = inside.float()
        return Batch(
            map_obs(shaped, obs),
            leaf("action"),
            shaped(buffer.transformed(storage.leaf("reward", packed, flat))),
            map_obs(shaped, next_obs),
            leaf("terminated"),
            buffer.gamma * valid,
            weight,
            index,
            {key: leaf(name) for key, name in self._extras.items()},
            valid,
            (inside & ~burnt).float(),
            carry,
        )


def slice_priority(error: Tensor, mask: Tensor, share: float = 0.9) -> Tensor:
    """Return one priority (B,) per slice from the errors δ (B, L) of its transitions.

    share·max |δ| + (1 - share)·mean |δ| over those whose ``mask`` (B, L) is 1 (Kapturowski et al. 2019, "Recurrent
    experience replay in distributed reinforcement learning", section 2.3, with a share of 0.9).
    """
    size = error.detach().abs() * mask
    return share * size.amax(1) + (1.0 - share) * size.sum(1) / mask.sum(1).clamp(min=1.0)
