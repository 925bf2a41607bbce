"""The replay buffer: a ring of packed rows and a sampler over its slots."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.buffers.samplers import Sampler, UniformSampler
from rlopt.types import Obs, RloptError, Space, State, obs_leaves

Fields = dict[str, tuple[tuple[int, ...], torch.dtype]]


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


class ReplayBuffer:
    """Stores transitions of N environments and draws minibatches of them.

    Everything but images is packed side by side into one float32 block (rows, N, width), so that a draw is one gather;
    uint8 leaves lie apart. Indices up to 2**24 are exact in float32.

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
        device: where the data lies and batches come from.
        seed: of the sampler.

    Raises:
        RloptError: the planned size does not fit into the device's free memory.
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
    ) -> None:
        if capacity < num_envs or n_step < 1:
            raise RloptError(
                f"a buffer needs capacity >= num_envs ({num_envs}) and n_step >= 1, not {capacity}, {n_step}"
            )
        self.capacity_rows = math.ceil(capacity / num_envs)
        self.num_envs, self.n_step, self.gamma = num_envs, n_step, gamma
        self.device = torch.device(device)
        self.sampler: Sampler = UniformSampler() if sampler is None else sampler
        self.rows_written = 0
        self._invalid = 0

        fields: Fields = {}
        for prefix in ("obs", "next_obs"):
            for key, leaf in obs_leaves(observation_space).items():
                fields[f"{prefix}/{key}" if key else prefix] = (_shape(leaf), _dtype(leaf))
        fields["action"] = (_shape(action_space), _dtype(action_space))
        for name in ("reward", "terminated", "reset", "valid"):
            fields[name] = ((), torch.float32)
        fields.update({f"extras/{k}": v for k, v in (extra_fields or {}).items()})
        self._single = not isinstance(observation_space, spaces.Dict)
        self.fields = fields
        self._given = fields.keys() - {"valid"}
        self.slices: dict[str, slice] = {}
        width = 0
        for name, (shape, dtype) in fields.items():
            if dtype != torch.uint8:
                size = math.prod(shape)
                self.slices[name] = slice(width, width + size)
                width += size
        images = {name: shape for name, (shape, dtype) in fields.items() if dtype == torch.uint8}
        slots = self.capacity_rows * num_envs
        self.nbytes = slots * (4 * width + sum(math.prod(s) for s in images.values()))
        _check_fits(self.nbytes, slots, self.device)
        self.block = torch.empty((self.capacity_rows, num_envs, width), device=self.device)
        self.images = {
            name: torch.empty((self.capacity_rows, num_envs, *shape), dtype=torch.uint8, device=self.device)
            for name, shape in images.items()
        }
        self.sampler.bind(slots, self.device, seed)
        self._powers = gamma ** torch.arange(n_step + 1, dtype=torch.float32, device=self.device)

    def __len__(self) -> int:
        """Slots that hold transitions (invalid ones included)."""
        return min(self.rows_written, self.capacity_rows) * self.num_envs

    @property
    def transitions(self) -> int:
        """Valid transitions held."""
        return len(self) - self._invalid

    def describe(self) -> str:
        """One line on the planned size."""
        slots = self.capacity_rows * self.num_envs
        size = f"{self.nbytes / slots:,.0f} bytes, {self.nbytes / 2**30:.2f} GiB on {self.device}"
        return f"replay buffer: {slots:,} transitions of {size}"

    def add(
        self,
        obs: Obs,
        action: Tensor,
        reward: Tensor,
        next_obs: Obs,
        terminated: Tensor,
        truncated: Tensor,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
        **extras: Tensor,
    ) -> None:
        """Store one vector step: every argument is (N, …).

        ``reset`` says where an episode ended (by default: where terminated or truncated), ``valid`` which rows are
        transitions at all (by default: all). Raises RloptError where a field is missing or unknown.
        """
        ended = (terminated | truncated) if reset is None else (reset | truncated)
        values: dict[str, Tensor] = {"action": action, "reward": reward, "terminated": terminated, "reset": ended}
        for prefix, tree in (("obs", obs), ("next_obs", next_obs)):
            if isinstance(tree, dict):
                values.update({f"{prefix}/{k}": v for k, v in tree.items()})
            else:
                values[prefix] = tree
        values.update({f"extras/{k}": v for k, v in extras.items()})
        if values.keys() != self._given:
            differ = ", ".join(sorted(values.keys() ^ self._given))
            raise RloptError(f"this step and the buffer's fields differ in {differ}; give each declared field once")
        row = self._claim_row()
        line = self.block[row]
        if valid is None:
            line[:, self.slices["valid"]] = 1.0
        else:
            values["valid"] = valid
            self._invalid += int((~valid).sum())
        for name, value in values.items():
            if name in self.images:
                self.images[name][row].copy_(value)
            else:
                line[:, self.slices[name]].copy_(value.reshape(self.num_envs, -1))
        self.sampler.wrote(row * self.num_envs, self.num_envs)

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
        for tensor in self._tensors().values():
            tensor[row].zero_()
        self._invalid += self.num_envs
        self.sampler.wrote(row * self.num_envs, self.num_envs)

    def sample(self, batch_size: int) -> Batch:
        """Draw a minibatch of ``batch_size`` transitions. Raises RloptError while the buffer holds none."""
        size = len(self)
        if size - self._invalid <= 0:
            raise RloptError("the replay buffer holds no transition yet; add some before sampling")
        index, weight = self.sampler.sample(batch_size, size)
        flat = self.block.view(-1, self.block.shape[-1])
        rows = flat.index_select(0, index)
        if self._invalid:
            index, weight, rows = self._redraw(index, weight, rows, size)
        return self._batch(index, weight, rows)

    def update_priority(self, index: Tensor, priority: Tensor | None) -> None:
        """Tell the sampler the new priorities (B,) of the slots ``index`` (B,); None is ignored."""
        if priority is not None:
            self.sampler.update_priority(index, priority)

    def _redraw(
        self, index: Tensor, weight: Tensor | None, rows: Tensor, size: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Replace the few draws that fell on rows which are no transitions."""
        flat = self.block.view(-1, self.block.shape[-1])
        column = self.slices["valid"].start
        while True:
            bad = (rows[:, column] == 0).nonzero().flatten()
            if bad.numel() == 0:
                return index, weight, rows
            again, again_weight = self.sampler.sample(int(bad.numel()), size)
            index = index.index_copy(0, bad, again)
            rows[bad] = flat.index_select(0, again)
            if weight is not None and again_weight is not None:
                weight = weight.index_copy(0, bad, again_weight)

    def _batch(self, index: Tensor, weight: Tensor | None, rows: Tensor) -> Batch:
        last_index, last_rows = index, rows
        if self.n_step == 1:
            reward = rows[:, self.slices["reward"].start]
            discount = self._powers[1].expand(rows.shape[0])
        else:
            reward, discount, last_index = self._window(index, rows)
            last_rows = self.block.view(-1, self.block.shape[-1]).index_select(0, last_index)
        return Batch(
            obs=self._obs("obs", rows, index),
            action=self._leaf("action", rows, index),
            reward=reward,
            next_obs=self._obs("next_obs", last_rows, last_index),
            terminated=last_rows[:, self.slices["terminated"].start],
            discount=discount,
            weight=weight,
            index=index,
            extras={name[7:]: self._leaf(name, rows, index) for name in self.fields if name.startswith("extras/")},
        )

    def _window(self, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards, discounts and last slots of the n-step windows that begin at ``index``."""
        flat = self.block.view(-1, self.block.shape[-1])
        slots, (r, t, e, v) = flat.shape[0], (self.slices[k].start for k in ("reward", "terminated", "reset", "valid"))
        newest = (self.rows_written - 1) % self.capacity_rows
        reward, last, length = rows[:, r].clone(), index, torch.ones_like(index)
        alive = torch.ones_like(index, dtype=torch.bool)
        for i in range(1, self.n_step):
            ended = (rows[:, t] != 0) | (rows[:, e] != 0) | (last // self.num_envs == newest)
            following = (last + self.num_envs) % slots
            rows = flat.index_select(0, following)
            alive = alive & ~ended & (rows[:, v] != 0)
            reward = reward + torch.where(alive, self._powers[i] * rows[:, r], 0.0)
            last = torch.where(alive, following, last)
            length = length + alive
        return reward, self._powers[length], last

    def _leaf(self, name: str, rows: Tensor, index: Tensor) -> Tensor:
        if name in self.images:
            return self.images[name].flatten(0, 1).index_select(0, index)
        shape, dtype = self.fields[name]
        return rows[:, self.slices[name]].to(dtype).reshape(-1, *shape)

    def _obs(self, prefix: str, rows: Tensor, index: Tensor) -> Obs:
        if self._single:
            return self._leaf(prefix, rows, index)
        names = [name for name in self.fields if name.startswith(prefix + "/")]
        return {name[len(prefix) + 1 :]: self._leaf(name, rows, index) for name in names}

    def state_dict(self) -> State:
        """Everything but the rows, which ``read_rows`` gives in segments."""
        return {"rows_written": self.rows_written, "invalid": self._invalid, "sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: State) -> None:
        self.rows_written, self._invalid = int(state["rows_written"]), int(state["invalid"])
        self.sampler.load_state_dict(state["sampler"])

    def read_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """Rows ``start … stop-1`` since the beginning, (stop - start, N, …), on the CPU."""
        where = torch.arange(start, stop, device=self.device) % self.capacity_rows
        return {name: tensor.index_select(0, where).cpu() for name, tensor in self._tensors().items()}

    def write_rows(self, start: int, rows: dict[str, Tensor]) -> None:
        """Put back what ``read_rows`` gave. Raises ValueError where names or shapes differ from this buffer's."""
        tensors = self._tensors()
        if rows.keys() != tensors.keys() or any(rows[k].shape[1:] != t.shape[1:] for k, t in tensors.items()):
            raise ValueError("saved transitions do not have this buffer's fields")
        for name, tensor in tensors.items():
            where = torch.arange(start, start + rows[name].shape[0], device=self.device) % self.capacity_rows
            tensor.index_copy_(0, where, rows[name].to(self.device))

    def _tensors(self) -> dict[str, Tensor]:
        return {"block": self.block, **self.images}


def _shape(space: Space) -> tuple[int, ...]:
    return tuple(space.shape or ())


def _dtype(space: Space) -> torch.dtype:
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return torch.int64
    return torch.uint8 if space.dtype == np.uint8 else torch.float32


def _check_fits(nbytes: int, slots: int, device: torch.device) -> None:
    free = free_memory(device)
    if free is not None and nbytes > free:
        size = f"{nbytes / 2**30:.1f} GiB, but {device} has {free / 2**30:.1f} GiB free"
        ways = "lower buffer.capacity, choose another buffer.device, or free memory"
        raise RloptError(f"a replay buffer of {slots:,} transitions needs {size}; {ways}")


def free_memory(device: torch.device) -> int | None:
    """Bytes free on ``device``; None where that cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as f:
            for line in f:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
