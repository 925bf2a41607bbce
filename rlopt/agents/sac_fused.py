"""SAC's update written out by hand for plain ReLU networks on the CPU.

``rlopt.agents.sac`` is the definition; this file computes the same numbers (a test holds them equal) with fewer
passes over memory and without the interpreter: see ``rlopt.nn.fused_mlp``. An update is one call of compiled code, cut
into phases of independent tasks (a critic each, a policy each) for the threads that come to take them.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.buffers import Batch
from rlopt.jit import compiles
from rlopt.nn import PRECISIONS, Net, NetworkConfig, Optimiser, OptimiserConfig
from rlopt.nn.compiled import (
    Array,
    Products,
    array,
    claim,
    compiled,
    counters,
    finish,
    floats,
    product,
    products_available,
    rounds,
    wait,
)  # fmt: skip
from rlopt.nn.distributions import HALF_LOG_TWO_PI, LOG_STD_MAX, LOG_STD_MIN
from rlopt.nn.fused_adam import CHUNKS, Descent, describe, follow, measure, norm, step
from rlopt.nn.fused_mlp import FusedMLP, descend, ensemble, forward, single, value, value_delta, weight_gradient
from rlopt.nn.lanes import Lanes
from rlopt.types import Space

if TYPE_CHECKING:
    from rlopt.agents.sac import SAC

log = logging.getLogger(__name__)

LOW, HIGH, LOG_2, HALF_LOG = (np.float32(x) for x in (LOG_STD_MIN, LOG_STD_MAX, math.log(2.0), HALF_LOG_TWO_PI))


def applies(observation_space: Space, network: NetworkConfig, optimiser: OptimiserConfig, device: torch.device) -> bool:
    """Whether networks and optimiser are what the formulas below assume."""
    vector = isinstance(observation_space, spaces.Box) and len(observation_space.shape) == 1
    plain = network.activation == "relu" and network.encoder in ("auto", "flatten") and len(network.hidden) > 0
    return device.type == "cpu" and vector and plain and optimiser.name != "sgd" and products_available()


@compiled
def squash(raw: Array, bias: Array, noise: Array, pair: Array, log_prob: Array) -> None:
    """``squashed_gaussian`` of the output ``raw`` (B, 2A) and its ``bias`` (2A,), which is added to ``raw`` in place.
    The action goes to the last columns of ``pair`` (B, O + A).

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
    """Residuals of the critics (E, B): dL/dq, their mean size ``td`` (B,), the loss, and the mean of q."""
    members, rows = q.shape
    loss, total = np.float64(0), np.float64(0)
    for i in range(rows):
        smallest = next_q[0, i]
        for e in range(1, members):
            if not next_q[e, i] >= smallest:
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
    """The actor's loss, and dL/dq (E, B), which is not zero for the smaller critic alone."""
    members, rows = q.shape
    loss = np.float64(0)
    for i in range(rows):
        chosen = 0
        for e in range(1, members):
            if not q[e, i] >= q[chosen, i]:
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
    """dL/d raw (B, 2A) from dL/da of every critic (E, B, A), and its sum over the rows (2A,).

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
    """The sum of (B,)."""
    found = 0.0
    for i in range(x.shape[0]):
        found += x[i]
    return found


# What an update reports: first what the guard watches, in the order of ``SAC.guarded``.
OBS, NEXT_OBS, REWARD, CRITIC_LOSS, CRITIC_NORM, ACTOR_LOSS, ACTOR_NORM, TEMPERATURE_LOSS, TEMPERATURE_NORM = range(9)
MEAN_Q, ENTROPY, TEMPERATURE = range(9, 12)
# The tasks of an update are counted by phase; those of the actor come after ACTOR, as many as there are layers.
DRAW, VALUES, TARGET, BACKWARD, MEASURE, STEP, FINISH, ACTOR = range(8)
PROBES, CHOICE, ACTION_GRADS, POLICY, ACTOR_MEASURE, ACTOR_STEP, WEIGHTS = range(ACTOR, ACTOR + 7)


class Policy(NamedTuple):
    """The actor over the rows of one observation, and what it draws there."""

    net: Array
    raw: Array
    """Its output (B, 2A); with the bias once the action is drawn."""
    bias: Array
    pair: Array
    """Observation and the policy's action side by side (B, O + A), as critics read them."""
    log_prob: Array


class Memory(NamedTuple):
    """Everything that stays in place between the updates of one run."""

    progress: Array
    products: Array
    next: Policy
    """At the next observations."""
    now: Policy
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
def draw(products: Array, policy: Policy, obs: Array, noise: Array) -> float:
    """Act at ``obs`` (B, O): fills the pair and the log-probabilities. Returns the sum of the observations."""
    found = place(obs, policy.pair, 0)
    forward(products, policy.net, obs.shape[0])
    squash(policy.raw, policy.bias, noise, policy.pair, policy.log_prob)
    return found


