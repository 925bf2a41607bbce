"""Two agents in two rooms, of which only one needs them to coordinate: a small problem whose answers are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.envs.streams import RowStreams
from rlopt.envs.torch_env import TorchEnv
from rlopt.joint import join_index, join_spaces
from rlopt.types import Obs, RloptError

APART, TOGETHER = 0, 1
PAYOFFS = (
    # Each agent has an action of its own that is right, and gains half of it: nothing to agree on.
    ((0.5, 0.0, 0.0), (0.5, 0.0, 0.0), (1.0, 0.5, 0.5)),
    # The penalty game (Claus and Boutilier 1998): to do the same is best, the two ways of it are alike, to miss each
    # other is worst, and the third action is safe.
    ((1.0, -1.0, 0.5), (-1.0, 1.0, 0.5), (0.5, 0.5, 0.5)),
)
"""[room][action of the first][of the second], paid to the team."""
BEST = (1.0, 1.0)
"""What a team is paid for its best joint action, by room: 1 per step wherever it is."""
SAFE = (1.0, 0.5)
"""What independent learners come to: in the second room, while the other one explores, the safe action is the only
best answer to itself."""


class TwoRooms(TorchEnv):
    """Two agents play a matrix game per step, and change rooms by chance, whatever they do (``two_rooms``).

    Observation: which room they are in (one-hot), for each agent and as the state. Three actions, one reward for both.
    An episode has 20 steps; the fact ``together`` counts those in the room in which they must coordinate.

    As actions do not move them, the best is known: the best joint action in each room, worth ``BEST``, whatever the
    discount; and with a cost for central decisions ``switching_values``.

    Args:
        num_envs: N.
        stay: the probability that they are in the same room at the next step.
        options: of ``TorchEnv``.

    Raises:
        RloptError: ``stay`` is no probability.
    """

    agents = ("agent_0", "agent_1")
    agent_spaces = [(spaces.Box(0.0, 1.0, (2,), np.float32), spaces.Discrete(3))] * 2
    observation_space, action_space = join_spaces(agent_spaces, spaces.Box(0.0, 1.0, (2,), np.float32))
    derived = {"obs": join_index([(2,), (2,)]) % 2}
    episode_limit = 20
    defaults = {"stay": 0.8}
    facts = ("together",)

    def __init__(self, num_envs: int, **options: Any) -> None:
        super().__init__(num_envs, **options)
        if not 0.0 <= (stay := float(self.parameters["stay"][0])) <= 1.0:
            raise RloptError(f"env.kwargs.stay={stay:g} must be a probability, from 0 to 1")
        self._payoffs = torch.tensor(PAYOFFS, dtype=self.dtype, device=self.device)
        self._never = torch.zeros(num_envs, dtype=torch.bool, device=self.device)

    def initial(self, streams: RowStreams) -> dict[str, Tensor]:
        room = (streams.uniform() < 0.5).to(torch.int64)
        return {"room": room, "together": torch.zeros_like(room)}

    def dynamics(self, state: dict[str, Tensor], action: Tensor) -> tuple[Any, ...]:
        room, together = state["room"], state["together"] + state["room"]
        reward = self._payoffs[room, action[:, 0], action[:, 1]]
        leaves = self.streams.uniform() >= self.parameters["stay"]
        after = {"room": torch.where(leaves, 1 - room, room), "together": together}
        return after, reward, self._never, None, None, {"together": together.to(torch.float32)}

    def observe(self, state: dict[str, Tensor]) -> Obs:
        room = torch.nn.functional.one_hot(state["room"], 2)
        return {"obs": room[:, None].expand(-1, 2, -1), "state": room}


def switching_values(
    cost: float, gamma: float, stay: float = 0.8, independent: tuple[float, float] = SAFE
) -> tuple[Tensor, Tensor]:
    """Return the best discounted values (2,) by room, of a team that may at each step pay ``cost`` for the best joint
    action instead of ``independent`` payoffs, and where (2,) it does: where the gain is above the cost.

    It is the fixed point of v = max(independent, BEST − cost) + γ P v, which goes on without an end.
    """
    alone, central = (torch.tensor(paid, dtype=torch.float64) for paid in (independent, BEST))
    chain = torch.tensor([[stay, 1 - stay], [1 - stay, stay]], dtype=torch.float64)
    paid = torch.maximum(alone, central - cost)
    return torch.linalg.solve(torch.eye(2, dtype=torch.float64) - gamma * chain, paid), central - cost > alone
