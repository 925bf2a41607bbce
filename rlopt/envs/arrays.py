"""NumPy arrays as parts of a state tree: exact dtype, shape and memory order."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rlopt.types import State

Array = np.ndarray[Any, np.dtype[Any]]

_TENSOR_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")


def root_of(array: Array) -> Array | None:
    """Return the array that owns the memory which ``array`` shows; None where no NumPy array does."""
    root: Any = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    if root.base is None:
        return root  # type: ignore[no-any-return]
    return array if isinstance(root.base, bytes) else None  # bytes never change, so a copy is as good


def array_to_tree(array: Array) -> State:
    """Return a copy of ``array`` as a tree; dtypes that torch lacks travel as their bytes.

    Raises:
        TypeError: an array of objects or of records.
    """
    if array.dtype.kind in "OV":
        raise TypeError(f"an array of {array.dtype}")
    fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    dense = np.array(array.T if fortran else array, order="C", copy=True)
    if array.dtype.name in _TENSOR_DTYPES and array.dtype.isnative:
        data = torch.from_numpy(dense)
    else:
        data = (
            torch.frombuffer(bytearray(dense.tobytes()), dtype=torch.uint8)
            if dense.size
            else torch.zeros(0, dtype=torch.uint8)
        )
    return {"data": data, "dtype": array.dtype.str, "shape": list(array.shape), "order": "F" if fortran else "C"}


def array_from_tree(tree: State) -> Array:
    """Return the array that ``array_to_tree`` was given."""
    shape = tuple(tree["shape"])
    fortran = tree["order"] == "F"
    flat = np.frombuffer(tree["data"].cpu().numpy().tobytes(), np.dtype(tree["dtype"]))
    # The copy comes last, so that the array owns its memory as the saved one did.
    return flat.reshape(shape[::-1]).T.copy(order="F") if fortran else flat.reshape(shape).copy()
