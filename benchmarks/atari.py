"""Atari on the CPU: environment steps per second behind rlopt's contract, beside ale-py's own and Gymnasium's wrappers.

    python benchmarks/atari.py --out results/atari_throughput

Eight copies of a game, two threads, random actions: ``env.backend=atari`` under both protocols, ale-py's
``AtariVectorEnv`` by itself with the same sticky actions and no-ops, and Gymnasium's ``AtariPreprocessing`` and
``FrameStackObservation`` in a ``SyncVectorEnv``, which has one thread. Every entrant has a process of its own that
waits while the others run; all take short turns, round after round, and medians over the rounds are quoted. Only
transitions count: the hidden steps of the classic protocol do not.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from harness import BLUE, GREY, SKY, Entrant, Report, best, cpu, measure, publish, spread, verdict
from windows import Windows, channel

from rlopt.envs import make_env
from rlopt.envs.atari import PROTOCOLS
from rlopt.registry import register_games

COPIES, THREADS = 8, 2
RLOPT, BARE, WRAPPERS = "rlopt", "AtariVectorEnv", "Gymnasium's wrappers"
TARGETS = {BARE: 0.9, WRAPPERS: 2.0}
"""What rlopt is to be, times each, under the dopamine protocol."""
PACKAGES = ("rlopt", "ale_py", "gymnasium", "torch", "numpy", "opencv-python-headless")


def serve(spec: Mapping[str, Any]) -> None:
    """Step ``num_envs`` copies of an Atari game under ``protocol``, with random actions: behind rlopt's contract,
    ale-py's vector environment by itself, or Gymnasium's wrappers. Only transitions count."""
    out, library, threads, env_id = channel(), str(spec["library"]), int(spec["threads"]), str(spec["env"])
    options = spec["config"]
    torch.set_num_threads(threads)
    register_games(env_id)
    n, protocol = int(options["num_envs"]), PROTOCOLS[str(options["protocol"])]
    count = int(gymnasium.make(env_id).action_space.n)  # type: ignore[attr-defined]
    drawn = np.random.default_rng(0).integers(count, size=(256, n))
    env: Any
    if library == "rlopt":
        env, actions = make_env(env_id, n, protocol=protocol.name), list(torch.from_numpy(drawn))
        env.reset()
    else:
        actions = list(drawn)
        if library == "ale":
            env = gymnasium.make_vec(
                env_id, n, vectorization_mode="vector_entry_point", num_threads=threads, reward_clipping=False,
                repeat_action_probability=protocol.sticky, noop_max=protocol.noops + 1, use_fire_reset=False,
                autoreset_mode="SameStep",
            )  # fmt: skip
        else:

            def one() -> Any:
                game = gymnasium.make(env_id, frameskip=1, repeat_action_probability=protocol.sticky)
                seen = gymnasium.wrappers.AtariPreprocessing(game, noop_max=protocol.noops)
                return gymnasium.wrappers.FrameStackObservation(seen, 4)

            mode = gymnasium.vector.AutoresetMode.SAME_STEP
            env = gymnasium.vector.SyncVectorEnv([one] * n, autoreset_mode=mode)
        env.reset(seed=0)
    windows, k, wanted = Windows(out), 0, True
    while wanted:
        step = env.step(actions[k % 256])
        wanted, k = windows.tick(int(step.valid.sum()) if library == "rlopt" else n), k + 1


def entrants(copies: int = COPIES, threads: int = THREADS) -> list[Entrant]:
    libraries = {RLOPT: "rlopt", BARE: "ale", WRAPPERS: "gymnasium"}
    return [
        Entrant(f"{name}, {word}", _setting(copies, threads), library, threads, {"num_envs": copies, "protocol": word})
        for word in ("dopamine", "classic")
        for name, library in libraries.items()
    ]


def _setting(copies: int, threads: int) -> str:
    return f"{copies} environments, {threads} thread{'s' if threads > 1 else ''}"


def report(speeds: Mapping[Entrant, Sequence[float]], remarks: Sequence[str]) -> Report:
    """The table, and the ratios."""
    rows = [[e.name, e.setting, *spread(values)] for e, values in speeds.items()]
    tops = {name: speed for name, (speed, _) in best(speeds).items()}
    notes = []
    for word in ("dopamine", "classic"):
        for peer, target in TARGETS.items():
            mine, theirs = (tops.get(f"{name}, {word}") for name in (RLOPT, peer))
            if mine and theirs:
                notes.append(
                    verdict(f"{word}: {RLOPT} / {peer}", mine / theirs, target if word == "dopamine" else None)
                )
    return Report(["entrant", "setting", "steps/s (median)", "min", "max"], rows, [*notes, *remarks])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="ALE/Breakout-v5")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each entrant")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn")
    parser.add_argument("--quick", action="store_true", help="two copies, once: to try the script out")
    parser.add_argument("--out", type=Path, help="folder for table.csv, README.md and chart.png")
    args = parser.parse_args(arguments)
    if args.quick:
        args.rounds, args.seconds = 1, 0.05
    chosen = entrants(2, 1) if args.quick else entrants()
    speeds, remarks, parked = measure(chosen, {"env": args.env, "algorithm": "games"}, args.rounds, args.seconds)
    for p in parked:
        p.close()
    made = report(speeds, remarks)
    print("\n" + made.text)
    if args.out:
        about = (
            f"Environment steps per second of {args.env} (a step is four emulator frames), {chosen[0].setting}, random "
            f"actions, on a {cpu()}. Medians over turns of {args.seconds:g} s, {args.rounds} each, all in turn. "
            "Gymnasium's wrappers step their copies one by one."
        )
        command = f"python benchmarks/atari.py --env {args.env} --rounds {args.rounds} --seconds {args.seconds:g}"
        bars = {name: speed for name, (speed, _) in best(speeds).items()}
        publish(
            args.out, "Atari throughput", about, f"{command} --out {args.out}", PACKAGES, made, bars,
            "environment steps per second",
            lambda name: GREY if not name.startswith(RLOPT) else BLUE if "dopamine" in name else SKY,
        )  # fmt: skip


if __name__ == "__main__":
    main()
