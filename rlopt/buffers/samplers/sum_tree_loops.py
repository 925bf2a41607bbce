"""The inner loops of a sum-tree, compiled by numba.

They run level by level or stage by stage over the whole minibatch: the cache misses of its slots then overlap, and they
are most of what a draw from a million slots costs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rlopt.buffers.samplers.machine_code import compiled, prefetch

FAN = 8
"""Children of a node of the sum-tree: as many as a cache line holds."""


@compiled
def block_sum(nodes: Any, start: Any) -> Any:
    """Return the sum of the ``FAN`` children from ``start`` on, in pairs, as the search splits them."""
    left = (nodes[start] + nodes[start + 1]) + (nodes[start + 2] + nodes[start + 3])
    return left + ((nodes[start + 4] + nodes[start + 5]) + (nodes[start + 6] + nodes[start + 7]))


@compiled
def renew_sums(nodes: Any, offsets: Any, block: Any, count: Any) -> None:
    """Make anew every sum above the leaves in ``block`` (its first ``count``), which is used up."""
    for k in range(count):
        block[k] //= FAN
    for level in range(len(offsets) - 1):
        below, above = offsets[level], offsets[level + 1]
        blocks = (above - below) // FAN
        if blocks <= count:  # so few nodes, here and above, that all of them once is less than some of them often
            for b in range(blocks):
                nodes[above + b] = block_sum(nodes, below + b * FAN)
            count = blocks
            continue
        last = -1
        kept = 0
        for k in range(count):
            b = block[k]
            if b != last:
                nodes[above + b] = block_sum(nodes, below + b * FAN)
                block[kept] = b // FAN
                prefetch(nodes, above + block[kept] * FAN)
                kept += 1
                last = b
        count = kept


@compiled
def put_masses(nodes: Any, offsets: Any, index: Any, mass: Any) -> None:
    """Give the leaves ``index`` (K,) these masses (K,)."""
    for k in range(len(index)):
        nodes[index[k]] = mass[k]
    renew_sums(nodes, offsets, index.copy(), len(index))


@compiled
def replace_nonfinite(mass: Any, largest: Any) -> Any:
    """Replace masses that are not finite by ``largest``, and return the largest then."""
    top = largest
    for k in range(len(mass)):
        if not np.isfinite(mass[k]):
            mass[k] = largest
        top = max(top, mass[k])
    return top


@compiled
def fit(index: Any, mass: Any, slots: Any) -> Any:
    """Return whether the slots ``index`` (K,) are among the first ``slots`` and have a mass each: what is not would be
    written, or read, anywhere."""
    if len(index) != len(mass):
        return False
    low, high = 0, -1
    for k in range(len(index)):
        low, high = min(low, index[k]), max(high, index[k])
    return low == 0 and high < slots


@compiled
def magnitudes(error: Any, floor: Any, epsilon: Any) -> Any:
    """Return max(|error|, floor) + epsilon of errors (K,), in float64."""
    out = np.empty(len(error), dtype=np.float64)
    for k in range(len(error)):
        size = abs(np.float64(error[k]))
        out[k] = (floor if size < floor else size) + epsilon
    return out


@compiled
def change_leaves(nodes: Any, offsets: Any, slots: Any, index: Any, mass: Any, largest: Any) -> Any:
    """Give new masses to those of the leaves ``index`` (K,) that have mass, and return the largest mass seen; change
    nothing and return -1 where they do not ``fit``."""
    if not fit(index, mass, slots):
        return -1.0
    largest = replace_nonfinite(mass, largest)
    for k in range(len(index)):
        if nodes[index[k]] > 0.0:
            nodes[index[k]] = mass[k]
    renew_sums(nodes, offsets, index.copy(), len(index))
    return largest


@compiled
def search(nodes: Any, offsets: Any, fraction: Any, stratified: Any) -> Any:
    """Return the leaves (K,) in which the fractions (K,) of all mass fall; ``stratified`` puts the k-th into the k-th
    of K equal shares."""
    count = len(fraction)
    found = np.zeros(count, dtype=np.int64)
    value = fraction.copy()
    total = block_sum(nodes, offsets[-1])
    for k in range(count):
        share = (value[k] + k) * (1.0 / count) if stratified else value[k]
        value[k] = share * total
    for level in range(len(offsets) - 1, -1, -1):
        here, below = offsets[level], offsets[max(level - 1, 0)]
        for k in range(count):
            v = value[k]
            start = here + found[k] * FAN
            a = nodes[start] + nodes[start + 1]
            b = nodes[start + 2] + nodes[start + 3]
            c = nodes[start + 4] + nodes[start + 5]
            d = nodes[start + 6] + nodes[start + 7]
            # Selects rather than branches, which would be mispredicted half of the time. To the right only where
            # there is mass: rounding may carry a value past the end.
            half, rest = a + b, c + d
            right = (v >= half) & (rest > 0.0)
            v -= half if right else 0.0
            a = c if right else a
            b = d if right else b
            child = 4 * right
            right = (v >= a) & (b > 0.0)
            v -= a if right else 0.0
            child += 2 * right
            a, b = nodes[start + child], nodes[start + child + 1]
            right = (v >= a) & (b > 0.0)
            value[k] = v - (a if right else 0.0)
            child += found[k] * FAN + right
            found[k] = child
            if level > 0:
                prefetch(nodes, below + child * FAN)
    return found


@compiled
def search_weighted(nodes: Any, offsets: Any, fraction: Any, stratified: Any) -> Any:
    """Return what ``search`` does, and the smallest mass of what it finds over each, (K,) float32."""
    found = search(nodes, offsets, fraction, stratified)
    least = np.inf
    for k in range(len(found)):
        least = min(least, nodes[found[k]])
    rare = np.empty(len(found), dtype=np.float32)
    for k in range(len(found)):
        rare[k] = least / nodes[found[k]]
    return found, rare
