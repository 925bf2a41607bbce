"""The parts of ``gpu.py``: each runs in a process of its own and reports every measurement when it has it."""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from harness import cpu
from windows import channel, make_sac


@dataclass(frozen=True)
class Sizes:
    """How much of everything is measured."""

    warmup: int = 1_000
    extra: int = 200
    capacity: int = 1_000_000
    rounds: int = 5
    seconds: float = 2.0
    runs: tuple[int, ...] = (1, 4, 16, 64)
    worlds: tuple[int, ...] = (256, 1_024, 4_096, 16_384)
    native: tuple[int, ...] = (8, 64, 256, 1_024)
    envs: tuple[str, ...] = ("HalfCheetah-v5", "Hopper-v5")
    train_worlds: int = 4_096
    train_batch: int = 4_096
    train_updates: int = 8
    """Updates per vector step."""
    train_windows: int = 4
    train_seconds: float = 10.0


QUICK = Sizes(
    warmup=20, extra=2, capacity=8_192, rounds=1, seconds=0.1, runs=(1, 2), worlds=(2, 4), native=(2, 4),
    envs=("HalfCheetah-v5",), train_worlds=16, train_batch=16, train_updates=1, train_windows=1, train_seconds=0.2,
)  # fmt: skip


class Bench:
    """What a part is given: the device, the sizes, how much time is left, and where measurements go."""

    def __init__(self, device: str, sizes: Sizes, limit: float) -> None:
        import torch

        self.device, self.sizes, self._out = device, sizes, channel()
        self._deadline = time.perf_counter() + 0.85 * limit
        self.cuda = device.startswith("cuda")
        self.where = torch.cuda.get_device_name(device) if self.cuda else cpu()

    def sample(self, what: Mapping[str, object], value: float, where: str | None = None) -> None:
        """One measurement of ``what``, the cells that name its row."""
        cells = {key: str(word) for key, word in what.items()}
        self._tell({"what": cells, "value": value, "where": where or self.where})

    def note(self, text: str) -> None:
        self._tell({"note": text})

    def attempt(self, name: str, work: Callable[[], Any]) -> Any:
        """What ``work`` returns; None, and a note, where it fails or comes too late."""
        if self.late():
            self.note(f"{name} left out: no time was left")
            return None
        try:
            return work()
        except Exception as e:
            self.note(f"{name} left out: {str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__}")
            return None

    def late(self) -> bool:
        return time.perf_counter() > self._deadline

    def rate(self, work: Callable[[], int], seconds: float) -> float:
        """Steps per second of ``work``, which returns how many it made."""
        self.sync()
        done, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            done += work()
        self.sync()
        return done / (time.perf_counter() - begin)

    def sync(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize(self.device)

    def turns(self, loops: Mapping[str, tuple[dict[str, object], Any, str]]) -> None:
        """Measure training loops in turn, round after round: {name: (cells, loop, where)}."""
        for _ in range(self.sizes.rounds):
            for what, loop, where in loops.values():
                if self.late():
                    return
                each = loop.runs * loop.each

                def advance(loop: Any = loop, each: int = each) -> int:
                    loop.advance()
                    return each

                self.sample(what, self.rate(advance, self.sizes.seconds), where)

    def _tell(self, message: dict[str, object]) -> None:
        self._out.write(json.dumps(message) + "\n")


def warm_loop(b: Bench, config: dict[str, object]) -> Any:
    """A loop of SAC on HalfCheetah whose updates have begun."""
    s = b.sizes
    loop = make_sac(
        {"env": {"id": s.envs[0]}, "buffer": {"name": "uniform", "capacity": s.capacity}, **config}, s.warmup
    )
    while loop.step < s.warmup + s.extra:
        loop.advance()
    return loop


def measure_training(b: Bench, entrants: Iterable[tuple[dict[str, object], dict[str, object]]]) -> None:
    """Loops of SAC: the cells of each row, and its configuration."""
    loops = {}
    for what, config in entrants:
        name = ", ".join(f"{key} {value}" for key, value in what.items())
        device = config.get("device", b.device)
        loop = b.attempt(name, lambda config=config: warm_loop(b, {"device": b.device, **config}))
        if loop is not None:
            where = cpu() if device == "cpu" else f"{b.where}; environment: {cpu()}"
            loops[name] = (what, loop, where)
    b.turns(loops)


def training_row(**config: object) -> tuple[dict[str, object], dict[str, object]]:
    """The cells that say what ``config`` is, and ``config``."""
    on_cpu = config.get("device") == "cpu"
    what = {
        "update": f"{config.get('update_mode', 'eager')}{' (CPU)' if on_cpu else ''}",
        "precision": config.get("precision", "float32"),
        "loop": "overlap" if config.get("overlap") else "plain",
    }
    return what, config


def part_sac(b: Bench) -> None:
    entrants = [
        training_row(update_mode="eager"),
        training_row(update_mode="captured"),
        training_row(update_mode="captured", overlap=True),
        training_row(update_mode="captured", precision="bf16"),
        training_row(update_mode="captured", precision="bf16", overlap=True),
    ]
    if b.cuda:
        entrants.append(training_row(update_mode="eager", overlap=True, device="cpu"))
    measure_training(b, entrants)


def part_runs(b: Bench) -> None:
    # One thread for each four environments: the pool that steps them is as large as torch's.
    entrants = []
    most = max(r for r in b.sizes.runs if r <= 16)
    cores = os.cpu_count() or 1
    for runs in b.sizes.runs:
        threads = min(cores, max(2, runs // 4))
        modes: list[dict[str, object]] = [{"update_mode": "captured"}, {"update_mode": "captured", "overlap": True}]
        if runs == most:
            modes = [{"update_mode": "eager"}, *modes, {**modes[1], "precision": "bf16"}]
        for mode in modes:
            what, config = training_row(**mode)
            entrants.append(
                ({"runs": runs, **what, "threads": threads}, {**config, "num_runs": runs, "threads": threads})
            )
    measure_training(b, entrants)


def part_environments(b: Bench) -> None:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    for env_id in b.sizes.envs:
        for backend, counts in (("native", b.sizes.native), ("warp", b.sizes.worlds)):
            for count in counts:
                b.attempt(f"{env_id} {backend} x {count}", lambda e=env_id, k=backend, n=count: step_alone(b, e, k, n))
                gc.collect()


def step_alone(b: Bench, env_id: str, backend: str, count: int) -> None:
    """Environments behind the contract with random actions; their tensors lie on the device that would learn."""
    import torch

    from rlopt.envs import make_env

    env = make_env(env_id, count, backend=backend, device=b.device)
    try:
        env.reset()
        shape = (16, count, *env.spec.action_space.shape)
        low, high = (
            torch.as_tensor(x, device=b.device) for x in (env.spec.action_space.low, env.spec.action_space.high)
        )
        actions = low + (high - low) * torch.rand(shape, device=b.device)
        place = 0

        def step() -> int:
            nonlocal place
            env.step(actions[place % 16])
            place += 1
            return count

        for _ in range(3):  # what is compiled or allocated first
            step()
        b.rate(step, b.sizes.seconds / 4)
        where = cpu() if backend == "native" else b.where
        for _ in range(3 if b.sizes.rounds > 1 else 1):
            b.sample(
                {"environment": env_id, "backend": backend, "worlds": count}, b.rate(step, b.sizes.seconds / 2), where
            )
        if getattr(env, "restarts", 0):
            b.note(f"{env_id} {backend} x {count}: {env.restarts} worlds failed and began anew")
    finally:
        env.close()


def part_worlds(b: Bench) -> None:
    for env_id, backend in ((b.sizes.envs[0], "warp"), ("Pendulum-v1", "torch")):
        b.attempt(f"{env_id} {backend}", lambda e=env_id, k=backend: train_worlds(b, e, k))
        gc.collect()


def train_worlds(b: Bench, env_id: str, backend: str) -> None:
    """SAC from its first step on, with some updates per vector step."""
    import torch

    s = b.sizes
    if b.cuda:
        torch.cuda.reset_peak_memory_stats()
    agent = {"batch_size": s.train_batch, "update_ratio": (s.train_updates, s.train_worlds)}
    loop = make_sac(
        {
            "env": {"id": env_id, "backend": backend}, "num_envs": s.train_worlds, "device": b.device, "agent": agent,
            "buffer": {"name": "uniform", "capacity": max(s.capacity, 4 * s.train_worlds)}, "update_mode": "auto",
        },
        10 * s.train_worlds,
    )  # fmt: skip
    returns: list[float] = []
    updates = 0

    def advance() -> int:
        nonlocal updates
        progress = loop.advance()
        returns.extend(e.total_reward for e in progress.episodes)
        updates += progress.updates
        return s.train_worlds

    try:
        while updates == 0:
            advance()
        what = {"environment": env_id, "backend": backend, "worlds": s.train_worlds}
        settings = {"batch": s.train_batch, "updates per vector step": s.train_updates}
        begin, before = time.perf_counter(), updates
        for _ in range(s.train_windows):
            if b.late():
                break
            b.sample({**what, **settings}, b.rate(advance, s.train_seconds))
        spent = time.perf_counter() - begin
        told = [f"{env_id} {backend}: {loop.step:,} steps, {(updates - before) / spent:.0f} updates/s"]
        if len(returns) >= 2 * s.train_worlds:
            first, last = (statistics.fmean(x) for x in (returns[: s.train_worlds], returns[-s.train_worlds :]))
            told.append(
                f"mean return of the first {s.train_worlds} training episodes {first:.1f}, of the last {last:.1f}"
            )
        if b.cuda:
            told.append(f"peak memory of torch {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
        told.append(f"environment on {loop.env.device}, replay on {loop.buffer.device}, agent on {loop.agent.device}")
        b.note("; ".join(told))
    finally:
        loop.close()


def part_replay(b: Bench) -> None:
    import replay
    import torch

    torch.set_num_threads(1)
    s = b.sizes
    device = b.device.partition(":")[0]
    args = argparse.Namespace(device=device, rounds=s.rounds, seconds=s.seconds / 5)
    own = [c for c in replay.contenders(device) if c.library == "rlopt"]
    speeds, _, left_out = replay.measure(own, replay.Data(s.capacity, 256), args)
    for contender, by_metric in speeds.items():
        for metric, values in by_metric.items():
            for value in values:
                b.sample({"sampler": contender.sampler, "measure": metric, "capacity": s.capacity}, value)
    for line in left_out:
        b.note(line)


PARTS = {
    "sac": part_sac,
    "runs": part_runs,
    "environments": part_environments,
    "worlds": part_worlds,
    "replay": part_replay,
}


def worker(part: str, device: str, quick: bool, limit: float) -> None:
    """Measure one part; ``limit`` is how many seconds it may take."""
    from rlopt.cli.environment import prepare_environment

    prepare_environment()
    PARTS[part](Bench(device, QUICK if quick else Sizes(), limit))
