"""How loops over arrays become machine code, kept between processes."""

from __future__ import annotations

import functools
import hashlib
from importlib import import_module
from pathlib import Path
from typing import Any

numba: Any = import_module("numba")


def jit(function: Any, signature: Any = None, **options: Any) -> Any:
    """``numba.njit`` with a cache that is as old as the package's source.

    With a ``signature`` the function is compiled at once, for it alone; without one there is a version for every
    combination of argument types that it meets.

    Machine code holds the code of what it calls and the constants that it reads, while numba's cache looks at the
    function's own file only: a change of another file would leave old code in use.
    """
    made = numba.njit(error_model="numpy", **options)(function)
    made.enable_caching()
    file = getattr(made._cache, "_cache_file", None)
    if file is not None:
        file._source_stamp = _stamp()
    if signature is not None:
        made.compile(signature)
        made.disable_compile()
    return made


def compiles(function: Any) -> bool:
    """Whether calling a function means compiling it, because no earlier process has left its machine code."""
    file = getattr(function._cache, "_cache_file", None)
    return not function.signatures and (file is None or not file._load_index())


@functools.cache
def _stamp() -> str:
    """Of all source files of the package: compiled functions call each other and hold each other's constants."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
