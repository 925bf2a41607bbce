"""``rlopt sweep``: search options with Optuna, several trials side by side, and rank them."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from rlopt.cli import raise_if_interrupted
from rlopt.cli.compose import compose
from rlopt.cli.multirun import child_environment, shell
from rlopt.errors import RloptError
from rlopt.search.plan import Sweep
from rlopt.search.space import read_space

SHOWN = 10
"""Trials that ``--print`` shows: TPE draws as many at random, whatever came of those before."""
REPLACED = 10
"""Workers that are replaced after they were killed (by the memory's guard, say)."""


def run(arguments: argparse.Namespace) -> int:
    """Search until all trials are over, and print the ranking."""
    sweep = _sweep(arguments).prepare()
    if arguments.print:
        _show(sweep)
        return 0
    from rlopt.search.study import Worker, open_study

    study = open_study(sweep)
    raise_if_interrupted()
    say = partial(print, flush=True)
    if arguments.worker:
        return _work(Worker(sweep, study, say))
    seeds = ", ".join(map(str, sweep.run_seeds))
    say(f"sweep: {sweep.trials} trials, seeds {seeds}, {sweep.base.total_steps:,} steps each, in {sweep.root}")
    if arguments.workers == 1:
        code = _work(Worker(sweep, study, say))
    else:
        code = _side_by_side([sys.executable, "-m", "rlopt", *_command(arguments), "--worker"], arguments.workers)
    _tell(sweep, study, f"rlopt {shell(_command(arguments))}")
    if code:
        print(f"go on        rlopt {shell(_command(arguments))}")
    return code


def _sweep(arguments: argparse.Namespace) -> Sweep:
    """Return the sweep that the command describes; refuses options that would be ignored."""
    for name, counts in (
        ("percentile", arguments.pruner == "percentile"),
        ("startup", arguments.pruner in ("median", "percentile")),
        ("prune_after", arguments.pruner != "none"),
    ):
        if getattr(arguments, name) is not None and not counts:
            raise RloptError(f"--{name.replace('_', '-')} has no effect with --pruner {arguments.pruner}; leave it out")
    given = {name: getattr(arguments, name) for name in ("percentile", "startup", "prune_after", "storage")}
    root = Path(arguments.root or Path("sweeps", Path(arguments.space).stem)).expanduser()
    if root.exists() and not root.is_dir():
        raise RloptError(f"--root {root} is no folder; name one")
    return Sweep(
        read_space(arguments.space),
        tuple(arguments.overrides),
        lambda words: compose(words, arguments.config_dir),
        root,
        trials=arguments.trials,
        seeds=arguments.seeds,
        pruner=arguments.pruner,
        keep_checkpoints=arguments.keep_checkpoints,
        **{name: value for name, value in given.items() if value is not None},
    )


def _command(arguments: argparse.Namespace) -> list[str]:
    """Return the words after ``rlopt`` that make the same sweep."""
    words = ["sweep", arguments.space, *arguments.overrides]
    for name in ("trials", "seeds", "workers", "root", "pruner", "percentile", "prune_after", "startup", "storage"):
        if (value := getattr(arguments, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += ["--keep-checkpoints"] if arguments.keep_checkpoints else []
    return words + [part for folder in arguments.config_dir for part in ("--config-dir", folder)]


def _show(sweep: Sweep) -> None:
    import optuna

    from rlopt.search.study import begin_study, sampler

    study = optuna.create_study(direction="maximize")
    begin_study(study, sweep)
    count = min(sweep.trials, SHOWN)
    print(f"# the first {count} of {sweep.trials} trials; seeds {', '.join(map(str, sweep.run_seeds))}")
    for number in range(count):
        study.sampler = sampler(sweep, number)
        trial = study.ask(sweep.distributions)
        print(f"rlopt train {shell(sweep.words(sweep.params(trial.params)))}")


def _work(worker: Any) -> int:
    try:
        worker.run()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _side_by_side(command: list[str], count: int) -> int:
    """Keep ``count`` workers at work until all trials are over; returns the first exit code that is not 0. Ctrl-C
    reaches them by itself and SIGTERM from here."""
    environment, stops, killed, code = child_environment(), [], 0, 0
    workers = [subprocess.Popen(command, env=environment) for _ in range(count)]

    def terminate(signum: int, frame: FrameType | None) -> None:
        stops.append(signum)
        for worker in workers:
            worker.terminate()

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        while workers:
            try:
                time.sleep(0.2)
                for worker in [one for one in workers if one.poll() is not None]:
                    workers.remove(worker)
                    ended = int(worker.returncode)
                    if ended < 0 and not stops and (killed := killed + 1) <= REPLACED:
                        print(f"a worker was killed (signal {-ended}); another one takes its place", file=sys.stderr)
                        workers.append(subprocess.Popen(command, env=environment))
                    elif ended:
                        code = code or (128 - ended if ended < 0 else ended)
            except KeyboardInterrupt:
                stops.append(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return code


def _tell(sweep: Sweep, study: Any, command: str) -> None:
    """Write the tables, and print the ranking and what can be done next."""
    from rlopt.analysis.ranking import as_lines, rows_of
    from rlopt.search.outcome import best_command, draw_importance, settings, write_tables
    from rlopt.search.study import latest

    write_tables(sweep, study, command, shell)
    drawn = draw_importance(sweep, study)
    trials = latest(study)
    print("", *as_lines(rows_of(settings(sweep, trials), "trial")), "", sep="\n")
    print(f"written      {', '.join(str(sweep.root / n) for n in ('trials.csv', 'ranking.md'))}", end="")
    print(f", {sweep.root / 'importance.png'}" if drawn else " (too few whole trials for importances)")
    print(f"draw         rlopt plot {shell([str(sweep.root)])}/trial*/seed* --out curves.png")
    if (best := best_command(sweep, trials, shell)) is not None:
        print(f"train best   {best}")
