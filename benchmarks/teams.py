"""Environment steps per second of teams: rlopt's rows beside the packages that the tasks come from.

    python benchmarks/teams.py --out results/team_environments

MaMuJoCo natively, with 8 copies, beside ``gymnasium_robotics.mamujoco_v1``; MPE's spread in torch, with 256 copies,
beside mpe2; level-based foraging in torch, with 256 and 1024 copies, beside lbforaging. rlopt's rows are behind its
contract (tensors in and out, float32), with 1 and with 2 threads; a peer is one environment by itself, in its own
interface, which costs as much per step as many of them one after the other. Every entrant is a process of its own that
waits while the others run; actions are random and the same all along, episodes end and begin again, and all entrants of
a task take short turns, round after round. Medians are quoted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import Entrant, Report, best, cpu, measure, publish, spread, verdict
from windows import Windows, channel

ROWS: dict[tuple[str, int], float] = {
    ("mamujoco/HalfCheetah-2x3", 8): 5.0,
    ("mamujoco/Hopper-3x1", 8): 4.0,
    ("mamujoco/Ant-4x2", 8): 3.0,
    ("mamujoco/Humanoid-9_8", 8): 2.0,
    ("mpe/spread", 256): 20.0,
    ("lbf/8x8-2p-2f-coop", 256): 8.0,
    ("lbf/8x8-2p-2f-coop", 1024): 20.0,
}
"""What rlopt is to be, times the peer, by task and copies."""
PEERS = {"mamujoco": "gymnasium_robotics", "mpe": "mpe2", "lbf": "lbforaging"}
PACKAGES = ("rlopt", "torch", "numpy", "gymnasium", "mujoco", "gymnasium-robotics", "mpe2", "lbforaging")
DRAWN = 64
"""So many random actions are drawn beforehand."""


def entrants(task: str, copies: int, threads: Sequence[int] = (1, 2)) -> list[Entrant]:
    """rlopt with these threads, and the peer."""
    mine = [Entrant(_mine(copies), _threads(count), "rlopt", count, {"copies": copies}) for count in threads]
    return [*mine, Entrant(PEERS[task.partition("/")[0]], _threads(1), "peer", 1)]


def _mine(copies: int) -> str:
    return f"rlopt, {copies} copies"


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


# The worker's side


def serve(spec: Mapping[str, Any]) -> None:
    """Step the environments of an entrant whenever a window lasts."""
    out = channel()
    import torch

    torch.set_num_threads(int(spec["threads"]))
    step = rlopt_step(spec["env"], spec["config"]["copies"]) if spec["library"] == "rlopt" else peer_step(spec["env"])
    for _ in range(20):
        step()
    windows = Windows(out)
    while windows.tick(step()):
        pass


def rlopt_step(task: str, copies: int) -> Callable[[], int]:
    """Return a function that steps all copies once, and says how many transitions that were."""
    import torch

    from rlopt.envs import make_env

    env = make_env(task, copies)
    env.reset()
    space: Any = env.spec.action_space
    generator = torch.Generator().manual_seed(0)
    shape = (DRAWN, copies, *space.shape)
    if hasattr(space, "nvec"):
        actions = (torch.rand(shape, generator=generator) * torch.from_numpy(space.nvec)).long()
    else:
        low, high = torch.from_numpy(space.low), torch.from_numpy(space.high)
        actions = low + (high - low) * torch.rand(shape, generator=generator)
    drawn = _in_turn(list(actions))

    def step() -> int:
        env.step(drawn())
        return copies

    return step


def _in_turn(items: Sequence[Any]) -> Callable[[], Any]:
    """Return a function that gives the items one after the other, again and again."""
    count = 0

    def following() -> Any:
        nonlocal count
        count += 1
        return items[count % len(items)]

    return following


def peer_step(task: str) -> Callable[[], int]:
    """Return a function that takes one step of the package's own environment."""
    import importlib

    import numpy as np

    kind, _, name = task.partition("/")
    generator = np.random.default_rng(0)
    if kind == "lbf":
        import gymnasium

        importlib.import_module("lbforaging")
        env: Any = gymnasium.make(f"Foraging-{name}-v3", disable_env_checker=True).unwrapped
        drawn = _in_turn([generator.integers(6, size=len(env.action_space)).tolist() for _ in range(DRAWN)])

        def forage() -> int:
            if env.step(drawn())[2]:
                env.reset()
            return 1

        env.reset(seed=0)
        return forage
    if kind == "mpe":
        env = importlib.import_module(f"mpe2.simple_{name}_v3").parallel_env()
    else:
        scenario, _, partition = name.partition("-")
        module = importlib.import_module("gymnasium_robotics").mamujoco_v1
        env = module.parallel_env(scenario, partition.replace("_", "|"))
    own = {agent: env.action_space(agent) for agent in env.possible_agents}
    for i, space in enumerate(own.values()):
        space.seed(i)
    drawn = _in_turn([{agent: space.sample() for agent, space in own.items()} for _ in range(DRAWN)])

    def play() -> int:
        env.step(drawn())
        if not env.agents:
            env.reset()
        return 1

    env.reset(seed=0)
    return play


# The report


def judge(task: str, copies: int, speeds: Mapping[Entrant, Sequence[float]]) -> tuple[list[list[str]], list[str]]:
    """Rows of the table, and what there is to say about the ratio."""
    rows = [[task, e.name, e.setting, *spread(values)] for e, values in speeds.items()]
    tops, peer = best(speeds), PEERS[task.partition("/")[0]]
    if peer not in tops:
        return rows, []
    (mine, setting), (theirs, _) = tops[_mine(copies)], tops[peer]
    return rows, [verdict(f"{task}: {_mine(copies)} ({setting}) / {peer}", mine / theirs, ROWS.get((task, copies)))]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="tasks whose names begin so")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each entrant")
    parser.add_argument("--seconds", type=float, default=1.0, help="least length of a turn")
    parser.add_argument("--quick", action="store_true", help="one short turn with one thread: to try the script out")
    parser.add_argument("--out", type=Path, help="folder for table.csv, README.md and chart.png")
    args = parser.parse_args(arguments)
    if args.quick:
        args.rounds, args.seconds = 1, 0.2
    rows: list[list[str]] = []
    notes: list[str] = []
    remarks: list[str] = []
    for task, copies in ROWS:
        if args.only and not task.startswith(args.only):
            continue
        chosen = entrants(task, copies, (1,) if args.quick else (1, 2))
        speeds, told, parked = measure(chosen, {"env": task, "algorithm": "teams"}, args.rounds, args.seconds)
        for p in parked:
            p.close()
        found, said = judge(task, copies, speeds)
        rows, notes, remarks = rows + found, notes + said, remarks + [f"{task}: {line}" for line in told]
    made = Report(["task", "entrant", "setting", "steps/s (median)", "min", "max"], rows, [*notes, *remarks])
    print("\n" + made.text)
    if args.out:
        about = (
            f"Steps per second of environments with several agents (one step is one of the whole team), on a {cpu()}. "
            "rlopt's rows are behind its contract, tensors in and out; a peer is one environment of the package that "
            f"the task comes from. Random actions; medians over {args.rounds} turns of at least {args.seconds:g} s."
        )
        command = f"python benchmarks/teams.py --rounds {args.rounds} --seconds {args.seconds:g}"
        publish(
            args.out, "Environments with several agents", about, command, PACKAGES, made, {}, "", str,
        )  # fmt: skip


if __name__ == "__main__":
    main()
