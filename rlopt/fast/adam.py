"""The guarded, clipped Adam step of ``rlopt.nn.optim`` as compiled code, in chunks for the threads of one update."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rlopt.fast.products import Array, array, compiled
from rlopt.nn.optim import Optimiser

CHUNKS = 2


class Descent(NamedTuple):
    """One run's part of an ``Optimiser``, whose tensors these are."""

    flat: Array
    grad: Array
    first: Array
    second: Array
    steps: Array
    """(1,) applied so far."""
    constants: Array
    """Learning rate, β₁, β₂, ε, weight decay, whether it is decoupled, maximal norm."""
    squares: Array
    """(CHUNKS,) sums of the squared gradient."""


def describe(optimiser: Optimiser, run: int | None = None) -> Descent:
    """Return what ``step`` needs; ``run`` picks one of several."""
    tensors = (optimiser.flat, optimiser.grad, optimiser.state["first"], optimiser.state["second"], optimiser.count)
    flat, grad, first, second, steps = (array(t.detach() if run is None else t.detach()[run]) for t in tensors)
    c = optimiser.config
    constants = np.array([0.0, c.beta1, c.beta2, c.epsilon, c.weight_decay, float(c.name == "adamw"), 0.0])
    descent = Descent(flat, grad, first, second, steps.reshape(1), constants, np.zeros(CHUNKS))
    refresh(descent, optimiser)
    return descent


def refresh(descent: Descent, optimiser: Optimiser) -> None:
    """Take over what users may change between steps: the learning rate and the maximal norm."""
    descent.constants[0] = optimiser.learning_rate
    descent.constants[-1] = np.inf if optimiser.max_grad_norm is None else optimiser.max_grad_norm


@compiled
def part(x: Array, chunk: int) -> Array:
    """Return one chunk of a flat array."""
    n = x.shape[0]
    return x[chunk * n // CHUNKS : (chunk + 1) * n // CHUNKS]


@compiled
def measure(d: Descent, chunk: int) -> None:
    """Do the first half of ``norm``, over one chunk."""
    total, grad = np.float32(0), part(d.grad, chunk)
    for i in range(grad.shape[0]):
        total += grad[i] * grad[i]
    d.squares[chunk] = total


@compiled
def norm(d: Descent) -> float:
    """Return the Euclidean norm of the gradient, once every chunk is measured."""
    total = 0.0
    for chunk in range(CHUNKS):
        total += d.squares[chunk]
    found: float = np.sqrt(total)
    return found


@compiled
def step(d: Descent, chunk: int, size: float, factor: float) -> None:
    """Do one step of one chunk with a gradient of norm ``size``; the caller counts it. ``factor`` scales the rate."""
    rate, beta1, beta2, epsilon, decay, decoupled, limit = d.constants
    rate *= factor
    t = d.steps[0] + 1.0
    stride = np.float32(rate / (1.0 - beta1**t))
    root = np.float32(1.0 / np.sqrt(1.0 - beta2**t))
    scale = np.float32(min(1.0, limit / (size + 1e-6)))
    kept = np.float32(1.0 - rate * decay if decoupled > 0 else 1.0)
    pull = np.float32(0.0 if decoupled > 0 else decay)
    new1, new2, small = np.float32(1.0 - beta1), np.float32(1.0 - beta2), np.float32(epsilon)
    flat, grad, first, second = part(d.flat, chunk), part(d.grad, chunk), part(d.first, chunk), part(d.second, chunk)
    for i in range(flat.shape[0]):
        g = grad[i] * scale + pull * flat[i]
        m = first[i] + new1 * (g - first[i])
        v = second[i] + new2 * (g * g - second[i])
        first[i], second[i] = m, v
        flat[i] = flat[i] * kept - stride * m / (np.sqrt(v) * root + small)


@compiled
def follow(target: Array, source: Array, chunk: int, tau: float) -> None:
    """Average (Polyak) one chunk."""
    moved, goal, share = part(target, chunk), part(source, chunk), np.float32(tau)
    for i in range(moved.shape[0]):
        moved[i] += share * (goal[i] - moved[i])
