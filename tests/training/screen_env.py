"""A small image environment that can be saved."""

import gymnasium as gym
import numpy as np


class Screen(gym.Env):
    """A dot that the action moves over an image (8, 8) of noise; an episode ends at the edge, or after 30 steps."""

    # The wrapper that stacks frames copies the space's generator, which would else begin with the system's entropy.
    observation_space = gym.spaces.Box(0, 255, (8, 8), np.uint8, seed=0)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.t = 4.0, 0
        return self.image(), {}

    def step(self, action):
        self.place += float(action[0]) + 0.2
        self.t += 1
        ended = not 0 <= self.place < 8
        return self.image(), float(self.place), ended, self.t == 30 and not ended, {}

    def image(self):
        image = self.np_random.integers(0, 100, (8, 8), dtype=np.uint8)
        image[int(np.clip(self.place, 0, 7))] = 255
        return image


gym.register("rlopt-tests/Screen-v0", entry_point=Screen)