@compiled
def critic_backward(products: Array, net: Array, dq: Array) -> None:
    """Every gradient of one critic from dL/dq (B,)."""
    value_delta(net, dq)
    for i in range(net.shape[0] - 2, 0, -1):
        weight_gradient(products, net, i)
        descend(products, net, i, dq.shape[0])
    weight_gradient(products, net, 0)


@compiled
def action_gradient(products: Array, net: Array, read: Array, dq: Array) -> None:
    """dL/da of one critic from dL/dq (B,)."""
    value_delta(net, dq)
    for i in range(net.shape[0] - 2, 0, -1):
        descend(products, net, i, dq.shape[0])
    product(products, read[0], read[1], read[2])


@compiled
def healthy(report: Array, upto: int) -> bool:
    """Whether everything watched so far is finite."""
    return bool(np.isfinite(total(report[: upto + 1])))


@compiled
def critic_phases(
    m: Memory, data: Data, round_: int, next_noise: Array, noise: Array, td: Array, constants: Constants, factor: float
) -> None:
    """A thread's share of the critics' step. Draws the policy's actions at both observations on the way."""
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
    """A thread's share of a guarded step, and of the target's (if it is not empty) towards the outcome."""
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
def actor_phases(m: Memory, round_: int, noise: Array, factor: float) -> None:
    """A thread's share of the actor's step, at the actions that ``critic_phases`` drew."""
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
def temperature_step(m: Memory, target_entropy: float, factor: float) -> None:
    """The guarded step of log α. The loss is linear in α = exp(log α), so its gradient is the loss itself."""
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
def last_words(m: Memory, acted: bool, constants: Constants, factor: float) -> None:
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
            m.code[0] = i + 1


