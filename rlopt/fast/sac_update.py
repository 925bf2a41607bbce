"""SAC's update as compiled functions; ``rlopt.fast.fused_sac`` prepares what they work on.

Every formula is that of ``rlopt.agents.sac``. An update is a sequence of phases, each of independent tasks (a critic
each, a policy each); every thread runs through all phases and takes the tasks that nobody has taken yet.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from rlopt.fast.adam import CHUNKS, Descent, follow, measure, norm, step
from rlopt.fast.mlp import descend, forward, value, value_delta, weight_gradient
from rlopt.fast.products import Array, claim, compiled, finish, floats, product, wait
from rlopt.nn.distributions import HALF_LOG_TWO_PI, LOG_STD_MAX, LOG_STD_MIN

LOW, HIGH, LOG_2, HALF_LOG = (np.float32(x) for x in (LOG_STD_MIN, LOG_STD_MAX, math.log(2.0), HALF_LOG_TWO_PI))


@compiled
def squash(raw: Array, bias: Array, noise: Array, pair: Array, log_prob: Array) -> None:
    """Return ``squashed_gaussian`` of the output ``raw`` (B, 2A) and its ``bias`` (2A,), which is added to ``raw`` in
    place. The action goes to the last columns of ``pair`` (B, O + A).

    With e = exp(-2|u|): tanh u = ±(1 - e)/(1 + e) and log(1 - tanh² u) = 2(log 2 - |u| - log(1 + e)).
    """
    n = noise.shape[1]
    start = pair.shape[1] - n
    for i in range(raw.shape[0]):
        total = np.float32(0)
        for j in range(n):
            raw[i, j] += bias[j]
            raw[i, n + j] += bias[n + j]
            log_std = raw[i, n + j] if np.isnan(raw[i, n + j]) else min(max(raw[i, n + j], LOW), HIGH)
            u = raw[i, j] + np.exp(log_std) * noise[i, j]
            size = abs(u)
            e = np.exp(np.float32(-2) * size)
            t = (np.float32(1) - e) / (np.float32(1) + e)
            pair[i, start + j] = t if u >= np.float32(0) else -t
            total -= np.float32(0.5) * noise[i, j] * noise[i, j] + log_std + HALF_LOG
            total -= np.float32(2) * (LOG_2 - size - np.log1p(e))
        log_prob[i] = total


@compiled
def td_error(
    next_q: Array, next_log_prob: Array, q: Array, temperature: Array, reward: Array, discount: Array,
    terminated: Array, weight: Array, huber: np.float32, dq: Array, td: Array,
) -> tuple[float, float]:  # fmt: skip
    """Return residuals of the critics (E, B): dL/dq, their mean size ``td`` (B,), the loss, and the mean of q."""
    members, rows = q.shape
    loss, total = np.float64(0), np.float64(0)
    for i in range(rows):
        smallest = next_q[0, i]
        for e in range(1, members):
            if not (next_q[e, i] >= smallest or np.isnan(smallest)):
                smallest = next_q[e, i]
        y = reward[i] + discount[i] * (np.float32(1) - terminated[i]) * (smallest - temperature[0] * next_log_prob[i])
        td[i] = np.float32(0)
        for e in range(members):
            residual = q[e, i] - y
            clipped = residual if np.isnan(residual) else min(max(residual, -huber), huber)
            dq[e, i] = weight[i] * clipped / np.float32(rows)
            td[i] += abs(residual) / np.float32(members)
            loss += weight[i] * clipped * (residual - np.float32(0.5) * clipped)
            total += q[e, i]
    return loss / rows, total / (members * rows)


@compiled
def pick_smaller(q: Array, log_prob: Array, temperature: Array, dq: Array) -> float:
    """Return the actor's loss, and dL/dq (E, B), which is not zero for the smaller critic alone."""
    members, rows = q.shape
    loss = np.float64(0)
    for i in range(rows):
        chosen = 0
        for e in range(1, members):
            if not (q[e, i] >= q[chosen, i] or np.isnan(q[chosen, i])):
                chosen = e
        for e in range(members):
            dq[e, i] = np.float32(0)
        dq[chosen, i] = np.float32(-1) / np.float32(rows)
        loss += temperature[0] * log_prob[i] - q[chosen, i]
    mean: float = loss / rows
    return mean


