"""The switching problem in tables: when to pay for central control, with values that can be compared with what is
known in closed form.

At each state a team acts by itself, or pays a cost c and acts centrally (Mguni et al. 2023, "MANSA", in the form of
``rlopt.agents.teams.mansa``): v = T v = max(r₀ + γ P₀ v, r₁ - c + γ P₁ v). T is a contraction by γ in the largest
difference, so value iteration and Q-learning converge to its one fixed point.
"""

from __future__ import annotations

import torch
from torch import Tensor


def switching_q(v: Tensor, paid: Tensor, chain: Tensor, cost: float, gamma: float) -> Tensor:
    """Return the values (S, 2) of acting independently and centrally for a step, and then as ``v`` (S,) says.

    Args:
        v: values of the states.
        paid: (S, 2) expected rewards of the two.
        chain: (2, S, S) probabilities of the next state under each.
        cost: of a central step.
        gamma: discount per step.
    """
    price = torch.tensor([0.0, cost], dtype=v.dtype)
    return paid - price + gamma * (chain @ v).T


def switching_operator(v: Tensor, paid: Tensor, chain: Tensor, cost: float, gamma: float) -> Tensor:
    """Return T v (S,): the better of the two at each state. Arguments as ``switching_q`` has them."""
    return switching_q(v, paid, chain, cost, gamma).amax(1)


def budgeted_operator(v: Tensor, paid: Tensor, chain: Tensor, cost: float, gamma: float) -> Tensor:
    """Return T v (n + 1, S) where ``v`` (n + 1, S) has a row for each number of central steps that are left; with none
    left there is no choice."""
    price = torch.tensor([0.0, cost], dtype=v.dtype)
    alone, central = (paid - price).T
    stay = alone + gamma * v @ chain[0].T
    spend = central + gamma * v[:-1] @ chain[1].T
    return torch.cat((stay[:1], torch.maximum(stay[1:], spend)))


def intervenes(q: Tensor) -> Tensor:
    """Return where (S,) the team pays: Q(s, 1) > Q(s, 0), the threshold form."""
    return q[..., 1] > q[..., 0]


def learn_table(
    q: Tensor, state: Tensor, calls: Tensor, reward: Tensor, after: Tensor, rate: float, cost: float, gamma: float
) -> None:
    """Do one step of Q-learning on r - c g in the table ``q`` (S, 2), from B transitions that are learnt one by one."""
    for s, g, r, t in zip(state.tolist(), calls.long().tolist(), reward.tolist(), after.tolist(), strict=True):
        q[s, g] += rate * (r - cost * g + gamma * float(q[t].max()) - q[s, g])
