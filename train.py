"""``python train.py KEY=VALUE …`` is ``rlopt train KEY=VALUE …``; see ``python train.py --help``."""

import sys

from rlopt.interrupts import leave_at_once

leave_at_once()

from rlopt.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