@compiled
def policy_delta(
    action_grads: Array, pair: Array, raw: Array, noise: Array, temperature: Array, delta: Array, bias_grad: Array
) -> None:
    """Return dL/d raw (B, 2A) from dL/da of every critic (E, B, A), and its sum over the rows (2A,).

    log π = Σ -½ε² - log σ - c - log(1 - tanh² u), so d log π / du = 2 tanh u and du/d log σ = σ ε.
    """
    rows, n = noise.shape
    start = pair.shape[1] - n
    share = temperature[0] / np.float32(rows)
    bias_grad[:] = np.float32(0)
    for i in range(rows):
        for j in range(n):
            grad = np.float32(0)
            for e in range(action_grads.shape[0]):
                grad += action_grads[e, i, j]
            a, log_std = pair[i, start + j], raw[i, n + j]
            du = grad * (np.float32(1) - a * a) + np.float32(2) * share * a
            ds = du * np.exp(min(max(log_std, LOW), HIGH)) * noise[i, j] - share
            if log_std < LOW or log_std > HIGH:
                ds = np.float32(0)
            delta[i, j], delta[i, n + j] = du, ds
            bias_grad[j] += du
            bias_grad[n + j] += ds


@compiled
def place(x: Array, pair: Array, start: int) -> float:
    """Copy ``x`` (B, W) into columns of ``pair``; returns its sum."""
    total = 0.0
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            pair[i, start + j] = x[i, j]
            total += x[i, j]
    return total


@compiled
def total(x: Array) -> float:
    """Return the sum of (B,)."""
    found = 0.0
    for i in range(x.shape[0]):
        found += x[i]
    return found


# What an update reports: first what the guard watches, by the names it has there.
OBS, NEXT_OBS, REWARD, CRITIC_LOSS, CRITIC_NORM, ACTOR_LOSS, ACTOR_NORM, TEMPERATURE_LOSS, TEMPERATURE_NORM = range(9)
MEAN_Q, ENTROPY, TEMPERATURE = range(9, 12)
WATCHED = (
    "observation", "next observation", "reward", "critic loss", "critic gradient", "actor loss", "actor gradient",
    "temperature loss", "temperature gradient",
)  # fmt: skip
# The tasks of an update are counted by phase; those of the actor come after ACTOR, as many as there are layers.
DRAW, VALUES, TARGET, BACKWARD, MEASURE, STEP, FINISH, ACTOR = range(8)
PROBES, CHOICE, ACTION_GRADS, POLICY, ACTOR_MEASURE, ACTOR_STEP, WEIGHTS = range(ACTOR, ACTOR + 7)


class PolicyBuffers(NamedTuple):
    """The actor over the rows of one observation, and what it draws there."""

    net: Array
    raw: Array
    """Its output (B, 2A); with the bias once the action is drawn."""
    bias: Array
    pair: Array
    """Observation and the policy's action side by side (B, O + A), as critics read them."""
    log_prob: Array


class Scratch(NamedTuple):
    """Everything that stays in place between the updates of one run."""

    progress: Array
    products: Array
    next: PolicyBuffers
    """At the next observations."""
    now: PolicyBuffers
    critics: Array
    """(E, L) of ``LAYER``, reading the pairs of the minibatch."""
    probes: Array
    """The same critics, read at the policy's actions, where only dL/da is wanted."""
    targets: Array
    action_products: Array
    """(E, 3) operands: dL/da of each critic from its first delta."""
    action_grads: Array
    pair: Array
    q: Array
    next_q: Array
    dq: Array
    delta: Array
    critic_step: Descent
    target: Array
    """Parameters of the target critics, flat."""
    actor_step: Descent
    temperature_step: Descent
    """Of log α, (1,); where the temperature is fixed it is not used."""
    report: Array
    """(12,) what the guard watches, and the metrics."""
    code: Array
    """(1,) of the guard."""
    numbers: Array
    """(9,) what the code is for each of the watched."""


class Data(NamedTuple):
    """A minibatch as arrays."""

    obs: Array
    action: Array
    next_obs: Array
    reward: Array
    terminated: Array
    discount: Array
    weight: Array


class Constants(NamedTuple):
    """Numbers of the configuration."""

    tau: float
    huber: np.float32
    target_entropy: float
    learns_temperature: bool


@compiled
def draw(products: Array, policy: PolicyBuffers, obs: Array, noise: Array) -> float:
    """Act at ``obs`` (B, O): fills the pair and the log-probabilities. Returns the sum of the observations."""
    found = place(obs, policy.pair, 0)
    forward(products, policy.net, obs.shape[0])
    squash(policy.raw, policy.bias, noise, policy.pair, policy.log_prob)
    return found


@compiled
def critic_backward(products: Array, net: Array, dq: Array) -> None:
    """Compute every gradient of one critic from dL/dq (B,)."""
    value_delta(net, dq)
    for i in range(net.shape[0] - 2, 0, -1):
        weight_gradient(products, net, i)
        descend(products, net, i, dq.shape[0])
    weight_gradient(products, net, 0)


@compiled
def action_gradient(products: Array, net: Array, read: Array, dq: Array) -> None:
    """Return dL/da of one critic from dL/dq (B,)."""
    value_delta(net, dq)
    for i in range(net.shape[0] - 2, 0, -1):
        descend(products, net, i, dq.shape[0])
    product(products, read[0], read[1], read[2])


