"""Gradients = finite differences, flow identities, the adversary, and the paper's inequalities."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from rlopt.robust import (
    KL,
    L1,
    ChiSquared,
    Contamination,
    LInf,
    Nominal,
    RobustMDP,
    StateL1,
    discounted_bounds,
)
from rlopt.robust.bellman import (
    action_values,
    ascend,
    best_response,
    kernel_gradient,
    objective,
    occupancy,
    policy_gradient,
    policy_value,
    robust_step,
    worst_case,
)
from rlopt.robust.simplex import project_simplex

GAMMA = 0.9


@pytest.fixture
def small(random_mdp):
    return random_mdp(lambda r: L1(0.6 * r(2, 5, 3)))


def random_policy(rand, shape=(2, 5, 3)):
    x = rand(*shape) + 0.05
    return x / x.sum(-1, keepdim=True)


def random_rows(m, rand):
    return m.ambiguity.project(m.kernel.probabilities + 0.5 * rand(*m.kernel.probabilities.shape) * m.kernel.mask)


def cost_of(m, policy, rows):
    return objective(m, policy_value(m, policy, rows))


def test_gradients_equal_finite_differences(small):
    """Along the extension of J off the simplex by its linear solve, central steps of 1e-6."""
    m, rand = small
    policy, rows = random_policy(rand), random_rows(m, rand)
    value = policy_value(m, policy, rows)
    h = 1e-6
    for x, gradient, other in [
        (policy, policy_gradient(m, policy, rows, value), lambda x: cost_of(m, x, rows)),
        (rows, kernel_gradient(m, policy, rows, value), lambda x: cost_of(m, policy, x)),
    ]:
        for _ in range(5):
            d = (rand(*x.shape) - 0.5) * (m.kernel.mask if x is rows else 1.0)
            slope = (other(x + h * d) - other(x - h * d)) / (2 * h)
            torch.testing.assert_close((gradient * d).flatten(1).sum(1), slope, rtol=1e-6, atol=1e-7)


def test_flow_identities(small):
    m, rand = small
    policy, rows = random_policy(rand), random_rows(m, rand)
    d, value = occupancy(m, policy, rows), policy_value(m, policy, rows)
    torch.testing.assert_close(d.sum(-1), torch.ones(2, dtype=torch.float64))
    assert bool((d >= (1.0 - GAMMA) * m.initial - 1e-12).all())
    expected = (d * (policy * (rows * m.cost).sum(-1)).sum(-1)).sum(-1) / (1.0 - GAMMA)
    torch.testing.assert_close(objective(m, value), expected)
    torch.testing.assert_close((policy * action_values(m, rows, value)).sum(-1), value)


SETS = [L1(0.4), StateL1(0.7), LInf(0.15), KL(0.1), ChiSquared(0.2), Contamination(0.2)]


@pytest.mark.parametrize("ambiguity", SETS, ids=lambda s: type(s).__name__)
def test_the_adversary_is_exact_and_its_bound_true(random_mdp, ambiguity):
    """Policy iteration, projected ascent and a plain fixed-point iteration agree; no random kernel does better."""
    m, rand = random_mdp(lambda r: ambiguity)
    policy = random_policy(rand)
    exact = worst_case(m, policy, m.kernel.probabilities)
    value = torch.zeros(2, 5, dtype=torch.float64)
    for _ in range(400):
        value = robust_step(m, policy, value)[0]
    torch.testing.assert_close(exact.value, value, rtol=0, atol=1e-8)
    torch.testing.assert_close(exact.upper, value, rtol=0, atol=1e-8)
    torch.testing.assert_close(policy_value(m, policy, exact.rows), exact.value)
    assert float(m.ambiguity.excess(exact.rows).max()) < 1e-9
    for _ in range(20):
        assert bool((policy_value(m, policy, random_rows(m, rand)) <= exact.value + 1e-7).all())
    for tolerance in (1.0,) if isinstance(ambiguity, KL) else (1.0, 0.1):
        found = ascend(m, policy, m.kernel.probabilities, tolerance, 0.1, 500)
        gap = objective(m, exact.value) - objective(m, found.value)
        assert bool((gap <= tolerance).all()) and bool(
            (objective(m, found.upper) >= objective(m, exact.value) - 1e-9).all()
        )
        assert bool((objective(m, found.upper) - objective(m, found.value) <= tolerance + 1e-9).all())
        rough = worst_case(m, policy, m.kernel.probabilities, tolerance)
        assert bool((objective(m, exact.value) - objective(m, rough.value) <= tolerance).all())
        assert bool((rough.steps <= exact.steps).all())
    again = worst_case(m, policy, exact.rows)
    assert int(again.steps.max()) <= 1  # a warm start at the answer


SETS = [lambda r: L1(0.6 * r(2, 5, 3)), lambda r: StateL1(1.5 * r(2, 5)), lambda r: LInf(0.2), lambda r: KL(0.3),
        lambda r: ChiSquared(0.3), lambda r: Contamination(0.2)]  # fmt: skip


@pytest.mark.parametrize("make", SETS, ids=["l1", "state_l1", "linf", "kl", "chi2", "contamination"])
def test_the_bellman_operator_contracts_and_bounds_its_fixed_point(random_mdp, make):
    m, rand = random_mdp(make)
    for _ in range(10):
        v, w = 20.0 * rand(2, 5), 20.0 * rand(2, 5)
        change = (m.backup(v).value - m.backup(w).value).abs().amax(-1)
        assert bool((change <= GAMMA * (v - w).abs().amax(-1) + 1e-12).all())
    fixed = v
    for _ in range(600):
        fixed = m.backup(fixed).value
    residual = (m.backup(v).value - v).abs().amax(-1)
    assert bool(((fixed - v).abs().amax(-1) <= residual / (1.0 - GAMMA) + 1e-9).all())


def test_best_response_is_the_ordinary_optimum_and_bounds_the_robust_one(small):
    m, rand = small
    rows = random_rows(m, rand)
    _, lower = best_response(m, rows)
    each = torch.stack([
        cost_of(m, torch.nn.functional.one_hot(torch.tensor(actions), 3).double().expand(2, 5, 3), rows)
        for actions in itertools.product(range(3), repeat=5)
    ])  # fmt: skip
    torch.testing.assert_close(lower, each.amin(0))
    robust = torch.zeros(2, 5, dtype=torch.float64)
    for _ in range(400):
        robust = m.backup(robust).value
    assert bool((lower <= objective(m, robust) + 1e-9).all())


def test_danskin(small):
    """With a unique worst kernel the directional derivative of Φ is ⟨∇_π J(π, p*), h⟩."""
    m, rand = small
    policy, h = random_policy(rand), 1e-6
    found = worst_case(m, policy, m.kernel.probabilities)
    gradient = policy_gradient(m, policy, found.rows, found.value)

    def robust(x):
        return objective(m, worst_case(m, x, found.rows).value)

    for _ in range(5):
        d = random_policy(rand) - policy
        slope = (robust(policy + h * d) - robust(policy)) / h
        inner = (gradient * d).flatten(1).sum(1)
        torch.testing.assert_close(slope, inner, rtol=1e-4, atol=1e-4)


def test_danskin_at_a_kink(two_state_chain):
    """Two equal actions share a budget. At half and half the adversary may attack either: Φ falls in no direction as
    its gradient under one attack says it does, and is steeper than the gradient in one of them."""
    kernel, cost, start = two_state_chain(2)
    m, h = RobustMDP(kernel, cost, 0.95, StateL1(0.4), start), 1e-6
    policy = m.uniform_policy()

    def robust(x):
        return objective(m, worst_case(m, x, m.kernel.probabilities).value)

    found = worst_case(m, policy, m.kernel.probabilities)
    gradient = policy_gradient(m, policy, found.rows, found.value)
    excess = []
    for sign in (1.0, -1.0):
        d = sign * torch.tensor([[[1.0, -1.0], [0.0, 0.0]]], dtype=torch.float64)
        slope = (robust(policy + h * d) - robust(policy)) / h
        excess.append(float(slope - (gradient * d).flatten(1).sum(1)))
    assert min(excess) >= -1e-4 and max(excess) > 1.0


def test_score_functions_estimate_both_gradients():
    """Monte-Carlo: Σ γ^t 1{s_t, a_t} G_t/π(a_t|s_t) and, for the kernel, Σ γ^t 1{s_t, a_t, s_t+1} (c + γ G_t+1)/p, over
    walks under a worst kernel, lie within 4 standard errors of the exact derivatives."""
    rng = np.random.default_rng(0)
    raw = rng.random((3, 2, 3)) + 0.5
    m = RobustMDP(raw / raw.sum(-1, keepdims=True), rng.random((3, 2, 3)), 0.7, L1(0.2), [0.5, 0.3, 0.2])
    policy = torch.tensor([[[0.3, 0.7], [0.6, 0.4], [0.5, 0.5]]], dtype=torch.float64)
    found = worst_case(m, policy, m.kernel.probabilities)
    rows, pi, cost = found.rows[0].numpy(), policy[0].numpy(), m.cost[0].numpy()
    assert rows.min() > 0.0
    walks, steps = 20_000, 60  # 0.7^60 = 5e-10
    at = np.zeros((steps + 1, walks), dtype=np.int64)
    action = np.zeros((steps, walks), dtype=np.int64)
    at[0] = rng.choice(3, walks, p=m.initial[0].numpy())
    for t in range(steps):
        action[t] = (rng.random(walks) > pi[at[t], 0]).astype(np.int64)
        at[t + 1] = (rng.random(walks)[:, None] > rows[at[t], action[t]].cumsum(-1)[:, :2]).sum(-1)
    by_policy, by_kernel = np.zeros((walks, 3, 2)), np.zeros((walks, 3, 2, 3))
    after, each = np.zeros(walks), np.arange(walks)
    for t in reversed(range(steps)):
        i = (at[t], action[t], at[t + 1])
        now = cost[i] + 0.7 * after
        by_policy[each, at[t], action[t]] += 0.7**t * now / pi[at[t], action[t]]
        by_kernel[(each, *i)] += 0.7**t * now / rows[i]
        after = now
    for estimate, exact in [
        (by_policy, policy_gradient(m, policy, found.rows, found.value)),
        (by_kernel, kernel_gradient(m, policy, found.rows, found.value)),
    ]:
        error = np.abs(estimate.mean(0) - exact[0].numpy())
        assert (error <= 4.0 * estimate.std(0) / walks**0.5).all()


def test_a_cut_search_returns_a_kernel_with_its_own_value(random_mdp):
    """After any number of improvements: value and bound are those of the rows that come back, and the bound is true."""
    m, rand = random_mdp(lambda r: StateL1(0.7), states=8)
    policy = random_policy(rand, (2, 8, 3))
    exact = worst_case(m, policy, m.kernel.probabilities)
    least = int(exact.steps.max())
    assert least > 1
    for limit in range(least):
        cut = worst_case(m, policy, m.kernel.probabilities, limit=limit)
        assert int(cut.steps.max()) == limit
        torch.testing.assert_close(cut.value, policy_value(m, policy, cut.rows))
        assert bool((exact.value <= cut.upper + 1e-9).all())


def test_a_cut_best_response_keeps_its_bound_true(random_mdp):
    """After any number of improvements the lower bound is that of the policy that comes back."""
    m, _ = random_mdp(lambda r: Nominal(), seed=18, states=12, actions=5, gamma=0.95)
    rows = m.kernel.probabilities
    optimum = best_response(m, rows)[1]
    for limit in range(5):
        found, lower = best_response(m, rows, limit)
        assert bool((lower <= optimum + 1e-9).all()) and bool((optimum <= cost_of(m, found, rows) + 1e-9).all())
        value = policy_value(m, found, rows)
        bounds = discounted_bounds(0.95, value, action_values(m, rows, value).amin(-1))
        torch.testing.assert_close(lower, objective(m, torch.minimum(bounds[0], value)))


def unit_model(random_mdp):
    """Costs in [0, 1], where the paper's constants are stated."""
    m, rand = random_mdp(lambda r: StateL1(0.8 * r(2, 5)))
    m.cost = m.cost / 5.0
    return m, rand


