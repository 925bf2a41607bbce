"""Environment steps per second of PPO on HalfCheetah: rlopt beside Stable-Baselines3 and CleanRL.

    python benchmarks/ppo_throughput.py --cleanrl ../cleanrl --out results/ppo_throughput

Same networks (2 x 64, tanh, apart), rollouts of 2048 steps, minibatches of 64 and 10 epochs, on the CPU: with one
environment, Gymnasium's own for all, and with eight, which rlopt steps natively and the others one by one (their
default). CleanRL's entrant is ``ppo_continuous_action.py`` of a checkout of vwxyzjn/cleanrl, as
``experiments/cleanrl_control.py`` runs it. Every entrant runs with 1 and with 2 threads, in a process of its own that
waits while the others run; all take short turns of whole rollouts with their updates, round after round. Medians over
the rounds are quoted, and ratios are between each entrant's best thread setting. A peer that is not there is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import BLUE, GREY, SKY, Entrant, Report, best, cpu, measure, publish, spread, verdict

ROLLOUT, BATCH, EPOCHS = 2_048, 64, 10
TARGETS = {1: 1.5, 8: 2.0}
"""What rlopt is to be, times the faster peer, by the number of environments."""
PACKAGES = ("rlopt", "torch", "numpy", "gymnasium", "mujoco", "stable_baselines3")
RLOPT, SB3, CLEANRL = "rlopt", "Stable-Baselines3", "CleanRL"


def entrants(
    rollout: int = ROLLOUT, epochs: int = EPOCHS, threads: Sequence[int] = (1, 2), cleanrl: Path | None = None
) -> list[Entrant]:
    found = []
    for envs in TARGETS:
        sizes = {"rollout_steps": rollout // envs, "batch_size": BATCH, "epochs": epochs}
        own: dict[str, Any] = {
            "agent": {"name": "ppo", **sizes},
            "num_envs": envs,
            "env": {"backend": "sync" if envs == 1 else "auto"},
        }
        for count in threads:
            setting = f"{count} thread{'s' if count > 1 else ''}"
            found.append(Entrant(_name(RLOPT, envs), setting, "rlopt", count, own))
            theirs = {**sizes, "num_envs": envs}
            if importlib.util.find_spec("stable_baselines3"):
                found.append(Entrant(_name(SB3, envs), setting, "stable_baselines3", count, theirs))
            if cleanrl is not None:
                path = {"checkout": str(cleanrl.resolve())}
                found.append(Entrant(_name(CLEANRL, envs), setting, "cleanrl", count, theirs | path))
    return found


def _name(library: str, envs: int) -> str:
    return f"{library}, {envs} environment{'s' if envs > 1 else ''}"


def report(speeds: Mapping[Entrant, Sequence[float]], remarks: Sequence[str]) -> Report:
    rows = [[e.name, e.setting, *spread(values)] for e, values in speeds.items()]
    tops = best(speeds)
    notes = []
    for envs, target in TARGETS.items():
        mine, peers = _name(RLOPT, envs), [name for name in (_name(SB3, envs), _name(CLEANRL, envs)) if name in tops]
        fastest = max((tops[name][0] for name in peers), default=0.0)
        for theirs in peers if mine in tops else []:
            what = f"{mine} ({tops[mine][1]}) / {theirs} ({tops[theirs][1]})"
            aim = target if tops[theirs][0] == fastest else None
            notes.append(verdict(what, tops[mine][0] / tops[theirs][0], aim))
    return Report(["library", "setting", "steps/s (median)", "min", "max"], rows, [*notes, *remarks])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each entrant")
    parser.add_argument("--seconds", type=float, default=2.0, help="least length of a turn")
    parser.add_argument("--quick", action="store_true", help="small rollouts, once: to try the script out")
    parser.add_argument("--cleanrl", type=Path, help="a checkout of vwxyzjn/cleanrl, to run its script too")
    parser.add_argument("--out", type=Path, help="folder for table.csv, README.md and chart.png")
    args = parser.parse_args(arguments)
    if args.quick:
        args.rounds, args.seconds = 1, 0.05
    chosen = entrants(256, 1, (1,), args.cleanrl) if args.quick else entrants(cleanrl=args.cleanrl)
    speeds, remarks, parked = measure(chosen, {"env": args.env, "algorithm": "ppo"}, args.rounds, args.seconds)
    for p in parked:
        p.close()
    made = report(speeds, remarks)
    print("\n" + made.text)
    if args.out:
        sizes = "256 steps, 1 epoch, tried out" if args.quick else f"{ROLLOUT} steps, {EPOCHS} epochs"
        about = (
            f"Environment steps per second of PPO on {args.env}: rollouts of {sizes}, minibatches of {BATCH}, networks "
            f"of 2x64, on a {cpu()}. Medians over turns of at least {args.seconds:g} s, {args.rounds} each, all "
            "entrants in turn. With 8 environments rlopt steps them natively, the others one by one."
        )
        command = (
            f"python benchmarks/ppo_throughput.py --env {args.env} --rounds {args.rounds} --seconds {args.seconds:g}"
        ) + (" --cleanrl CHECKOUT" if args.cleanrl else "")
        bars = {f"{name}, {setting}": speed for name, (speed, setting) in best(speeds).items()}
        publish(
            args.out, "PPO throughput", about, f"{command} --out {args.out}", PACKAGES, made, bars,
            "environment steps per second (best thread setting)",
            lambda name: GREY if not name.startswith(RLOPT) else BLUE if "1 environment" in name else SKY,
        )  # fmt: skip


if __name__ == "__main__":
    main()
