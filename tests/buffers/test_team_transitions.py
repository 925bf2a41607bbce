"""Several agents are an axis of what is stored: rewards, masks and derived leaves through draws, windows and slices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.buffers import ReplayBuffer, SequenceSampler, UniformSampler
from rlopt.buffers.layout import Layout
from rlopt.types import RloptError

N, AGENTS, S, WIDTH = 2, 3, 7, 4
INDEX = torch.tensor([[0, 1, 2, -1], [3, 4, 3, 0], [6, -1, -1, 5]])
"""Agents see 3, 4 and 2 entries of the state; the rest of their observation is padding."""
SPACE = spaces.Dict(
    {
        "obs": spaces.Box(-np.inf, np.inf, (AGENTS, WIDTH)),
        "state": spaces.Box(-np.inf, np.inf, (S,)),
        "action_mask": spaces.MultiBinary((AGENTS, 5)),
        "alive": spaces.MultiBinary(AGENTS),
    }
)
ACTION = spaces.MultiDiscrete([5] * AGENTS)


def observation(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    state = torch.randn(N, S, generator=g)
    padded = torch.cat((state, torch.zeros(N, 1)), 1)
    return {
        "obs": padded[:, INDEX],  # -1 is the last one, a zero
        "state": state,
        "action_mask": torch.rand(N, AGENTS, 5, generator=g) < 0.5,
        "alive": torch.rand(N, AGENTS, generator=g) < 0.5,
    }


def step(t: int, ends: bool = False) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1000 + t)
    no = torch.zeros(N, dtype=torch.bool)
    return {
        "obs": observation(t),
        "action": torch.randint(5, (N, AGENTS), generator=g),
        "reward": torch.randn(N, AGENTS, generator=g),
        "next_obs": observation(t + 1),
        "terminated": no,
        "truncated": no | ends,
    }


def filled(steps: int = 6, **options: Any) -> ReplayBuffer:
    buffer = ReplayBuffer(8 * N, SPACE, ACTION, N, reward_shape=(AGENTS,), **options)
    for t in range(steps):
        buffer.add(**step(t, ends=t == 3))
    return buffer


@pytest.mark.parametrize("derived", [None, {"obs": INDEX}])
def test_a_teams_transitions_come_back_exactly(derived: Any) -> None:
    buffer = filled(derived=derived)
    for slot in range(6 * N):
        t, e = divmod(slot, N)
        batch, given = buffer.batch(torch.tensor([slot])), step(t)
        assert list(batch.obs) == list(SPACE.spaces)
        for name in ("obs", "next_obs"):
            for key, leaf in given[name].items():
                got = getattr(batch, name)[key]
                assert got.dtype == leaf.dtype and torch.equal(got, leaf[e : e + 1])
        assert torch.equal(batch.action, given["action"][e : e + 1]) and batch.action.dtype == torch.int64
        assert torch.equal(batch.reward, given["reward"][e : e + 1])


def test_n_step_returns_of_every_agent() -> None:
    buffer = filled(n_step=3, gamma=0.5)
    batch = buffer.batch(torch.tensor([0, 2 * N + 1, 5 * N]))
    rewards = [step(t)["reward"] for t in range(6)]
    expected = [
        rewards[0][0] + 0.5 * rewards[1][0] + 0.25 * rewards[2][0],
        rewards[2][1] + 0.5 * rewards[3][1],  # the episode ends with step 3
        rewards[5][0],
    ]
    torch.testing.assert_close(batch.reward, torch.stack(expected))
    assert batch.discount.tolist() == [0.125, 0.25, 0.5] and batch.terminated.shape == (3,)


def test_slices_of_every_agent() -> None:
    buffer = filled(sampler=SequenceSampler(UniformSampler(), 4), derived={"obs": INDEX})
    batch = buffer.batch(torch.tensor([2 * N, 4 * N + 1]))
    assert batch.valid.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert batch.reward.shape == (2, 4, AGENTS) and batch.obs["action_mask"].dtype == torch.bool
    for i, (t, e) in enumerate(((2, 0), (4, 1))):
        assert torch.equal(batch.reward[i, 1], step(t + 1)["reward"][e])
        assert torch.equal(batch.obs["obs"][i, 1], observation(t + 1)["obs"][e])
        assert torch.equal(batch.next_obs["alive"][i, 1], observation(t + 2)["alive"][e])
        assert not batch.reward[i, 2:].any() and not batch.obs["obs"][i, 2:].any()


def test_a_teams_buffer_is_saved_and_restored() -> None:
    buffer, back = (filled(steps, derived={"obs": INDEX}, seed=7) for steps in (6, 0))
    back.load_state_dict(buffer.state_dict())
    back.write_rows(0, buffer.read_rows(0, 6))
    for _ in range(3):
        a, b = buffer.sample(5), back.sample(5)
        assert torch.equal(a.index, b.index) and torch.equal(a.reward, b.reward)
        assert all(torch.equal(a.obs[key], b.obs[key]) for key in a.obs)


def test_derived_leaves_take_no_memory() -> None:
    """Ant 8x1 of Multi-Agent MuJoCo: eight agents, each of which sees the 111 entries of the state and 8 of padding."""
    ant = spaces.Dict(
        {
            "obs": spaces.Box(-np.inf, np.inf, (8, 119)),
            "state": spaces.Box(-np.inf, np.inf, (111,)),
            "alive": spaces.MultiBinary(8),
        }
    )
    index = torch.cat((torch.arange(111).expand(8, -1), torch.full((8, 8), -1)), 1)
    million = 1_000_000
    layout = Layout(million, 1, ant, spaces.Box(-1, 1, (8, 1)), reward_shape=(8,), derived={"obs": index})
    assert layout.nbytes <= 2**30
    assert Layout(million, 1, ant, spaces.Box(-1, 1, (8, 1))).nbytes > 7.5 * 2**30


def test_derived_leaves_need_not_be_given_but_must_be_right() -> None:
    buffer = filled(0, derived={"obs": INDEX})
    wrong = step(0)
    wrong["next_obs"] = {**wrong["next_obs"], "obs": wrong["next_obs"]["obs"] + 1}
    with pytest.raises(RloptError, match=r"derived\['obs'\] does not give next_obs\['obs'\] from next_obs\['state'\]"):
        buffer.add(**wrong)
    assert len(buffer) == 0
    bare = step(0)
    for name in ("obs", "next_obs"):
        bare[name] = {key: leaf for key, leaf in bare[name].items() if key != "obs"}
    buffer.add(**bare)
    assert torch.equal(buffer.batch(torch.tensor([1])).obs["obs"][0], observation(0)["obs"][1])


@pytest.mark.parametrize(
    ("derived", "message"),
    [
        ({"view": INDEX}, "needs observations of that name"),
        ({"state": torch.arange(S)}, "needs observations of that name"),
        ({"obs": INDEX[:2]}, r"has shape \(2, 4\); the leaf has \(3, 4\)"),
        ({"alive": torch.zeros(AGENTS)}, "of the type of state"),
        ({"obs": INDEX + 1}, "points beyond the 7 entries of state"),
    ],
)
def test_derived_leaves_that_cannot_be(derived: Any, message: str) -> None:
    with pytest.raises(RloptError, match=message):
        filled(0, derived=derived)


# --- what learning makes of rewards ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "made"), [("raw", [3, -0.5, 0]), ("sign", [1, -1, 0]), ("clip", [1, -0.5, 0])])
@pytest.mark.parametrize("shape", [(), (2,)])
def test_each_single_reward_is_transformed_before_windows_are_summed(
    word: str, made: list[float], shape: tuple[int, ...]
) -> None:
    box, no = spaces.Box(-1, 1, (1,)), torch.tensor([False])
    singles, windows, slices = (
        ReplayBuffer(8, box, spaces.Discrete(2), reward_transform=word, reward_shape=shape, gamma=0.5, **options)
        for options in ({}, {"n_step": 3}, {"sampler": SequenceSampler(UniformSampler(), 3)})
    )
    for reward in (3.0, -0.5, 0.0):
        for buffer in (singles, windows, slices):
            buffer.add(torch.zeros(1, 1), torch.tensor([0]), torch.full((1, *shape), reward), torch.zeros(1, 1), no, no)
    column = torch.tensor(made).view(-1, *[1] * len(shape)).expand(3, *shape)
    assert torch.equal(singles.batch(torch.arange(3)).reward, column)
    assert torch.equal(windows.batch(torch.tensor([0])).reward[0], column[0] + 0.5 * column[1] + 0.25 * column[2])
    assert torch.equal(slices.batch(torch.tensor([0])).reward[0], column)
    assert singles.storage.held("reward", 3)[:, 0, 0].tolist() == [3.0, -0.5, 0.0]  # what is stored stays raw


def test_an_unknown_transform_is_an_error() -> None:
    with pytest.raises(RloptError, match=r"reward_transform='log' is unknown; choose one of raw, sign, clip"):
        ReplayBuffer(8, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), reward_transform="log")
