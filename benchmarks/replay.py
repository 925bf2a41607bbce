"""Replay buffers beside each other: minibatches and additions per second, and bytes per transition.

    python benchmarks/replay.py --out results/replay

Transitions of a 17-d observation and a 6-d action in float32, 1,000,000 of them in every buffer, minibatches of 256,
one process, one thread. Every contender is filled and then measured in short turns, round after round, so that a drift
of the machine's speed hits all alike; medians over the rounds are quoted, and every ratio is of medians of one run. A
draw is what the library hands its user for a gradient step (rlopt, Stable-Baselines3 and TorchRL give tensors, cpprb
and Tianshou arrays), and with priorities it includes the update with new ones for the minibatch drawn. Additions are
single rows, and blocks of 64 environments; in both, one draw ends each turn, so that work put off until then counts.

``--device cuda`` measures rlopt's buffers on the GPU instead. Libraries that are not installed are left out.
"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import charts
from harness import verdict, versions
from replay_buffers import ACT, BLOCKS, ENVS, OBS, Buffer, Contender, Data, contenders

PACKAGES = ("torch", "numpy", "numba", "stable-baselines3", "cpprb", "torchrl", "tianshou")
METRICS = {
    "draws/s": "minibatches drawn (with priorities: and updated)",
    "add 1/s": "single transitions added",
    "add 64/s": "transitions added, in blocks of 64 environments",
    "step/s": "one transition added, then one minibatch drawn",
}


# --- measuring ------------------------------------------------------------------------------------------------------


def allocated(device: str) -> int | None:
    """Bytes of the device's memory that this process holds; None where the system does not say."""
    gc.collect()
    if device == "cuda":
        import torch

        return int(torch.cuda.memory_allocated())
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmRSS"))
    except (OSError, StopIteration):
        return None


def build(contender: Contender, data: Data, envs: int, device: str) -> tuple[Buffer, float | None] | str:
    """A full buffer and its bytes per transition, or why it cannot be had."""
    name = f"{contender.library} {contender.sampler}"
    try:
        small = contender.make(Data(4 * BLOCKS * ENVS, data.batch), envs)  # imports and compiles, before memory is read
        for i in range(2):
            small.draw(i)
            small.add(i)
        del small
        before = allocated(device)
        buffer = contender.make(data, envs)
        for i in range(2):
            buffer.draw(i)
            buffer.add(i)
    except ImportError as e:
        return f"{name} left out: not installed ({e})"
    except Exception as e:
        if contender.library == "rlopt":
            raise
        return f"{name} left out: it does not run here ({type(e).__name__}: {str(e).splitlines()[0]})"
    after = allocated(device)
    size = None if before is None or after is None else (after - before) / data.capacity
    return buffer, size


def rate(buffer: Buffer, action: Callable[[int], Any], seconds: float, count: int, first: int) -> float:
    """How many of ``action`` a second go, in a turn of about ``seconds``; one draw ends the turn."""
    done = 0
    buffer.sync()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        for i in range(count):
            action(first + done + i)
        done += count
    if action is buffer.add:
        buffer.draw(first)
    buffer.sync()
    return done / (time.perf_counter() - begin)


def measure(
    entrants: list[Contender], data: Data, args: argparse.Namespace
) -> tuple[dict[Contender, dict[str, list[float]]], dict[Contender, float | None], list[str]]:
    """Speeds by metric, one a round; bytes per transition; a line for each contender that had to be left out."""
    left_out: list[str] = []
    speeds: dict[Contender, dict[str, list[float]]] = {}
    sizes: dict[Contender, float | None] = {}
    for envs in (1, ENVS):
        buffers: dict[Contender, Buffer] = {}
        for c in entrants:
            if envs > 1 and c not in speeds:
                continue
            begin = time.perf_counter()
            built = build(c, data, envs, args.device)
            if isinstance(built, str):
                print(built, flush=True)
                left_out.append(built)
                continue
            buffers[c] = built[0]
            if envs == 1:
                sizes[c] = built[1]
                speeds[c] = {metric: [] for metric in METRICS}
            spent = time.perf_counter() - begin
            print(f"filled {c.library} {c.sampler}, {envs} environments: {spent:.1f} s", flush=True)
        for turn in range(args.rounds):
            for c, b in buffers.items():
                first = 1_000_003 * turn

                def step(i: int, b: Buffer = b) -> None:
                    b.add(i)
                    b.draw(i)

                if envs == 1:
                    rate(b, b.draw, args.seconds / 4, 20, first)  # what it needs back in the cache
                    speeds[c]["draws/s"].append(rate(b, b.draw, args.seconds, 20, first))
                    speeds[c]["step/s"].append(rate(b, step, args.seconds, 20, first))
                speeds[c]["add 1/s" if envs == 1 else "add 64/s"].append(
                    envs * rate(b, b.add, args.seconds / 2, 20, first)
                )
        buffers.clear()
    return speeds, sizes, left_out


