"""Bellman sweeps compiled by numba for the CPU: a backup of every state without one temporary tensor.

A sort of every row's successors would cost more than all else, so no row is sorted: what an L1 budget gains is the
minimum of a convex function of one level, found among the row's own z in short rows and by its tangents in long ones.
An action is dropped as soon as a bound shows that it is not the best of its state. Dense rows whose cost does not
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
_HUGE = 1e300  # more than any z, and the z of a donor that has nothing left: nothing here is infinite or NaN
_SHORT = 24  # up to this many successors, trying every one of them as the level is fastest
_BLOCK = 16  # a longer row's smallest z is looked for among those of its blocks
_RELAXED = {"nnan", "ninf", "nsz", "reassoc"}  # lets a search for the smallest z run without branches: half the time


def _compiled(function: Any) -> Any:
    return jit(function, fastmath=_RELAXED)


def usable(value: Tensor) -> bool:
    """Return whether compiled sweeps serve these values: finite, float64, on the CPU."""
    return ENABLED and value.device.type == "cpu" and value.dtype == torch.float64 and bool(value.isfinite().all())


def plain_sweep(kernel: Kernel, cost: Tensor, gamma: float, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return (K, S) min_a Σ p̂ (c + γ v) and (K, S, A) the greedy policy: the ordinary Bellman sweep."""
    out, policy = np.empty(kernel.count.shape[:2]), np.zeros(kernel.count.shape)
    _plain(*_arrays(kernel, cost, value), gamma, out, policy, kernel.dense)
    return torch.from_numpy(out), torch.from_numpy(policy)


