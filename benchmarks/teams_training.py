"""Environment steps per second of training teams: HASAC beside HARL's, MASAC beside BenchMARL's.

    python benchmarks/teams_training.py --harl ../HARL --out results/team_training

**HASAC**: the algorithm's own code, a checkout of PKU-MARL/HARL, on MPE's spread with continuous actions and on
MaMuJoCo's HalfCheetah 2x3, with the settings of ``experiment=hasac_mpe_spread_continuous`` and
``hasac_halfcheetah_2x3``, which are HARL's tuned ones (20 environments, minibatches of 1000, networks of 2 x 256, one
update per 20 steps). Of HARL its runner, agents, critics, buffer and in-process vector of environments are run as they
are; what it needs and today's packages lack (gym 0.21, PettingZoo 1.22) is replaced by an adapter to the same tasks of
mpe2 and gymnasium-robotics. **MASAC**: BenchMARL, where it is installed (1.5.2 needs torchrl 0.11.1), on VMAS's balance
with 10 environments, minibatches of 128, networks of 2 x 256 and its own ratio of one update per six steps.

Every entrant runs with 1 and with 2 threads, in a process of its own that waits while the others run; all take short
turns, round after round. Medians over the rounds are quoted, and ratios are between each entrant's best thread setting.
HARL and BenchMARL collect for a while and then update in a burst: a turn of theirs ends behind a burst. A peer that
is not there is left out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import tempfile
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import BLUE, GREY, Entrant, Report, best, cpu, measure, publish, spread, verdict
from windows import Windows, channel

HASAC = {
    "mpe/spread-continuous": {"lr": 5e-4, "n_step": 20},
    "mamujoco/HalfCheetah-2x3-full": {"lr": 1e-3, "n_step": 10},
}
"""Tasks and what their settings differ in."""
ENVS, BATCH, EVERY, HIDDEN, WARMUP, CAPACITY = 20, 1_000, 20, [256, 256], 2_000, 100_000
MASAC_TASK, MASAC_ENVS, MASAC_BATCH, MASAC_EVERY, BURST = "vmas/balance", 10, 128, 6, 600
"""``BURST`` are BenchMARL's steps between two bursts of updates; a tenth of its default, so that turns are short."""
PACKAGES = ("rlopt", "torch", "numpy", "mpe2", "gymnasium-robotics", "mujoco", "benchmarl", "torchrl", "vmas")
RLOPT, HARL, BENCHMARL = "rlopt", "HARL", "BenchMARL"


def entrants(task: str, threads: Sequence[int], harl: Path | None) -> list[Entrant]:
    found = []
    for count in threads:
        setting = f"{count} thread{'s' if count > 1 else ''}"
        found.append(Entrant(RLOPT, setting, "rlopt", count, {}))
        if task == MASAC_TASK:
            if importlib.util.find_spec("benchmarl"):
                found.append(Entrant(BENCHMARL, setting, "benchmarl", count, {}))
        elif harl is not None:
            found.append(Entrant(HARL, setting, "harl", count, {"checkout": str(harl.resolve())}))
    return found


# The worker's side


def serve(spec: Mapping[str, Any]) -> None:
    """Windows of one library's training, from its first update on."""
    out = channel()
    import torch

    torch.set_num_threads(int(spec["threads"]))
    windows: list[Windows] = []

    def behind(steps: int) -> bool:
        """Count ``steps`` that are made and learnt from; false once no further window is wanted."""
        if not windows:
            windows.append(Windows(out))
            return True
        return windows[0].tick(steps)

    {"rlopt": _rlopt, "harl": _harl, "benchmarl": _benchmarl}[spec["library"]](spec, behind)


def _rlopt(spec: Mapping[str, Any], behind: Callable[[int], bool]) -> None:
    from rlopt.training import train_config
    from rlopt.training.setup import make_loop, resolve_config

    task = spec["env"]
    common = {"warmup_steps": WARMUP, "network": {"hidden": HIDDEN}}
    if task == MASAC_TASK:
        agent = {"name": "masac", "batch_size": MASAC_BATCH, "update_ratio": [1, MASAC_EVERY], **common}
    else:
        own = HASAC[task]
        agent = {
            "name": "hasac", "learning_rate": own["lr"], "actor_learning_rate": own["lr"], "n_step": own["n_step"],
            "temperature_learning_rate": 3e-4, "batch_size": BATCH, "update_ratio": [1, EVERY], **common,
        }  # fmt: skip
    config = {
        "env": {"id": task}, "num_envs": MASAC_ENVS if task == MASAC_TASK else ENVS, "agent": agent,
        "buffer": {"capacity": CAPACITY}, "total_steps": 10**9, "device": "cpu", "threads": spec["threads"],
    }  # fmt: skip
    loop = make_loop(resolve_config(train_config(config)))
    while loop.step < WARMUP + 50 * loop.each:
        loop.advance()
    made = loop.step
    while behind(loop.step - made):
        made = loop.step
        loop.advance()
    loop.close()


