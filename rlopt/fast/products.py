"""What compiled code needs beyond NumPy: memory by address, torch's matrix product, and work shared between threads.

Everything here is called from functions under ``compiled``, which hold no interpreter lock.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlopt.jit import jit, numba

ir: Any = import_module("llvmlite.ir")
intrinsic: Any = import_module("numba.extending").intrinsic
overload: Any = import_module("numba.extending").overload
int32, int64, voidptr, none = numba.types.int32, numba.types.int64, numba.types.voidptr, numba.types.void
PROGRESS = int64[:, :, ::1]
WORD = ir.IntType(64)
POINTER = ir.IntType(8).as_pointer()

Array = npt.NDArray[Any]
F = TypeVar("F", bound=Callable[..., Any])

LOOKS, NAP = 400_000, 20
"""How a thread waits for another: so many looks (some 150 µs), then naps of this many µs, so that a busy machine loses
little to it."""


FLAGS = {"reassoc", "contract", "nsz"}


def compiled(function: F) -> F:
    """Return machine code that lets other threads run. Sums may be reordered into vector lanes; nothing is assumed
    about NaN or infinity."""
    made: F = jit(function, nogil=True, fastmath=FLAGS)
    return made


def compiled_for(*arguments: Any) -> Callable[[F], F]:
    """Return ``compiled``, for arguments of these types alone."""
    return lambda function: jit(function, arguments, nogil=True, fastmath=FLAGS)


def array(tensor: Tensor) -> Array:
    """Return the memory of a tensor as NumPy sees it; bfloat16 becomes uint16."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    found: Array = tensor.numpy()
    return found


# ---- memory by address


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(context: Any, address: Any) -> Any:
    return voidptr(int64), lambda c, builder, s, args: builder.inttoptr(args[0], POINTER)


@compiled_for(int64, int64)
def floats(address: int, size: int) -> Array:
    """Return float32 (size,) at an address."""
    found: Array = numba.carray(_pointer(address), (size,), np.float32)
    return found


@compiled_for(int64, int64, int64)
def matrix(address: int, rows: int, columns: int) -> Array:
    """Return float32 (rows, columns), contiguous, at an address."""
    found: Array = numba.carray(_pointer(address), (rows, columns), np.float32)
    return found


@compiled_for(int64, int64, int64)
def low_matrix(address: int, rows: int, columns: int) -> Array:
    """Return the bits of bfloat16 (rows, columns), contiguous, at an address."""
    found: Array = numba.carray(_pointer(address), (rows, columns), np.uint16)
    return found


# ---- torch.mm


class Products:
    """``torch.mm`` for compiled code, through the C interface that torch's compiler generates calls to.

    Operands are registered once (``add``) and keep their memory; ``torch`` computes with the threads of the caller.
    """

    def __init__(self) -> None:
        address = _find_mm()
        assert address is not None
        self.state = np.array([address, 0], np.int64)
        """For ``product``: where the function is, and whether a call failed."""
        self._kept: list[Tensor] = []
        self._handles: list[Any] = []
        weakref.finalize(self, torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs, self._handles)

    def add(self, operand: Tensor) -> int:
        """Return a number for an operand, any 2-d view without gradient."""
        (handle,) = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([operand.detach()])
        self._kept.append(operand)
        self._handles.append(handle)
        return _address_in(handle)

    def check(self) -> None:
        """Raise RuntimeError if a product failed since the last look."""
        if self.state[1]:
            self.state[1] = 0
            raise RuntimeError("torch refused a matrix product of the compiled update; agent.fused=false avoids it")


def products_available() -> bool:
    """Return whether this build of torch has the interface that ``Products`` uses."""
    return _find_mm() is not None


def _find_mm() -> int | None:
    names = {"linux": "libtorch_cpu.so", "darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}
    if not hasattr(getattr(torch._C, "_aoti", None), "unsafe_alloc_void_ptrs_from_tensors"):
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / names[sys.platform]))
        return ctypes.cast(library.aoti_torch_cpu_mm_out, ctypes.c_void_p).value
    except (KeyError, OSError, AttributeError):
        return None


