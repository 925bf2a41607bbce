"""State trees on disk come back bit for bit, and no file makes reading one run code."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlopt.state import CorruptCheckpoint, load_state, save_state, states_equal
from rlopt.types import RloptError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.complex64,
    torch.complex128,
]


def round_trip(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    save_state(folder, state)
    return load_state(folder)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {
        "matrix": torch.tensor([[0, 1, 2], [1, 0, 1]]).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.empty((0, 3), dtype=dtype),
    }
    back = round_trip(tmp_path, state)
    assert back["matrix"].dtype == dtype
    assert back["matrix"].tolist() == state["matrix"].tolist()
    assert back["scalar"].shape == () and back["empty"].shape == (0, 3)
    assert states_equal(state, back) is None


def test_plain_values_keep_type_and_value(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "none": None,
        "true": True,
        "one": 1,
        "one_point": 1.0,
        "huge": 2**127 + 1,
        "tenth": 0.1,
        "tiny": 5e-324,
        "minus_zero": -0.0,
        "word": "naïve \ud800 \0 ∇",
        "empty": [{}, [], ()],
        "nested": [(1, [2.5, {"deep": (None,)}])],
        "$tensor": {"$tuple": "a key may look like a tag", "$": 0, "$$float": 1},
        "a/b": 1,
    }
    back = round_trip(tmp_path, state)
    assert back == state
    assert type(back["true"]) is bool and type(back["one"]) is int and type(back["one_point"]) is float
    assert str(back["minus_zero"]) == "-0.0"
    assert back["empty"][2] == () and type(back["nested"][0]) is tuple


def test_floats_that_are_not_finite_keep_their_bits(tmp_path: Path) -> None:
    payload = struct.unpack(">d", bytes.fromhex("7ff80000deadbeef"))[0]
    state = {"inf": float("inf"), "minus": float("-inf"), "nan": float("nan"), "payload": payload}
    back = round_trip(tmp_path, state)
    assert back["inf"] == float("inf") and back["minus"] == float("-inf")
    assert struct.pack(">d", back["payload"]).hex() == "7ff80000deadbeef"
    json.loads((tmp_path / "state.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_tensor_bits_survive_nan_payloads_and_signed_zeros(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC0BEEF, -0x80000000, 0x7F800000, 0x7FA00001], dtype=torch.int32)
    back = round_trip(tmp_path, {"x": bits.view(torch.float32)})
    assert back["x"].view(torch.int32).tolist() == bits.tolist()


def test_views_parameters_and_shared_memory_are_saved_as_values(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "transposed": base.t(),
        "strided": base[:, ::2],
        "expanded": torch.ones(1).expand(5),
        "shared": [base, base],
        "parameter": torch.nn.Parameter(base),
        "module": OrderedDict(weight=base[0]),
        "conjugate": torch.tensor([1 + 2j]).conj(),
    }
    back = round_trip(tmp_path, state)
    assert back["transposed"].tolist() == base.t().tolist() and back["transposed"].is_contiguous()
    assert back["strided"].tolist() == [[0.0, 2.0], [4.0, 6.0], [8.0, 10.0]]
    assert back["expanded"].tolist() == [1.0] * 5
    assert back["conjugate"].tolist() == [1 - 2j]
    assert type(back["parameter"]) is torch.Tensor and type(back["module"]) is dict
    back["shared"][0].zero_()
    assert back["shared"][1].tolist() == base.tolist()


def test_names_that_collide_in_the_tensor_file_stay_apart(tmp_path: Path) -> None:
    state = {
        "a/b": torch.zeros(1),
        "a": {"b": torch.ones(1), "b'": torch.full((1,), 2.0)},
        "__metadata__": torch.ones(2),
    }
    assert states_equal(state, round_trip(tmp_path, state)) is None


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path: Path) -> None:
    back = round_trip(tmp_path, {"x": torch.arange(1000.0)})
    with open(tmp_path / "tensors.safetensors", "r+b") as file:
        file.truncate(0)
    assert back["x"].sum().item() == 499500.0


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.lists(st.floats(width=32), max_size=4).map(lambda values: torch.tensor(values, dtype=torch.float32))
)
trees = st.dictionaries(
    st.text(),
    st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(st.text(), inner, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(state=trees)
def test_any_state_comes_back(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> None:
    assert states_equal(state, round_trip(tmp_path_factory.mktemp("any"), state)) is None


class Custom:
    pass


@pytest.mark.parametrize(
    "value",
    [Custom(), {1, 2}, b"bytes", 1j, np.float64(1.0), np.zeros(2), torch.float32, lambda: None, Custom],
    ids=["object", "set", "bytes", "complex", "numpy-number", "numpy-array", "dtype", "function", "class"],
)
def test_anything_else_is_refused_by_its_path(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match=r"agent/optimiser/1/x"):
        save_state(tmp_path, {"agent": {"optimiser": [0, {"x": value}]}})


def test_int_keys_sparse_tensors_and_cycles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"optimiser/0: .*str keys, not int"):
        save_state(tmp_path, {"optimiser": {0: 1}})
    with pytest.raises(TypeError, match="net/sparse"):
        save_state(tmp_path, {"net": {"sparse": torch.eye(2).to_sparse()}})
    with pytest.raises(TypeError, match="net/meta"):
        save_state(tmp_path, {"net": {"meta": torch.empty(2, device="meta")}})
    cycle: dict[str, Any] = {}
    cycle["again"] = cycle
    with pytest.raises(TypeError, match="contain itself"):
        save_state(tmp_path, cycle)
    assert list(tmp_path.iterdir()) == []


def test_states_equal_names_the_first_difference() -> None:
    x = torch.tensor([1.0, 2.0])
    state = {"a": {"b": [x, 1]}, "c": 0.0}
    assert states_equal(state, {"c": 0.0, "a": {"b": [x.clone(), 1]}}) is None
    assert states_equal(state, {"a": {"b": [x + torch.tensor([0, 1]), 1]}, "c": 0.0}) == "a/b/0: 1 of 2 elements differ"
    assert states_equal(state, {"a": {"b": [x, 1]}, "c": -0.0}) == "c: 0.0 is not -0.0"
    assert states_equal(state, {"a": {"b": [x, 1, 2]}, "c": 0.0}) == "a/b: 2 items are not 3"
    assert states_equal(state, {"a": {"b": [x, True]}, "c": 0.0}) == "a/b/1: int is not bool"
    assert states_equal(state, {"a": {"b": [x, 1]}}) == "the state itself: key 'c' is missing from the second"
    assert states_equal({}, {"d": 1}) == "the state itself: key 'd' is missing from the first"
    assert states_equal({"x": x}, {"x": x.double()}) == "x: torch.float32 (2,) is not torch.float64 (2,)"
    assert states_equal({"x": torch.zeros(2)}, {"x": -torch.zeros(2)}) == "x: 2 of 2 elements differ"
    nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert states_equal({"x": nan}, {"x": nan.clone()}) is None
    assert states_equal({"x": nan[:1]}, {"x": nan[1:]}) == "x: 1 of 1 elements differ"


# Hostile files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_state(tmp_path, {"x": torch.arange(4.0), "y": 1})
    return tmp_path


def put_json(folder: Path, tree: Any) -> None:
    (folder / "state.json").write_text(json.dumps(tree))


class Exploding:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_pickle_is_never_run(saved: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    payload = pickle.dumps(Exploding())

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("reading a state must not unpickle")

    (saved / name).write_bytes(payload)
    for function in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, function, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(CorruptCheckpoint, match=name):
        load_state(saved)
    assert not (saved / "exploded").exists()


def test_a_torch_archive_is_refused(saved: Path) -> None:
    torch.save({"x": torch.zeros(1)}, saved / "tensors.safetensors")
    with pytest.raises(CorruptCheckpoint, match=r"tensors\.safetensors is damaged"):
        load_state(saved)


@pytest.mark.parametrize(
    "tree",
    [
        {"x": {"$tensor": "nothing"}, "y": 1},
        {"x": {"$tensor": 3}, "y": 1},
        {"x": {"$tensor": ["x"]}, "y": 1},
        {"x": {"$tensor": "x"}, "again": {"$tensor": "x"}},
        {"y": 1},
        {"x": {"$tensor": "x"}, "y": {"$import": "os"}},
        {"x": {"$tensor": "x", "$tuple": []}},
        {"x": {"$complex": "x"}},
        {"x": {"$tensor": "x"}, "y": {"$tuple": 3}},
        {"x": {"$tensor": "x"}, "y": {"$float": "zz"}},
        {"x": {"$tensor": "x"}, "y": {"$float": 7}},
        {"$tensor": "x"},
        [{"$tensor": "x"}],
    ],
    ids=str,
)
def test_a_structure_that_we_do_not_write_is_refused(saved: Path, tree: Any) -> None:
    put_json(saved, tree)
    with pytest.raises(CorruptCheckpoint, match=r"state\.json is damaged"):
        load_state(saved)


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"x": NaN}', "x".encode("utf-16"), b"\xff\xfe\x00", "9" * 5000, "[" * 100_000, '{"a":' * 100_000],
    ids=["empty", "cut", "nan", "utf16", "bytes", "digits", "lists", "objects"],
)
def test_bad_json_is_refused(saved: Path, text: str | bytes) -> None:
    (saved / "state.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CorruptCheckpoint, match=r"state\.json is damaged"):
        load_state(saved)


def test_deep_nesting_within_what_json_reads_is_refused(saved: Path) -> None:
    (saved / "state.json").write_text('{"x": {"$tensor": "x"}, "y": ' + "[" * 300 + "]" * 300 + "}")
    with pytest.raises(CorruptCheckpoint, match="nested more than 100 deep"):
        load_state(saved)


def safetensors(header: bytes, data: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def one(dtype: str, shape: list[int], offsets: list[int]) -> bytes:
    return json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        safetensors(b"{}", size=2**63),
        safetensors(b"{}", size=200_000_000),
        safetensors(b"{}", size=3),
        safetensors(b"[" * 100_000),
        safetensors(one("F32", [4], [0, 16])),
        safetensors(one("F32", [4], [0, 16]), b"\0" * 15),
        safetensors(one("F32", [4], [0, 16]), b"\0" * 17),
        safetensors(one("F32", [4], [4, 20]), b"\0" * 20),
        safetensors(one("F32", [2**62, 2**62], [0, 16]), b"\0" * 16),
        safetensors(one("F32", [-4], [0, 16]), b"\0" * 16),
        safetensors(one("OBJECT", [4], [0, 16]), b"\0" * 16),
    ],
    ids=range(13),
)
def test_hostile_tensor_files_are_refused(saved: Path, content: bytes) -> None:
    (saved / "tensors.safetensors").write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=r"tensors\.safetensors is damaged"):
        load_state(saved)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_missing_files_and_folders_in_their_place(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(RloptError, match=f"{name} is missing"):
        load_state(saved)
    (saved / name).mkdir()
    with pytest.raises(CorruptCheckpoint, match=name):
        load_state(saved)
