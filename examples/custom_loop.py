"""SAC in a loop of your own: an agent, a replay buffer, a Gymnasium environment, and nothing else of rlopt.

    python examples/custom_loop.py

About a minute on one core; prints the return of every tenth episode (better than -200 after some 8,000 steps).
"""

import gymnasium as gym
import torch

from rlopt.agents import SAC, SACConfig
from rlopt.buffers import ReplayBuffer


def main(steps: int = 10_000, env_id: str = "Pendulum-v1", seed: int = 0) -> list[float]:
    torch.set_num_threads(1)
    env = gym.make(env_id)
    agent = SAC(env.observation_space, env.action_space, SACConfig(warmup_steps=1_000, learning_rate=1e-3), seed=seed)
    buffer = ReplayBuffer(100_000, env.observation_space, env.action_space, seed=seed)
    returns, total = [], 0.0
    obs, _ = env.reset(seed=seed)
    for step in range(steps):
        action = agent.act(obs[None]).action[0].numpy()  # agents act on batches (N, …)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        buffer.add(obs, action, reward, next_obs, terminated, truncated)
        if step >= agent.config.warmup_steps:
            agent.update(buffer.sample(agent.config.batch_size))
        obs, total = next_obs, total + float(reward)
        if terminated or truncated:
            returns.append(total)
            if len(returns) % 10 == 0:
                print(f"step {step + 1:6d}  return {total:8.1f}")
            (obs, _), total = env.reset(), 0.0
    return returns


if __name__ == "__main__":
    main()
