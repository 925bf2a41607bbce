"""Files that survive a crash: written, fsynced, and only then given their name.

Nothing here writes, empties or deletes through a link: one that stands where a file or a folder is to be made is
replaced or refused, and where it leads stays as it was. A link on the way there is found by ``refuse_links``, which is
asked before anything is written into a tree that somebody else may have made.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from rlopt.errors import RloptError

_CHUNK = 1 << 24
"""Bytes given to one write."""


class Digest(NamedTuple):
    """What a manifest records of a file."""

    bytes: int
    sha256: str


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> Digest:
    """Write ``chunks`` to a new file ``path`` in place of an older one, wait for the disk, and return the size and
    SHA-256 of what was given."""
    digest, size = hashlib.sha256(), 0
    path.unlink(missing_ok=True)
    with open(path, "xb") as file:
        for chunk in chunks:
            view = memoryview(chunk)
            for start in range(0, len(view), _CHUNK):
                part = view[start : start + _CHUNK]
                _write(file, part)
                digest.update(part)
            size += len(view)
        file.flush()
        os.fsync(file.fileno())
    return Digest(size, digest.hexdigest())


def open_own(path: Path, flags: int) -> int:
    """Open a file for writing where it lies, or make it, as ``os.open`` does, and return its descriptor.

    Raises:
        OSError: ``path`` is a link, has a second name elsewhere (a hard link), is no plain file, or cannot be opened.
    """
    # A pipe would be waited for. Windows lacks the flags; making a link takes a right of its own there.
    safely = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
    handle = os.open(path, flags | os.O_CREAT | safely, 0o666)
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(handle)
        raise OSError(errno.EINVAL, "a plain file with one name is wanted there; remove it", str(path))
    return handle


def _write(file: BinaryIO, data: memoryview) -> None:
    """The one place where checkpoints reach a file; tests make it fail."""
    file.write(data)


def digest_file(path: Path) -> Digest:
    """Return the size and SHA-256 of a file as it is now."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return Digest(os.fstat(file.fileno()).st_size, sha256)


def replace_file(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a crash leaves the old file or the new one, whole."""
    staged = path.with_name(f".{path.name}.tmp")
    remove(staged)
    try:
        write_file(staged, [data])
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    sync_folder(path.parent)


def adopt_files(folder: Path) -> dict[str, Digest]:
    """Wait until the disk has all files below ``folder``, which a library wrote, and return what they are, by their
    paths in it."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        found[path.relative_to(folder).as_posix()] = digest_file(path)
    for parent in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync_folder(parent)
    return found


def remove(path: Path) -> None:
    """Delete a file, a folder with all in it, or a link and not what it leads to; nothing where there is nothing.

    Raises:
        OSError: it cannot be deleted; of a folder, what could be is gone.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fresh_folder(path: Path) -> Path:
    """Make an empty folder in place of whatever is called so; its parent must be there."""
    remove(path)
    path.mkdir()
    return path


def replace_folder(staged: Path, target: Path) -> None:
    """Give a finished folder the name ``target``. A folder already there steps aside first and is deleted last, so that
    a crash leaves one of the two; ``recover_folder`` puts it back if the crash fell in between."""
    aside = _aside(target)
    recover_folder(target)
    replaces = os.path.lexists(target)
    if replaces:
        os.replace(target, aside)
    try:
        os.replace(staged, target)
    except OSError:
        if replaces:
            os.replace(aside, target)
        raise
    sync_folder(target.parent)
    with suppress(OSError):
        remove(aside)


def recover_folder(target: Path) -> None:
    """Finish a ``replace_folder`` that was interrupted: ``target`` exists afterwards if it did before."""
    aside = _aside(target)
    if not os.path.lexists(aside):
        return
    if os.path.lexists(target):
        with suppress(OSError):
            remove(aside)
    else:
        os.replace(aside, target)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def sync_folder(folder: Path) -> None:
    """Wait until the disk has a folder's entries; a no-op where folders cannot be opened (Windows)."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def refuse_links(folder: Path, inside: Collection[str] | None = None) -> None:
    """Check that everything in ``folder`` is a plain file or a folder, all the way down (or in those called ``inside``
    only), so that what is written into it stays in it. ``folder`` itself may be a link.

    Raises:
        RloptError: a link, a pipe, a device or a socket; the line names it.
    """
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            if inside is None or entry.name in inside:
                refuse_links(Path(entry.path))
        elif not entry.is_file(follow_symlinks=False):
            what = f"a link (to {os.readlink(entry.path)})" if entry.is_symlink() else "no plain file"
            raise RloptError(f"{entry.path} is {what}, and a run writes through none; remove it or name another folder")


def free_bytes(path: Path) -> int:
    """Return the bytes that may still be written below ``path``, which need not exist yet."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
