"""``python -m rlopt.cli``: the same as the ``rlopt`` command, where none is installed."""

import sys

from rlopt.cli import main

sys.exit(main())
