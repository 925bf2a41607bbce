"""Bellman sweeps compiled by numba for the CPU: a backup of every state without one temporary tensor.

A sort of every row's successors would cost more than all else, so no row is sorted: an L1 budget is spent on the few
smallest z only, which are picked one by one, or in long rows found by a threshold. Dense rows whose cost does not
depend on the successor all have the order of v, which is sorted once. On a GPU and with weights the same operators run
on tensors (``l1.py``); a test holds the two equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlopt.jit import jit
from rlopt.robust.kernel import Kernel

ENABLED = True
"""Switched off where the compiled sweeps are compared with those on tensors."""

Array = NDArray[np.float64]
_NO_ROWS = np.zeros((0, 0, 0, 0))
_USED = 1e300  # the z of a donor that has nothing left; nothing in these loops is infinite or NaN
_SHORT = 12  # up to this many successors, picking the smallest one by one is fastest
_RELAXED = {"nnan", "ninf", "nsz", "reassoc"}  # lets a search for the smallest z run without branches: half the time


def _compiled(function: Any) -> Any:
    return jit(function, fastmath=_RELAXED)


def usable(value: Tensor) -> bool:
    """Whether compiled sweeps serve values of this kind: float64 on the CPU."""
    return ENABLED and value.device.type == "cpu" and value.dtype == torch.float64


def plain_sweep(kernel: Kernel, cost: Tensor, gamma: float, value: Tensor) -> Tensor:
    """(K, S, A) Σ p̂ (c + γ v): the ordinary Bellman sweep."""
    out = np.empty(kernel.count.shape)
    _plain(*_arrays(kernel, cost, value), gamma, out, kernel.dense)
    return torch.from_numpy(out)


def l1_sweep(
    kernel: Kernel, cost: Tensor, gamma: float, value: Tensor, radius: Tensor, rows: bool
) -> tuple[Tensor, Tensor | None]:
    """(K, S, A) the support function of every row's L1 ball at c + γ v, and the rows that attain it if wanted."""
    out = np.empty(kernel.count.shape)
    found = np.empty(kernel.probabilities.shape) if rows else _NO_ROWS
    _l1(*_arrays(kernel, cost, value), gamma, radius.numpy(), out, found, kernel.dense, _shared(kernel, cost, rows))
    return torch.from_numpy(out), torch.from_numpy(found) if rows else None


