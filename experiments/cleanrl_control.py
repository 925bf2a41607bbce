"""CleanRL's own PPO script, with its own settings, as a run folder of ours: a control for learning curves.

    git clone https://github.com/vwxyzjn/cleanrl ../cleanrl
    python experiments/cleanrl_control.py cleanrl=../cleanrl experiment=Hopper-v4 seed=0 total_steps=501760 run_dir=DIR

or all of ``experiments/jobs/cleanrl.yaml`` by ``rlopt queue`` with ``--script experiments/cleanrl_control.py``.

Runs ``cleanrl/ppo_continuous_action.py`` of the checkout word for word, on one thread, with the schedule of 1M steps
that is its default. The script was written for gymnasium 0.29.1, so what it imports under that name is patched, and
nothing else is:

- ``SyncVectorEnv`` begins a new episode in the step that ended one (today's default is the step after), and its
  ``final_info`` is a list with an entry per environment;
- ``TransformObservation`` may leave the observation space out;
- two wrappers have their old names.

(Today's gymnasium also keeps statistics of observations in float32 instead of float64.)

``tyro`` is replaced by the script's defaults, and TensorBoard's writer by one that fills our tables: ``episodes.csv``
(training returns, as the script reports them) and ``evaluations.csv`` (every 20,000 steps 10 episodes of the mean
action, with the script's statistics as they stand, which are frozen meanwhile). Nothing of CleanRL is part of rlopt.
"""

from __future__ import annotations

import csv
import json
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
import yaml
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import NormalizeObservation

from rlopt.runs.run_folder import versions

SCRIPT = Path("cleanrl") / "ppo_continuous_action.py"
EVERY, EPISODES, SCHEDULE = 20_000, 10, 1_000_000


