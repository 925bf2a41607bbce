"""How much of an iteration of GiGPO goes into what it has beside GRPO: finding who acted on the same observation, the
advantages by group, and the metrics about them.

    python benchmarks/grouping.py --out results/gigpo/grouping.md

Processor time of one thread. The paper has 0.54 s of 362.8 s, 0.15 %, for a language model (its figure 6); networks and
tables act in microseconds, so the share is larger here.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import rlopt.agents.gigpo as module
from rlopt.agents import GiGPO, GiGPOConfig
from rlopt.envs import make_env
from rlopt.loops.group import GroupLoop
from rlopt.nn import NetworkConfig

PARTS = ("tensor_anchors", "group_advantages", "group_metrics")
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "toy text, a table": ("FrozenLake-v1", {}, {"network": NetworkConfig(hidden=())}),
    "MiniGrid, a network": ("MiniGrid-DoorKey-5x5-v0", {}, {}),
    "a text game, a table": (
        "textworld_express/coin",
        {"params": "numLocations=6,includeDoors=1", "horizon": 40, "tasks": 4},
        {"tasks": 4, "table": 1 << 18},
    ),
}


def main(argv: Iterable[str] | None = None) -> None:
    """Measure every case that is installed, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a file for the table, beside the standard output")
    parser.add_argument("--seconds", type=float, default=15.0, help="processor time of each case")
    args = parser.parse_args(None if argv is None else list(argv))
    torch.set_num_threads(1)
    lines = [
        "`python benchmarks/grouping.py`: share of the processor time of an iteration, 8 groups x 8 episodes",
        "",
        "| case | steps in an iteration | anchors | advantages | metrics | all three |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, case in CASES.items():
        if case[0].startswith("textworld_express") and shutil.which("java") is None:
            continue
        lines.append(f"| {name} | {measure(*case, args.seconds)} |")
        print(lines[-1], flush=True)
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure(id: str, kwargs: dict[str, Any], options: dict[str, Any], seconds: float) -> str:
    """Return the cells of one case."""
    spent = dict.fromkeys(PARTS, 0.0)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            begin = time.process_time()
            found = function(*args)
            spent[part] += time.process_time() - begin
            return found

        return call

    env = make_env(id, 64, autoreset=False, kwargs=kwargs)
    loop = GroupLoop(GiGPO(env.spec, GiGPOConfig(groups=8, group_size=8, **options)), env, 10**9)
    loop.advance()
    plain = {part: getattr(module, part) for part in PARTS}
    begun, steps, iterations = time.process_time(), loop.step, 0
    try:
        for part in PARTS:
            setattr(module, part, timed(part, plain[part]))
        while time.process_time() - begun < seconds:
            loop.advance()
            iterations += 1
    finally:
        for part in PARTS:
            setattr(module, part, plain[part])
        loop.close()
    whole = time.process_time() - begun
    shares = [spent[part] / whole for part in PARTS]
    return " | ".join([f"{(loop.step - steps) / iterations:,.0f}", *(f"{x:.2%}" for x in (*shares, sum(shares)))])


if __name__ == "__main__":
    main()
