"""``rlopt push``: a policy on a model hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlopt import hub
from rlopt.errors import RloptError


def run(arguments: argparse.Namespace) -> int:
    """Push, and say what went and what it scores."""
    hub.parse_address(arguments.to)
    hub.refuse_nowhere(arguments.path)
    path = Path(arguments.path)
    if arguments.policy == "best":
        if hub.is_address(path) or not (path / "policy_best").is_dir():
            raise RloptError(f"--policy best: {path} is no run folder with policy_best/; give one, or leave it out")
        path = path / "policy_best"
    from rlopt.registry import load_extensions
    from rlopt.training.evaluate import describe
    from rlopt.training.sharing import push

    load_extensions()
    done = push(
        path,
        arguments.to,
        episodes=arguments.episodes,
        video=arguments.video,
        private=arguments.private,
        message=arguments.message,
        dry_run=arguments.dry_run,
        device=arguments.device,
        trust=arguments.trust,
    )
    for evaluation in done.evaluations:
        print(describe(evaluation))
    for name, size in done.files.items():
        print(f"{size:>12,}  {name}")
    print(f"pushed: {done.page}" if done.page else f"written: {arguments.dry_run}; nothing was pushed")
    return 0
