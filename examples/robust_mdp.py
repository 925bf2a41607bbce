"""Solve a robust MDP of one's own in a few lines: a machine that may wear out faster than was measured.

python examples/robust_mdp.py
"""

from __future__ import annotations

import torch

from rlopt.robust import L1, Nominal, RobustMDP, StateL1, solve
from rlopt.robust.bellman import objective, worst_case

# Three conditions of a machine (good, worn, broken) and two actions (run, repair), as transition probabilities.
KERNEL = [
    [[0.8, 0.2, 0.0], [1.0, 0.0, 0.0]],
    [[0.0, 0.95, 0.05], [0.9, 0.1, 0.0]],
    [[0.0, 0.0, 1.0], [0.7, 0.0, 0.3]],
]
COST = [[0.0, 3.0], [0.2, 3.0], [10.0, 8.0]]
START = [1.0, 0.0, 0.0]


def main() -> None:
    plain = RobustMDP(KERNEL, COST, gamma=0.95, ambiguity=Nominal(), initial=START)
    optimistic = solve(plain, "partial_policy_iteration")
    for ambiguity in (L1(0.3), StateL1(0.4)):
        m = plain.replace(ambiguity)
        exposed = objective(m, worst_case(m, optimistic.policy[None], m.kernel.probabilities).value)
        robust = solve(m, "partial_policy_iteration", tolerance=1e-6)
        print(type(ambiguity).__name__)
        print(f"  nominal policy: {float(optimistic.upper):.3f} as measured, {float(exposed):.3f} in its worst case")
        print(f"  robust policy:  {float(robust.upper):.3f} in its worst case, certified to {float(robust.gap):.0e}")
        for name, row in zip(("good", "worn", "broken"), robust.policy.tolist(), strict=True):
            print(f"    {name:<7} run {row[0]:.2f}  repair {row[1]:.2f}")
    # The paper's method on the same model: first order, so slower, but for any set that one can project on.
    m = plain.replace(L1(0.3))
    drpg = solve(m, "drpg", iterations=300, step_size=0.2)
    print(f"DRPG after {len(drpg.history['value'])} iterations: {float(drpg.upper):.6f}")
    assert torch.all(drpg.lower <= drpg.upper + 1e-9)


if __name__ == "__main__":
    main()
