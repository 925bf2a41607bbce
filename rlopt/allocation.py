"""What main memory and a GPU have room for, and one line where that is not enough."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from rlopt.types import RloptError

_NOTICEABLE = 2**28
"""Bytes below which nobody looks whether they are there."""
_REFUSED = re.compile(
    r"can't allocate memory|not enough memory|out of memory|Storage size calculation overflowed|array is too big|"
    "Maximum allowed dimension exceeded"
)
_BYTES = re.compile(r"allocate (\d+) bytes")


def free_memory(device: torch.device) -> int | None:
    """Return the bytes free on ``device``; None where that cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [free for free in (_available(), _left_to_group()) if free is not None]
    return min(found, default=None)


def _available() -> int | None:
    try:
        with open("/proc/meminfo") as f:
            for line in f:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _left_to_group(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return what a container's limit leaves; the file cache that it can give up does not count as used."""
    try:
        limit = (root / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((root / "memory.current").read_text())
        cache = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - used + int(cache.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None


def refuse_unless_free(nbytes: int, what: str, way_out: str, device: torch.device = torch.device("cpu")) -> None:
    """Refuse ``what``, of ``nbytes``, where ``device`` has less. A system that promises more than it has would end the
    process, without a word, when that is used.

    Raises:
        RloptError: it does not fit; ``way_out`` says what to do.
    """
    if nbytes < _NOTICEABLE:
        return
    free = free_memory(device)
    if free is not None and nbytes > free:
        size = f"{nbytes / 2**30:,.1f} GiB, and {free / 2**30:.1f} GiB are free on {device}"
        raise RloptError(f"{what} needs {size}; {way_out}")


def lacks_memory(error: BaseException) -> bool:
    """Return whether this error says that memory was refused, by Python, NumPy or torch on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | ValueError) and _REFUSED.search(str(error)) is not None


@contextmanager
def memory_told(way_out: str) -> Iterator[None]:
    """Tell in one line where memory was refused.

    Raises:
        RloptError: it was; ``way_out`` says what to do.
    """
    try:
        yield
    except Exception as e:
        if isinstance(e, RloptError) or not lacks_memory(e):
            raise
        asked = _BYTES.search(str(e))
        size = f" {int(asked[1]) / 2**30:,.1f} GiB at once are more than there is" if asked else ""
        raise RloptError(f"out of memory:{size or ' ' + ' '.join(str(e).split())[:200]}; {way_out}") from e
