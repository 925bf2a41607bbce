"""Offline data in a replay buffer: what is drawn is what single additions would have given."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.buffers import PrioritizedSampler, ReplayBuffer, ReshuffledSampler, SequenceSampler, UniformSampler
from rlopt.buffers.datasets import from_episodes
from rlopt.types import RloptError

SPACE = spaces.Dict({"arm": spaces.Box(-1, 1, (2,)), "camera": spaces.Box(0, 255, (2, 2, 2), np.uint8)})
ENDS = {4: "terminated", 9: "truncated", 10: "truncated"}


def dataset(count: int = 13, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    arm = rng.uniform(-1, 1, (count + 1, 2))
    frames = rng.integers(0, 256, (count + 2, 2, 2), np.uint8)
    stacks = np.stack((frames[:-1], frames[1:]), 1)
    return {
        "obs": {"arm": arm[:-1], "camera": stacks[:-1]},
        "action": rng.integers(0, 3, count),
        "reward": rng.normal(size=count),
        "next_obs": {"arm": arm[1:], "camera": stacks[1:]},
        **{name: np.array([ENDS.get(i) == name for i in range(count)]) for name in ("terminated", "truncated")},
        "score": rng.normal(size=count).astype(np.float32),
    }


def make(capacity: int = 20, **options: Any) -> ReplayBuffer:
    fields = {"score": ((), torch.float32)}
    return ReplayBuffer(capacity, SPACE, spaces.Discrete(3), extra_fields=fields, seed=5, **options)


def add_each(buffer: ReplayBuffer, data: dict[str, Any]) -> None:
    """One by one, the last of them as an end."""
    count = len(data["reward"])
    for i in range(count):
        row = {name: {k: v[i] for k, v in x.items()} if isinstance(x, dict) else x[i] for name, x in data.items()}
        buffer.add(**row, ended=bool(row["terminated"] or row["truncated"] or i == count - 1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_step": 3},
        {"frame_stack": 2, "n_step": 2},
        {"sampler": ReshuffledSampler()},
        {"sampler": PrioritizedSampler()},
        {"sampler": SequenceSampler(UniformSampler(), 4, "episode")},
        {"sampler": {"all": UniformSampler(), "some": UniformSampler()}},
    ],
    ids=["uniform", "n-step", "frames", "reshuffled", "prioritized", "slices", "several"],
)
def test_a_data_set_is_what_single_additions_would_be(options: dict[str, Any]) -> None:
    """Twice, so that the second one goes on at the ring's end and overwrites the first."""
    ours, theirs = make(**copy.deepcopy(options)), make(**copy.deepcopy(options))
    for seed in (0, 1):
        ours.extend(dataset(seed=seed))
        add_each(theirs, dataset(seed=seed))
        assert (len(ours), ours.transitions) == (len(theirs), theirs.transitions)
        for _ in range(4):
            a, b = ours.sample(7), theirs.sample(7)
            pairs = [(a, b)] if not isinstance(a, dict) else [(a[name], b[name]) for name in a]
            for x, y in pairs:
                for name in ("index", "action", "reward", "terminated", "discount"):
                    assert torch.equal(getattr(x, name), getattr(y, name))
                for tree, other in ((x.obs, y.obs), (x.next_obs, y.next_obs), (x.extras, y.extras)):
                    assert all(torch.equal(tree[key], other[key]) for key in other)


def test_no_window_goes_from_one_data_set_into_what_comes_next() -> None:
    buffer = make(30, n_step=4)
    buffer.extend(dataset(3))
    data = dataset(2, seed=1)
    add_each(buffer, data)
    buffer.extend(dataset(4, seed=2))
    assert buffer.batch(torch.tensor([1, 3, 7])).discount.tolist() == pytest.approx([0.99**2, 0.99**2, 0.99**2])


@dataclass
class Episode:
    observations: Any
    actions: Any
    rewards: Any
    terminations: Any
    truncations: Any


