"""RMSprop, for which torch has no fused kernel, compiled: one pass over memory.

Both take arrays (R, P) of R runs; a run where ``ok`` (R,) is false keeps its parameters and its state.
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
    flat: Array, grad: Array, first: Array, second: Array, ok: Array, lr: float, beta2: float, epsilon: float
) -> None:
    """Do one step of ``rlopt.nn.optim.rmsprop``, ε added to the root."""
    rate, new, small, least = np.float32(lr), np.float32(1.0 - beta2), np.float32(epsilon), np.float32(0)
    for r in range(flat.shape[0]):
        x, g, m, s = flat[r], grad[r], first[r], second[r]
        if ok[r]:
            for i in range(x.shape[0]):
                mean = m[i] + new * (g[i] - m[i])
                square = s[i] + new * (g[i] * g[i] - s[i])
                m[i], s[i] = mean, square
                variance = square - mean * mean
                x[i] -= rate * g[i] / (np.sqrt(least if variance < least else variance) + small)


@compiled
def rmsprop_tf(
    flat: Array, grad: Array, first: Array, second: Array, ok: Array, lr: float, beta2: float, epsilon: float
) -> None:
    """Do one step of ``rlopt.nn.optim.rmsprop``, ε under the root."""
    rate, new, small, least = np.float32(lr), np.float32(1.0 - beta2), np.float32(epsilon), np.float32(0)
    for r in range(flat.shape[0]):
        x, g, m, s = flat[r], grad[r], first[r], second[r]
        if ok[r]:
            for i in range(x.shape[0]):
                mean = m[i] + new * (g[i] - m[i])
                square = s[i] + new * (g[i] * g[i] - s[i])
                m[i], s[i] = mean, square
                variance = square - mean * mean
                x[i] -= rate * g[i] / np.sqrt((least if variance < least else variance) + small)
