"""Actors with a probability for each of finitely many actions."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from rlopt.nn.actors import Actor, NetworkActor, Options, register_actor
from rlopt.nn.boxes import agents_for
from rlopt.nn.distributions import IMPOSSIBLE, categorical, categorical_entropy, chosen_log_prob, possible
from rlopt.types import Obs, RloptError, Space, is_mask, obs_leaves, one_line, shape_of

MAX_HEADS = 1 << 22
"""Logits of a ``MultiCategoricalActor`` with the padding of its heads."""


class DiscreteActor(NetworkActor):
    """An actor with a logit for each action. Those of actions that a leaf ``action_mask`` leaves out are
    ``IMPOSSIBLE``."""

    def __init__(self, observation_space: Space, actions: int, options: Options) -> None:
        super().__init__(observation_space, actions, options)
        self.actions = actions
        self.masked = has_action_mask(observation_space, actions)

    def head(self, x: Tensor, obs: Obs) -> Tensor:
        """Return logits (B, K)."""
        if not self.masked:
            return x
        assert isinstance(obs, dict)
        return possible(x, obs["action_mask"])


class CategoricalActor(DiscreteActor):
    """A categorical distribution over a Discrete action space. Calling it gives logits (B, K)."""

    kind = "categorical"

    def __init__(self, observation_space: Space, action_space: Space, options: Options) -> None:
        if not isinstance(action_space, spaces.Discrete):
            raise RloptError(
                f"a categorical policy acts in Discrete action spaces, not in {one_line(action_space)}; "
                f"{agents_for(action_space)}"
            )
        super().__init__(observation_space, int(action_space.n), options)
        self.start = int(action_space.start)

    def noise(self, rows: int, generator: torch.Generator | None) -> Tensor:
        return torch.rand((rows,), generator=generator, device=next(self.body.parameters()).device)

    def choose(self, outputs: Tensor, noise: Tensor | None) -> Tensor:
        return (outputs.argmax(-1) if noise is None else categorical(outputs, noise)) + self.start

    def log_prob(self, outputs: Tensor, action: Tensor) -> Tensor:
        return chosen_log_prob(outputs, action - self.start)

    def entropy(self, outputs: Tensor) -> Tensor:
        return categorical_entropy(outputs)

    def uniform(self, rows: int, generator: torch.Generator, obs: Obs | None = None) -> Tensor:
        if self.masked and obs is not None:
            level = torch.zeros((rows, self.actions), device=generator.device)
            return self.choose(self.head(level, obs), self.noise(rows, generator))
        return torch.randint(self.actions, (rows,), generator=generator, device=generator.device) + self.start


class MultiCategoricalActor(DiscreteActor):
    """Independent categorical distributions, one for each component (head) of a MultiDiscrete action space. MultiBinary
    is one of two actions per bit: the difference of two logits is a Bernoulli's.

    Calling it gives logits (B, heads, K): heads may differ in size, and all are padded to the largest one's K with
    actions that are ``IMPOSSIBLE``. An ``action_mask`` holds the heads' actions side by side.
    """

    kind = "multi_categorical"
    start: Tensor
    place: Tensor

    def __init__(self, observation_space: Space, action_space: Space, options: Options) -> None:
        if not isinstance(action_space, spaces.MultiDiscrete | spaces.MultiBinary):
            raise RloptError(
                f"this policy acts in MultiDiscrete and MultiBinary spaces, not in {one_line(action_space)}; "
                f"{agents_for(action_space)}"
            )
        shape = shape_of(action_space)
        nvec = getattr(action_space, "nvec", np.full(shape, 2))
        start = getattr(action_space, "start", np.zeros(shape))
        widest = int(nvec.max())
        if nvec.size * widest > MAX_HEADS:
            raise RloptError(f"actions in {nvec.size} components of up to {widest} are too many for one policy")
        super().__init__(observation_space, int(nvec.sum()), options)
        self.action_shape, self.heads = shape, nvec.size
        self.register_buffer("start", torch.as_tensor(start.ravel(), dtype=torch.int64), persistent=False)
        # Where each of the (heads, K) padded logits lies among the network's outputs; padding lies behind the last.
        sizes = torch.as_tensor(nvec.ravel(), dtype=torch.int64)
        number, first = torch.arange(widest), sizes.cumsum(0) - sizes
        place = torch.where(number < sizes[:, None], first[:, None] + number, self.actions)
        self.register_buffer("place", place.flatten(), persistent=False)

    def head(self, x: Tensor, obs: Obs) -> Tensor:
        """Return logits (B, heads, K)."""
        return self._padded(super().head(x, obs))

    def _padded(self, logits: Tensor) -> Tensor:
        """Return logits (…, heads, K) from those of all heads side by side, (…, actions)."""
        padded = F.pad(logits, (0, 1), value=IMPOSSIBLE).index_select(-1, self.place)
        return padded.view(*logits.shape[:-1], self.heads, -1)

    def log_prob(self, outputs: Tensor, action: Tensor) -> Tensor:
        """Return log π(a|s) (B,) of the actions (B, …), the sum over the heads, from logits (B, heads, K)."""
        return chosen_log_prob(outputs, action.flatten(1) - self.start).sum(-1)

    def entropy(self, outputs: Tensor) -> Tensor:
        return categorical_entropy(outputs).sum(-1)

    def noise(self, rows: int, generator: torch.Generator | None) -> Tensor:
        return torch.rand((rows, self.heads), generator=generator, device=self.start.device)

    def choose(self, outputs: Tensor, noise: Tensor | None) -> Tensor:
        index = outputs.argmax(-1) if noise is None else categorical(outputs, noise)
        return (index + self.start).view(-1, *self.action_shape)

    def uniform(self, rows: int, generator: torch.Generator, obs: Obs | None = None) -> Tensor:
        level = torch.zeros((rows, self.actions), device=self.start.device)
        logits = self._padded(level) if obs is None else self.head(level, obs)
        return self.choose(logits, self.noise(rows, generator))


class TabularActor(Actor):
    """A table of action probabilities over Discrete observations: what a solver exports."""

    kind = "tabular"

    def __init__(self, observation_space: Space, action_space: Space, options: Options) -> None:
        super().__init__()
        if not (isinstance(observation_space, spaces.Discrete) and isinstance(action_space, spaces.Discrete)):
            raise RloptError(f"a tabular policy needs Discrete spaces, not {observation_space} and {action_space}")
        self.options = options
        self.start = (int(observation_space.start), int(action_space.start))
        n, k = int(observation_space.n), int(action_space.n)
        self.probabilities = nn.Parameter(torch.full((n, k), 1.0 / k, dtype=torch.float64), requires_grad=False)

    def forward(self, obs: Obs) -> Tensor:
        """Return probabilities (B, K)."""
        assert isinstance(obs, Tensor)
        return self.probabilities[obs.long() - self.start[0]]

    def noise(self, rows: int, generator: torch.Generator | None) -> Tensor:
        table = self.probabilities
        return torch.rand((rows,), generator=generator, device=table.device, dtype=table.dtype)

    def choose(self, outputs: Tensor, noise: Tensor | None) -> Tensor:
        return (outputs.argmax(-1) if noise is None else categorical(outputs.log(), noise)) + self.start[1]

    def log_prob(self, outputs: Tensor, action: Tensor) -> Tensor:
        return chosen_log_prob(outputs.log(), action - self.start[1])

    def entropy(self, outputs: Tensor) -> Tensor:
        return -torch.xlogy(outputs, outputs).sum(-1)

    def uniform(self, rows: int, generator: torch.Generator, obs: Obs | None = None) -> Tensor:
        return (
            torch.randint(self.probabilities.shape[1], (rows,), generator=generator, device=generator.device)
            + self.start[1]
        )


def has_action_mask(observation_space: Space, actions: int) -> bool:
    """Return whether observations say which of so many actions are possible.

    Raises:
        RloptError: they say it of another number of actions.
    """
    leaf = obs_leaves(observation_space).get("action_mask")
    if leaf is None or not is_mask("action_mask", leaf):
        return False
    if shape_of(leaf) != (actions,):
        raise RloptError(f"action_mask must have an entry for each of the {actions} actions, not {one_line(leaf)}")
    return True


for _kind in (CategoricalActor, MultiCategoricalActor, TabularActor):
    register_actor(_kind.kind, _kind)
