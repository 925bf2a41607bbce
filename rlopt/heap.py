"""Memory that was freed, kept for what comes next."""

from __future__ import annotations

import ctypes
import os
from functools import cache

KEPT = 2**28
"""Bytes of freed memory that the heap may keep; a larger block is the system's as ever."""
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
"""Variables by which a user has said what the heap does."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # <malloc.h>
_LARGEST_OF_OLD = 2**25  # what glibc before 2.35 takes as the second


@cache
def keep_freed_memory() -> None:
    """Let glibc keep up to ``KEPT`` bytes of what is freed.

    It returns the free end of its heap to the system, some megabytes at a time. A network of images allocates and frees
    tens of megabytes in every update, so each would fault all its pages in again: a tenth of the time of DQN on Atari.

    Nothing changes where the environment says anything of malloc, or where the C library is another.
    """
    if any(name in os.environ for name in SETTINGS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    try:
        if not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            return
    except (AttributeError, ValueError):  # Windows, and systems whose C library has no such name
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_TRIM_THRESHOLD, KEPT)
    # Setting either stops glibc from adapting the other, and a block that it maps is faulted in every time.
    if not mallopt(_MMAP_THRESHOLD, KEPT):
        mallopt(_MMAP_THRESHOLD, _LARGEST_OF_OLD)
