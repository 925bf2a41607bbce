"""How loops over arrays are compiled, and what NumPy has no word for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from rlopt.jit import jit, numba

_extending: Any = import_module("numba.extending")
_ir: Any = import_module("llvmlite.ir")


def compiled(loop: Any) -> Any:
    """Return machine code that adds in the order written, kept between processes."""
    return jit(loop)


def _prefetch(typing_context: Any, array: Any, i: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(array)(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), _ir.IntType(8).as_pointer())
        number = _ir.IntType(32)
        takes = _ir.FunctionType(_ir.VoidType(), [address.type, number, number, number])
        call = builder.module.declare_intrinsic("llvm.prefetch", [address.type], takes)
        builder.call(call, [address, number(0), number(3), number(1)])  # to be read, to be kept, data
        return context.get_dummy_value()

    return numba.types.void(array, i), code


prefetch: Any = _extending.intrinsic(_prefetch)
"""``prefetch(array, i)``, in compiled loops: ask for the cache line of element ``i`` of a flat array. No wait, and no
harm where it is not used."""
