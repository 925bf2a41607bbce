"""Where transitions live: a ring of rows of N environments' transitions, packed so that a draw is one gather."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from rlopt.buffers.frames import FrameRing, SideStore
from rlopt.buffers.layout import SOURCE, Layout
from rlopt.buffers.placement import Placement
from rlopt.types import Obs, RloptError, State


class Storage:
    """Keeps rows of ``layout.num_envs`` transitions each in a ring, numbered since the beginning.

    Slots are flat: ``(row % rows) * num_envs + environment``.

    Args:
        layout: what is stored.
        placement: where.
        planned: transitions that are going to be stored, where they are known to be fewer than there are slots.
        stays: whether minibatches are used where the data lies.

    Raises:
        RloptError: the planned size does not fit there.
    """

    def __init__(self, layout: Layout, placement: Placement, planned: int | None = None, stays: bool = True) -> None:
        placement.check(placement.taken(layout.nbytes, layout.slots, planned), layout.slots)
        self.layout, self.placement, self.device = layout, placement, placement.device
        self.rows, self.num_envs = layout.rows, layout.num_envs
        self.tensors = {name: placement.empty(*spec) for name, spec in layout.tensors.items()}
        self.block = self.tensors["block"]
        self.apart = {name: t for name, t in self.tensors.items() if name != "block"}
        self.frames: dict[str, FrameRing] = {}
        for key, plan in layout.frames.items():
            tensors = {name: placement.empty(*spec) for name, spec in plan.items()}
            self.frames[key] = FrameRing(tensors, layout.frame_stack or 1, placement, stays)
        self.derived = {key: gather.to(self.device) for key, gather in layout.derived.items()}
        self._flat = self.block.view(-1, layout.width)
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
        """Raise RloptError where stacked images do not follow from one another."""
        for key, ring in self.frames.items():
            ring.check(*self._pair(values, key), valid)

    def check_derived(self, obs: Obs, next_obs: Obs) -> None:
        """Raise RloptError where a derived leaf is not what will be gathered in its place."""
        for name, tree in (("obs", obs), ("next_obs", next_obs)):
            for key, gather in self.layout.derived.items():
                if isinstance(tree, Mapping) and key in tree:
                    given, source = (torch.as_tensor(tree[k]).cpu() for k in (key, SOURCE))
                    made = gather.of(source.reshape(self.num_envs, -1))
                    if not torch.equal(made, given.reshape(made.shape).to(made.dtype)):
                        raise RloptError(f"derived[{key!r}] does not give {name}[{key!r}] from {name}[{SOURCE!r}]")

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
            tensor[row].copy_(values[name].reshape(tensor.shape[1:]), non_blocking=not self._on_cpu)

    def _fetched(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the packed fields brought from another device in one transfer."""
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

    def write_many(self, first: int, values: Mapping[str, Tensor]) -> None:
        """Store transitions (rows, …) of one environment from ring position ``first`` on, all of them valid."""
        for name, value in values.items():
            where, rows = self.layout.slices.get(name), slice(first, first + len(value))
            if where is None:
                self.apart[name][rows, 0] = value.to(self.device)
            else:
                self.block[rows, 0, where] = value.reshape(len(value), -1).to(self.device, torch.float32)
        self.block[first : first + len(values["reward"]), :, self._valid] = 1.0

    def write_nothing(self, number: int) -> None:
        """Store a row ``number`` of no transitions."""
        self.forget(number)
        for ring in self.frames.values():
            ring.cut()

    def forget(self, number: int) -> None:
        """Make row ``number`` one of no transitions."""
        for tensor in self.tensors.values():
            tensor[number % self.rows].zero_()
        for ring in self.frames.values():
            ring.forget(number)

    def gather(self, index: Tensor) -> Tensor:
        """Return the packed part (B, width) of the slots ``index`` (B,)."""
        return self._flat.index_select(0, index)

    def held(self, name: str, rows: int) -> Tensor:
        """Return a view of field ``name`` at the first ``rows`` ring positions: (rows, N, size) where it is packed,
        else (rows, N, …)."""
        where = self.layout.slices.get(name)
        return self.apart[name][:rows] if where is None else self.block[:rows, :, where]

    def leaf(self, name: str, packed: Tensor, index: Tensor) -> Tensor:
        """Return field ``name`` (B, …) of the slots ``index`` (B,), whose packed part is ``packed``."""
        found = self._read.get(name)
        if found is None:
            return self.apart[name].flatten(0, 1).index_select(0, index)
        start, size, shape, dtype = found
        value = packed.narrow(1, start, size) if shape else packed.select(1, start)
        if dtype != torch.float32:
            value = value.to(dtype)
        return value.reshape(-1, *shape) if len(shape) > 1 else value

    def observations(self, index: Tensor, packed: Tensor, written: int) -> tuple[Obs, Obs]:
        """Return observations and next observations (B, …) of one set of slots; ``written`` is the number of rows
        written."""
        if not self.frames:
            return self._tree("obs", index, packed, {}), self._tree("next_obs", index, packed, {})
        both = {key: ring.read(index, written, 0, 1) for key, ring in self.frames.items()}
        obs, next_obs = ({key: stacks[i] for key, stacks in both.items()} for i in (0, 1))
        return self._tree("obs", index, packed, obs), self._tree("next_obs", index, packed, next_obs)

    def obs(self, prefix: str, index: Tensor, packed: Tensor, written: int) -> Obs:
        """Return ``obs`` or ``next_obs`` (B, …) alone."""
        stacks = {key: ring.read(index, written, int(prefix == "next_obs"))[0] for key, ring in self.frames.items()}
        return self._tree(prefix, index, packed, stacks)

    def _tree(self, prefix: str, index: Tensor, packed: Tensor, stacks: dict[str, Tensor]) -> Obs:
        names = self.layout.names[prefix]
        if self.layout.single:
            return stacks[""] if stacks else self.leaf(names[""], packed, index)
        tree = {key: stacks[key] if key in stacks else self.leaf(n, packed, index) for key, n in names.items()}
        if self.derived:
            tree.update({key: gather.of(tree[SOURCE]) for key, gather in self.derived.items()})
            tree = {key: tree[key] for key in self.layout.keys}
        return tree

    def _pair(self, values: Mapping[str, Tensor], key: str) -> tuple[Tensor, Tensor]:
        names = self.layout.names
        return values[names["obs"][key]], values[names["next_obs"][key]]

    # Saving

    def read_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return rows ``start … stop-1`` since the beginning, (stop - start, N, …), on the CPU."""
        number = torch.arange(start, stop, device=self.device)
        return {name: t.index_select(0, number % t.shape[0]).cpu() for name, t in self._saved().items()}

    def write_rows(self, start: int, rows: Mapping[str, Tensor]) -> None:
        """Put back what ``read_rows`` gave. Raises ValueError where names, shapes or types are not this storage's."""
        saved = self._saved()
        if rows.keys() != saved.keys() or any(
            rows[k].shape[1:] != t.shape[1:] or rows[k].dtype != t.dtype for k, t in saved.items()
        ):
            raise ValueError("saved transitions do not have this buffer's fields")
        for name, tensor in saved.items():
            where = torch.arange(start, start + rows[name].shape[0], device=self.device) % tensor.shape[0]
            tensor.index_copy_(0, where, rows[name].to(self.device))

    def _saved(self) -> dict[str, Tensor]:
        rings = list(enumerate(self.frames.values()))
        frames = {f"frames/{i}": ring.frames for i, ring in rings}
        return {**self.tensors, **frames, **{f"links/{i}": ring.links for i, ring in rings}}

    def side_stores(self) -> dict[str, SideStore]:
        """Return the frames that lie beside the rings, by the number of the ring: row logs of their own."""
        return {str(i): ring.side for i, ring in enumerate(self.frames.values())}

    def state_dict(self, written: int) -> State:
        """Return what neither rows nor side stores hold; ``written`` is the number of rows written."""
        return {str(i): ring.state_dict(written) for i, ring in enumerate(self.frames.values())}

    def load_state_dict(self, state: State, written: int) -> None:
        """Continue where ``state_dict`` stood; before the side stores' ``write_rows``, which this may enlarge."""
        for i, ring in enumerate(self.frames.values()):
            ring.load_state_dict(state[str(i)], written)
