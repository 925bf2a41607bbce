"""Value functions. What they answer is a number per state, or per action."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlopt.nn.encoders import encoder_of, features_of, fitted
from rlopt.nn.memory import make_memory
from rlopt.nn.networks import EnsembleMLP, NetworkConfig
from rlopt.types import Carry, Obs, RloptError, Space


class Critic(nn.Module):
    """E independent value functions that share nothing: Q(s, a) or V(s) (E, B), or Q(s, ·) (E, B, K).

    ``action_features`` is A for Q(s, a), 0 for Q(s, ·) and V(s); ``outputs`` is K for Q(s, ·) over K discrete actions.
    ``encoder`` is one that is shared with somebody else, for an ensemble of one.
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
        encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        config = fitted(config.of_critic(), space)
        first = encoder_of(space, config) if encoder is None else encoder
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
            return self.values(self._encode(obs), action)
        x, carry = self.memory.read(self._encode, obs, carry, ended, valid, burnt)
        if ended is None:
            return self.values(x, action), carry
        q = self.values(x.flatten(1, 2), None if action is None else action.flatten(0, 1))
        return q.unflatten(1, ended.shape), carry  # type: ignore[no-untyped-call]

    def _encode(self, obs: Obs) -> Tensor:
        if len(self.encoders) == 1:
            x: Tensor = self.encoders[0](obs)
            return x
        return torch.stack([encoder(obs) for encoder in self.encoders])

    def values(self, x: Tensor, action: Tensor | None = None) -> Tensor:
        """Return the values of what is known of states, (B, F) or (E, B, F)."""
        if action is not None:
            x = torch.cat([x, action if x.dim() == 2 else action.expand(x.shape[0], *action.shape)], -1)
        q: Tensor = self.body(x)
        return q.squeeze(-1) if self.scalar else q


# What Z numbers per action say about the return


class ScalarValues(nn.Module):
    """Z = 1: the number is Q(s, a)."""

    kind = "scalar"

    def __init__(self) -> None:
        super().__init__()
        self.size = 1

    def mean(self, outputs: Tensor) -> Tensor:
        """Return Q (…,) from outputs (…, 1)."""
        return outputs.squeeze(-1)

    def goal(self, after: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """Return r + γ Q(s', a') (B, 1) from the outputs ``after`` (B, 1) of what follows; ``discount`` (B,) is 0 where
        nothing does."""
        return reward.unsqueeze(-1) + discount.unsqueeze(-1) * after

    def error(self, outputs: Tensor, goal: Tensor) -> Tensor:
        """Return the residuals Q(s, a) - goal (B,), which have a sign."""
        return (outputs - goal).squeeze(-1)


class CategoricalValues(nn.Module):
    """Logits of Z atoms z_i, evenly spaced from ``low`` to ``high``, on which the return lies (C51: Bellemare, Dabney
    and Munos 2017, arXiv 1707.06887).

    Raises:
        RloptError: there are fewer than two atoms, or ``low`` is not below ``high``.
    """

    kind = "categorical"
    atoms: Tensor

    def __init__(self, size: int = 51, low: float = -10.0, high: float = 10.0) -> None:
        super().__init__()
        if size < 2 or not low < high:
            raise RloptError(f"a categorical value needs two atoms and low < high, not {size} from {low:g} to {high:g}")
        self.size, self.low, self.high, self.gap = size, low, high, (high - low) / (size - 1)
        self.register_buffer("atoms", torch.linspace(low, high, size), persistent=False)

    def mean(self, outputs: Tensor) -> Tensor:
        """Return Q = Σ p_i z_i (…,) from logits (…, Z)."""
        return (outputs.softmax(-1) * self.atoms).sum(-1)

    def goal(self, after: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """Return the probabilities (B, Z) of r + γ Z(s', a') projected onto the atoms (eq. 7).

        The mass of what lands between two atoms goes to both, in proportion to nearness; what lands beyond an end, to
        the end.
        """
        landed = (reward.unsqueeze(-1) + discount.unsqueeze(-1) * self.atoms).clamp(self.low, self.high)
        distance = (landed.unsqueeze(-2) - self.atoms.unsqueeze(-1)).abs() / self.gap  # (B, to, from)
        return ((1.0 - distance).clamp(min=0.0) * after.softmax(-1).unsqueeze(-2)).sum(-1)

    def error(self, outputs: Tensor, goal: Tensor) -> Tensor:
        """Return the cross-entropies -Σ goal_i log p_i (B,)."""
        return -(goal * outputs.log_softmax(-1)).sum(-1)


class QuantileValues(nn.Module):
    """The Z quantiles of the return at the midpoints (2i + 1) / 2Z (QR-DQN: Dabney et al. 2018, arXiv 1710.10044)."""

    kind = "quantile"
    midpoints: Tensor

    def __init__(self, size: int = 200) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("midpoints", (torch.arange(size) + 0.5) / size, persistent=False)

    def mean(self, outputs: Tensor) -> Tensor:
        """Return Q (…,), the mean of the quantiles (…, Z)."""
        return outputs.mean(-1)

    def goal(self, after: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """Return r + γ θ_j(s', a') (B, Z)."""
        return reward.unsqueeze(-1) + discount.unsqueeze(-1) * after

    def error(self, outputs: Tensor, goal: Tensor) -> Tensor:
        """Return the quantile Huber losses Σ_i mean_j |τ_i - 1{u < 0}| L(u) (B,), u = goal_j - θ_i, with κ = 1 (eq. 9
        and 10, algorithm 1)."""
        u = goal.unsqueeze(-2) - outputs.unsqueeze(-1)  # (B, i, j)
        clipped = u.clamp(-1.0, 1.0)
        huber = clipped * (u - 0.5 * clipped)
        share = (self.midpoints.unsqueeze(-1) - (u.detach() < 0).to(u.dtype)).abs()
        return (share * huber).mean(-1).sum(-1)


Values = ScalarValues | CategoricalValues | QuantileValues
VALUES: dict[str, type[Values]] = {cls.kind: cls for cls in (ScalarValues, CategoricalValues, QuantileValues)}
