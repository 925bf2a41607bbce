"""Translation of spaces, observations and actions at the environment's edge.

Inside rlopt an observation is a tensor or a flat dict of tensors, floating leaves are float32, ``uint8`` leaves stay
``uint8``, indices are int64 and masks (``rlopt.types.MASKS``) bool. Outside, Gymnasium environments speak nested
spaces and float64. An ``ObservationCodec`` and an ``ActionCodec`` stand between the two and nothing else converts
anything.

Indices keep the numbering of their spaces: where ``Discrete.start`` or ``MultiDiscrete.start`` is not zero, networks
shift them, nothing here does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.types import MASKS, AgentSpaces, Obs, RloptError, binary, is_mask, one_line

Array = np.ndarray[Any, np.dtype[Any]]

_OBSERVATIONS = "Box, Discrete, MultiDiscrete, MultiBinary, and Dict or Tuple of these"
_ACTIONS = "Box of floats, Discrete, MultiDiscrete and MultiBinary"


class Leaf(NamedTuple):
    """One leaf of an observation: where it sits in the nested observation, and how it is stored."""

    key: str
    path: tuple[str | int, ...]
    space: spaces.Space[Any]
    """The translated space."""


def _float_box(low: Any, high: Any, shape: tuple[int, ...]) -> spaces.Box:
    with np.errstate(over="ignore"):
        low32, high32 = np.asarray(low).astype(np.float32), np.asarray(high).astype(np.float32)
    return spaces.Box(np.broadcast_to(low32, shape), np.broadcast_to(high32, shape), shape, np.float32)


def _inside(space: spaces.Box) -> spaces.Box:
    """Return the float32 Box of the numbers inside ``space``; where there are none between its bounds, the one nearest.
    Bounds that float32 cannot hold become infinite."""
    box = _float_box(space.low, space.high, space.shape)
    finite = np.isfinite(box.low), np.isfinite(box.high)
    low = np.where((box.low < space.low) & finite[0], np.nextafter(box.low, np.float32(np.inf)), box.low)
    high = np.where((box.high > space.high) & finite[1], np.nextafter(box.high, np.float32(-np.inf)), box.high)
    none = low > high
    return _float_box(np.where(none, box.low, low), np.where(none, box.low, high), space.shape)


def _is_binary(space: spaces.Space[Any]) -> bool:
    """Return whether a space holds nothing but zeros and ones: MultiBinary, or PettingZoo's Box of integers in [0,
    1]."""
    if isinstance(space, spaces.Box):
        return bool(space.dtype.kind in "iub" and np.all(space.low == 0) and np.all(space.high == 1))
    return isinstance(space, spaces.MultiBinary)


def _translate_leaf(space: spaces.Space[Any], key: str, path: tuple[str | int, ...]) -> Leaf:
    if key in MASKS and _is_binary(space):
        return Leaf(key, path, binary(tuple(space.shape or ())))
    if isinstance(space, spaces.Box) and space.dtype == np.bool_:  # planes of bits, as MinAtar's
        return Leaf(key, path, spaces.Box(space.low.astype(np.uint8), space.high.astype(np.uint8), dtype=np.uint8))
    if isinstance(space, spaces.Box):
        kept = space.dtype in (np.dtype(np.uint8), np.dtype(np.float32))
        return Leaf(key, path, space if kept else _float_box(space.low, space.high, space.shape))
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return Leaf(key, path, space)
    if isinstance(space, spaces.MultiBinary):
        return Leaf(key, path, _float_box(0.0, 1.0, space.shape))
    where = f" (at {key!r})" if key else ""
    raise RloptError(
        f"observations of {type(space).__name__} space{where} are not supported; use {_OBSERVATIONS}, "
        "or translate them with a wrapper (env.wrappers)"
    )


def observation_leaves(space: spaces.Space[Any]) -> list[Leaf]:
    """Return the leaves of a nested observation space, keys joined with ``/``; a single space is one leaf named ``""``.

    Raises:
        RloptError: a kind of space that rlopt has no tensor for, two leaves of one name, or no leaf at all.
    """
    found: list[Leaf] = []

    def walk(node: spaces.Space[Any], path: tuple[str | int, ...]) -> None:
        children: Mapping[Any, spaces.Space[Any]]
        if isinstance(node, spaces.Dict):
            children = node.spaces
        elif isinstance(node, spaces.Tuple):
            children = dict(enumerate(node.spaces))
        else:
            found.append(_translate_leaf(node, "/".join(map(str, path)), path))
            return
        for name, child in children.items():
            walk(child, (*path, name))

    walk(space, ())
    keys = [leaf.key for leaf in found]
    if not found:
        raise RloptError("the observation space has no leaf; it must hold at least one Box or Discrete space")
    twice = sorted({k for k in keys if keys.count(k) > 1})
    if twice:
        raise RloptError(
            f"two observations are both named {twice[0]!r} once nested keys are joined with '/'; rename one"
        )
    return found


def _array_dtype(leaf: Leaf) -> np.dtype[Any]:
    if is_mask(leaf.key, leaf.space):
        return np.dtype(np.bool_)
    return np.dtype(np.int64 if isinstance(leaf.space, spaces.Discrete | spaces.MultiDiscrete) else leaf.space.dtype)


def _getter(path: tuple[str | int, ...]) -> Callable[[Any], Any]:
    def get(obs: Any) -> Any:
        for part in path:
            obs = obs[part]
        return obs

    return get


class ObservationCodec:
    """Moves observations of one environment, or of a Gymnasium vector environment, into arrays and tensors.

    ``space`` is the translated space. ``arrays(n)`` allocates what ``rlopt.envs.edge`` writes observations into;
    ``tensors(arrays, device)`` copies them into tensors that the caller owns.
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.leaves = observation_leaves(space)
        self.single = len(self.leaves) == 1 and self.leaves[0].key == ""
        self.space: spaces.Space[Any] = (
            self.leaves[0].space if self.single else spaces.Dict({leaf.key: leaf.space for leaf in self.leaves})
        )
        self.getters = [_getter(leaf.path) for leaf in self.leaves]
        """What finds each leaf in the environment's own observation."""
        self.dtypes = [_array_dtype(leaf) for leaf in self.leaves]
        self.shapes: list[tuple[int, ...]] = [tuple(leaf.space.shape or ()) for leaf in self.leaves]

    def arrays(self, n: int) -> list[Array]:
        """Return zeroed arrays (n, …), one per leaf."""
        return [np.zeros((n, *shape), dtype) for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]

    def row(self, obs: Any, i: int) -> Any:
        """Return environment i's observation out of a batched nested one, as that environment would give it."""
        if self.single:
            return obs[i]
        nested: Any = {}
        for leaf, get in zip(self.leaves, self.getters, strict=True):
            node = nested
            for part in leaf.path[:-1]:
                node = node.setdefault(part, {})
            node[leaf.path[-1]] = get(obs)[i]
        return nested

    def tensors(self, arrays: list[Array], device: torch.device | None) -> Obs:
        """Return copies of the arrays on ``device``, None for the CPU: a tensor, or a flat dict of them."""
        if device is not None:
            moved = {leaf.key: torch.from_numpy(a).to(device) for leaf, a in zip(self.leaves, arrays, strict=True)}
            return moved[""] if self.single else moved
        if self.single:
            return torch.from_numpy(arrays[0].copy())
        return {leaf.key: torch.from_numpy(a.copy()) for leaf, a in zip(self.leaves, arrays, strict=True)}


