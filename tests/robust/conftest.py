"""Random robust MDPs, and what scipy's solvers say about one row or one state of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlopt.robust import Kernel, RobustMDP


def random_mdp(make_set, seed=0, instances=2, states=5, actions=3, holes=0.4, gamma=0.9, narrow=False, **kwargs):
    """A random model whose rows lead to varying successors; ``make_set(rand)`` draws the ambiguity set."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    shape = (instances, states, actions, states)
    kernel = rand(*shape) * (rand(*shape) > holes)
    kernel[..., 0] += 0.1
    kernel /= kernel.sum(-1, keepdim=True)
    cost = 5.0 * rand(*(shape[:3] if narrow else shape))
    initial = rand(instances, states) + 0.1
    initial /= initial.sum(-1, keepdim=True)
    return RobustMDP(kernel, cost, gamma, make_set(rand), initial, **kwargs), rand


class Oracles:
    """Linear and quadratic programs by scipy."""

    def __init__(self):
        self.optimize = pytest.importorskip("scipy.optimize")

    def row_lp(self, z, p, weight, radius):
        """max z·p over one L1 ball."""
        n, eye = len(z), np.eye(len(z))
        ball = np.r_[np.c_[eye, -eye], np.c_[-eye, -eye], np.c_[np.zeros((1, n)), weight[None]]]
        result = self.optimize.linprog(
            np.r_[-z, np.zeros(n)],
            A_ub=ball,
            b_ub=np.r_[p, -p, radius],
            A_eq=np.r_[np.ones(n), np.zeros(n)][None],
            b_eq=[1.0],
        )
        assert result.status == 0
        return -result.fun

    def state_lp(self, z, p, mask, weight, radius):
        """min_x max_p over the joint L1 ball of a state: by the dual program. Returns value and x."""
        actions, n = z.shape
        size = actions * n
        cost = np.r_[np.zeros(actions), np.ones(actions), p.ravel(), -p.ravel(), radius]
        rows = []
        for a, i in zip(*mask.nonzero(), strict=True):
            at = a * n + i
            first, second = np.zeros((2, len(cost)))
            first[[a, actions + a, 2 * actions + at, 2 * actions + size + at]] = z[a, i], -1.0, -1.0, 1.0
            second[[2 * actions + at, 2 * actions + size + at, -1]] = 1.0, 1.0, -weight[a, i]
            rows += [first, second]
        result = self.optimize.linprog(
            cost,
            A_ub=np.array(rows),
            b_ub=np.zeros(len(rows)),
            A_eq=np.r_[np.ones(actions), np.zeros(len(cost) - actions)][None],
            b_eq=[1.0],
            bounds=[(0, None)] * actions + [(None, None)] * actions + [(0, None)] * (2 * size + 1),
        )
        assert result.status == 0
        return result.fun, result.x[:actions]

    def nearest(self, y, start, inequalities):
        """The distribution nearest to y with every g(x) >= 0 of ``inequalities``; smooth variables only."""
        result = self.optimize.minimize(
            lambda x: 0.5 * ((x - y) ** 2).sum(),
            start,
            jac=lambda x: x - y,
            bounds=[(0.0, 1.0)] * len(y),
            constraints=[{"type": "eq", "fun": lambda x: x.sum() - 1.0}]
            + [{"type": "ineq", "fun": g} for g in inequalities],
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 1000},
        )
        return result.x

    def nearest_l1(self, y, p, weight, radius, groups):
        """The point nearest to y (n,), with Σ w|x - p| <= radius and every group of coordinates summing to 1.

        x = p + u - v with u, v >= 0 makes it smooth.
        """
        n = len(y)
        totals = [{"type": "eq", "fun": lambda x, g=g: (p + x[:n] - x[n:])[g].sum() - 1.0} for g in groups]
        result = self.optimize.minimize(
            lambda x: 0.5 * ((p + x[:n] - x[n:] - y) ** 2).sum(),
            np.zeros(2 * n),
            bounds=[(0.0, 2.0)] * n + [(0.0, float(b)) for b in p],
            constraints=[*totals, {"type": "ineq", "fun": lambda x: radius - (np.r_[weight, weight] * x).sum()}],
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 1000},
        )
        return p + result.x[:n] - result.x[n:]


@pytest.fixture
def oracles():
    return Oracles()


@pytest.fixture(name="random_mdp")
def _random_mdp():
    return random_mdp


def two_state_chain(actions: int = 1):
    """State 1 is absorbing at cost 1, state 0 costs nothing and is kept with probability 0.9."""
    kernel = np.zeros((2, actions, 2))
    kernel[0], kernel[1] = [0.9, 0.1], [0.0, 1.0]
    return Kernel.from_dense(kernel), np.array([[0.0] * actions, [1.0] * actions]), [1.0, 0.0]


@pytest.fixture(name="two_state_chain")
def _two_state_chain():
    return two_state_chain