def l1_sweep(
    kernel: Kernel, cost: Tensor, gamma: float, value: Tensor, radius: Tensor, rows: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (K, S) the least over actions of the support function of a row's L1 ball at c + γ v, (K, S, A) the policy
    that attains it, and the rows if wanted."""
    out, policy = np.empty(kernel.count.shape[:2]), np.zeros(kernel.count.shape)
    found = np.empty(kernel.probabilities.shape) if rows else _NO_ROWS
    _l1(*_arrays(kernel, cost, value), gamma, radius.numpy(), out, policy, found, kernel.dense,
        _shared(kernel, cost, rows))  # fmt: skip
    return torch.from_numpy(out), torch.from_numpy(policy), torch.from_numpy(found) if rows else None


def state_l1_sweep(
    kernel: Kernel, cost: Tensor, gamma: float, value: Tensor, radius: Tensor, rows: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (K, S) values, (K, S, A) policies and rows of the s-rectangular L1 game in every state."""
    out, policy = np.empty(kernel.count.shape[:2]), np.zeros(kernel.count.shape)
    found = np.empty(kernel.probabilities.shape) if rows else _NO_ROWS
    _state_l1(*_arrays(kernel, cost, value), gamma, radius.numpy(), out, policy, found, kernel.dense,
              _shared(kernel, cost, rows))  # fmt: skip
    return torch.from_numpy(out), torch.from_numpy(policy), torch.from_numpy(found) if rows else None


def _shared(kernel: Kernel, cost: Tensor, rows: bool) -> bool:
    """Return whether all rows have the order of v, and their worst cases are not wanted."""
    return kernel.dense and kernel.full and cost.shape[-1] == 1 and not rows


def _arrays(kernel: Kernel, cost: Tensor, value: Tensor) -> tuple[Any, ...]:
    successors = np.zeros((1, 1, 1, 1), np.int64) if kernel.dense else kernel.successors.numpy()
    p = kernel.probabilities.contiguous().numpy()
    return p, successors, kernel.count.numpy(), cost.contiguous().numpy(), value.contiguous().numpy()


# A call that hands over arrays, and a view of an array, cost more here than a short row's sum: so what is done on every
# row is done for all actions of a state at once, and rows are named by k, s, a and not cut out.


@_compiled
def _look(
    p: Array, successors: Any, count: Any, cost: Array, value: Array, gamma: float, dense: bool, k: int, s: int,
    peak: int, mean: Array, high: Array,
) -> None:  # fmt: skip
    """p̂·z of all rows of a state, z = c + γ v, and if wanted a z that is large: in lists the largest, in dense rows,
    where a search would double the work, that at the ``peak`` of v."""
    wide, wanted = int(cost.shape[3] > 1), high.shape[0] > 0
    for a in range(p.shape[2]):
        n, total, most = count[k, s, a], 0.0, -_HUGE
        if dense and wide:
            for j in range(n):
                total += p[k, s, a, j] * (cost[k, s, a, j] + gamma * value[k, j])
        elif dense:
            for j in range(n):
                total += p[k, s, a, j] * value[k, j]
            total = cost[k, s, a, 0] + gamma * total
        else:
            for j in range(n):
                z = cost[k, s, a, wide * j] + gamma * value[k, successors[k, s, a, j]]
                total += p[k, s, a, j] * z
                most = max(most, z) if wanted else most
        mean[a] = total
        if wanted:
            high[a] = cost[k, s, a, wide * peak] + gamma * value[k, peak] if dense and peak < n else most


@_compiled
def _fill(
    z: Array, r: int, successors: Any, count: Any, cost: Array, value: Array, gamma: float, dense: bool, k: int, s: int,
    a: int,
) -> float:  # fmt: skip
    """z[r] = c + γ v of a row; returns the largest. In two loops, the first of which becomes vector code."""
    n, wide, top = count[k, s, a], int(cost.shape[3] > 1), -_HUGE
    if dense and wide:
        for j in range(n):
            z[r, j] = cost[k, s, a, j] + gamma * value[k, j]
    elif dense:
        for j in range(n):
            z[r, j] = cost[k, s, a, 0] + gamma * value[k, j]
    else:
        for j in range(n):
            z[r, j] = cost[k, s, a, wide * j] + gamma * value[k, successors[k, s, a, j]]
    for j in range(n):
        top = max(top, z[r, j])
    return top


@_compiled
def _plain(
    p: Array, successors: Any, count: Any, cost: Array, value: Array, gamma: float, out: Array, policy: Array,
    dense: bool,
) -> None:  # fmt: skip
    mean, none = np.empty(p.shape[2]), np.empty(0)
    for k in range(p.shape[0]):
        for s in range(p.shape[1]):
            _look(p, successors, count, cost, value, gamma, dense, k, s, 0, mean, none)
            best, action = _HUGE, 0
            for a in range(p.shape[2]):
                if mean[a] < best:
                    best, action = mean[a], a
            out[k, s], policy[k, s, action] = best, 1.0


@_compiled
def _lows(z: Array, low: Array, r: int, n: int, first: int, last: int) -> None:
    """The smallest z[r] of every block ``first`` … ``last`` - 1."""
    for b in range(first, last):
        least = _HUGE
        for j in range(_BLOCK * b, min(_BLOCK * (b + 1), n)):
            least = min(least, z[r, j])
        low[r, b] = least


@_compiled
def _smallest(z: Array, low: Array, r: int, n: int, top: float) -> int:
    """Return the successor of the smallest z[r] below ``top``, or -1. In longer rows it is looked for in its block."""
    first, last, least = 0, n, top
    if n > _SHORT:
        block, blocks = -1, (n + _BLOCK - 1) // _BLOCK
        for b in range(blocks):
            less = low[r, b] < least
            least = low[r, b] if less else least
            block = b if less else block
        if block < 0:
            return -1
        first, last, least = _BLOCK * block, min(_BLOCK * (block + 1), n), top
    i = -1
    for j in range(first, last):
        less = z[r, j] < least
        least = z[r, j] if less else least
        i = j if less else i
    return i


@_compiled
def _above(p: Array, z: Array, n: int, k: int, s: int, a: int, level: float) -> tuple[float, float]:
    """Return the mass whose z lies below ``level``, and Σ p̂ (level - z) over it."""
    mass, area = 0.0, 0.0
    for j in range(n):
        d = level - z[0, j]
        m = p[k, s, a, j] if d > 0.0 else 0.0
        mass += m
        area += m * d
    return mass, area


@_compiled
def _gain(
    p: Array, z: Array, n: int, k: int, s: int, a: int, mean: float, top: float, left: float, enough: float
) -> float:
    """Return what moving ``left`` of mass from the smallest z to ``top`` gains; from ``enough`` on any lower bound will
    do.

    It is the least of (top - l)·left + Σ p̂ (l - z)₊ over levels l ≤ top, which is convex and piecewise linear with its
    kinks at the z. Short rows try them all. In longer ones the tangents at both ends of a bracket meet in a new level;
    when they meet on the function itself, its kink is found. What lies under the tangents is a lower bound on the way.
    """
    if left >= 1.0:
        return top - mean
    least = _HUGE
    if n <= _SHORT:
        for j in range(n):
            level, total = z[0, j], (top - z[0, j]) * left
            for i in range(n):
                total += p[k, s, a, i] * max(0.0, level - z[0, i])
            least = min(least, total)
        return least
    for j in range(n):
        least = min(least, z[0, j])
    low, low_mass, low_area, high, high_mass, high_area = least, 0.0, 0.0, top, 1.0, top - mean
    level, area = top, top - mean
    for _ in range(200):
        level = (low_area - high_area + high_mass * high - low_mass * low) / (high_mass - low_mass)
        if not low < level < high:  # the tangents are parallel but for rounding: the kink is an end
            return min((top - low) * left + low_area, (top - high) * left + high_area)
        under = low_area + low_mass * (level - low)
        if (top - level) * left + under >= enough:
            return (top - level) * left + under
        mass, area = _above(p, z, n, k, s, a, level)
        if area - under <= 1e-15 * (top - mean):
            break
        if mass > left:
            high, high_mass, high_area = level, mass, area
        else:
            low, low_mass, low_area = level, mass, area
    return (top - level) * left + area


@_compiled
def _gain_in_order(p: Array, value: Array, order: Any, k: int, s: int, a: int, left: float) -> Any:
    """The same on z = v, whose ``order`` is known."""
    gained, top = 0.0, value[k, order[-1]]
    for i in order:
        if left <= 0.0 or value[k, i] >= top:
            break
        m = min(p[k, s, a, i], left)
        left -= m
        gained += m * (top - value[k, i])
    return gained


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
    policy: Array, rows: Array, dense: bool, shared: bool,
) -> None:  # fmt: skip
    """The actions of a state are looked at in the order of a lower bound, until it says that the best is found."""
    wanted, actions = rows.shape[0] > 0, p.shape[2]
    z, order = np.empty((1, p.shape[3])), np.zeros(1, np.int64)
    mean, high, bound = np.empty(actions), np.empty(actions), np.empty(actions)
    for k in range(p.shape[0]):
        peak = np.argmax(value[k]) if dense else 0
        if shared:
            order = np.argsort(value[k])
        for s in range(p.shape[1]):
            _look(p, successors, count, cost, value, gamma, dense, k, s, peak, mean, high)
            for a in range(actions):  # as much is gained by taking the same share of every successor's mass
                bound[a] = mean[a] + min(0.5 * radius[k, s, a], 1.0) * max(0.0, high[a] - mean[a])
            best, action = _HUGE, 0
            for _ in range(actions):
                a, least = 0, _HUGE
                for b in range(actions):
                    if bound[b] < least:
                        a, least = b, bound[b]
                if least >= best and not wanted:
                    break
                bound[a] = _HUGE
                left, total = 0.5 * radius[k, s, a], mean[a]
                if shared:
                    total += gamma * _gain_in_order(p, value, order, k, s, a, left)
                else:
                    top = _fill(z, 0, successors, count, cost, value, gamma, dense, k, s, a)
                    if wanted:
                        rows[k, s, a] = p[k, s, a]
                        total += _move(z[0], rows[k, s, a], count[k, s, a], top, left)
                    else:
                        total += _gain(p, z, count[k, s, a], k, s, a, total, top, left, best - total)
                if total < best:
                    best, action = total, a
            out[k, s], policy[k, s, action] = best, 1.0


