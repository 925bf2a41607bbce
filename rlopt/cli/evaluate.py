"""``rlopt evaluate``: how good a saved policy is."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlopt import hub
from rlopt.cli.log import log_shown
from rlopt.errors import RloptError
from rlopt.files import replace_file
from rlopt.registry import load_extensions

if TYPE_CHECKING:  # which imports torch, and no mistake in a word has to wait for it
    from rlopt.training.evaluate import Evaluation


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print the mean return with its interval, and write what was asked for.

    Of a folder of several runs each is evaluated; the film is the first one's, and ``--json`` writes a list.
    """
    _refuse_misfits(arguments)
    hub.refuse_nowhere(arguments.path)
    from rlopt.loops.configuration import MOST_EPISODES
    from rlopt.policy import run_policies
    from rlopt.training.evaluate import describe, evaluate_path

    if arguments.episodes is not None and arguments.episodes > MOST_EPISODES:
        raise RloptError(f"--episodes {arguments.episodes}: must be at most {MOST_EPISODES:,}")
    arguments.path = hub.local(arguments.path)
    load_extensions()
    out = sys.stderr if arguments.json == "-" else sys.stdout  # which is then JSON and nothing else
    if arguments.grid is not None:
        from rlopt.cli.grid import evaluate_over_grid

        told, found_there = evaluate_over_grid(arguments)
        print(told, file=out)
        _write(found_there, arguments.json)
        return 0
    evaluate = partial(
        evaluate_path,
        arguments.path,
        arguments.episodes,
        env_id=arguments.env,
        mode=arguments.mode,
        epsilon=arguments.epsilon,
        max_steps=arguments.max_steps,
        seed=arguments.seed,
        device=arguments.device,
        trust=arguments.trust,
    )
    several = range(len(run_policies(arguments.path)))
    evaluations: list[Evaluation] = []
    for run in several or [None]:
        with log_shown(partial(print, file=sys.stderr)):
            evaluations.append(evaluate(video=None if run else arguments.video, run=run))
        name = "" if run is None else f"run{run}  seed {evaluations[-1].seed}  "
        print(f"{name}{describe(evaluations[-1])}", file=out, flush=True)
    if not several:
        print(_more(evaluations[0]), file=out)
    if arguments.video:
        print(f"filmed: {arguments.video}", file=out)
    found = [evaluation.to_json() for evaluation in evaluations]
    _write(found if several else found[0], arguments.json)
    return 0


def _refuse_misfits(arguments: argparse.Namespace) -> None:
    """Refuse options that would be ignored, and files without a name."""
    of_grid = {"--points": arguments.points, "--picture": arguments.picture}
    of_episodes = {
        "--video": arguments.video, "--mode": arguments.mode != "agent" or None, "--epsilon": arguments.epsilon,
        "--max-steps": arguments.max_steps,
    }  # fmt: skip
    for name, value in (of_grid if arguments.grid is None else of_episodes).items():
        if value is not None:
            if arguments.grid is None:
                raise RloptError(f"{name} belongs to --grid; add --grid NAME=LOW:HIGH, or leave it out")
            raise RloptError(f"{name} is for single episodes, not for --grid; leave it out")
    for name in ("json", "picture", "video", "env"):
        if getattr(arguments, name) == "":
            raise RloptError(f"--{name} '': give a name, or leave it out")
    if arguments.json not in (None, "-") and Path(arguments.json).is_dir():
        raise RloptError(f"--json {arguments.json} is a folder; name a file")


def _write(found: Any, where: str | None) -> None:
    text = json.dumps(found, indent=1)
    if where == "-":
        print(text)
    elif where is not None:
        path = Path(where)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, f"{text}\n".encode())
        except OSError as error:
            raise RloptError(f"--json {path} cannot be written: {error}") from error
        print(f"written: {path}")


def _more(evaluation: Evaluation) -> str:
    """Return the second line: extremes, seed and kind of actions."""
    lengths = [episode.length for episode in evaluation.episodes]
    kind = "modes" if evaluation.mode.deterministic else "samples"
    if evaluation.mode.epsilon:
        kind = f"{kind} (and {evaluation.mode.epsilon:g} random actions)"
    return (
        f"returns {evaluation.min:.1f} to {evaluation.max:.1f}, lengths {min(lengths)} to {max(lengths)}, "
        f"seed {evaluation.seed}, {kind} of the policy"
    )
