"""Adherence-aware advice: what it must satisfy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from rlopt.robust.advice import AdviceModel, best_within_budget, breakpoints, flappy_bird, ucb_ad
from rlopt.types import RloptError

FORMS = pytest.mark.parametrize("form", ["mixture", "conditional"])


def small(form="mixture", seed=0, states=3, actions=2, horizon=3):
    rng = np.random.default_rng(seed)
    model = AdviceModel(
        rng.dirichlet(np.ones(states), (states, actions)),
        rng.random((states, actions)),
        rng.dirichlet(np.ones(actions), (horizon, states)),
        horizon,
        rng.dirichlet(np.ones(states)),
        form,
    )
    return model, torch.from_numpy(rng.random((states, actions)))


def plain_optimum(model):
    value = torch.zeros(model.num_states, dtype=torch.float64)
    for _ in range(model.horizon):
        value = (model.reward + model.kernel @ value).amax(-1)
    return float(value @ model.initial)


@FORMS
def test_what_is_done_after_advice_is_a_distribution(form):
    model, theta = small(form, actions=3)
    model.human = model.human.clone()
    model.human[0, 0] = torch.tensor([1.0, 0.0, 0.0])  # advised what he does anyway, or refusing it with nothing else
    for h in range(3):
        law = model.executed(h, theta)
        assert law.shape == (3, 4, 3) and float(law.min()) >= 0.0
        torch.testing.assert_close(law.sum(-1), torch.ones(3, 4, dtype=torch.float64))
    s, a = 1, 2
    pi, t = model.human[1, s], float(theta[s, a])
    other = (1 - t) * pi[0] / (pi[0] + pi[1]) if form == "conditional" else (1 - t) * pi[0]
    assert float(model.executed(1, theta)[s, a, 0]) == pytest.approx(float(other))
    if form == "conditional":
        assert float(model.executed(1, theta)[s, a, a]) == pytest.approx(t)


@FORMS
def test_backward_induction_equals_enumeration(form):
    model, theta = small(form, horizon=2)
    best = -np.inf
    for choice in itertools.product(range(3), repeat=6):
        advice = torch.tensor(choice).reshape(2, 3)
        best = max(best, float(model.evaluate(theta, advice)))
    plan = model.plan(theta)
    assert float(model.worth(plan)[0]) == pytest.approx(best)
    assert float(model.evaluate(theta, plan.advice)) == pytest.approx(best)


@FORMS
def test_obedience_is_the_ordinary_optimum_and_value_rises_with_it(form):
    for seed in range(5):
        model, theta = small(form, seed)
        worth = lambda t: float(model.worth(model.plan(t))[0])  # noqa: E731, B023
        assert worth(torch.ones_like(theta)) == pytest.approx(plain_optimum(model))
        alone = float(model.evaluate(theta, torch.full((3, 3), 2)))
        assert worth(theta) >= alone - 1e-12
        if form == "mixture":  # nobody listens: deferring is as good as anything
            silent = model.plan(torch.zeros_like(theta))
            assert float(model.worth(silent)[0]) == pytest.approx(alone) and float(silent.advice.min()) == 2
            low = 0.0
        else:  # the recalled form is monotone only where one obeys at least as often as one would act so anyway
            low = model.human.amax(0)
        values = [worth(low + t * (1.0 - low) * torch.ones_like(theta)) for t in (0.0, 0.2, 0.5, 0.8, 1.0)]
        assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))


def test_in_the_recalled_form_bad_advice_can_pay():
    """θ = 0: advising the action to be avoided pushes him off it."""
    model = AdviceModel([[[1.0], [1.0]]], [[0.0, 1.0]], [[0.5, 0.5]], 1, form="conditional")
    plan = model.plan(torch.zeros(1, 2, dtype=torch.float64))
    assert int(plan.advice[0, 0]) == 0 and float(plan.value[0, 0]) == 1.0


def test_the_price_of_advice():
    """V*_β falls, is convex and piecewise linear, with minus the expected advices as slope."""
    model, theta = small(horizon=4)
    grid = np.linspace(0.0, 1.0, 201)
    worth = [model.worth(model.plan(theta, float(b))) for b in grid]
    value, count = (np.array([float(w[i]) for w in worth]) for i in (0, 1))
    assert (np.diff(value) <= 1e-12).all() and (np.diff(value, 2) >= -1e-9).all() and (np.diff(count) <= 1e-9).all()
    same = np.abs(np.diff(count)) < 1e-12
    np.testing.assert_allclose((np.diff(value) / np.diff(grid))[same], -count[:-1][same], atol=1e-9)
    pieces = breakpoints(model, theta)
    assert pieces[0][0] == 0.0 and pieces[-1][2] == 0.0
    for b, v in zip(grid, value, strict=True):
        piece = max(p for p in pieces if p[0] <= b)
        assert piece[1] - piece[2] * (b - piece[0]) == pytest.approx(v, abs=1e-8)


def test_the_budgeted_optimum_is_the_linear_program(oracles):
    """max reward over occupancies with an expected number of advices at most the budget."""
    model, theta = small(horizon=3)
    S, X, H = 3, 3, 3
    index = lambda h, s, x: (h * S + s) * X + x  # noqa: E731
    reward, advices = np.zeros(H * S * X), np.zeros(H * S * X)
    flow, right = np.zeros((H * S, H * S * X)), np.zeros(H * S)
    right[:S] = model.initial.numpy()
    for h in range(H):
        law = model.executed(h, theta)
        r, p = (law @ model.reward[..., None])[..., 0].numpy(), torch.einsum("sxa,sat->sxt", law, model.kernel).numpy()
        for s, x in itertools.product(range(S), range(X)):
            i = index(h, s, x)
            reward[i], advices[i] = r[s, x], float(x < 2)
            flow[h * S + s, i] += 1.0
            if h + 1 < H:
                flow[(h + 1) * S : (h + 2) * S, i] -= p[s, x]
    for budget in (0.0, 0.4, 1.0, 1.7, 3.0):
        lp = oracles.optimize.linprog(-reward, A_ub=advices[None], b_ub=[budget], A_eq=flow, b_eq=right)
        assert best_within_budget(model, theta, budget)[0] == pytest.approx(-lp.fun, abs=1e-8)
    with pytest.raises(RloptError, match="budget"):
        best_within_budget(model, theta, -1.0)


def test_robust_advice_is_the_worst_end_of_every_row():
    """Its value is the least over all adherences of its own advice, and no more than the optimum of any of them."""
    model, _ = small(seed=3)
    low, high = torch.full((3, 2), 0.3, dtype=torch.float64), torch.full((3, 2), 0.9, dtype=torch.float64)
    plan = model.plan_robust(low, high)
    robust = float(model.worth(plan)[0])
    rng = np.random.default_rng(0)
    for _ in range(30):
        theta = torch.from_numpy(rng.uniform(0.3, 0.9, (3, 2)))
        assert robust <= float(model.evaluate(theta, plan.advice)) + 1e-12
    assert robust <= float(model.worth(model.plan(low))[0]) + 1e-12
    certain = model.plan_robust(high, high)
    torch.testing.assert_close(certain.value, model.plan(high).value)


@pytest.mark.parametrize("human", ["greedy", "fixed"])
def test_flappy_bird_needs_advice_at_few_steps(human):
    model, theta = flappy_bird(human=human)
    alone = float(model.evaluate(theta, torch.full((20, 141), 2)))
    best, count = (float(x) for x in model.worth(model.plan(theta)))
    assert plain_optimum(model) > best > alone + 1.0
    pieces = breakpoints(model, theta)
    cheap = max((p for p in pieces if p[1] + p[0] * p[2] >= alone + 0.9 * (best - alone)), key=lambda p: p[0])
    assert cheap[2] < count  # nine tenths of the gain with fewer advices


def test_learning_adherence_approaches_the_optimum():
    model, theta = flappy_bird(human="fixed")
    learnt = ucb_ad(model, theta, 150, runs=4)
    assert bool((learnt.value <= learnt.optimum + 1e-9).all())
    regret = learnt.optimum - learnt.value.mean(1)
    assert float(regret[-30:].mean()) < 0.1 * (learnt.optimum - float(model.evaluate(theta, torch.full((20, 141), 2))))
    assert bool((learnt.estimate >= theta - 0.05).all())  # optimism holds
    again = ucb_ad(model, theta, 2, runs=4)
    assert torch.equal(again.value[0], learnt.value[0])


def test_mistakes_are_told_in_one_line():
    for call, words in [
        (lambda: AdviceModel(np.ones((2, 2, 2)), np.ones((2, 2)), np.ones((2, 2)) / 2, 3), "kernel has rows"),
        (lambda: AdviceModel(np.ones((2, 2)), np.ones((2, 2)), np.ones((2, 2)) / 2, 3), r"kernel must be \(2, 2, 2\)"),
        (lambda: flappy_bird(human="angry"), "greedy or fixed"),
        (lambda: flappy_bird(form="other"), "mixture or conditional"),
    ]:
        with pytest.raises(RloptError, match=words):
            call()
