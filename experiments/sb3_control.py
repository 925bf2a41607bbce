"""Stable-Baselines3's SAC with the settings of our MuJoCo presets, evaluated alike: a control for learning curves.

    python experiments/sb3_control.py HalfCheetah-v4 --seed 0 --steps 100000 --out control.csv
    python experiments/sb3_control.py Hopper-v4 --learning-rate 1e-3 --temperature 0.2 --out control.csv

Every 5,000 steps 10 episodes of the deterministic policy; rows are appended to the table as they come.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import gymnasium
import numpy as np
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback

EVERY, EPISODES = 5_000, 10
HEAD = ["env", "learning_rate", "temperature", "seed", "step", "episodes", "return"]


class EvaluateEvery(BaseCallback):
    """Appends a row to the table at every evaluation."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.args, self.env = args, gymnasium.make(args.env)

    def _on_step(self) -> bool:
        if self.num_timesteps % EVERY == 0:
            a, step = self.args, self.num_timesteps
            first = 100_000 + 1_000 * a.seed + step // EVERY * EPISODES
            mean = float(np.mean([self.episode(first + e) for e in range(EPISODES)]))
            row = [a.env, a.learning_rate, a.temperature or "learned", a.seed, step, EPISODES, f"{mean:.2f}"]
            new = not a.out.exists()
            with a.out.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows([HEAD, row] if new else [row])
            print(*row, flush=True)
        return True

    def episode(self, seed: int) -> float:
        obs, _ = self.env.reset(seed=seed)
        total, over = 0.0, False
        while not over:
            obs, reward, terminated, truncated, _ = self.env.step(self.model.predict(obs, deterministic=True)[0])
            total, over = total + float(reward), terminated or truncated
        return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("env")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--temperature", type=float, help="a fixed one (default: learned)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = SAC(
        "MlpPolicy", args.env, learning_rate=args.learning_rate, ent_coef=args.temperature or "auto", batch_size=256,
        learning_starts=10_000, buffer_size=1_000_000, policy_kwargs={"net_arch": [256, 256]},
        seed=args.seed, device="cpu",
    )  # fmt: skip
    model.learn(args.steps, callback=EvaluateEvery(args))


if __name__ == "__main__":
    main()
