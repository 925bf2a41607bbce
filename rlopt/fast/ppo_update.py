"""PPO's epochs as one compiled function; ``rlopt.fast.fused_ppo`` prepares what it works on.

Every formula is that of ``rlopt.agents.ppo``. Minibatches of small networks follow one another, so one thread does all
of it: the two cores of a product would meet more often than they multiply.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rlopt.fast.adam import CHUNKS, Descent, measure, norm, step
from rlopt.fast.mlp import descend, forward, value, value_delta, weight_gradient
from rlopt.fast.products import Array, compiled, floats
from rlopt.nn.distributions import HALF_LOG_TWO_PI

HALF_LOG = np.float32(HALF_LOG_TWO_PI)
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
# What an epoch reports: sums over its minibatches, which are finite where all of them are, and the last one's parts.
LOSSES, NORMS, POLICY, VALUE, ENTROPY = range(5)


class RolloutRows(NamedTuple):
    """A rollout's M transitions as arrays of float32."""

    obs: Array
    """(M, O)."""
    sample: Array
    """(M, A) what a Gaussian drew; (M, 1) the action's number, counted from 0."""
    log_prob: Array
    advantage: Array
    target: Array


class Memory(NamedTuple):
    """Everything that stays in place between minibatches of B rows."""

    products: Array
    actor: Array
    """(L,) of ``LAYER``, reading ``obs``."""
    critic: Array
    obs: Array
    """(B, O)."""
    raw: Array
    """(B, A) the policy's output without the last bias."""
    bias: Array
    """(A,) that bias."""
    delta: Array
    """(B, A) dL/d output of the policy."""
    log_std: Array
    """(A,) of a Gaussian; of a categorical empty."""
    log_std_grad: Array
    q: Array
    """(B,) V(s)."""
    dq: Array
    advantage: Array
    """(B,) as the loss takes it."""
    log_ratio: Array
    """(B,) log π(a|s) - log π_old(a|s)."""
    descent: Descent
    report: Array


class Coefficients(NamedTuple):
    """Numbers of the configuration."""

    clip: np.float32
    value_coefficient: np.float32
    entropy_coefficient: np.float32
    normalise: bool
    factor: float


@compiled
def normalise(advantage: Array) -> None:
    """Give advantages (B,) zero mean and unit (unbiased) deviation; one alone stays."""
    n = advantage.shape[0]
    if n == 1:
        return
    total = square = np.float64(0)
    for i in range(n):
        total += advantage[i]
    mean = total / n
    for i in range(n):
        square += (advantage[i] - mean) ** 2
    scale = 1.0 / (np.sqrt(square / (n - 1)) + 1e-8)
    for i in range(n):
        advantage[i] = np.float32((advantage[i] - mean) * scale)


@compiled
def clipped_surrogate(log_ratio: np.float32, advantage: np.float32, clip: np.float32) -> tuple[np.float32, np.float32]:
    """Return min(ρ Â, clip(ρ, 1-ε, 1+ε) Â) of one row and its derivative by log ρ."""
    ratio = np.exp(log_ratio)
    free = ratio * advantage
    held = min(max(ratio, ONE - clip), ONE + clip) * advantage
    if held < free:
        return held, ZERO
    return free, free


@compiled
def gaussian(m: Memory, rows: RolloutRows, order: Array, c: Coefficients) -> tuple[float, float]:
    """Return the policy's loss and the entropy of N(μ, σ²) at the rows ``order`` (B,), and dL/d output in place.

    With z = (x - μ) / σ: d log π / dμ = z / σ, d log π / d log σ = z² - 1.
    """
    n, width = m.raw.shape
    share = ONE / np.float32(n)
    loss = entropy = np.float64(0)
    for j in range(width):
        entropy += m.log_std[j] + HALF + HALF_LOG
        m.log_std_grad[j] = -c.entropy_coefficient
    bias_grad = floats(m.actor[m.actor.shape[0] - 1].bias_grad_at, width)
    bias_grad[:] = ZERO
    for i in range(n):
        found, row = ZERO, order[i]
        for j in range(width):
            z = (rows.sample[row, j] - (m.raw[i, j] + m.bias[j])) * np.exp(-m.log_std[j])
            m.delta[i, j] = z
            found -= HALF * z * z + m.log_std[j] + HALF_LOG
        m.log_ratio[i] = found - rows.log_prob[row]
        gain, slope = clipped_surrogate(m.log_ratio[i], m.advantage[i], c.clip)
        loss -= gain
        slope *= -share
        for j in range(width):
            z = m.delta[i, j]
            m.log_std_grad[j] += slope * (z * z - ONE)
            m.delta[i, j] = slope * z * np.exp(-m.log_std[j])
            bias_grad[j] += m.delta[i, j]
    return loss / n, entropy


