"""Returns and lengths of episodes, kept by rlopt itself: no wrapper's statistics are trusted."""

from __future__ import annotations

import torch
from torch import Tensor

from rlopt.types import Episode, State, Step, on_host


class EpisodeCounter:
    """Sums raw rewards per row (over agents who are paid apart too) until the row's episode ends, as the table of
    ``rlopt.envs.vector.VectorEnv`` says. The rows belong to ``runs`` runs, one after the other."""

    def __init__(self, num_envs: int, runs: int = 1) -> None:
        self.each = num_envs // runs
        self.returns = torch.zeros(num_envs, dtype=torch.float64)
        """Of the open episodes."""
        self.lengths = torch.zeros(num_envs, dtype=torch.int64)
        self.partial = torch.zeros(num_envs, dtype=torch.bool)
        """Where a transition of the open episode is missing, so that its return is not known."""
        self.lost = torch.zeros(num_envs, dtype=torch.int64)
        """Episodes that were lost, by row."""

    def count(self, step: Step) -> dict[int, Episode]:
        """Add one vector step; return the episodes that came to their end with it, by row and in the order of rows."""
        reward = step.reward if step.reward.ndim == 1 else step.reward.sum(1, dtype=torch.float64)
        reward, valid, ended = on_host(reward, step.valid, step.ended)
        self.returns += torch.where(valid, reward, 0.0)
        self.lengths += valid
        if not bool(ended.any()):
            return {}
        self.lost += ended & ~valid
        closed = (ended & valid & ~self.partial).nonzero().flatten().tolist()
        episodes = {i: self.episode(i) for i in closed}
        self.returns[ended] = 0.0
        self.lengths[ended] = 0
        self.partial[ended] = False
        return episodes

    def episode(self, row: int) -> Episode:
        """Return the open episode of ``row`` as it stands."""
        return Episode(float(self.returns[row]), int(self.lengths[row]), row // self.each)

    def drop(self, rows: Tensor) -> None:
        """Never report the open episodes of ``rows`` (N,) bool, which make a transition that is not counted."""
        self.partial |= rows.cpu()

    def state_dict(self) -> State:
        return {"returns": self.returns.clone(), "lengths": self.lengths.clone(), "partial": self.partial.clone()}

    def load_state_dict(self, state: State) -> None:
        self.returns.copy_(state["returns"])
        self.lengths.copy_(state["lengths"])
        self.partial.copy_(state["partial"])
