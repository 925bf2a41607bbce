"""The command line: ``rlopt train``, ``sweep``, ``queue``, ``evaluate``, ``plot``, ``export``, ``push`` and ``list``.

What imports torch is imported inside the commands, so that help and listings answer at once.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType

from rlopt.cli.environment import prepare_environment
from rlopt.interrupts import is_usual

_noted: list[int] = []
"""Each Ctrl-C since the command began."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of ``argv`` (default: the process's) and return its exit code.

    A mistake of the user's is one line on stderr and code 2; whatever else goes wrong keeps its traceback.
    """
    prepare_environment()
    _see_working_directory()
    if isinstance(sys.stdout, io.TextIOWrapper):  # where … cannot be written stands a ?
        sys.stdout.reconfigure(errors="replace")
    _noted.clear()
    return _run(sys.argv[1:] if argv is None else list(argv))


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt where Ctrl-C was pressed: one that meets a module while it loads may be swallowed."""
    if _noted:
        raise KeyboardInterrupt


def _see_working_directory() -> None:
    """Find the user's modules where the command is typed (``env=mymodule:Env-v0``), after all that is installed: a
    ``matplotlib.py`` that lies there stands for nothing.

    ``python -m`` and a script put their folder in front, which is undone here."""
    with contextlib.suppress(FileNotFoundError):
        here = os.getcwd()
        if sys.flags.safe_path:
            return
        if sys.path and sys.path[0] in ("", here):
            del sys.path[0]
        if not {"", here} & set(sys.path):
            sys.path.append(here)


@contextlib.contextmanager
def _noted_interrupts() -> Iterator[None]:
    """Note each Ctrl-C: one that meets an extension module while it loads surfaces as another error, or as none."""

    def note(signum: int, frame: FrameType | None) -> None:
        _noted.append(signum)
        signal.default_int_handler(signum, frame)

    before = signal.getsignal(signal.SIGINT)
    if not is_usual() or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _run(argv: list[str]) -> int:
    try:
        from rlopt.cli.arguments import parse_arguments

        arguments = parse_arguments(argv)
    except SystemExit as stop:  # after help and after a mistake
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    try:
        command = importlib.import_module(arguments.module)
        with _noted_interrupts():
            return int(command.run(arguments))
    except SystemExit as stop:  # code of the user's: what was asked for has not been done
        frame = traceback.extract_tb(stop.__traceback__)[-1]
        print(f"error: {frame.filename}, line {frame.lineno}, ended rlopt: {frame.line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before a run begins or after it has been saved; in between the trainer answers it
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe (`rlopt list | head`) left; Python would complain once more while it shuts down.
        sys.stdout = None
        return 0
    except Exception as error:
        if _noted:
            print("interrupted", file=sys.stderr)
            return 130
        from rlopt.errors import RloptError

        if not isinstance(error, RloptError):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        for note in getattr(error, "__notes__", []):  # where a user's own code failed
            print(note.rstrip(), file=sys.stderr)
        return 2