def test_lipschitz_smoothness_and_weak_convexity(random_mdp):
    m, rand = unit_model(random_mdp)
    states, actions = 5, 3
    lipschitz = math.sqrt(actions) / (1 - GAMMA) ** 2
    smooth = 2 * GAMMA * actions / (1 - GAMMA) ** 3
    lipschitz_p, smooth_p = math.sqrt(states) / (1 - GAMMA) ** 2, 2 * GAMMA * states / (1 - GAMMA) ** 3

    def robust(x):
        return objective(m, worst_case(m, x, m.kernel.probabilities).value)

    for _ in range(10):
        x, y = random_policy(rand), random_policy(rand)
        p, q = random_rows(m, rand), random_rows(m, rand)
        apart = (x - y).flatten(1).norm(dim=1)
        assert bool(((robust(x) - robust(y)).abs() <= lipschitz * apart).all())
        assert bool((robust(0.5 * (x + y)) <= 0.5 * (robust(x) + robust(y)) + smooth / 8 * apart**2).all())
        gradients = [policy_gradient(m, z, p, policy_value(m, z, p)) for z in (x, y)]
        assert bool(((gradients[0] - gradients[1]).flatten(1).norm(dim=1) <= smooth * apart).all())
        between = (p - q).flatten(1).norm(dim=1)
        assert bool(((cost_of(m, x, p) - cost_of(m, x, q)).abs() <= lipschitz_p * between + 1e-12).all())
        gradients = [kernel_gradient(m, x, z, policy_value(m, x, z)) for z in (p, q)]
        assert bool(((gradients[0] - gradients[1]).flatten(1).norm(dim=1) <= smooth_p * between + 1e-12).all())