class Episodes:
    def __init__(self, *episodes: Any) -> None:
        self.episodes = episodes

    def iterate_episodes(self) -> Any:
        return iter(self.episodes)


def episode(length: int, first: float, terminated: bool = False) -> Episode:
    """Observations count from ``first`` on."""
    numbers = first + np.arange(length + 1.0)
    flags = np.zeros(length, bool)
    end = flags.copy()
    end[-1] = terminated
    return Episode({"a": (numbers[:, None], -numbers[:, None])}, np.zeros(length, int), numbers[1:], end, flags)


def test_episodes_become_transitions() -> None:
    data = from_episodes(Episodes(episode(2, 0, terminated=True), episode(3, 10)))
    assert data["obs"]["a/0"].flatten().tolist() == [0, 1, 10, 11, 12]
    assert data["next_obs"]["a/1"].flatten().tolist() == [-1, -2, -11, -12, -13]
    assert data["terminated"].tolist() == [False, True, False, False, False]
    assert data["truncated"].tolist() == [False, False, False, False, True]  # where the recording stopped
    space = spaces.Dict({"a/0": spaces.Box(-99, 99, (1,)), "a/1": spaces.Box(-99, 99, (1,))})
    buffer = ReplayBuffer(8, space, spaces.Discrete(2), n_step=3, gamma=0.5)
    buffer.extend(Episodes(episode(2, 0, terminated=True), episode(3, 10)))
    assert buffer.batch(torch.arange(5)).reward.tolist() == [2, 2, 11 + 6 + 3.25, 12 + 6.5, 13]


def test_a_minari_data_set(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    from minari.data_collector import EpisodeBuffer

    rng = np.random.default_rng(0)
    buffers = [
        EpisodeBuffer(
            id=i,
            observations=[rng.uniform(-1, 1, 3) for _ in range(6)],
            actions=[rng.uniform(-1, 1, 1) for _ in range(5)],
            rewards=[float(i)] * 5,
            terminations=[False] * 4 + [i == 0],
            truncations=[False] * 4 + [i == 1],
        )
        for i in range(2)
    ]
    space, action = spaces.Box(-1, 1, (3,), np.float64), spaces.Box(-1, 1, (1,), np.float64)
    data = minari.create_dataset_from_buffers(
        "tests/two-v0", buffers, observation_space=space, action_space=action, algorithm_name="none", author="none",
        author_email="none", code_permalink="none", description="none",
    )  # fmt: skip
    buffer = ReplayBuffer(20, space, action, n_step=2)
    buffer.extend(data)
    batch = buffer.batch(torch.arange(10))
    assert torch.equal(batch.obs, torch.from_numpy(np.concatenate([b.observations[:5] for b in buffers])).float())
    assert batch.terminated.tolist() == [0, 0, 0, 1, 1] + [0] * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": None}, "this one lacks reward"),
        ({"value": np.zeros(13)}, "this one has value too"),
        ({"score": None, "value": np.zeros(13)}, "this one lacks score and has value too"),
        ({"action": np.zeros(12, int)}, r"action has shape \(12,\); this buffer takes \(13,\)"),
        ({"obs": {"arm": np.zeros((13, 2))}}, "observations differ in obs/camera"),
        ({"obs": {"arm": np.zeros((13, 2)), "camera": np.zeros((13, 2, 2, 2))}}, "this buffer keeps torch.uint8"),
        ({"reward": "none"}, "this buffer takes|no array"),
    ],
)
def test_data_sets_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    buffer = make()
    with pytest.raises(RloptError, match=message):
        buffer.extend({**dataset(), **change})
    assert len(buffer) == 0


def test_where_data_sets_do_not_go() -> None:
    with pytest.raises(RloptError, match="13 transitions do not fit a capacity of 12"):
        make(12).extend(dataset())
    with pytest.raises(RloptError, match="extend needs num_envs=1, not 2"):
        make(num_envs=2).extend(dataset())
    with pytest.raises(RloptError, match="no episodes"):
        make().extend(Episodes())
