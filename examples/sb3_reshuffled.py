"""Stable-Baselines3's SAC on Pendulum with random reshuffling: one line more than without. Under a minute.

pip install -c constraints.txt -e ".[sb3]"
"""

from __future__ import annotations

import argparse

from stable_baselines3 import SAC
from stable_baselines3.common.evaluation import evaluate_policy

from rlopt.buffers.interop.sb3 import ReshuffledReplayBuffer


def main(steps: int = 6_000) -> float:
    model = SAC(
        "MlpPolicy",
        "Pendulum-v1",
        replay_buffer_class=ReshuffledReplayBuffer,  # the one line
        policy_kwargs={"net_arch": [64, 64]},
        learning_rate=1e-3,
        seed=0,
        device="cpu",
    )
    model.learn(steps)
    mean, deviation = evaluate_policy(model, model.get_env(), n_eval_episodes=20)
    print(f"mean return {mean:.1f} ± {deviation:.1f} over 20 episodes after {steps} steps")
    return float(mean)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6_000)
    main(parser.parse_args().steps)
