"""On-policy data: T steps in, reshuffled minibatches out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlopt.buffers import Rollout, Transition, minibatches
from rlopt.types import RloptError

T, N = 4, 3


def steps(**extras: Any) -> list[Transition]:
    """Every content is told by a number, 10·t + n; one row is no transition, one episode is truncated."""
    found = []
    for t in range(T):
        number = 10 * t + torch.arange(N, dtype=torch.float32)
        obs = {"a": number[:, None].expand(N, 2), "b": number.to(torch.uint8)}
        next_obs = {"a": obs["a"] + 0.5, "b": obs["b"] + 1}
        no = torch.zeros(N, dtype=torch.bool)
        truncated, valid = torch.tensor([t == 2, False, False]), torch.tensor([True, t != 1, True])
        found.append(
            Transition(obs, torch.arange(N), number, next_obs, no, truncated, None, valid, {"log_prob": -number})
        )
    return found


def test_steps_are_stacked_in_order() -> None:
    rollout = Rollout.of(steps())
    expected = (10 * torch.arange(T)[:, None] + torch.arange(N)).float()
    assert torch.equal(rollout.reward, expected) and torch.equal(rollout.extras["log_prob"], -expected)
    assert isinstance(rollout.obs, dict) and isinstance(rollout.next_obs, dict)
    assert rollout.obs["a"].shape == (T, N, 2) and rollout.obs["b"].dtype == torch.uint8
    assert torch.equal(rollout.next_obs["a"][:, :, 0], expected + 0.5)
    assert rollout.ended.nonzero().tolist() == [[2, 0]] == rollout.truncated.nonzero().tolist()
    assert (~rollout.valid).nonzero().tolist() == [[1, 1]] and rollout.group is None is rollout.complete


def test_gaps_hold_zeros_and_integers_that_there_are() -> None:
    """An action 0 would be none of ``Discrete(3, start=2)``, nor an observation 0."""
    rows = [step._replace(action=step.action + 2, reward=step.reward + 1) for step in steps()]
    rows[1].next_obs["a"].fill_(torch.nan)
    rollout = Rollout.of(rows)
    clean = rollout.without_gaps()
    assert isinstance(clean.obs, dict) and isinstance(clean.next_obs, dict)
    for x in (clean.reward, clean.obs["a"], clean.next_obs["a"], clean.extras["log_prob"]):
        assert not x[1, 1].any()
    assert torch.equal(clean.reward[rollout.valid], rollout.reward[rollout.valid])
    assert torch.equal(clean.action, rollout.action) and torch.equal(clean.obs["b"], rollout.obs["b"])  # type: ignore[index]


def test_every_transition_comes_once_per_epoch_with_what_was_computed() -> None:
    rollout = Rollout.of(steps())
    rollout = rollout.with_extras(advantage=2 * rollout.reward)
    positions = rollout.positions()
    generator = torch.Generator().manual_seed(0)
    batches = [rollout.at(positions[chosen]) for chosen in minibatches(len(positions), 3, 4, generator)]
    assert [len(b.reward) for b in batches] == [4, 4, 3] * 3
    expected = sorted(float(10 * t + e) for t in range(T) for e in range(N) if (t, e) != (1, 1))
    orders = [torch.cat([b.reward for b in batches[i : i + 3]]).tolist() for i in (0, 3, 6)]
    assert all(sorted(order) == expected for order in orders) and orders[0] != orders[1] != orders[2]
    for b in batches:
        assert isinstance(b.obs, dict) and isinstance(b.next_obs, dict)
        assert torch.equal(b.next_obs["a"][:, 0], b.reward + 0.5) and bool(b.valid.all())
        assert torch.equal(b.extras["advantage"], 2 * b.reward) and torch.equal(b.extras["log_prob"], -b.reward)
        assert torch.equal(b.action, (b.reward % 10).long())


def test_time_lines_keep_their_order_and_their_groups() -> None:
    rollout = Rollout.of(steps(), group=torch.tensor([0, 0, 1]), complete=torch.tensor([True, False, True]))
    chosen = rollout.columns(torch.tensor([2, 0]))
    assert chosen.reward[:, 0].tolist() == [2, 12, 22, 32] and chosen.reward[:, 1].tolist() == [0, 10, 20, 30]
    assert chosen.group is not None and chosen.group.tolist() == [1, 0]
    assert chosen.complete is not None and chosen.complete.all()
    assert rollout.at(torch.tensor([5])).group is None


def test_what_bootstraps_from_nothing_keeps_no_next_observations() -> None:
    rollout = Rollout.of([step._replace(next_obs={}) for step in steps()])
    assert rollout.next_obs is None and rollout.at(torch.tensor([0])).next_obs is None


def advantages(rollout: Rollout, value: Tensor, next_value: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016), written as an agent would write it."""
    delta = rollout.reward + gamma * ~rollout.terminated * next_value - value
    out, following = torch.zeros_like(delta), torch.zeros(delta.shape[1])
    for t in reversed(range(len(delta))):
        cut = rollout.terminated[t] | rollout.ended[t]
        now = delta[t] + gamma * lam * ~cut * following
        out[t] = torch.where(rollout.valid[t], now, 0.0)
        following = torch.where(rollout.valid[t], now, following)  # a surplus row stands still
    return out


def test_a_truncated_episode_bootstraps_from_its_true_last_observation() -> None:
    """γ = λ = ½, V(s) = 1 everywhere but at the truncated episode's last observation, where it is 9; by hand."""
    no, yes = torch.tensor([False]), torch.tensor([True])
    zero = torch.zeros(1, 1)

    def one(reward: float, truncated: Tensor, terminated: Tensor, next_obs: float) -> Transition:
        return Transition(zero, torch.zeros(1), torch.tensor([reward]), zero + next_obs, terminated, truncated)

    rollout = Rollout.of([one(2, no, no, 0), one(4, yes, no, 8), one(6, no, yes, 8), one(0, no, no, 0)])
    assert isinstance(rollout.next_obs, Tensor)
    found = advantages(rollout, torch.ones(4, 1), 1 + rollout.next_obs[..., 0], 0.5, 0.5)
    # δ = 2 + ½ - 1, 4 + ½·9 - 1, 6 - 1, 0 + ½ - 1.
    assert found.flatten().tolist() == [1.5 + 0.25 * 7.5, 7.5, 5.0, -0.5]


def test_the_order_depends_on_the_generator_alone() -> None:
    def order(seed: int) -> list[list[int]]:
        return [chosen.tolist() for chosen in minibatches(9, 2, 5, torch.Generator().manual_seed(seed))]

    assert order(1) == order(1) != order(2)
    assert [len(chosen) for chosen in order(1)] == [5, 4, 5, 4]


@pytest.mark.parametrize(("count", "size"), [(0, 3), (3, 0)])
def test_minibatches_of_nothing(count: int, size: int) -> None:
    with pytest.raises(RloptError, match="nothing to draw"):
        next(minibatches(count, 1, size, torch.Generator()))
