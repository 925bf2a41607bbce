"""``rlopt evaluate``: how good a saved policy is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rlopt.files import replace_file
from rlopt.registry import load_extensions
from rlopt.training.evaluate import describe, evaluate_path
from rlopt.types import RloptError


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print the mean return with its interval, and write what was asked for."""
    load_extensions()
    evaluation = evaluate_path(
        arguments.path,
        arguments.episodes,
        env_id=arguments.env,
        deterministic=not arguments.stochastic,
        seed=arguments.seed,
        video=arguments.video,
        device=arguments.device,
    )
    print(describe(evaluation))
    lengths = [episode.length for episode in evaluation.episodes]
    print(f"returns {evaluation.min:.1f} to {evaluation.max:.1f}, lengths {min(lengths)} to {max(lengths)}", end="")
    print(f", seed {evaluation.seed}, {'modes' if evaluation.deterministic else 'samples'} of the policy")
    if arguments.video:
        print(f"filmed: {arguments.video}")
    if arguments.json == "-":
        print(json.dumps(evaluation.to_json(), indent=1))
    elif arguments.json:
        path = Path(arguments.json)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, (json.dumps(evaluation.to_json(), indent=1) + "\n").encode())
        except OSError as error:
            raise RloptError(f"--json {path} cannot be written: {error}") from error
        print(f"written: {path}")
    return 0