def _address_in(capsule: Any) -> int:
    read = ctypes.pythonapi.PyCapsule_GetPointer
    read.restype, read.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return int(read(capsule, None))


@intrinsic  # type: ignore[untyped-decorator]
def _call(context: Any, function: Any, out: Any, left: Any, right: Any) -> Any:
    def build(c: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [POINTER] * 3).as_pointer()
        return builder.call(builder.inttoptr(args[0], kind), [builder.inttoptr(a, POINTER) for a in args[1:]])

    return int32(int64, int64, int64, int64), build


@compiled_for(int64[::1], int64, int64, int64)
def product(state: Array, out: int, left: int, right: int) -> None:
    """Compute out = left @ right, of operands by number."""
    if _call(state[0], out, left, right) != 0:
        state[1] = 1


# ---- work shared between threads


@intrinsic  # type: ignore[untyped-decorator]
def _load(context: Any, address: Any) -> Any:
    def build(c: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], WORD.as_pointer()), "acquire", 8)

    return int64(int64), build


@intrinsic  # type: ignore[untyped-decorator]
def _increment(context: Any, address: Any) -> Any:
    def build(c: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], WORD.as_pointer()), WORD(1), "seq_cst")

    return int64(int64), build


@intrinsic  # type: ignore[untyped-decorator]
def _replace(context: Any, address: Any, old: Any, new: Any) -> Any:
    """Return whether the word was ``old``, and is ``new`` now."""

    def build(c: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], WORD.as_pointer())
        pair = builder.cmpxchg(pointer, args[1], args[2], "seq_cst", "seq_cst")
        return builder.zext(builder.extract_value(pair, 1), WORD)

    return int64(int64, int64, int64), build


@intrinsic  # type: ignore[untyped-decorator]
def _sleep(context: Any, microseconds: Any) -> Any:
    def build(c: Any, builder: Any, signature: Any, args: Any) -> Any:
        if sys.platform != "win32":
            kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32)])
            usleep = builder.module.globals.get("usleep") or ir.Function(builder.module, kind, "usleep")
            builder.call(usleep, [builder.trunc(args[0], ir.IntType(32))])
        return c.get_dummy_value()

    return none(int64), build


def counters(phases: int) -> Array:
    """Return progress of a piece of shared work that is done again and again: for each phase how many of its tasks have
    been taken and how many are done, ever, each on a cache line of its own."""
    return np.zeros((phases, 2, 8), np.int64)


def rounds(progress: Array, phase: int, tasks: int) -> int:
    """Return how many rounds of this phase are done."""
    return int(progress[phase, 1, 0]) // tasks


@compiled_for(PROGRESS, int64, int64, int64)
def claim(progress: Array, phase: int, round_: int, tasks: int) -> int:
    """Return a task 0 … tasks - 1 of this phase that nobody has taken in this round, or -1. Rounds count from 0; a
    thread that comes late finds nothing left."""
    address = progress[phase, 0].ctypes.data
    first = round_ * tasks
    while True:
        taken = _load(address)
        if taken >= first + tasks:
            return -1
        if _replace(address, taken, taken + 1):
            task: int = taken - first
            return task


@compiled_for(PROGRESS, int64)
def finish(progress: Array, phase: int) -> None:
    """Tell that a claimed task is done."""
    _increment(progress[phase, 1].ctypes.data)


@compiled_for(PROGRESS, int64, int64, int64)
def wait(progress: Array, phase: int, round_: int, tasks: int) -> None:
    """Wait until every task of the phase is done in this round."""
    address = progress[phase, 1].ctypes.data
    looks = 0
    while _load(address) < (round_ + 1) * tasks:
        looks += 1
        if looks > LOOKS:
            _sleep(NAP)
