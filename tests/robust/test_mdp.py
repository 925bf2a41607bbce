"""Tabular models and their Bellman operators, against values worked out by hand and by exact linear solves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.envs import make_env
from rlopt.robust import (
    TabularMDP,
    action_values,
    bellman_policy,
    discounted_bounds,
    expected_reward,
    from_toy_text,
    greedy,
    policy_value,
)
from rlopt.types import EnvSpec, RloptError

# In state 0 action 0 stays (reward 1), action 1 leaves with probability 1/2 (reward 4). State 1 is absorbing.
KERNEL = [[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.0, 1.0]]]
REWARD = [[1.0, 4.0], [0.0, 0.0]]
START = [1.0, 0.0]


def two_states() -> TabularMDP:
    return TabularMDP(KERNEL, REWARD, START)


def table_of(id: str, **kwargs):
    env = make_env(id, kwargs=kwargs, autoreset=False)
    inner = env.envs[0].unwrapped
    return inner.P, int(inner.observation_space.n), int(inner.action_space.n)


def value_by_the_table(table, n: int, gamma: float, actions: list[int]) -> np.ndarray:
    """v(s) = Σ p (r + γ (1 - done) v(s')), solved exactly: what the real environment's step does."""
    a, b = np.eye(n), np.zeros(n)
    for s in range(n):
        for p, t, r, done in table[s][actions[s]]:
            b[s] += p * r
            a[s, int(t)] -= gamma * p * (not done)
    return np.linalg.solve(a, b)


def test_action_values_by_hand():
    m = two_states()
    q = action_values(m.kernel, m.reward, 0.5, torch.tensor([2.0, 10.0], dtype=torch.float64))
    assert q.tolist() == [[1.0 + 0.5 * 2.0, 4.0 + 0.5 * 6.0], [5.0, 5.0]]


def test_a_policys_backup_and_exact_value_by_hand():
    m = two_states()
    mixed = torch.tensor([[0.25, 0.75], [1.0, 0.0]], dtype=torch.float64)
    value = torch.tensor([2.0, 0.0], dtype=torch.float64)
    # Q(0, ·) = (1 + 1, 4 + 0.5): 0.25 · 2 + 0.75 · 4.5.
    assert bellman_policy(m.kernel, m.reward, 0.5, mixed, value).tolist() == [3.875, 0.0]
    # v = 3.25 + 0.5 (0.25 + 0.375) v, so v = 3.25 / 0.6875.
    torch.testing.assert_close(
        policy_value(m.kernel, m.reward, 0.5, mixed), torch.tensor([3.25 / 0.6875, 0.0], dtype=torch.float64)
    )


def test_greedy_takes_the_first_of_equals():
    q = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    assert greedy(q).tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


def test_operators_carry_many_instances_at_once():
    m = two_states()
    generator = torch.Generator().manual_seed(0)
    kernel = torch.rand(3, 2, 2, 2, generator=generator, dtype=torch.float64)
    kernel = torch.cat([m.kernel[None], kernel / kernel.sum(-1, keepdim=True)])
    reward = m.reward + torch.arange(4, dtype=torch.float64)[:, None, None]
    policy = torch.full((4, 2, 2), 0.5, dtype=torch.float64)
    value = policy_value(kernel, reward, 0.9, policy)
    assert value.shape == (4, 2)
    for i in range(4):
        torch.testing.assert_close(value[i], policy_value(kernel[i], reward[i], 0.9, policy[i]))
    torch.testing.assert_close(bellman_policy(kernel, reward, 0.9, policy, value), value)


def test_bounds_by_hand_and_around_the_truth():
    gamma = 0.5
    low, high = discounted_bounds(gamma, torch.tensor([0.0, 0.0]), torch.tensor([4.0, 1.0]))
    assert low.tolist() == [5.0, 2.0] and high.tolist() == [8.0, 5.0]
    # The best action in state 0 is to leave: v* = 4 + 0.5 · 0.5 · v*, so v* = 16/3.
    m = two_states()
    value = torch.zeros(2, dtype=torch.float64)
    for _ in range(8):
        backed_up = action_values(m.kernel, m.reward, gamma, value).amax(-1)
        low, high = discounted_bounds(gamma, value, backed_up)
        assert low[0] <= 16 / 3 <= high[0] and low[1] <= 0.0 <= high[1]
        value = backed_up
    assert float(high[0] - low[0]) < 1e-3


@pytest.mark.parametrize(
    ("kernel", "reward", "initial", "words"),
    [
        (np.zeros((2, 2)), REWARD, START, r"\(states, actions, states\)"),
        (np.ones((2, 2, 3)), REWARD, START, r"\(states, actions, states\)"),
        (KERNEL, [1.0, 2.0], START, r"reward has shape \(2,\)"),
        (KERNEL, REWARD, [1.0], r"initial has shape \(1,\)"),
        (KERNEL, [[1.0, np.nan], [0.0, 0.0]], START, "reward of action 1 in state 0 is not finite"),
        ([[[1.0, 0.0], [0.5, 0.4]], KERNEL[1]], REWARD, START, r"kernel\[0, 1\] is no distribution.*sum 0.9"),
        ([[[1.0, 0.0], [1.5, -0.5]], KERNEL[1]], REWARD, START, r"kernel\[0, 1\] is no distribution.*smallest -0.5"),
        ([[[1.0, 0.0], [np.nan, 0.5]], KERNEL[1]], REWARD, START, r"kernel\[0, 1\] is no distribution"),
        (KERNEL, REWARD, [0.5, 0.4], "initial is no distribution"),
    ],
)
def test_mistakes_are_told_in_one_line(kernel, reward, initial, words):
    with pytest.raises(RloptError, match=words) as caught:
        TabularMDP(kernel, reward, initial)
    assert "\n" not in str(caught.value)


def test_rewards_per_next_state_are_their_expected_ones_to_every_operator():
    generator = torch.Generator().manual_seed(0)
    kernel = torch.rand(3, 2, 3, generator=generator, dtype=torch.float64)
    kernel /= kernel.sum(-1, keepdim=True)
    m = TabularMDP(kernel, torch.rand(3, 2, 3, generator=generator, dtype=torch.float64), [1.0, 0.0, 0.0])
    by_hand = torch.tensor(
        [[sum(float(kernel[s, a, t] * m.reward[s, a, t]) for t in range(3)) for a in range(2)] for s in range(3)],
        dtype=torch.float64,
    )
    torch.testing.assert_close(expected_reward(m.kernel, m.reward), by_hand)
    policy, value = torch.full((3, 2), 0.5, dtype=torch.float64), torch.arange(3.0, dtype=torch.float64)
    for f, rest in ((action_values, (value,)), (bellman_policy, (policy, value)), (policy_value, (policy,))):
        torch.testing.assert_close(f(m.kernel, m.reward, 0.9, *rest), f(m.kernel, by_hand, 0.9, *rest))
    with pytest.raises(RloptError, match="reward of action 1 in state 2 is not finite"):
        bad = m.reward.clone()
        bad[2, 1, 0] = torch.inf
        TabularMDP(kernel, bad, m.initial)


def test_a_spec_must_fit():
    with pytest.raises(RloptError, match="does not fit"):
        TabularMDP(KERNEL, REWARD, START, EnvSpec("x", spaces.Discrete(3), spaces.Discrete(2)))
    with pytest.raises(RloptError, match="does not fit"):
        TabularMDP(KERNEL, REWARD, START, EnvSpec("x", spaces.Discrete(2), spaces.Discrete(3)))
    with pytest.raises(RloptError, match="Discrete spaces"):
        TabularMDP(KERNEL, REWARD, START, EnvSpec("x", spaces.Box(0, 1), spaces.Discrete(2)))


@pytest.mark.parametrize(
    ("id", "kwargs", "states"),
    [
        ("FrozenLake-v1", {"is_slippery": False}, 16),
        ("FrozenLake-v1", {"is_slippery": True}, 16),
        ("CliffWalking-v1", {}, 48),
        ("Taxi-v4", {}, 501),  # four of its states are entered both in mid-episode and at the end
    ],
)
def test_imported_models_have_the_values_of_the_real_environment(id, kwargs, states):
    m = from_toy_text(id, kwargs)
    table, n, k = table_of(id, **kwargs)
    assert (m.num_states, m.num_actions) == (states, k)
    assert m.spec.observation_space == spaces.Discrete(n)
    actions = np.random.default_rng(0).integers(k, size=states)
    policy = torch.nn.functional.one_hot(torch.as_tensor(actions), k).double()
    value = policy_value(m.kernel, m.reward, 0.95, policy).numpy()
    truth = value_by_the_table(table, n, 0.95, actions[:n].tolist())
    ended = {int(t) for s in table for a in table[s] for _, t, _, done in table[s][a] if done} if states == n else set()
    live = [s for s in range(n) if s not in ended]
    np.testing.assert_allclose(value[live], truth[live], rtol=1e-12, atol=1e-12)
    assert all(abs(value[s]) < 1e-15 for s in ended)


def test_the_imported_model_knows_limit_and_first_states():
    m = from_toy_text("FrozenLake8x8-v1", {"is_slippery": False})
    assert m.num_states == 64 and m.spec.episode_limit == 200
    assert m.initial.nonzero().flatten().tolist() == [0]
    assert m.reward.shape == (64, 4, 64) and m.reward[62, 2].nonzero().flatten().tolist() == [63]
    taxi = from_toy_text("Taxi-v4")
    assert int((taxi.initial > 0).sum()) == 300 and float(taxi.initial[500]) == 0.0


def test_an_environment_without_a_model_is_refused_in_one_line():
    with pytest.raises(RloptError, match="FrozenLake-v1") as caught:
        from_toy_text("CartPole-v1")
    assert "\n" not in str(caught.value)
