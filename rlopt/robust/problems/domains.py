"""Small robust MDPs of the literature: machine replacement, RiverSwim, a grid world.

Every one takes the radius of an (s,a)-rectangular L1 set; ``RobustMDP.replace`` puts another set in its place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from gymnasium import spaces

from rlopt.robust.kernel import check_room
from rlopt.robust.model import RobustMDP
from rlopt.robust.sets.l1 import L1
from rlopt.types import EnvSpec, RloptError


def machine_replacement(gamma: float = 0.8, radius: float = 0.2) -> RobustMDP:
    """Return machine replacement (Delage and Mannor 2010, figure 3): 10 states, actions *do nothing* and *repair*.

    States 0 … 7 are ever older working states, 7 the failed one; 8 is a normal repair, 9 a long one. Arriving costs 20
    in 7, 2 in 8 and 10 in 9. A working machine ages with 0.8; repairing it leads to 8 with 0.6, to 9 with 0.1, and
    fails, so that it ages, with 0.3. After a normal repair it is as new with 0.8. The adversary keeps the support.
    """
    kernel = np.zeros((10, 2, 10))
    for s in range(8):
        older = min(s + 1, 7)
        kernel[s, 0, s] += 0.2
        kernel[s, 0, older] += 0.8
        kernel[s, 1, [older, 8, 9]] = 0.3, 0.6, 0.1
    kernel[8, 0, [8, 0]] = 0.2, 0.8
    kernel[8, 1, 8] = 1.0
    kernel[9, 0, 9] = 1.0
    kernel[9, 1, [8, 9]] = 0.6, 0.4
    cost = np.zeros(10)
    cost[[7, 8, 9]] = 20.0, 2.0, 10.0
    start = np.eye(10)[0]
    return RobustMDP(kernel, np.tile(cost, (10, 2, 1)), gamma, L1(radius), start,
                     spec=_spec("machine_replacement", 10, 2))  # fmt: skip


def river_swim(states: int = 6, gamma: float = 0.95, radius: float = 0.2) -> RobustMDP:
    """Return RiverSwim (Strehl and Littman 2008): swim *left* with the current or *right* against it; rewards 5 and
    10000.

    Left always succeeds. Right: 0.6 on and 0.4 back at the left bank (0.4 stays there); inside 0.35 on, 0.6 stays, 0.05
    back; at the right bank 0.6 stays, 0.4 back. Left at the left bank earns 5, right at the right bank 10000.
    """
    if states < 3:
        raise RloptError(f"states={states}: a river needs at least 3")
    check_room(states, 2, states)
    kernel, reward = np.zeros((states, 2, states)), np.zeros((states, 2))
    last = states - 1
    kernel[np.arange(states), 0, np.maximum(np.arange(states) - 1, 0)] = 1.0
    kernel[0, 1, [0, 1]] = 0.4, 0.6
    for s in range(1, last):
        kernel[s, 1, [s - 1, s, s + 1]] = 0.05, 0.6, 0.35
    kernel[last, 1, [last - 1, last]] = 0.4, 0.6
    reward[0, 0], reward[last, 1] = 5.0, 10_000.0
    start = np.zeros(states)
    start[[1, 2]] = 0.5
    return RobustMDP(kernel, reward, gamma, L1(radius), start, "reward", spec=_spec("river_swim", states, 2))


GRID = ("S...", ".#.H", "...H", "H..G")
"""The default map: start, goal, holes, walls."""
MOVES = ((0, -1), (1, 0), (0, 1), (-1, 0))
"""Left, down, right, up, in FrozenLake's order, as (row, column)."""


def grid_world(
    rows: Sequence[str] = GRID, slip: float = 0.2, gamma: float = 0.95, radius: float = 0.3, hole_cost: float = 20.0
) -> RobustMDP:
    """Return a grid of cells: every step costs 1 until the goal, a hole costs ``hole_cost`` once, both end the walk.

    A move goes where it should with 1 - ``slip``, else to either side with half of that; into a wall it stays. The
    adversary may shift mass between these, on their support, so it makes the wind blow towards the holes.

    Args:
        rows: the map; S start, G goal, H hole, # wall, . free.
    """
    cells = [list(row) for row in rows]
    height, width = len(cells), len(cells[0]) if cells else 0
    if any(len(row) != width for row in cells) or not {"S", "G"} <= {c for row in cells for c in row}:
        raise RloptError("rows must be equally long strings of S G H # . with a start and a goal")
    n = height * width
    check_room(n, 4, n)
    kernel, start = np.zeros((n, 4, n)), np.zeros(n)
    for s in range(n):
        row, column = divmod(s, width)
        kind = cells[row][column]
        start[s] = kind == "S"
        if kind in "GH#":
            kernel[s, :, s] = 1.0
            continue
        for a in range(4):
            for turn, p in ((0, 1.0 - slip), (1, slip / 2), (-1, slip / 2)):
                down, across = MOVES[(a + turn) % 4]
                r, c = row + down, column + across
                inside = 0 <= r < height and 0 <= c < width and cells[r][c] != "#"
                t = r * width + c if inside else s
                kernel[s, a, t] += p
    arrival = np.array([hole_cost if cells[s // width][s % width] == "H" else 0.0 for s in range(n)])
    moving = np.array([1.0 if cells[s // width][s % width] in "S." else 0.0 for s in range(n)])
    full = moving[:, None, None] * (1.0 + np.broadcast_to(arrival, (n, 4, n)))
    return RobustMDP(kernel, full, gamma, L1(radius), start / start.sum(), spec=_spec("grid_world", n, 4))


def _spec(id: str, states: int, actions: int) -> EnvSpec:
    return EnvSpec(id, spaces.Discrete(states), spaces.Discrete(actions))
