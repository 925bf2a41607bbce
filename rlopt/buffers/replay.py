"""The replay buffer: a storage of transitions, and samplers over its slots."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlopt.buffers.datasets import store
from rlopt.buffers.frames import SideStore
from rlopt.buffers.layout import Fields, Layout
from rlopt.buffers.placement import Placement
from rlopt.buffers.reset_rows import ResetRowWatch
from rlopt.buffers.samplers.base import NothingToDraw, Sampler, SamplerOver, UniformSampler, check_identity
from rlopt.buffers.storage import Storage
from rlopt.buffers.transition import Batch, make_reward_transform
from rlopt.random import derive_seed
from rlopt.types import RloptError, Space, State, on_device

_log = logging.getLogger(__name__)
_WHOLE = (int, np.integer)


class Windows(NamedTuple):
    """What follows B transitions, L steps long at most: slots that belong to one episode of one environment."""

    slots: Tensor
    """(B, L) int64; undefined where not ``inside``."""
    inside: Tensor
    """(B, L) bool: true from the first transition to the last of its episode, the newest, or before an invalid one."""
    reward: Tensor
    """(B, L) or (B, L, n) single rewards, raw; undefined where not ``inside``."""


class ReplayBuffer:
    """Stores transitions of N environments and draws minibatches of them.

    Everything but images and masks is packed side by side into one float32 block (rows, N, width), so that a draw is
    one gather; uint8 and bool leaves lie apart, and so do Discrete and MultiDiscrete numbers that may lie beyond 2**24.
    Other numbers of Box spaces, integers too, are kept as float32.

    Args:
        capacity: transitions kept; rounded up to a whole number of vector steps.
        observation_space: Box, Discrete, MultiDiscrete, MultiBinary or a flat Dict of them. Several agents are an axis
            of the leaves.
        action_space: Box, Discrete, MultiDiscrete or MultiBinary.
        num_envs: N, the rows of every ``add``.
        sampler: which transitions are drawn; ``UniformSampler()`` by default. Several samplers over the same
            transitions are a dict of them by name; a draw is then a dict of minibatches.
        n_step: length of the return window. It ends early at the end of an episode (with the true exponent in
            ``discount``), at an invalid row, and at the newest transition; it never crosses any of them.
        gamma: discount inside the window.
        extra_fields: {name: (shape, dtype)} stored with each transition (see ``agent.extra_fields``).
        device: where the data lies: a torch device, or ``disk`` (see ``Placement``).
        seed: of the samplers.
        frame_stack: how many frames the uint8 images hold along their first axis, to store each frame once and rebuild
            the stacks when drawn (see ``frames``); None stores images as they come.
        folder: where ``device="disk"`` makes its files; None for the current directory.
        batch_device: where batches go; None for where the data lies.
        reward_transform: ``sign`` or ``clip`` (to [-1, 1]) of each single reward, made when it is drawn and before
            n-step sums; None or ``raw`` for none. What is stored is raw.
        reward_shape: () for one reward per environment, (n,) where its n agents are paid apart.
        derived: leaves that are gathered from the leaf ``state`` when they are drawn, instead of stored
            (see ``Layout``; ``spec.derived``).
        masks: {name of a sampler: name of a bool extra}: that sampler draws only transitions whose extra is true.
        planned: transitions that are going to be stored, where they may be fewer than ``capacity``: the size that is
            told and compared with the free memory is theirs. What is drawn does not depend on it.

    Raises:
        RloptError: the planned size does not fit into the device's free memory, ``frame_stack`` fits no image, or
            arguments do not go together.
    """

    def __init__(
        self,
        capacity: int,
        observation_space: Space,
        action_space: Space,
        num_envs: int = 1,
        sampler: Sampler | Mapping[str, Sampler] | None = None,
        n_step: int = 1,
        gamma: float = 0.99,
        extra_fields: Fields | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        frame_stack: int | None = None,
        folder: str | Path | None = None,
        batch_device: torch.device | str | None = None,
        reward_transform: str | None = None,
        reward_shape: tuple[int, ...] = (),
        derived: Mapping[str, Tensor | tuple[Any, ...]] | None = None,
        masks: Mapping[str, str] | None = None,
        planned: int | None = None,
    ) -> None:
        if capacity < num_envs or n_step < 1:
            raise RloptError(
                f"a buffer needs capacity >= num_envs ({num_envs}) and n_step >= 1, not {capacity}, {n_step}"
            )
        self.capacity_rows = math.ceil(capacity / num_envs)
        self.num_envs, self.n_step, self.gamma = num_envs, n_step, gamma
        self.reward_shape, self._transform = reward_shape, make_reward_transform(reward_transform)
        self.rows_written = 0
        self._invalid = 0
        self._watch = ResetRowWatch()
        self.forgotten = 0
        """Transitions that were lost before this buffer was resumed."""
        self.several = isinstance(sampler, Mapping)
        """Whether draws are dicts of minibatches."""
        self.samplers: dict[str, Sampler] = (
            dict(sampler) if isinstance(sampler, Mapping) else {"": sampler or UniformSampler()}
        )
        fields = _masks(masks or {}, self.samplers, extra_fields or {})
        self._listeners = [(each, fields.get(name)) for name, each in self.samplers.items()]

        layout = Layout(
            self.capacity_rows,
            num_envs,
            observation_space,
            action_space,
            extra_fields,
            frame_stack,
            reward_shape,
            derived,
        )
        placement = Placement(device, folder)
        self._plan = _describe(layout, placement, planned)
        _log.info("%s", self._plan)
        self.device = placement.device
        self.batch_device = self.device if batch_device is None else torch.device(batch_device)
        self._stays = self.batch_device == self.device
        self.storage = Storage(layout, placement, planned, self._stays)
        self.layout, self.block, self.slices = layout, self.storage.block, layout.slices
        side_by_side = slice(layout.slices["reward"].start, layout.slices["valid"].stop)
        self._rewards_and_flags = self.block.view(-1, layout.width)[:, side_by_side]
        self._powers = gamma ** torch.arange(n_step + 1, dtype=torch.float32, device=self.device)
        self._discount = self._powers[:0]
        self._following = num_envs * torch.arange(n_step, device=self.device)
        self._makers: dict[str, Callable[[Tensor, Tensor | None], Batch]] = {}
        for name, each in self.samplers.items():
            # A sum: run r's samplers are seeded as if its seed, ``seed + r``, were the buffer's.
            each.bind(layout.slots, self.device, seed + derive_seed(0, "sampler", name) if self.several else seed)
            self._makers[name] = self.gather
            if isinstance(each, SamplerOver):
                each.attach(self)
                self._makers[name] = each.batch
        self._make = next(iter(self._makers.values()))

    @property
    def sampler(self) -> Sampler:
        """The one sampler. Raises RloptError where there are several."""
        if self.several:
            raise RloptError(f"this buffer has the samplers {', '.join(self.samplers)}; name one: buffer.samplers[…]")
        return self.samplers[""]

    @property
    def gathers_only(self) -> bool:
        """Whether a minibatch is one gather of the slots drawn and nothing else, so that a recorded graph may repeat
        it."""
        plain = not self.several and not isinstance(self.sampler, SamplerOver)
        return plain and self.n_step == 1 and not self.layout.frames

    def __len__(self) -> int:
        """Return how many slots hold transitions (invalid ones included)."""
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
        """Return one line on the planned size; it was logged before anything was allocated."""
        return self._plan

    def add(
        self,
        obs: Any,
        action: Any,
        reward: Any,
        next_obs: Any,
        terminated: Any,
        truncated: Any,
        ended: Any = None,
        valid: Any = None,
        **extras: Any,
    ) -> None:
        """Store one vector step: every argument is (N, …), a tensor or an array; see ``Transition``.

        ``ended`` says where an episode ended (by default: where terminated or truncated), ``valid`` which rows are
        transitions at all (by default: all). Of one environment the axis may be left out.

        Raises:
            RloptError: a field is missing, unknown, or of another size or kind; nothing is stored then.
        """
        values = self.layout.values(obs, action, reward, next_obs, terminated, truncated, ended, extras)
        if ended is None and valid is None and not self._watch.done:  # a loop of the user's
            self._watch.see(values, self.rows_written)
        if valid is not None:
            valid = self.layout.flag("valid", valid)
        if self.storage.frames:
            self.storage.check(values, valid)
        if self.rows_written == 0 and self.storage.derived:
            self.storage.check_derived(obs, next_obs)
        if valid is not None:
            self._invalid += int((~valid).sum())
        row = self.claim(1)
        self.storage.write(self.rows_written - 1, values, valid)
        self.tell(row, 1, values, valid)

    def extend(self, dataset: Any) -> None:
        """Store a data set of single transitions in the order in which they happened.

        Args:
            dataset: {``obs``, ``action``, ``reward``, ``next_obs``, ``terminated``, ``truncated`` and, where they
                differ, ``ended``: (M, …)} with the observations' leaves as dicts and extras by name; or a Minari data
                set. What is missing at its end (neither flag) counts as cut: no window goes on into what comes next.

        Raises:
            RloptError: the buffer is of several environments, the data set is larger than it or does not fit it.
        """
        store(self, dataset)

    def claim(self, rows: int) -> int:
        """Return the first of the rows to write next, which the ring holds side by side; forget the invalid
        transitions that they held."""
        first = self.rows_written % self.capacity_rows
        if self._invalid and self.rows_written >= self.capacity_rows:
            self._invalid -= int((self.block[first : first + rows, :, self.slices["valid"]] == 0).sum())
        self.rows_written += rows
        return first

    def tell(self, row: int, rows: int, values: Mapping[str, Tensor], valid: Tensor | None) -> None:
        """Tell the samplers of rows that were written."""
        count = rows * self.num_envs
        for sampler, mask in self._listeners:
            drawable = valid
            if mask is not None:
                allowed = values[mask].reshape(count).to(torch.bool)
                drawable = allowed if valid is None else allowed & valid.to(allowed.device)
            sampler.wrote(row * self.num_envs, count, drawable)

    def add_cut(self) -> None:
        """Store a row of no transitions, which no n-step window crosses."""
        row = self.claim(1)
        self.storage.write_nothing(self.rows_written - 1)
        self._invalid += self.num_envs
        nothing = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        for sampler in self.samplers.values():
            sampler.wrote(row * self.num_envs, self.num_envs, nothing)

    def sample(self, batch_size: int) -> Any:
        """Draw a ``Batch`` of ``batch_size`` transitions, or of slices where the sampler is a ``SequenceSampler``.

        Of several samplers a dict of batches by name, without those that have nothing to draw yet.

        Raises:
            RloptError: while there is nothing to draw, or ``batch_size`` is no positive integer.
        """
        if not self.several:
            return self._moved(self._make(*self.draw(batch_size)))
        batches: dict[str, Batch] = {}
        for name in self.samplers:
            try:
                batches[name] = self._moved(self._makers[name](*self.draw(batch_size, name)))
            except NothingToDraw:
                continue
        if not batches:
            raise NothingToDraw
        return batches

    def draw(self, batch_size: int, sampler: str = "") -> tuple[Tensor, Tensor | None]:
        """Return slots (B,) that the sampler of that name chooses, and their weights (B,), None where all are 1.
        Raises as ``sample`` does."""
        size = len(self)
        if size - self._invalid <= 0:
            raise NothingToDraw
        if not isinstance(batch_size, _WHOLE) or batch_size < 1:
            raise RloptError(f"a minibatch has a whole number of transitions, at least 1, not {batch_size}")
        return self.samplers[sampler].sample(int(batch_size), size)

    def batch(self, index: Tensor, weight: Tensor | None = None, sampler: str = "") -> Batch:
        """Return the batch that the sampler of that name makes of the slots ``index`` (B,), with the weights (B,) that
        ``draw`` gave.

        Raises:
            RloptError: ``index`` is not of whole numbers (B,) or, where the host can see it, of slots that hold
                something.
        """
        index = self._here(index)
        if index.dtype != torch.int64 or index.dim() != 1:
            raise RloptError(f"slots are int64 (B,), not {index.dtype} {tuple(index.shape)}")
        if index.is_cpu and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise RloptError(
                f"slots reach from {int(index.min())} to {int(index.max())}; those written are 0 … {len(self) - 1}"
            )
        return self._moved(self._makers[sampler](index, weight))

    def _moved(self, batch: Batch) -> Batch:
        return batch if self._stays else batch.map(lambda x: on_device(x, self.batch_device))

    def gather(self, index: Tensor, weight: Tensor | None = None) -> Batch:
        """Return the transitions of the slots ``index`` (B,), where the data lies."""
        storage, batch_size = self.storage, index.numel()
        packed = storage.gather(index)
        if self.n_step == 1:
            obs, next_obs = storage.observations(index, packed, self.rows_written)
            if self._discount.numel() != batch_size:
                self._discount = self._powers[1].expand(batch_size)
            reward, discount = storage.leaf("reward", packed, index), self._discount
            if self._transform is not None:
                reward = self._transform(reward)
            terminated = storage.leaf("terminated", packed, index)
        else:
            reward, discount, last = self._returns(index)
            last_packed = storage.gather(last)
            obs = storage.obs("obs", index, packed, self.rows_written)
            next_obs = storage.obs("next_obs", last, last_packed, self.rows_written)
            terminated = storage.leaf("terminated", last_packed, last)
        action = storage.leaf("action", packed, index)
        extras = {key: storage.leaf(name, packed, index) for key, name in self.layout.extras.items()}
        return Batch(obs, action, reward, next_obs, terminated, discount, weight, index, extras)

    def transformed(self, reward: Tensor) -> Tensor:
        """Return single rewards (…) as learning takes them."""
        return reward if self._transform is None else self._transform(reward)

    def update_priority(self, index: Any, priority: Any) -> None:
        """Tell the sampler the new priorities (B,) of the slots ``index`` (B,), tensors or arrays; None is ignored. Of
        several samplers both are dicts by name."""
        if priority is None:
            return
        if not self.several:
            self.samplers[""].update_priority(self._here(index), self._here(priority))
            return
        for name, values in priority.items():
            if values is not None:
                self.samplers[name].update_priority(self._here(index[name]), self._here(values))

    def _here(self, values: Any) -> Tensor:
        """Return ``values`` as a tensor where the data lies."""
        tensor = values if isinstance(values, Tensor) else torch.as_tensor(values)
        return tensor if self._stays else tensor.to(self.device)

    def windows(self, index: Tensor, following: Tensor) -> Windows:
        """Return the windows that begin at the slots ``index`` (B,); ``following`` (L,) is N·(0 … L - 1)."""
        slots = (index[:, None] + following) % self.layout.slots
        columns = self._columns(slots)
        *_, terminated, ended, valid = columns.unbind(2)
        newest = (self.rows_written - 1) % self.capacity_rows
        over = (terminated != 0) | (ended != 0) | (slots // self.num_envs == newest)
        goes_on = ~over[:, :-1] & (valid[:, 1:] != 0)
        inside = torch.ones_like(over)
        inside[:, 1:] = goes_on.cumprod(1).bool()
        return Windows(slots, inside, columns[..., :-3] if self.reward_shape else columns[..., 0])

    def run_up(self, index: Tensor, steps: int) -> Tensor:
        """Return how many transitions (B,), at most ``steps``, lead up to the slots ``index`` (B,) in the same
        window."""
        row, rows = index // self.num_envs, self.capacity_rows
        # The same rows of a ring that never wraps.
        number = row + (self.rows_written - 1 - row).div(rows, rounding_mode="floor") * rows
        held = number - max(0, self.rows_written - rows)
        back = torch.arange(1, steps + 1, device=index.device)
        slots = (index[:, None] - self.num_envs * back) % self.layout.slots
        *_, terminated, ended, valid = self._columns(slots).unbind(2)
        leads = (terminated == 0) & (ended == 0) & (valid != 0) & (back <= held[:, None])
        return leads.cumprod(1).sum(1)

    def begins_window(self, row: int, rows: int) -> Tensor:
        """Return which transitions (rows · N,) of the newest rows, those from this place of the ring on, follow none
        of the same window."""
        before = (torch.arange(row - 1, row + rows - 1, device=self.device)) % self.capacity_rows
        flags = self.block[before, :, self.slices["terminated"].start : self.slices["valid"].stop]
        terminated, ended, valid = flags.unbind(2)
        begins = (terminated != 0) | (ended != 0) | (valid == 0)
        if self.rows_written <= rows or self.capacity_rows == 1:
            begins[0] = True  # nothing comes before the first row
        return begins.flatten()

    def _columns(self, slots: Tensor) -> Tensor:
        """Return rewards and flags (B, L, n + 3) of the slots (B, L)."""
        return self._rewards_and_flags.index_select(0, slots.flatten()).view(*slots.shape, -1)

    def _returns(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return n-step returns, discounts and last slots of the windows that begin at ``index``."""
        slots, inside, rewards = self.windows(index, self._following)
        counted, powers = inside, self._powers[:-1]
        if self.reward_shape:
            counted, powers = counted[..., None], powers[:, None]
        terms = torch.where(counted, powers * self.transformed(rewards), 0.0)
        reward = terms[:, 0]
        for i in range(1, self.n_step):  # in this order, which fixes the last bit
            reward = reward + terms[:, i]
        length = inside.sum(1)
        return reward, self._powers.index_select(0, length), slots.gather(1, length[:, None] - 1).squeeze(1)

    # Saving

    def state_dict(self) -> State:
        """Return everything but the rows, which ``read_rows`` gives in segments."""
        samplers = {name: sampler.state_dict() for name, sampler in self.samplers.items()}
        state: State = {"rows_written": self.rows_written, "invalid": self._invalid, "of": self._identity()}
        state |= {"samplers": samplers} if self.several else {"sampler": samplers[""]}
        frames = self.storage.state_dict(self.rows_written)
        return {**state, "frames": frames} if frames else state

    def load_state_dict(self, state: State) -> None:
        """Continue where ``state_dict`` stood. With single frames this comes before ``write_rows`` of the
        ``side_stores``.

        Raises:
            RloptError: the state is of a buffer of another capacity, of other fields or other samplers.
        """
        check_identity(state, self._identity(), "replay buffer")
        saved = state["samplers"] if self.several else {"": state["sampler"]}
        for name, sampler in self.samplers.items():
            sampler.load_state_dict(saved[name])
        self.rows_written, self._invalid = int(state["rows_written"]), int(state["invalid"])
        self.storage.load_state_dict(state.get("frames", {}), self.rows_written)

    def _identity(self) -> State:
        """Return what a state must fit."""
        layout = self.layout
        fields = {name: f"{str(dtype)[6:]} {shape}" for name, (shape, dtype) in layout.fields.items()}
        samplers = ", ".join(self.samplers) if self.several else "one"
        size = {"rows": self.capacity_rows, "environments": self.num_envs, "frame stack": layout.frame_stack}
        return {**size, "samplers": samplers, **fields}

    def side_stores(self) -> dict[str, SideStore]:
        """Return row logs to be saved beside this one: frames that are in no row."""
        return self.storage.side_stores()

    def read_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return rows ``start … stop-1`` since the beginning, (stop - start, N, …), on the CPU."""
        return self.storage.read_rows(start, stop)

    def write_rows(self, start: int, rows: dict[str, Tensor]) -> None:
        """Put back what ``read_rows`` gave. Raises ValueError where names, shapes or types are not this buffer's."""
        self.storage.write_rows(start, rows)

    def forget_rows(self, start: int, stop: int) -> None:
        """Make rows ``start … stop-1``, which are lost, rows of no transitions; with single frames also those around
        them, whose images lay there in part."""
        if self.layout.frame_stack is not None:
            start, stop = start - 1, stop + self.layout.frame_stack - 1
        oldest = max(0, self.rows_written - self.capacity_rows)
        nothing = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        for number in range(max(start, oldest), min(stop, self.rows_written)):
            self.storage.forget(number)
            for sampler in self.samplers.values():
                sampler.wrote(number % self.capacity_rows * self.num_envs, self.num_envs, nothing)
        held = self.block[: len(self) // self.num_envs, :, self.slices["valid"]]
        before, self._invalid = self._invalid, int((held == 0).sum())
        self.forgotten += self._invalid - before


def _masks(masks: Mapping[str, str], samplers: Mapping[str, Sampler], fields: Fields) -> dict[str, str]:
    """Return the stored fields that say what each sampler may draw."""
    for name, extra in masks.items():
        if name not in samplers:
            raise RloptError(f"masks names the sampler {name!r}; there are {', '.join(samplers)}")
        if fields.get(extra) != ((), torch.bool):
            raise RloptError(
                f"the mask {extra!r} of the sampler {name!r} must be declared in extra_fields as ((), bool)"
            )
    return {name: f"extras/{extra}" for name, extra in masks.items()}


def _describe(layout: Layout, placement: Placement, planned: int | None) -> str:
    each, size = layout.nbytes / layout.slots, placement.taken(layout.nbytes, layout.slots, planned)
    part = "" if size == layout.nbytes else f"{planned:,} of "
    what = f"{part}{layout.slots:,} transitions of {each:,.0f} bytes"
    spare = planned is not None and planned < layout.slots and size == layout.nbytes
    fewer = f" at once; the run stores {planned:,} (buffer.capacity)" if spare else ""
    return f"replay buffer: {what}, {size / 2**30:.2f} GiB on {placement}{fewer}"
