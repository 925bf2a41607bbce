"""The replay buffer: a storage of transitions and a sampler over its slots."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rlopt.buffers.frames import SideStore
from rlopt.buffers.placement import Placement
from rlopt.buffers.samplers.base import Sampler, UniformSampler
from rlopt.buffers.storage import Fields, Layout, Storage
from rlopt.types import Obs, RloptError, Space, State, map_obs, on_device

_log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """A minibatch of transitions, raw, as the environment gave them."""

    obs: Obs
    """(B, …)."""
    action: Tensor
    """(B, A) in environment units, or (B,) int64."""
    reward: Tensor
    """(B,) the n-step return Σ γ^i r_i of the window."""
    next_obs: Obs
    """(B, …) where the window led."""
    terminated: Tensor
    """(B,) float32: 1 where the bootstrap is cut."""
    discount: Tensor
    """(B,) γ^k, k the true length of the window. The target is reward + discount·(1 - terminated)·V(next_obs)."""
    weight: Tensor | None
    """(B,) importance weights, None where all are 1."""
    index: Tensor  # type: ignore[assignment]
    """(B,) slots, for ``update_priority``."""
    extras: dict[str, Tensor] = {}
    """What the agent declared in ``extra_fields``."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """``function`` of every tensor."""
        return Batch(
            map_obs(function, self.obs),
            function(self.action),
            function(self.reward),
            map_obs(function, self.next_obs),
            function(self.terminated),
            function(self.discount),
            None if self.weight is None else function(self.weight),
            function(self.index),
            {key: function(value) for key, value in self.extras.items()},
        )


class Windows(NamedTuple):
    """What follows B transitions, L steps long at most: slots that belong to one episode of one environment."""

    slots: Tensor
    """(B, L) int64; undefined where not ``inside``."""
    inside: Tensor
    """(B, L) bool: true from the first transition to the last of its episode, the newest, or before an invalid one."""
    reward: Tensor
    """(B, L) single rewards; undefined where not ``inside``."""


class ReplayBuffer:
    """Stores transitions of N environments and draws minibatches of them.

    Everything but images is packed side by side into one float32 block (rows, N, width), so that a draw is one gather;
    uint8 leaves lie apart, and so do Discrete and MultiDiscrete numbers that may lie beyond 2**24. Other numbers of Box
    spaces, integers too, are kept as float32.

    Args:
        capacity: transitions kept; rounded up to a whole number of vector steps.
        observation_space: Box, Discrete, MultiDiscrete, MultiBinary or a flat Dict of them.
        action_space: Box, Discrete or MultiDiscrete.
        num_envs: N, the rows of every ``add``.
        sampler: which transitions are drawn; ``UniformSampler()`` by default.
        n_step: length of the return window. It ends early at the end of an episode (with the true exponent in
            ``discount``), at an invalid row, and at the newest transition; it never crosses any of them.
        gamma: discount inside the window.
        extra_fields: {name: (shape, dtype)} stored with each transition (see ``agent.extra_fields``).
        device: where the data lies: a torch device, or ``disk`` (see ``Placement``).
        seed: of the sampler.
        frame_stack: how many frames the uint8 images hold along their first axis, to store each frame once and rebuild
            the stacks when drawn (see ``frames``); None stores images as they come.
        folder: where ``device="disk"`` makes its files; None for the current directory.
        batch_device: where batches go; None for where the data lies.

    Raises:
        RloptError: the planned size does not fit into the device's free memory, or ``frame_stack`` fits no image.
    """

    def __init__(
        self,
        capacity: int,
        observation_space: Space,
        action_space: Space,
        num_envs: int = 1,
        sampler: Sampler | None = None,
        n_step: int = 1,
        gamma: float = 0.99,
        extra_fields: Fields | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        frame_stack: int | None = None,
        folder: str | Path | None = None,
        batch_device: torch.device | str | None = None,
    ) -> None:
        if capacity < num_envs or n_step < 1:
            raise RloptError(
                f"a buffer needs capacity >= num_envs ({num_envs}) and n_step >= 1, not {capacity}, {n_step}"
            )
        self.capacity_rows = math.ceil(capacity / num_envs)
        self.num_envs, self.n_step, self.gamma = num_envs, n_step, gamma
        self.sampler: Sampler = UniformSampler() if sampler is None else sampler
        self.rows_written = 0
        self._invalid = 0

        layout = Layout(self.capacity_rows, num_envs, observation_space, action_space, extra_fields, frame_stack)
        placement = Placement(device, folder)
        self._plan = _describe(layout, placement)
        _log.info("%s", self._plan)
        self.storage = Storage(layout, placement)
        self.device = placement.device
        self.batch_device = self.device if batch_device is None else torch.device(batch_device)
        self.layout, self.block, self.slices = layout, self.storage.block, layout.slices
        self.sampler.bind(layout.slots, self.device, seed)
        self._powers = gamma ** torch.arange(n_step + 1, dtype=torch.float32, device=self.device)
        self._discount = self._powers[:0]
        self._following = num_envs * torch.arange(n_step, device=self.device)

    def __len__(self) -> int:
        """Slots that hold transitions (invalid ones included)."""
        return min(self.rows_written, self.capacity_rows) * self.num_envs

    @property
    def transitions(self) -> int:
        """Valid transitions held."""
        return len(self) - self._invalid

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.storage.nbytes

    def describe(self) -> str:
        """One line on the planned size; logged before anything is allocated."""
        return self._plan

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
        """Store one vector step: every argument is (N, …).

        ``ended`` says where an episode ended (by default: where terminated or truncated), ``valid`` which rows are
        transitions at all (by default: all). Raises RloptError where a field is missing, unknown or of
        another size, and then stores nothing.
        """
        values = self.layout.step(obs, action, reward, next_obs, terminated, truncated, ended, extras)
        self.storage.check(values, valid)
        row = self._claim_row()
        if valid is not None:
            self._invalid += int((~valid).sum())
        self.storage.write(self.rows_written - 1, values, valid)
        self.sampler.wrote(row * self.num_envs, self.num_envs, valid)

    def _claim_row(self) -> int:
        """The row to write next; forgets the invalid transitions that it held."""
        row = self.rows_written % self.capacity_rows
        if self._invalid and self.rows_written >= self.capacity_rows:
            self._invalid -= int((self.block[row, :, self.slices["valid"]] == 0).sum())
        self.rows_written += 1
        return row

    def add_cut(self) -> None:
        """Store a row of no transitions, which no n-step window crosses."""
        row = self._claim_row()
        self.storage.write_nothing(self.rows_written - 1)
        self._invalid += self.num_envs
        nothing = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        self.sampler.wrote(row * self.num_envs, self.num_envs, nothing)

    def sample(self, batch_size: int) -> Batch:
        """Draw a minibatch of ``batch_size`` transitions. Raises RloptError while the buffer holds none."""
        return self.batch(*self.draw(batch_size))

    def batch(self, index: Tensor, weight: Tensor | None = None) -> Batch:
        """The transitions of the slots ``index`` (B,), which must hold some, with the weights (B,) ``draw`` gave."""
        storage, batch_size = self.storage, index.numel()
        packed = storage.gather(index)
        if self.n_step == 1:
            obs, next_obs = storage.observations(index, packed, self.rows_written)
            if self._discount.numel() != batch_size:
                self._discount = self._powers[1].expand(batch_size)
            reward, discount = storage.leaf("reward", packed, index), self._discount
            terminated = storage.leaf("terminated", packed, index)
        else:
            reward, discount, last = self._returns(index)
            last_packed = storage.gather(last)
            obs = storage.obs("obs", index, packed, self.rows_written)
            next_obs = storage.obs("next_obs", last, last_packed, self.rows_written)
            terminated = storage.leaf("terminated", last_packed, last)
        action = storage.leaf("action", packed, index)
        extras = {key: storage.leaf(name, packed, index) for key, name in self.layout.extras.items()}
        batch = Batch(obs, action, reward, next_obs, terminated, discount, weight, index, extras)
        return batch if self.batch_device == self.device else batch.map(lambda x: on_device(x, self.batch_device))

    def update_priority(self, index: Tensor, priority: Tensor | None) -> None:
        """Tell the sampler the new priorities (B,) of the slots ``index`` (B,); None is ignored."""
        if priority is not None:
            if self.batch_device != self.device:
                index, priority = index.to(self.device), priority.to(self.device)
            self.sampler.update_priority(index, priority)

    def draw(self, batch_size: int) -> tuple[Tensor, Tensor | None]:
        """Slots (B,) of valid transitions and their weights (B,), None where all are 1. Raises as ``sample`` does."""
        size = len(self)
        if size - self._invalid <= 0:
            raise RloptError("the replay buffer holds no transition yet; add some before sampling")
        index, weight = self.sampler.sample(batch_size, size)
        if self._invalid and not self.sampler.excludes_invalid:
            return self._redraw(index, weight, size)
        return index, weight

    def _redraw(self, index: Tensor, weight: Tensor | None, size: int) -> tuple[Tensor, Tensor | None]:
        """Replace the few draws that fell on rows which are no transitions."""
        valid = self.block.view(-1, self.layout.width)[:, self.slices["valid"].start]
        bad = (valid.index_select(0, index) == 0).nonzero().flatten()
        while bad.numel():
            again, again_weight = self.sampler.sample(int(bad.numel()), size)
            index = index.index_copy(0, bad, again)
            if weight is not None and again_weight is not None:
                weight = weight.index_copy(0, bad, again_weight)
            bad = bad[valid.index_select(0, again) == 0]
        return index, weight

    def windows(self, index: Tensor, following: Tensor) -> Windows:
        """The windows that begin at the slots ``index`` (B,); ``following`` (L,) is N·(0 … L - 1)."""
        slots = (index[:, None] + following) % self.layout.slots
        columns = self.block.view(-1, self.layout.width)[:, self.slices["reward"].start : self.slices["valid"].stop]
        reward, terminated, ended, valid = columns.index_select(0, slots.flatten()).view(*slots.shape, 4).unbind(2)
        newest = (self.rows_written - 1) % self.capacity_rows
        over = (terminated != 0) | (ended != 0) | (slots // self.num_envs == newest)
        goes_on = ~over[:, :-1] & (valid[:, 1:] != 0)
        inside = torch.ones_like(over)
        inside[:, 1:] = goes_on.cumprod(1).bool()
        return Windows(slots, inside, reward)

    def _returns(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns, discounts and last slots of the n-step windows that begin at ``index``."""
        slots, inside, rewards = self.windows(index, self._following)
        terms = torch.where(inside, self._powers[:-1] * rewards, 0.0)
        reward = terms[:, 0]
        for i in range(1, self.n_step):  # in this order, which fixes the last bit
            reward = reward + terms[:, i]
        length = inside.sum(1)
        return reward, self._powers.index_select(0, length), slots.gather(1, length[:, None] - 1).squeeze(1)

    # Saving

    def state_dict(self) -> State:
        """Everything but the rows, which ``read_rows`` gives in segments."""
        state = {"rows_written": self.rows_written, "invalid": self._invalid, "sampler": self.sampler.state_dict()}
        frames = self.storage.state_dict(self.rows_written)
        return {**state, "frames": frames} if frames else state

    def load_state_dict(self, state: State) -> None:
        """Continue where ``state_dict`` stood. With single frames this comes before ``write_rows`` of the
        ``side_stores``."""
        self.rows_written, self._invalid = int(state["rows_written"]), int(state["invalid"])
        self.sampler.load_state_dict(state["sampler"])
        self.storage.load_state_dict(state.get("frames", {}), self.rows_written)

    def side_stores(self) -> dict[str, SideStore]:
        """Row logs to be saved beside this one: frames that are in no row."""
        return self.storage.side_stores()

    def read_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """Rows ``start … stop-1`` since the beginning, (stop - start, N, …), on the CPU."""
        return self.storage.read_rows(start, stop)

    def write_rows(self, start: int, rows: dict[str, Tensor]) -> None:
        """Put back what ``read_rows`` gave. Raises ValueError where names or shapes differ from this buffer's."""
        self.storage.write_rows(start, rows)


def _describe(layout: Layout, placement: Placement) -> str:
    each, size = layout.nbytes / layout.slots, layout.nbytes / 2**30
    return f"replay buffer: {layout.slots:,} transitions of {each:,.0f} bytes, {size:.2f} GiB on {placement}"