@_compiled
def _state_l1(
    p: Array, successors: Any, count: Any, cost: Array, value: Array, gamma: float, radius: Array, out: Array,
    policy: Array, rows: Array, dense: bool, shared: bool,
) -> None:  # fmt: skip
    """Raise the level u of the game from the best nominal action, paying for every action that lies below it.

    An action is *in* once u passes its nominal worth; it then costs ``slope`` = 2/(top - z of its present donor) of
    budget per unit of u. Every action's next event has its level: it comes in, or its donor is used up. The lowest is
    taken until the budget ends there, or an action has nothing left to give (then it alone is the answer).

    The rows are laid out from what each action has spent, never from u: where gains are a few roundings, a rounding of
    u is worth any mass, but what is spent adds up to the budget to the last digit.
    """
    wanted = rows.shape[0] > 0
    actions, last = p.shape[2], p.shape[3] - 1
    order, none = np.zeros(1, np.int64), np.empty(0)
    z, top, level, slope = np.empty((actions, p.shape[3])), np.empty(actions), np.empty(actions), np.empty(actions)
    donors, used = np.empty((actions, p.shape[3]), np.int64), np.empty(actions, np.int64)  # the last one is in use
    low, spent = np.empty((actions, (p.shape[3] + _BLOCK - 1) // _BLOCK)), np.empty(actions)
    for k in range(p.shape[0]):
        if shared:
            order = np.argsort(value[k])
        for s in range(p.shape[1]):
            _look(p, successors, count, cost, value, gamma, dense, k, s, 0, level, none)
            for a in range(actions):
                used[a], slope[a], spent[a] = 0, 0.0, 0.0
            if wanted:
                rows[k, s] = p[k, s]
            left, u, rate, alone = radius[k, s], _HUGE, 0.0, -1
            while True:
                a, nearest, rate = 0, _HUGE, 0.0
                for b in range(actions):
                    rate += slope[b]
                    less = level[b] < nearest
                    nearest = level[b] if less else nearest
                    a = b if less else a
                climb = nearest - u if rate > 0.0 else 0.0
                done = rate > 0.0 and climb * rate >= left
                if done:
                    climb = left / rate
                if wanted:
                    for b in range(actions):
                        spent[b] += climb * slope[b]
                if done:
                    u += climb
                    break
                left -= climb * rate
                u = nearest
                if shared:
                    i = order[used[a]]
                    gain = gamma * (value[k, order[last]] - value[k, i])
                else:
                    n, first, end = count[k, s, a], 0, low.shape[1]
                    if used[a] > 0:
                        i = donors[a, used[a] - 1]
                        z[a, i], first, end = _HUGE, i // _BLOCK, i // _BLOCK + 1
                    else:
                        top[a] = _fill(z, a, successors, count, cost, value, gamma, dense, k, s, a)
                    if n > _SHORT:
                        _lows(z, low, a, n, first, end)
                    i = _smallest(z, low, a, n, top[a])
                    gain = top[a] - z[a, i] if i >= 0 else 0.0
                    donors[a, used[a]] = i
                if gain <= 0.0:
                    alone = a
                    break
                used[a] += 1
                slope[a], level[a] = 2.0 / gain, u + p[k, s, a, i] * gain
            out[k, s] = u
            # The weights 1/gain: with nothing to spend, the nominally best actions' mixture is as good as any of them.
            for a in range(actions):
                share = 1.0 if a == alone else 0.0
                policy[k, s, a] = slope[a] / rate if alone < 0 else share
                if wanted and spent[a] > 0.0:
                    _lay_out(p[k, s, a], rows[k, s, a], donors[a], used[a], z[a], top[a], 0.5 * spent[a])
