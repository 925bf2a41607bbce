"""Environment steps per second of SAC on HalfCheetah: rlopt beside Stable-Baselines3 and SBX.

    python benchmarks/sac_throughput.py --out results/sac_throughput

Same network (2x256), batch (256) and update ratio (one update per step), one environment, on the CPU. rlopt runs in
float32 and with bfloat16 products between hidden layers, each also with the environment stepped while the agent learns
(``overlap``), and with its readable update instead of the compiled one (``eager``); the peers in float32, the only one
they have. Every entrant runs with 1 and with 2 threads, in a process
of its own that waits while the others run; all take short turns, round after round. Medians over the rounds are quoted,
and ratios are between each entrant's best thread setting. Then rlopt's default and Stable-Baselines3 run again beside
one other busy process. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness import (
    BLUE,
    GREY,
    SKY,
    Entrant,
    Parked,
    Report,
    Window,
    best,
    cpu,
    measure,
    publish,
    spread,
    undisturbed,
    verdict,
)

RLOPT: dict[str, dict[str, object]] = {
    "rlopt float32": {},
    "rlopt float32, overlap": {"overlap": True},
    "rlopt bf16": {"precision": "bf16"},
    "rlopt bf16, overlap": {"precision": "bf16", "overlap": True},
    "rlopt float32, eager": {"agent": {"fused": False}},
}
PEERS = {"stable_baselines3": "Stable-Baselines3", "sbx": "SBX (JAX)"}
TARGETS = {
    ("rlopt float32", "Stable-Baselines3"): 2.0,
    ("rlopt float32", "SBX (JAX)"): 1.1,
    ("rlopt bf16", "Stable-Baselines3"): 2.4,
}
"""What rlopt is to be, times the peer."""
PACKAGES = ("rlopt", "torch", "numpy", "numba", "gymnasium", "mujoco", "stable_baselines3", "sbx-rl", "jax")


def entrants() -> list[Entrant]:
    found = [Entrant(name, _threads(t), "rlopt", t, config) for name, config in RLOPT.items() for t in (1, 2)]
    peers = [(module, name) for module, name in PEERS.items() if importlib.util.find_spec(module)]
    return found + [Entrant(name, _threads(t), module, t) for module, name in peers for t in (1, 2)]


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def beside_busy(parked: Sequence[Parked], rounds: int, seconds: float) -> dict[Entrant, tuple[float, float]]:
    """Medians of steps per second alone, and beside one process that never rests."""
    windows: dict[Entrant, tuple[list[Window], list[Window]]] = {p.entrant: ([], []) for p in parked}
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        for _ in range(rounds):
            for p in parked:
                for kind, what in enumerate((signal.SIGSTOP, signal.SIGCONT)):
                    busy.send_signal(what)
                    windows[p.entrant][kind].append(p.window(seconds, [busy.pid]))
    finally:
        busy.kill()
        busy.wait()

    def middle(found: Sequence[Window]) -> float:
        return statistics.median(w.speed for w in undisturbed(found))

    return {entrant: (middle(alone), middle(beside)) for entrant, (alone, beside) in windows.items()}


def report(
    speeds: Mapping[Entrant, Sequence[float]], busy: Mapping[Entrant, tuple[float, float]], remarks: Sequence[str]
) -> Report:
    rows = [[e.name, e.setting, *spread(values)] for e, values in speeds.items()]
    rows += [
        [e.name, f"{e.setting}, beside a busy process", f"{beside:.1f}", "", ""] for e, (_, beside) in busy.items()
    ]
    tops = best(speeds)
    notes = []
    for name in (name for name in RLOPT if name in tops):
        for peer in PEERS.values():
            if peer in tops:
                target = TARGETS.get((name.removesuffix(", overlap"), peer))
                what = f"{name} ({tops[name][1]}) / {peer} ({tops[peer][1]})"
                notes.append(verdict(what, tops[name][0] / tops[peer][0], target))
    compiled, eager = "rlopt float32", "rlopt float32, eager"
    if {compiled, eager} <= tops.keys():
        ratio = tops[compiled][0] / tops[eager][0]
        notes.append(verdict(f"{compiled} ({tops[compiled][1]}) / {eager} ({tops[eager][1]})", ratio, None))
    for e, (alone, beside) in busy.items():
        notes.append(f"beside a busy process {e.label} keeps {beside / alone:.0%} of its speed")
    return Report(["library", "setting", "steps/s (median)", "min", "max"], rows, [*notes, *remarks])


def save(out: Path, made: Report, tops: Mapping[str, tuple[float, str]], args: argparse.Namespace) -> None:
    command = (
        f"python benchmarks/sac_throughput.py --env {args.env} --rounds {args.rounds} --seconds {args.seconds:g} "
        f"--out {out}"
    )
    about = (
        f"Environment steps per second of SAC on {args.env}: one environment, one update per step, batch 256, 2x256, "
        f"on a {cpu()}. Medians over turns of {args.seconds:g} s, {args.rounds} each, all entrants in turn. `bf16`: "
        "products between hidden layers in bfloat16, master weights in float32. `overlap`: the environment is stepped "
        "while the agent learns, with the same update ratio. `eager`: the readable update, operation by operation, "
        "which the compiled one replaces on the CPU where it exists (`agent=sac`)."
    )
    bars = {f"{name}, {setting}": speed for name, (speed, setting) in tops.items()}
    colour = {"rlopt float32": BLUE, "rlopt bf16": SKY}
    publish(
        out, "SAC throughput", about, command, PACKAGES, made, bars,
        "environment steps per second (best thread setting)",
        lambda name: next((c for start, c in colour.items() if name.startswith(start)), GREY),
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each entrant")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn")
    parser.add_argument("--warmup", type=int, default=1_000, help="random steps before the first update")
    parser.add_argument("--extra", type=int, default=200, help="further steps before the first turn")
    parser.add_argument("--contender", action="append", help="only libraries whose name begins so (may be repeated)")
    parser.add_argument("--out", type=Path, help="folder for table.csv, README.md and chart.png")
    args = parser.parse_args(arguments)
    wanted = tuple(args.contender or [""])
    chosen = [e for e in entrants() if e.name.startswith(wanted)]
    if not chosen:
        raise SystemExit(f"--contender knows {', '.join([*RLOPT, *PEERS.values()])}")
    settings = {"env": args.env, "warmup": args.warmup, "extra": args.extra}
    speeds, remarks, parked = measure(chosen, settings, args.rounds, args.seconds)
    try:
        default = [p for p in parked if p.entrant.name in ("rlopt float32", "Stable-Baselines3")]
        busy = beside_busy([p for p in default if p.entrant.threads == 2], args.rounds, args.seconds)
    finally:
        for p in parked:
            p.close()
    made = report(speeds, busy, remarks)
    print("\n" + made.text)
    if args.out:
        save(args.out, made, best(speeds), args)


if __name__ == "__main__":
    main()
