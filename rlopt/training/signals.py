"""Ctrl-C and SIGTERM while a run goes on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from time import monotonic
from types import FrameType
from typing import Any


class Signals:
    """Turns Ctrl-C and SIGTERM into a request to finish the step, save and return; a second one acts as usual.

    One press can arrive twice (from the terminal, and passed on by a launcher), so what follows within a second is
    the same request.
    """

    GRACE = 1.0

    def __init__(self, request_stop: Callable[[int], None]) -> None:
        self.request_stop = request_stop
        self.first: float | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for s in (signal.SIGINT, signal.SIGTERM):
                self.previous[s] = signal.signal(s, self._handle)

    def __exit__(self, *_: object) -> None:
        for s, handler in self.previous.items():
            signal.signal(s, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.first is None:
            self.first = monotonic()
            self.request_stop(signum)
        elif monotonic() - self.first > self.GRACE:
            signal.signal(signum, self.previous[signum])
            signal.raise_signal(signum)
