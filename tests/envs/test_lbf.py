"""Level-based foraging in torch, held equal to lbforaging step by step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from rlopt.envs import SyncVectorEnv, make_env
from rlopt.envs.teams.lbf import LOAD, NORTH, SOUTH, Foraging, _tables
from rlopt.types import RloptError

TASKS: list[dict[str, Any]] = [
    {"size": 8, "players": 2, "foods": 2, "coop": True},
    {"size": 8, "players": 2, "foods": 2, "coop": True, "sight": 2},
    {"size": 5, "players": 4, "foods": 2},
    {"size": 6, "players": 3, "foods": 3, "sight": 1},
]


@pytest.fixture(autouse=True, scope="module")
def _registry() -> Iterator[None]:
    """Importing lbforaging registers names, which other tests should not meet."""
    before = dict(gymnasium.registry)
    yield
    gymnasium.registry.clear()
    gymnasium.registry.update(before)


def _state(env: Any) -> torch.Tensor:
    return torch.from_numpy(np.append(env.state(), np.float32(env.board._food_spawned)))


@pytest.mark.parametrize("task", TASKS)
def test_boards_rewards_and_observations_equal_lbforagings(task: dict[str, Any]) -> None:
    pytest.importorskip("lbforaging")
    from rlopt.envs.teams.lbforaging import ForagingEnv

    n, generator = 4, np.random.default_rng(0)
    env, others = Foraging(n, **task), [ForagingEnv(**task) for _ in range(n)]
    env.reset()
    for i, other in enumerate(others):
        other.reset(seed=i)
    state = torch.stack([_state(other) for other in others])
    loaded, met = 0, 0
    for _ in range(100):
        # Towards food, so that it is loaded now and then; at random otherwise.
        action = torch.from_numpy(np.stack([_towards(other, generator) for other in others]))
        before = state
        state, reward, terminated = env.dynamics(state, action)
        seen = env.observe(state)
        assert isinstance(seen, dict)
        assert reward.dtype == torch.float64
        for i, other in enumerate(others):
            obs, paid, over, late, _ = other.step(action[i].numpy())
            assert torch.equal(state[i], _state(other))
            assert np.array_equal(reward[i], paid)
            assert np.array_equal(seen["obs"][i], obs["obs"])
            assert np.array_equal(seen["state"][i], obs["state"])
            assert (bool(terminated[i]), False) == (over, late)
            loaded += int(paid.any())
            met += int((before[i, -1 - 3 * task["players"] : -1] != state[i, -1 - 3 * task["players"] : -1]).any())
            if over:
                other.reset()
                state[i] = _state(other)
    assert loaded > 3
    assert met > 50


def _towards(env: Any, generator: Any) -> Any:
    """Return actions that lead players to the first food, or load it, three times out of four."""
    board, food = env.board, np.argwhere(env.board.field)[0]
    found = []
    for player in board.players:
        down, across = food - player.position
        wish = LOAD if abs(down) + abs(across) == 1 else (SOUTH if down > 0 else NORTH) if down else 3 + int(across > 0)
        found.append(wish if generator.random() < 0.75 else generator.integers(6))
    return np.array(found)


def test_a_board_is_drawn_by_lbforagings_rules() -> None:
    env = Foraging(2000, size=7, players=3, foods=3)
    env.reset()
    food, player = env._split(env.state)
    there = food[..., 2] > 0
    assert there[:, 0].all()
    assert there.float().mean() > 0.7, "some boards have no place for the last"
    spots = food[there][:, :2]
    assert spots.min() == 1
    assert spots.max() == 5, "never at the edge"
    assert player[..., :2].min() == 0
    assert player[..., :2].max() == 6
    assert (env.state[:, -1] == food[..., 2].sum(1)).all()
    levels = player[..., 2]
    assert sorted(set(levels.flatten().tolist())) == [1.0, 2.0]
    assert (food[..., 2] <= levels.sum(1, keepdim=True)).all()
    _, near = _tables(7)
    cell = (food[..., 0] * 7 + food[..., 1]).long()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        both = there[:, a] & there[:, b]
        assert not near[cell[both, a], cell[both, b]].any()
        assert (cell[both, a] < cell[both, b]).all(), "in the order of the board's cells"
    own = (player[..., 0] * 7 + player[..., 1]).long()
    every = torch.cat((torch.where(there, cell, -1 - torch.arange(3)), own), 1).sort(1).values
    assert (every.diff(dim=1) > 0).all(), "nothing is in the place of another"
    coop = Foraging(50, size=7, players=4, foods=1, coop=True)
    coop.reset()
    food, player = coop._split(coop.state)
    assert torch.equal(food[:, 0, 2], player[..., 2].sort(1).values[:, :3].sum(1))


def test_food_is_as_often_in_each_cell_as_in_lbforaging() -> None:
    pytest.importorskip("lbforaging")
    from rlopt.envs.teams.lbforaging import ForagingEnv

    n, task = 1500, {"size": 6, "players": 2, "foods": 2}
    env, other, theirs = Foraging(4 * n, **task), ForagingEnv(**task), np.zeros((6, 6))
    env.reset()
    other.reset(seed=0)
    for _ in range(n):
        other.reset()
        theirs += other.board.field > 0
    food = env._split(env.state)[0].reshape(-1, 3)
    food = food[food[:, 2] > 0].long()
    ours = torch.zeros(6, 6).index_put_((food[:, 0], food[:, 1]), torch.ones(len(food)), accumulate=True)
    np.testing.assert_allclose(ours / (4 * n), theirs / n, atol=0.04)
    assert (ours[1:5, 1:5] > 0).all()


def test_rows_that_begin_anew_are_drawn_for_alone_and_get_the_same_boards() -> None:
    class Whole(Foraging):
        draws_rows = False

    kinds = [kind(16, size=5, players=2, foods=1, seed=3) for kind in (Foraging, Whole)]
    for env in kinds:
        env.reset()
    generator = torch.Generator().manual_seed(0)
    ended = 0
    for _ in range(300):
        action = torch.randint(0, 6, (16, 2), generator=generator)
        one, other = (env.step(action) for env in kinds)
        assert torch.equal(one.obs["obs"], other.obs["obs"])
        assert torch.equal(one.next_obs["obs"], other.next_obs["obs"])
        assert torch.equal(one.reward, other.reward)
        ended += int(one.ended.sum())
    assert ended > 50


def test_its_time_limit_is_one() -> None:
    pytest.importorskip("lbforaging")
    first, second = make_env("lbf/8x8-2p-2f-coop", 2), make_env("lbf/8x8-2p-2f-coop", 2, backend="sync")
    assert isinstance(first, Foraging)
    assert isinstance(second, SyncVectorEnv)
    assert first.spec == second.spec
    for env in (first, second):
        env.reset()
        for k in range(50):
            step = env.step(torch.zeros(2, 2, dtype=torch.int64))
            assert step.truncated.tolist() == [k == 49] * 2
            assert not step.terminated.any()


def test_lbforagings_board_is_saved_and_drawn() -> None:
    pytest.importorskip("lbforaging")
    env = make_env("lbf/2s-8x8-2p-2f-coop", 2, backend="sync", kwargs={"render_mode": "rgb_array"})
    assert isinstance(env, SyncVectorEnv)
    env.reset()
    actions = torch.randint(0, 6, (120, 2, 2), generator=torch.Generator().manual_seed(0))
    for action in actions[:40]:
        env.step(action)
    state = env.state_dict()
    assert state is not None
    steps = [env.step(action) for action in actions[40:]]
    env.load_state_dict(state)
    for action, before in zip(actions[40:], steps, strict=True):
        after = env.step(action)
        assert torch.equal(after.obs["state"], before.obs["state"])  # type: ignore[index]
        assert torch.equal(after.reward, before.reward)
    picture = env.envs[0].render()
    assert isinstance(picture, np.ndarray)
    assert picture.shape == (320, 320, 3)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) >= 4


def test_what_a_board_is_worth_is_one() -> None:
    env = Foraging(1, size=5, players=2, foods=1, coop=True)
    env.reset()
    # Food of level 3 at (2, 2), players of level 1 and 2 above and below it.
    state = torch.tensor([[2.0, 2, 3, 1, 2, 1, 3, 2, 2, 3]])
    after, reward, terminated = env.dynamics(state, torch.tensor([[LOAD, NORTH]]))
    assert reward.tolist() == [[0.0, 0.0]], "one is not enough, and food is in the other one's way"
    assert torch.equal(after, state)
    after, reward, terminated = env.dynamics(state, torch.tensor([[LOAD, LOAD]]))
    assert reward.tolist() == [[1 / 3, 2 / 3]]
    assert terminated.all()
    assert after[0, :3].tolist() == [-1, -1, 0]


@pytest.mark.parametrize(
    ("name", "words"),
    [("lbf/8x8-2p", "write lbf/SIZExSIZE"), ("lbf/8x9-2p-2f", "write lbf/SIZExSIZE"), ("lbf/2x2-2p-1f", "size=2")],
)
def test_mistakes_are_one_clear_line(name: str, words: str) -> None:
    with pytest.raises(RloptError, match=words):
        make_env(name)
