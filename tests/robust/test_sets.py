"""The other sets: intervals, L∞, contamination, KL, χ², against scipy and closed forms; projections; nesting."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlopt.robust import KL, L1, ChiSquared, Contamination, Interval, LInf, Nominal, StateL1
from rlopt.robust.simplex import project_box, project_l1_ball, project_simplex
from rlopt.types import RloptError

ROWS = list(np.ndindex(2, 5, 3))
SETS = {
    "linf": lambda r: LInf(0.3 * r(2, 5, 3)),
    "contamination": lambda r: Contamination(r(2, 5, 3)),
    "kl": lambda r: KL(0.5 * r(2, 5, 3)),
    "chi2": lambda r: ChiSquared(2.0 * r(2, 5, 3)),
}


def targets(m, rand):
    return m.targets(10.0 * rand(2, 5))


@pytest.mark.parametrize("name", ["linf", "contamination"])
def test_interval_sets_equal_the_linear_program(random_mdp, oracles, name):
    m, rand = random_mdp(SETS[name])
    z = targets(m, rand)
    value, rows = m.ambiguity.worst(z)
    low, high = m.ambiguity.low, m.ambiguity.high
    for i in ROWS:
        ends = np.stack([low[i].numpy(), high[i].numpy()], 1)
        truth = oracles.optimize.linprog(-z[i].numpy(), A_eq=np.ones((1, len(z[i]))), b_eq=[1.0], bounds=ends)
        assert float(value[i]) == pytest.approx(-truth.fun, abs=1e-11)
    assert float(m.ambiguity.excess(rows).max()) < 1e-12
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(value))


def test_contamination_in_closed_form(random_mdp):
    """The worst row is (1 - R) p̂ + R·1{argmax z}; R = 0 is the nominal MDP."""
    m, rand = random_mdp(lambda r: Contamination(0.3))
    z = targets(m, rand)
    top = z.masked_fill(~m.kernel.mask, -torch.inf).amax(-1)
    truth = 0.7 * (m.kernel.probabilities * z).sum(-1) + 0.3 * top
    torch.testing.assert_close(m.ambiguity.worst(z)[0], truth)
    nominal = (m.kernel.probabilities * z).sum(-1)
    torch.testing.assert_close(m.replace(Contamination(0.0)).ambiguity.worst(z)[0], nominal)


def test_linf_is_the_ball_of_its_name(random_mdp):
    m, rand = random_mdp(lambda r: LInf(0.2))
    rows = m.ambiguity.worst(targets(m, rand))[1]
    assert float((rows - m.kernel.probabilities).abs().max()) <= 0.2 + 1e-12


@pytest.mark.parametrize("name", ["kl", "chi2"])
def test_divergence_balls_equal_their_duals(random_mdp, oracles, name):
    """KL: min_λ λκ + λ log Σ p̂ exp(z/λ). χ²: scipy's maximiser over the ball."""
    m, rand = random_mdp(SETS[name])
    z = targets(m, rand)
    value, rows = m.ambiguity.worst(z)
    for i in ROWS:
        inside = (m.kernel.probabilities[i] > 0).numpy()
        p, x, kappa = m.kernel.probabilities[i].numpy()[inside], z[i].numpy()[inside], float(m.ambiguity.radius[i])
        if name == "kl":
            top = x.max()

            def dual(log_price, p=p, x=x, top=top, kappa=kappa):
                t = np.exp(log_price)
                return t * kappa + top + t * np.log((p * np.exp((x - top) / t)).sum())

            best = oracles.optimize.minimize_scalar(
                dual, bounds=(-12.0, 12.0), method="bounded", options={"xatol": 1e-12}
            )
            truth = best.fun
        else:
            start, scale = p.copy(), np.abs(x).max()
            best = oracles.optimize.minimize(
                lambda q, x=x, scale=scale: -(q * x).sum() / scale,
                start,
                bounds=[(0.0, 1.0)] * len(p),
                constraints=[
                    {"type": "eq", "fun": lambda q: q.sum() - 1.0},
                    {"type": "ineq", "fun": lambda q, p=p, kappa=kappa: kappa - ((q - p) ** 2 / p).sum()},
                ],
                method="SLSQP",
                options={"ftol": 1e-14, "maxiter": 1000},
            )
            truth = -best.fun * scale
        assert float(value[i]) == pytest.approx(truth, abs=2e-6)
    assert float(m.ambiguity.excess(rows).max()) < 1e-9
    assert float((rows.sum(-1) - 1.0).abs().max()) < 1e-12 and float(rows.min()) >= 0.0


@pytest.mark.parametrize("cls", [KL, ChiSquared])
def test_a_large_divergence_ball_allows_the_single_worst_successor(random_mdp, cls):
    m, rand = random_mdp(lambda r: cls(1e6))
    z = targets(m, rand)
    top = z.masked_fill(m.kernel.probabilities == 0.0, -torch.inf).amax(-1)
    torch.testing.assert_close(m.ambiguity.worst(z)[0], top)
    none = m.replace(cls(0.0))
    torch.testing.assert_close(none.ambiguity.worst(z)[0], (m.kernel.probabilities * z).sum(-1), rtol=0, atol=1e-9)


