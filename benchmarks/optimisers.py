"""One guarded optimiser step beside torch's own of the same rule, on the CPU.

    python benchmarks/optimisers.py --out results/optimiser_steps

Steps per second with the parameters of a critic of SAC (two hidden layers of 256) and of the Nature network: the
gradient's norm and a step that a flag may skip, beside a step of ``torch.optim`` by the fastest of its implementations
(``fused``, ``foreach``, one by one), which skips nothing. All take short turns in one process whose heap keeps what is
freed, as in a training, round after round, and medians over the rounds are quoted.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from harness import BLUE, GREY, Report, cpu, publish, spread, verdict
from torch import Tensor

from rlopt.heap import keep_freed_memory
from rlopt.nn import RULES, Optimiser, OptimiserConfig

NETWORKS = {
    "SAC's critic": [(256, 23), (256,), (256, 256), (256,), (1, 256), (1,)],
    "Nature network": [
        (32, 4, 8, 8), (32,), (64, 32, 4, 4), (64,), (64, 64, 3, 3), (64,), (512, 3136), (512,), (4, 512), (4,),
    ],
}  # fmt: skip
RATE = 1e-4
PEERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda p, **how: torch.optim.Adam(p, RATE, **how),
    "sgd": lambda p, **how: torch.optim.SGD(p, RATE, momentum=0.9, **how),
    "rmsprop": lambda p, **how: torch.optim.RMSprop(p, RATE, alpha=0.95, eps=1e-5, centered=True, **how),
}
WAYS = ({"fused": True}, {"foreach": True}, {"foreach": False})


def gradients(shapes: list[tuple[int, ...]]) -> Iterator[list[Tensor]]:
    """Yield one of eight gradients in turn: one that never changes has no variance, of which torch takes the root."""
    return itertools.cycle([[torch.randn(shape) for shape in shapes] for _ in range(8)])


def ours(rule: str, shapes: list[tuple[int, ...]]) -> Callable[[], object]:
    """Return a step of rlopt's: norm, and step where the flag allows it."""
    options = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-5}
    config = OptimiserConfig(name=rule, **{k: x for k, x in options.items() if k in RULES[rule].reads})
    optimiser, ok = Optimiser(torch.randn(sum(map(math.prod, shapes))), RATE, config), torch.tensor(True)
    grads = gradients(shapes)

    def step() -> None:
        optimiser.gather(next(grads))
        norm = optimiser.norm()
        optimiser.step(norm, ok & norm.isfinite())

    return step


def theirs(rule: str, shapes: list[tuple[int, ...]]) -> Callable[[], object]:
    """Return a step of torch's, by the fastest of its ways that exist."""
    found: list[tuple[float, Callable[[], object]]] = []
    grads = gradients(shapes)
    for way in WAYS:
        leaves: list[Tensor] = [torch.randn(shape).requires_grad_() for shape in shapes]
        try:
            optimiser = PEERS[rule](leaves, **way)
        except TypeError:  # RMSprop has no fused one
            continue

        def step(leaves: list[Tensor] = leaves, optimiser: torch.optim.Optimizer = optimiser) -> None:
            for leaf, grad in zip(leaves, next(grads), strict=True):
                leaf.grad = grad
            optimiser.step()

        found.append((max(speed(step, 0.1) for _ in range(3)), step))
    return max(found, key=lambda x: x[0])[1]


def speed(step: Callable[[], object], seconds: float) -> float:
    """Return steps per second."""
    count, begun = 0, time.perf_counter()
    while (spent := time.perf_counter() - begun) < seconds:
        step()
        count += 1
    return count / spent


def main(argv: Iterable[str] | None = None) -> None:
    """Measure every rule on every network, and write the results folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each")
    parser.add_argument("--seconds", type=float, default=0.2, help="length of a turn")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    args = parser.parse_args(None if argv is None else list(argv))
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    rows: list[list[str]] = []
    notes: list[str] = []
    bars: dict[str, float] = {}
    for network, shapes in NETWORKS.items():
        for rule in PEERS:
            steps = {"rlopt": ours(rule, shapes), "torch": theirs(rule, shapes)}
            found: dict[str, list[float]] = {name: [] for name in steps}
            for step in steps.values():
                speed(step, args.seconds)
            for _ in range(args.rounds):
                for name, step in steps.items():
                    found[name].append(speed(step, args.seconds))
            middle = {name: statistics.median(values) for name, values in found.items()}
            for name, values in found.items():
                rows.append([f"{name}, {rule}", network, *spread(values)])
                bars[f"{name}, {rule}, {network}"] = middle[name]
            notes.append(verdict(f"{network}, {rule}: rlopt / torch", middle["rlopt"] / middle["torch"]))
            print(notes[-1], flush=True)
    about = (
        f"Optimiser steps per second with given gradients, {args.threads} thread{'s' * (args.threads > 1)}; rlopt's "
        "with the norm of the gradient and the flag that skips a step, torch's without. RMSprop is centred. Medians "
        f"over {args.rounds} turns of {args.seconds:g} s, all in turn, in one process that keeps freed memory, on a "
        f"{cpu()}."
    )
    command = f"python benchmarks/optimisers.py --threads {args.threads} --out {args.out}"
    made = Report(["entrant", "setting", "steps/s (median)", "min", "max"], rows, notes)
    publish(args.out, "Optimiser steps", about, command, ("rlopt", "torch"), made, bars, "steps per second",
            lambda name: BLUE if name.startswith("rlopt") else GREY)  # fmt: skip


if __name__ == "__main__":
    main()