def _harl(spec: Mapping[str, Any], behind: Callable[[int], bool]) -> None:
    """HARL's runner; ``harl.envs`` is replaced by a package that has its vector of environments and nothing else."""
    import yaml

    checkout = Path(spec["config"]["checkout"])
    sys.path.insert(0, str(checkout))
    envs = types.ModuleType("harl.envs")
    envs.__path__ = [str(checkout / "harl" / "envs")]
    envs.LOGGER_REGISTRY = {}  # type: ignore[attr-defined]
    sys.modules["harl.envs"] = envs
    if importlib.util.find_spec("setproctitle") is None:
        sys.modules["setproctitle"] = types.ModuleType("setproctitle")
        sys.modules["setproctitle"].setproctitle = lambda _: None  # type: ignore[attr-defined]
    base = importlib.import_module("harl.runners.off_policy_base_runner")
    runner_class = importlib.import_module("harl.runners.off_policy_ha_runner").OffPolicyHARunner
    vector = importlib.import_module("harl.envs.env_wrappers").ShareDummyVecEnv
    task, own = spec["env"], HASAC[spec["env"]]
    base.make_train_env = lambda name, seed, n, args: vector([lambda i=i: HarlEnv(task, i) for i in range(n)])
    base.get_num_agents = lambda name, args, envs: envs.n_agents
    base.get_task_name = lambda name, args: name
    folder = tempfile.mkdtemp()
    base.init_dir = lambda *args, **kwargs: (folder, folder, folder, None)
    base.save_config = lambda *args: None

    class Timed(runner_class):  # type: ignore[misc, valid-type]
        bursts = 0

        def train(self) -> None:
            super().train()
            # train_interval updates behind as many steps of the vector
            if self.total_it % self.algo_args["train"]["train_interval"] == 0:
                self.bursts += 1
                if self.bursts > 1 and not behind(self.algo_args["train"]["train_interval"] * ENVS):
                    raise SystemExit

        def save(self) -> None: ...

    settings = yaml.safe_load((checkout / "harl" / "configs" / "algos_cfgs" / "hasac.yaml").read_text("utf-8"))
    settings["device"] |= {"cuda": False, "torch_threads": int(spec["threads"])}
    settings["train"] |= {"n_rollout_threads": ENVS, "warmup_steps": WARMUP, "use_valuenorm": False}
    settings["train"] |= {"num_env_steps": 10**9, "eval_interval": 10**9, "train_interval": EVERY}
    settings["eval"] |= {"use_eval": False}
    settings["model"] |= {"hidden_sizes": HIDDEN, "lr": own["lr"], "critic_lr": own["lr"]}
    settings["algo"] |= {"auto_alpha": True, "batch_size": BATCH, "n_step": own["n_step"], "buffer_size": CAPACITY}
    Timed({"algo": "hasac", "env": "task", "exp_name": "speed"}, settings, {"state_type": "EP"}).run()


class HarlEnv:
    """A task as HARL's environments show themselves: on MaMuJoCo every agent sees the whole state and its own number,
    z-scored as the critic's state is."""

    def __init__(self, task: str, seed: int) -> None:
        kind, _, name = task.partition("/")
        self.whole = kind == "mamujoco"
        if kind == "mpe":
            module = importlib.import_module(f"mpe2.simple_{name.removesuffix('-continuous')}_v3")
            self.env, self.limit = module.parallel_env(max_cycles=26, continuous_actions=True), 25
        else:
            scenario, partition, *_ = name.split("-")
            made = importlib.import_module("gymnasium_robotics").mamujoco_v1.parallel_env
            # ``agent_obsk=None``, HARL's word for its view, would be one agent that moves everything.
            self.env, self.limit = made(scenario, partition, agent_obsk=0), 1000
        self.agents, self._seed, self.made = list(self.env.possible_agents), seed, 0
        self.n_agents = len(self.agents)
        self.action_space = [self.env.action_space(agent) for agent in self.agents]
        obs, _ = self.env.reset(seed=seed)
        seen, state = self._seen(obs)
        box = importlib.import_module("gymnasium").spaces.Box
        self.observation_space = [box(-1e9, 1e9, own.shape) for own in seen]
        self.share_observation_space = [box(-1e9, 1e9, one.shape) for one in state]

    def _seen(self, obs: Any) -> tuple[list[Any], list[Any]]:
        state = self.env.state()
        if not self.whole:
            return [obs[agent] for agent in self.agents], [state] * self.n_agents
        own = [np.concatenate((state, one)) for one in np.eye(self.n_agents)]
        return [_score(one) for one in own], [_score(state)] * self.n_agents

    def reset(self) -> tuple[Any, ...]:
        self._seed, self.made = self._seed + ENVS, 0
        obs, _ = self.env.reset(seed=self._seed)
        return (*self._seen(obs), None)

    def step(self, actions: Any) -> tuple[Any, ...]:
        obs, reward, terminated, truncated, _ = self.env.step(dict(zip(self.agents, actions, strict=True)))
        self.made += 1
        ended = any(terminated.values())
        cut = not ended and (self.made == self.limit or any(truncated.values()))
        total = sum(map(float, reward.values())) if self.limit == 25 else float(next(iter(reward.values())))
        return (
            *self._seen(obs), [[total]] * self.n_agents,
            [ended or cut] * self.n_agents, [{"bad_transition": True} if cut else {} for _ in self.agents], None,
        )  # fmt: skip

    def close(self) -> None:
        self.env.close()


