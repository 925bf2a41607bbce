"""Transitions as they are given to a buffer, and minibatches as they come out of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlopt.types import Obs, RloptError, map_obs


class Transition(NamedTuple):
    """One vector step of N environments, as it is stored; ``rlopt.envs.vector`` says what the flags mean together."""

    obs: Obs
    """(N, …) what was acted on."""
    action: Tensor
    """(N, …) in environment units: (N, A), (N,) int64, of a team (N, n, …)."""
    reward: Tensor
    """(N,), or (N, n) where agents are paid apart; raw."""
    next_obs: Obs
    """(N, …) where it led: the true last observation where an episode ended."""
    terminated: Tensor
    """(N,) bool: the bootstrap is cut here."""
    truncated: Tensor
    """(N,) bool: a limit ended the episode; the bootstrap goes on."""
    ended: Tensor | None = None
    """(N,) bool: the last row of an episode; None where that is ``terminated | truncated``."""
    valid: Tensor | None = None
    """(N,) bool: the row is a transition; None where all are."""
    extras: dict[str, Tensor] = {}
    """{name: (N, …)} what the agent declared in ``extra_fields``."""


class Batch(NamedTuple):
    """A minibatch of B transitions, raw, as the environment gave them; or of B slices of L steps, (B, L, …) each."""

    obs: Obs
    """(B, …)."""
    action: Tensor
    """(B, …) in environment units: (B, A), (B,) int64, of a team (B, n, …)."""
    reward: Tensor
    """(B,), or (B, n): the n-step return Σ γ^i r_i of the window, each r_i transformed."""
    next_obs: Obs
    """(B, …) where the window led."""
    terminated: Tensor
    """(B,) float32: 1 where the bootstrap is cut."""
    discount: Tensor
    """(B,) γ^k, k the true length of the window. The target is reward + discount·(1 - terminated)·V(next_obs)."""
    weight: Tensor | None
    """(B,) importance weights, of slices too; None where all are 1."""
    index: Tensor  # type: ignore[assignment]
    """(B,) slots, for ``update_priority``; of a slice that of the first transition its loss is made of."""
    extras: dict[str, Tensor] = {}
    """What the agent declared in ``extra_fields``."""
    valid: Tensor | None = None
    """(B, L) float32: 1 where a slice holds a transition (ones, then zeros; every field is 0 there). None of single
    transitions."""
    mask: Tensor | None = None
    """(B, L) float32: 1 where the loss counts: a transition, and not one of the burn-in."""
    carry: dict[str, Tensor] | None = None
    """{name: (B, …)} the carry stored with each slice's first transition, from the extras ``carry/<name>``."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Apply ``function`` to every tensor."""

        def optional(value: Tensor | None) -> Tensor | None:
            return None if value is None else function(value)

        return Batch(
            map_obs(function, self.obs),
            function(self.action),
            function(self.reward),
            map_obs(function, self.next_obs),
            function(self.terminated),
            function(self.discount),
            optional(self.weight),
            function(self.index),
            {key: function(value) for key, value in self.extras.items()},
            optional(self.valid),
            optional(self.mask),
            None if self.carry is None else {key: function(value) for key, value in self.carry.items()},
        )


REWARD_TRANSFORMS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "auto": None,
    "raw": None,
    "sign": torch.sign,
    "clip": lambda reward: reward.clamp(-1.0, 1.0),
}
"""What learning may make of each single reward, by the words of ``agent.reward``, where a run has decided ``auto`` and
what is made by hand takes rewards as they are. On Atari, DQN learns from signs (Mnih
et al. 2015, Methods)."""


def make_reward_transform(word: str | None) -> Callable[[Tensor], Tensor] | None:
    """Return the function of rewards (…) that is called ``word``; None where rewards are taken as they are.

    It acts on each single reward, before rewards are summed (n-step windows, GAE); what is stored stays raw.

    Raises:
        RloptError: no transform has that name.
    """
    if word is None:
        return None
    if word not in REWARD_TRANSFORMS:
        words = ", ".join(known for known in REWARD_TRANSFORMS if known != "auto")  # which an agent decides
        raise RloptError(f"reward_transform={word!r} is unknown; choose one of {words}")
    return REWARD_TRANSFORMS[word]
