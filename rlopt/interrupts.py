"""Ctrl-C while the command line starts. Imports next to nothing, as it comes before everything else."""

from __future__ import annotations

import os
import signal
from types import FrameType


def leave_at_once() -> None:
    """Let Ctrl-C end this process in one line while modules are being imported, where an exception would surface as
    anything or be swallowed; nothing has begun then that would have to be ended."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def is_usual() -> bool:
    """Return whether nobody else answers Ctrl-C in this process."""
    return signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _leave)


def _leave(signum: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(128 + signum)
