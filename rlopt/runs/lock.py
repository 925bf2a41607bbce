"""One writer at a time: an exclusive lock on a folder."""

from __future__ import annotations

import logging
import os
import sys
import weakref
from pathlib import Path
from typing import IO

from rlopt.errors import RloptError
from rlopt.files import open_own

_log = logging.getLogger(__name__)


class Lock:
    """Hold a folder for this process alone; the operating system lets it go when the process ends, however it ends.

    Raises:
        RloptError: another process holds it; the message names that process.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        file = os.fdopen(open_own(folder / ".lock", os.O_RDWR), "r+b")
        try:
            _lock_file(file)
        except OSError as e:
            file.seek(0)
            owner = file.read(20).decode(errors="replace").strip() or "unknown"
            file.close()
            raise RloptError(
                f"{folder} is being written by process {owner}; wait for it, stop it, or name another run_dir"
            ) from e
        file.seek(0)
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        file.flush()
        self._folder, self._file = folder, file
        # Open, so that no new folder gets its number on the disk. Windows opens none, and removes none that is in use.
        self._handle = None if os.name == "nt" else os.open(folder, os.O_RDONLY)
        _held.add(self)

    def in_place(self) -> bool:
        """Return whether the folder still is what its name leads to."""
        try:
            found = os.stat(self._folder)
            return self._handle is None or os.path.samestat(found, os.fstat(self._handle))
        except OSError:
            return False

    def release(self) -> None:
        """Let the folder go. Safe to call twice."""
        self._file.close()
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        _held.discard(self)


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget_after_fork() -> None:
    """A forked worker must not hold the lock too: it would outlive a killed trainer."""
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)

if sys.platform == "win32":
    import msvcrt

    def _lock_file(file: IO[bytes]) -> None:
        file.seek(1 << 20)  # a locked byte cannot be read, so leave those that name the owner
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import errno
    import fcntl

    def _lock_file(file: IO[bytes]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            _log.warning("this file system has no locks (%s); let only one process write the run folder", e)
