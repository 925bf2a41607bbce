"""Level-based foraging in torch, all rows at once on any device.

It is lbforaging's version 3 (Albrecht and Ramamoorthy 2013; Papoudakis et al. 2021): from equal boards equal actions
lead to equal boards, rewards (in float64) and observations. What differs is how its time limit is told: as a limit,
so that the bootstrap goes on, where lbforaging says that the game is over.

A row's state is one vector (D,): three numbers (row, column, level) of each food, in the order of the board's cells and
those that are left first; of each player; and the sum of levels that the food had at first. Eaten food is (−1, −1, 0),
as in the observations, which are a gather of this state where players see the whole board.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.envs.streams import RowStreams
from rlopt.envs.torch_env import TorchEnv
from rlopt.joint import join_spaces
from rlopt.types import Obs, RloptError

NONE, NORTH, SOUTH, WEST, EAST, LOAD = range(6)
MAX_LEVEL = 2
"""Of players."""


def check_task(size: int, players: int, foods: int, sight: int) -> None:
    """Refuse a task that cannot be.

    Raises:
        RloptError: a number is out of range.
    """
    numbers = {"size": (size, 3), "players": (players, 1), "foods": (foods, 1), "sight": (sight, 1)}
    for name, (value, least) in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise RloptError(f"level-based foraging: {name}={value!r} must be a whole number of at least {least}")


class Team:
    """What foraging players are: spaces, and what they see where they see everything.

    Args:
        size: rows and columns of the board.
        players: how many there are.
        foods: at most so many are on the board.
        sight: how far players see.
    """

    def __init__(self, size: int, players: int, foods: int, sight: int) -> None:
        self.agents = tuple(f"agent_{i}" for i in range(players))
        most = MAX_LEVEL * min(players, 3)
        least = [-1, -1, 0] * (foods + players)
        most_food, most_player = [size - 1, size - 1, most], [size - 1, size - 1, MAX_LEVEL]
        seen = spaces.Box(np.array(least, np.float32), np.array(most_food * foods + most_player * players, np.float32))
        self.own = [(seen, spaces.Discrete(6))] * players
        self.observation_space, self.action_space = join_spaces(self.own, seen)
        self.whole = sight >= size
        first, others = list(range(3 * foods)), [list(range(players))] * players
        order = [[i, *(j for j in row if j != i)] for i, row in enumerate(others)]
        self.index = np.array([first + [3 * (foods + j) + k for j in row for k in range(3)] for row in order])
        """(n, O): where in the state each number of an observation lies, for those who see the whole board."""
        self.order = np.array(order)
        """(n, n): the players as each one sees them, itself first."""

    @property
    def derived(self) -> dict[str, Any]:
        return {"obs": self.index} if self.whole else {}


class Foraging(TorchEnv):
    """Players collect food on a board; food is loaded by those next to it whose levels together reach its own.

    Observation: ``obs``, what each player sees, and ``state``, the whole board. Actions: none, north, south, west,
    east, load. Who loads food is paid its share of the levels that loaded it, times the food's share of all levels:
    what all are paid for a board that was emptied is 1.

    Args:
        num_envs: N.
        size: rows and columns of the board.
        players: n.
        foods: how many are on it at first (fewer where there is no place for more).
        coop: whether food needs all players (the weakest three where there are more).
        sight: how far players see; the size or more for the whole board.
        options: of ``TorchEnv``.

    Raises:
        RloptError: a number is out of range.
    """

    episode_limit = 50
    draws_rows = True

    def __init__(
        self,
        num_envs: int,
        *,
        size: int = 8,
        players: int = 2,
        foods: int = 2,
        coop: bool = False,
        sight: int | None = None,
        **options: Any,
    ) -> None:
        sight = size if sight is None else sight
        check_task(size, players, foods, sight)
        team = Team(size, players, foods, sight)
        self.size, self.players, self.foods, self.coop, self.sight = size, players, foods, bool(coop), sight
        self.agents, self.agent_spaces, self.derived = team.agents, team.own, team.derived
        self.observation_space, self.action_space = team.observation_space, team.action_space
        self.reward_shape = (players,)
        super().__init__(num_envs, **options)
        device = self.device
        moves = [[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1], [0, 0]]
        self._moves = torch.tensor(moves, dtype=torch.float32, device=device)
        self._whole, self._index = team.whole, torch.from_numpy(team.index).reshape(-1).to(device)
        self._order = torch.from_numpy(team.order).to(device)
        self._others = ~torch.eye(players, dtype=torch.bool, device=device)
        self._gone = torch.tensor([-1.0, -1.0, 0.0], device=device)
        self._free, self._near = (table.to(device) for table in _tables(size))

    # Drawing boards

    def initial(self, streams: RowStreams) -> Tensor:
        size, n = self.size, streams.n
        free = torch.ones(n, size * size, dtype=torch.bool, device=self.device)
        drawn = streams.uniform(size=2 * self.players + 2 * self.foods)
        numbers = iter(drawn.unbind(1))
        cells = []
        for _ in range(self.players):
            cell, _ = _choose(free, next(numbers))
            free.scatter_(1, cell[:, None], False)
            cells.append(cell)
        levels = torch.stack([1 + (next(numbers) * MAX_LEVEL).long() for _ in range(self.players)], 1)
        most = levels.sort(1).values[:, :3].sum(1)
        free &= self._free
        found, strengths = [], []
        for _ in range(self.foods):
            cell, there = _choose(free, next(numbers))
            free &= ~self._near.index_select(0, cell)
            level = most if self.coop else 1 + (next(numbers) * most).long()
            found.append(torch.where(there, cell, size * size))  # behind all others
            strengths.append(torch.where(there, level, 0))
        cell, order = torch.stack(found, 1).sort(1)
        level = torch.stack(strengths, 1).gather(1, order)
        there = (level > 0)[..., None]
        food = torch.where(there, _at(cell, level, size), self._gone)
        return torch.cat(
            (food.flatten(1), _at(torch.stack(cells, 1), levels, size).flatten(1), level.sum(1)[:, None]), 1
        )

    # Playing

    def dynamics(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        food, player = self._split(state)
        place, level, strength = player[..., :2], player[..., 2], food[..., 2]
        here, meals = self._code(place), self._code(food)[:, None]
        target = (place + self._moves[action]).clamp(0, self.size - 1)
        there = self._code(target)
        blocked = (there[:, :, None] == meals).any(-1)
        there = torch.where(blocked, here, there)
        # Who would meet stays; who takes the place of one who leaves may go, and so may two who change places.
        stays = blocked | ((there[:, :, None] == there[:, None]) & self._others).any(-1)
        after = torch.where(stays[..., None], place, target)

        apart = (here[:, :, None] - meals).abs()
        loads = ((apart == 1) | (apart == self.size + 1)) & (action == LOAD)[..., None]
        lifted = (loads * level[..., None]).sum(1)
        loaded = (lifted >= strength) & (lifted > 0)
        shares = (level[..., None] * strength[:, None]).double() / (lifted * state[:, -1:])[:, None].double()
        reward = torch.where(loads & loaded[:, None], shares, 0.0).sum(-1)  # of one food: nobody is next to two
        left = (strength > 0) & ~loaded
        food = _compact(torch.where(loaded[..., None], self._gone, food), left)
        parts = (food.flatten(1), torch.cat((after, level[..., None]), -1).flatten(1), state[:, -1:])
        return torch.cat(parts, 1), reward, ~left.any(1)

    def _code(self, things: Tensor) -> Tensor:
        """Return a number for each place (…, 2): neighbours differ by 1 or size + 1, and eaten food is nobody's."""
        return things[..., 0] * (self.size + 1) + things[..., 1]

    def _split(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the food (N, F, 3) and the players (N, n, 3) of a state."""
        middle = 3 * self.foods
        return state[:, :middle].view(-1, self.foods, 3), state[:, middle:-1].view(-1, self.players, 3)

    def observe(self, state: Tensor) -> Obs:
        whole = state[:, :-1]
        if self._whole:
            return {"obs": whole.index_select(1, self._index).view(-1, self.players, whole.shape[1]), "state": whole}
        food, player = self._split(state)
        place = player[..., :2]
        corner = (place - self.sight).clamp(min=0)[:, :, None]  # the first cell that each one sees
        near = ((food[:, None, :, :2] - place[:, :, None]).abs() <= self.sight).all(-1) & (food[:, None, :, 2] > 0)
        meals = _seen(food[:, None], near, corner, self._gone)
        fellows = player[:, self._order]
        local = fellows[..., :2] - corner
        # Not a square around the player at the board's edges: lbforaging looks twice as far from its first cell.
        visible = ((local >= 0) & (local <= 2 * self.sight)).all(-1)
        return {"obs": torch.cat((meals, _seen(fellows, visible, corner, self._gone)), -1), "state": whole}


def _tables(size: int) -> tuple[Tensor, Tensor]:
    """Return the cells (C,) where food may be, and (C, C) those that food in each cell keeps free of other food."""
    cell = torch.arange(size * size)
    row, column = cell // size, cell % size
    inside = (row > 0) & (row < size - 1) & (column > 0) & (column < size - 1)
    down, across = (row[:, None] - row).abs(), (column[:, None] - column).abs()
    around = (down <= 1) & (across <= 1)
    return inside, around | ((down + across == 2) & ((down == 0) | (across == 0)))


def _choose(free: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Return one of the cells that are ``free`` (N, C), (N,), by a uniform number, and whether there is any."""
    count = free.cumsum(1, dtype=torch.int32)
    chosen = (number * count[:, -1]).int()
    cell = (count <= chosen[:, None]).sum(1)
    return cell.clamp(max=free.shape[1] - 1), count[:, -1] > 0


def _at(cell: Tensor, level: Tensor, size: int) -> Tensor:
    """Return (N, k, 3) of cells and levels (N, k)."""
    return torch.stack((cell // size, cell % size, level), -1).to(torch.float32)


def _seen(things: Tensor, visible: Tensor, corner: Tensor, gone: Tensor) -> Tensor:
    """Return things (N, n or 1, k, 3) as each player sees them from its ``corner`` (N, n, 1, 2), the ``visible`` ones
    (N, n, k) first: (N, n, 3k)."""
    local = torch.cat((things[..., :2] - corner, things[..., 2:].expand(*visible.shape, 1)), -1)
    return _compact(torch.where(visible[..., None], local, gone), visible).flatten(2)


def _compact(things: Tensor, keep: Tensor) -> Tensor:
    """Return things (…, k, 3) with those to ``keep`` (…, k) first, in their order; the others must be alike."""
    order = (~keep).to(torch.uint8).argsort(stable=True, dim=-1)
    return things.gather(-2, order[..., None].expand_as(things))
