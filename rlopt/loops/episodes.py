"""Returns and lengths of training episodes, kept by rlopt itself: no wrapper's statistics are trusted."""

from __future__ import annotations

import math

import torch

from rlopt.types import Episode, State, Step, on_host


class EpisodeCounter:
    """Sums raw rewards per row until the row's episode ends. The rows belong to ``runs`` runs, one after the other.

    A row that is no transition drops its open episode: a part of it is missing, so its return is not known.
    """

    def __init__(self, num_envs: int, runs: int = 1) -> None:
        self.each = num_envs // runs
        self.returns = torch.zeros(num_envs, dtype=torch.float64)
        self.lengths = torch.zeros(num_envs, dtype=torch.int64)

    def count(self, step: Step) -> list[Episode]:
        """Add one vector step; the episodes that ended with it, in row order."""
        reward, valid, ended = on_host(step.reward, step.valid, step.ended)
        self.returns += torch.where(valid, reward, 0.0)
        self.lengths += valid
        if not bool(valid.all()):
            self.returns[~valid] = math.nan
        if not bool(ended.any()):
            return []
        done = [i for i in ended.nonzero().flatten().tolist() if not math.isnan(self.returns[i])]
        episodes = [Episode(float(self.returns[i]), int(self.lengths[i]), i // self.each) for i in done]
        self.returns[ended] = 0.0
        self.lengths[ended] = 0
        return episodes

    def state_dict(self) -> State:
        return {"returns": self.returns.clone(), "lengths": self.lengths.clone()}

    def load_state_dict(self, state: State) -> None:
        self.returns.copy_(state["returns"])
        self.lengths.copy_(state["lengths"])
