"""Exact state of one Gymnasium environment as a state tree, without pickle.

An environment may say itself what its state is, by a pair of methods on the unwrapped environment or on a wrapper::

    def state_dict(self) -> dict: ...
    def load_state_dict(self, state) -> None: ...

whose dict holds plain values, tuples, sets, NumPy arrays and generators, and tensors, nested as you like.

Otherwise every wrapper's and the environment's instance attributes are walked, strictly: values that are understood
are saved, wiring that construction makes again (spaces, models, functions, modules, renderers, windows) is skipped,
and *anything else makes the environment one that cannot be saved*. MuJoCo's data is saved through every array of
fixed size, because the integration state alone does not reproduce the first reward of Ant and Humanoid; Atari through
ALE's own serialisation, random generator included.

An environment that cannot be saved (``snapshot`` returns None) follows one rule at resume, which the trainer carries
out: it is reset with a fresh seed derived from the run's, its partial episode is dropped, n-step windows are cut
there, and a warning is logged.

What is not seen: state outside instances (module globals, class attributes), and contacts that an environment reads
from MuJoCo's data before its next step.
"""

from __future__ import annotations

import enum
import logging
import random
import types
from collections import deque
from typing import Any

import gymnasium
import numpy as np
import torch

from rlopt.envs.arrays import array_from_tree, array_to_tree, root_of
from rlopt.random import numpy_state, set_numpy_state
from rlopt.types import RloptError, State

Env = gymnasium.Env[Any, Any]
_log = logging.getLogger(__name__)

_KIND = "#"
"""The key that marks an encoded value; a dict of the environment's own is always encoded as a list of items."""

_WIRING = frozenset(
    {"env", "_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs", "_cached_spec", "_metadata", "metadata"}
)
_CONSTANT_TABLES = {("gymnasium.envs.toy_text.taxi", "P"), ("gymnasium.envs.toy_text.cliffwalking", "P")}
"""Transition tables that are functions of the constructor's arguments, and large."""

_CONSTANT_TYPES = (
    type,
    types.ModuleType,
    types.BuiltinFunctionType,
    types.MappingProxyType,
    logging.Logger,
    gymnasium.envs.registration.EnvSpec,
    np.dtype,
    np.ufunc,
    torch.device,
    torch.dtype,
)
_CONSTANT_MODULES = ("pygame", "gymnasium.envs.mujoco.mujoco_rendering", "glfw", "OpenGL")
_CONSTANT_CLASSES = frozenset({"mujoco._structs.MjModel", "ale_py._ale_py.Action"})
_MINATAR = ("asterix", "breakout", "freeway", "seaquest", "space_invaders")
_IN_PLACE = frozenset(
    {
        "gymnasium.wrappers.utils.RunningMeanStd",
        "minatar.environment.Environment",
        *(f"minatar.environments.{game}.Env" for game in _MINATAR),
    }
)
"""Classes whose instances are made by construction and refilled in place."""


class _Unsaveable(Exception):
    """Something that cannot be saved exactly."""


def _layers(env: Env) -> list[Env]:
    layers = [env]
    while isinstance(layers[-1], gymnasium.Wrapper):
        layers.append(layers[-1].env)
    return layers


