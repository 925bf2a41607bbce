"""Environment steps per second of every backend behind rlopt's contract, beside Gymnasium's and EnvPool's own vectors.

    python benchmarks/environments.py --out results/environments

Each entrant lives in a process of its own, and all step in turn, again and again, in short windows, so that a drift of
the machine's speed hits all alike and no entrant's idle threads disturb another; the median is quoted, of the windows
in which other processes left the CPU alone. Actions are random and the same for all, episodes end and begin again, and
only real transitions count: the calls in which Gymnasium and EnvPool do nothing but reset a row do not. EnvPool takes
part where it is installed.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import charts
import gymnasium
import numpy as np
import torch
from harness import cpu, versions

from rlopt.envs import make_env

LABELS = {
    "native": "rlopt native",
    "sync": "rlopt sync",
    "envpool": "rlopt envpool",
    "raw_gymnasium": "Gymnasium",
    "raw_envpool": "EnvPool",
}
BEFORE = "before "
"""What stands before the name of an entrant of another checkout (``--against``)."""
PEERS = ("raw_gymnasium", "raw_envpool")
TARGETS = {
    ("HalfCheetah-v5", "raw_gymnasium"): 2.3,
    ("HalfCheetah-v5", "raw_envpool"): 1.2,
    ("Hopper-v5", "raw_gymnasium"): 2.1,
    ("Hopper-v5", "raw_envpool"): 0.9,
}
"""What native is to be, times the peer, with 8 environments on two cores."""
OWN = ("native", "sync", "envpool")
PACKAGES = ("rlopt", "gymnasium", "mujoco", "envpool", "torch", "numpy")
ACTIONS = 256

Window = Callable[[float], float]
"""Steps for some seconds and returns transitions per second."""


def contract_window(env, actions: list[torch.Tensor]) -> Window:
    env.reset()

    def window(seconds: float) -> float:
        valid, begin, k = [], time.perf_counter(), 0
        while (now := time.perf_counter()) - begin < seconds:
            for _ in range(10):
                valid.append(env.step(actions[k % ACTIONS]).valid)
                k += 1
        return float(torch.stack(valid).sum()) / (now - begin) if valid else 0.0

    return window


def raw_window(env, actions: list[np.ndarray]) -> Window:
    """For a Gymnasium vector that spends a call of its own on each reset."""
    env.reset()

    def window(seconds: float) -> float:
        ends, begin, k = [], time.perf_counter(), 0
        while (now := time.perf_counter()) - begin < seconds:
            for _ in range(10):
                _, _, terminated, truncated, _ = env.step(actions[k % ACTIONS])
                ends.append(terminated | truncated)
                k += 1
        return float(np.size(ends) - np.sum(ends)) / (now - begin)

    return window


def single_window(env, actions: list[np.ndarray]) -> Window:
    """For one Gymnasium environment, reset by hand."""
    env.reset()

    def window(seconds: float) -> float:
        begin, k = time.perf_counter(), 0
        while (now := time.perf_counter()) - begin < seconds:
            for _ in range(10):
                _, _, terminated, truncated, _ = env.step(actions[k % ACTIONS])
                k += 1
                if terminated or truncated:
                    env.reset()
        return k / (now - begin)

    return window


def window_of(name: str, env_id: str, num_envs: int, threads: int) -> Window:
    """The entrant ``name``, ready to be timed."""
    torch.set_num_threads(threads)
    space, chance = gymnasium.make(env_id).action_space, np.random.default_rng(0)
    if isinstance(space, gymnasium.spaces.Discrete):
        arrays = list(chance.integers(space.n, size=(ACTIONS, num_envs)))
    else:
        drawn = chance.uniform(space.low, space.high, (ACTIONS, num_envs, *space.shape))
        arrays = list(drawn.astype(np.float32))
    if name == "raw_envpool":
        import envpool

        pool = envpool.make(env_id, env_type="gymnasium", num_envs=num_envs, num_threads=threads, seed=0)
        return raw_window(pool, [a.astype(np.float64) for a in arrays])
    if name == "raw_gymnasium" and num_envs == 1:
        return single_window(gymnasium.make(env_id), [a[0] for a in arrays])
    if name == "raw_gymnasium":
        return raw_window(gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make(env_id)] * num_envs), arrays)
    return contract_window(make_env(env_id, num_envs, backend=name), [torch.from_numpy(a) for a in arrays])


def work(args) -> None:
    """Time one window for each line that arrives."""
    warnings.simplefilter("ignore")
    window = window_of(args.worker, args.envs[0], args.num_envs, args.threads)
    window(0.3)
    print("ready", flush=True)
    for _ in sys.stdin:
        busy, own = busy_seconds(), time.process_time()
        speed = window(args.seconds)
        print(speed, busy_seconds() - busy - (time.process_time() - own), flush=True)


def busy_seconds() -> float:
    """CPU seconds that all processes together have used, to about a hundredth; 0 where the system does not tell."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def measure(env_id: str, args) -> tuple[dict[str, list[float]], list[str]]:
    """Transitions per second of each entrant, one number per window, and what must be said about them."""
    settings = ["--num-envs", str(args.num_envs), "--threads", str(args.threads), "--seconds", str(args.seconds)]
    workers = {}
    chosen = [name for name in args.entrants if "envpool" not in name or importlib.util.find_spec("envpool")]
    if args.against is not None:
        chosen += [BEFORE + name for name in chosen if name in OWN]
    for label in chosen:
        name = label.removeprefix(BEFORE)
        environment = {**os.environ, "PYTHONPATH": str(args.against)} if label != name else None
        command = [sys.executable, __file__, "--worker", name, "--envs", env_id, *settings]
        workers[label] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
    speeds: dict[str, list[float]] = {name: [] for name in workers}
    try:
        for name, worker in workers.items():
            if worker.stdout.readline() != "ready\n":
                raise SystemExit(f"{label_of(name)} failed on {env_id}")
        clean: dict[str, list[float]] = {name: [] for name in workers}
        patience = time.monotonic() + args.patience
        while min(map(len, clean.values())) < args.repeats and time.monotonic() < patience:
            for name, worker in workers.items():
                worker.stdin.write("go\n")
                worker.stdin.flush()
                speed, others = map(float, worker.stdout.readline().split())
                speeds[name].append(speed)
                if others < 0.15 * args.seconds:
                    clean[name].append(speed)
        if min(map(len, clean.values())) >= 3:
            return clean, []
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    return speeds, [f"{env_id}: the machine was busy; windows that other processes disturbed are among these"]