@compiled
def healthy(report: Array, upto: int) -> bool:
    """Return whether everything watched so far is finite."""
    return bool(np.isfinite(total(report[: upto + 1])))


@compiled
def critic_phases(
    m: Scratch, data: Data, round_: int, next_noise: Array, noise: Array, td: Array, constants: Constants, factor: float
) -> None:
    """Do a thread's share of the critics' step. Draws the policy's actions at both observations on the way."""
    progress, products, members, alpha = m.progress, m.products, m.critics.shape[0], np.exp(m.temperature_step.flat)

    task = claim(progress, DRAW, round_, 2)
    while task >= 0:
        if task == 0:
            m.report[NEXT_OBS] = draw(products, m.next, data.next_obs, next_noise)
        else:
            place(data.obs, m.pair, 0)
            place(data.action, m.pair, data.obs.shape[1])
            m.report[OBS] = draw(products, m.now, data.obs, noise)
        finish(progress, DRAW)
        task = claim(progress, DRAW, round_, 2)
    wait(progress, DRAW, round_, 2)

    task = claim(progress, VALUES, round_, members)
    while task >= 0:
        value(products, m.targets[task], m.next_q[task])
        value(products, m.critics[task], m.q[task])
        finish(progress, VALUES)
        task = claim(progress, VALUES, round_, members)
    wait(progress, VALUES, round_, members)

    if claim(progress, TARGET, round_, 1) == 0:
        m.report[REWARD] = total(data.reward)
        m.report[CRITIC_LOSS], m.report[MEAN_Q] = td_error(
            m.next_q, m.next.log_prob, m.q, alpha, data.reward, data.discount, data.terminated, data.weight,
            constants.huber, m.dq, td,
        )  # fmt: skip
        finish(progress, TARGET)
    wait(progress, TARGET, round_, 1)

    task = claim(progress, BACKWARD, round_, members)
    while task >= 0:
        critic_backward(products, m.critics[task], m.dq[task])
        finish(progress, BACKWARD)
        task = claim(progress, BACKWARD, round_, members)
    wait(progress, BACKWARD, round_, members)

    descend_phases(progress, MEASURE, round_, m.critic_step, m.report, CRITIC_NORM, factor, m.target, constants.tau)


@compiled
def descend_phases(
    progress: Array, phase: int, round_: int, d: Descent, report: Array, watched: int, factor: float, target: Array,
    tau: float,
) -> None:  # fmt: skip
    """Do a thread's share of a guarded step, and of the target's (if it is not empty) towards the outcome."""
    task = claim(progress, phase, round_, CHUNKS)
    while task >= 0:
        measure(d, task)
        finish(progress, phase)
        task = claim(progress, phase, round_, CHUNKS)
    wait(progress, phase, round_, CHUNKS)

    task = claim(progress, phase + 1, round_, CHUNKS)
    while task >= 0:
        size = norm(d)
        if np.isfinite(size) and healthy(report, watched - 1):
            step(d, task, size, factor)
        if target.shape[0] > 0:
            follow(target, d.flat, task, tau)
        if task == 0:
            report[watched] = size
        finish(progress, phase + 1)
        task = claim(progress, phase + 1, round_, CHUNKS)
    wait(progress, phase + 1, round_, CHUNKS)


@compiled
def actor_phases(m: Scratch, round_: int, noise: Array, factor: float) -> None:
    """Do a thread's share of the actor's step, at the actions that ``critic_phases`` drew."""
    progress, products, net, members = m.progress, m.products, m.now.net, m.probes.shape[0]
    rows, last, alpha = m.pair.shape[0], net.shape[0] - 1, np.exp(m.temperature_step.flat)

    task = claim(progress, PROBES, round_, members)
    while task >= 0:
        value(products, m.probes[task], m.q[task])
        finish(progress, PROBES)
        task = claim(progress, PROBES, round_, members)
    wait(progress, PROBES, round_, members)

    if claim(progress, CHOICE, round_, 1) == 0:
        m.report[ACTOR_LOSS] = pick_smaller(m.q, m.now.log_prob, alpha, m.dq)
        m.report[ENTROPY] = -total(m.now.log_prob) / rows
        finish(progress, CHOICE)
    wait(progress, CHOICE, round_, 1)

    task = claim(progress, ACTION_GRADS, round_, members)
    while task >= 0:
        action_gradient(products, m.probes[task], m.action_products[task], m.dq[task])
        finish(progress, ACTION_GRADS)
        task = claim(progress, ACTION_GRADS, round_, members)
    wait(progress, ACTION_GRADS, round_, members)

    if claim(progress, POLICY, round_, 1) == 0:
        bias_grad = floats(net[last].bias_grad_at, net[last].outputs)
        policy_delta(m.action_grads, m.now.pair, m.now.raw, noise, alpha, m.delta, bias_grad)
        descend(products, net, last, rows)
        if last == 1:
            weight_gradient(products, net, 1)
            weight_gradient(products, net, 0)
        finish(progress, POLICY)
    wait(progress, POLICY, round_, 1)

    for i in range(last - 1, 0, -1):  # one thread walks down, the other forms the weights' gradients behind it
        phase = WEIGHTS + i
        task = claim(progress, phase, round_, 2)
        while task >= 0:
            if task == 0:
                descend(products, net, i, rows)
                if i == 1:
                    weight_gradient(products, net, 0)
            else:
                weight_gradient(products, net, i)
                if i == last - 1:
                    weight_gradient(products, net, last)
            finish(progress, phase)
            task = claim(progress, phase, round_, 2)
        wait(progress, phase, round_, 2)
    descend_phases(progress, ACTOR_MEASURE, round_, m.actor_step, m.report, ACTOR_NORM, factor, m.target[:0], 0.0)


