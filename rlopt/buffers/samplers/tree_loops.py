"""The inner loops of prioritised replay, compiled by numba.

They run level by level or stage by stage over the whole minibatch: the cache misses of its slots then overlap, and they
are most of what a draw from a million slots costs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rlopt.buffers.samplers.prefetch import compiled, prefetch

FAN = 8
"""Children of a node of the sum-tree: as many as a cache line holds."""

HIDDEN = 1e-8
"""What is left of the mass of a slot that was drawn too often: drawn only where nothing else remains."""

MASS, DRAWN, EXPECTED, SINCE = range(4)
"""Columns of a slot's row in ``LazyVisits``."""

AT, NEAR, USED, FULL = range(4)
"""What ``cursor`` of the queue holds: the bucket reached, how much of ``near`` is done, how much of the room for late
comers is used, and whether it was not enough."""


# --- the sum-tree ---------------------------------------------------------------------------------------------------


@compiled
def block_sum(nodes: Any, start: Any) -> Any:
    """The sum of the ``FAN`` children from ``start`` on, in pairs, as the search splits them."""
    left = (nodes[start] + nodes[start + 1]) + (nodes[start + 2] + nodes[start + 3])
    return left + ((nodes[start + 4] + nodes[start + 5]) + (nodes[start + 6] + nodes[start + 7]))


@compiled
def put_sums(nodes: Any, offsets: Any, block: Any, count: Any) -> None:
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
def put(nodes: Any, offsets: Any, index: Any, mass: Any) -> None:
    """Give the leaves ``index`` (K,) these masses (K,)."""
    for k in range(len(index)):
        nodes[index[k]] = mass[k]
    put_sums(nodes, offsets, index.copy(), len(index))


@compiled
def clean(mass: Any, largest: Any) -> Any:
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
    """max(|error|, floor) + epsilon of errors (K,), in float64."""
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
    largest = clean(mass, largest)
    for k in range(len(index)):
        if nodes[index[k]] > 0.0:
            nodes[index[k]] = mass[k]
    put_sums(nodes, offsets, index.copy(), len(index))
    return largest


@compiled
def search(nodes: Any, offsets: Any, fraction: Any, stratified: Any) -> Any:
    """The leaves (K,) in which the fractions (K,) of all mass fall; ``stratified`` puts the k-th into the k-th of K
    equal shares."""
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
    """``search``, and the smallest mass of what it finds over each, (K,) float32."""
    found = search(nodes, offsets, fraction, stratified)
    least = np.inf
    for k in range(len(found)):
        least = min(least, nodes[found[k]])
    rare = np.empty(len(found), dtype=np.float32)
    for k in range(len(found)):
        rare[k] = least / nodes[found[k]]
    return found, rare


# --- reshuffling by masking -----------------------------------------------------------------------------------------


@compiled
def replace_rows(slot: Any, index: Any, mass: Any, time: Any) -> Any:
    """Begin anew in the slots ``index`` (K,), all different, with masses (K,). Returns the expected (in units of
    ``unit``) and actual counts that were in them, and by how much the sum of all masses rises."""
    gone = drawn = rise = 0.0
    for k in range(len(index)):
        i = index[k]
        gone += slot[i, EXPECTED] + slot[i, MASS] * (time - slot[i, SINCE])
        drawn += slot[i, DRAWN]
        rise += mass[k] - slot[i, MASS]
        slot[i, MASS], slot[i, DRAWN], slot[i, EXPECTED], slot[i, SINCE] = mass[k], 0.0, 0.0, time
    return gone, drawn, rise


@compiled
def change_rows(slot: Any, index: Any, mass: Any, time: Any, largest: Any) -> Any:
    """Give new masses (K,) to those of the slots ``index`` (K,) that have mass, and return by how much the sum of all
    rises, and the largest mass seen; change nothing and return -1 for that where they do not ``fit``."""
    if not fit(index, mass, len(slot)):
        return 0.0, -1.0
    largest = clean(mass, largest)
    rise = 0.0
    for k in range(len(index)):
        i = index[k]
        if slot[i, MASS] > 0.0:
            rise += mass[k] - slot[i, MASS]
            slot[i, EXPECTED] += slot[i, MASS] * (time - slot[i, SINCE])
            slot[i, SINCE] = time
            slot[i, MASS] = mass[k]
    return rise, largest


@compiled
def look(slot: Any, wake: Any, nodes: Any, i: Any, clocks: Any) -> None:
    """Settle whether slot ``i`` is hidden: its mass in the tree, and when to look again."""
    time, unit, low, clock, reach = clocks
    mass, drawn = slot[i, MASS], slot[i, DRAWN]
    expected = slot[i, EXPECTED] + mass * (time - slot[i, SINCE])
    if drawn * unit > expected:
        # A little early, for the rounding of these sums.
        wait = max(drawn * low - expected, 0.0) / max(mass, drawn / reach) * (1.0 - 1e-9)
        wake[i] = (clock + wait) * (1.0 - 1e-12)
        nodes[i] = mass * HIDDEN
    else:
        wake[i] = np.inf
        nodes[i] = mass