def test_chi_squared_by_hand(random_mdp):
    """p̂ = (1/2, 1/2), z = (0, 1): p = (1/2 - d, 1/2 + d) with χ² = 4 d², so the worst is 1/2 + √κ/2."""
    from rlopt.robust import RobustMDP

    m = RobustMDP(np.full((2, 1, 2), 0.5), [[0.0], [0.0]], 0.5, ChiSquared(0.16))
    value, rows = m.ambiguity.worst(torch.tensor([0.0, 1.0], dtype=torch.float64).expand(1, 2, 1, 2))
    torch.testing.assert_close(value, torch.full((1, 2, 1), 0.7, dtype=torch.float64))
    assert rows[0, 0, 0].tolist() == pytest.approx([0.3, 0.7])


@pytest.mark.parametrize("name", list(SETS))
def test_projections_equal_the_quadratic_program(random_mdp, oracles, name):
    m, rand = random_mdp(SETS[name])
    p = m.kernel.probabilities
    y = p + 0.6 * (rand(*p.shape) - 0.5)
    x = m.ambiguity.project(y)
    assert float(m.ambiguity.excess(x).max()) < 1e-8
    assert float((x.sum(-1) - 1.0).abs().max()) < 1e-9 and float(x.min()) >= 0.0
    for i in ROWS[::4]:
        inside = (p[i] > 0).numpy() if name in ("kl", "chi2") else m.kernel.mask[i].numpy()
        own, kappa = p[i].numpy()[inside], m.ambiguity.radius[i] if name != "contamination" else None
        if name == "kl":
            rule = [lambda q, own=own, kappa=kappa: float(kappa) - (q * np.log(np.maximum(q, 1e-15) / own)).sum()]
        elif name == "chi2":
            rule = [lambda q, own=own, kappa=kappa: float(kappa) - ((q - own) ** 2 / own).sum()]
        else:
            low, high = m.ambiguity.low[i].numpy()[inside], m.ambiguity.high[i].numpy()[inside]
            rule = [lambda q, low=low: q - low, lambda q, high=high: high - q]
        truth = oracles.nearest(y[i].numpy()[inside], own, rule)
        np.testing.assert_allclose(x[i].numpy()[inside], truth, atol=2e-5)


@pytest.mark.parametrize("name", ["l1", "state_l1", *SETS])
def test_every_set_grows_with_its_radius_and_holds_the_nominal_kernel(random_mdp, name):
    """κ = 0 is the nominal operator, and κ ↑ ⇒ value ↑."""
    kinds = {"l1": L1, "state_l1": StateL1, "linf": LInf, "contamination": Contamination, "kl": KL, "chi2": ChiSquared}
    m, rand = random_mdp(lambda r: Nominal())
    value = 10.0 * rand(2, 5)
    last = m.backup(value).value
    torch.testing.assert_close(m.replace(kinds[name](0.0)).backup(value).value, last, rtol=0, atol=1e-9)
    for radius in (0.05, 0.2, 0.6, 1.0):
        now = m.replace(kinds[name](radius)).backup(value).value
        assert bool((now >= last - 1e-9).all()) and bool((now > last + 1e-6).any())
        last = now


def test_the_whole_simplex_is_the_largest_next_state(random_mdp):
    """κ ≥ 2 on full support: v = max over all next states of c + γ v."""
    m, rand = random_mdp(lambda r: L1(2.0), support="all")
    value = 10.0 * rand(2, 5)
    torch.testing.assert_close(m.backup(value).value, m.targets(value).amax(-1).amin(-1))


def test_simplex_projection_invariants(random_mdp):
    rand = random_mdp(lambda r: Nominal())[1]
    y = 4.0 * rand(50, 7) - 2.0
    x = project_simplex(y)
    torch.testing.assert_close(x.sum(-1), torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(project_simplex(x), x)
    assert torch.equal(x.gather(-1, y.argsort(-1)).diff(dim=-1) >= -1e-15, torch.ones(50, 6, dtype=torch.bool))
    torch.testing.assert_close(project_simplex(y + 3.0), x)
    some = rand(50, 7) > 0.3
    some[:, 0] = True
    assert float(project_simplex(y, some)[~some].abs().max()) == 0.0
    # On the whole box [0, 1] the two algorithms solve the same problem.
    torch.testing.assert_close(project_box(y, torch.zeros_like(y), torch.ones_like(y)), x, rtol=0, atol=1e-12)


def test_projection_on_an_l1_ball_by_hand():
    """(3, 1) on the unit ball around 0 is (1, 0); (0.75, 0.75) is (1/2, 1/2); what lies inside stays."""
    y = torch.tensor([[3.0, 1.0], [0.75, 0.75], [0.1, -0.2]], dtype=torch.float64)
    x = project_l1_ball(y, torch.zeros(2, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(x, torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.1, -0.2]], dtype=torch.float64))


def test_mistakes_are_told_in_one_line(random_mdp):
    for make, words in [
        (lambda r: Interval(0.5, 1.0), "nominal kernel lies outside"),
        (lambda r: Contamination(1.5), "between 0 and 1"),
        (lambda r: KL(float("nan")), "radius must lie"),
    ]:
        with pytest.raises(RloptError, match=words):
            random_mdp(make)