@compiled
def temperature_step(m: Scratch, target_entropy: float, factor: float) -> None:
    """Take the guarded step of log α. The loss is linear in α = exp(log α), so its gradient is the loss itself."""
    d = m.temperature_step
    loss = m.report[TEMPERATURE] * (m.report[ENTROPY] - target_entropy)
    d.grad[0] = loss
    m.report[TEMPERATURE_LOSS] = loss
    m.report[TEMPERATURE_NORM] = abs(loss)
    if healthy(m.report, TEMPERATURE_NORM):
        for chunk in range(CHUNKS):
            step(d, chunk, abs(loss), factor)
        d.steps[0] += np.float32(1)


@compiled
def last_words(m: Scratch, acted: bool, constants: Constants, factor: float) -> None:
    """Count the steps, step the temperature, and tell the guard what was not finite first."""
    m.report[TEMPERATURE] = np.exp(m.temperature_step.flat[0])
    watched = CRITIC_NORM
    if healthy(m.report, CRITIC_NORM):
        m.critic_step.steps[0] += np.float32(1)
    if acted:
        watched = ACTOR_NORM
        if healthy(m.report, ACTOR_NORM):
            m.actor_step.steps[0] += np.float32(1)
        if constants.learns_temperature:
            watched = TEMPERATURE_NORM
            temperature_step(m, constants.target_entropy, factor)
    for i in range(watched + 1):
        if m.code[0] == 0 and not np.isfinite(m.report[i]):
            m.code[0] = m.numbers[i]


@compiled
def update_phases(
    m: Scratch, data: Data, round_: int, actor_round: int, next_noise: Array, noise: Array, td: Array,
    constants: Constants, factor: float,
) -> None:  # fmt: skip
    """Do a thread's share of one update; returns when all of it is done. No step of the actor where ``actor_round`` is
    negative."""
    critic_phases(m, data, round_, next_noise, noise, td, constants, factor)
    if actor_round >= 0:
        actor_phases(m, actor_round, noise, factor)
    if claim(m.progress, FINISH, round_, 1) == 0:
        last_words(m, actor_round >= 0, constants, factor)
        finish(m.progress, FINISH)
    wait(m.progress, FINISH, round_, 1)


@compiled
def act_rows(
    flat: Array, widths: Array, obs: Array, noise: Array, centre: Array, half_range: Array, out: Array
) -> None:
    """Compute actions (R·N, A) at ``obs`` (R·N, O) of R actors with parameters (R, P): tanh(mean + σ noise), in
    environment units. Row by row, since a product of a few rows costs torch more to begin than to do."""
    each, last, n = obs.shape[0] // flat.shape[0], widths.shape[0] - 2, out.shape[1]
    wide = widths.max()
    x, y = np.empty(wide, np.float32), np.empty(wide, np.float32)
    for row in range(obs.shape[0]):
        parameters, offset = flat[row // each], 0
        for j in range(obs.shape[1]):
            x[j] = obs[row, j]
        for layer in range(last + 1):
            inputs, outputs = widths[layer], widths[layer + 1]
            biases = parameters[offset + inputs * outputs :]
            for k in range(outputs):
                weights, sum_ = parameters[offset + k * inputs : offset + (k + 1) * inputs], biases[k]
                for j in range(weights.shape[0]):
                    sum_ += weights[j] * x[j]
                y[k] = np.float32(0) if layer < last and sum_ <= np.float32(0) else sum_
            x, y = y, x
            offset += (inputs + 1) * outputs
        for j in range(n):
            u = x[j] + np.exp(min(max(x[n + j], LOW), HIGH)) * noise[row, j]
            out[row, j] = centre[j] + half_range[j] * np.tanh(u)
