"""``python -m rlopt.cli``: the same as the ``rlopt`` command, where none is installed."""

import sys

from rlopt.cli import main
from rlopt.interrupts import leave_at_once

leave_at_once()
sys.exit(main())