def ratios(medians: dict[Contender, float]) -> list[str]:
    """One line for each target: what was aimed at, and what came out."""
    own = {c.sampler: speed for c, speed in medians.items() if c.library == "rlopt"}
    lines = []
    best: dict[str, tuple[float, str]] = {}
    for c, speed in medians.items():
        if c.library != "rlopt":
            best[c.kind] = max(best.get(c.kind, (0.0, "")), (speed, c.library))
    goals = [("uniform", "uniform", 2.0), ("PER", "prioritised", 1.5), ("RR-M", "prioritised", 1.0)]
    for sampler, kind, goal in goals:
        if sampler in own and kind in best:
            speed, library = best[kind]
            word = "uniform" if kind == "uniform" else "PER"
            lines.append(verdict(f"rlopt {sampler} / fastest peer's {word} ({library})", own[sampler] / speed, goal))
    if "uniform" in own and "RR-C" in own:
        lines.append(verdict("rlopt RR-C / rlopt uniform", own["RR-C"] / own["uniform"], 0.85))
    return lines


# --- the report -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacity", type=int, default=1_000_000, help="transitions in every buffer")
    parser.add_argument("--batch", type=int, default=256, help="transitions per minibatch")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender")
    parser.add_argument("--seconds", type=float, default=0.4, help="length of a turn")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where rlopt's buffers lie")
    parser.add_argument("--contender", action="append", help="only libraries of this name (may be repeated)")
    parser.add_argument("--hardware", default="", help="a few words on the machine, for the report")
    parser.add_argument("--out", type=Path, help="folder for table.csv, README.md and replay.png")
    args = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use here; leave --device cuda out")
    args.capacity = -(-args.capacity // ENVS) * ENVS
    wanted = {name.lower() for name in args.contender or []}
    entrants = [c for c in contenders(args.device) if not wanted or c.library.lower() in wanted]
    if not entrants:
        raise SystemExit(f"--contender knows {', '.join(sorted({c.library for c in contenders('cpu')}))}")
    print(versions(), flush=True)
    speeds, sizes, left_out = measure(entrants, Data(args.capacity, args.batch), args)
    medians = {c: {m: statistics.median(v) for m, v in found.items()} for c, found in speeds.items()}
    header = ["library", "sampler", *METRICS, "draws/s min", "draws/s max", "bytes/transition"]
    rows = []
    for c, found in medians.items():
        draws = speeds[c]["draws/s"]
        numbers = [*(found[m] for m in METRICS), min(draws), max(draws)]
        size = sizes[c]
        rows.append([c.library, c.sampler, *(f"{n:,.0f}" for n in numbers), "" if size is None else f"{size:.0f}"])
    lines = ratios({c: found["draws/s"] for c, found in medians.items()})
    table = "\n".join(["| " + " | ".join(r) + " |" for r in [header, ["---"] * len(header), *rows]])
    lines += left_out
    print("\n" + table + "\n\n" + "\n".join(lines))
    if args.out:
        save(args.out, header, rows, table, lines, medians, args)


def save(
    out: Path,
    header: list[str],
    rows: list[list[str]],
    table: str,
    lines: list[str],
    medians: dict[Contender, dict[str, float]],
    args: argparse.Namespace,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "table.csv").open("w", newline="") as f:
        csv.writer(f).writerows([header, *([cell.replace(",", "") for cell in row] for row in rows)])
    where = "" if args.device == "cpu" else f" --device {args.device}"
    command = f"python benchmarks/replay.py --rounds {args.rounds} --seconds {args.seconds:g}{where} --out {out}"
    about = (
        f"{args.capacity:,} transitions of a {OBS}-d observation and a {ACT}-d action in every buffer, minibatches of "
        f"{args.batch}, one process, one thread; medians of {args.rounds} rounds of {args.seconds:g} s in turn. A draw "
        "with priorities includes the update of the minibatch's. rlopt, Stable-Baselines3 and TorchRL return tensors, "
        "cpprb and Tianshou NumPy arrays. Bytes per transition are what the process grew by."
    )
    columns = "\n".join(f"- `{name}`: {meaning}" for name, meaning in METRICS.items())
    hardware = f"Hardware: {args.hardware}. " if args.hardware else ""
    (out / "README.md").write_text(
        f"# Replay buffers\n\n{about}\n\n    {command}\n\n{hardware}{versions(*PACKAGES)}.\n\n{table}\n\n{columns}\n\n"
        + "\n".join(f"- {line}" for line in lines)
        + "\n\n![bar chart](replay.png)\n"
    )
    charts.draw(charts.REPLAY, out)


if __name__ == "__main__":
    main()