def label_of(name: str) -> str:
    """The name of an entrant in tables."""
    own = name.removeprefix(BEFORE)
    return LABELS[own] if own == name else f"{LABELS[own]}, {BEFORE.strip()}"


def report(env_id: str, speeds: dict[str, list[float]], num_envs: int) -> tuple[list[list[str]], list[str]]:
    """Rows of the table, and sentences about the ratios."""
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    base = medians.get("raw_gymnasium", math.nan)
    rows = [
        [
            env_id,
            str(num_envs),
            label_of(n),
            *(f"{x:.0f}" for x in (m, min(speeds[n]), max(speeds[n]))),
            f"{m / base:.2f}",
        ]
        for n, m in medians.items()
    ]
    notes = []
    for peer in PEERS:
        if {peer, "native"} <= medians.keys():
            target = TARGETS.get((env_id, peer)) if num_envs == 8 else None
            aim = f" (target {target})" if target else ""
            notes.append(f"{env_id}: native / {LABELS[peer]} = {medians['native'] / medians[peer]:.2f}{aim}")
    for name, now in medians.items():
        if BEFORE + name in medians:
            best = max(speeds[name]) / max(speeds[BEFORE + name])
            ratio = now / medians[BEFORE + name]
            notes.append(f"{env_id}: {LABELS[name]} now / before = {ratio:.3f} (fastest windows: {best:.3f})")
    return rows, notes


def save(out: Path, header: list[str], rows: list[list[str]], table: str, notes: list[str], args) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "table.csv").open("w", newline="") as f:
        csv.writer(f).writerows([header, *rows])
    command = (
        f"python benchmarks/environments.py --envs {' '.join(args.envs)} --num-envs {args.num_envs} "
        f"--threads {args.threads} --seconds {args.seconds} --repeats {args.repeats} --patience {args.patience:g} "
        f"--out {out}"
    )
    about = (
        f"Environment steps per second, {args.num_envs} environments, {args.threads} threads, random actions, "
        f"on a {cpu()}. All entrants step in turn in windows of {args.seconds} s, each in a process of its own; "
        "the median of the windows in which other processes left the CPU alone. The rows named rlopt are behind "
        "rlopt's contract (tensors in and out, float32); the "
        "others are the libraries' own NumPy interfaces (Gymnasium's SyncVectorEnv, or one environment by itself). "
        "EnvPool brings its own MuJoCo."
    )
    (out / "README.md").write_text(
        f"# Environment throughput\n\n{about}\n\n    {command}\n\n{versions(*PACKAGES)}\n\n{table}\n\n"
        + "\n".join(f"- {n}" for n in notes)
        + "\n\n![bar chart](chart.png)\n"
    )
    charts.draw(charts.ENVIRONMENTS, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", nargs="+", default=["HalfCheetah-v5", "Hopper-v5"])
    parser.add_argument("--entrants", nargs="+", choices=list(LABELS), default=list(LABELS), help="who takes part")
    parser.add_argument("--against", type=Path, help="another checkout, whose rlopt takes part beside this one")
    parser.add_argument("--num-envs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2, help="threads of native and of EnvPool")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of one window")
    parser.add_argument("--repeats", type=int, default=9, help="undisturbed windows per entrant")
    parser.add_argument(
        "--patience", type=float, default=60.0, help="seconds per environment to wait for undisturbed windows"
    )
    parser.add_argument("--out", type=Path, help="folder for table.csv, README.md and chart.png")
    parser.add_argument("--worker", choices=list(LABELS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    header = ["environment", "copies", "entrant", "steps/s (median)", "min", "max", "/ Gymnasium"]
    rows, notes = [], []
    for env_id in args.envs:
        speeds, remarks = measure(env_id, args)
        found, told = report(env_id, speeds, args.num_envs)
        rows, notes = rows + found, notes + told + remarks
        print("\n".join("  ".join(r) for r in found), *told, *remarks, sep="\n", flush=True)
    table = "\n".join("| " + " | ".join(r) + " |" for r in [header, ["---"] * len(header), *rows])
    if args.out:
        save(args.out, header, rows, table, notes, args)


if __name__ == "__main__":
    main()
