"""How transitions are laid out in memory: which fields a row has, of which types, and where each lies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.buffers.frames import plan_frames
from rlopt.types import Obs, RloptError, Space, obs_leaves

Fields = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""{name: (shape, dtype)} of what a transition holds."""
EXACT = (torch.float32, torch.float16, torch.bool, torch.int8, torch.int16)
"""Types that float32 holds exactly (uint8 is kept as bytes all the same)."""
LARGEST = 2**24
"""Up to here float32 holds every integer."""
FLAGS = ("terminated", "ended", "valid")
SOURCE = "state"
"""The leaf that derived leaves are gathered from."""


class Gather(NamedTuple):
    """A derived leaf: its entries are those of the leaf ``state`` at these positions."""

    position: Tensor
    """(K,) int64 positions in the flattened source; 0 where ``padding``."""
    padding: Tensor | None
    """(K,) bool: entries that are 0; None where there are none."""
    shape: tuple[int, ...]

    def of(self, source: Tensor) -> Tensor:
        """Return the derived leaf (B, *shape) of ``source`` (B, …)."""
        found = source.flatten(1).index_select(1, self.position)
        if self.padding is not None:
            found = found.masked_fill(self.padding, 0)
        return found.view(-1, *self.shape)

    def to(self, device: torch.device) -> Gather:
        """Return the same on ``device``."""
        padding = None if self.padding is None else self.padding.to(device)
        return Gather(self.position.to(device), padding, self.shape)


