"""A maze that asks for what was seen long ago: the probe of memory."""

from __future__ import annotations

import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.envs.streams import RowStreams
from rlopt.envs.torch_env import TorchEnv


class TMaze(TorchEnv):
    """The passive T-maze (Ni et al. 2023, arXiv 2307.03864): the goal's side is shown at the start, and asked for
    ``length`` steps later.

    Observation (N, 2): whether this is the junction, and at the first step the side, -1 or 1. The corridor is walked by
    itself; the action at the junction, 1 for the side 1, pays 1 where it is right. No action matters before, so without
    a memory no policy gets more than 0.5 on average.
    """

    observation_space, action_space = spaces.Box(-1.0, 1.0, (2,)), spaces.Discrete(2)
    defaults = {"length": 10.0}

    def initial(self, streams: RowStreams) -> Tensor:
        return torch.stack((2.0 * (streams.uniform() < 0.5) - 1.0, torch.zeros_like(self.parameters["length"])), 1)

    def dynamics(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        goal, t = state.unbind(1)
        over = t >= self.parameters["length"]
        return torch.stack((goal, t + 1.0), 1), (over & (action == (goal > 0))).float(), over

    def observe(self, state: Tensor) -> Tensor:
        goal, t = state.unbind(1)
        return torch.stack(((t >= self.parameters["length"]).float(), goal * (t == 0.0)), 1)