class ActionCodec:
    """Turns action tensors into what one environment, or a Gymnasium vector environment, wants.

    ``space`` is the translated space, of the same shape: a float32 Box, a Discrete, or a MultiDiscrete (MultiBinary is
    MultiDiscrete of twos).

    Raises:
        RloptError: an action space that rlopt's agents cannot act in.
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.original = space
        self.space: spaces.Space[Any] = space
        self.discrete = isinstance(space, spaces.Discrete)
        self._ends: list[tuple[Array, Array]] = []
        """Bounds in float32, and in the environment's own dtype where that is another: 0.1 in float32 lies outside a
        Box of float64 that ends at 0.1."""
        if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
            if space.dtype != np.float32:
                self.space = translated = _inside(space)
                self._ends = [(translated.low, space.low), (translated.high, space.high)]
        elif isinstance(space, spaces.MultiBinary):
            self.space = spaces.MultiDiscrete(np.full(space.shape, 2))
        elif not isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            kind = f"Box of {space.dtype}" if isinstance(space, spaces.Box) else type(space).__name__
            raise RloptError(
                f"actions of {kind} space are not supported; rlopt acts in {_ACTIONS}: use a wrapper (env.wrappers)"
            )
        self.row_shape = tuple(space.shape or ())
        self.dtype = np.dtype(np.int64 if self.discrete else space.dtype)

    def batch(self, action: Tensor, n: int) -> Array:
        """Return (n, …) in the environment's own dtype; always a copy.

        Raises:
            RloptError: the tensor does not hold one action for each of the n environments.
        """
        array = action.numpy(force=True)
        if array.shape != (n, *self.row_shape):
            raise RloptError(
                f"actions have shape {tuple(action.shape)}, but {n} environments of {one_line(self.original)} want "
                f"{(n, *self.row_shape)}"
            )
        actions = array.astype(self.dtype)
        for ours, theirs in self._ends:
            np.copyto(actions, theirs, where=array == ours)
        return actions

    def rows(self, action: Tensor, n: int) -> Any:
        """Return n actions, each as one environment wants it: Python integers where the space is Discrete, else
        arrays."""
        array = self.batch(action, n)
        return array.tolist() if self.discrete else array


def own_spaces(pairs: Sequence[tuple[spaces.Space[Any], spaces.Space[Any]]]) -> tuple[AgentSpaces, ...]:
    """Return the observation and action spaces of each agent, translated."""
    return tuple(AgentSpaces(ObservationCodec(seen).space, ActionCodec(done).space) for seen, done in pairs)


def _number(value: Any) -> int | float | str:
    x = value.item() if isinstance(value, np.generic) else value
    if isinstance(x, float) and not math.isfinite(x):
        return "nan" if math.isnan(x) else ("inf" if x > 0 else "-inf")
    return int(x) if isinstance(x, bool) else x


def _bounds(array: Array) -> Any:
    flat = array.reshape(-1)
    if flat.size and bool(np.all(flat == flat[0])):
        return _number(flat[0])
    return [_number(x) for x in flat]


def space_to_json(space: spaces.Space[Any]) -> dict[str, Any]:
    """Return a translated space as JSON: infinities are strings, constant bounds one number.

    Raises:
        RloptError: the space is not a Box, Discrete, MultiDiscrete, MultiBinary or a Dict of those.
    """
    if isinstance(space, spaces.Box):
        low, high = _bounds(space.low), _bounds(space.high)
        return {"type": "Box", "dtype": str(space.dtype), "shape": list(space.shape), "low": low, "high": high}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        return {"type": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": space.start.tolist()}
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "shape": list(space.shape)}
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "spaces": {k: space_to_json(v) for k, v in space.spaces.items()}}
    raise RloptError(f"a {type(space).__name__} space cannot be saved; only {_OBSERVATIONS} (translated) can")


def space_from_json(data: Mapping[str, Any]) -> spaces.Space[Any]:
    """Return the space that ``space_to_json`` described.

    Raises:
        RloptError: the description is damaged or names an unknown kind of space.
    """
    try:
        kind = data["type"]
        if kind == "Box":
            shape, dtype = tuple(int(n) for n in data["shape"]), np.dtype(str(data["dtype"]))
            if dtype.kind not in "fiub":
                raise ValueError(f"dtype {dtype}")
            low, high = (
                np.array(data[side], np.float64 if dtype.kind == "f" else np.int64) for side in ("low", "high")
            )
            low, high = (x.reshape(shape) if x.ndim else np.full(shape, x) for x in (low, high))
            return spaces.Box(low.astype(dtype), high.astype(dtype), shape, dtype.type)
        if kind == "Discrete":
            return spaces.Discrete(int(data["n"]), start=int(data["start"]))
        if kind == "MultiDiscrete":
            return spaces.MultiDiscrete(np.array(data["nvec"], np.int64), start=np.array(data["start"], np.int64))
        if kind == "MultiBinary":
            return binary(tuple(int(n) for n in data["shape"]))
        if kind == "Dict":
            return spaces.Dict({str(k): space_from_json(v) for k, v in data["spaces"].items()})
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as e:
        raise RloptError(f"the description of a space is damaged: {e}") from e
    raise RloptError(f"unknown kind of space {kind!r}; the file was written by another version or is damaged")
