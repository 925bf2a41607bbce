"""Generators: what their recipes promise, values known otherwise, models from samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlopt.robust import L1, Nominal, RobustMDP, from_toy_text, policy_value, solve
from rlopt.robust.estimate import (
    bayesian_radius,
    count_transitions,
    hoeffding_radius,
    nominal_kernel,
    weissman_radius,
)
from rlopt.robust.problems.domains import grid_world, machine_replacement, river_swim
from rlopt.robust.problems.garnet import garnet, random_policy
from rlopt.robust.problems.inventory import inventory, poisson
from rlopt.types import RloptError


def nominal_optimum(m):
    return solve(m.replace(Nominal()), "partial_policy_iteration", tolerance=1e-9)


def test_garnet_follows_its_recipe():
    m = garnet(10, 6, 3, instances=20)
    assert (m.num_instances, m.num_states, m.num_actions, m.kernel.num_successors) == (20, 10, 6, 3)
    dense = m.kernel.to_dense()
    assert bool(((dense > 0).sum(-1) == 3).all())
    assert float(m.cost.min()) >= 0.0 and float(m.cost.max()) <= 5.0 and abs(float(m.cost.mean()) - 2.5) < 0.1
    radius = m.ambiguity.radius
    assert float(radius.min()) >= 0.1 and float(radius.max()) <= 0.5 and abs(float(radius.mean()) - 0.3) < 0.02
    # Every state is as likely a successor as any other.
    assert (dense > 0).double().mean((0, 1, 2)).tolist() == pytest.approx([0.3] * 10, abs=0.05)
    s = garnet(10, 5, 10, instances=3, rectangular="s")
    assert s.kernel.dense and 0.5 <= float(s.ambiguity.radius.min()) <= float(s.ambiguity.radius.max()) <= 1.0


def test_a_garnet_instance_depends_on_its_own_seed_alone():
    many, one = garnet(5, 4, 3, instances=4, seed=7), garnet(5, 4, 3, instances=1, seed=9)
    assert torch.equal(many.kernel.to_dense()[2], one.kernel.to_dense()[0])
    assert torch.equal(many.cost[2], one.cost[0]) and torch.equal(many.initial[2], one.initial[0])
    assert torch.equal(random_policy(many, 7)[2], random_policy(one, 9)[0])
    policy = random_policy(many)
    torch.testing.assert_close(policy.sum(-1), torch.ones(4, 5, dtype=torch.float64))
    assert float((policy.amax(-1) / policy.amin(-1)).max()) < 5.0


def test_machine_replacement_repairs_old_machines_and_the_robust_policy_no_later():
    m = machine_replacement()
    nominal, robust = nominal_optimum(m), solve(m, "partial_policy_iteration", tolerance=1e-9)
    repairs = [
        p.argmax(-1)[0, :8].tolist() if p.ndim == 3 else p.argmax(-1)[:8].tolist()
        for p in (nominal.policy, robust.policy)
    ]
    for actions in repairs:
        assert actions == sorted(actions) and actions[0] == 0  # a threshold: new machines run on
    assert sum(repairs[1]) >= sum(repairs[0])
    assert float(robust.upper) > float(nominal.upper)


def test_river_swim_values():
    """Swimming left for ever from the left bank earns 5/(1 - γ); the optimum swims right, against ambiguity as well."""
    m = river_swim(gamma=0.95)
    left = torch.tensor([[1.0, 0.0]] * 6, dtype=torch.float64)
    rewards = (m.kernel.probabilities * -m.cost).sum(-1)[0]
    value = policy_value(m.kernel.to_dense()[0], rewards, 0.95, left)
    assert float(value[0]) == pytest.approx(100.0)
    s = nominal_optimum(m)
    assert s.policy[:, 1].tolist() == [1.0] * 6
    robust = solve(m, "partial_policy_iteration", tolerance=1e-6)
    assert float(robust.upper) < float(s.lower)
    with pytest.raises(RloptError, match="at least 3"):
        river_swim(2)


def test_grid_world_by_hand():
    """Without slipping and ambiguity the shortest way costs (1 - γ^n)/(1 - γ); with ambiguity more."""
    plain = grid_world(slip=0.0)
    s = nominal_optimum(plain)
    assert float(s.value[0]) == pytest.approx((1 - 0.95**6) / 0.05, abs=1e-6)
    windy = grid_world(slip=0.2)
    assert float(nominal_optimum(windy).upper) < float(solve(windy, "partial_policy_iteration").lower)
    for bad in (["S..", "G."], ["S..", "..."]):
        with pytest.raises(RloptError, match="equally long"):
            grid_world(bad)


def test_toy_text_keeps_the_environment_and_its_value():
    m = RobustMDP.from_tabular(from_toy_text("FrozenLake-v1"), 0.99, L1(0.2))
    assert m.spec.id == "FrozenLake-v1" and m.sign == -1.0
    assert float(nominal_optimum(m).upper) == pytest.approx(0.542026, abs=1e-5)
    table = from_toy_text("FrozenLake-v1")
    torch.testing.assert_close(m.kernel.to_dense()[0], table.kernel)


@pytest.mark.parametrize(("radius", "truth"), [(0.1, 0.364385), (0.2, 0.184466), (0.4, 0.011977)])
def test_the_rewards_of_a_toy_text_model_follow_the_adversary(oracles, radius, truth):
    """A linear program per state and action on the environment's own table: the value found is their fixed point."""
    from gymnasium import make

    table = make("FrozenLake-v1").unwrapped.P
    m = RobustMDP.from_tabular(from_toy_text("FrozenLake-v1"), 0.99, L1(radius))
    s = solve(m, "partial_policy_iteration", iterations=200, tolerance=1e-9)
    assert float(s.lower) == pytest.approx(truth, abs=1e-6)
    for state in range(16):
        worst = []
        for outcomes in table[state].values():
            p, z = {}, {}
            for probability, after, reward, ends in outcomes:
                p[after] = p.get(after, 0.0) + probability
                z[after] = reward + 0.99 * (not ends) * float(s.value[after])
            costs, law = -np.array(list(z.values())), np.array(list(p.values()))
            worst.append(-oracles.row_lp(costs, law, np.ones(len(law)), radius))
        assert float(s.value[state]) == pytest.approx(max(worst), abs=1e-9)


