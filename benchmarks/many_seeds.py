"""Many seeds of SAC on HalfCheetah at once: one process that trains R runs side by side, or separate processes?

    python benchmarks/many_seeds.py --out results/many_seeds

Environment steps per second of all runs together, one environment, one update per step, batch 256 and 2x256 in every
run, on the CPU. ``num_runs`` is rlopt's one process; against it stand separate rlopt processes (two of one thread at
once, one of two threads, and R of one thread at once) and Stable-Baselines3's. Processes of one arrangement run at the
same time; arrangements take short turns, round after round, and medians are quoted. Several processes still need
ceil(R / processes) goes for R seeds, so this compares throughput, with no account of their start.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness import BLUE, GREEN, GREY, Entrant, Report, best, cpu, measure, publish, spread, verdict

TARGETS = {"float32": 0.95, "bf16": 1.3}
"""What R runs in one process are to be, times the best arrangement of separate float32 processes."""
SEPARATE, SB3 = "separate rlopt processes", "separate Stable-Baselines3 processes"
PACKAGES = ("rlopt", "torch", "numpy", "numba", "gymnasium", "mujoco", "stable_baselines3")


def entrants(runs: int) -> list[Entrant]:
    found = []
    for precision in TARGETS:
        for overlap in (False, True):
            name = f"num_runs={runs} {precision}{', overlap' if overlap else ''}"
            config = {"num_runs": runs, "precision": precision, "overlap": overlap}
            found.append(Entrant(name, "1 process of 2 threads", "rlopt", 2, config))
    arrangements = [(1, 2), (2, 1), (runs, 1)]
    for precision in TARGETS:
        for processes, threads in arrangements if precision == "float32" else arrangements[:2]:
            setting = _arrangement(processes, threads)
            found.append(
                Entrant(f"{SEPARATE}, {precision}", setting, "rlopt", threads, {"precision": precision}, processes)
            )
    if importlib.util.find_spec("stable_baselines3"):
        found += [
            Entrant(SB3, _arrangement(processes, threads), "stable_baselines3", threads, processes=processes)
            for processes, threads in arrangements[:2]
        ]
    return found


def _arrangement(processes: int, threads: int) -> str:
    return f"{processes} process{'es' if processes > 1 else ''} of {threads} thread{'s' if threads > 1 else ''}"


def report(speeds: Mapping[Entrant, Sequence[float]], runs: int, remarks: Sequence[str]) -> Report:
    rows = [[e.name, e.setting, *spread(values)] for e, values in speeds.items()]
    tops = best(speeds)
    notes = []
    for precision, target in TARGETS.items():
        for overlap in ("", ", overlap"):
            name = f"num_runs={runs} {precision}{overlap}"
            for peer in (f"{SEPARATE}, float32", f"{SEPARATE}, bf16", SB3):
                if peer in tops and (precision == "bf16" or not peer.endswith("bf16")):
                    aim = target if peer == f"{SEPARATE}, float32" else None
                    what = f"{name} / {peer} ({tops[peer][1]})"
                    notes.append(verdict(what, tops[name][0] / tops[peer][0], aim))
    header = ["entrant", "arrangement", "steps/s of all runs (median)", "min", "max"]
    return Report(header, rows, [*notes, *remarks])


def save(out: Path, made: Report, speeds: Mapping[Entrant, Sequence[float]], args: argparse.Namespace) -> None:
    command = (
        f"python benchmarks/many_seeds.py --env {args.env} --runs {args.runs} --rounds {args.rounds} "
        f"--seconds {args.seconds:g} --out {out}"
    )
    about = (
        f"Environment steps per second of all runs together: SAC on {args.env}, one environment, one update per step, "
        f"batch 256, 2x256 in every run, on a {cpu()}. Medians over turns of {args.seconds:g} s, {args.rounds} each, "
        "all arrangements in turn. Targets are against the best arrangement of separate float32 processes."
    )
    bars = {e.label: float(row[2]) for e, row in zip(speeds, made.rows, strict=True)}
    publish(
        out, "Many seeds at once", about, command, PACKAGES, made, bars, "environment steps per second of all runs",
        lambda label: BLUE if label.startswith("num_runs") else GREEN if "rlopt" in label else GREY,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--runs", type=int, default=8, help="R")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each arrangement")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn")
    parser.add_argument("--warmup", type=int, default=1_000, help="random steps of a run before its first update")
    parser.add_argument("--extra", type=int, default=100, help="further steps of a run before the first turn")
    parser.add_argument("--out", type=Path, help="folder for table.csv, README.md and chart.png")
    args = parser.parse_args(arguments)
    settings = {"env": args.env, "warmup": args.warmup, "extra": args.extra}
    speeds, remarks, parked = measure(entrants(args.runs), settings, args.rounds, args.seconds)
    for p in parked:
        p.close()
    made = report(speeds, args.runs, remarks)
    print("\n" + made.text)
    if args.out:
        save(args.out, made, speeds, args)


if __name__ == "__main__":
    main()
