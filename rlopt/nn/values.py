"""Value functions. What they answer is a number per state, or per action."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlopt.nn.encoders import encoder_of, features_of
from rlopt.nn.memory import make_memory
from rlopt.nn.networks import EnsembleMLP, NetworkConfig
from rlopt.types import Carry, Obs, Space


class Critic(nn.Module):
    """E independent value functions that share nothing: Q(s, a) or V(s) (E, B), or Q(s, ·) (E, B, K).

    ``action_features`` is A for Q(s, a), 0 for Q(s, ·) and V(s); ``outputs`` is K for Q(s, ·) over K discrete actions.
    With a memory the observations are seen through it and the answer is a pair, as of ``NetworkActor.forward``; carries
    are then (N, E, H).
    """

    def __init__(
        self,
        space: Space,
        config: NetworkConfig,
        action_features: int = 0,
        outputs: int | None = None,
        ensemble: int = 2,
    ) -> None:
        super().__init__()
        config = config.of_critic()
        first = encoder_of(space, config)
        shared = next(first.parameters(), None) is None
        rest = [] if shared else [encoder_of(space, config) for _ in range(ensemble - 1)]
        self.encoders = nn.ModuleList([first, *rest])
        features = features_of(first)
        self.memory = make_memory(features, config, ensemble)
        features = features if self.memory is None else self.memory.size
        self.scalar = outputs is None
        gain = 1.0 if config.value_gain is None else config.value_gain
        self.body = EnsembleMLP(ensemble, features + action_features, outputs or 1, config, gain)

    def initial_carry(self, rows: int) -> Carry:
        """Return the carry with which ``rows`` episodes begin, leaves (rows, E, …); None without a memory."""
        return None if self.memory is None else self.memory.initial_carry(rows)

    def forward(
        self,
        obs: Obs,
        action: Tensor | None = None,
        carry: Carry = None,
        ended: Tensor | None = None,
        valid: Tensor | None = None,
        burnt: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Carry]:
        """Return the values; with a memory a pair of them, (E, B, L) or (E, B, L, K) over sequences, and the carry."""
        if self.memory is None:
            return self._values(self._encode(obs), action)
        x, carry = self.memory.read(self._encode, obs, carry, ended, valid, burnt)
        if ended is None:
            return self._values(x, action), carry
        q = self._values(x.flatten(1, 2), None if action is None else action.flatten(0, 1))
        return q.unflatten(1, ended.shape), carry  # type: ignore[no-untyped-call]

    def _encode(self, obs: Obs) -> Tensor:
        if len(self.encoders) == 1:
            x: Tensor = self.encoders[0](obs)
            return x
        return torch.stack([encoder(obs) for encoder in self.encoders])

    def _values(self, x: Tensor, action: Tensor | None) -> Tensor:
        if action is not None:
            x = torch.cat([x, action if x.dim() == 2 else action.expand(x.shape[0], *action.shape)], -1)
        q: Tensor = self.body(x)
        return q.squeeze(-1) if self.scalar else q
