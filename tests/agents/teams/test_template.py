"""The template of sequential updates in exact, tabular games: monotone where simultaneous updates fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from rlopt.agents.teams.sequential import Order, update_in_order
from rlopt.types import Update
from tests.agents.teams.games import team, team_spec

ALPHA, GAMMA = 0.3, 0.9
N, K, S = 3, 2, 3


class Game(NamedTuple):
    """A cooperative Markov game of N agents with K actions each."""

    reward: np.ndarray
    """(S, K, K, K)."""
    kernel: np.ndarray
    """(S, K, K, K, S)."""


def random_game(seed: int) -> Game:
    g = np.random.default_rng(seed)
    kernel = g.random((S, *[K] * N, S)) ** 3
    return Game(g.normal(size=(S, *[K] * N)), kernel / kernel.sum(-1, keepdims=True))


def values(game: Game, policy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the soft V (S,) and Q (S, K, K, K) of policies (N, S, K), from the linear equations."""
    together = np.einsum("sa,sb,sc->sabc", *policy)
    entropy = -(policy * np.log(policy)).sum(-1).sum(0)
    gain = (together * game.reward).sum((1, 2, 3)) + ALPHA * entropy
    moves = np.einsum("sabc,sabct->st", together, game.kernel)
    v = np.linalg.solve(np.eye(S) - GAMMA * moves, gain)
    return v, game.reward + GAMMA * game.kernel @ v


def answer(q: np.ndarray, policy: np.ndarray, i: int) -> np.ndarray:
    """Return agent i's best soft answer (S, K): πⁱ ∝ exp(E Q / α) given the others' policies."""
    others = [k for k in range(N) if k != i]
    letters = "abc"
    product = ",".join(f"s{letters[k]}" for k in others)
    expected = np.einsum(f"sabc,{product}->s{letters[i]}", q, *(policy[k] for k in others))
    weights = np.exp((expected - expected.max(-1, keepdims=True)) / ALPHA)
    found: np.ndarray = weights / weights.sum(-1, keepdims=True)
    return found


def improve(game: Game, policy: np.ndarray, order: list[int], sequential: bool) -> np.ndarray:
    """One iteration of soft policy iteration, agent by agent through ``update_in_order``."""
    _, q = values(game, policy)
    seen, new = policy.copy(), policy.copy()

    def losses(i: int) -> Update:
        new[i] = answer(q, seen, i)
        return Update({})

    def show(i: int) -> None:
        seen[i] = new[i]

    refresh: Callable[[int], None] | None = show if sequential else None
    update_in_order(order, losses, refresh)
    return new


@pytest.mark.parametrize("sequential", [True, False])
def test_soft_values_of_random_games_rise_in_every_state_if_agents_learn_in_order(sequential: bool) -> None:
    fell = 0
    for seed in range(20):
        game, g = random_game(seed), np.random.default_rng(seed)
        policy = g.dirichlet(np.ones(K), (N, S))
        before, _ = values(game, policy)
        for _ in range(12):
            policy = improve(game, policy, list(g.permutation(N)), sequential)
            after, q = values(game, policy)
            fell += bool((after < before - 1e-9).any())
            before = after
        if sequential:
            gap = max(np.abs(answer(q, policy, i) - policy[i]).max() for i in range(N))
            assert gap < 0.02, "it ends in a quantal response equilibrium"
    assert (fell == 0) == sequential


def test_in_a_game_of_coordination_simultaneous_answers_swap_for_ever() -> None:
    """Two agents are paid for the same action, and each begins with the one that the other has not."""
    reward = np.zeros((S, K, K, K))
    reward[:, 0, 0] = reward[:, 1, 1] = 1.0
    game = Game(reward, np.full((S, K, K, K, S), 1.0 / S))
    start = np.full((N, S, K), 0.5)
    start[0], start[1] = (0.9, 0.1), (0.1, 0.9)
    both, one = start, start
    for _ in range(10):
        both, one = (improve(game, policy, [1, 0, 2], how) for policy, how in ((both, False), (one, True)))
    agree = [float((policy[0] * policy[1]).sum(-1).mean()) for policy in (both, one)]
    assert agree[0] < 0.15
    assert agree[1] > 0.85


def test_the_order_is_drawn_anew_for_every_update_and_needs_no_state() -> None:
    agent, again = team(team_spec()), team(team_spec())
    orders = []
    for agent.clock.updates in range(60):
        orders.append(tuple(agent.order()))
        assert agent.order() == list(orders[-1]), "asking changes nothing"
    assert len(set(orders)) == 6
    again.clock.updates = 17
    assert tuple(again.order()) == orders[17]
    assert Order(agent, 3, "fixed")() == [0, 1, 2]


def test_everybody_learns_once_and_is_seen_once_it_has() -> None:
    told: list[str] = []

    def losses(i: int) -> Update:
        told.append(f"learn {i}")
        return Update({f"loss/{i}": None})  # type: ignore[dict-item]

    done = update_in_order([2, 0], losses, lambda i: told.append(f"show {i}"))
    assert told == ["learn 2", "show 2", "learn 0", "show 0"]
    assert list(done.metrics) == ["loss/2", "loss/0"]
