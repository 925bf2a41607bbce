"""A policy over actions that differ from state to state: what can be done is part of the observation."""

from __future__ import annotations

import torch
from gymnasium import spaces
from torch import Tensor, nn

from rlopt.nn.actors import Actor, Options, register_actor
from rlopt.nn.discrete_actors import has_action_mask
from rlopt.nn.distributions import categorical, categorical_entropy, chosen_log_prob, possible
from rlopt.types import Obs, RloptError, Space, obs_leaves, one_line, shape_of

MAX_SIZE = 1 << 26


class ChoiceTable(Actor):
    """A logit for every pair of a state and an action that it offers, in a table of ``size`` entries which are found by
    hashing: a tabular policy where neither states nor actions were counted beforehand. Pairs that share an entry share
    its logit: with a hundred times as many entries as pairs, one in a hundred.

    Observations have the leaves ``state``, a number, ``choices`` (K,), a number of each action, and ``action_mask``
    (K,), which of them there are. Calling it gives logits (B, K).

    Options: ``size``.
    """

    kind = "choice_table"
    start = 0

    def __init__(self, observation_space: Space, action_space: Space, options: Options) -> None:
        super().__init__()
        size = options.get("size")
        if type(size) is not int or not 1 <= size <= MAX_SIZE:
            raise RloptError(f"a table of {size!r} entries: give a number from 1 to {MAX_SIZE}")
        leaves = obs_leaves(observation_space)
        k = int(action_space.n) if isinstance(action_space, spaces.Discrete) else 0
        fits = (
            isinstance(leaves.get("state"), spaces.Discrete)
            and isinstance(leaves.get("choices"), spaces.MultiDiscrete)
            and shape_of(leaves["choices"]) == (k,)
            and has_action_mask(observation_space, k)
            and getattr(action_space, "start", 0) == 0
        )
        if not fits:
            raise RloptError(
                "a table of choices needs observations with the leaves state, choices and action_mask, and as many "
                f"Discrete actions, not {one_line(observation_space)} and {one_line(action_space)}"
            )
        self.options, self.actions = {"size": size}, k
        self.logits = nn.Parameter(torch.zeros(size))

    def forward(self, obs: Obs) -> Tensor:
        """Return logits (B, K)."""
        assert isinstance(obs, dict)
        return possible(self.logits[self.entries(obs["state"], obs["choices"])], obs["action_mask"])

    def entries(self, state: Tensor, choices: Tensor) -> Tensor:
        """Return which entry of the table each pair of a state (B,) and its choices (B, K) has, (B, K)."""
        # Odd factors and shifts modulo 2⁶⁴, after SplitMix (Steele et al. 2014): every bit reaches all others.
        x = state.unsqueeze(-1) * 0x9E3779B97F4A7C1 + choices
        for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
            x = (x ^ (x >> shift)) * factor
        return (x ^ (x >> 31)).remainder(len(self.logits))

    def noise(self, rows: int, generator: torch.Generator | None) -> Tensor:
        return torch.rand((rows,), generator=generator, device=self.logits.device)

    def choose(self, outputs: Tensor, noise: Tensor | None) -> Tensor:
        return outputs.argmax(-1) if noise is None else categorical(outputs, noise)

    def log_prob(self, outputs: Tensor, action: Tensor) -> Tensor:
        return chosen_log_prob(outputs, action)

    def entropy(self, outputs: Tensor) -> Tensor:
        return categorical_entropy(outputs)

    def uniform(self, rows: int, generator: torch.Generator, obs: Obs | None = None) -> Tensor:
        if obs is None:
            return torch.randint(self.actions, (rows,), generator=generator, device=generator.device)
        assert isinstance(obs, dict)
        level = torch.zeros(obs["action_mask"].shape, device=self.logits.device)
        return self.choose(possible(level, obs["action_mask"]), self.noise(rows, generator))


register_actor(ChoiceTable.kind, ChoiceTable)
