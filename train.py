"""``python train.py KEY=VALUE …`` is ``rlopt train KEY=VALUE …``; see ``python train.py --help``."""

import sys

from rlopt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
