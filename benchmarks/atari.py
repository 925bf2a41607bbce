"""Atari on the CPU: environment steps per second behind rlopt's contract, beside ale-py's own and Gymnasium's wrappers,
and DQN end to end beside Stable-Baselines3's and CleanRL's.

    python benchmarks/atari.py --cleanrl ../cleanrl --out results/atari_throughput
    python benchmarks/atari.py --only memory --out results/atari_throughput

**Environments.** Eight copies of a game, two threads, random actions: ``env.backend=atari`` under both protocols,
ale-py's ``AtariVectorEnv`` by itself with the same sticky actions and no-ops, and Gymnasium's ``AtariPreprocessing``
and ``FrameStackObservation`` in a ``SyncVectorEnv``, which has one thread. Every entrant has a process of its own that
waits while the others run; all take short turns, round after round, and medians over the rounds are quoted. Only
transitions count: the hidden steps of the classic protocol do not.

**DQN.** The Nature network, minibatches of 32, one update per four environment steps, a copy every 1,000 steps, and
the classic protocol, two threads: with one environment in float32 and bf16, and with eight. Stable-Baselines3 has its
own wrappers and one process; CleanRL's entrant is ``dqn_atari.py`` of a checkout of vwxyzjn/cleanrl, word for word
(``experiments/cleanrl_control.py`` says what it needs of today's gymnasium), which has one environment. All learn from
the start, with an epsilon of 0.01. A peer that is not there is left out.

**Memory.** What a process has more in memory after it has filled a replay buffer of 200,000 transitions by random play,
beside the size that training prints before it starts (Linux).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from harness import BLUE, GREY, SKY, Entrant, Report, best, cpu, measure, publish, spread, verdict, versions
from windows import Windows, channel

from rlopt.envs import make_env
from rlopt.envs.atari import PROTOCOLS
from rlopt.registry import register_games

COPIES, THREADS = 8, 2
RLOPT, BARE, WRAPPERS = "rlopt", "AtariVectorEnv", "Gymnasium's wrappers"
TARGETS = {BARE: 0.9, WRAPPERS: 2.0}
"""What rlopt is to be, times each, under the dopamine protocol."""
PACKAGES = ("rlopt", "ale_py", "gymnasium", "torch", "numpy", "opencv-python-headless", "stable_baselines3")
SB3, CLEANRL = "Stable-Baselines3", "CleanRL"
DQN_TARGETS = {"float32, 1 environment": 1.25, "bf16, 1 environment": 1.6}
"""What rlopt is to be, times the faster peer with as many environments, by what the row says."""
BATCH, EVERY, COPY, LEARNING_STARTS, CAPACITY, SETTLE = 32, 4, 1_000, 1_000, 20_000, 400
FILLED, NEAR = 200_000, 0.05
"""Transitions whose memory is measured, and how near to what is printed that is to be."""


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


def serve_dqn(spec: Mapping[str, Any]) -> None:
    """Windows of DQN's training, after it has learned for ``settle`` steps: rlopt's, Stable-Baselines3's, or the script
    of a ``checkout`` of CleanRL."""
    out, library, options = channel(), str(spec["library"]), spec["config"]
    torch.set_num_threads(int(spec["threads"]))
    {"rlopt": _rlopt, "stable_baselines3": _sb3, "cleanrl": _cleanrl}[library](spec, options, out)


def dqn_loop(env_id: str, capacity: int, options: Mapping[str, Any]) -> Any:
    """Return rlopt's loop, with CleanRL's settings of DQN."""
    from rlopt.training import train_config
    from rlopt.training.setup import make_loop, resolve_config

    agent = {
        "name": "dqn", "learning_rate": 1e-4, "td_loss": "squared", "batch_size": BATCH, "update_ratio": [1, EVERY],
        "warmup_steps": 0, "learning_starts": LEARNING_STARTS, "target_every": COPY, "target_counts": "env_steps",
        "epsilon_steps": 1, "epsilon_end": 0.01, "network": {"encoder": "nature_cnn", "hidden": []},
    }  # fmt: skip
    config = {
        "env": {"id": env_id, "protocol": "classic"}, "buffer": {"capacity": capacity}, "total_steps": 10**9,
        "device": "cpu", **options, "agent": {**agent, **options.get("agent", {})},
    }  # fmt: skip
    return make_loop(resolve_config(train_config(config)))


def _rlopt(spec: Mapping[str, Any], options: Mapping[str, Any], out: Any) -> None:
    loop = dqn_loop(spec["env"], CAPACITY, {"threads": spec["threads"], **options})
    while loop.step < LEARNING_STARTS + SETTLE:
        loop.advance()
    windows, made = Windows(out), loop.step
    while windows.tick(loop.step - made):
        made = loop.step
        loop.advance()
    loop.close()


def _sb3(spec: Mapping[str, Any], options: Mapping[str, Any], out: Any) -> None:
    from stable_baselines3 import DQN
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    register_games(spec["env"])
    envs = int(options["num_envs"])

    class Clock(BaseCallback):
        windows: Windows | None = None

        def _on_step(self) -> bool:
            if self.num_timesteps < LEARNING_STARTS + SETTLE:
                return True
            if self.windows is None:
                self.windows = Windows(out)
            return self.windows.tick(envs)

    # An update per EVERY transitions, as the others have it, is EVERY steps of one environment, or several updates a
    # step of many.
    model = DQN(
        "CnnPolicy", VecFrameStack(make_atari_env(_old_name(spec["env"]), envs, seed=0), 4), learning_rate=1e-4,
        buffer_size=CAPACITY, learning_starts=LEARNING_STARTS, batch_size=BATCH, train_freq=max(EVERY // envs, 1),
        gradient_steps=max(envs // EVERY, 1), target_update_interval=COPY, exploration_fraction=1e-9,
        exploration_final_eps=0.01, seed=0, device="cpu",
    )  # fmt: skip
    model.learn(10**9, callback=Clock())


def _cleanrl(spec: Mapping[str, Any], options: Mapping[str, Any], out: Any) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
    from cleanrl_control import Done, run_script

    register_games(spec["env"])
    windows: list[Windows] = []
    made = LEARNING_STARTS + SETTLE

    def report(tag: str, value: float, step: int, names: Any) -> None:
        nonlocal made
        if tag != "charts/SPS" or step < made:  # of every hundredth step
            return
        if not windows:
            windows.append(Windows(out))
        elif not windows[0].tick(step - made):
            raise Done
        made = step

    own = {
        "env_id": _old_name(spec["env"]), "buffer_size": CAPACITY, "learning_starts": LEARNING_STARTS,
        "batch_size": BATCH, "train_frequency": EVERY, "target_network_frequency": COPY, "total_timesteps": 10**9,
        "exploration_fraction": 1e-9, "cuda": False,
    }  # fmt: skip
    with contextlib.suppress(Done):
        run_script(Path(options["checkout"]), own, report, Path("cleanrl") / "dqn_atari.py")


def _old_name(env_id: str) -> str:
    """Return the id under which the peers know the game without sticky actions and frame skip."""
    return env_id.removeprefix("ALE/").partition("-")[0] + "NoFrameskip-v4"


def dqn_entrants(threads: int = THREADS, cleanrl: Path | None = None) -> list[Entrant]:
    setting = f"{threads} thread{'s' if threads > 1 else ''}"
    found = []
    for envs in (1, COPIES):
        word = f"{envs} environment{'s' if envs > 1 else ''}"
        for precision in ("float32", "bf16"):
            own = {"num_envs": envs, "precision": precision}
            found.append(Entrant(f"{RLOPT}, {precision}, {word}", setting, "rlopt", threads, own))
        if importlib.util.find_spec("stable_baselines3"):
            found.append(Entrant(f"{SB3}, {word}", setting, "stable_baselines3", threads, {"num_envs": envs}))
        if cleanrl is not None and envs == 1:
            path = {"checkout": str(cleanrl.resolve())}
            found.append(Entrant(f"{CLEANRL}, {word}", setting, "cleanrl", threads, path))
    return found


def dqn_report(speeds: Mapping[Entrant, Sequence[float]], remarks: Sequence[str]) -> Report:
    """The table, and the ratios to each peer with as many environments."""
    rows = [[e.name, e.setting, *spread(values)] for e, values in speeds.items()]
    tops = {name: speed for name, (speed, _) in best(speeds).items()}
    notes = []
    for mine in (name for name in tops if name.startswith(RLOPT)):
        row = mine.removeprefix(f"{RLOPT}, ")
        peers = [name for name in tops if not name.startswith(RLOPT) and name.endswith(row.partition(", ")[2])]
        fastest = max(peers, key=tops.__getitem__, default=None)
        notes += [
            verdict(f"{mine} / {peer}", tops[mine] / tops[peer], DQN_TARGETS.get(row) if peer == fastest else None)
            for peer in peers
        ]
    return Report(["entrant", "setting", "steps/s (median)", "min", "max"], rows, [*notes, *remarks])


def memory_report(env_id: str, filled: int) -> Report:
    """Fill a buffer of ``filled`` transitions by random play, and compare what it takes with what is printed."""

    def resident() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**30

    random = {"warmup_steps": 2 * filled, "learning_starts": 2 * filled}
    loop = dqn_loop(env_id, filled, {"num_envs": COPIES, "agent": random})
    while loop.step < filled // 20:
        loop.advance()
    before, begun = resident(), loop.step
    while loop.step < filled:
        loop.advance()
    taken, printed = resident() - before, loop.buffer.nbytes / 2**30
    expected = printed * (filled - begun) / filled
    row = [f"{filled:,}", f"{printed:.3f}", f"{expected:.3f}", f"{taken:.3f}"]
    near = "within" if abs(taken / expected - 1) <= NEAR else "not within"
    head = ["transitions", "printed, GiB", "of it for those written meanwhile, GiB", "taken by these, GiB"]
    return Report(head, [row], [f"taken / expected: {taken / expected:.3f} ({near} {NEAR:.0%})"])


def run_memory(args: argparse.Namespace) -> None:
    made = memory_report(args.env, 2_000 if args.quick else FILLED)
    print("\n" + made.text)
    if args.out:
        out = args.out / "memory"
        out.mkdir(parents=True, exist_ok=True)
        made.write_csv(out / "table.csv")
        command = f"python benchmarks/atari.py --only memory --env {args.env} --out {args.out}"
        about = (
            f"Resident memory of one process while {COPIES} copies of {args.env} fill a replay buffer by random play. "
            "The first twentieth is written before measuring begins."
        )
        parts = ("# Memory of a replay buffer of Atari", about, f"    {command}", f"{versions(*PACKAGES)}.", made.text)
        text = "\n\n".join(parts) + "\n"
        (out / "README.md").write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="ALE/Breakout-v5")
    parser.add_argument("--only", choices=PARTS, help="one of the two parts")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each entrant")
    parser.add_argument("--seconds", type=float, help="length of a turn (1 for environments, 3 for DQN)")
    parser.add_argument("--quick", action="store_true", help="two copies, once: to try the script out")
    parser.add_argument("--cleanrl", type=Path, help="a checkout of vwxyzjn/cleanrl, to run its script too")
    parser.add_argument("--out", type=Path, help="a folder; each part has table.csv, README.md and chart.png there")
    args = parser.parse_args(arguments)
    for part in PARTS if args.only is None else (args.only,):
        if part == "memory":
            run_memory(args)
        else:
            run(part, args)


PARTS = ("environments", "dqn", "memory")


def run(part: str, args: argparse.Namespace) -> None:
    """Measure one part, print its table, and write its folder."""
    learning = part == "dqn"
    seconds = args.seconds or (3.0 if learning else 1.0)
    rounds, threads = args.rounds, THREADS
    if args.quick:
        rounds, seconds, threads = 1, 0.05, 1
    if learning:
        chosen = dqn_entrants(threads, args.cleanrl)
    else:
        chosen = entrants(2 if args.quick else COPIES, threads)
    settings = {"env": args.env, "algorithm": "dqn" if learning else "games"}
    speeds, remarks, parked = measure(chosen, settings, rounds, seconds)
    for p in parked:
        p.close()
    made = (dqn_report if learning else report)(speeds, remarks)
    print("\n" + made.text)
    if not args.out:
        return
    timed = f"Medians over turns of {seconds:g} s, {rounds} each, all in turn, on a {cpu()}."
    if learning:
        about = (
            f"Environment steps per second of DQN's training on {args.env}: the Nature network, minibatches of {BATCH},"
            f" one update per {EVERY} environment steps, a copy every {COPY:,} steps, no sticky actions, a lost life an"
            f" end. {timed} Stable-Baselines3 steps its copies one by one; CleanRL has one."
        )
    else:
        about = (
            f"Environment steps per second of {args.env} (a step is four emulator frames), {chosen[0].setting}, random "
            f"actions. {timed} Gymnasium's wrappers step their copies one by one."
        )
    command = f"python benchmarks/atari.py --only {part} --env {args.env} --rounds {rounds} --seconds {seconds:g}"
    if learning and args.cleanrl:
        command += " --cleanrl CHECKOUT"
    bars = {name: speed for name, (speed, _) in best(speeds).items()}
    light = "8 environments" if learning else "classic"
    publish(
        args.out / part, f"Atari throughput: {'DQN' if learning else part}", about, f"{command} --out {args.out}",
        PACKAGES, made, bars, "environment steps per second",
        lambda name: GREY if not name.startswith(RLOPT) else SKY if light in name else BLUE,
    )  # fmt: skip


if __name__ == "__main__":
    main()
