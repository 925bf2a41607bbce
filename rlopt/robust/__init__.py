"""Tabular Markov decision processes."""

from rlopt.robust.mdp import (
    TabularMDP,
    action_values,
    bellman_policy,
    discounted_bounds,
    from_toy_text,
    greedy,
    policy_value,
)

__all__ = [
    "TabularMDP",
    "action_values",
    "bellman_policy",
    "discounted_bounds",
    "from_toy_text",
    "greedy",
    "policy_value",
]