def _qualified(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _is_constant(value: Any, layers: list[Env]) -> bool:
    """Return whether construction makes this value again, and steps leave it alone."""
    if isinstance(value, types.BuiltinFunctionType):
        return value.__self__ is None or isinstance(value.__self__, types.ModuleType)
    if isinstance(value, types.FunctionType):
        return all(_harmless_in_closure(cell.cell_contents, layers) for cell in value.__closure__ or ())
    if isinstance(value, types.MethodType):
        return isinstance(value.__self__, type) or any(value.__self__ is layer for layer in layers)
    if isinstance(value, _CONSTANT_TYPES) or any(value is layer for layer in layers):
        return True
    module = type(value).__module__
    return module.startswith(_CONSTANT_MODULES) or _qualified(value) in _CONSTANT_CLASSES


def _harmless_in_closure(value: Any, layers: list[Env]) -> bool:
    plain = (bool, int, float, str, bytes, enum.Enum, np.ndarray, np.generic, gymnasium.Space)
    return value is None or isinstance(value, plain) or _is_constant(value, layers)


def _spaces_in(space: gymnasium.Space[Any]) -> list[gymnasium.Space[Any]]:
    children = getattr(space, "spaces", ())
    nested = children.values() if isinstance(children, dict) else children
    return [space, *(inner for child in nested for inner in _spaces_in(child))]


def _mjdata_to_tree(data: Any) -> State:
    """Return every array of fixed size, packed by dtype: those that are not empty in fresh data. The rest lies in an
    arena that each step fills anew; ``plugin_data`` holds pointers."""
    import mujoco

    fresh, packed = mujoco.MjData(data.model), dict[str, tuple[list[str], list[Any]]]()
    for name in dir(fresh):
        value = None if name.startswith("_") or name == "plugin_data" else getattr(fresh, name)
        if isinstance(value, np.ndarray) and value.size and value.flags.writeable:
            names, parts = packed.setdefault(value.dtype.str, ([], []))
            names.append(name)
            parts.append(getattr(data, name).reshape(-1))
    arrays = [{"names": names, "values": array_to_tree(np.concatenate(parts))} for names, parts in packed.values()]
    return {_KIND: "mjdata", "arrays": arrays, "time": float(data.time)}


def _refill_mjdata(data: Any, tree: State) -> None:
    for group in tree["arrays"]:
        live: list[Any] = [getattr(data, name, np.empty(0)) for name in group["names"]]
        values = array_from_tree(group["values"])
        if sum(a.size for a in live) != values.size:
            raise RloptError(
                "the saved MuJoCo state does not fit; use the mujoco version and the model of the saved run"
            )
        for array in live:
            array[...] = values[: array.size].reshape(array.shape)
            values = values[array.size :]
    data.time = tree["time"]


class _Encoder:
    """Turns values into a tree. Objects met twice are saved once: numbered in the order met, then referred to."""

    def __init__(self, layers: list[Env]) -> None:
        self._layers = layers
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # keeps ids unique while we walk
        self._open: set[int] = set()
        self._has_mjdata = any(
            _qualified(v) == "mujoco._structs.MjData" for layer in layers for v in vars(layer).values()
        )

    def attributes(self, owner: Any) -> State:
        found: State = {}
        for name, value in vars(owner).items():
            if (
                (name in _WIRING and isinstance(owner, gymnasium.Env))
                or (type(owner).__module__, name) in _CONSTANT_TABLES
                or _is_constant(value, self._layers)
            ):
                continue
            found[name] = self.encode(value)
        return found

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if np.isfinite(value) else {_KIND: "float", "value": str(value)}
        if kind is bytes:
            return {_KIND: "bytes", "data": torch.tensor(list(value), dtype=torch.uint8)}
        if isinstance(value, np.generic):
            return {_KIND: "scalar", **array_to_tree(np.array(value))}
        if kind is tuple:
            return {_KIND: "tuple", "items": [self.encode(v) for v in value]}
        if kind is frozenset:
            return {_KIND: "frozenset", "items": [self.encode(v) for v in value]}
        if _is_constant(value, self._layers):
            return {_KIND: "keep"}
        if id(value) in self._seen:
            if id(value) in self._open:
                raise _Unsaveable("a container that holds itself")
            return {_KIND: "ref", "to": self._seen[id(value)]}
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        self._open.add(id(value))
        tree = self._encode_object(value, kind)
        self._open.discard(id(value))
        return tree

    def _encode_object(self, value: Any, kind: type) -> Any:
        if kind is list:
            return {_KIND: "list", "items": [self.encode(v) for v in value]}
        if kind is dict:
            return {_KIND: "dict", "items": [[self.encode(k), self.encode(v)] for k, v in value.items()]}
        if kind is set:
            return {_KIND: "set", "items": [self.encode(v) for v in value]}
        if kind is deque:
            return {_KIND: "deque", "items": [self.encode(v) for v in value], "maxlen": value.maxlen}
        if kind is np.ndarray:
            return self._encode_array(value)
        if isinstance(value, gymnasium.Space):
            own = [s._np_random for s in _spaces_in(value)]
            return {_KIND: "space", "generators": [self.encode(g) for g in own]}
        if kind is np.random.Generator and type(value.bit_generator) is np.random.PCG64:
            return {_KIND: "generator", "state": numpy_state(value)}
        if kind is np.random.RandomState and (found := value.get_state(legacy=False))["bit_generator"] == "MT19937":
            words, drawn = array_to_tree(found["state"]["key"]), int(found["state"]["pos"])
            spare = {"has": int(found["has_gauss"]), "value": float(found["gauss"])}
            return {_KIND: "random-state", "key": words, "pos": drawn, "gauss": spare}
        if kind is random.Random:
            version, key, gauss = value.getstate()
            return {_KIND: "random", "version": version, "words": list(key), "gauss": gauss}
        if kind is torch.Tensor:
            return {_KIND: "tensor", "data": value.detach().clone()}
        name = _qualified(value)
        if name == "mujoco._structs.MjData":
            return _mjdata_to_tree(value)
        if name == "ale_py._ale_py.ALEInterface":
            data = value.cloneState(include_rng=True).serialize()
            return {_KIND: "ale", "data": torch.frombuffer(bytearray(data), dtype=torch.uint8)}
        if name in _IN_PLACE:
            return {_KIND: "object", "class": name, "attributes": self.attributes(value)}
        raise _Unsaveable(name)

    def _encode_array(self, value: Any) -> Any:
        root = root_of(value)
        if root is None:  # a view of memory that another object owns
            if not self._has_mjdata:
                raise _Unsaveable("an array over memory that NumPy does not own")
            return {_KIND: "foreign"}
        if value.dtype.kind == "O":
            if root is not value:
                raise _Unsaveable("a view of an array of objects")
            return {_KIND: "objects", "shape": list(value.shape), "items": [self.encode(v) for v in value.reshape(-1)]}
        if root is value:
            return {_KIND: "array", **array_to_tree(value)}
        offset = value.__array_interface__["data"][0] - root.__array_interface__["data"][0]
        layout = {
            "offset": offset,
            "shape": list(value.shape),
            "strides": list(value.strides),
            "dtype": value.dtype.str,
        }
        return {_KIND: "view", "base": self.encode(root), **layout}


class _Decoder:
    """The reverse: ``existing`` is what the freshly built environment has at that place."""

    def __init__(self) -> None:
        self._objects: list[Any] = []

    def attributes(self, owner: Any, state: State) -> None:
        current = vars(owner)
        for name, tree in state.items():
            current[name] = self.decode(tree, current.get(name))

    def decode(self, tree: Any, existing: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        kind = tree[_KIND]
        if kind == "float":
            return float(tree["value"])
        if kind == "bytes":
            return tree["data"].numpy().tobytes()
        if kind == "scalar":
            return array_from_tree(tree)[()]
        if kind == "tuple":
            return tuple(self._items(tree, existing))
        if kind == "frozenset":
            return frozenset(self._items(tree, None))
        if kind == "keep":
            return _same_kind(existing, object)
        if kind == "ref":
            return self._objects[tree["to"]]
        place = len(self._objects)
        self._objects.append(None)
        self._objects[place] = found = self._decode_object(kind, tree, existing)
        return found

    def _items(self, tree: State, existing: Any) -> list[Any]:
        old = list(existing) if isinstance(existing, list | tuple | deque) else []
        old += [None] * (len(tree["items"]) - len(old))
        return [self.decode(item, was) for item, was in zip(tree["items"], old, strict=False)]

    def _decode_object(self, kind: str, tree: State, existing: Any) -> Any:
        if kind == "list":
            return self._items(tree, existing)
        if kind == "dict":
            old = existing if isinstance(existing, dict) else {}
            pairs = {}
            for key_tree, value_tree in tree["items"]:
                key = self.decode(key_tree, None)
                pairs[key] = self.decode(value_tree, old.get(key))
            return pairs
        if kind == "set":
            return set(self._items(tree, None))
        if kind == "deque":
            return deque(self._items(tree, existing), maxlen=tree["maxlen"])
        if kind == "array":
            return array_from_tree(tree)
        if kind == "view":
            base = self.decode(tree["base"], None)
            memory = base if base.flags.c_contiguous else base.T
            return np.ndarray(tree["shape"], np.dtype(tree["dtype"]), memory, tree["offset"], tree["strides"])
        if kind == "objects":
            array = np.empty(len(tree["items"]), dtype=object)
            for i, item in enumerate(tree["items"]):
                array[i] = self.decode(item, None)
            return array.reshape(tree["shape"])
        if kind == "generator":
            generator = np.random.Generator(np.random.PCG64(0))
            set_numpy_state(generator, tree["state"])
            return generator
        if kind == "random-state":
            legacy, gauss = np.random.RandomState(0), tree["gauss"]
            legacy.set_state(("MT19937", array_from_tree(tree["key"]), tree["pos"], gauss["has"], gauss["value"]))
            return legacy
        if kind == "random":
            source = random.Random(0)
            source.setstate((tree["version"], tuple(tree["words"]), tree["gauss"]))
            return source
        if kind == "tensor":
            return tree["data"].clone()
        if kind == "foreign":
            return _same_kind(existing, np.ndarray)
        if kind == "space":
            for space, generator_tree in zip(
                _spaces_in(_same_kind(existing, gymnasium.Space)), tree["generators"], strict=True
            ):
                space._np_random = self.decode(generator_tree, None)
            return existing
        if kind == "mjdata":
            _refill_mjdata(existing, tree)
            return existing
        if kind == "ale":
            import ale_py

            existing.restoreState(ale_py.ALEState(tree["data"].numpy().tobytes()))
            return existing
        if kind == "object" and tree["class"] in _IN_PLACE and _qualified(existing) == tree["class"]:
            self.attributes(existing, tree["attributes"])
            return existing
        raise RloptError(
            f"the saved state of the environment has an unknown part {kind!r}; it does not fit this environment"
        )


def _same_kind(existing: Any, kind: type) -> Any:
    if existing is None or not isinstance(existing, kind):
        raise RloptError(
            "the saved environment has a part that this one lacks; build it with the same kwargs and wrappers"
        )
    return existing


def snapshot(env: Env) -> State | None:
    """Return the exact state of ``env`` with all its wrappers, or None where it cannot be saved (the reason is logged
    at INFO)."""
    layers = _layers(env)
    encoder = _Encoder(layers)
    states: list[State] = []
    for layer in layers:
        try:
            if _has_protocol(layer):
                states.append({"class": _qualified(layer), "own": encoder.encode(layer.state_dict())})  # type: ignore[attr-defined]
            else:
                states.append({"class": _qualified(layer), "attributes": encoder.attributes(layer)})
        except (_Unsaveable, TypeError) as e:
            _log.info("%s cannot be saved: it holds %s", type(layer).__name__, e)
            return None
    return {"layers": states}


def restore(env: Env, state: State) -> None:
    """Put ``env``, built like the saved one, into the state that ``snapshot`` returned.

    Raises:
        RloptError: the state is of other wrappers or another environment.
    """
    layers, decoder = _layers(env), _Decoder()
    saved = [s["class"] for s in state["layers"]]
    if saved != [_qualified(layer) for layer in layers]:
        raise RloptError(
            f"the saved environment is {' > '.join(saved)}, this one is {' > '.join(map(_qualified, layers))}"
        )
    for layer, tree in zip(layers, state["layers"], strict=True):
        if "own" in tree:
            layer.load_state_dict(decoder.decode(tree["own"], None))  # type: ignore[attr-defined]
        else:
            decoder.attributes(layer, tree["attributes"])


def _has_protocol(layer: Env) -> bool:
    return callable(getattr(type(layer), "state_dict", None)) and callable(
        getattr(type(layer), "load_state_dict", None)
    )
