"""``rlopt export``: a policy for programs without rlopt."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlopt import hub


def run(arguments: argparse.Namespace) -> int:
    """Write the file, and say what goes in and comes out."""
    hub.refuse_nowhere(arguments.path)
    from rlopt.policy import load_policy
    from rlopt.policy.portable import SUFFIXES, export_policy

    policy = load_policy(arguments.path)
    path = Path(arguments.out or f"policy{SUFFIXES[arguments.to]}")
    graph = export_policy(policy, path, arguments.to)
    print(f"exported: {path}")
    print(f"inputs (N, …): {', '.join(graph.inputs)}; outputs: {', '.join(graph.outputs)}")
    return 0
