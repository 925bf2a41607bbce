"""How long a command takes to answer and to begin, beside the time that importing torch takes.

    python benchmarks/startup.py --rounds 5 --out results/startup
    python benchmarks/startup.py --checkout ../before       # of another checkout, for comparison

Every line is a process of its own with a warm file cache, timed from its start to its end, all lines in turn, round
after round; two rounds before those that count fill the caches (bytecode, machine code). The first training step is
that of ``python train.py`` as it is typed (SAC on Pendulum), after the evaluation of the untrained policy; the first
update comes 1,000 steps later.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness import Report, cpu, versions

ENDS = """\
import os, sys
from rlopt.cli.environment import prepare_environment
prepare_environment()
from rlopt.cli import main
from rlopt.loops.replay import ReplayLoop
advance = ReplayLoop.advance
def first(self):
    progress = advance(self)
    if {until}:
        os._exit(0)
    return progress
ReplayLoop.advance = first
main(["train"])
"""
"""What ``python train.py`` does, until a condition holds."""

TORCH = "import torch"
CASES: Mapping[str, tuple[Sequence[str], float | str | None]] = {
    TORCH: (("-c", "import torch"), None),
    "rlopt --help": (("-m", "rlopt", "--help"), 0.3),
    "a mistake in a word: agent=sca": (("-m", "rlopt", "train", "agent=sca"), TORCH),
    "a mistake in an option: agent.learning_rte=1": (("-m", "rlopt", "train", "agent.learning_rte=1"), TORCH),
    "a mistake in an option: buffer.capacty=1": (("-m", "rlopt", "train", "buffer.capacty=1"), TORCH),
    "a mistake in an environment: env=HalfCheeta-v5": (("-m", "rlopt", "train", "env=HalfCheeta-v5"), TORCH),
    "rlopt evaluate nowhere": (("-m", "rlopt", "evaluate", "nowhere"), TORCH),
    "rlopt train --print-config": (("-m", "rlopt", "train", "--print-config"), "a second above"),
    "python train.py, first training step": (("-c", ENDS.format(until="self.step")), 6.0),
    "python train.py, first update": (("-c", ENDS.format(until="progress.updates")), None),
}
"""Arguments of Python, and what is aimed at: seconds, less than torch's import takes, or a second more than that."""
PACKAGES = ("rlopt", "torch", "numpy", "gymnasium", "hydra-core", "numba")


def measure(checkout: Path, rounds: int, warmups: int = 2) -> dict[str, list[float]]:
    """Return seconds of every case and round."""
    variables = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    found: dict[str, list[float]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        for turn in range(-warmups, rounds):
            for name, (arguments, _) in CASES.items():
                begin = time.perf_counter()
                subprocess.run(
                    [sys.executable, *arguments], cwd=folder, env=variables, stdin=subprocess.DEVNULL,
                    capture_output=True, check=False,
                )  # fmt: skip
                if turn >= 0:
                    found[name].append(time.perf_counter() - begin)
    return found


def report(found: Mapping[str, Sequence[float]]) -> Report:
    """Return medians with their ranges, and what is above torch's own import."""
    torch = statistics.median(found[TORCH])
    rows, notes = [], []
    for name, seconds in found.items():
        median = statistics.median(seconds)
        above = "" if name == TORCH or median < torch else f"{median - torch:.2f}"
        rows.append([name, f"{median:.2f}", f"{min(seconds):.2f}", f"{max(seconds):.2f}", above])
        if (aim := CASES[name][1]) is not None:
            target = aim if isinstance(aim, float) else torch if aim == TORCH else torch + 1.0
            said = (
                f"{target:g}" if aim is target else f"{target:.2f}, {'' if aim == TORCH else 'a second above '}{TORCH}"
            )
            notes.append(f"{name}: {median:.2f} s (target under {said}: {'met' if median < target else 'missed'})")
    return Report(["command", "seconds (median)", "min", "max", "above torch's import"], rows, notes)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=Path(__file__).parents[1], help="folder that holds rlopt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for table.csv and README.md")
    args = parser.parse_args(arguments)
    made = report(measure(args.checkout, args.rounds))
    print(made.text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        made.write_csv(args.out / "table.csv")
        about = (
            f"Seconds from the start of a process to its end, or to the step named, with a warm file cache on a "
            f"{cpu()}: medians of {args.rounds} rounds, all lines in turn."
        )
        command = f"python benchmarks/startup.py --rounds {args.rounds} --out {args.out}"
        (args.out / "README.md").write_text(
            f"# Start-up\n\n{about}\n\n    {command}\n\n{versions(*PACKAGES)}.\n\n{made.text}\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
