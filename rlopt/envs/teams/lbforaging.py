"""lbforaging's boards as single Gymnasium environments, with a time limit that is one, and pictures."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from rlopt.envs.arrays import Array
from rlopt.envs.teams.lbf import MAX_LEVEL, Team, check_task
from rlopt.random import numpy_state, set_numpy_state
from rlopt.types import State

_CELL = 40
"""Pixels of a cell."""
_WHITE, _LINE, _FOOD, _PIP = 255, 210, (214, 69, 65), 255
_PLAYERS = ((65, 105, 190), (60, 150, 90), (160, 100, 170), (230, 150, 50))


class ForagingEnv(gymnasium.Env[Any, Any]):
    """Level-based foraging by lbforaging (version 3), which says that a game is over when its time is up: here that is
    left to Gymnasium's time limit.

    Args:
        size: see ``rlopt.envs.teams.lbf.Foraging``; so are the others.
        render_mode: ``rgb_array`` or None.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 5}

    def __init__(
        self,
        size: int = 8,
        players: int = 2,
        foods: int = 2,
        coop: bool = False,
        sight: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        from lbforaging.foraging.environment import ForagingEnv as Board

        sight = size if sight is None else sight
        check_task(size, players, foods, sight)
        team = Team(size, players, foods, sight)
        self.board: Any = Board(
            players=players,
            min_player_level=1,
            max_player_level=MAX_LEVEL,
            min_food_level=1,
            max_food_level=None,
            field_size=(size, size),
            max_num_food=foods,
            sight=sight,
            max_episode_steps=2**31,
            force_coop=coop,
        )
        self.render_mode, self._foods = render_mode, foods
        self.observation_space, self.action_space = team.observation_space, team.action_space
        self.metadata = {
            **self.metadata,
            "agents": team.agents,
            "agent_spaces": team.own,
            "reward_shape": (players,),
            "derived": team.derived,
        }

    @property
    def np_random(self) -> np.random.Generator:
        """The board's."""
        return self.board.np_random  # type: ignore[no-any-return]

    @np_random.setter
    def np_random(self, value: np.random.Generator) -> None:
        self.board.np_random = value

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        seen, info = self.board.reset(seed=seed, options=options)
        return self._joined(seen), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        seen, rewards, over, _, info = self.board.step(np.asarray(action).tolist())
        return self._joined(seen), np.array(rewards, np.float64), bool(over), False, info

    def _joined(self, seen: Any) -> dict[str, Array]:
        return {"obs": np.stack(seen), "state": self.state()}

    def state(self) -> Array:
        """Return the whole board as ``rlopt.envs.teams.lbf`` writes it down, (3 · foods + 3 · players,)."""
        board, food = self.board, np.tile(np.array([-1.0, -1.0, 0.0], np.float32), (self._foods, 1))
        rows, columns = np.nonzero(board.field)
        food[: len(rows)] = np.stack((rows, columns, board.field[rows, columns]), 1)
        players = np.array([(*player.position, player.level) for player in board.players], np.float32)
        return np.concatenate((food.reshape(-1), players.reshape(-1)))

    def render(self) -> Any:
        """Return a picture: food is square, players are round, and have as many dots as their level."""
        if self.render_mode is None:
            return None
        size = self.board.rows
        picture = np.full((size * _CELL, size * _CELL, 3), _WHITE, np.uint8)
        picture[::_CELL] = picture[:, ::_CELL] = _LINE
        y, x = np.mgrid[:_CELL, :_CELL] - (_CELL - 1) / 2
        square, disc = np.maximum(abs(x), abs(y)) < _CELL * 0.36, x**2 + y**2 < (_CELL * 0.4) ** 2
        for row, column in zip(*np.nonzero(self.board.field), strict=True):
            _draw(picture, row, column, square, _FOOD, int(self.board.field[row, column]))
        for i, player in enumerate(self.board.players):
            row, column = player.position
            _draw(picture, row, column, disc, _PLAYERS[i % len(_PLAYERS)], int(player.level))
        return picture

    def state_dict(self) -> State:
        """Return the board."""
        board = self.board
        return {
            "field": board.field.copy(),
            "players": [[*map(int, p.position), int(p.level), float(p.score), float(p.reward)] for p in board.players],
            "spawned": float(board._food_spawned),
            "steps": board.current_step,
            "generator": numpy_state(board.np_random),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue where ``state_dict`` stood."""
        board = self.board
        board.field = np.array(state["field"], np.int32)
        for player, (row, column, level, score, reward) in zip(board.players, state["players"], strict=True):
            player.setup((row, column), level, board.field_size)
            player.score, player.reward = score, reward
        board._food_spawned, board.current_step, board._game_over = state["spawned"], state["steps"], False
        set_numpy_state(board.np_random, state["generator"])
        board._gen_valid_moves()

    def close(self) -> None:
        self.board.close()


def _draw(picture: Array, row: int, column: int, shape: Array, color: tuple[int, int, int], level: int) -> None:
    """Draw a thing into its cell, with dots for its level."""
    cell = picture[row * _CELL : (row + 1) * _CELL, column * _CELL : (column + 1) * _CELL]
    cell[shape] = color
    for k in range(level):
        top, left = _CELL // 2 - 8 + 8 * (k // 3), _CELL // 2 - 11 + 8 * (k % 3)
        cell[top : top + 5, left : left + 5] = _PIP
