"""``python -m rlopt`` is the ``rlopt`` command."""

import sys

from rlopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