def state_l1_sweep(
    kernel: Kernel, cost: Tensor, gamma: float, value: Tensor, radius: Tensor, rows: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(K, S) values, (K, S, A) policies and rows of the s-rectangular L1 game in every state."""
    out, policy = np.empty(kernel.count.shape[:2]), np.zeros(kernel.count.shape)
    found = np.empty(kernel.probabilities.shape) if rows else _NO_ROWS
    _state_l1(*_arrays(kernel, cost, value), gamma, radius.numpy(), out, policy, found, kernel.dense,
              _shared(kernel, cost, rows))  # fmt: skip
    return torch.from_numpy(out), torch.from_numpy(policy), torch.from_numpy(found) if rows else None


def _shared(kernel: Kernel, cost: Tensor, rows: bool) -> bool:
    """Whether all rows have the order of v, and their worst cases are not wanted."""
    return kernel.dense and kernel.full and cost.shape[-1] == 1 and not rows


def _arrays(kernel: Kernel, cost: Tensor, value: Tensor) -> tuple[Any, ...]:
    successors = np.zeros((1, 1, 1, 1), np.int64) if kernel.dense else kernel.successors.numpy()
    p = kernel.probabilities.contiguous().numpy()
    return p, successors, kernel.count.numpy(), cost.contiguous().numpy(), value.contiguous().numpy()


@_compiled
def _plain(
    p: Array, successors: Any, count: Any, cost: Array, value: Array, gamma: float, out: Array, dense: bool
) -> None:
    narrow = cost.shape[3] == 1
    for k in range(p.shape[0]):
        v = value[k]
        for s in range(p.shape[1]):
            for a in range(p.shape[2]):
                q, c, t, total = p[k, s, a], cost[k, s, a], successors[0, 0, 0], 0.0
                if not dense:
                    t = successors[k, s, a]
                n = count[k, s, a]
                if dense and narrow:
                    for j in range(n):
                        total += q[j] * v[j]
                    total = c[0] + gamma * total
                elif dense:
                    for j in range(n):
                        total += q[j] * (c[j] + gamma * v[j])
                elif narrow:
                    for j in range(n):
                        total += q[j] * v[t[j]]
                    total = c[0] + gamma * total
                else:
                    for j in range(n):
                        total += q[j] * (c[j] + gamma * v[t[j]])
                out[k, s, a] = total


@_compiled
def _fill(z: Array, q: Array, t: Any, c: Array, v: Array, gamma: float, n: int, dense: bool) -> tuple[float, float]:
    """z = c + γ v on n successors; returns p̂·z and the largest z. Dense rows in two loops, which become vector code."""
    total, top, narrow = 0.0, -_USED, c.shape[0] == 1
    if not dense:
        for j in range(n):
            x = (c[0] if narrow else c[j]) + gamma * v[t[j]]
            z[j] = x
            total += q[j] * x
            top = max(top, x)
        return total, top
    if narrow:
        for j in range(n):
            z[j] = c[0] + gamma * v[j]
    else:
        for j in range(n):
            z[j] = c[j] + gamma * v[j]
    for j in range(n):
        total += q[j] * z[j]
        top = max(top, z[j])
    return total, top


@_compiled
def _smallest(z: Array, n: int, top: float) -> int:
    """The successor of the smallest z below ``top``, or -1."""
    i, low = -1, top
    if n <= _SHORT:
        for j in range(n):
            less = z[j] < low
            low = z[j] if less else low
            i = j if less else i
        return i
    for j in range(n):
        low = min(low, z[j])
    if low < top:
        i = 0
        while z[i] != low:
            i += 1
    return i


@_compiled
def _spend(z: Array, q: Array, n: int, top: float, left: float) -> Any:
    """What moving ``left`` of mass from the smallest z to ``top`` gains; uses z up."""
    gained = 0.0
    while left > 0.0:
        i = _smallest(z, n, top)
        if i < 0:
            break
        m = min(q[i], left)
        left -= m
        gained += m * (top - z[i])
        z[i] = _USED
    return gained


@_compiled
def _mean(q: Array, v: Array) -> float:
    """Σ q v."""
    total = 0.0
    for j in range(v.shape[0]):
        total += q[j] * v[j]
    return total


@_compiled
def _spend_in_order(v: Array, q: Array, order: Any, left: float) -> Any:
    """As ``_spend`` on z = v, whose ``order`` is known; v stays as it is."""
    gained, top = 0.0, v[order[-1]]
    for i in order:
        if left <= 0.0 or v[i] >= top:
            break
        m = min(q[i], left)
        left -= m
        gained += m * (top - v[i])
    return gained


@_compiled
def _beyond(z: Array, q: Array, n: int, level: float) -> tuple[float, float]:
    """The mass whose z lies below ``level``, and Σ q (level - z) over it."""
    mass, area = 0.0, 0.0
    for j in range(n):
        d = level - z[j]
        m = q[j] if d > 0.0 else 0.0
        mass += m
        area += m * d
    return mass, area


@_compiled
def _spend_dual(z: Array, q: Array, n: int, top: float, left: float) -> Any:
    """The same for longer rows, from the dual: the least of λ·left + Σ q (top - λ - z)₊ over λ ≥ 0.

    The sum is convex and piecewise linear in λ. The tangents at both ends of a bracket meet in a new λ; when they meet
    on the function itself, its kink is found. A few passes over the row, each of them vector code, and no sort.
    """
    mass, area = _beyond(z, q, n, top)
    if mass <= left:
        return area
    whole, least = area, z[0]
    for j in range(n):
        least = min(least, z[j])
    low, low_mass, low_area, high, high_mass, high_area = 0.0, mass, area, top - least, 0.0, 0.0
    price = 0.0
    for _ in range(200):
        price = (low_area - high_area + low_mass * low - high_mass * high) / (low_mass - high_mass)
        mass, area = _beyond(z, q, n, top - price)
        if area - (low_area - low_mass * (price - low)) <= 1e-15 * whole or not low < price < high:
            break
        if mass > left:
            low, low_mass, low_area = price, mass, area
        else:
            high, high_mass, high_area = price, mass, area
    return price * left + area


@_compiled
def _move(z: Array, r: Array, n: int, top: float, left: float) -> Any:
    """The same on the row r itself, which is changed."""
    gained, receiver = 0.0, np.argmax(z[:n])
    for i in np.argsort(z[:n]):
        m = min(r[i], left)
        if z[i] >= top or left <= 0.0:
            break
        r[i] -= m
        r[receiver] += m
        left -= m
        gained += m * (top - z[i])
    return gained


@_compiled
def _lay_out(q: Array, r: Array, donors: Any, n: int, z: Array, top: float, left: float) -> None:
    """Moves ``left`` of mass in the row r, which is q, from its n ``donors``, in their order, to the one of z = top."""
    receiver = 0
    while z[receiver] != top:
        receiver += 1
    for d in range(n):
        i = donors[d]
        m = min(q[i], left)
        r[i] -= m
        r[receiver] += m
        left -= m


@_compiled
def _l1(
    p: Array, successors: Any, count: Any, cost: Array, value: Array, gamma: float, radius: Array, out: Array,
    rows: Array, dense: bool, shared: bool,
) -> None:  # fmt: skip
    wanted = rows.shape[0] > 0
    z, order = np.empty(p.shape[3]), np.zeros(1, np.int64)
    for k in range(p.shape[0]):
        v = value[k]
        if shared:
            order = np.argsort(v)
        for s in range(p.shape[1]):
            for a in range(p.shape[2]):
                q, n, t, left = p[k, s, a], count[k, s, a], successors[0, 0, 0], 0.5 * radius[k, s, a]
                if shared:
                    out[k, s, a] = cost[k, s, a, 0] + gamma * (_mean(q, v) + _spend_in_order(v, q, order, left))
                    continue
                if not dense:
                    t = successors[k, s, a]
                total, top = _fill(z, q, t, cost[k, s, a], v, gamma, n, dense)
                if wanted:
                    rows[k, s, a] = q
                    total += _move(z, rows[k, s, a], n, top, left)
                elif n <= 2 * _SHORT:
                    total += _spend(z, q, n, top, left)
                else:
                    total += _spend_dual(z, q, n, top, left)
                out[k, s, a] = total


@_compiled
def _state_l1(
    p: Array, successors: Any, count: Any, cost: Array, value: Array, gamma: float, radius: Array, out: Array,
    policy: Array, rows: Array, dense: bool, shared: bool,
) -> None:  # fmt: skip
    """Raise the level u of the game from the best nominal action, paying for every action that lies below it.

    An action is *in* once u passes its nominal worth; it then costs 1/slope of budget per unit of u, slope = (top -
    z of its present donor)/2. Events: a donor is used up, another action comes in, the budget ends, or an action in
    play has nothing left to give (then it alone is the answer).

    The rows are laid out from what each action has spent, never from u: where gains are a few roundings, a rounding of
    u is worth any mass, but what is spent adds up to the budget to the last digit.
    """
    wanted = rows.shape[0] > 0
    actions, last = p.shape[2], p.shape[3] - 1
    order, position = np.zeros(1, np.int64), np.empty(actions, np.int64)  # the position of the present donor
    z, top, worth = np.empty((actions, p.shape[3])), np.empty(actions), np.empty(actions)
    gain, end = np.empty(actions), np.empty(actions)  # of the present donor: top - z, and the level that uses it up
    donors, inside = np.empty((actions, p.shape[3]), np.int64), np.empty(actions, np.bool_)
    spent = np.empty(actions)
    for k in range(p.shape[0]):
        v = value[k]
        if shared:
            order = np.argsort(v)
        for s in range(p.shape[1]):
            for a in range(actions):
                inside[a], position[a], spent[a] = False, -1, 0.0
                if shared:
                    worth[a] = cost[k, s, a, 0] + gamma * _mean(p[k, s, a], v)
                    continue
                t = successors[0, 0, 0] if dense else successors[k, s, a]
                worth[a], top[a] = _fill(z[a], p[k, s, a], t, cost[k, s, a], v, gamma, count[k, s, a], dense)
            if wanted:
                rows[k, s] = p[k, s]
            left, u, alone = radius[k, s], worth.min(), -1
            while True:
                for a in range(actions):  # actions that come in here, and donors that are used up here
                    if worth[a] > u or (inside[a] and end[a] > u):
                        continue
                    if shared:
                        position[a] += 1
                        i = order[position[a]]
                        gain[a] = gamma * (v[order[last]] - v[i])
                        if gain[a] <= 0.0:
                            alone = a
                            break
                    else:
                        if inside[a]:
                            z[a, donors[a, position[a]]] = _USED
                        i = _smallest(z[a], count[k, s, a], top[a])
                        if i < 0:
                            alone = a
                            break
                        position[a] += 1
                        donors[a, position[a]], gain[a] = i, top[a] - z[a, i]
                    end[a] = (end[a] if inside[a] else worth[a]) + p[k, s, a, i] * gain[a]
                    inside[a] = True
                if alone >= 0:
                    break
                nearest, rate = _USED, 0.0
                for a in range(actions):
                    if inside[a]:
                        nearest = min(nearest, end[a])
                        rate += 2.0 / gain[a]
                    else:
                        nearest = min(nearest, worth[a])
                done = (nearest - u) * rate >= left
                climb = left / rate if done else nearest - u
                if wanted:
                    for a in range(actions):
                        if inside[a]:
                            spent[a] += climb * (2.0 / gain[a])
                if done:
                    u += climb
                    break
                left -= climb * rate
                u = nearest
            out[k, s] = u
            # The weights 1/slope: with nothing to spend, the nominally best actions' mixture is as good as any of them.
            total = 0.0
            for a in range(actions):
                x = 0.0
                if alone >= 0:
                    x = 1.0 if a == alone else 0.0
                elif inside[a]:
                    x = 1.0 / gain[a]
                policy[k, s, a] = x
                total += x
                if wanted and spent[a] > 0.0:
                    _lay_out(p[k, s, a], rows[k, s, a], donors[a], position[a] + 1, z[a], top[a], 0.5 * spent[a])
            for a in range(actions):
                policy[k, s, a] /= total