@compiled
def update_phases(
    m: Memory, data: Data, round_: int, actor_round: int, next_noise: Array, noise: Array, td: Array,
    constants: Constants, factor: float,
) -> None:  # fmt: skip
    """A thread's share of one update; returns when all of it is done. No step of the actor where ``actor_round`` is
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
    """Actions (R·N, A) at ``obs`` (R·N, O) of R actors with parameters (R, P): tanh(mean + σ noise), in environment
    units. Row by row, since a product of a few rows costs torch more to begin than to do."""
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


def plain(x: Tensor) -> Array:
    """Contiguous float32, the one kind of array that the functions above are compiled for."""
    return array(x.to(torch.float32).contiguous())


class FusedActor:
    """Acts for every run of an agent, in a few rows at a time."""

    def __init__(self, agent: SAC) -> None:
        module, linear = agent.actor_module, agent.actor.leaves[0::2]
        self.flat = array(agent.actor.flat.detach().view(agent.runs, -1))
        sizes = [leaf.shape[-2:] for leaf in linear]
        self.widths = np.array([sizes[0][1], *(out for out, _ in sizes)])
        self.centre, self.half_range, self.shape = array(module.centre), array(module.half_range), module.action_shape

    def __call__(self, obs: Tensor, noise: Tensor | None) -> Tensor:
        """Actions (R·N, …) at ``obs`` (R·N, O), samples where there is ``noise`` (R·N, A), else the mode."""
        out = torch.empty(len(obs), len(self.centre))
        noise = torch.zeros_like(out) if noise is None else noise
        act_rows(self.flat, self.widths, plain(obs), array(noise), self.centre, self.half_range, array(out))
        return out.view(-1, *self.shape)


class FusedUpdate:
    """SAC's update of one run, for minibatches of one size."""

    _nets: tuple[list[FusedMLP], list[FusedMLP], list[FusedMLP], FusedMLP, FusedMLP]
    """Critics, probes, targets, the actor at the next observations and at those now."""
    _buffers: tuple[Tensor, ...]

    def __init__(self, agent: SAC, run: int | None, lanes: Lanes, like: FusedUpdate | None = None) -> None:
        """``run`` picks one of an agent's several; its update works in the memory of ``like``'s, which never runs at
        the same time."""
        self.lanes, self.products, c = lanes, Products(), agent.config
        rows, dtype = c.batch_size, PRECISIONS[agent.precision]

        def leaves(net: Net, flat: Tensor) -> list[Tensor]:
            return net.cut(flat.detach() if run is None else flat.detach()[run])

        actor, critic, target = (leaves(net, net.flat) for net in (agent.actor, agent.critic, agent.target))
        actor_grads, critic_grads = (
            leaves(agent.actor, agent.actor_optimiser.grad),
            leaves(agent.critic, agent.critic_optimiser.grad),
        )
        members, inputs = critic[0].shape[:2]
        outputs, features = actor[-1].shape[0], actor[0].shape[1]
        shapes = [(rows, inputs)] * 3 + [(rows, outputs), (members, rows, inputs - features)]
        self._buffers = like._buffers if like else tuple(torch.zeros(*shape) for shape in shapes)
        pair, next_pair, now_pair, delta, action_grads = self._buffers
        critics = ensemble(self.products, critic, critic_grads, pair, dtype, like._nets[0] if like else [])
        probes = ensemble(self.products, critic, [], now_pair, dtype, critics)
        targets = ensemble(self.products, target, [], next_pair, dtype, critics)
        alike = like._nets[3:] if like else (None, None)
        next_actor = single(self.products, actor, [], next_pair[:, :features], dtype, delta, alike[0])
        now_actor = single(self.products, actor, actor_grads, now_pair[:, :features], dtype, delta, alike[1])
        action_products = [
            [self.products.add(t) for t in (action_grads[e], probe.space.deltas[0], critic[0][e, features:].t())]
            for e, probe in enumerate(probes)
        ]
        self._nets = (critics, probes, targets, next_actor, now_actor)

        def policy(net: FusedMLP, pair: Tensor) -> Policy:
            return Policy(net.table, array(net.space.z[-1]), array(actor[-1]), array(pair), np.zeros(rows, np.float32))

        def numbers(*shape: int) -> Array:
            return np.zeros(shape, np.float32)

        if agent.learns_temperature:
            temperature = describe(agent.temperature_optimiser, run)
        else:
            temperature = describe(Optimiser(agent.log_temperature, 1.0, c.optimiser), run)
        code, target_flat = (t if run is None else t[run] for t in (agent.guard.code, agent.target.flat))
        self.memory = Memory(
            counters(WEIGHTS + len(actor) // 2), self.products.state,
            policy(next_actor, next_pair), policy(now_actor, now_pair),
            np.stack([net.table for net in critics]), np.stack([net.table for net in probes]),
            np.stack([net.table for net in targets]), np.array(action_products), array(action_grads), array(pair),
            numbers(members, rows), numbers(members, rows), numbers(members, rows), array(delta),
            describe(agent.critic_optimiser, run), array(target_flat.detach()), describe(agent.actor_optimiser, run),
            temperature, np.zeros(TEMPERATURE + 1), code.view(1).numpy(),
        )  # fmt: skip
        self.constants = Constants(c.tau, np.float32(c.huber), agent.target_entropy, agent.learns_temperature)
        self.ones = np.ones(rows, np.float32)

    @torch.no_grad()
    def __call__(
        self, batch: Batch, next_noise: Tensor, noise: Tensor, factor: float, act: bool
    ) -> tuple[Tensor, Tensor]:
        """One update; actor and temperature only where ``act``. Returns the report (12,), and the priorities (B,)."""
        obs, next_obs = batch.obs, batch.next_obs
        assert isinstance(obs, Tensor) and isinstance(next_obs, Tensor)
        m, td = self.memory, torch.empty(len(batch.reward))
        data = Data(
            plain(obs), plain(batch.action), plain(next_obs), plain(batch.reward), plain(batch.terminated),
            plain(batch.discount), self.ones if batch.weight is None else plain(batch.weight),
        )  # fmt: skip
        actor_round = rounds(m.progress, PROBES, len(m.critics)) if act else -1
        work = partial(
            update_phases, m, data, rounds(m.progress, FINISH, 1), actor_round, plain(next_noise), plain(noise),
            array(td), self.constants, factor,
        )  # fmt: skip
        if compiles(update_phases):
            log.info("compiling the update; the first time on a machine this takes up to half a minute")
        self.lanes.share(work)
        self.products.check()
        return torch.from_numpy(m.report).float(), td


class FusedRuns:
    """The same for several runs side by side: each whole update has a lane, and lanes meet once."""

    def __init__(self, agent: SAC) -> None:
        self.lanes, alone = Lanes(), Lanes(1)
        # The runs of one lane work in the same memory, which stays in its core's cache.
        self.runs: list[FusedUpdate] = []
        for r in range(agent.runs):
            like = self.runs[r - self.lanes.count] if r >= self.lanes.count else None
            self.runs.append(FusedUpdate(agent, r, alone, like))

    def __call__(
        self, batch: Batch, next_noise: Tensor, noise: Tensor, factor: float, act: bool
    ) -> tuple[Tensor, Tensor]:
        """As ``FusedUpdate``, with a leading run axis on everything but the report (12, R)."""

        def one(r: int) -> tuple[Tensor, Tensor]:
            return self.runs[r](_of_run(batch, r), next_noise[r], noise[r], factor, act)

        reports, priorities = zip(*self.lanes.run([partial(one, r) for r in range(len(self.runs))]), strict=True)
        return torch.stack(reports, -1), torch.stack(priorities)


def _of_run(batch: Batch, r: int) -> Batch:
    """Run r's part of a batch (R, B, …) of vectors."""
    assert isinstance(batch.obs, Tensor) and isinstance(batch.next_obs, Tensor) and batch.weight is not None
    return batch._replace(
        obs=batch.obs[r], action=batch.action[r], reward=batch.reward[r], next_obs=batch.next_obs[r],
        terminated=batch.terminated[r], discount=batch.discount[r], weight=batch.weight[r], index=batch.index[r],
    )  # fmt: skip
