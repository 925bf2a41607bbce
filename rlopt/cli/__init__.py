"""The command line: ``rlopt train``, ``evaluate``, ``plot`` and ``list``.

What imports torch is imported inside the commands, so that help and listings answer at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

from rlopt.cli.arguments import parse_arguments
from rlopt.cli.environment import prepare_environment


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of ``argv`` (default: the process's) and return its exit code.

    A mistake of the user's is one line on stderr and code 2; whatever else goes wrong keeps its traceback.
    """
    prepare_environment()
    _see_working_directory()
    if isinstance(sys.stdout, io.TextIOWrapper):  # where … cannot be written stands a ?
        sys.stdout.reconfigure(errors="replace")
    with _noted_interrupts() as interrupts:
        return _run(sys.argv[1:] if argv is None else list(argv), interrupts)


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
def _noted_interrupts() -> Iterator[list[int]]:
    """Note each Ctrl-C: one that meets an extension module while it loads surfaces as an ImportError instead."""
    noted: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        noted.append(signum)
        signal.default_int_handler(signum, frame)

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield noted
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(argv: list[str], interrupts: list[int]) -> int:
    try:
        arguments = parse_arguments(argv)
        return int(arguments.run(arguments))
    except SystemExit as stop:  # argparse ends this way after help and after a mistake
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:  # before a run begins or after it has been saved; in between the trainer answers it
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe (`rlopt list | head`) left; Python would complain once more while it shuts down.
        sys.stdout = None
        return 0
    except Exception as error:
        from rlopt.types import RloptError

        if isinstance(error, ImportError) and interrupts:
            print("interrupted", file=sys.stderr)
            return 130
        if not isinstance(error, RloptError):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        for note in getattr(error, "__notes__", []):  # where a user's own code failed
            print(note.rstrip(), file=sys.stderr)
        return 2
