"""Where transitions live: a ring of rows of N environments' transitions, packed so that a draw is one gather."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.buffers.frames import FrameRing, SideStore, plan_frames
from rlopt.buffers.placement import Placement
from rlopt.types import Obs, RloptError, Space, State, obs_leaves

Fields = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""{name: (shape, dtype)} of what a transition holds."""
EXACT = (torch.float32, torch.float16, torch.bool, torch.int8, torch.int16)
"""Types that float32 holds exactly (uint8 is kept as bytes all the same)."""
LARGEST = 2**24
"""Up to here float32 holds every integer."""
FLAGS = ("reward", "terminated", "ended", "valid")


class Layout:
    """What a storage will hold and how large it is; allocates nothing.

    Leaves that float32 holds exactly are packed side by side into one block (rows, N, width). Bytes, and integers that
    may lie beyond 2**24, lie apart in their own type. With ``frame_stack`` = k, uint8 leaves of at least two axes, the
    first a multiple of k, are kept as single frames.

    Raises:
        RloptError: ``frame_stack`` fits none of the observations.
    """

    def __init__(
        self,
        rows: int,
        num_envs: int,
        observation_space: Space,
        action_space: Space,
        extra_fields: Fields | None = None,
        frame_stack: int | None = None,
    ) -> None:
        self.rows, self.num_envs, self.frame_stack = rows, num_envs, frame_stack
        self.single = not isinstance(observation_space, spaces.Dict)
        leaves = obs_leaves(observation_space)
        self.names = {p: {key: f"{p}/{key}" if key else p for key in leaves} for p in ("obs", "next_obs")}
        self.stacks = {key: _shape(leaf) for key, leaf in leaves.items() if _is_stack(leaf, frame_stack)}
        if frame_stack is not None and not self.stacks:
            shapes = ", ".join(str(_shape(leaf)) for leaf in leaves.values())
            raise RloptError(
                f"buffer.frame_stack={frame_stack} needs uint8 images stacked along their first axis, not {shapes}; "
                "leave it out"
            )
        self.extras = {name: f"extras/{name}" for name in extra_fields or {}}
        self.fields: Fields = {}
        self.slices: dict[str, slice] = {}
        self.tensors: Fields = {}
        self.width = 0
        for names in self.names.values():
            for key, leaf in leaves.items():
                self._place(names[key], _shape(leaf), _dtype(leaf), _packs(leaf), key in self.stacks)
        self._place("action", _shape(action_space), _dtype(action_space), _packs(action_space))
        for name in FLAGS:
            self._place(name, (), torch.float32, True)
        for name, (shape, dtype) in (extra_fields or {}).items():
            self._place(self.extras[name], shape, dtype, dtype in EXACT)
        self.tensors = {"block": ((rows, num_envs, self.width), torch.float32), **self.tensors}
        self.frames = {key: plan_frames(rows, num_envs, frame_stack or 1, s) for key, s in self.stacks.items()}

    def _place(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, packed: bool, framed: bool = False) -> None:
        self.fields[name] = (shape, dtype)
        if packed:
            self.slices[name] = slice(self.width, self.width + math.prod(shape))
            self.width += math.prod(shape)
        elif not framed:
            self.tensors[name] = ((self.rows, self.num_envs, *shape), dtype)

    @property
    def slots(self) -> int:
        return self.rows * self.num_envs

    @property
    def nbytes(self) -> int:
        """Planned size."""
        every = [*self.tensors.values(), *(t for ring in self.frames.values() for t in ring.values())]
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in every)

    def step(
        self,
        obs: Obs,
        action: Tensor,
        reward: Tensor,
        next_obs: Obs,
        terminated: Tensor,
        truncated: Tensor,
        ended: Tensor | None,
        extras: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """One vector step by the names of the fields; names that are unknown are kept, for ``Storage.check``."""
        ended = terminated if ended is None else ended
        if self.num_envs == 1 and truncated.is_cpu and truncated.dtype == ended.dtype == torch.bool:
            ended = truncated if truncated.item() else ended  # the same in a fifth of the time
        else:
            ended = ended | truncated
        values = {"action": action, "reward": reward, "terminated": terminated, "ended": ended}
        if isinstance(obs, Tensor) and isinstance(next_obs, Tensor):
            values["obs"], values["next_obs"] = obs, next_obs
        else:
            for prefix, tree in (("obs", obs), ("next_obs", next_obs)):
                names = self.names[prefix]
                leaves = {"": tree} if isinstance(tree, Tensor) else tree
                values.update({names.get(key) or f"{prefix}/{key}": leaf for key, leaf in leaves.items()})
        if extras:
            values.update({self.extras.get(key) or f"extras/{key}": value for key, value in extras.items()})
        return values


class Storage:
    """A ring of rows, numbered since the beginning, of ``layout.num_envs`` transitions each.

    Slots are flat: ``(row % rows) * num_envs + environment``.

    Args:
        layout: what is stored.
        placement: where.

    Raises:
        RloptError: the planned size does not fit there.
    """

    def __init__(self, layout: Layout, placement: Placement) -> None:
        placement.check(layout.nbytes, layout.slots)
        self.layout, self.placement, self.device = layout, placement, placement.device
        self.rows, self.num_envs = layout.rows, layout.num_envs
        self.tensors = {name: placement.empty(*spec) for name, spec in layout.tensors.items()}
        self.block = self.tensors["block"]
        self.apart = {name: t for name, t in self.tensors.items() if name != "block"}
        self.frames: dict[str, FrameRing] = {}
        for key, plan in layout.frames.items():
            tensors = {name: placement.empty(*spec) for name, spec in plan.items()}
            self.frames[key] = FrameRing(tensors, layout.frame_stack or 1, placement)
        self._flat = self.block.view(-1, layout.width)
        self._given = layout.fields.keys() - {"valid"}
        self._sizes = {name: self.num_envs * math.prod(shape) for name, (shape, _) in layout.fields.items()}
        self._write = []
        for name, where in layout.slices.items():
            if name != "valid":
                shape = layout.fields[name][0]
                column = where if shape else where.start
                self._write.append((name, column, (self.num_envs, math.prod(shape)) if shape else (self.num_envs,)))
        self._valid = layout.slices["valid"].start
        self._read = {name: (s.start, s.stop - s.start, *layout.fields[name]) for name, s in layout.slices.items()}
        # What comes from the CPU is packed by NumPy, into the block itself or on its way to the device.
        self._on_cpu = self.device.type == "cpu"
        self._staged = self.block if self._on_cpu else torch.empty((1, self.num_envs, layout.width))
        lines = self._staged.numpy()
        self._views = [(name, lines[:, :, where], shape) for name, where, shape in self._write]
        self._numbers: list[tuple[str, np.ndarray]] = []
        if self.num_envs == 1:
            self._numbers = [(name, view[:, 0]) for name, view, shape in self._views if shape == (1,)]
            self._views = [each for each in self._views if each[2] != (1,)]
        self._valid_view = lines[:, :, self._valid]

    @property
    def nbytes(self) -> int:
        """Bytes allocated: what was planned, and what the side stores have grown by."""
        own = sum(t.numel() * t.element_size() for t in self.tensors.values())
        return own + sum(ring.nbytes for ring in self.frames.values())

    def check(self, values: Mapping[str, Tensor], valid: Tensor | None) -> None:
        """Raises RloptError where ``values`` are not one row of this storage's fields."""
        if values.keys() != self._given:
            differ = ", ".join(sorted(values.keys() ^ self._given))
            raise RloptError(f"this step and the buffer's fields differ in {differ}; give each declared field once")
        for name, value in values.items():
            if value.numel() != self._sizes[name]:
                shape = (self.num_envs, *self.layout.fields[name][0])
                raise RloptError(f"{name} has shape {tuple(value.shape)}; this buffer takes {shape}")
        for key, ring in self.frames.items():
            ring.check(*self._pair(values, key), valid)

    def write(self, number: int, values: Mapping[str, Tensor], valid: Tensor | None) -> None:
        """Store row ``number``: every field but ``valid`` (N, …), already checked, and ``valid`` (N,), None where
        all are."""
        row = number % self.rows
        for key, ring in self.frames.items():
            ring.write(number, *self._pair(values, key), valid)
        if self._on_cpu:
            self._pack(row, values if values["reward"].is_cpu else self._fetched(values), valid)
        else:
            line = self.block[row]
            away = [each for each in self._write if not values[each[0]].is_cpu]
            if len(away) < len(self._write):  # what lies on the CPU goes in one copy
                self._pack(0, {**values, **{name: torch.zeros(shape) for name, _, shape in away}}, valid)
                line.copy_(self._staged[0], non_blocking=True)
            else:
                line[:, self._valid] = 1.0 if valid is None else valid.to(line)
            for name, where, shape in away:
                line[:, where].copy_(values[name].reshape(shape))
        for name, tensor in self.apart.items():
            tensor[row].copy_(values[name], non_blocking=not self._on_cpu)

    def _fetched(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The packed fields brought from another device in one transfer."""
        parts = [values[name].reshape(self.num_envs, -1).to(torch.float32) for name, *_ in self._write]
        widths = [part.shape[1] for part in parts]
        brought = torch.split(torch.cat([part.to(parts[0].device) for part in parts], 1).cpu(), widths, 1)
        return {name: part for (name, *_), part in zip(self._write, brought, strict=True)}

    def _pack(self, line: int, values: Mapping[str, Tensor], valid: Tensor | None) -> None:
        for name, view, shape in self._views:
            value = values[name]
            try:
                array = value.numpy()
            except (RuntimeError, TypeError):  # it carries a gradient, or lies elsewhere
                array = value.detach().cpu().numpy()
            view[line] = array if array.shape == shape else array.reshape(shape)
        for name, column in self._numbers:
            column[line] = values[name].item()  # a fourth of the time that an array of one takes
        self._valid_view[line] = 1.0 if valid is None else valid.cpu().numpy()

    def write_nothing(self, number: int) -> None:
        """Store a row ``number`` of no transitions."""
        for tensor in self.tensors.values():
            tensor[number % self.rows].zero_()
        for ring in self.frames.values():
            ring.cut(number)

    def restart(self) -> None:
        """Forget everything: the next row written is number 0 again."""
        for ring in self.frames.values():
            ring.restart()

    def gather(self, index: Tensor) -> Tensor:
        """The packed part (B, width) of the slots ``index`` (B,)."""
        return self._flat.index_select(0, index)

    def held(self, name: str, rows: int) -> Tensor:
        """A view of field ``name`` at the first ``rows`` ring positions: (rows, N, size) where it is packed, else
        (rows, N, …)."""
        where = self.layout.slices.get(name)
        return self.apart[name][:rows] if where is None else self.block[:rows, :, where]

    def leaf(self, name: str, packed: Tensor, index: Tensor) -> Tensor:
        """Field ``name`` (B, …) of the slots ``index`` (B,), whose packed part is ``packed``."""
        found = self._read.get(name)
        if found is None:
            return self.apart[name].flatten(0, 1).index_select(0, index)
        start, size, shape, dtype = found
        value = packed.narrow(1, start, size) if shape else packed.select(1, start)
        if dtype != torch.float32:
            value = value.to(dtype)
        return value.reshape(-1, *shape) if len(shape) > 1 else value

    def observations(self, index: Tensor, packed: Tensor, written: int) -> tuple[Obs, Obs]:
        """Observations and next observations (B, …) of one set of slots; ``written`` is the number of rows written."""
        if not self.frames:
            return self._tree("obs", index, packed, {}), self._tree("next_obs", index, packed, {})
        k = self.layout.frame_stack or 1
        both = {key: ring.read(index, written, 0, k + 1) for key, ring in self.frames.items()}
        obs, next_obs = ({key: t[:, i : i + k].flatten(1, 2) for key, t in both.items()} for i in (0, 1))
        return self._tree("obs", index, packed, obs), self._tree("next_obs", index, packed, next_obs)

    def obs(self, prefix: str, index: Tensor, packed: Tensor, written: int) -> Obs:
        """``obs`` or ``next_obs`` (B, …) alone."""
        k, i = self.layout.frame_stack or 1, int(prefix == "next_obs")
        stacks = {key: ring.read(index, written, i, i + k).flatten(1, 2) for key, ring in self.frames.items()}
        return self._tree(prefix, index, packed, stacks)

    def _tree(self, prefix: str, index: Tensor, packed: Tensor, stacks: dict[str, Tensor]) -> Obs:
        names = self.layout.names[prefix]
        if self.layout.single:
            return stacks[""] if stacks else self.leaf(names[""], packed, index)
        return {key: stacks[key] if key in stacks else self.leaf(n, packed, index) for key, n in names.items()}

    def _pair(self, values: Mapping[str, Tensor], key: str) -> tuple[Tensor, Tensor]:
        names = self.layout.names
        return values[names["obs"][key]], values[names["next_obs"][key]]

    # Saving

    def read_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """Rows ``start … stop-1`` since the beginning, (stop - start, N, …), on the CPU."""
        number = torch.arange(start, stop, device=self.device)
        return {name: t.index_select(0, number % t.shape[0]).cpu() for name, t in self._saved().items()}

    def write_rows(self, start: int, rows: Mapping[str, Tensor]) -> None:
        """Put back what ``read_rows`` gave. Raises ValueError where names or shapes differ from this storage's."""
        saved = self._saved()
        if rows.keys() != saved.keys() or any(rows[k].shape[1:] != t.shape[1:] for k, t in saved.items()):
            raise ValueError("saved transitions do not have this buffer's fields")
        for name, tensor in saved.items():
            where = torch.arange(start, start + rows[name].shape[0], device=self.device) % tensor.shape[0]
            tensor.index_copy_(0, where, rows[name].to(self.device))

    def _saved(self) -> dict[str, Tensor]:
        rings = list(enumerate(self.frames.values()))
        frames = {f"frames/{i}": ring.frames for i, ring in rings}
        return {**self.tensors, **frames, **{f"links/{i}": ring.links for i, ring in rings}}

    def side_stores(self) -> dict[str, SideStore]:
        """The frames that lie beside the rings, by the number of the ring: row logs of their own."""
        return {str(i): ring.side for i, ring in enumerate(self.frames.values())}

    def state_dict(self, written: int) -> State:
        """What neither rows nor side stores hold; ``written`` is the number of rows written."""
        return {str(i): ring.state_dict(written) for i, ring in enumerate(self.frames.values())}

    def load_state_dict(self, state: State, written: int) -> None:
        """Comes before the side stores' ``write_rows``, which it may enlarge."""
        for i, ring in enumerate(self.frames.values()):
            ring.load_state_dict(state[str(i)], written)


def _shape(space: Space) -> tuple[int, ...]:
    return tuple(space.shape or ())


def _dtype(space: Space) -> torch.dtype:
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return torch.int64
    return torch.uint8 if space.dtype == np.uint8 else torch.float32


def _packs(space: Space) -> bool:
    """Whether float32 holds every value of a leaf that is not made of bytes."""
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        first = np.asarray(space.start)
        last = first + np.asarray(space.n if isinstance(space, spaces.Discrete) else space.nvec) - 1
        return bool(first.min() >= -LARGEST and last.max() <= LARGEST)
    return _dtype(space) == torch.float32


def _is_stack(space: Space, frame_stack: int | None) -> bool:
    shape = _shape(space)
    return frame_stack is not None and _dtype(space) == torch.uint8 and len(shape) >= 2 and shape[0] % frame_stack == 0