def test_inventory_by_hand_and_by_simulation():
    """Stock 1, order 2: demand d costs 2 + 2·1 + 0.5·(3 - d)⁺ + 8·(d - 3)⁺ and leads to (3 - d)⁺."""
    m = inventory()
    law = poisson(4.0, 12)
    assert law[:3] == pytest.approx([math.exp(-4), 4 * math.exp(-4), 8 * math.exp(-4)]) and law.sum() == pytest.approx(
        1.0
    )
    d = np.arange(13)
    expected = 4.0 + 0.5 * np.maximum(3 - d, 0) + 8.0 * np.maximum(d - 3, 0)
    np.testing.assert_allclose(m.cost[0, 1, 2].numpy(), expected)
    assert m.kernel.successors[0, 1, 2].tolist() == [3, 2, 1] + [0] * 10
    assert m.kernel.to_dense()[0, 1, 2, 0] == pytest.approx(law[3:].sum())
    robust, nominal = solve(m, "partial_policy_iteration", tolerance=1e-6), nominal_optimum(m)
    levels = [(torch.arange(21) + s.policy.argmax(-1)) for s in (nominal, robust)]
    assert int(levels[1].max()) >= int(levels[0].max())  # an ambiguous demand is insured against by more stock
    assert float(robust.upper) > float(nominal.upper)
    # A walk of the robust policy through the nominal store costs what its nominal value says.
    from rlopt.robust.bellman import objective
    from rlopt.robust.bellman import policy_value as exact

    rng, steps, walks = np.random.default_rng(0), 150, 400
    stock, total = rng.integers(0, 21, walks), np.zeros(walks)
    order = robust.policy.argmax(-1).numpy()
    for t in range(steps):
        a = order[stock]
        demand = rng.choice(13, walks, p=law)
        held = np.minimum(stock + a, 20)
        stock = np.maximum(held - demand, 0)
        total += 0.95**t * (2.0 * (a > 0) + a + 0.5 * stock + 8.0 * np.maximum(demand - held, 0))
    truth = float(objective(m, exact(m, robust.policy[None], m.kernel.probabilities)))
    assert abs(total.mean() - truth) < 4.0 * total.std() / math.sqrt(walks)