class SameStep(gymnasium.vector.SyncVectorEnv):
    """Resets as gymnasium 0.29 did."""

    def __init__(self, env_fns: Sequence[Callable[[], gymnasium.Env[Any, Any]]]) -> None:
        super().__init__(env_fns, autoreset_mode=AutoresetMode.SAME_STEP)

    def step(self, actions: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(actions)
        if (final := info.get("final_info")) is not None:
            # An end that is only a lost life tells no episode.
            told, over = final.get("episode"), final.get("_episode", ())
            info["final_info"] = [
                {"episode": {key: [told[key][i]] for key in ("r", "l")}} if ended else None
                for i, ended in enumerate(over)
            ]
        return obs, reward, terminated, truncated, info


def old_gymnasium() -> types.ModuleType:
    """Return gymnasium with the patches, as a module that ``import gymnasium as gym`` finds."""

    def transform_observation(env: Any, func: Any, observation_space: Any = None) -> Any:
        space = env.observation_space if observation_space is None else observation_space
        return gymnasium.wrappers.TransformObservation(env, func, space)

    patched, wrappers, vector = (types.ModuleType(name) for name in ("gymnasium", "wrappers", "vector"))
    for module, original in ((patched, gymnasium), (wrappers, gymnasium.wrappers), (vector, gymnasium.vector)):
        module.__dict__.update(original.__dict__)
    wrappers.TransformObservation = transform_observation  # type: ignore[attr-defined]
    wrappers.GrayScaleObservation = gymnasium.wrappers.GrayscaleObservation  # type: ignore[attr-defined]
    wrappers.FrameStack = gymnasium.wrappers.FrameStackObservation  # type: ignore[attr-defined]
    vector.SyncVectorEnv = SameStep  # type: ignore[attr-defined]
    patched.wrappers, patched.vector = wrappers, vector  # type: ignore[attr-defined]
    return patched


Report = Callable[[str, float, int, dict[str, Any]], None]


def run_script(checkout: Path, options: dict[str, Any], report: Report, script: Path = SCRIPT) -> None:
    """Run a script of a checkout with these values in place of its ``Args``' defaults.

    ``report(tag, value, step, variables)`` is called with every scalar that it logs, and with its variables.

    Raises:
        OSError: there is no such script.
    """
    path = checkout / script
    code = compile(path.read_text(encoding="utf-8"), str(path), "exec")
    names: dict[str, Any] = {"__name__": "__main__", "__file__": str(path)}

    class Writer:
        def __init__(self, log_dir: str) -> None:
            pass

        def add_scalar(self, tag: str, value: Any, step: int) -> None:
            report(tag, float(torch.as_tensor(value).detach().squeeze()), step, names)

        def add_text(self, tag: str, text: str) -> None:
            pass

        def close(self) -> None:
            pass

    tyro, board = types.ModuleType("tyro"), types.ModuleType("torch.utils.tensorboard")
    tyro.cli = lambda cls: cls(**options)  # type: ignore[attr-defined]
    board.SummaryWriter = Writer  # type: ignore[attr-defined]
    replaced = {"gymnasium": old_gymnasium(), "tyro": tyro, "torch.utils.tensorboard": board}
    # A dataclass looks its module up by name.
    replaced["__main__"] = types.ModuleType("__main__")
    replaced["__main__"].__dict__.update(names)
    before = {name: sys.modules.get(name) for name in replaced}
    sys.modules.update(replaced)
    sys.path.insert(0, str(checkout.resolve()))
    try:
        exec(code, names)
    finally:
        sys.path.remove(str(checkout.resolve()))
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class Done(Exception):
    """As many steps were made as were asked for."""


class Tables:
    """Writes the run folder while the script goes on."""

    def __init__(self, env_id: str, seed: int, steps: int, folder: Path) -> None:
        self.env_id, self.seed, self.steps, self.folder = env_id, seed, steps, folder
        self.next, self.total = EVERY, 0.0
        folder.mkdir(parents=True)
        settings = {
            "seed": seed, "total_steps": steps, "num_envs": 1, "agent": {"name": "ppo", "library": "cleanrl"},
            "env": {"id": env_id}, "buffer": {"name": "uniform"}, "eval": {"every": EVERY, "episodes": EPISODES},
        }  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        (folder / "versions.json").write_text(json.dumps(versions()), encoding="utf-8")
        self.write("episodes.csv", [["step", "return", "length"]])
        self.write("evaluations.csv", [["step", "episode", "return", "length"]])

    def write(self, name: str, rows: list[list[Any]]) -> None:
        with (self.folder / name).open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)

    def report(self, tag: str, value: float, step: int, names: dict[str, Any]) -> None:
        if tag == "charts/episodic_return":
            self.total = value
        elif tag == "charts/episodic_length":
            self.write("episodes.csv", [[step, self.total, int(value)]])
        elif tag == "charts/SPS":  # the last thing that an iteration logs
            over = step >= self.steps
            if step >= self.next or over:
                self.next = (step // EVERY + 1) * EVERY
                found = [self.episode(names, 1_000_000 + 1_000 * self.seed + e) for e in range(EPISODES)]
                self.write("evaluations.csv", [[step, e, *pair] for e, pair in enumerate(found)])
                print(f"step={step} evaluated={np.mean([pair[0] for pair in found]):.1f} sps={value:.0f}", flush=True)
            if over:
                raise Done

    def episode(self, names: dict[str, Any], seed: int) -> tuple[float, int]:
        """Return return and length of an episode of the mean action; draws from no global generator."""
        wrapper = names["envs"].envs[0]
        while not isinstance(wrapper, NormalizeObservation):
            wrapper = wrapper.env
        moments, spread = wrapper.obs_rms, np.sqrt(wrapper.obs_rms.var + wrapper.epsilon)
        env, total, length, over = gymnasium.make(self.env_id), 0.0, 0, False
        box: Any = env.action_space
        obs, _ = env.reset(seed=seed)
        while not over:
            seen = torch.as_tensor(np.clip((obs - moments.mean) / spread, -10, 10), dtype=torch.float32)
            with torch.no_grad():
                action = names["agent"].actor_mean(seen).numpy()
            obs, reward, terminated, truncated, _ = env.step(np.clip(action, box.low, box.high))
            total, length, over = total + float(reward), length + 1, terminated or truncated
        env.close()
        return total, length


def main(words: Sequence[str]) -> None:
    """``words`` are those of ``rlopt queue``; what was begun is begun anew, as the script cannot resume."""
    given = dict(word.split("=", 1) for word in words)
    if "resume" in given:
        raise SystemExit(f"CleanRL's script cannot resume; remove {given['resume']} and start again")
    torch.set_num_threads(1)
    steps, seed = int(given["total_steps"]), int(given.get("seed", 0))
    tables = Tables(given["experiment"], seed, steps, Path(given["run_dir"]))
    options = {"env_id": tables.env_id, "seed": seed, "total_timesteps": max(SCHEDULE, steps), "cuda": False}
    try:
        run_script(Path(given["cleanrl"]), options, tables.report)
    except Done:
        (tables.folder / "policy").mkdir()  # by which the queue knows a finished run


if __name__ == "__main__":
    main(sys.argv[1:])