@compiled
def bucket(when: Any, queue: Any) -> Any:
    """The bucket of the queue that holds those who wake at ``when``."""
    return min(max(int((when - queue.origin) / queue.width), queue.cursor[AT]), len(queue.heads) - 1)


@compiled
def enqueue(i: Any, when: Any, queue: Any) -> None:
    """Put slot ``i`` among the late comers of its bucket; beyond the horizon the next ``refill`` finds it."""
    if when <= queue.horizon:
        entry = queue.cursor[USED]
        if entry == len(queue.late):
            queue.cursor[FULL] = 1
            return
        queue.cursor[USED] = entry + 1
        b = bucket(when, queue)
        queue.late[entry] = i
        queue.after[entry] = queue.heads[b]
        queue.heads[b] = entry


@compiled
def refill(wake: Any, scratch: Any, queue: Any) -> Any:
    """Look through all slots for those who wake before the horizon: the new ``near`` and ``starts``, by bucket."""
    count = 0
    starts = np.zeros(len(queue.heads) + 1, dtype=np.int64)
    queue.heads[:] = -1
    queue.cursor[:] = 0
    for i in range(len(wake)):
        if wake[i] <= queue.horizon:
            scratch[count] = i
            count += 1
            starts[bucket(wake[i], queue) + 1] += 1
    for b in range(len(starts) - 1):
        starts[b + 1] += starts[b]
    near = np.empty(count, dtype=np.int64)
    place = starts.copy()
    for k in range(count):
        b = bucket(wake[scratch[k]], queue)
        near[place[b]] = scratch[k]
        place[b] += 1
    return near, starts


@compiled
def collect_due(wake: Any, touched: Any, count: Any, clock: Any, queue: Any) -> Any:
    """Append the slots whose time has come to the first ``count`` of ``touched``; returns how many it then holds."""
    cursor, heads, after, late = queue.cursor, queue.heads, queue.after, queue.late
    last = bucket(clock, queue)
    first, cursor[AT] = cursor[AT], last
    begin, end = cursor[NEAR], queue.starts[last + 1]
    cursor[NEAR] = max(begin, end)
    for k in range(begin, end):
        prefetch(wake, queue.near[k])
    for k in range(begin, end):
        i = queue.near[k]
        if wake[i] <= clock:
            touched[count] = i
            count += wake[i] >= 0.0
            wake[i] = -1.0  # so that a second entry is passed over; the look that follows sets it anew
        elif wake[i] <= queue.horizon and bucket(wake[i], queue) == last:
            enqueue(i, wake[i], queue)
    for b in range(first, last + 1):
        entry = heads[b]
        heads[b] = -1
        while entry >= 0:
            following = after[entry]
            i = late[entry]
            if wake[i] <= clock:
                touched[count] = i
                count += wake[i] >= 0.0
                wake[i] = -1.0
            elif b == last and wake[i] <= queue.horizon and bucket(wake[i], queue) == last:
                after[entry] = heads[last]
                heads[last] = entry
            entry = following
    return count


@compiled
def settle(slot: Any, wake: Any, tree: Any, changed: Any, touched: Any, clocks: Any, queue: Any) -> None:
    """Look at the slots ``changed`` (K,) and at those whose time has come; ``touched`` is room for all of them."""
    nodes, offsets = tree
    count = len(changed)
    touched[:count] = changed
    count = collect_due(wake, touched, count, clocks[3], queue)
    rows = slot.ravel()
    for k in range(count):
        prefetch(rows, touched[k] * 4)
        prefetch(nodes, touched[k])
        prefetch(wake, touched[k])
    for k in range(count):
        i = touched[k]
        look(slot, wake, nodes, i, clocks)
        enqueue(i, wake[i], queue)
    put_sums(nodes, offsets, touched, count)


@compiled
def pick(slot: Any, wake: Any, tree: Any, fraction: Any, clocks: Any, queue: Any) -> Any:
    """The different slots that the fractions (K,) fall in, in their order, counted as drawn. One that scaling has
    pushed ahead since it was looked at is left out, and hidden."""
    nodes, offsets = tree
    time, unit = clocks[0], clocks[1]
    found = search(nodes, offsets, fraction, False)
    size = 4
    while size < 2 * len(found):
        size *= 2
    seen = np.full(size, -1, dtype=np.int64)
    wrong = np.empty(len(found), dtype=np.int64)
    kept = missed = 0
    rows = slot.ravel()
    for k in range(len(found)):
        prefetch(rows, found[k] * 4)
    for k in range(len(found)):
        i = found[k]
        place = i & (size - 1)
        while seen[place] >= 0 and seen[place] != i:
            place = (place + 1) & (size - 1)
        if seen[place] == i:
            continue
        seen[place] = i
        expected = slot[i, EXPECTED] + slot[i, MASS] * (time - slot[i, SINCE])
        if slot[i, DRAWN] * unit > expected and wake[i] == np.inf:
            look(slot, wake, nodes, i, clocks)
            enqueue(i, wake[i], queue)
            wrong[missed] = i
            missed += 1
        else:
            slot[i, DRAWN] += 1.0
            found[kept] = i
            kept += 1
    if missed:
        put_sums(nodes, offsets, wrong, missed)
    return found[:kept]
