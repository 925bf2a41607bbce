"""The inner loops of reshuffling by masking (see ``LazyDrawCounts``), compiled by numba.

They run stage by stage over the whole minibatch, as those of the sum-tree do.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rlopt.buffers.samplers.machine_code import compiled, prefetch
from rlopt.buffers.samplers.sum_tree_loops import fit, renew_sums, replace_nonfinite, search

HIDDEN = 1e-8
"""What is left of the mass of a slot that was drawn too often: drawn only where nothing else remains."""

MASS, DRAWN, EXPECTED, SINCE = range(4)
"""Columns of a slot's row in ``LazyDrawCounts``."""

AT, NEAR, USED, FULL = range(4)
"""What ``cursor`` of the queue holds: the bucket reached, how much of ``near`` is done, how much of the room for late
comers is used, and whether it was not enough."""


@compiled
def begin_slots(slot: Any, index: Any, mass: Any, time: Any) -> Any:
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
def change_slots(slot: Any, index: Any, mass: Any, time: Any, largest: Any) -> Any:
    """Give new masses (K,) to those of the slots ``index`` (K,) that have mass, and return by how much the sum of all
    rises, and the largest mass seen; change nothing and return -1 for that where they do not ``fit``."""
    if not fit(index, mass, len(slot)):
        return 0.0, -1.0
    largest = replace_nonfinite(mass, largest)
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
def set_hidden(slot: Any, wake: Any, nodes: Any, i: Any, clocks: Any) -> None:
    """Decide whether slot ``i`` is hidden: its mass in the tree, and when to look again."""
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
def bucket_of(when: Any, queue: Any) -> Any:
    """Return the bucket of the queue that holds those who wake at ``when``."""
    return min(max(int((when - queue.origin) / queue.width), queue.cursor[AT]), len(queue.heads) - 1)


@compiled
def enqueue(i: Any, when: Any, queue: Any) -> None:
    """Put slot ``i`` among the late comers of its bucket; beyond the horizon the next ``refill_queue`` finds it."""
    if when <= queue.horizon:
        entry = queue.cursor[USED]
        if entry == len(queue.late):
            queue.cursor[FULL] = 1
            return
        queue.cursor[USED] = entry + 1
        b = bucket_of(when, queue)
        queue.late[entry] = i
        queue.after[entry] = queue.heads[b]
        queue.heads[b] = entry


@compiled
def refill_queue(wake: Any, scratch: Any, queue: Any) -> Any:
    """Return the new ``near`` and ``starts``, by bucket, of all slots that wake before the horizon."""
    count = 0
    starts = np.zeros(len(queue.heads) + 1, dtype=np.int64)
    queue.heads[:] = -1
    queue.cursor[:] = 0
    for i in range(len(wake)):
        if wake[i] <= queue.horizon:
            scratch[count] = i
            count += 1
            starts[bucket_of(wake[i], queue) + 1] += 1
    for b in range(len(starts) - 1):
        starts[b + 1] += starts[b]
    near = np.empty(count, dtype=np.int64)
    place = starts.copy()
    for k in range(count):
        b = bucket_of(wake[scratch[k]], queue)
        near[place[b]] = scratch[k]
        place[b] += 1
    return near, starts


@compiled
def collect_due(wake: Any, touched: Any, count: Any, clock: Any, queue: Any) -> Any:
    """Append the slots whose time has come to the first ``count`` of ``touched``; returns how many it then holds."""
    cursor, heads, after, late = queue.cursor, queue.heads, queue.after, queue.late
    last = bucket_of(clock, queue)
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
        elif wake[i] <= queue.horizon and bucket_of(wake[i], queue) == last:
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
            elif b == last and wake[i] <= queue.horizon and bucket_of(wake[i], queue) == last:
                after[entry] = heads[last]
                heads[last] = entry
            entry = following
    return count


@compiled
def renew_hidden(slot: Any, wake: Any, tree: Any, changed: Any, touched: Any, clocks: Any, queue: Any) -> None:
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
        set_hidden(slot, wake, nodes, i, clocks)
        enqueue(i, wake[i], queue)
    renew_sums(nodes, offsets, touched, count)


@compiled
def draw_distinct(
    slot: Any, wake: Any, tree: Any, fraction: Any, clocks: Any, queue: Any, stratified: Any = False
) -> Any:
    """Return the different slots that the fractions (K,), each of its own share where ``stratified``, fall in, in their
    order, counted as drawn. One that scaling
    has pushed ahead since it was looked at is left out, and hidden."""
    nodes, offsets = tree
    time, unit = clocks[0], clocks[1]
    found = search(nodes, offsets, fraction, stratified)
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
            set_hidden(slot, wake, nodes, i, clocks)
            enqueue(i, wake[i], queue)
            wrong[missed] = i
            missed += 1
        else:
            slot[i, DRAWN] += 1.0
            found[kept] = i
            kept += 1
    if missed:
        renew_sums(nodes, offsets, wrong, missed)
    return found[:kept]
