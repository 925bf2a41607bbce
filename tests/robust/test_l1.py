"""L1 sets: greedy = linear program, bisection = joint program, knapsack, projections = quadratic program."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from rlopt.robust import L1, Kernel, Nominal, RobustMDP, StateL1, sweeps
from rlopt.types import RloptError

WEIGHTED = pytest.mark.parametrize("weighted", [False, True])


def weights(rand, weighted):
    return 2.0 * rand(5) + 0.1 if weighted else None


def state_set(rand, weighted):
    """Budgets from nothing to more than everything."""
    radius = 1.5 * rand(2, 5)
    radius[0, 0], radius[0, 1], radius[1, 0] = 0.0, 9.0, 1e-3
    return StateL1(radius, weights(rand, weighted))


def model(random_mdp, kind, weighted, seed=0, **kwargs):
    def make(rand):
        if kind is StateL1:
            return state_set(rand, weighted)
        radius = 1.3 * rand(2, 5, 3)
        radius[0, 0], radius[1, 1] = 0.0, 2.0
        return L1(radius, weights(rand, weighted))

    return random_mdp(make, seed, **kwargs)


def row_weight(m, *index):
    w = m.ambiguity.weight
    n = m.kernel.probabilities.shape[-1]
    return np.ones(n) if w is None else w[index].numpy()


@WEIGHTED
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_equals_the_linear_program(random_mdp, oracles, weighted, seed):
    m, rand = model(random_mdp, L1, weighted, seed)
    z = m.targets(10.0 * rand(2, 5))
    value, rows = m.ambiguity.worst(z)
    for i in np.ndindex(2, 5, 3):
        n = int(m.kernel.count[i])
        p, w = m.kernel.probabilities[i][:n].numpy(), row_weight(m, *i)[:n]
        truth = oracles.row_lp(z[i][:n].numpy(), p, w, float(m.ambiguity.radius[i]))
        assert float(value[i]) == pytest.approx(truth, abs=1e-11)
    torch.testing.assert_close((rows * z).sum(-1), value, rtol=0, atol=1e-12)
    assert float(m.ambiguity.excess(rows).max()) < 1e-12
    assert float(rows.min()) >= 0.0 and float((rows.sum(-1) - 1.0).abs().max()) < 1e-12
    assert float((rows * ~m.kernel.mask).max()) == 0.0


@WEIGHTED
@pytest.mark.parametrize("seed", [0, 1])
def test_bisection_equals_the_joint_linear_program(random_mdp, oracles, weighted, seed):
    m, rand = model(random_mdp, StateL1, weighted, seed)
    value = 10.0 * rand(2, 5)
    z, backup = m.targets(value), m.backup(value)
    for i in np.ndindex(2, 5):
        w = np.stack([row_weight(m, *i, a) for a in range(3)])
        p, mask = m.kernel.probabilities[i].numpy(), m.kernel.mask[i].numpy()
        truth, _ = oracles.state_lp(z[i].numpy(), p, mask, w, float(m.ambiguity.radius[i]))
        assert float(backup.value[i]) == pytest.approx(truth, abs=1e-11)
    # Both sides of the saddle: the policy is worth no more against its own worst rows, the rows no less to any action.
    answer = m.ambiguity.respond(z, backup.policy)
    torch.testing.assert_close((backup.policy * (answer * z).sum(-1)).sum(-1), backup.value, rtol=0, atol=1e-11)
    torch.testing.assert_close((backup.rows * z).sum(-1).amin(-1), backup.value, rtol=0, atol=1e-11)
    for rows in (backup.rows, answer):
        assert float(m.ambiguity.excess(rows).max()) < 1e-12 and float(rows.min()) >= 0.0
    assert bool(((backup.policy > 1e-9).sum(-1) > 1).any()), "some state should randomise"


@WEIGHTED
def test_the_knapsack_equals_the_linear_program(random_mdp, oracles, weighted):
    """One budget for all rows of a state, each worth π(a) z: the same program, on the rows laid end to end."""
    m, rand = model(random_mdp, StateL1, weighted)
    z = m.targets(10.0 * rand(2, 5))
    policy = rand(2, 5, 3) + 1e-3
    policy[0, 2] = torch.tensor([1.0, 0.0, 0.0])
    policy /= policy.sum(-1, keepdim=True)
    worth = (policy * (m.ambiguity.respond(z, policy) * z).sum(-1)).sum(-1)
    linprog = oracles.optimize.linprog
    for i in np.ndindex(2, 5):
        mask = m.kernel.mask[i].numpy()
        p, w = m.kernel.probabilities[i].numpy()[mask], np.stack([row_weight(m, *i, a) for a in range(3)])[mask]
        gain = (policy[i][:, None] * z[i]).numpy()[mask]
        n, eye = len(p), np.eye(len(p))
        action = mask.nonzero()[0]
        ball = np.r_[np.c_[eye, -eye], np.c_[-eye, -eye], np.c_[np.zeros((1, n)), w[None]]]
        total = np.array([np.r_[action == a, np.zeros(n)] for a in range(3)], dtype=float)
        truth = linprog(np.r_[-gain, np.zeros(n)], A_ub=ball, b_ub=np.r_[p, -p, float(m.ambiguity.radius[i])],
                        A_eq=total, b_eq=np.ones(3))  # fmt: skip
        assert float(worth[i]) == pytest.approx(-truth.fun, abs=1e-11)


@pytest.mark.parametrize("kind", [L1, StateL1])
@pytest.mark.parametrize("shape", [{}, {"holes": 0.0}, {"holes": 0.0, "states": 60}, {"narrow": True}, {"holes": 0.9}])
def test_compiled_sweeps_equal_the_tensor_ones(random_mdp, monkeypatch, kind, shape):
    n = shape.get("states", 5)
    make = (lambda r: L1(1.3 * r(2, n, 3))) if kind is L1 else (lambda r: StateL1(1.5 * r(2, n)))
    m, rand = random_mdp(make, **shape)
    value = 10.0 * rand(2, n)
    fast, silent = m.backup(value), m.backup(value, rows=False)
    monkeypatch.setattr(sweeps, "ENABLED", False)
    slow = m.backup(value)
    torch.testing.assert_close(fast.value, slow.value, rtol=0, atol=1e-12)
    torch.testing.assert_close(fast.policy, slow.policy, rtol=0, atol=1e-9)
    torch.testing.assert_close(fast.rows, slow.rows, rtol=0, atol=1e-12)
    torch.testing.assert_close(silent.value, fast.value, rtol=0, atol=1e-12)
    assert silent.rows is None


@pytest.mark.parametrize("kind", [L1, StateL1])
@pytest.mark.parametrize("states", [3, 12, 24, 25, 70])
def test_actions_that_cannot_be_the_best_are_left_out_and_nothing_else(kind, states, monkeypatch):
    """Radii from none to all of the mass, ties, dense rows that end early; every action once the best of a state."""
    g = torch.Generator().manual_seed(states)

    def rand(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    count = torch.randint(2, states + 1, (8, states, 6), generator=g)
    p = rand(8, states, 6, states) * (torch.arange(states) < count[..., None])
    radius = (2.4 * rand(8, states, 6) - 0.2).clamp(0.0, 2.0)
    kernel = Kernel(p / p.sum(-1, keepdim=True), count=count)
    chosen = torch.zeros(6)
    for cost in (rand(8, states, 6, states), (4.0 * rand(8, states, 6, states)).round()):
        m = RobustMDP(kernel, cost, 0.9, kind(radius if kind is L1 else radius[..., 0]), per_successor=True)
        value = (5.0 * rand(8, states)).round()
        monkeypatch.setattr(sweeps, "ENABLED", True)
        fast, nominal = m.backup(value, rows=False), m.replace(Nominal()).backup(value, rows=False)
        monkeypatch.setattr(sweeps, "ENABLED", False)
        slow, ordinary = m.backup(value), m.replace(Nominal()).backup(value)
        torch.testing.assert_close(fast.value, slow.value, rtol=0, atol=1e-12)
        torch.testing.assert_close(nominal.value, ordinary.value, rtol=0, atol=1e-12)
        assert torch.equal(nominal.policy, ordinary.policy)
        if kind is L1:
            worst = (slow.rows * m.targets(value)).sum(-1)
            torch.testing.assert_close((fast.policy * worst).sum(-1), slow.value, rtol=0, atol=1e-12)
        chosen += fast.policy.sum((0, 1))
    assert bool((chosen > 0.0).all())


@pytest.mark.parametrize("kind", [L1, StateL1])
@pytest.mark.parametrize("states", [20, 60])
@pytest.mark.parametrize("spread", [30.0, 80.0])
def test_budgets_that_end_between_masses_of_all_sizes(kind, states, spread, monkeypatch):
    """Masses from one to e⁻⁸⁰, and budgets that are sums of some, to the last digit: the search's tangents all but
    coincide there."""
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    p = torch.exp(-spread * rand(40, states, 2, states))
    p = p / p.sum(-1, keepdim=True)
    cost, value = 1e-3 * rand(40, states, 2, states), 20.0 * rand(40, states)
    order = (cost + 0.9 * value[:, None, None]).argsort(-1)
    sums = p.gather(-1, order).cumsum(-1)
    radius = 2.0 * sums.gather(-1, torch.randint(states - 1, (40, states, 2, 1), generator=g))[..., 0].clamp(max=1.0)
    m = RobustMDP(p, cost, 0.9, kind(radius if kind is L1 else radius[..., 0]), per_successor=True)
    silent, fast = m.backup(value, rows=False), m.backup(value)
    monkeypatch.setattr(sweeps, "ENABLED", False)
    slow = m.backup(value)
    torch.testing.assert_close(silent.value, slow.value, rtol=0, atol=1e-10)
    torch.testing.assert_close(fast.value, slow.value, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", [L1, StateL1])
def test_a_value_that_is_not_finite_is_not_searched_for(kind):
    """Compiled code compares without regard to NaN."""
    p = torch.full((30, 2, 30), 1.0 / 30, dtype=torch.float64)
    m = RobustMDP(p, torch.zeros(30, 2), 0.9, kind(0.5))
    value = torch.zeros(1, 30, dtype=torch.float64)
    value[0, 3] = float("nan")
    assert bool(m.backup(value, rows=False).value.isnan().any())


@pytest.mark.parametrize("kind", [L1, StateL1])
@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize("radius", [0.0, 0.3, 1.1, 2.0])
def test_dense_rows_that_share_the_order_of_v_agree_with_tensors(kind, gamma, radius, monkeypatch):
    """Costs without a successor, in rows of 30 with some zeros and some ties of v."""
    g = torch.Generator().manual_seed(3)
    p = torch.rand(2, 30, 4, 30, dtype=torch.float64, generator=g)
    p = p * (torch.rand(p.shape, generator=g) < 0.7)
    cost = torch.rand(2, 30, 4, dtype=torch.float64, generator=g)
    m = RobustMDP(p / p.sum(-1, keepdim=True), cost, gamma, kind(radius))
    value = (10.0 * torch.rand(2, 30, dtype=torch.float64, generator=g)).round()
    fast = m.backup(value, rows=False)
    monkeypatch.setattr(sweeps, "ENABLED", False)
    slow = m.backup(value)
    torch.testing.assert_close(fast.value, slow.value, rtol=0, atol=1e-12)
    torch.testing.assert_close(fast.policy.sum(-1), torch.ones(2, 30, dtype=torch.float64))


@pytest.mark.parametrize("path", ["compiled", "tensor", "weighted"])
def test_rows_stay_in_the_set_where_targets_all_but_tie(path, monkeypatch):
    """Targets a few to some thousand roundings apart, by which a level of the game says nothing of a mass: rows and
    policy stay a saddle point of the set."""
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    monkeypatch.setattr(sweeps, "ENABLED", path == "compiled")
    ulp = float(np.spacing(20.0))
    for trial in range(60):
        p = rand(8, 5, 3, 5) * (rand(8, 5, 3, 5) > 0.4)
        p[..., 0] += 0.05
        w = (rand(5) + 0.2).round(decimals=1) if path == "weighted" else None
        cost = (1.2 * rand(8, 5, 3)).round() + 0.3 * (rand(8, 5, 3) > 0.8)
        m = RobustMDP(p / p.sum(-1, keepdim=True), cost, 0.95, StateL1(0.5 * rand(8, 5), w),
                      support="all" if trial % 2 else "nominal")  # fmt: skip
        apart = (3, 30, 3000)[trial % 3]
        value = 20.0 + (0.7 * rand(8, 5)).round() + ulp * torch.randint(-apart, apart + 1, (8, 5), generator=g)
        z, backup = m.targets(value), m.backup(value)
        assert float(m.ambiguity.excess(backup.rows).max()) < 1e-14
        torch.testing.assert_close((backup.rows * z).sum(-1).amin(-1), backup.value, rtol=0, atol=1e-13)
        answer = m.ambiguity.respond(z, backup.policy)
        torch.testing.assert_close((backup.policy * (answer * z).sum(-1)).sum(-1), backup.value, rtol=0, atol=1e-13)
        assert float(backup.rows.min()) >= -1e-15 and float((backup.rows.sum(-1) - 1.0).abs().max()) < 1e-14


def test_equal_targets_leave_nothing_to_gain(random_mdp):
    """Ties everywhere: z is constant, so every kernel is worth the same and any policy will do."""
    for kind in (L1, StateL1):
        m, _ = model(random_mdp, kind, False)
        flat = RobustMDP(m.kernel, torch.ones(5, 3), 0.9, kind(0.5))
        backup = flat.backup(torch.full((2, 5), 7.0, dtype=torch.float64))
        torch.testing.assert_close(backup.value, torch.full((2, 5), 7.3, dtype=torch.float64))
        torch.testing.assert_close(backup.policy.sum(-1), torch.ones(2, 5, dtype=torch.float64))
        assert float(flat.ambiguity.excess(backup.rows).max()) < 1e-12


@WEIGHTED
@pytest.mark.parametrize("kind", [L1, StateL1])
def test_projections_equal_the_quadratic_program(random_mdp, oracles, kind, weighted):
    m, rand = model(random_mdp, kind, weighted, instances=2)
    y = (m.kernel.probabilities + 2.0 * rand(*m.kernel.probabilities.shape) - 1.0) * m.kernel.mask
    x = m.ambiguity.project(y)
    assert float(m.ambiguity.excess(x).max()) < 1e-9
    torch.testing.assert_close(m.ambiguity.project(x), x, rtol=0, atol=1e-9)
    p = m.kernel.probabilities
    for k, s in [(0, 0), (0, 1), (0, 3), (1, 2)]:
        cells = [[(k, s, a)] for a in range(3)] if kind is L1 else [[(k, s, a) for a in range(3)]]
        for cell in cells:
            pick = lambda t: np.concatenate([t[i][m.kernel.mask[i]].numpy() for i in cell])  # noqa: E731, B023
            w = pick(m.ambiguity.weight) if weighted else np.ones(len(pick(p)))
            ends = np.cumsum([0, *(int(m.kernel.count[i]) for i in cell)])
            groups = [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)]
            radius = float(m.ambiguity.radius[cell[0] if kind is L1 else (k, s)])
            truth = oracles.nearest_l1(pick(y), pick(p), w, radius, groups)
            np.testing.assert_allclose(pick(x), truth, atol=2e-6)
            assert ((pick(x) - pick(y)) ** 2).sum() <= ((truth - pick(y)) ** 2).sum() + 1e-9


def test_a_state_set_holds_the_row_sets_of_the_same_budget(random_mdp):
    m, rand = model(random_mdp, L1, False)
    value = 10.0 * rand(2, 5)
    wide = m.replace(StateL1(m.ambiguity.radius.sum(-1)))
    assert bool((m.backup(value).value <= wide.backup(value).value + 1e-12).all())


def test_mistakes_are_told_in_one_line(random_mdp):
    for make, words in [
        (lambda r: L1(-0.1), "radius must lie between 0"),
        (lambda r: L1(r(4, 7)), r"radius has shape \(4, 7\)"),
        (lambda r: L1(0.1, weights=[1.0, 0.0, 1.0, 1.0, 1.0]), "weights of an L1 set must be positive"),
        (lambda r: StateL1(r(3)), r"spread to \(2, 5\)"),
    ]:
        with pytest.raises(RloptError, match=words) as caught:
            random_mdp(make)
        assert "\n" not in str(caught.value)
    m, rand = model(random_mdp, StateL1, False)
    with pytest.raises(RloptError, match="couples the actions"):
        m.ambiguity.worst(m.targets(rand(2, 5)))