def test_gradient_dominance(random_mdp):
    """Φ(π) - Φ* ≤ Σ d(s) r(s)/(1-γ) ≤ D/(1-γ) max ⟨∇J(π, p), π - π'⟩ for s-rectangular sets."""
    m, rand = unit_model(random_mdp)
    value = torch.zeros(2, 5, dtype=torch.float64)
    for _ in range(400):
        value = m.backup(value).value
    best = objective(m, value)
    mismatch = 1.0 / m.initial.amin(-1)
    for _ in range(15):
        policy = random_policy(rand)
        found = worst_case(m, policy, m.kernel.probabilities)
        gradient = policy_gradient(m, policy, found.rows, found.value)
        widest = ((policy * gradient).sum(-1) - gradient.amin(-1)).sum(-1)
        gap = objective(m, found.value) - best
        assert bool((gap >= -1e-9).all()) and bool((gap <= mismatch / (1 - GAMMA) * widest + 1e-9).all())


def test_one_step_inequality_of_the_outer_loop(random_mdp):
    """φ(π⁺) ≤ φ(π) + 2lα(ε - ‖∇φ‖²/(4l)) + lα²L² for the Moreau envelope φ, with the measured ε.

    The proximal point is found by projected subgradients of Φ(x) + l‖x - π‖², which is strongly convex.
    """
    m, rand = unit_model(random_mdp)
    lipschitz, smooth = math.sqrt(3) / (1 - GAMMA) ** 2, 2 * GAMMA * 3 / (1 - GAMMA) ** 3

    def envelope(centre):
        x, best, kept = centre.clone(), torch.full((2,), torch.inf, dtype=torch.float64), centre.clone()
        for i in range(120):
            found = worst_case(m, x, m.kernel.probabilities)
            now = objective(m, found.upper) + smooth * ((x - centre) ** 2).flatten(1).sum(1)
            kept = torch.where((now < best)[:, None, None], x, kept)
            best = torch.minimum(best, now)
            g = policy_gradient(m, x, found.rows, found.value) + 2 * smooth * (x - centre)
            x = project_simplex(x - g / (smooth * (i + 2)))
        return best, kept

    policy = random_policy(rand)
    for alpha, tolerance in [(1e-4, 0.0), (1e-3, 0.3), (1e-2, 0.05)]:
        rough = worst_case(m, policy, m.kernel.probabilities, tolerance)
        error = objective(m, worst_case(m, policy, rough.rows).upper) - objective(m, rough.value)
        step = project_simplex(policy - alpha * policy_gradient(m, policy, rough.rows, rough.value))
        before, proximal = envelope(policy)
        slope = 2 * smooth * (policy - proximal).flatten(1).norm(dim=1)
        bound = before + 2 * smooth * alpha * (error - slope**2 / (4 * smooth)) + smooth * alpha**2 * lipschitz**2
        assert bool((envelope(step)[0] <= bound + 1e-6).all())
        policy = step


def test_nominal_set_is_the_ordinary_mdp(random_mdp):
    m, rand = random_mdp(lambda r: Nominal())
    policy = random_policy(rand)
    found = worst_case(m, policy, m.kernel.probabilities)
    torch.testing.assert_close(found.value, policy_value(m, policy, m.kernel.probabilities))
    assert int(found.steps.max()) == 0
