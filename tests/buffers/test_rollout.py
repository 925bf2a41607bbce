"""On-policy data: T steps in, K shuffled epochs out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.buffers import RolloutBuffer
from rlopt.types import RloptError

T, N = 4, 3


def filled(**options: object) -> RolloutBuffer:
    buffer = RolloutBuffer(
        T,
        spaces.Box(-1, 1, (2,)),
        spaces.Discrete(3),
        N,
        extra_fields={"log_prob": ((), torch.float32)},
        computed={"advantage": ((), torch.float32), "rank": ((), torch.int64)},
        **options,  # type: ignore[arg-type]
    )
    for t in range(T):
        number = 10 * t + torch.arange(N, dtype=torch.float32)
        no = torch.zeros(N, dtype=torch.bool)
        buffer.add(
            number[:, None].expand(N, 2),
            torch.arange(N),
            number,
            number[:, None].expand(N, 2) + 0.5,
            no,
            torch.tensor([t == 2, False, False]),
            valid=torch.tensor([True, t != 1, True]),
            log_prob=-number,
        )
    return buffer


def compute(buffer: RolloutBuffer) -> None:
    rank = torch.arange(T * N).view(T, N) + 2**40
    buffer.fill(advantage=2 * buffer.rollout().reward, rank=rank)


def test_what_went_in_can_be_read_in_order() -> None:
    buffer = filled()
    assert buffer.full
    data = buffer.rollout()
    expected = 10 * torch.arange(T)[:, None] + torch.arange(N)
    assert torch.equal(data.reward, expected.float())
    assert isinstance(data.obs, torch.Tensor) and data.obs.shape == (T, N, 2)
    assert torch.equal(data.extras["log_prob"], -expected.float())
    assert data.ended.nonzero().tolist() == [[2, 0]] and not data.terminated.any()
    assert (data.valid == 0).nonzero().tolist() == [[1, 1]]


def test_every_valid_transition_comes_once_per_epoch_with_what_was_computed() -> None:
    buffer = filled()
    compute(buffer)
    batches = list(buffer.minibatches(3, 4, torch.Generator().manual_seed(0)))
    assert [len(b.reward) for b in batches] == [4, 4, 3] * 3
    expected = sorted(float(10 * t + e) for t in range(T) for e in range(N) if (t, e) != (1, 1))
    orders = []
    for epoch in range(3):
        rewards = torch.cat([b.reward for b in batches[3 * epoch : 3 * epoch + 3]])
        assert sorted(rewards.tolist()) == expected
        orders.append(rewards.tolist())
    assert orders[0] != orders[1] != orders[2]
    for b in batches:
        assert isinstance(b.next_obs, torch.Tensor)
        assert torch.equal(b.next_obs[:, 0], b.reward + 0.5)
        assert torch.equal(b.extras["advantage"], 2 * b.reward)
        assert torch.equal(b.extras["rank"], 2**40 + (b.reward // 10 * N + b.reward % 10).long())
        assert bool(b.valid.all())


def test_the_order_depends_on_the_generator_alone() -> None:
    def order(seed: int) -> list[float]:
        buffer = filled()
        compute(buffer)
        return [r for b in buffer.minibatches(2, 5, torch.Generator().manual_seed(seed)) for r in b.reward.tolist()]

    assert order(1) == order(1) != order(2)


def test_a_cleared_rollout_holds_the_next_one() -> None:
    buffer = filled()
    compute(buffer)
    flag = torch.zeros(N, dtype=torch.bool)
    more = (torch.ones(N, 2), torch.zeros(N, dtype=torch.int64), torch.ones(N), torch.ones(N, 2), flag, flag)
    with pytest.raises(RloptError, match="clear it"):
        buffer.add(*more, log_prob=torch.zeros(N))
    buffer.clear()
    buffer.add(*more, log_prob=torch.zeros(N))
    assert not buffer.full and buffer.rollout().reward.tolist() == [[1.0] * N]
    with pytest.raises(RloptError, match="call fill first"):  # the last rollout's advantages are gone
        next(buffer.minibatches(1, 2, torch.Generator()))


def test_mistakes_are_told() -> None:
    buffer = filled()
    with pytest.raises(RloptError, match="value is not declared"):
        buffer.fill(value=torch.zeros(T, N))
    buffer.clear()
    flag = torch.zeros(N, dtype=torch.bool)
    with pytest.raises(RloptError, match="give it to fill"):
        buffer.add(
            torch.ones(N, 2), torch.arange(N), torch.ones(N), torch.ones(N, 2), flag, flag,
            log_prob=torch.zeros(N), advantage=torch.zeros(N),
        )  # fmt: skip
    fields = {"value": ((), torch.float32)}
    with pytest.raises(RloptError, match="choose one"):
        RolloutBuffer(2, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), extra_fields=fields, computed=fields)
    with pytest.raises(RloptError, match="length of at least 1"):
        RolloutBuffer(0, spaces.Box(-1, 1, (1,)), spaces.Discrete(2))


def test_stacked_images_are_kept_once() -> None:
    """One episode that goes on over three rollouts: the ring of frames begins anew with each."""
    space = spaces.Box(0, 255, (2, 1, 1), np.uint8)
    buffer = RolloutBuffer(3, space, spaces.Discrete(2), frame_stack=2)
    no = torch.tensor([False])
    for first in (0, 3, 6):
        for t in range(first, first + 3):
            obs, next_obs = (torch.tensor([i, i + 1], dtype=torch.uint8).view(1, 2, 1, 1) for i in (t, t + 1))
            buffer.add(obs, torch.tensor([0]), torch.ones(1), next_obs, no, no)
        data = buffer.rollout()
        assert isinstance(data.obs, torch.Tensor) and isinstance(data.next_obs, torch.Tensor)
        assert (data.obs.flatten() - first).tolist() == [0, 1, 1, 2, 2, 3]
        assert (data.next_obs.flatten() - first).tolist() == [1, 2, 2, 3, 3, 4]
        buffer.clear()