@compiled
def categorical(m: Memory, rows: RolloutRows, order: Array, c: Coefficients) -> tuple[float, float]:
    """Return the same of a categorical distribution with logits (B, K).

    d log π(a) / d logit_k = 1{k = a} - π_k, dH / d logit_k = -π_k (log π_k + H).
    """
    n, width = m.raw.shape
    share = ONE / np.float32(n)
    loss = entropy = np.float64(0)
    bias_grad = floats(m.actor[m.actor.shape[0] - 1].bias_grad_at, width)
    bias_grad[:] = ZERO
    for i in range(n):
        row, chosen = order[i], np.int64(rows.sample[order[i], 0])
        largest = m.raw[i, 0] + m.bias[0]
        for k in range(width):
            m.raw[i, k] += m.bias[k]
            largest = max(largest, m.raw[i, k])
        total, own = ZERO, ZERO
        for k in range(width):
            total += np.exp(m.raw[i, k] - largest)
        log_total = largest + np.log(total)
        for k in range(width):
            m.raw[i, k] -= log_total  # log π
            own -= np.exp(m.raw[i, k]) * m.raw[i, k]
        entropy += own
        m.log_ratio[i] = m.raw[i, chosen] - rows.log_prob[row]
        gain, slope = clipped_surrogate(m.log_ratio[i], m.advantage[i], c.clip)
        loss -= gain
        for k in range(width):
            p = np.exp(m.raw[i, k])
            hit = ONE if k == chosen else ZERO
            m.delta[i, k] = share * (c.entropy_coefficient * p * (m.raw[i, k] + own) - slope * (hit - p))
            bias_grad[k] += m.delta[i, k]
    return loss / n, entropy / n


@compiled
def fit(m: Memory, rows: RolloutRows, order: Array, c: Coefficients) -> float:
    """Return the value's loss ½ mean (V(s) - R)², and dL/dV in place."""
    n, total = order.shape[0], np.float64(0)
    for i in range(n):
        residual = m.q[i] - rows.target[order[i]]
        m.dq[i] = c.value_coefficient * residual / np.float32(n)
        total += residual * residual
    found: float = 0.5 * total / n
    return found


@compiled
def gradients(m: Memory, rows: RolloutRows, order: Array, c: Coefficients) -> float:
    """Compute the gradient of one minibatch, the rows ``order`` (B,), where the optimiser reads it; return the loss."""
    n, last, top = order.shape[0], m.actor.shape[0] - 1, m.critic.shape[0] - 1
    for i in range(n):
        m.advantage[i] = rows.advantage[order[i]]
        for j in range(m.obs.shape[1]):
            m.obs[i, j] = rows.obs[order[i], j]
    if c.normalise:
        normalise(m.advantage)
    forward(m.products, m.actor, n)
    if m.log_std.shape[0] > 0:
        policy, entropy = gaussian(m, rows, order, c)
    else:
        policy, entropy = categorical(m, rows, order, c)
    weight_gradient(m.products, m.actor, last)
    for i in range(last, 0, -1):
        descend(m.products, m.actor, i, n)
        weight_gradient(m.products, m.actor, i - 1)
    value(m.products, m.critic, m.q)
    error = fit(m, rows, order, c)
    value_delta(m.critic, m.dq)
    for i in range(top - 1, 0, -1):
        weight_gradient(m.products, m.critic, i)
        descend(m.products, m.critic, i, n)
    weight_gradient(m.products, m.critic, 0)
    m.report[POLICY], m.report[VALUE], m.report[ENTROPY] = policy, error, entropy
    return policy + c.value_coefficient * error - c.entropy_coefficient * entropy  # type: ignore[return-value]


@compiled
def epoch(m: Memory, rows: RolloutRows, order: Array, c: Coefficients, ok: bool) -> None:
    """Learn from the rows in ``order`` (N · B,), B at a time; nothing moves from the first minibatch on whose loss or
    gradient is not finite, and nothing where not ``ok``."""
    size = m.obs.shape[0]
    m.report[LOSSES], m.report[NORMS] = 0.0, 0.0
    for start in range(0, order.shape[0], size):
        m.report[LOSSES] += gradients(m, rows, order[start : start + size], c)
        for chunk in range(CHUNKS):
            measure(m.descent, chunk)
        length = norm(m.descent)
        m.report[NORMS] += length
        if ok and np.isfinite(m.report[LOSSES]) and np.isfinite(m.report[NORMS]):
            for chunk in range(CHUNKS):
                step(m.descent, chunk, length, c.factor)
            m.descent.steps[0] += ONE
