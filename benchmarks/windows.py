"""The processes that ``harness.py`` times: each builds and warms its library up, then works in the windows it is given.

This file is also their program: its argument says in JSON which library is served, and how.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


def channel() -> TextIO:
    """The worker's own way to its parent; whatever libraries print goes to the standard error from now on."""
    mine = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return mine


class Windows:
    """Call ``tick`` after every piece of work: it measures while a window lasts, and between windows waits."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._out.write("ready\n")
        self._wait()

    def tick(self, steps: int = 1) -> bool:
        """Count ``steps``; false once no further window is wanted."""
        self._steps += steps
        spent = time.perf_counter() - self._begin
        if spent < self._seconds:
            return True
        self._out.write(f"{self._steps / spent}\n")
        return self._wait()

    def _wait(self) -> bool:
        line = sys.stdin.readline()
        self._seconds = float(line or 0)
        self._steps, self._begin = 0, time.perf_counter()
        return bool(line)


def make_sac(config: Mapping[str, Any], warmup: int) -> Any:
    """rlopt's loop for SAC with ``config`` on top of the benchmark's settings."""
    from rlopt.training import train_config
    from rlopt.training.setup import make_loop, resolve_config

    agent = {"name": "sac", "warmup_steps": warmup, **config.get("agent", {})}
    return make_loop(resolve_config(train_config({"total_steps": 10**9, **config, "agent": agent})))


def serve_rlopt(config: Mapping[str, Any], warmup: int, extra: int) -> None:
    """Windows of rlopt's loop; its speed is in steps of all runs together."""
    out = channel()
    loop = make_sac(config, warmup)
    while loop.step < warmup + extra:
        loop.advance()
    windows = Windows(out)
    while windows.tick(loop.runs * loop.each):
        loop.advance()
    loop.close()


def serve_sb3(module: str, threads: int, env_id: str, seed: int, warmup: int, extra: int) -> None:
    """Windows of ``stable_baselines3``'s SAC, or of ``sbx``'s, which has the same interface."""
    import torch

    out = channel()
    torch.set_num_threads(threads)
    library = importlib.import_module(module)
    from stable_baselines3.common.callbacks import BaseCallback

    class Clock(BaseCallback):
        windows: Windows | None = None

        def _on_step(self) -> bool:
            if self.n_calls < warmup + extra:
                return True
            if self.windows is None:
                self.windows = Windows(out)
            return self.windows.tick()

    model = library.SAC(
        "MlpPolicy", env_id, learning_starts=warmup, batch_size=256, train_freq=1, gradient_steps=1, seed=seed,
        policy_kwargs={"net_arch": [256, 256]}, **({"device": "cpu"} if module == "stable_baselines3" else {}),
    )  # fmt: skip
    model.learn(10**9, callback=Clock())


def serve_rlopt_ppo(config: Mapping[str, Any]) -> None:
    """Windows of rlopt's PPO, of whole rollouts with their updates."""
    from rlopt.training import train_config
    from rlopt.training.setup import make_loop, resolve_config

    out = channel()
    loop = make_loop(resolve_config(train_config({"total_steps": 10**9, **config})))

    def rollout() -> int:
        begin = loop.step
        while not loop.advance().updates:
            pass
        return int(loop.step - begin)

    rollout()
    windows = Windows(out)
    while windows.tick(rollout()):
        pass
    loop.close()


def serve_sb3_ppo(threads: int, env_id: str, seed: int, options: Mapping[str, Any]) -> None:
    """Windows of Stable-Baselines3's PPO with the same ``rollout_steps``, ``batch_size``, ``epochs`` and
    ``num_envs``."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    out = channel()
    torch.set_num_threads(threads)
    steps, envs = options["rollout_steps"], options["num_envs"]

    class Clock(BaseCallback):
        rollouts, wanted = 0, True
        windows: Windows | None = None

        def _on_rollout_start(self) -> None:  # behind the update from the rollout before
            self.rollouts += 1
            if self.windows is not None:
                self.wanted = self.windows.tick(steps * envs)
            elif self.rollouts == 2:
                self.windows = Windows(out)

        def _on_step(self) -> bool:
            return self.wanted

    model = PPO(
        "MlpPolicy", make_vec_env(env_id, envs, seed=seed), n_steps=steps, batch_size=options["batch_size"],
        n_epochs=options["epochs"], device="cpu", seed=seed,
    )  # fmt: skip
    model.learn(10**9, callback=Clock())


def serve_cleanrl_ppo(threads: int, env_id: str, seed: int, options: Mapping[str, Any]) -> None:
    """Windows of the PPO script of a ``checkout`` of CleanRL, with the sizes of ``serve_sb3_ppo``."""
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
    from cleanrl_control import Done, run_script

    out = channel()
    torch.set_num_threads(threads)
    steps, envs = options["rollout_steps"], options["num_envs"]
    windows: list[Windows] = []

    def report(tag: str, *_: Any) -> None:
        if tag == "charts/SPS":  # behind the update from a rollout
            if not windows:
                windows.append(Windows(out))
            elif not windows[0].tick(steps * envs):
                raise Done

    own = {
        "env_id": env_id, "seed": seed, "num_envs": envs, "num_steps": steps, "update_epochs": options["epochs"],
        "num_minibatches": steps * envs // options["batch_size"], "total_timesteps": 10**9, "cuda": False,
    }  # fmt: skip
    with contextlib.suppress(Done):
        run_script(Path(options["checkout"]), own, report)


def worker(spec: Mapping[str, Any]) -> None:
    """One process of an entrant."""
    import warnings

    warnings.simplefilter("ignore")
    env_id, warmup, extra = spec["env"], int(spec.get("warmup", 0)), int(spec.get("extra", 0))
    config = {"env": {"id": env_id}, "device": "cpu", "threads": spec["threads"], "seed": spec["number"]}
    if spec.get("algorithm") == "teams":
        from teams import serve

        serve(spec)
    elif spec.get("algorithm") == "teams_training":
        from teams_training import serve as serve_training

        serve_training(spec)
    elif spec.get("algorithm") == "games":
        from atari import serve as serve_games

        serve_games(spec)
    elif spec.get("algorithm") == "dqn":
        from atari import serve_dqn

        serve_dqn(spec)
    elif spec["library"] == "rlopt" and spec.get("algorithm") == "ppo":
        own = spec["config"]
        serve_rlopt_ppo({**config, **own, "env": {**config["env"], **own.get("env", {})}})
    elif spec["library"] == "rlopt":
        serve_rlopt({**config, **spec["config"]}, warmup, extra)
    elif spec["library"] == "cleanrl":
        serve_cleanrl_ppo(int(spec["threads"]), env_id, int(spec["number"]), spec["config"])
    elif spec.get("algorithm") == "ppo":
        serve_sb3_ppo(int(spec["threads"]), env_id, int(spec["number"]), spec["config"])
    else:
        serve_sb3(spec["library"], int(spec["threads"]), env_id, int(spec["number"]), warmup, extra)


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
