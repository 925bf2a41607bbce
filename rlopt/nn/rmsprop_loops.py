"""RMSprop, for which torch has no fused kernel, compiled: one pass over memory.

Arrays are (R, P) of R runs; a run where ``ok`` (R,) is false keeps its parameters and its state.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from rlopt.jit import jit

compiled = partial(jit, nogil=True, fastmath={"contract", "nsz"})  # nothing is assumed about NaN or infinity
Array = npt.NDArray[Any]


@compiled
def rmsprop(
    flat: Array, grad: Array, first: Array, second: Array, ok: Array, lr: float, beta2: float, inside: float,
    outside: float,
) -> None:  # fmt: skip
    """Do one step of ``rlopt.nn.optim.rmsprop``; ``inside`` is added under the root, ``outside`` to it."""
    rate, new, least = np.float32(lr), np.float32(1.0 - beta2), np.float32(0)
    under, after = np.float32(inside), np.float32(outside)
    for r in range(flat.shape[0]):
        x, g, m, s = flat[r], grad[r], first[r], second[r]
        if ok[r]:
            for i in range(x.shape[0]):
                mean = m[i] + new * (g[i] - m[i])
                square = s[i] + new * (g[i] * g[i] - s[i])
                m[i], s[i] = mean, square
                variance = square - mean * mean
                x[i] -= rate * g[i] / (np.sqrt((least if variance < least else variance) + under) + after)
