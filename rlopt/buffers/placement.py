"""Where tensors lie: main memory, a GPU, or a file on disk mapped into memory."""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlopt.allocation import free_memory
from rlopt.types import RloptError


class Placement:
    """Allocates uninitialised tensors in one place.

    Args:
        device: a torch device, or ``disk``: a file mapped into memory, of which the system keeps in main memory what
            it has room for. Its tensors are CPU tensors.
        folder: where the files of ``disk`` are made; None for the current directory. The space is reserved at once,
            and the files have no name once they are open, so the system frees them when the process ends, however it
            ends.
    """

    def __init__(self, device: torch.device | str, folder: str | Path | None = None) -> None:
        self.on_disk = device == "disk"
        self.device = torch.device("cpu" if self.on_disk else device)
        self.folder = Path(folder or ".")
        if self.on_disk and not self.folder.is_dir():
            raise RloptError(f"buffer.folder={self.folder} is no folder; make it, or name one on a disk with room")

    def __str__(self) -> str:
        return f"disk ({self.folder})" if self.on_disk else str(self.device)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor. On the CPU its pages are taken as they are first written."""
        if self.on_disk:
            return self._mapped(shape, dtype)
        try:
            if self.device.type == "cpu":
                # NumPy asks for huge pages, torch does not: random rows are then found a tenth sooner.
                room = np.empty(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
                return torch.from_numpy(room).view(dtype).view(tuple(shape))
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)
        except (RuntimeError, MemoryError) as e:  # out of memory, on either kind of device
            size = math.prod(shape) * dtype.itemsize / 2**30
            raise RloptError(f"{self} gave no {size:.1f} GiB for the buffer; {WAYS_OUT}") from e

    def _mapped(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        handle, path = tempfile.mkstemp(prefix="rlopt-buffer-", dir=self.folder)
        try:
            # Without the reservation a full disk would end the process with SIGBUS at some later write.
            _reserve(handle, max(1, count * dtype.itemsize))
            return torch.from_file(path, shared=True, size=count, dtype=dtype).view(tuple(shape))
        except OSError as e:
            raise RloptError(f"no room for the buffer in {self.folder}: {e.strerror}; {WAYS_OUT}") from e
        finally:
            os.close(handle)
            os.unlink(path)

    def free(self) -> int | None:
        """Return the bytes free there; None where that cannot be told."""
        return shutil.disk_usage(self.folder).free if self.on_disk else free_memory(self.device)

    def taken(self, nbytes: int, slots: int, planned: int | None) -> int:
        """Return how many of the ``nbytes`` of a buffer are taken if no more than ``planned`` of its ``slots`` are ever
        written: in main memory that part, elsewhere all of them at once."""
        if planned is None or planned >= slots or self.on_disk or self.device.type != "cpu":
            return nbytes
        return nbytes * planned // slots

    def check(self, nbytes: int, slots: int) -> None:
        """Raise RloptError where a buffer of ``nbytes`` for ``slots`` transitions does not fit."""
        free = self.free()
        if free is not None and nbytes > free:
            size = f"{nbytes / 2**30:.1f} GiB, but {self} has {free / 2**30:.1f} GiB free"
            raise RloptError(f"a buffer of {slots:,} transitions needs {size}; {WAYS_OUT}")


WAYS_OUT = (
    "lower buffer.capacity, keep images as uint8 and stacked ones as single frames (buffer.frame_stack), or put it on "
    "another device (buffer.device=disk)"
)


def _reserve(handle: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
            return
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(handle, size)  # a file system that reserves nothing
