"""Discrete SAC in a loop of your own over a Gymnasium vector environment.

    python examples/custom_vector_loop.py

About a minute on one core; prints the mean length of the last episodes (500 is the most).
"""

import gymnasium as gym
import torch

from rlopt.agents import DiscreteSAC, DiscreteSACConfig
from rlopt.buffers import ReplayBuffer
from rlopt.envs import VectorAdapter


def main(steps: int = 4_000, env_id: str = "CartPole-v1", envs: int = 4, seed: int = 0) -> list[int]:
    torch.set_num_threads(1)
    # gym.make_vec resets an ended episode in the next call of step (NEXT_STEP): that row is no transition, which the
    # adapter says in step.valid. Of a vector in SAME_STEP mode it finds the true last observations.
    env = VectorAdapter(gym.make_vec(env_id, envs), seed=seed)
    config = DiscreteSACConfig(warmup_steps=1_000, learning_rate=1e-3)
    agent = DiscreteSAC(env.spec, config, seed=seed)
    space, actions = env.spec.observation_space, env.spec.action_space
    buffer = ReplayBuffer(100_000, space, actions, num_envs=envs, seed=seed)
    lengths, length = [], torch.zeros(envs, dtype=torch.int64)
    obs = env.reset()
    for i in range(steps):
        action = agent.act(obs).action
        s = env.step(action)
        buffer.add(obs, action, s.reward, s.next_obs, s.terminated, s.truncated, s.ended, s.valid)
        if i * envs >= config.warmup_steps:
            agent.update(buffer.sample(config.batch_size))
        obs, length = s.obs, length + s.valid
        lengths += length[s.ended].tolist()
        length[s.ended] = 0
        if (i + 1) % 500 == 0:
            print(f"step {(i + 1) * envs:6d}  mean length {sum(lengths[-10:]) / max(1, len(lengths[-10:])):6.1f}")
    return lengths


if __name__ == "__main__":
    main()
