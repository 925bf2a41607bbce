"""A run's ``config.yaml``: plain YAML under a first line that tells of damage, of changes by hand, and whose run it is.

::

    # rlopt sha256=… own=…
    seed: 3

``sha256`` is that of what follows. ``own`` proves that what the file names (the environment, its wrappers, a folder for
the buffer) was named by this user: it is an HMAC with a key that lies in a private file, made with the first run. So
one's own runs are known wherever they are moved or copied to, and a file from elsewhere cannot pass for one of them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlopt.errors import RloptError
from rlopt.files import remove

MAX_BYTES = 1 << 17
"""A larger file is not read; rlopt writes about 3 KiB."""
_MARK = "# rlopt "
_FIRST_LINE = re.compile(r"# rlopt sha256=([0-9a-f]{64}) own=([0-9a-f]{64}|-)")
_KEY_BYTES = 32


@dataclass(frozen=True)
class Settings:
    """What a ``config.yaml`` says."""

    values: dict[str, Any]
    intact: bool | None
    """Whether it is as rlopt wrote it; None where it has no first line (hand-written, or by a program)."""
    proof: str = "-"

    @property
    def own(self) -> bool:
        """Whether what it names was named by this user."""
        found = _proof(self.values, make=False)
        return found is not None and hmac.compare_digest(found, self.proof)


def settings_file(folder: str | Path) -> Path:
    """Return a run folder's ``config.yaml``. Raises RloptError where there is none."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise RloptError(f"{folder} is no run folder (it has no config.yaml); give the folder that training printed")
    return path


def write_settings(values: Mapping[str, Any]) -> bytes:
    """Return the file for ``values``, signed as this user's.

    Raises:
        TypeError: they are no plain values.
    """
    try:
        text = str(yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))
    except yaml.YAMLError as e:
        raise TypeError(f"a configuration holds plain values only: {' '.join(str(e).split())}") from e
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{_MARK}sha256={digest} own={_proof(yaml.load(text, _Loader), make=True) or '-'}\n{text}".encode()


def read_settings(path: Path) -> Settings:
    """Return what the file ``path`` says.

    Raises:
        RloptError: it is missing, too large, no YAML, or no mapping; in one line.
    """
    return parse_settings(read_settings_text(path), path)


def read_settings_text(path: Path) -> str:
    """Return the text of the file ``path``. Raises as ``read_settings`` does."""
    try:
        if not path.is_file():
            raise RloptError(f"{path.parent} holds no run (no {path.name}); name the folder that a run printed")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise RloptError(f"{path} has {size} bytes, more than the {MAX_BYTES} that are read")
        return path.read_bytes().decode()
    except (OSError, ValueError) as e:
        raise RloptError(f"{path} cannot be read: {' '.join(str(e).split())}") from None


def parse_settings(text: str, path: Path) -> Settings:
    """Return what ``text`` says, which was found at ``path``. Raises as ``read_settings`` does."""
    intact, proof, body = None, "-", text
    if text.startswith(_MARK):
        first, _, body = text.partition("\n")
        found = _FIRST_LINE.fullmatch(first)
        proof = found[2] if found else "-"
        intact = found is not None and found[1] == hashlib.sha256(body.encode()).hexdigest()
    try:
        values = yaml.load(body, _Loader)
    except (ValueError, RecursionError, yaml.YAMLError) as e:
        raise RloptError(f"{path} cannot be read: {' '.join(str(e).split())}") from None
    if not isinstance(values, dict):
        raise RloptError(f"{path} is no configuration: it should hold keys and values")
    return Settings({str(key): value for key, value in values.items()}, intact, proof)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Plain values only, each written out: ten lines of aliases may stand for a billion values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias (*name), which rlopt neither writes nor reads")
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    def ignore_aliases(self, data: Any) -> bool:
        return True


# Whose run it is


def _proof(values: Mapping[str, Any], make: bool) -> str | None:
    """Return the HMAC of what ``values`` name; None without a key, which is made where there is none and ``make`` says
    so."""
    key = _key(make)
    if key is None:
        return None
    buffer = values.get("buffer")
    named = {"env": values.get("env"), "folder": buffer.get("folder") if isinstance(buffer, dict) else None}
    try:
        text = json.dumps(named, sort_keys=True, default=str)
    except (TypeError, ValueError, RecursionError):  # keys that cannot be sorted: not rlopt's
        return None
    return hmac.new(key, text.encode(), "sha256").hexdigest()


def _key(make: bool) -> bytes | None:
    """This user's key; None where there is none and none can be made, as without a home."""
    try:
        path = _key_path()
        if make and not os.path.lexists(path):
            _make_key(path)
        return _read_key(path)
    except (OSError, RuntimeError):
        return None


def _key_path() -> Path:
    home = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "rlopt" / "key"


def _make_key(path: Path) -> None:
    """Make a key that nobody else may read. Of several processes that do so at once, the first one's stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    staged = path.with_name(f".key.{os.getpid()}")
    remove(staged)
    try:
        handle = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(handle, os.urandom(_KEY_BYTES))
            os.fsync(handle)
        finally:
            os.close(handle)
        with suppress(FileExistsError):
            os.link(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def _read_key(path: Path) -> bytes | None:
    """Return the key, if it is this user's and nobody else may change or read it."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        found = os.fstat(handle)
        private = os.name == "nt" or (found.st_uid == os.geteuid() and not found.st_mode & 0o077)
        key = os.read(handle, _KEY_BYTES + 1) if private and stat.S_ISREG(found.st_mode) else b""
    finally:
        os.close(handle)
    return key if len(key) == _KEY_BYTES else None