def test_nominal_kernels_from_samples():
    counts = count_transitions([0, 0, 0, 1], [1, 1, 1, 0], [0, 1, 1, 1], 2, 2)
    assert counts[0, 1].tolist() == [1.0, 2.0] and counts[1, 0].tolist() == [0.0, 1.0] and float(counts.sum()) == 4.0
    assert nominal_kernel(counts)[0, 1].tolist() == pytest.approx([1 / 3, 2 / 3])
    assert nominal_kernel(counts)[1, 1].tolist() == [0.5, 0.5]  # never seen
    assert nominal_kernel(counts, 1.0)[1, 0].tolist() == pytest.approx([1 / 3, 2 / 3])
    assert float(count_transitions([], [], [], 2, 2).sum()) == 0.0
    for lists, words in [
        (([0, 0], [0, 0], [2, 0]), "next_states must lie between 0 and 1, not 0 … 2"),
        (([0, 1], [1, -1], [1, 0]), "actions must lie between 0 and 1, not -1 … 1"),
        (([0, 5], [1, 1], [1, 0]), "states must lie between 0 and 1, not 0 … 5"),
        (([0], [1, 1], [1, 0]), "equally long"),
    ]:
        with pytest.raises(RloptError, match=words):
            count_transitions(*lists, 2, 2)


def test_radii_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    truth = rng.dirichlet(np.ones(4), (3, 2))
    covered = {"weissman": 0, "hoeffding": 0}
    trials = 200
    for _ in range(trials):
        counts = torch.tensor(np.array([[rng.multinomial(50, p) for p in row] for row in truth]), dtype=torch.float64)
        distance = (nominal_kernel(counts) - torch.from_numpy(truth)).abs()
        covered["weissman"] += bool((distance.sum(-1) <= weissman_radius(counts, 0.9)).all())
        covered["hoeffding"] += bool((distance <= hoeffding_radius(counts, 0.9)[..., None]).all())
    assert min(covered.values()) >= 0.9 * trials
    # By hand for S = 4 and A = 2 (the function takes S from the successors): √(2/50·log((2⁴ - 2)·8/0.1)).
    assert float(weissman_radius(counts, 0.9)[0, 0]) == pytest.approx(math.sqrt(2 / 50 * math.log(14 * 8 / 0.1)))
    assert float(weissman_radius(torch.zeros(2, 1, 2))[0, 0]) == 2.0


def test_bayesian_radii_hold_the_posterior():
    counts = torch.tensor([[[8.0, 2.0, 0.0]]], dtype=torch.float64)
    mean, radius = bayesian_radius(counts, 0.9, samples=4000)
    assert mean[0, 0].tolist() == pytest.approx([9 / 13, 3 / 13, 1 / 13])
    drawn = np.random.default_rng(1).dirichlet([9.0, 3.0, 1.0], 4000)
    inside = (np.abs(drawn - mean[0, 0].numpy()).sum(1) <= float(radius[0, 0])).mean()
    assert inside == pytest.approx(0.9, abs=0.02)
    assert float(bayesian_radius(10 * counts, 0.9)[1]) < float(radius)
    with pytest.raises(RloptError, match="strictly between"):
        bayesian_radius(counts, 1.0)