class Layout:
    """Decides what a storage will hold and how large it is; allocates nothing.

    Leaves that float32 holds exactly are packed side by side into one block (rows, N, width). Bytes, masks (MultiBinary
    leaves, as bool), and integers that may lie beyond 2**24 lie apart in their own type. With ``frame_stack`` = k,
    uint8 leaves of at least two axes, the first a multiple of k, are kept as single frames.

    Args:
        rows: of N transitions each.
        num_envs: N.
        observation_space: Box, Discrete, MultiDiscrete, MultiBinary or a flat Dict of them.
        action_space: Box, Discrete, MultiDiscrete or MultiBinary.
        extra_fields: what is stored beside.
        frame_stack: k, None where images are stored as they come.
        reward_shape: (), or (n,) where n agents are paid apart.
        derived: {leaf: positions in the flattened leaf ``state``, in the shape of the leaf; -1 for an entry that is 0}.
            Such leaves, of ``obs`` and ``next_obs`` alike, are not stored but gathered when they are drawn.

    Raises:
        RloptError: ``frame_stack`` fits none of the observations, or ``derived`` does not fit them.
    """

    def __init__(
        self,
        rows: int,
        num_envs: int,
        observation_space: Space,
        action_space: Space,
        extra_fields: Fields | None = None,
        frame_stack: int | None = None,
        reward_shape: tuple[int, ...] = (),
        derived: Mapping[str, Tensor | tuple[Any, ...]] | None = None,
    ) -> None:
        if len(reward_shape) > 1:
            raise RloptError(f"rewards have the shape () or (n,), not {reward_shape}")
        self.rows, self.num_envs, self.frame_stack = rows, num_envs, frame_stack
        self.single = not isinstance(observation_space, spaces.Dict)
        leaves = obs_leaves(observation_space)
        self.derived = {key: _gather(key, index, leaves) for key, index in (derived or {}).items()}
        self.keys = list(leaves)
        """Names of the leaves in the order of the space."""
        stored = {key: leaf for key, leaf in leaves.items() if key not in self.derived}
        self.names = {p: {key: f"{p}/{key}" if key else p for key in stored} for p in ("obs", "next_obs")}
        self.stacks = {key: _shape(leaf) for key, leaf in stored.items() if _is_stack(leaf, frame_stack)}
        if frame_stack is not None and not self.stacks:
            shapes = ", ".join(str(_shape(leaf)) for leaf in stored.values())
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
            for key, leaf in stored.items():
                self._place(names[key], _shape(leaf), _dtype(leaf), _packs(leaf), key in self.stacks)
        self._place("action", _shape(action_space), *_action_type(action_space))
        for name in ("reward", *FLAGS):  # side by side: windows read them as one
            self._place(name, reward_shape if name == "reward" else (), torch.float32, True)
        for name, (shape, dtype) in (extra_fields or {}).items():
            self._place(self.extras[name], shape, dtype, dtype in EXACT)
        self._shapes = {name: (num_envs, *shape) for name, (shape, _) in self.fields.items() if name != "valid"}
        self._sizes = {name: math.prod(shape) for name, shape in self._shapes.items()}
        self._seen = False
        apart = self.fields.keys() - self.slices.keys()
        self._integers = [name for name in apart if self.fields[name][1] in (torch.uint8, torch.int64)]
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
        """Transitions that it holds."""
        return self.rows * self.num_envs

    @property
    def nbytes(self) -> int:
        """Planned size."""
        every = [*self.tensors.values(), *(t for ring in self.frames.values() for t in ring.values())]
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in every)

    def values(
        self,
        obs: Any,
        action: Any,
        reward: Any,
        next_obs: Any,
        terminated: Any,
        truncated: Any,
        ended: Any,
        extras: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """Return what a vector step stores, by field, as tensors of the right sizes; see ``Transition``.

        Raises:
            RloptError: a field is missing, unknown, of another size or kind, or no tensor can be made of it.
        """
        ended = terminated if ended is None else ended
        values: dict[str, Any] = {"action": action, "reward": reward, "terminated": terminated, "ended": ended}
        if self.single:
            values["obs"], values["next_obs"] = obs, next_obs
        else:
            self._add_leaves(values, "obs", obs)
            self._add_leaves(values, "next_obs", next_obs)
        for key, value in extras.items():
            values[self.extras.get(key) or f"extras/{key}"] = value
        if len(values) != len(self._shapes):
            self._refuse_fields(values)
        for name, value in values.items():
            if not isinstance(value, Tensor) or value.numel() != self._sizes.get(name):
                values[name] = self._fitting(name, value)
        if not self._seen:  # axes in another order, and flags that are none, would be so from the first row on
            values = {name: self._fitting(name, value) for name, value in values.items()}
            values["ended"], truncated = self.flag("ended", values["ended"]), self.flag("truncated", truncated)
            self._seen = True
        for name in self._integers:
            self._check_integers(name, values[name])
        self._end(values, truncated)
        return values

    def _add_leaves(self, values: dict[str, Any], prefix: str, tree: Obs) -> None:
        names = self.names[prefix]
        if not isinstance(tree, Mapping):
            raise RloptError(f"{prefix} must be a dict of {', '.join(names)}, as the observation space is a Dict")
        for key, leaf in tree.items():
            if key not in self.derived:
                values[names.get(key) or f"{prefix}/{key}"] = leaf

    def _refuse_fields(self, values: dict[str, Any]) -> None:
        differ = ", ".join(sorted(values.keys() ^ self._shapes.keys()))
        raise RloptError(f"this step and the buffer's fields differ in {differ}; give each declared field once")

    def _fitting(self, name: str, value: Any) -> Tensor:
        """Return field ``name`` as a tensor of the right size."""
        if name not in self._shapes:
            raise RloptError(f"{name} is none of the buffer's fields ({', '.join(self._shapes)})")
        tensor, shape = as_tensor(name, value), self._shapes[name]
        if tensor.numel() == self._sizes[name] and (self.num_envs == 1 or tensor.shape[0] == self.num_envs):
            return tensor
        message = f"{name} has shape {tuple(tensor.shape)}; this buffer takes {shape}"
        if tensor.shape[1:] == shape[1:]:
            rows = tensor.shape[0]
            message += f": build it with num_envs={rows}, or store a data set of single transitions by extend"
        raise RloptError(message)

    def _check_integers(self, name: str, value: Tensor) -> None:
        kept = self.fields[name][1]
        if value.dtype.is_floating_point or (kept == torch.uint8 and value.dtype not in (torch.uint8, torch.bool)):
            raise RloptError(f"{name} is {value.dtype}; this buffer keeps {kept}, and would change its values")

    def _end(self, values: dict[str, Any], truncated: Any) -> None:
        """Let episodes end where they are ``truncated`` (N,), too."""
        ended, n = values["ended"], self.num_envs
        if not isinstance(truncated, Tensor) or truncated.numel() != n:
            truncated = self.flag("truncated", truncated)
        if n > 1 or not truncated.is_cpu:
            values["ended"] = ended | truncated
        elif truncated.item():  # the same in a fifth of the time
            values["ended"] = truncated

    def flag(self, name: str, value: Any) -> Tensor:
        """Return ``value`` as a flag (N,). Raises RloptError where it is none."""
        flag = as_tensor(name, value)
        if flag.dtype != torch.bool or flag.numel() != self.num_envs:
            raise RloptError(
                f"{name} is {flag.dtype} of shape {tuple(flag.shape)}; this buffer takes bool ({self.num_envs},)"
            )
        return flag.reshape(self.num_envs)


def as_tensor(name: str, value: object) -> Tensor:
    """Return ``value``, an array, a number or a list of them, as a tensor. Raises RloptError where it is none."""
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as e:
        raise RloptError(f"{name} is no array of numbers: {' '.join(str(e).split())}") from e


def _gather(key: str, index: Tensor | tuple[Any, ...], leaves: dict[str, Space]) -> Gather:
    source = leaves.get(SOURCE)
    if key not in leaves or key == SOURCE or not isinstance(source, spaces.Box):
        raise RloptError(f"derived[{key!r}] needs observations of that name and a Box {SOURCE!r} to gather them from")
    shape, size = _shape(leaves[key]), math.prod(_shape(source))
    position = torch.as_tensor(index, dtype=torch.int64)
    if tuple(position.shape) != shape or _dtype(leaves[key]) != _dtype(source):
        raise RloptError(
            f"derived[{key!r}] has shape {tuple(position.shape)}; the leaf has {shape}, of the type of {SOURCE}"
        )
    if position.numel() and not -1 <= int(position.min()) <= int(position.max()) < size:
        raise RloptError(
            f"derived[{key!r}] points beyond the {size} entries of {SOURCE}; use 0 … {size - 1}, or -1 for 0"
        )
    flat = position.flatten()
    padding = flat < 0
    return Gather(flat.clamp(min=0), padding if bool(padding.any()) else None, shape)


def _shape(space: Space) -> tuple[int, ...]:
    return tuple(space.shape or ())


def _dtype(space: Space) -> torch.dtype:
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return torch.int64
    if isinstance(space, spaces.MultiBinary):
        return torch.bool
    return torch.uint8 if space.dtype == np.uint8 else torch.float32


def _packs(space: Space) -> bool:
    """Return whether float32 holds every value of a leaf that is not made of bytes."""
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        first = np.asarray(space.start)
        last = first + np.asarray(space.n if isinstance(space, spaces.Discrete) else space.nvec) - 1
        return bool(first.min() >= -LARGEST and last.max() <= LARGEST)
    return _dtype(space) == torch.float32


def _action_type(space: Space) -> tuple[torch.dtype, bool]:
    """Return the type of actions, and whether they are packed."""
    return (torch.int64, True) if isinstance(space, spaces.MultiBinary) else (_dtype(space), _packs(space))


def _is_stack(space: Space, frame_stack: int | None) -> bool:
    shape = _shape(space)
    return frame_stack is not None and _dtype(space) == torch.uint8 and len(shape) >= 2 and shape[0] % frame_stack == 0
