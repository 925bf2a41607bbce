"""Models and kernels: which reading a cost has, what is checked, and the smallest sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlopt.robust import L1, Kernel, LInf, RobustMDP, StateL1, TabularMDP, solve
from rlopt.robust.problems.inventory import inventory
from rlopt.types import RloptError


@pytest.mark.parametrize("largest_demand", [9, 10, 11])
def test_inventory_costs_are_those_of_the_demands(largest_demand):
    """Also where there are as many demands as stocks, so that lists are as long as there are states."""
    m = inventory(10, 4, 3.0, largest_demand)
    for stock, order, demand in np.ndindex(11, 5, largest_demand + 1):
        held = min(stock + order, 10)
        cost = 2.0 * (order > 0) + order + 0.5 * max(held - demand, 0) + 8.0 * max(demand - held, 0)
        assert float(m.cost[0, stock, order, demand]) == cost


def test_the_robust_cost_of_an_inventory_grows_with_the_largest_demand():
    found = [float(solve(inventory(largest_demand=d), "partial_policy_iteration").upper) for d in (19, 20, 21)]
    assert found[0] == pytest.approx(319.05, abs=0.01) and found[2] == pytest.approx(359.19, abs=0.01)
    assert found[0] < found[1] < found[2]


def test_a_cost_is_per_next_state_unless_said_otherwise():
    """Lists as long as there are states, in another order: both readings fit, and the word decides."""
    kernel = Kernel([[[0.25, 0.75]], [[0.5, 0.5]]], [[[1, 0]], [[1, 1]]])
    table = [[[1.0, 2.0]], [[3.0, 4.0]]]
    assert RobustMDP(kernel, table, 0.9, L1(0.1)).cost[0, :, 0].tolist() == [[2.0, 1.0], [4.0, 4.0]]
    listed = RobustMDP(kernel, table, 0.9, L1(0.1), per_successor=True)
    assert listed.cost[0, :, 0].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    narrow = Kernel([[[1.0]], [[1.0]]], [[[1]], [[0]]])
    assert RobustMDP(narrow, [[[5.0]], [[6.0]]], 0.9, L1(0.1), per_successor=True).cost.flatten().tolist() == [5.0, 6.0]
    with pytest.raises(RloptError, match=r"or per_successor=True$"):
        RobustMDP(narrow, [[[5.0]], [[6.0]]], 0.9, L1(0.1))
    with pytest.raises(RloptError, match=r"per successor this kernel needs \(2, 1, 2\)"):
        RobustMDP(kernel, [[1.0], [2.0]], 0.9, L1(0.1), per_successor=True)


def test_of_a_batch_as_large_as_its_states_and_actions_instances_come_first():
    """K = S = A = 2: (2, 2, 2) is (K, S, A); the next states need their K."""
    dense = torch.full((2, 2, 2, 2), 0.5, dtype=torch.float64)
    table = torch.arange(8.0, dtype=torch.float64).reshape(2, 2, 2)
    assert torch.equal(RobustMDP(dense, table, 0.9, L1(0.1)).cost, table[..., None])
    assert torch.equal(RobustMDP(dense[0], table, 0.9, L1(0.1)).cost, table[None])
    assert torch.equal(RobustMDP(dense, table.expand(2, 2, 2, 2), 0.9, L1(0.1)).cost, table.expand(2, 2, 2, 2))


@pytest.mark.parametrize("method", ["drpg", "value_iteration", "modified_policy_iteration", "partial_policy_iteration"])
@pytest.mark.parametrize("ambiguity", [L1(0.2), StateL1(0.3)], ids=lambda s: type(s).__name__)
def test_one_state_costs_its_cheapest_action_for_ever(ambiguity, method):
    cost = np.random.default_rng(0).random((3, 1, 4))
    m = RobustMDP(np.ones((3, 1, 4, 1)), cost, 0.9, ambiguity)
    assert m.kernel.dense
    for rows in (False, True):
        backup = m.backup(torch.full((3, 1), 5.0, dtype=torch.float64), rows)
        np.testing.assert_allclose(backup.value[:, 0].numpy(), cost[:, 0].min(-1) + 4.5)
    s = solve(m, method, iterations=400, tolerance=1e-6)
    np.testing.assert_allclose(s.lower.numpy(), cost[:, 0].min(-1) / 0.1, atol=1e-5)


def test_a_list_may_name_a_state_twice_and_each_entry_is_an_outcome():
    """Half and half on two entries of state 0: their masses add up, their costs and bounds are their own."""
    kernel = Kernel([[[0.5, 0.5]], [[0.5, 0.5]]], [[[0, 0]], [[0, 1]]])
    assert kernel.to_dense()[0, :, 0].tolist() == [[1.0, 0.0], [0.5, 0.5]]
    m = RobustMDP(kernel, [[[0.0, 1.0]], [[0.0, 0.0]]], 0.0, LInf(0.1), per_successor=True)
    assert m.backup(torch.zeros(1, 2, dtype=torch.float64)).value.tolist() == [[pytest.approx(0.6), 0.0]]


@pytest.mark.parametrize("count", [[[0], [2]], [[3], [2]], [[-1], [1]], [[400], [400]]])
def test_the_lengths_of_lists_are_checked(count):
    with pytest.raises(RloptError, match="count must lie between 1 and the 2 successors given") as caught:
        Kernel([[[0.5, 0.5]], [[0.5, 0.5]]], [[[0, 1]], [[0, 1]]], count)
    assert "\n" not in str(caught.value)


def test_what_float32_leaves_of_a_sum_is_divided_out():
    p = np.array([[[1 / 3, 2 / 3]], [[0.1, 0.9]]], dtype=np.float32)
    p[0, 0, 0] += np.float32(1e-7)
    first = np.array([0.7, 0.3], dtype=np.float32) + np.float32(1e-7)
    reward = [[1.0], [0.0]]
    for kernel in (RobustMDP(p, reward, 0.9, L1(0.1), first).kernel, Kernel(p), Kernel.from_dense(p)):
        np.testing.assert_allclose(kernel.probabilities[0].sum(-1).numpy(), 1.0, rtol=0, atol=1e-15)
        np.testing.assert_allclose(kernel.probabilities[0].numpy(), p, rtol=0, atol=3e-7)
    for m in (RobustMDP(p, reward, 0.9, L1(0.1), first), TabularMDP(p, reward, first)):
        assert float(m.initial.sum()) == pytest.approx(1.0, abs=1e-15)
    table = TabularMDP(p, reward, first).kernel
    np.testing.assert_allclose(table.sum(-1).numpy(), 1.0, rtol=0, atol=1e-15)


def test_what_is_farther_off_is_refused_with_all_digits():
    p = [[[0.5, 0.50001]], [[0.5, 0.5]]]
    for make in (lambda: Kernel(p), lambda: TabularMDP(p, [[1.0], [0.0]], [1.0, 0.0])):
        with pytest.raises(RloptError, match=r"smallest 0.5, sum 1.00001\)"):
            make()
    with pytest.raises(RloptError, match=r"kernel\[1, 0\] is no distribution on its 1 successors .*sum 0.5\)"):
        Kernel([[[0.5, 0.5]], [[0.5, 0.5]]], [[[0, 1]], [[0, 1]]], [[2], [1]])
    with pytest.raises(RloptError, match=r"initial is no distribution \(smallest 0.5, sum 1.00001\)"):
        RobustMDP([[[0.5, 0.5]], [[0.5, 0.5]]], [[1.0], [0.0]], 0.9, L1(0.1), [0.5, 0.50001])
