"""The replay buffer against brute force: what comes out is what went in, and no window crosses what it must not."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlopt.buffers import Batch, ReplayBuffer
from rlopt.types import RloptError

SCALAR = spaces.Box(-np.inf, np.inf, (1,))


class Chosen:
    """A sampler that draws the slots it is told to."""

    name = "chosen"
    excludes_invalid = False

    def __init__(self) -> None:
        self.next: list[list[int]] = []
        self.writes: list[tuple[int, int]] = []
        self.priorities: list[tuple[Tensor, Tensor]] = []

    def bind(self, slots: int, device: torch.device, seed: int) -> None:
        self.slots = slots

    def wrote(self, first: int, count: int, valid: Tensor | None) -> None:
        self.writes.append((first, count))

    def sample(self, batch_size: int, size: int) -> tuple[Tensor, Tensor | None]:
        drawn = torch.tensor(self.next.pop(0))
        assert len(drawn) == batch_size and drawn.max() < size
        return drawn, None

    def update_priority(self, index: Tensor, priority: Tensor) -> None:
        self.priorities.append((index, priority))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def draw(buffer: ReplayBuffer, slots: list[int]) -> Batch:
    assert isinstance(buffer.sampler, Chosen)
    buffer.sampler.next = [slots]
    return buffer.sample(len(slots))


def step(buffer: ReplayBuffer, number: float, **flags: Any) -> None:
    """One vector step whose every content is told by ``number``: obs n + ¼·env, next obs n + ½ + ¼·env, reward n."""
    n = buffer.num_envs
    env = 0.25 * torch.arange(n)
    no = torch.zeros(n, dtype=torch.bool)
    buffer.add(
        (number + env)[:, None],
        torch.arange(n),
        torch.full((n,), float(number)) + env,
        (number + 0.5 + env)[:, None],
        flags.pop("terminated", no),
        flags.pop("truncated", no),
        **flags,
    )


def simple(capacity: int = 8, **options: Any) -> ReplayBuffer:
    return ReplayBuffer(capacity, SCALAR, spaces.Discrete(4), sampler=Chosen(), **options)


# --- the ring -------------------------------------------------------------------------------------------------------


def test_capacity_is_rounded_up_to_whole_vector_steps_and_the_oldest_goes_first() -> None:
    buffer = simple(7, num_envs=3)
    assert buffer.capacity_rows == 3 and buffer.sampler.slots == 9  # type: ignore[attr-defined]
    for i in range(5):
        assert len(buffer) == buffer.transitions == 3 * min(i, 3)
        step(buffer, i)
    batch = draw(buffer, list(range(9)))
    # Rows 3, 4, 2 lie in the ring; environments are a quarter apart.
    assert batch.reward.tolist() == [3, 3.25, 3.5, 4, 4.25, 4.5, 2, 2.25, 2.5]
    assert buffer.sampler.writes == [(0, 3), (3, 3), (6, 3), (0, 3), (3, 3)]  # type: ignore[attr-defined]


def test_a_buffer_for_one_vector_step_works() -> None:
    buffer = simple(3, num_envs=3, n_step=3)
    for i in range(3):
        step(buffer, i)
    batch = draw(buffer, [0, 1, 2])
    assert batch.reward.tolist() == [2, 2.25, 2.5]
    assert batch.discount.tolist() == pytest.approx([0.99] * 3)


def test_arguments_that_make_no_sense() -> None:
    for arguments in ({"capacity": 2, "num_envs": 3}, {"n_step": 0}):
        with pytest.raises(RloptError, match="capacity >= num_envs"):
            simple(**arguments)
    with pytest.raises(RloptError, match="no transition yet"):
        simple().sample(1)


def test_one_that_does_not_fit_is_refused_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlopt.buffers.placement.free_memory", lambda device: 2**30)
    image = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    with pytest.raises(RloptError) as error:
        ReplayBuffer(1_000_000, image, spaces.Discrete(4))
    message = str(error.value)
    assert "1,000,000" in message and "52.6 GiB" in message and "1.0 GiB free" in message  # 1e6 · 56,468 bytes
    assert "buffer.capacity" in message and "buffer.device" in message and "\n" not in message
    assert ReplayBuffer(1_000, image, spaces.Discrete(4)).nbytes == 1_000 * (2 * 4 * 84 * 84 + 4 * 5)


def test_the_planned_size_is_told() -> None:
    line = ReplayBuffer(1_000, spaces.Box(-1, 1, (17,)), spaces.Box(-1, 1, (6,))).describe()
    assert "1,000 transitions" in line and "176 bytes" in line  # 4·(17 + 17 + 6 + reward, terminated, reset, valid)


def test_priorities_reach_the_sampler() -> None:
    buffer = simple()
    step(buffer, 0)
    index, priority = torch.tensor([0]), torch.tensor([0.5])
    buffer.update_priority(index, None)
    buffer.update_priority(index, priority)
    assert buffer.sampler.priorities == [(index, priority)]  # type: ignore[attr-defined]


def test_importance_weights_are_passed_on() -> None:
    buffer = simple()
    step(buffer, 0)
    weights = torch.tensor([0.25, 1.0])
    buffer.sampler.sample = lambda batch_size, size: (torch.tensor([0, 0]), weights)  # type: ignore[method-assign]
    assert buffer.sample(2).weight is weights


# --- n-step windows -------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One environment's part of one vector step; None among them stands for a row of no transitions."""

    obs: float
    reward: float
    next_obs: float
    terminated: bool
    cut: bool
    valid: bool


