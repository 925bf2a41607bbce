"""The ``rlopt`` command, also as ``python -m rlopt``."""

import sys

from rlopt.interrupts import leave_at_once

leave_at_once()

from rlopt.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
