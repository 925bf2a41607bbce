"""What comes out of a storage is what went in, whatever the spaces; and what does not fit is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.buffers import ReplayBuffer
from rlopt.types import RloptError

SCALAR = spaces.Box(-np.inf, np.inf, (1,))
OBSERVATIONS: dict[str, spaces.Space[Any]] = {
    "vector": spaces.Box(-np.inf, np.inf, (3,)),
    "scalar": spaces.Box(-1, 1, ()),
    "matrix": spaces.Box(-1, 1, (2, 3)),
    "double": spaces.Box(-1, 1, (2,), np.float64),
    "discrete": spaces.Discrete(9, start=2**24 - 9),
    "multi_discrete": spaces.MultiDiscrete([3, 300]),
    "multi_binary": spaces.MultiBinary(5),
    "image": spaces.Box(0, 255, (3, 4, 5), np.uint8),
    "bytes": spaces.Box(0, 255, (7,), np.uint8),
    "dict": spaces.Dict(
        {
            "arm": spaces.Box(-1, 1, (2,)),
            "arm/tip": spaces.Box(-1, 1, (1,)),
            "camera": spaces.Box(0, 255, (2, 3, 3), np.uint8),
            "place": spaces.Discrete(5),
            "bits": spaces.MultiBinary([2, 2]),
        }
    ),
}
ACTIONS: list[spaces.Space[Any]] = [
    spaces.Box(-2, 2, (2,)),
    spaces.Discrete(4, start=-1),
    spaces.MultiDiscrete([3, 4]),
    spaces.MultiDiscrete([[3, 4], [2, 5], [6, 2]]),
    spaces.MultiBinary(3),
]
IDS = ["box", "discrete", "multi_discrete", "heads", "multi_binary"]


def content(space: spaces.Space[Any], n: int, seed: int, action: bool = False) -> Any:
    """A batch of ``n`` observations as the environment's edge gives them: float32, uint8, int64, or bool (masks); or of
    actions, which are never bool."""
    if isinstance(space, spaces.Dict):
        return {k: content(s, n, seed + i) for i, (k, s) in enumerate(space.spaces.items())}
    space.seed(seed)
    value = torch.as_tensor(np.stack([np.asarray(space.sample()) for _ in range(n)]))
    if value.dtype == torch.uint8:
        return value
    if isinstance(space, spaces.MultiBinary):
        return value.long() if action else value.bool()
    return (
        value.to(torch.int64) if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) else value.to(torch.float32)
    )


def assert_rows(got: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert list(got) == list(expected)
        for key in expected:
            assert_rows(got[key], expected[key])
    else:
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert torch.equal(got, expected)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("observation", OBSERVATIONS)
@pytest.mark.parametrize("action_space", ACTIONS, ids=IDS)
def test_what_comes_out_is_what_went_in(observation: str, action_space: spaces.Space[Any], n: int) -> None:
    space = OBSERVATIONS[observation]
    fields = {
        "log_prob": ((), torch.float32),
        "switch": ((2,), torch.bool),
        "group": ((), torch.int64),
        "mask": ((3, 2), torch.uint8),
    }
    buffer = ReplayBuffer(12, space, action_space, num_envs=n, extra_fields=fields)
    rows = []
    for i in range(4):
        g = torch.Generator().manual_seed(i)
        row = {
            "obs": content(space, n, 10 * i),
            "action": content(action_space, n, 10 * i + 1, action=True),
            "reward": torch.randn(n, generator=g),
            "next_obs": content(space, n, 10 * i + 2),
            "terminated": torch.tensor([i == 2, True])[:n],
            "truncated": torch.tensor([i == 1, False])[:n],
            "log_prob": torch.randn(n, generator=g),
            "switch": torch.rand(n, 2, generator=g) < 0.5,
            "group": torch.tensor([2**24 - 1, i])[:n],
            "mask": torch.randint(256, (n, 3, 2), generator=g, dtype=torch.uint8),
        }
        buffer.add(**row, ended=None if i else torch.tensor([True, False])[:n])
        rows.append(row)
    ended = [(i in (0, 1, 2), i != 0)[:n] for i in range(4)]
    assert buffer.storage.held("ended", 4).view(4, n).tolist() == [[float(x) for x in row] for row in ended]
    for slot in range(4 * n):
        row, env = rows[slot // n], slot % n
        batch = buffer.batch(torch.tensor([slot]))

        def one(value: Any, env: int = env) -> Any:
            return {k: v[env : env + 1] for k, v in value.items()} if isinstance(value, dict) else value[env : env + 1]

        assert_rows(batch.obs, one(row["obs"]))
        assert_rows(batch.next_obs, one(row["next_obs"]))
        assert_rows(batch.action, one(row["action"]))
        assert_rows(batch.reward, one(row["reward"]))
        assert_rows(batch.terminated, one(row["terminated"]).float())
        assert_rows(batch.extras, {name: one(row[name]) for name in fields})
        assert batch.discount.tolist() == pytest.approx([0.99])
        assert batch.weight is None and batch.index.tolist() == [slot]


def test_a_step_that_lacks_a_field_is_an_error() -> None:
    """Otherwise the row would silently keep what lay there before."""
    buffer = ReplayBuffer(4, SCALAR, spaces.Discrete(2), extra_fields={"log_prob": ((), torch.float32)})
    one, flag = torch.zeros(1), torch.zeros(1, dtype=torch.bool)
    with pytest.raises(RloptError, match="log_prob"):
        buffer.add(torch.zeros(1, 1), one, one, torch.zeros(1, 1), flag, flag)
    with pytest.raises(RloptError, match="surplus"):
        buffer.add(torch.zeros(1, 1), one, one, torch.zeros(1, 1), flag, flag, log_prob=one, surplus=one)
    assert len(buffer) == 0


@pytest.mark.parametrize("n", [1, 3])
def test_a_field_of_the_wrong_size_or_kind_is_an_error(n: int) -> None:
    buffer = ReplayBuffer(4 * n, SCALAR, spaces.Discrete(2), num_envs=n)
    no = torch.zeros(n, dtype=torch.bool)
    right = {"obs": torch.zeros(n, 1), "action": torch.zeros(n, dtype=torch.int64), "reward": torch.zeros(n)}
    right |= {"next_obs": torch.zeros(n, 1), "terminated": no, "truncated": no}
    wrong = {"obs": torch.zeros(n, 2), "action": torch.zeros(n, 2), "reward": torch.zeros(n + 1)}
    wrong |= {"terminated": torch.zeros(n), "truncated": torch.zeros(n)}
    for name, value in wrong.items():
        with pytest.raises(RloptError):
            buffer.add(**{**right, name: value})
    assert len(buffer) == 0  # nothing was half stored
    with pytest.raises(RloptError, match=rf"obs has shape \({n}, 2\); this buffer takes \({n}, 1\)"):
        buffer.add(**{**right, "obs": wrong["obs"]})


@pytest.mark.parametrize("n", [1, 3])
def test_a_step_with_gradients_is_stored_without_them(n: int) -> None:
    buffer = ReplayBuffer(4 * n, SCALAR, spaces.Box(-1, 1, (2,)), num_envs=n)
    no = torch.zeros(n, dtype=torch.bool)
    obs, action, reward = (torch.full(shape, 0.5, requires_grad=True) for shape in ((n, 1), (n, 2), (n,)))
    buffer.add(obs, action, reward, obs, no, no)
    batch = buffer.batch(torch.arange(n))
    for value in (batch.obs, batch.action, batch.reward):
        assert not value.requires_grad and (value == 0.5).all()