def oracle(history: list[list[Cell]], row: int, env: int, n: int, gamma: float) -> tuple[float, float, float, bool]:
    """Return, discount, last next observation and termination of the window from (row, env), the slow way."""
    total, k = 0.0, 0
    while True:
        cell = history[row][env]
        total += gamma**k * cell.reward
        k += 1
        over = k == n or cell.terminated or cell.cut or row + 1 == len(history)
        if over or not history[row + 1][env].valid:
            return total, gamma**k, cell.next_obs, cell.terminated
        row += 1


events = st.sampled_from(["go"] * 6 + ["terminate", "truncate", "life", "reset", "invalid"])
vector_steps = st.lists(st.one_of(st.lists(events, min_size=2, max_size=2), st.none()), min_size=1, max_size=24)


@settings(max_examples=150, deadline=None)
@given(vector_steps, st.integers(1, 5), st.integers(3, 9))
def test_windows_equal_brute_force(script: list[list[str] | None], n: int, rows: int) -> None:
    """Random histories of two environments: terminations, truncations, lost lives (terminated without a reset), resets
    without either, invalid rows, cuts; shorter than the ring and wrapped around it."""
    gamma = 0.9
    buffer = simple(2 * rows, num_envs=2, n_step=n, gamma=gamma)
    history: list[list[Cell]] = []
    for i, row in enumerate(script):
        if row is None:
            buffer.add_cut()
            history.append([Cell(0, 0, 0, False, False, False)] * 2)
            continue
        cells = [
            Cell(
                obs=i + 0.25 * e,
                reward=float((7 * i + 3 * e) % 5 - 2),
                next_obs=i + 0.5 + 0.25 * e,
                terminated=event in ("terminate", "life"),
                cut=event in ("terminate", "truncate", "reset"),
                valid=event != "invalid",
            )
            for e, event in enumerate(row)
        ]
        truncated = torch.tensor([event == "truncate" for event in row])
        buffer.add(
            torch.tensor([[c.obs] for c in cells]),
            torch.zeros(2, dtype=torch.int64),
            torch.tensor([c.reward for c in cells]),
            torch.tensor([[c.next_obs] for c in cells]),
            torch.tensor([c.terminated for c in cells]),
            truncated,
            ended=torch.tensor([c.cut for c in cells]),
            valid=None if all(c.valid for c in cells) else torch.tensor([c.valid for c in cells]),
        )
        history.append(cells)
    held = range(max(0, len(history) - rows), len(history))
    where = [(row, env) for row in held for env in range(2) if history[row][env].valid]
    assert buffer.transitions == len(where)
    if not where:
        return
    batch = draw(buffer, [(row % rows) * 2 + env for row, env in where])
    for i, (row, env) in enumerate(where):
        total, discount, next_obs, terminated = oracle(history, row, env, n, gamma)
        assert batch.obs[i].item() == history[row][env].obs  # type: ignore[index]
        assert batch.reward[i].item() == pytest.approx(total, abs=1e-5)
        assert batch.discount[i].item() == pytest.approx(discount, abs=1e-6)
        assert batch.next_obs[i].item() == next_obs  # type: ignore[index]
        assert batch.terminated[i].item() == terminated


