"""Sequences of consecutive transitions out of a replay buffer, for agents with memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlopt.buffers.replay import ReplayBuffer
from rlopt.types import Obs, RloptError, map_obs


class SequenceBatch(NamedTuple):
    """B slices of consecutive transitions of one episode each, L steps long or as long as the episode lasts.

    Where ``mask`` is 0 every other field is 0.
    """

    obs: Obs
    """(B, L, …)."""
    action: Tensor
    """(B, L, A) in environment units, or (B, L) int64."""
    reward: Tensor
    """(B, L) single rewards."""
    next_obs: Obs
    """(B, L, …)."""
    terminated: Tensor
    """(B, L) float32: 1 where the bootstrap is cut."""
    mask: Tensor
    """(B, L) float32: 1 where there is a transition; ones, then zeros. The first is always there."""
    weight: Tensor | None
    """(B,) importance weights of the slices, None where all are 1."""
    index: Tensor  # type: ignore[assignment]
    """(B,) slots of the first transitions, for ``update_priority``."""
    extras: dict[str, Tensor] = {}
    """(B, L, …). A recurrent state stored with each transition is found for the slice's start at ``[:, 0]``."""


class SequenceSampler:
    """Draws slices that begin at transitions which the buffer's own sampler chooses (so uniform, reshuffled, by
    priority …; nothing here needs saving).

    A slice ends with its episode (terminated, truncated, or reset), before an invalid row, and at the newest
    transition; it is then shorter than L and padded with zeros. Every transition begins a slice with the probability
    that the sampler gives it, so short episodes and the ends of long ones are learnt from too.

    Args:
        buffer: where transitions are; its ``n_step`` plays no part.
        length: L.
    """

    def __init__(self, buffer: ReplayBuffer, length: int) -> None:
        if length < 1:
            raise RloptError(f"a sequence needs a length of at least 1, not {length}")
        self.buffer, self.length = buffer, length
        self._following = buffer.num_envs * torch.arange(length, device=buffer.device)

    def sample(self, batch_size: int) -> SequenceBatch:
        """B = ``batch_size`` slices. Raises RloptError while the buffer holds no transition."""
        buffer, storage = self.buffer, self.buffer.storage
        device = buffer.batch_device
        first, weight = buffer.draw(batch_size)
        slots, inside, _ = buffer.windows(first, self._following)
        # Beyond a slice's end its first transition is read again, so that nothing undefined is ever touched.
        index = torch.where(inside, slots, first[:, None]).flatten()
        packed = storage.gather(index)
        inside = inside.to(device)

        def shaped(value: Tensor) -> Tensor:
            value = value.to(device).reshape(batch_size, self.length, *value.shape[1:])
            return torch.where(inside.view(*inside.shape, *[1] * (value.ndim - 2)), value, torch.zeros_like(value))

        def leaf(name: str) -> Tensor:
            return shaped(storage.leaf(name, packed, index))

        obs, next_obs = storage.observations(index, packed, buffer.rows_written)
        return SequenceBatch(
            map_obs(shaped, obs),
            leaf("action"),
            leaf("reward"),
            map_obs(shaped, next_obs),
            leaf("terminated"),
            inside.float(),
            None if weight is None else weight.to(device),
            first.to(device),
            {key: leaf(name) for key, name in buffer.layout.extras.items()},
        )
