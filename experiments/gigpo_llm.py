"""GiGPO against GRPO with a tiny language model on TextWorld-Express, at equal rollouts.

    python experiments/gigpo_llm.py --out results/gigpo_llm      # needs Java, and the extras text and llm
    python experiments/gigpo_llm.py --out results/gigpo_llm --seeds 1 --first 2 --no-report   # one more process

Both begin with the same demonstrations (``experiment=gigpo_llm_tiny_coin``), after which a fifth or more of the
episodes is solved, and then learn from as many rollouts. Success is that of the episodes that an update learns from.
Runs that stand in ``successes-SEED.csv`` are not made again; each process writes those of its own seeds.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from time import process_time
from typing import Any

import matplotlib
import numpy as np

from rlopt.analysis.statistics import mean_interval
from rlopt.training import train_config
from rlopt.training.setup import make_loop
from rlopt.version import __version__

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WAYS = {"grpo": "grpo_llm_tiny_coin", "gigpo": "gigpo_llm_tiny_coin"}
HEAD = ["way", "seed", "update", "success", "length", "steps", "step_signal", "invalid", "cpu_seconds"]
Found = dict[tuple[str, int], list[dict[str, str]]]


def main(argv: Iterable[str] | None = None) -> None:
    """Make the runs that are not there yet, the table, and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--no-report", action="store_true", help="leave table and picture to another process")
    args = parser.parse_args(None if argv is None else list(argv))
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in range(args.first, args.first + args.seeds):
        path = args.out / f"successes-{seed}.csv"
        for way in WAYS:
            if len(read(path).get((way, seed), [])) <= args.updates:
                append(path, run(way, seed, args.updates))
    if not args.no_report:
        done: Found = {}
        for path in sorted(args.out.glob("successes-*.csv")):
            done |= read(path)
        (args.out / "README.md").write_text(report(done, args.updates), encoding="utf-8")
        draw(done, args.updates, args.out)


def run(way: str, seed: int, updates: int) -> list[list[Any]]:
    """Return rows of update 0, the last look before rewards, and of every update."""
    loop = make_loop(
        train_config({"experiment": WAYS[way], "seed": seed, "threads": 1, "device": "cpu", "total_steps": 10**9})
    )
    rows: list[list[Any]] = []
    last: list[Any] = []
    begun = process_time()
    while len(rows) <= updates:
        warming = bool(loop.agent.warming)  # type: ignore[attr-defined]
        progress = loop.advance()
        if progress.episodes:
            success = float(np.mean([episode.facts["success"] for episode in progress.episodes]))
            length = float(np.mean([episode.length for episode in progress.episodes]))
            told = {name: float(total / n) for name, (total, n) in progress.metrics.items()}
            last = [way, seed, len(rows), success, length, loop.step]
            last += [told.get("step_signal", float("nan")), told.get("invalid", float("nan")), process_time() - begun]
            print(
                way, seed, "warm" if warming else len(rows), f"{success:.2f} {length:.1f}", file=sys.stderr, flush=True
            )
        if not warming or not bool(loop.agent.warming):  # type: ignore[attr-defined]
            rows.append(last)
    loop.close()
    return rows


def read(path: Path) -> Found:
    """Return the rows of every run that stands in a table."""
    found: Found = {}
    if path.is_file():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault((row["way"], int(row["seed"])), []).append(row)
    return found


def append(path: Path, rows: list[list[Any]]) -> None:
    """Add rows to a table, which gets its head first."""
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([HEAD] if new else [])
        writer.writerows([[f"{x:.4g}" if isinstance(x, float) else x for x in row] for row in rows])


def successes(done: Found, way: str, updates: int) -> np.ndarray[Any, Any]:
    """Return success (seeds, 1 + updates) of one way; seeds in their order."""
    runs = [rows for (w, _), rows in sorted(done.items()) if w == way]
    return np.array([[float(row["success"]) for row in rows[: updates + 1]] for rows in runs])


PACKAGES = {"torch": "torch", "transformers": "transformers", "game": "textworld-express"}
PAGE = """# GiGPO against GRPO with a tiny language model

`python experiments/gigpo_llm.py --out results/gigpo_llm --seeds {seeds} --updates {updates}`
· rlopt {rlopt} · torch {torch}, transformers {transformers}, textworld-express {game}, Python {python}
· seeds 0 to {last} · two shared CPU cores, one thread a run ({cpu:.0f} CPU seconds a run)

A Qwen2 of two layers of 64 with random weights and one token for each of the game's words. TextWorld-Express' coin
game, six rooms, four fixed tasks, at most 20 actions, 10 for success only. First demonstrations, until a look shows
that at least a fifth of the episodes is solved (update 0 of the table; the same for both ways of one seed), then
{updates} updates, each from the four tasks x 8 episodes that are written freely and paid for success. Both ways have
the same learning rate; GiGPO's advantage is a sum of two. Success is that of the episodes an update learns from;
"ahead" is by how much GiGPO's is larger, paired by seed: mean and 95 % interval by Student's t.

"""


def report(done: Found, updates: int) -> str:
    """Return what was found, as a page."""
    at = [u for u in (0, 1, 5, 10, 15, 20, 30, 40) if u <= updates]
    head = ["way", *(f"update {u}" for u in at), "mean of all updates", "ahead at the end", "ahead on the whole"]
    rows = [head, ["---"] * len(head)]
    best = successes(done, "gigpo", updates)
    for way in WAYS:
        mine = successes(done, way, updates)
        paired = best[: len(mine)] - mine[: len(best)]
        ahead = ["", ""] if way == "gigpo" else [interval(paired[:, -5:].mean(1)), interval(paired[:, 1:].mean(1))]
        rows.append([way, *(f"{mine[:, u].mean():.2f}" for u in at), f"{mine[:, 1:].mean():.2f}", *ahead])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    cpu = float(np.mean([float(rows[-1]["cpu_seconds"]) for rows in done.values()]))
    seeds = len(best)
    packages = {name: version(of) for name, of in PACKAGES.items()}
    begun = PAGE.format(
        seeds=seeds,
        updates=updates,
        last=seeds - 1,
        rlopt=__version__,
        cpu=cpu,
        python=platform.python_version(),
        **packages,
    )
    return f"{begun}{table}\n\nAt the end: the mean of the last five updates.\n\n![curves](curves.png)\n"


def interval(x: np.ndarray[Any, Any]) -> str:
    """Return a mean with its 95 % interval."""
    found = mean_interval(x)
    return f"{x.mean():+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def draw(done: Found, updates: int, out: Path) -> None:
    """Draw success over updates: every seed, and the mean."""
    figure, ax = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
    for way in WAYS:
        mine = successes(done, way, updates)
        x = np.arange(mine.shape[1])
        (line,) = ax.plot(x, mine.mean(0), lw=2, label=f"{way} ({len(mine)} seeds)")
        for one in mine:
            ax.plot(x, one, color=line.get_color(), alpha=0.3, lw=0.8)
    ax.set(title="coin, tiny Qwen2", xlabel="update", ylabel="success", ylim=(0, 1.02))
    ax.legend(loc="lower right")
    figure.savefig(out / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
