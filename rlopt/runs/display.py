"""The live display of a run: a panel on a terminal and in a notebook, plain lines elsewhere. It never stops a run."""

from __future__ import annotations

import importlib
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

PLAIN_SECONDS = 10.0
"""Between plain lines."""
PANEL_SECONDS = 0.25
"""Between redrawings of the panel."""

_RETURNS = {"return": "episode_return", "evaluation": "evaluation_return"}
_KNOWN = ("steps_per_second", "seconds_left", "env_seconds", "learn_seconds", "updates", *_RETURNS.values())


class Display:
    """Shows progress on ``stream``.

    ``update`` takes any floats; these names have their own place: ``steps_per_second``, ``seconds_left`` (NaN where
    nobody can tell; where it is not given the speed tells), ``episode_return`` (training), ``evaluation_return``,
    ``env_seconds`` and ``learn_seconds`` (as shares of their sum); ``updates`` is not shown, the rest (losses) is
    listed in order. A value stays until it is replaced. A closed pipe silences the display; what an encoding lacks is
    shown as ``?``.
    """

    def __init__(self, total_steps: int, unit: str = "steps", stream: TextIO | None = None, runs: int = 1) -> None:
        self.total_steps = total_steps
        """What is aimed at, in every run; may be lowered on the way."""
        self.runs = runs
        """How many train side by side: the speed is that of all of them together."""
        self._unit = unit
        self._stream: TextIO | None = sys.stdout if stream is None else stream
        self._values: dict[str, float] = {}
        self._step: int | None = None
        self._first: tuple[int, float] | None = None
        self._shown_at: float | None = None
        self._shown_step: int | None = None
        self._live: Any = None
        self._guard(self._open_live)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Take the newest state of the run, and show it if it is time."""
        now = _now()
        self._step = step
        self._values |= values
        if self._first is None:
            self._first = (step, now)
        pause = PLAIN_SECONDS if self._live is None else PANEL_SECONDS
        if self._shown_at is None or now - self._shown_at >= pause:
            self._show()

    def message(self, text: str) -> None:
        """Print a line that stays."""
        if self._live is not None:
            line = self._readable(text)
            self._guard(lambda: self._live.console.print(line, markup=False, highlight=False, soft_wrap=True))
        else:
            self._print(text)

    def close(self) -> None:
        """Show the last state and give the terminal back. Safe to call twice."""
        if self._step is not None and self._shown_step != self._step:
            self._show()
        if self._live is not None:
            self._guard(self._live.stop)
            self._live = None

    def _show(self) -> None:
        self._shown_at, self._shown_step = _now(), self._step
        if self._live is not None:
            self._guard(lambda: self._live.update(self._panel(), refresh=True))
        else:
            self._print(self._line())

    # What is shown

    def _line(self) -> str:
        parts = [f"step {self._step}/{self.total_steps} ({self._percent()}%)", *self._speed(), *self._returns()]
        parts += [f"{name} {_number(value)}" for name, value in self._rest()[:4]]
        parts += [part for part in (self._split(), self._left()) if part]
        return "  ".join(parts)

    def _panel(self) -> Any:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        head = Table.grid(padding=(0, 2))
        step = self._readable(f"{self._step}/{self.total_steps} {self._unit} ({self._percent()}%)")
        head.add_row(ProgressBar(self.total_steps, self._step or 0, width=30), step, *self._speed(), self._left())
        body = Table.grid(padding=(0, 2))
        cells = [part.split(" ", 1) for part in self._returns()] + [
            [self._readable(k), _number(v)] for k, v in self._rest()
        ]
        for i in range(0, len(cells), 3):
            body.add_row(*(text for cell in cells[i : i + 3] for text in cell))
        return Panel(Group(head, body, self._split()), expand=False)

    def _percent(self) -> int:
        return 100 * (self._step or 0) // max(1, self.total_steps)

    def _rate(self) -> float:
        """Steps per second of all runs: the newest given, else the mean since the first update."""
        if (given := self._values.get("steps_per_second")) is not None:
            return given
        step, since = self._first or (0, 0.0)
        seconds = _now() - since
        return self.runs * ((self._step or 0) - step) / seconds if seconds > 0 else 0.0

    def _speed(self) -> list[str]:
        rate = self._rate()
        of = f" of {self.runs} runs" if self.runs > 1 else ""
        return [(f"{rate:.0f} steps/s" if rate >= 10 else f"{rate:.2g} steps/s") + of] if rate > 0 else []

    def _returns(self) -> list[str]:
        return [f"{label} {self._values[name]:.1f}" for label, name in _RETURNS.items() if name in self._values]

    def _rest(self) -> list[tuple[str, float]]:
        return [(name, value) for name, value in self._values.items() if name not in _KNOWN]

    def _split(self) -> str:
        env, learn = self._values.get("env_seconds", 0.0), self._values.get("learn_seconds", 0.0)
        total = env + learn
        return f"env {100 * env / total:.0f}% learn {100 * learn / total:.0f}%" if total > 0 else ""

    def _left(self) -> str:
        if (given := self._values.get("seconds_left")) is not None:
            return f"left {_duration(given)}" if math.isfinite(given) else ""
        rate = self._rate()
        steps = self.runs * (self.total_steps - (self._step or 0))
        return f"left {_duration(steps / rate)}" if rate > 0 else ""

    # Writing, come what may

    def _open_live(self) -> None:
        if self._stream is sys.stdout and (show := _notebook()) is not None:
            self._live = _NotebookPanel(show)
            return
        if self._stream is None or not self._stream.isatty():
            return
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self._stream)
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(console=console, auto_refresh=False)
            self._live.start()

    def _print(self, text: str) -> None:
        def write() -> None:
            if self._stream is not None:
                self._stream.write(self._readable(text) + "\n")
                self._stream.flush()

        self._guard(write)

    def _readable(self, text: str) -> str:
        """``text`` with ``?`` for what the stream's encoding lacks."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return text.encode(encoding, "replace").decode(encoding)

    def _guard(self, write: Callable[[], object]) -> None:
        try:
            write()
        except (OSError, ValueError):  # its reader is gone, or it was closed
            self._drop_live()
            _discard(self._stream)
            self._stream = None

    def _drop_live(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            try:
                live.stop()
            except (OSError, ValueError):
                return


class _NotebookPanel:
    """Shows one output that changes, below the lines that stay; has what is used of rich's ``Live``."""

    def __init__(self, show: Callable[..., Any]) -> None:
        self._show, self._handle = show, None
        self.console = self

    def update(self, panel: Any, refresh: bool = True) -> None:
        if self._handle is None:
            self._handle = self._show(panel, display_id=True)
        else:
            self._handle.update(panel)

    def print(self, line: str, **_: Any) -> None:
        sys.stdout.write(line + "\n")

    def stop(self) -> None:
        self._handle = None


def _notebook() -> Callable[..., Any] | None:
    """Return what shows an object in the notebook whose kernel this process is; None elsewhere."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None or not hasattr(shell, "kernel"):
        return None
    show: Callable[..., Any] = importlib.import_module("IPython.display").display
    return show


def _discard(stream: TextIO | None) -> None:
    """Send what a broken standard stream still holds to nowhere, else Python fails on it when it exits."""
    if stream is None or not any(stream is standard for standard in (sys.__stdout__, sys.__stderr__)):
        return
    try:
        fd = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, fd)
        os.close(nowhere)
    except (OSError, ValueError):
        return


def _now() -> float:
    return time.monotonic()


def _number(value: float) -> str:
    return f"{value:.4g}"


def _duration(seconds: float) -> str:
    """``45s``, ``12m14s``, ``3h05m``, ``2d07h``."""
    whole = int(seconds + 0.5)
    for large, small, names in ((86400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
        if whole >= large:
            return f"{whole // large}{names[0]}{whole % large // small:02d}{names[1]}"
    return f"{whole}s"
