"""The command line: ``rlopt train``, ``evaluate``, ``plot`` and ``list``.

What imports torch is imported inside the commands, so that help and listings answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rlopt.cli.arguments import parse_arguments
from rlopt.cli.environment import prepare_environment


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of ``argv`` (default: the process's) and return its exit code.

    A mistake of the user's is one line on stderr and code 2; whatever else goes wrong keeps its traceback.
    """
    prepare_environment()
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else list(argv))
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

        if not isinstance(error, RloptError):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