def test_windows_by_hand() -> None:
    """γ = ½, n = 3: rewards 1, 2, 4, then a truncation, then a new episode with 8."""
    buffer = simple(8, n_step=3, gamma=0.5)
    yes = torch.tensor([True])
    step(buffer, 1)
    step(buffer, 2)
    step(buffer, 4, truncated=yes)
    step(buffer, 8)
    batch = draw(buffer, [0, 1, 2, 3])
    assert batch.reward.tolist() == [1 + 1 + 1, 2 + 2, 4, 8]
    assert batch.discount.tolist() == [0.125, 0.25, 0.5, 0.5]
    assert batch.next_obs.flatten().tolist() == [4.5, 4.5, 4.5, 8.5]  # type: ignore[union-attr]
    assert batch.terminated.tolist() == [0, 0, 0, 0]  # a truncation does not cut the bootstrap


def test_without_flags_the_episode_ends_where_terminated_or_truncated() -> None:
    buffer = simple(8, n_step=2, gamma=0.5)
    yes = torch.tensor([True])
    step(buffer, 1, terminated=yes)
    step(buffer, 2)
    step(buffer, 4, truncated=yes)
    step(buffer, 8)
    batch = draw(buffer, [0, 1, 2])
    assert batch.reward.tolist() == [1, 4, 4] and batch.terminated.tolist() == [1, 0, 0]


def test_numbers_in_rows_that_are_no_transitions_never_leak() -> None:
    """A row marked invalid may hold anything, even what is not a number."""
    buffer = simple(8, n_step=3, gamma=0.5)
    step(buffer, 1)
    step(buffer, float("nan"), valid=torch.tensor([False]))
    step(buffer, 4)
    batch = draw(buffer, [0, 2])
    assert batch.reward.tolist() == [1, 4] and batch.discount.tolist() == [0.5, 0.5]


# --- drawing --------------------------------------------------------------------------------------------------------


def test_invalid_rows_are_never_drawn_and_the_rest_evenly() -> None:
    buffer = ReplayBuffer(8, SCALAR, spaces.Discrete(4), num_envs=2, seed=3)
    for i in range(6):
        step(buffer, i, valid=torch.tensor([i % 2 == 0, True]))
    buffer.add_cut()
    assert buffer.rows_written == 7
    # Held rows: 3, 4, 5 and the cut; of environment 0 only row 4.
    assert (len(buffer), buffer.transitions) == (8, 4)
    rewards = buffer.sample(4000).reward
    assert set(rewards.tolist()) == {4.0, 3.25, 4.25, 5.25}
    for value in (4.0, 3.25, 4.25, 5.25):
        assert (rewards == value).float().mean().item() == pytest.approx(0.25, abs=0.04)


def test_an_overwritten_invalid_row_is_forgotten() -> None:
    buffer = simple(2)
    no = torch.tensor([False])
    step(buffer, 0, valid=no)
    assert buffer.transitions == 0
    with pytest.raises(RloptError, match="no transition yet"):
        buffer.sample(1)
    step(buffer, 1)
    step(buffer, 2)
    assert (len(buffer), buffer.transitions) == (2, 2)
    step(buffer, 3, valid=no)
    step(buffer, 4, valid=no)
    step(buffer, 5)
    assert buffer.transitions == 1


def test_uniform_draws_pass_a_chi_square_test() -> None:
    buffer = ReplayBuffer(50, SCALAR, spaces.Discrete(4), num_envs=2, seed=0)
    for i in range(60):
        step(buffer, i)
    counts = torch.zeros(50)
    for _ in range(200):
        counts += torch.bincount(buffer.sample(250).index, minlength=50)
    statistic = ((counts - 1000).square() / 1000).sum().item()
    assert 20 < statistic < 95  # 49 degrees of freedom: beyond either side with probability below 1e-4


def test_a_partly_filled_buffer_draws_only_what_was_written() -> None:
    buffer = ReplayBuffer(100, SCALAR, spaces.Discrete(4), seed=0)
    for i in range(3):
        step(buffer, i)
    assert set(buffer.sample(200).index.tolist()) == {0, 1, 2}


def test_draws_depend_on_the_seed_alone() -> None:
    def first(seed: int) -> Tensor:
        buffer = ReplayBuffer(100, SCALAR, spaces.Discrete(4), seed=seed)
        for i in range(100):
            step(buffer, i)
        torch.rand(seed + 1)
        return torch.stack([buffer.sample(32).index for _ in range(3)])

    before = torch.random.get_rng_state()
    a = first(0)
    torch.random.set_rng_state(before)
    assert torch.equal(a, first(0)) and not torch.equal(a, first(1))
