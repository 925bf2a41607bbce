"""What the tests of evaluations and films evaluate."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from rlopt.envs import VectorEnv, make_env
from rlopt.nn import CategoricalActor, NetworkConfig, SquashedGaussianActor, build_seeded, make_actor, network_options
from rlopt.policy import Policy

SMALL = network_options(NetworkConfig(hidden=(16,)))


class Lengths(gymnasium.Env[Any, Any]):
    """Episodes of 1 to 30 steps, drawn from the seed; the reward of step k is k. Stepping past the end is an error."""

    def __init__(self, shift: float = 0.0) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Discrete(3)
        self.shift, self.left, self.count = shift, 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.left, self.count = int(self.np_random.integers(1, 31)), 0
        return np.array([self.left, 0.0], np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.left > 0, "an ended episode was stepped"
        self.left, self.count = self.left - 1, self.count + 1
        reward = self.count + self.shift
        return np.array([self.left, self.count], np.float32), reward, self.left == 0, False, {}


def policy_for(env_id: str, seed: int = 0, **kwargs: Any) -> Policy:
    env = make_env(env_id, 1, **kwargs)
    env.close()
    spec = env.spec
    cls = CategoricalActor if isinstance(spec.action_space, spaces.Discrete) else SquashedGaussianActor
    actor = build_seeded(lambda: cls(spec.observation_space, spec.action_space, SMALL), seed)
    assert isinstance(actor, cls)
    return Policy(spec, actor)


def endless(env: VectorEnv) -> Policy:
    """CliffWalking has no time limit, and a policy that walks into the wall never leaves the start."""
    actor: Any = make_actor("tabular", env.spec.observation_space, env.spec.action_space, {})
    actor.probabilities.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64))  # always left
    return Policy(env.spec, actor)
