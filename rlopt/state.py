"""State trees on disk: ``state.json`` for the structure, ``tensors.safetensors`` for the tensors, never a pickle.

Reading one runs no code and builds nothing but dicts, lists, tuples, numbers, strings and tensors, whoever wrote it.

In ``state.json`` plain values stand for themselves; what JSON lacks is an object with one key that begins with ``$``:
``{"$tensor": name}``, ``{"$complex": name}`` (a real tensor with a last axis of two), ``{"$tuple": [...]}`` and
``{"$float": hex}`` (the 64 bits of a float that is not finite). A dictionary's own key that begins with ``$`` is
written with one more.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import struct
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlopt.files import Digest, sync_folder, write_file
from rlopt.types import RloptError, State

STRUCTURE = "state.json"
TENSORS = "tensors.safetensors"
MAX_JSON_BYTES = 1 << 25
"""A larger file is not read: its objects would take some 25 times its size in memory."""
MAX_DEPTH = 100
"""Containers inside containers; deeper trees are a cycle or an attack."""

_DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CorruptCheckpoint(RloptError):
    """A file is damaged, incomplete or hostile; the message names it and says what is wrong."""


class RowLog(Protocol):
    """Data that only grows at its end, such as a replay buffer: saved as append-only segments."""

    capacity_rows: int
    """Rows kept; row r lies at slot ``r % capacity_rows``."""
    rows_written: int
    """Rows ever written."""

    def read_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return rows ``start`` … ``stop-1``, each tensor (stop-start, …), on the CPU."""
        ...

    def write_rows(self, start: int, rows: dict[str, Tensor]) -> None:
        """Put back rows read by ``read_rows``; ``rows_written`` itself is restored by ``load_state_dict``."""
        ...

    def forget_rows(self, start: int, stop: int) -> None:
        """Go on without these rows, which could not be put back, once all others are. Raises RloptError where that
        cannot be."""
        ...


def save_state(folder: Path, state: State) -> dict[str, Digest]:
    """Write ``state`` into ``folder`` (made if need be) and wait until the disk has it.

    Not atomic: stage in a temporary folder and move it with ``files.replace_folder``. Returns each file's size and
    SHA-256. Parameters come back as tensors, OrderedDicts as dicts, tensors that share memory as separate ones,
    non-contiguous ones as contiguous ones; everything else comes back as it was, bit for bit.

    Raises:
        TypeError: for anything that is no tensor, number, string, bool, None, list, tuple or dict with str keys; the
            message names its path.
        OSError: if the disk fails or is full, or if there is more beside the tensors than ``load_state`` would read.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(state, (), tensors), allow_nan=False, separators=(",", ":"))
    if len(text) > MAX_JSON_BYTES:
        raise OSError(errno.EFBIG, f"{STRUCTURE} would have {len(text)} bytes, more than {MAX_JSON_BYTES}")
    folder.mkdir(parents=True, exist_ok=True)
    written = {
        TENSORS: write_tensors(folder / TENSORS, tensors),
        STRUCTURE: write_file(folder / STRUCTURE, [text.encode()]),
    }
    sync_folder(folder)
    return written


def load_state(folder: Path, device: torch.device | str = "cpu") -> State:
    """Read what ``save_state`` wrote, with every tensor on ``device``.

    Raises:
        CorruptCheckpoint: if a file is missing, damaged, or not what ``save_state`` writes.
    """
    path = folder / STRUCTURE
    tree = read_json(path)
    tensors = read_tensors(folder / TENSORS, device)
    try:
        state = _decode(tree, tensors, 0)
    except (ValueError, KeyError, TypeError) as e:
        raise CorruptCheckpoint(f"{path} is damaged: {e}") from None
    if tensors:
        raise CorruptCheckpoint(f"{path} is damaged: nothing refers to tensor {next(iter(tensors))!r}")
    if not isinstance(state, dict):
        raise CorruptCheckpoint(f"{path} is damaged: a state is an object, not {type(state).__name__}")
    return state


def states_equal(a: Any, b: Any) -> str | None:
    """Return None if two states are bitwise equal, NaN payloads and signed zeros included, else ``path: what differs``
    of the first difference. The order of a dictionary's keys, the device and ``requires_grad`` do not count."""
    return _difference(a, b, ())


