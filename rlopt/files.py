"""Files that survive a crash: written, fsynced, and only then given their name."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

_CHUNK = 1 << 24
"""Bytes given to one write."""


class Digest(NamedTuple):
    """What a manifest records of a file."""

    bytes: int
    sha256: str


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> Digest:
    """Write ``chunks`` to ``path``, wait for the disk, and return the size and SHA-256 of what was given."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
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


def _write(file: BinaryIO, data: memoryview) -> None:
    """The one place where checkpoints reach a file; tests make it fail."""
    file.write(data)


def digest_file(path: Path) -> Digest:
    """Size and SHA-256 of a file as it is now."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return Digest(os.fstat(file.fileno()).st_size, sha256)


def replace_file(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a crash leaves the old file or the new one, whole."""
    staged = path.with_name(f".{path.name}.tmp")
    try:
        write_file(staged, [data])
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    sync_folder(path.parent)


def replace_folder(staged: Path, target: Path) -> None:
    """Give a finished folder the name ``target``. A folder already there steps aside first and is deleted last, so that
    a crash leaves one of the two; ``recover_folder`` puts it back if the crash fell in between."""
    aside = _aside(target)
    recover_folder(target)
    replaces = target.exists()
    if replaces:
        os.replace(target, aside)
    try:
        os.replace(staged, target)
    except OSError:
        if replaces:
            os.replace(aside, target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Finish a ``replace_folder`` that was interrupted: ``target`` exists afterwards if it did before."""
    aside = _aside(target)
    if not aside.exists():
        return
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
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


def free_bytes(path: Path) -> int:
    """Bytes that may still be written below ``path``, which need not exist yet."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
