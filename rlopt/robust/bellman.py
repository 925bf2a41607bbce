"""Values, occupancies, gradients and certified bounds of policies against kernels of a robust MDP.

Everything is batched over K instances, in costs. ``rows`` (K, S, A, B) is any kernel on the model's successors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlopt.robust.mdp import discounted_bounds
from rlopt.robust.model import RobustMDP

ROUNDING = 1e-12
"""Relative error of a value below which no iteration improves on it."""


class PolicyEvaluation(NamedTuple):
    """What an adversary found against a policy."""

    value: Tensor
    """(K, S) of the policy under ``rows``: a lower bound of its robust value."""
    rows: Tensor
    """(K, S, A, B) a kernel of the set."""
    upper: Tensor
    """(K, S) no kernel of the set costs more."""
    steps: Tensor
    """(K,) how many times the adversary improved its kernel."""


def policy_value(m: RobustMDP, policy: Tensor, rows: Tensor) -> Tensor:
    """Return (K, S) v with (I - γ P_π) v = c_π, by LU."""
    expected = (policy * (rows * m.cost).sum(-1)).sum(-1)
    matrix = _identity(m) - m.gamma * m.kernel.transition(policy, rows)
    value: Tensor = torch.linalg.solve(matrix, expected)
    return value


def occupancy(m: RobustMDP, policy: Tensor, rows: Tensor) -> Tensor:
    """Return (K, S) d = (1 - γ)(I - γ P_πᵀ)⁻¹ ρ, which sums to 1."""
    matrix = _identity(m) - m.gamma * m.kernel.transition(policy, rows).mT
    found: Tensor = torch.linalg.solve(matrix, (1.0 - m.gamma) * m.initial)
    return found


def objective(m: RobustMDP, value: Tensor) -> Tensor:
    """Return (K,) J = ρᵀ v."""
    return (m.initial * value).sum(-1)


def action_values(m: RobustMDP, rows: Tensor, value: Tensor) -> Tensor:
    """Return (K, S, A) q(s, a) = p_sa·(c_sa + γ v)."""
    return (rows * m.targets(value)).sum(-1)


def policy_gradient(m: RobustMDP, policy: Tensor, rows: Tensor, value: Tensor) -> Tensor:
    """Return (K, S, A) ∂J/∂π(a|s) = d(s) q(s, a)/(1 - γ), ``value`` being that of policy and rows."""
    return occupancy(m, policy, rows)[..., None] * action_values(m, rows, value) / (1.0 - m.gamma)


def kernel_gradient(m: RobustMDP, policy: Tensor, rows: Tensor, value: Tensor) -> Tensor:
    """Return (K, S, A, B) ∂J/∂p(s'|s, a) = d(s) π(a|s) (c + γ v(s'))/(1 - γ)."""
    weight = occupancy(m, policy, rows)[..., None] * policy / (1.0 - m.gamma)
    return weight[..., None] * m.targets(value)


def robust_step(m: RobustMDP, policy: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return (K, S) T_π v, the robust backup of a policy, and the rows that attain it."""
    z = m.targets(value)
    rows = m.ambiguity.respond(z, policy)
    return (policy * (rows * z).sum(-1)).sum(-1), rows


def worst_case(
    m: RobustMDP, policy: Tensor, rows: Tensor, tolerance: Tensor | float = 0.0, limit: int = 1000
) -> PolicyEvaluation:
    """Return the exact adversary: policy iteration of its own MDP from ``rows``, until the gap of J is at most
    ``tolerance`` or it has improved its kernel ``limit`` times.

    Value of the present kernel, worst rows for that value, and again; monotone, and for polyhedral sets
    finite. The bound is MacQueen's on T_π. It stops where rounding allows no better, also at tolerance 0.
    """
    allowed = torch.as_tensor(tolerance, dtype=torch.float64, device=m.device).expand(m.num_instances)
    steps = torch.zeros(m.num_instances, dtype=torch.int64, device=m.device)
    for i in range(limit + 1):
        value = policy_value(m, policy, rows)
        backed_up, found = robust_step(m, policy, value)
        upper = certified_upper(m, value, backed_up)
        open_ = _unfinished(m, value, backed_up, upper, allowed)
        if i == limit or not bool(open_.any()):
            break
        rows = torch.where(open_[:, None, None, None], found, rows)
        steps += open_
    return PolicyEvaluation(value, rows, upper, steps)


def ascend(
    m: RobustMDP, policy: Tensor, rows: Tensor, tolerance: Tensor | float, step_size: float, limit: int = 10_000
) -> PolicyEvaluation:
    """Return the paper's adversary: p ← Proj(p + β ∇_p J) from ``rows``, until the *certified* gap of J is at most
    ``tolerance`` (the authors stop when successive values are close, which certifies nothing).
    """
    allowed = torch.as_tensor(tolerance, dtype=torch.float64, device=m.device).expand(m.num_instances)
    steps = torch.zeros(m.num_instances, dtype=torch.int64, device=m.device)
    for i in range(limit + 1):
        value = policy_value(m, policy, rows)
        backed_up, _ = robust_step(m, policy, value)
        upper = certified_upper(m, value, backed_up)
        open_ = _unfinished(m, value, backed_up, upper, allowed)
        if i == limit or not bool(open_.any()):
            break
        moved = m.ambiguity.project(rows + step_size * kernel_gradient(m, policy, rows, value))
        rows = torch.where(open_[:, None, None, None], moved, rows)
        steps += open_
    return PolicyEvaluation(value, rows, upper, steps)


def certified_upper(m: RobustMDP, value: Tensor, backed_up: Tensor) -> Tensor:
    """Return (K, S) an upper bound of the fixed point of a backup T, from ``backed_up`` = T ``value``."""
    return torch.maximum(discounted_bounds(m.gamma, value, backed_up)[1], value)


def best_response(m: RobustMDP, rows: Tensor, limit: int = 1000) -> tuple[Tensor, Tensor]:
    """Return the optimal policy (K, S, A) of the ordinary MDP ``rows`` and a certified lower bound (K,) of its cost.

    By weak duality, min_π J(π, p) ≤ min_π max_p' J(π, p') for every p of the set, so this bounds the robust optimum.
    After ``limit`` improvements the policy is the best one so far, and the bound holds nonetheless.
    """
    value = policy_value(m, m.uniform_policy(), rows)
    policy = m.uniform_policy()
    for i in range(limit + 1):
        q = action_values(m, rows, value)
        backed_up, action = q.min(-1)
        scale = ROUNDING * (1.0 + value.abs().amax())
        if i == limit or bool(((value - backed_up) <= scale).all()):
            break
        policy = torch.zeros_like(q).scatter_(-1, action[..., None], 1.0)
        value = policy_value(m, policy, rows)
    lower = torch.minimum(discounted_bounds(m.gamma, value, backed_up)[0], value)
    return policy, objective(m, lower)


def _unfinished(m: RobustMDP, value: Tensor, backed_up: Tensor, upper: Tensor, allowed: Tensor) -> Tensor:
    """(K,) true where the gap is above what is allowed, and rounding leaves room to narrow it."""
    gap = objective(m, upper) - objective(m, value)
    residual = (backed_up - value).amax(-1)
    return (gap > allowed) & (residual > ROUNDING * (1.0 + value.abs().amax(-1)))


def _identity(m: RobustMDP) -> Tensor:
    return torch.eye(m.num_states, dtype=torch.float64, device=m.device)
