"""What stands between the matrix products of a small ReLU or tanh network, compiled: one pass over each activation.

Arrays of ``uint16`` hold bfloat16 bit patterns; sums are always float32. NaN passes through every kernel (a plain
``max(v, 0)`` would hide it from the guards).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rlopt.fast.products import Array, compiled, overload
from rlopt.jit import numba


def wide(x: Any) -> Any:
    """Return float32 of a float32 or of bfloat16 bits."""
    raise NotImplementedError


@overload(wide)  # type: ignore[untyped-decorator]
def _wide(x: Any) -> Any:
    def shift(x: Any) -> Any:
        return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)

    def same(x: Any) -> Any:
        return x

    return shift if x == numba.types.uint16 else same


def put(a: Any, i: Any, j: Any, v: Any) -> None:
    """Compute a[i, j] = v, rounded to nearest even where ``a`` holds bfloat16 bits."""
    raise NotImplementedError


@overload(put)  # type: ignore[untyped-decorator]
def _put(a: Any, i: Any, j: Any, v: Any) -> Any:
    def rounded(a: Any, i: Any, j: Any, v: Any) -> None:
        u = np.float32(v).view(np.uint32)
        odd = np.uint32(np.uint32(u >> np.uint32(16)) & np.uint32(1))
        bits = np.uint32(np.uint32(u + np.uint32(np.uint32(0x7FFF) + odd)) >> np.uint32(16))
        # Rounding would carry a NaN of full mantissa over to zero.
        a[i, j] = np.uint16(0x7FC0) if np.isnan(v) else np.uint16(bits)

    def plain(a: Any, i: Any, j: Any, v: Any) -> None:
        a[i, j] = v

    return rounded if a.dtype == numba.types.uint16 else plain


# Loops are vectorised for arrays that do not overlap, so working in place is a kernel of its own.


@compiled
def bias_relu_(z: Array, bias: Array) -> None:
    """Compute z = relu(z + bias), (B, W)."""
    for i in range(z.shape[0]):
        for j in range(z.shape[1]):
            v = np.float32(wide(z[i, j]) + bias[j])
            w = np.float32(0) if v <= np.float32(0) else v
            put(z, i, j, w)


@compiled
def bias_relu(z: Array, bias: Array, a: Array) -> None:
    """Compute a = relu(z + bias), (B, W)."""
    for i in range(z.shape[0]):
        for j in range(z.shape[1]):
            v = np.float32(wide(z[i, j]) + bias[j])
            w = np.float32(0) if v <= np.float32(0) else v
            put(a, i, j, w)


@compiled
def relu_backward_(y: Array, a: Array, bias_grad: Array) -> None:
    """Return y where the activation ``a`` is not zero, else 0, (B, W), and its sum over the rows (W,)."""
    bias_grad[:] = np.float32(0)
    for i in range(y.shape[0]):
        for j in range(y.shape[1]):
            v = np.float32(0) if wide(a[i, j]) <= np.float32(0) else wide(y[i, j])
            put(y, i, j, v)
            bias_grad[j] += v


@compiled
def relu_backward(y: Array, a: Array, delta: Array, bias_grad: Array) -> None:
    """Do as ``relu_backward_``, into ``delta``."""
    bias_grad[:] = np.float32(0)
    for i in range(y.shape[0]):
        for j in range(y.shape[1]):
            v = np.float32(0) if wide(a[i, j]) <= np.float32(0) else wide(y[i, j])
            put(delta, i, j, v)
            bias_grad[j] += v


@compiled
def bias_tanh_(z: Array, bias: Array) -> None:
    """Compute z = tanh(z + bias), (B, W), by the rational function that Eigen and XLA take, good to a few units in the
    last place: the C library's can't be vectorised."""
    for i in range(z.shape[0]):
        for j in range(z.shape[1]):
            v = z[i, j] + bias[j]
            x = -TANH_IS_1 if v < -TANH_IS_1 else (TANH_IS_1 if v > TANH_IS_1 else v)
            y = x * x
            p = (((((TANH_P[6] * y + TANH_P[5]) * y + TANH_P[4]) * y + TANH_P[3]) * y + TANH_P[2]) * y + TANH_P[1]) * y
            q = ((TANH_Q[3] * y + TANH_Q[2]) * y + TANH_Q[1]) * y + TANH_Q[0]
            z[i, j] = x * (p + TANH_P[0]) / q


TANH_IS_1 = np.float32(7.90531110763549805)
TANH_P = tuple(
    np.float32(x)
    for x in (
        4.89352455891786e-03, 6.37261928875436e-04, 1.48572235717979e-05, 5.12229709037114e-08, -8.60467152213735e-11,
        2.00018790482477e-13, -2.76076847742355e-16,
    )
)  # fmt: skip
TANH_Q = tuple(
    np.float32(x) for x in (4.89352518554385e-03, 2.26843463243900e-03, 1.18534705686654e-04, 1.19825839466702e-06)
)


@compiled
def tanh_backward_(y: Array, a: Array, bias_grad: Array) -> None:
    """Compute y = y (1 - a²) of the activation ``a`` = tanh, (B, W), and return its sum over the rows (W,)."""
    bias_grad[:] = np.float32(0)
    for i in range(y.shape[0]):
        for j in range(y.shape[1]):
            v = y[i, j] * (np.float32(1) - a[i, j] * a[i, j])
            y[i, j] = v
            bias_grad[j] += v


@compiled
def value_forward(a: Array, weight: Array, bias: Array, q: Array) -> None:
    """Compute q = a weight + bias: a layer of one output, (B, W) to (B,)."""
    for i in range(a.shape[0]):
        total = np.float32(0)
        for j in range(a.shape[1]):
            total += a[i, j] * weight[j]
        q[i] = total + bias[0]


@compiled
def value_backward(
    dq: Array, weight: Array, a: Array, delta: Array, weight_grad: Array, bias_grad: Array, below: Array
) -> None:
    """Return from dL/dq (B,) the gradients of ``value_forward``'s parameters, delta (B, W) before the ReLU that made
    ``a``, and its sum over the rows, which is the gradient ``below`` (W,) of that layer's bias."""
    weight_grad[:] = np.float32(0)
    below[:] = np.float32(0)
    total = np.float32(0)
    for i in range(a.shape[0]):
        total += dq[i]
        for j in range(a.shape[1]):
            weight_grad[j] += dq[i] * a[i, j]
            v = np.float32(dq[i] * weight[j])
            w = np.float32(0) if a[i, j] <= np.float32(0) else v
            put(delta, i, j, w)
            below[j] += w
    bias_grad[0] = total


@compiled
def value_backward_tanh(
    dq: Array, weight: Array, a: Array, delta: Array, weight_grad: Array, bias_grad: Array, below: Array
) -> None:
    """Do as ``value_backward``, where tanh made ``a``."""
    weight_grad[:] = np.float32(0)
    below[:] = np.float32(0)
    total = np.float32(0)
    for i in range(a.shape[0]):
        total += dq[i]
        for j in range(a.shape[1]):
            weight_grad[j] += dq[i] * a[i, j]
            v = dq[i] * weight[j] * (np.float32(1) - a[i, j] * a[i, j])
            delta[i, j] = v
            below[j] += v
    bias_grad[0] = total


@compiled
def narrow(x: Array, low: Array) -> None:
    """Compute low = x (B, W) in bfloat16."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            put(low, i, j, x[i, j])


@compiled
def widen(low: Array, x: Array) -> None:
    """Compute x = low (B, W) in float32."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            x[i, j] = wide(low[i, j])