def _score(x: Any) -> Any:
    return (x - x.mean()) / x.std()


def _benchmarl(spec: Mapping[str, Any], behind: Callable[[int], bool]) -> None:
    from benchmarl.algorithms import MasacConfig
    from benchmarl.environments import VmasTask
    from benchmarl.experiment import Callback, Experiment, ExperimentConfig
    from benchmarl.models.mlp import MlpConfig
    from torch import nn

    class Clock(Callback):  # type: ignore[misc]
        bursts = 0

        def on_train_end(self, training_td: Any, group: str) -> None:
            self.bursts += 1
            if self.bursts > 1 and not behind(BURST):
                raise SystemExit

    # BenchMARL pickles its callbacks.
    Clock.__qualname__ = "Clock"
    globals()["Clock"] = Clock
    config = ExperimentConfig.get_from_yaml()
    config.sampling_device = config.train_device = config.buffer_device = "cpu"
    config.off_policy_collected_frames_per_batch, config.off_policy_n_envs_per_worker = BURST, MASAC_ENVS
    config.off_policy_n_optimizer_steps, config.off_policy_train_batch_size = BURST // MASAC_EVERY, MASAC_BATCH
    config.off_policy_memory_size, config.off_policy_init_random_frames = CAPACITY, WARMUP
    config.max_n_frames, config.evaluation, config.loggers, config.create_json = 10**9, False, [], False
    config.save_folder = tempfile.mkdtemp()
    network = MlpConfig(num_cells=HIDDEN, activation_class=nn.ReLU, layer_class=nn.Linear)
    Experiment(
        task=VmasTask[MASAC_TASK.partition("/")[2].upper()].get_from_yaml(),
        algorithm_config=MasacConfig.get_from_yaml(), model_config=network, critic_model_config=network,
        seed=0, config=config, callbacks=[Clock()],
    ).run()  # fmt: skip


# The report


def judge(task: str, speeds: Mapping[Entrant, Sequence[float]]) -> tuple[list[list[str]], list[str]]:
    """Rows of the table, and the ratio."""
    agent = "MASAC" if task == MASAC_TASK else "HASAC"
    rows = [[f"{agent}, {task}", e.name, e.setting, *spread(values)] for e, values in speeds.items()]
    tops = best(speeds)
    peers = [name for name in tops if name != RLOPT]
    notes = [
        verdict(
            f"{agent}, {task}: {RLOPT} ({tops[RLOPT][1]}) / {peer} ({tops[peer][1]})", tops[RLOPT][0] / tops[peer][0]
        )
        for peer in peers
    ]
    return rows, notes


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="tasks whose names begin so")
    parser.add_argument("--harl", type=Path, help="a checkout of PKU-MARL/HARL")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each entrant")
    parser.add_argument("--seconds", type=float, default=2.0, help="least length of a turn")
    parser.add_argument("--quick", action="store_true", help="one short turn with one thread: to try the script out")
    parser.add_argument("--out", type=Path, help="folder for table.csv, README.md and chart.png")
    args = parser.parse_args(arguments)
    if args.quick:
        args.rounds, args.seconds = 1, 0.1
    rows: list[list[str]] = []
    notes: list[str] = []
    remarks: list[str] = []
    bars: dict[str, float] = {}
    for task in (*HASAC, MASAC_TASK):
        if args.only and not task.startswith(args.only):
            continue
        chosen = entrants(task, (1,) if args.quick else (1, 2), args.harl)
        settings = {"env": task, "algorithm": "teams_training"}
        speeds, told, parked = measure(chosen, settings, args.rounds, args.seconds)
        for p in parked:
            p.close()
        found, said = judge(task, speeds)
        rows, notes, remarks = rows + found, notes + said, remarks + [f"{task}: {line}" for line in told]
        bars |= {f"{task}: {name}": speed for name, (speed, _) in best(speeds).items()}
    made = Report(["task", "entrant", "setting", "steps/s (median)", "min", "max"], rows, [*notes, *remarks])
    print("\n" + made.text)
    if args.out:
        about = (
            f"Environment steps per second of training (one step is one of the whole team), on a {cpu()}. Same "
            f"minibatches, networks and updates per step. Medians over {args.rounds} turns of at least "
            f"{args.seconds:g} s."
        )
        command = (
            f"python benchmarks/teams_training.py --harl CHECKOUT --rounds {args.rounds} --seconds {args.seconds:g}"
        )
        publish(
            args.out, "Training of teams", about, f"{command} --out {args.out}", PACKAGES, made, bars,
            "environment steps per second (best thread setting)", lambda name: BLUE if RLOPT in name else GREY,
        )  # fmt: skip


if __name__ == "__main__":
    main()
