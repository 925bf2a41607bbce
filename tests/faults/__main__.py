"""Break rlopt on purpose, count what comes of it, and fail where anything came of it that should not.

    python -m tests.faults                       all of it: under 40 minutes on two cores
    python -m tests.faults --quick               a sample of 5 %, as the tests run it
    python -m tests.faults --only folders,json --share 0.2 --seed 7

Categories: ``kills`` (200 runs over all agents, killed at random), ``folders`` (1,000 damaged ones), ``json`` (every
bit of a policy's JSON files) and ``weights`` (10,000 of its weights), ``commands`` (400 wrong ones), ``hostile``
(folders made to do harm). Every case ends as one of: equal (as if nothing had been), refused (one line says what is
wrong), told (another result, and a warning says so); or, which is a fault: silent (another result), traceback, effect
(an import, a write outside, no end).
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # forked processes must meet no pool of threads
    os.environ[threads] = "1"
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="rlopt-faults-")

import torch  # noqa: E402

from rlopt.runs.run_folder import RunFolder  # noqa: E402
from tests.faults import commands, flips, folders, hostile, kills  # noqa: E402
from tests.faults.outcomes import Outcome, Result, table_of  # noqa: E402
from tests.training.conftest import no_curve  # noqa: E402

Category = Callable[[float, random.Random, Path], Iterator[Outcome]]


def _counted(count: int, work: Callable[[int, random.Random, Path], Iterator[Outcome]]) -> Category:
    return lambda share, chance, folder: work(max(1, round(share * count)), chance, folder)


CATEGORIES: dict[str, Category] = {
    "kills": _counted(200, kills.run),  # first: nothing has started a thread yet
    "folders": _counted(1_000, folders.run),
    "json": flips.run_json,
    "weights": _counted(10_000, flips.run_weights),
    "commands": _counted(400, commands.run),
    "hostile": hostile.run,
}
QUICK = {"kills": 0.02, "folders": 0.02, "json": 0.05, "weights": 0.02, "commands": 0.05, "hostile": 0.05}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="see the module's docstring")
    parser.add_argument("--only", default=",".join(CATEGORIES), help="categories, separated by commas")
    parser.add_argument("--share", type=float, default=1.0, help="of the cases of each category")
    parser.add_argument("--quick", action="store_true", help="a small share of each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    RunFolder.draw_curve = no_curve  # type: ignore[method-assign]
    logging.getLogger("gymnasium").setLevel(logging.ERROR)
    results = []
    for name in arguments.only.split(","):
        share = QUICK[name] * arguments.share if arguments.quick else arguments.share
        folder = Path(tempfile.mkdtemp(prefix=f"rlopt-faults-{name}-", dir=_fast_disk()))
        begun = time.monotonic()
        outcomes = list(CATEGORIES[name](share, random.Random(f"{arguments.seed} {name}"), folder))
        results.append(Result(name, outcomes, time.monotonic() - begun))
        for outcome in results[-1].faults:
            print(f"{name}: {outcome.kind}: {outcome.case}: {outcome.detail}", flush=True)
        if not results[-1].faults:
            shutil.rmtree(folder, ignore_errors=True)
    print(table_of(results))
    return int(any(result.faults for result in results))


def _fast_disk() -> str | None:
    """Where every fsync of a thousand saves costs next to nothing."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


if __name__ == "__main__":
    sys.exit(main())
