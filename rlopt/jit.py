"""How loops over arrays become machine code, kept between processes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from importlib import import_module
from pathlib import Path
from typing import Any

numba: Any = import_module("numba")
compiler_lock: Any = import_module("numba.core.compiler_lock").global_compiler_lock
try:
    fcntl: Any = import_module("fcntl")
except ImportError:  # Windows
    fcntl = None


def jit(function: Any, signature: Any = None, **options: Any) -> Any:
    """Compile by ``numba.njit`` with a cache that is as old as all the source that went into it.

    With a ``signature`` the function is compiled at once, for it alone; without one there is a version for every
    combination of argument types that it meets.

    Machine code holds the code of what it calls and the constants that it reads, while numba's cache looks at the
    function's own file only: a change of another file would leave old code in use.
    """
    made = numba.njit(error_model="numpy", **options)(function)
    made.enable_caching()
    file = getattr(made._cache, "_cache_file", None)
    if file is not None:
        file._source_stamp = _stamp(Path(function.__code__.co_filename))
        file._load_index = functools.partial(_index, file._load_index)
    if file is not None and fcntl is not None:
        made.compile = _one_process_at_a_time(made.compile, Path(file._index_path).with_suffix(".lock"))
    if signature is not None:
        made.compile(signature)
        made.disable_compile()
    return made


def compiles(function: Any) -> bool:
    """Return whether calling a function means compiling it, because no earlier process has left its machine code."""
    file = getattr(function._cache, "_cache_file", None)
    return not function.signatures and (file is None or not file._load_index())


def _index(load: Any) -> Any:
    """Return what the cache holds; nothing, where older source had other names for what its versions take."""
    try:
        return load()
    except (AttributeError, ImportError):
        return {}


def _one_process_at_a_time(compile_: Any, lock: Path) -> Any:
    """Let processes that need the same machine code wait for the first, which leaves it in the cache for them."""

    @functools.wraps(compile_)
    def alone(signature: Any) -> Any:
        with contextlib.ExitStack() as stack:
            stack.enter_context(compiler_lock)  # first, as for all that it calls
            with contextlib.suppress(OSError):  # a file system without locks: then each compiles for itself
                lock.parent.mkdir(parents=True, exist_ok=True)
                fcntl.flock(stack.enter_context(lock.open("w")), fcntl.LOCK_EX)
            return compile_(signature)

    return alone


@functools.cache
def _stamp(path: Path) -> str:
    """Of a source file, this one, and all that they import from the package, directly or not."""
    found: dict[Path, bytes] = {}
    left = [path, Path(__file__)]
    while left:
        file = left.pop()
        if file not in found and file.is_file():
            found[file] = file.read_bytes()
            left += [_file_of(name.decode()) for name in _IMPORT.findall(found[file])]
    return hashlib.sha256(b"".join(found[file] for file in sorted(found))).hexdigest()


_IMPORT = re.compile(rb"^\s*(?:from|import) (rlopt[\w.]*)", re.MULTILINE)


def _file_of(module: str) -> Path:
    place = Path(__file__).parents[1].joinpath(*module.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
