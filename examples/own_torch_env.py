"""An environment of one's own in torch: all copies are one batch of tensors, on the CPU or on the GPU.

    python train.py agent=sac env=examples.own_torch_env:Chase num_envs=256 total_steps=100_000 \
        'agent.update_ratio=[1,64]'

Run by itself it plays 4096 episodes at once with a rule of thumb and prints their mean return (about -25).
"""

import numpy as np
import torch
from gymnasium import spaces

from rlopt.envs import TorchEnv


class Chase(TorchEnv):
    """A point mass in a plane chases a target that wanders; an episode ends early where it leaves the plane.

    Every function is of all N rows at once, and none looks into a tensor: ``torch.where`` chooses.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (6,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    episode_limit = 100
    defaults = {"mass": 1.0, "drag": 0.5, "wander": 0.05}  # set_parameters changes them, for all rows or for each

    def initial(self, streams):
        place = streams.uniform(-1.0, 1.0, 4)  # (N, 4): the point and the target
        return torch.cat((place, torch.zeros_like(place[:, :2])), 1)  # and the point's velocity

    def dynamics(self, state, action):
        place, target, velocity = state.split(2, 1)
        mass, drag, wander = (self.parameters[name][:, None] for name in self.defaults)  # (N, 1) each
        push = action.clamp(-1.0, 1.0) - drag * velocity
        velocity = velocity + 0.1 * push / mass
        place = place + 0.1 * velocity
        target = (target + wander * self.streams.normal(2)).clamp(-1.0, 1.0)
        out = (place.abs() > 2.0).any(1)
        reward = -(place - target).norm(dim=1) - 10.0 * out
        return torch.cat((place, target, velocity), 1), reward, out  # the next state, reward, terminated

    def observe(self, state):
        return state


def main(num_envs: int = 4096) -> float:
    env = Chase(num_envs, seed=1, device="cuda" if torch.cuda.is_available() else "cpu", autoreset=False)
    obs, total = env.reset(), 0.0
    for _ in range(100):
        place, target, velocity = obs.split(2, 1)
        step = env.step((2.0 * (target - place) - velocity).clamp(-1.0, 1.0))
        obs, total = step.obs, total + step.reward
    print(f"mean return of {num_envs} episodes on {env.device}: {total.mean():.2f}")
    return float(total.mean())


if __name__ == "__main__":
    main()
