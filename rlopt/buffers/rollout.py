"""On-policy data: T steps of N environments, drawn for some epochs in shuffled minibatches, then forgotten."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlopt.buffers.placement import Placement
from rlopt.buffers.samplers.reshuffled import ReshuffledSampler
from rlopt.buffers.storage import Fields, Layout, Storage
from rlopt.types import Obs, RloptError, Space, map_obs


class Rollout(NamedTuple):
    """Transitions as they were stored: (T, N, …) from ``RolloutBuffer.rollout``, (B, …) from ``minibatches``."""

    obs: Obs
    action: Tensor
    reward: Tensor
    next_obs: Obs
    terminated: Tensor
    """float32: 1 where the bootstrap is cut."""
    ended: Tensor
    """float32: 1 where the episode ended, truncation included."""
    valid: Tensor
    """float32: 0 where this is no transition; minibatches hold none of those."""
    extras: dict[str, Tensor]


class RolloutBuffer:
    """Holds T vector steps and draws them without replacement, for K epochs, by random reshuffling.

    Steps go in through the same ``add`` as a replay buffer's. What is known only afterwards (returns, advantages) is
    declared in ``computed`` and given at once by ``fill``::

        while not buffer.full:
            ...
            buffer.add(obs, action, reward, next_obs, terminated, truncated, ended, valid, log_prob=log_prob)
        advantage = gae(buffer.rollout(), ...)
        buffer.fill(advantage=advantage)
        for batch in buffer.minibatches(epochs=10, batch_size=64, generator=generator):
            ...
        buffer.clear()

    Args:
        length: T.
        observation_space: as of ``ReplayBuffer``; so are action_space, num_envs, extra_fields, device, frame_stack.
        computed: {name: (shape, dtype)} of extras that ``fill`` gives.
    """

    def __init__(
        self,
        length: int,
        observation_space: Space,
        action_space: Space,
        num_envs: int = 1,
        extra_fields: Fields | None = None,
        computed: Fields | None = None,
        device: torch.device | str = "cpu",
        frame_stack: int | None = None,
    ) -> None:
        if length < 1:
            raise RloptError(f"a rollout needs a length of at least 1, not {length}")
        self.length, self.num_envs = length, num_envs
        self._computed = dict(computed or {})
        both = self._computed.keys() & (extra_fields or {}).keys()
        if both:
            raise RloptError(f"{', '.join(sorted(both))}: declared both in extra_fields and in computed; choose one")
        extras = {**(extra_fields or {}), **self._computed}
        self.layout = Layout(length, num_envs, observation_space, action_space, extras, frame_stack)
        self.storage = Storage(self.layout, Placement(device))
        self.device = self.storage.device
        shape = (num_envs,)
        self._blank = {
            self.layout.extras[name]: torch.zeros((*shape, *form), dtype=dtype, device=self.device)
            for name, (form, dtype) in self._computed.items()
        }
        self._filled: set[str] = set()
        self.rows_written = 0

    @property
    def full(self) -> bool:
        """Whether T steps are held."""
        return self.rows_written == self.length

    def add(
        self,
        obs: Obs,
        action: Tensor,
        reward: Tensor,
        next_obs: Obs,
        terminated: Tensor,
        truncated: Tensor,
        ended: Tensor | None = None,
        valid: Tensor | None = None,
        **extras: Tensor,
    ) -> None:
        """Store one vector step, as ``ReplayBuffer.add`` does. Raises RloptError where T are held already."""
        if self.full:
            raise RloptError(f"the rollout holds its {self.length} steps; clear it before the next one")
        values = self.layout.step(obs, action, reward, next_obs, terminated, truncated, ended, extras)
        if given := self._blank.keys() & values.keys():
            raise RloptError(f"{', '.join(sorted(given))}: computed afterwards; give it to fill")
        values.update(self._blank)
        self.storage.check(values, valid)
        self.storage.write(self.rows_written, values, valid)
        self.rows_written += 1

    def fill(self, **computed: Tensor) -> None:
        """Give every value (steps so far, N, …) of the extras named in ``computed``."""
        for name, value in computed.items():
            if name not in self._computed:
                raise RloptError(
                    f"{name} is not declared in computed ({', '.join(self._computed) or 'which is empty'})"
                )
            held = self.storage.held(self.layout.extras[name], self.rows_written)
            held.copy_(value.reshape(held.shape))
            self._filled.add(name)

    def clear(self) -> None:
        """Forget everything held, to begin the next rollout."""
        self.rows_written = 0
        self._filled.clear()
        self.storage.restart()

    def rollout(self) -> Rollout:
        """Everything held so far, (T, N, …)."""
        shape = (self.rows_written, self.num_envs)
        held = self._read(torch.arange(math.prod(shape), device=self.device))

        def shaped(value: Tensor) -> Tensor:
            return value.reshape(*shape, *value.shape[1:])

        return Rollout(
            map_obs(shaped, held.obs),
            shaped(held.action),
            shaped(held.reward),
            map_obs(shaped, held.next_obs),
            shaped(held.terminated),
            shaped(held.ended),
            shaped(held.valid),
            {key: shaped(value) for key, value in held.extras.items()},
        )

    def minibatches(self, epochs: int, batch_size: int, generator: torch.Generator) -> Iterator[Rollout]:
        """Each valid transition once per epoch, in a fresh order each time, drawn by ``ReshuffledSampler``.

        The last minibatch of an epoch is smaller where ``batch_size`` does not divide the number of transitions. One
        number is taken from ``generator``. Raises RloptError where a computed extra has not been filled.
        """
        if missing := self._computed.keys() - self._filled:
            raise RloptError(f"{', '.join(sorted(missing))}: not computed yet; call fill first")
        valid = self.storage.held("valid", self.rows_written).flatten().nonzero().flatten()
        count = valid.numel()
        if count == 0 or batch_size < 1:
            raise RloptError(f"minibatches of {batch_size} out of {count} transitions: there is nothing to draw")
        sampler = ReshuffledSampler()
        seed = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
        sampler.bind(count, self.device, seed)
        sampler.wrote(0, count, None)
        for _ in range(epochs):
            for drawn in range(0, count, batch_size):
                index, _ = sampler.sample(min(batch_size, count - drawn), count)
                yield self._read(valid.index_select(0, index))

    def _read(self, index: Tensor) -> Rollout:
        storage = self.storage
        packed = storage.gather(index)
        obs, next_obs = storage.observations(index, packed, self.rows_written)
        action, reward, terminated, ended, valid = (
            storage.leaf(name, packed, index) for name in ("action", "reward", "terminated", "ended", "valid")
        )
        extras = {key: storage.leaf(name, packed, index) for key, name in self.layout.extras.items()}
        return Rollout(obs, action, reward, next_obs, terminated, ended, valid, extras)
