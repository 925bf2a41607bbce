"""Tabular Markov decision processes, ordinary and robust."""

from rlopt.robust.kernel import Kernel
from rlopt.robust.mdp import (
    TabularMDP,
    action_values,
    bellman_policy,
    discounted_bounds,
    expected_reward,
    from_toy_text,
    greedy,
    policy_value,
)
from rlopt.robust.model import RobustMDP
from rlopt.robust.parametric import ParametricSet, solve_parametric
from rlopt.robust.sets.ambiguity import Ambiguity, Nominal
from rlopt.robust.sets.divergence import KL, ChiSquared
from rlopt.robust.sets.interval import Contamination, Interval, LInf
from rlopt.robust.sets.l1 import L1, StateL1
from rlopt.robust.solvers.solve import Solution, make_solver, solve

__all__ = [
    "KL",
    "L1",
    "Ambiguity",
    "ChiSquared",
    "Contamination",
    "Interval",
    "Kernel",
    "LInf",
    "Nominal",
    "ParametricSet",
    "RobustMDP",
    "Solution",
    "StateL1",
    "TabularMDP",
    "action_values",
    "bellman_policy",
    "discounted_bounds",
    "expected_reward",
    "from_toy_text",
    "greedy",
    "make_solver",
    "policy_value",
    "solve",
    "solve_parametric",
]
