"""Environment steps per second of SAC on HalfCheetah: rlopt beside Stable-Baselines3 (and SBX where it is installed).

    python benchmarks/sac_throughput.py --out results/sac_throughput

Same network (2x256), batch (256), update ratio (one update per step), one environment, float32, on the CPU. Every
entrant runs with 1 and with 2 threads, in a process of its own, in turn and repeatedly, so that a drift of the
machine's speed hits all alike; the median is quoted, and the ratio is between each library's best thread setting.
Then rlopt's default setting runs again beside one other busy process.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

WARMUP = 1_000
ENV = "HalfCheetah-v4"
LABELS = {"rlopt": "rlopt", "sb3": "Stable-Baselines3", "sbx": "SBX (JAX)"}


def measure_rlopt(threads: str, steps: int) -> float:
    from rlopt.training.config import train_config
    from rlopt.training.setup import make_loop

    agent = {"name": "sac", "warmup_steps": WARMUP}
    config = train_config(
        {"agent": agent, "env": {"id": ENV}, "total_steps": 10**6, "threads": threads, "device": "cpu"}
    )
    loop = make_loop(config)
    return timed(loop.advance, steps)


def timed(advance, steps: int) -> float:
    """Steps per second after the warm-up and another 200 steps."""
    for _ in range(WARMUP + 200):
        advance()
    begin = time.perf_counter()
    for _ in range(steps):
        advance()
    return steps / (time.perf_counter() - begin)


def measure_sb3(threads: str, steps: int, module: str = "stable_baselines3") -> float:
    import torch

    torch.set_num_threads(int(threads))
    library = importlib.import_module(module)
    from stable_baselines3.common.callbacks import BaseCallback

    marks: list[float] = []

    class Clock(BaseCallback):
        def _on_step(self) -> bool:
            marks.append(time.perf_counter())
            return True

    model = library.SAC(
        "MlpPolicy", ENV, learning_starts=WARMUP, batch_size=256, train_freq=1, gradient_steps=1, seed=0,
        policy_kwargs={"net_arch": [256, 256]}, **({"device": "cpu"} if module == "stable_baselines3" else {}),
    )  # fmt: skip
    model.learn(WARMUP + 200 + steps, callback=Clock())
    return (len(marks) - WARMUP - 201) / (marks[-1] - marks[WARMUP + 200])


def worker(name: str, threads: str, steps: int) -> None:
    import warnings

    warnings.simplefilter("ignore")
    if name == "rlopt":
        speed = measure_rlopt(threads, steps)
    else:
        speed = measure_sb3(threads, steps, {"sb3": "stable_baselines3", "sbx": "sbx"}[name])
    print(json.dumps({"steps_per_second": speed}))


def run(name: str, threads: str, steps: int) -> float:
    """One measurement in a process of its own."""
    environment = dict(os.environ)
    if name == "rlopt":
        from rlopt.cli.environment import WAIT_POLICY

        environment = {**WAIT_POLICY, **environment}
    elif threads != "auto":
        environment["OMP_NUM_THREADS"] = threads
        if name == "sbx":
            flags = "--xla_cpu_multi_thread_eigen=" + (
                "false intra_op_parallelism_threads=1" if threads == "1" else "true"
            )
            environment["XLA_FLAGS"] = flags
    command = [sys.executable, __file__, "--worker", name, "--threads", threads, "--steps", str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} with {threads} threads failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1])["steps_per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2_000, help="measured steps per run")
    parser.add_argument("--repeats", type=int, default=3, help="runs per entrant and thread setting")
    parser.add_argument("--out", type=Path, help="folder for table.csv, table.md and chart.png")
    parser.add_argument("--worker", choices=list(LABELS), help=argparse.SUPPRESS)
    parser.add_argument("--threads", default="1", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.threads, args.steps)
        return
    names = [
        n for n, m in (("rlopt", "rlopt"), ("sb3", "stable_baselines3"), ("sbx", "sbx")) if importlib.util.find_spec(m)
    ]
    entrants = [(n, t) for n in names for t in ("1", "2")]
    speeds: dict[tuple[str, str], list[float]] = {e: [] for e in entrants}
    for i in range(args.repeats):
        for name, threads in entrants:
            speeds[name, threads].append(run(name, threads, args.steps))
            speed = speeds[name, threads][-1]
            print(f"{i + 1}/{args.repeats}  {LABELS[name]:18s} {threads} threads  {speed:7.1f} steps/s", flush=True)
    alone = statistics.median(run("rlopt", "auto", args.steps) for _ in range(args.repeats))
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        beside = statistics.median(run("rlopt", "auto", args.steps) for _ in range(args.repeats))
    finally:
        busy.kill()
    medians = {e: statistics.median(v) for e, v in speeds.items()}
    best = {n: max(medians[n, t] for t in ("1", "2")) for n in names}
    rows = [
        [LABELS[n], t, f"{medians[n, t]:.1f}", f"{min(speeds[n, t]):.1f}", f"{max(speeds[n, t]):.1f}"]
        for n, t in entrants
    ]
    rows += [["rlopt (threads=auto)", "auto", f"{alone:.1f}", "", ""]]
    rows += [["rlopt (threads=auto) beside a busy process", "auto", f"{beside:.1f}", "", ""]]
    header = ["library", "threads", "steps/s (median)", "min", "max"]
    notes = [f"rlopt / {LABELS[n]}, best settings: {best['rlopt'] / best[n]:.2f}" for n in names if n != "rlopt"]
    notes += [f"beside a busy process rlopt keeps {beside / alone:.0%} of its speed"]
    table = "\n".join(["| " + " | ".join(r) + " |" for r in [header, ["---"] * 5, *rows]])
    print("\n" + table + "\n\n" + "\n".join(notes))
    if args.out:
        save(args.out, header, rows, table, notes, best, args)


def save(out: Path, header: list[str], rows: list[list[str]], table: str, notes: list[str], best: dict, args) -> None:
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    with (out / "table.csv").open("w", newline="") as f:
        csv.writer(f).writerows([header, *rows])
    command = f"python benchmarks/sac_throughput.py --steps {args.steps} --repeats {args.repeats} --out {out}"
    about = (
        f"SAC on {ENV}, one environment, one update per step, batch 256, 2x256, float32, CPU ({os.cpu_count()} cores)."
    )
    (out / "README.md").write_text(
        f"# SAC throughput\n\n{about}\n\n    {command}\n\n{table}\n\n" + "\n".join(f"- {n}" for n in notes) + "\n"
    )
    figure = Figure(figsize=(6, 2.2), layout="constrained")
    axes = figure.subplots()
    axes.barh([LABELS[n] for n in best], list(best.values()), color=["#0072B2", "#999999", "#bbbbbb"][: len(best)])
    axes.set_xlabel("environment steps per second (best thread setting)")
    axes.invert_yaxis()
    figure.savefig(out / "chart.png", dpi=150)


if __name__ == "__main__":
    main()
