"""Stacks of four frames, gathered from a ``FrameRing`` by compiled code."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from rlopt.jit import jit

compiled = partial(jit, nogil=True)
Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]
STACK, ZERO, REPEAT = 4, -2, -3  # as in rlopt.buffers.frames, which loads this module when it is used


@compiled
def frame_of(
    frames: Bytes, side: Bytes, nothing: Bytes, links: Numbers, num_envs: int, slot: int, written: int, j: int
) -> Any:
    """Return frame ``j`` (P,) of a slot: what ``FrameRing._found`` says of one."""
    slots, age, start = links.shape[0], links[slot, 0], links[slot, 1]
    back = num_envs * (STACK - 1 - j)
    if back > age and start != REPEAT:
        return nothing if start == ZERO else side[(start + j + age // num_envs) % side.shape[0]]
    if j == STACK:
        apart, newest = links[(slot + num_envs) % slots, 2], (written - 1) % (slots // num_envs)
        if apart >= 0 and slot // num_envs != newest:
            return side[apart % side.shape[0]]
    place = slot + (written * num_envs - 1 - slot) // slots * slots
    return frames[(place - min(back, age)) % frames.shape[0]]


@compiled
def weave(
    frames: Bytes, side: Bytes, links: Numbers, num_envs: int, index: Numbers, written: int, offset: int,
    out: npt.NDArray[np.int32],
) -> None:  # fmt: skip
    """Put frames ``offset … offset + 3`` of the slots ``index`` (B,) into ``out`` (B, P), the four bytes of a pixel in
    one number: where the low byte comes first in memory, stacks (B, P, 4).

    ``frames`` (M, P), ``side`` (Q, P) and ``links`` (slots, 3) are a ``FrameRing``'s.
    """
    nothing = np.zeros(frames.shape[1], np.uint8)
    for b in range(index.shape[0]):
        w = frame_of(frames, side, nothing, links, num_envs, index[b], written, offset)
        x = frame_of(frames, side, nothing, links, num_envs, index[b], written, offset + 1)
        y = frame_of(frames, side, nothing, links, num_envs, index[b], written, offset + 2)
        z = frame_of(frames, side, nothing, links, num_envs, index[b], written, offset + 3)
        pixels = out[b]
        for p in range(pixels.shape[0]):
            low = np.int32(w[p]) | (np.int32(x[p]) << np.int32(8))
            pixels[p] = low | (np.int32(y[p]) << np.int32(16)) | (np.int32(z[p]) << np.int32(24))