def state_bytes(state: Any) -> int:
    """Return bytes of all tensors in a state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    children = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(state_bytes, children))


# Tensor files


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Digest:
    """Write a safetensors file tensor by tensor, hashing on the way; no second copy of all the data is ever held."""
    order = list(_DTYPES)  # widest first, so that every tensor lies aligned
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    header: dict[str, Any] = {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)

    def chunks() -> Iterator[bytes | memoryview]:
        yield struct.pack("<Q", len(head)) + head
        for name in names:
            yield memoryview(_raw(tensors[name]).numpy())  # type: ignore[arg-type]

    return write_file(path, chunks())


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return all tensors of a safetensors file, as copies that do not depend on the file any longer.

    Raises:
        CorruptCheckpoint: if the file is missing or no sound safetensors file.
    """
    try:
        if not path.is_file():
            raise CorruptCheckpoint(f"{path} is missing")
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name).to(device, copy=True) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as e:
        raise CorruptCheckpoint(f"{path} is damaged: {_line(e)}") from None


def _raw(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor: a 1-d uint8 tensor on the CPU."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)


# JSON files


def read_json(path: Path) -> Any:
    """Return the JSON in a file.

    Raises:
        CorruptCheckpoint: if the file is missing, no JSON, too large, or nested too deeply.
    """
    try:
        if not path.is_file():
            raise CorruptCheckpoint(f"{path} is missing")
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise CorruptCheckpoint(f"{path} has {size} bytes, more than the {MAX_JSON_BYTES} that are read")
        return json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as e:
        raise CorruptCheckpoint(f"{path} is damaged: {_line(e)}") from None


def checksum(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON object's content but ``checksum`` itself; the rule holds for every format."""
    body = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


# Plain JSON


def tag_floats(tree: Any) -> Any:
    """Return plain values as JSON has them: a float that is not finite becomes ``{"$float": hex}``, a tuple a list, and
    a key that begins with ``$`` has one more."""
    if isinstance(tree, float) and not math.isfinite(tree):
        return {"$float": struct.pack(">d", tree).hex()}
    if isinstance(tree, Mapping):
        return {"$" + key if str(key).startswith("$") else key: tag_floats(child) for key, child in tree.items()}
    return [tag_floats(child) for child in tree] if isinstance(tree, list | tuple) else tree


def untag_floats(tree: Any) -> Any:
    """Return what ``tag_floats`` was given. Raises ValueError where a ``$float`` holds no float."""
    if isinstance(tree, dict):
        if tree.keys() == {"$float"}:
            return float(struct.unpack(">d", _float_bits(tree["$float"]))[0])
        return {key[1:] if key.startswith("$$") else key: untag_floats(child) for key, child in tree.items()}
    return [untag_floats(child) for child in tree] if isinstance(tree, list) else tree


# The tree


def _where(path: tuple[str, ...]) -> str:
    return "/".join(path) or "the state itself"


def _encode(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
    if len(path) > MAX_DEPTH:
        raise TypeError(f"{_where(path[:5])}/… is nested more than {MAX_DEPTH} deep; does it contain itself?")
    if isinstance(value, Tensor):
        return _encode_tensor(value, path, tensors)
    if kind in (dict, OrderedDict):
        for key in value:
            if type(key) is not str:
                raise TypeError(f"{_where((*path, repr(key)))}: a state has str keys, not {type(key).__name__}")
        return {
            "$" + key if key.startswith("$") else key: _encode(child, (*path, key), tensors)
            for key, child in value.items()
        }
    if kind in (list, tuple):
        items = [_encode(child, (*path, str(i)), tensors) for i, child in enumerate(value)]
        return items if kind is list else {"$tuple": items}
    raise TypeError(
        f"{_where(path)}: a state holds tensors, numbers, strings, bools, None, lists, tuples and dicts, not "
        f"{kind.__module__}.{kind.__qualname__}"
    )


def _encode_tensor(value: Tensor, path: tuple[str, ...], tensors: dict[str, Tensor]) -> dict[str, str]:
    tag = "$tensor"
    if value.is_complex():
        tag, value = "$complex", torch.view_as_real(value.detach().resolve_conj())
    if value.dtype not in _DTYPES or value.layout != torch.strided or value.is_meta:
        raise TypeError(f"{_where(path)}: no way to save a tensor of {value.dtype}, {value.layout}, on {value.device}")
    name = "/".join(path)
    while name in tensors or name == "__metadata__":  # the format's one reserved name; "a/b" beside a → b
        name += "'"
    tensors[name] = value
    return {tag: name}


def _decode(node: Any, tensors: dict[str, Tensor], depth: int) -> Any:
    """Consumes ``tensors``: each is referred to once, so that a small file cannot ask for endless copies."""
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(node, list):
        return [_decode(child, tensors, depth + 1) for child in node]
    tag, content = next(iter(node.items())) if len(node) == 1 else ("", None)
    if tag in ("$tensor", "$complex"):
        if content not in tensors:
            raise ValueError(f"{TENSORS} has no tensor {content!r} left")
        tensor = tensors.pop(content)
        return tensor if tag == "$tensor" else _complex(tensor)
    if tag == "$tuple":
        return tuple(_decode(child, tensors, depth + 1) for child in _expect_list(content))
    if tag == "$float":
        return float(struct.unpack(">d", _float_bits(content))[0])
    result = {}
    for key, child in node.items():
        if key.startswith("$") and not key.startswith("$$"):
            raise ValueError(f"unknown tag {key!r}")
        result[key[1:] if key.startswith("$") else key] = _decode(child, tensors, depth + 1)
    return result


def _expect_list(content: Any) -> list[Any]:
    if not isinstance(content, list):
        raise ValueError("a $tuple holds a list")
    return content


def _float_bits(content: Any) -> bytes:
    if not isinstance(content, str) or len(content) != 16:
        raise ValueError("a $float holds 16 hexadecimal digits")
    return bytes.fromhex(content)


def _complex(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or tensor.ndim < 1 or tensor.shape[-1] != 2:
        raise ValueError("a $complex tensor has a last axis of two floats")
    return torch.view_as_complex(tensor)


def _difference(a: Any, b: Any, path: tuple[str, ...]) -> str | None:
    def differs(what: str) -> str:
        return f"{_where(path)}: {what}"

    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return differs(f"{a.dtype} {tuple(a.shape)} is not {b.dtype} {tuple(b.shape)}")
        raw_a, raw_b = _raw(a), _raw(b)
        if torch.equal(raw_a, raw_b):
            return None
        unequal = (raw_a != raw_b).reshape(a.numel(), -1).any(1)
        return differs(f"{int(unequal.sum())} of {a.numel()} elements differ")
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a:
            if key not in b:
                return differs(f"key {key!r} is missing from the second")
            if (found := _difference(a[key], b[key], (*path, str(key)))) is not None:
                return found
        extra = [key for key in b if key not in a]
        return differs(f"key {extra[0]!r} is missing from the first") if extra else None
    if type(a) is not type(b):
        return differs(f"{type(a).__name__} is not {type(b).__name__}")
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return differs(f"{len(a)} items are not {len(b)}")
        pairs = (_difference(x, y, (*path, str(i))) for i, (x, y) in enumerate(zip(a, b, strict=True)))
        return next((found for found in pairs if found is not None), None)
    same = struct.pack(">d", a) == struct.pack(">d", b) if isinstance(a, float) else bool(a == b)
    return None if same else differs(f"{a!r} is not {b!r}")
