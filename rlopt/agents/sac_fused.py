"""SAC's two gradients written out by hand for plain ReLU networks on the CPU.

``rlopt.agents.sac`` is the definition; this file computes the same numbers (a test holds them equal) with fewer
passes over memory: see ``rlopt.nn.fused_mlp``. Each critic, and each half of the actor's work, has a lane of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.buffers import Batch
from rlopt.nn import Net, NetworkConfig, Optimiser
from rlopt.nn.distributions import HALF_LOG_TWO_PI, LOG_STD_MAX, LOG_STD_MIN
from rlopt.nn.fused_mlp import FusedMLP, ensemble, single
from rlopt.nn.kernels import Array, array, compiled
from rlopt.nn.lanes import Lanes
from rlopt.types import Metrics, Space

LOW, HIGH, LOG_2, HALF_LOG = (np.float32(x) for x in (LOG_STD_MIN, LOG_STD_MAX, math.log(2.0), HALF_LOG_TWO_PI))


def applies(observation_space: Space, network: NetworkConfig, device: torch.device) -> bool:
    """Whether these networks are what the formulas below assume."""
    vector = isinstance(observation_space, spaces.Box) and len(observation_space.shape) == 1
    plain = network.activation == "relu" and network.encoder in ("auto", "flatten") and len(network.hidden) > 0
    return device.type == "cpu" and vector and plain


@compiled
def squash(raw: Array, bias: Array, noise: Array, action: Array, log_prob: Array) -> None:
    """``squashed_gaussian`` of the output ``raw`` (B, 2A) and its ``bias`` (2A,), which is added to ``raw`` in place.

    With e = exp(-2|u|): tanh u = ±(1 - e)/(1 + e) and log(1 - tanh² u) = 2(log 2 - |u| - log(1 + e)).
    """
    n = action.shape[1]
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
            action[i, j] = t if u >= np.float32(0) else -t
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
    action_grads: Array, action: Array, raw: Array, noise: Array, temperature: Array, delta: Array, bias_grad: Array
) -> None:
    """dL/d raw (B, 2A) from dL/da of every critic (E, B, A), and its sum over the rows (2A,).

    log π = Σ -½ε² - log σ - c - log(1 - tanh² u), so d log π / du = 2 tanh u and du/d log σ = σ ε.
    """
    rows, n = action.shape
    share = temperature[0] / np.float32(rows)
    bias_grad[:] = np.float32(0)
    for i in range(rows):
        for j in range(n):
            grad = np.float32(0)
            for e in range(action_grads.shape[0]):
                grad += action_grads[e, i, j]
            a, log_std = action[i, j], raw[i, n + j]
            du = grad * (np.float32(1) - a * a) + np.float32(2) * share * a
            ds = du * np.exp(min(max(log_std, LOW), HIGH)) * noise[i, j] - share
            if log_std < LOW or log_std > HIGH:
                ds = np.float32(0)
            delta[i, j], delta[i, n + j] = du, ds
            bias_grad[j] += du
            bias_grad[n + j] += ds


class _Policy:
    """The actor over one half of the rows it reads."""

    def __init__(self, mlp: FusedMLP, rows: int, inputs: int) -> None:
        self.mlp = mlp
        self.obs_features = mlp.weights[0].shape[0]
        self.pair = torch.empty(rows, inputs)
        """Observation and the policy's action side by side, as critics read them."""
        self.action = array(self.pair)[:, self.obs_features :]
        self.log_prob = torch.empty(rows)
        self._log_prob = array(self.log_prob)
        self.raw = array(mlp.z[-1])

    def draw(self, obs: Tensor, noise: Array) -> None:
        self.pair[:, : self.obs_features] = obs
        self.noise = noise
        self.mlp.output(obs)
        squash(self.raw, self.mlp.biases[-1], noise, self.action, self._log_prob)


class Leaves(NamedTuple):
    """Parameters of one run, and where their gradients go."""

    actor: list[Tensor]
    critic: list[Tensor]
    target: list[Tensor]
    actor_grads: list[Tensor]
    critic_grads: list[Tensor]


def fused_gradients(
    actor: Net,
    critic: Net,
    target: Net,
    actor_optimiser: Optimiser,
    critic_optimiser: Optimiser,
    batch_size: int,
    dtype: torch.dtype,
    huber: float,
) -> FusedGradients | FusedRuns:
    """The gradients of one run, or of as many as the nets hold. Residuals beyond ``huber`` count linearly."""

    def leaves(*rows: Tensor) -> Leaves:
        return Leaves(*(net.cut(row) for net, row in zip((actor, critic, target, actor, critic), rows, strict=True)))

    flats = (actor.flat, critic.flat, target.flat, actor_optimiser.grad, critic_optimiser.grad)
    if not actor.stacked:
        return FusedGradients(leaves(*flats), batch_size, dtype, huber, Lanes())
    alone = Lanes(1)
    return FusedRuns(
        [FusedGradients(leaves(*rows), batch_size, dtype, huber, alone) for rows in zip(*flats, strict=True)]
    )


class FusedGradients:
    """Gradients of the critic loss and the actor loss for minibatches of one size.

    ``dtype`` is that of the products between hidden layers (float32 or bfloat16).
    """

    def __init__(self, leaves: Leaves, batch_size: int, dtype: torch.dtype, huber: float, lanes: Lanes) -> None:
        b, self.lanes, self.huber = batch_size, lanes, np.float32(huber)
        actor = leaves.actor
        self.critics = ensemble(leaves.critic, leaves.critic_grads, b, dtype)
        self.probes = ensemble(leaves.critic, [], b, dtype, self.critics)
        """The same critics, read at the policy's actions, where only dL/da is wanted."""
        self.targets = ensemble(leaves.target, [], b, dtype, self.critics)
        inputs, members = self.critics[0].weights[0].shape[0], len(self.critics)
        self.next = _Policy(single(actor, [], b, dtype), b, inputs)
        self.now = _Policy(single(actor, leaves.actor_grads, b, dtype), b, inputs)
        self.features = self.now.obs_features
        self.pair = torch.empty(b, inputs)
        self.q, self.next_q, self.dq = (torch.empty(members, b) for _ in range(3))
        self.action_grads = torch.empty(members, b, inputs - self.features)
        self.delta = torch.empty(b, 2 * (inputs - self.features))
        self.ones = np.ones(b, np.float32)

    @torch.no_grad()
    def critic_gradient(
        self, temperature: Tensor, batch: Batch, next_noise: Tensor, noise: Tensor
    ) -> tuple[Tensor, Metrics]:
        """Loss and metrics of ``critic_loss``; its gradient is left in the critic optimiser. ``noise`` (B, A) is
        ``actor_loss``'s, whose actions are drawn here too."""
        obs, next_obs = batch.obs, batch.next_obs
        assert isinstance(obs, Tensor) and isinstance(next_obs, Tensor)

        def now() -> None:
            self.pair[:, : self.features] = obs
            self.pair[:, self.features :] = batch.action
            self.now.draw(obs, array(noise))

        self.lanes.run([partial(self.next.draw, next_obs, array(next_noise)), now])

        def values(e: int) -> None:
            self.targets[e].value(self.next.pair, self.next_q[e])
            self.critics[e].value(self.pair, self.q[e])

        self._each(values)
        td = torch.empty_like(batch.reward)
        loss, mean = td_error(
            array(self.next_q), array(self.next.log_prob), array(self.q), array(temperature.view(1)),
            array(batch.reward), array(batch.discount), array(batch.terminated),
            self.ones if batch.weight is None else array(batch.weight), self.huber, array(self.dq), array(td),
        )  # fmt: skip

        def backward(e: int) -> None:
            mlp = self.critics[e]
            delta = mlp.value_delta(self.dq[e])
            for i in range(mlp.last - 1, 0, -1):
                mlp.weight_gradient(i, delta)
                delta = mlp.below(i, delta)
            mlp.weight_gradient(0, delta)

        self._each(backward)
        return torch.tensor(loss, dtype=torch.float32), {"q": torch.tensor(mean, dtype=torch.float32), "td": td}

    @torch.no_grad()
    def actor_gradient(self, temperature: Tensor) -> tuple[Tensor, Metrics]:
        """Loss and metrics of ``actor_loss``; its gradient is left in the actor optimiser. Follows
        ``critic_gradient``, which drew the actions."""
        now, mlp, alpha = self.now, self.now.mlp, array(temperature.view(1))
        self._each(lambda e: self.probes[e].value(now.pair, self.q[e]))
        loss = pick_smaller(array(self.q), array(now.log_prob), alpha, array(self.dq))

        def action_gradient(e: int) -> None:
            probe = self.probes[e]
            delta = probe.value_delta(self.dq[e])
            for i in range(probe.last - 1, 0, -1):
                delta = probe.below(i, delta)
            torch.mm(delta, probe.weights[0][self.features :].t(), out=self.action_grads[e])

        self._each(action_gradient)
        policy_delta(
            array(self.action_grads), now.action, now.raw, now.noise, alpha, array(self.delta), mlp.bias_grads[-1]
        )
        mlp.weight_gradient(mlp.last, self.delta)
        delta = mlp.below(mlp.last, self.delta)
        for i in range(mlp.last - 1, 0, -1):  # one lane walks down, the other forms the weights' gradients behind it
            delta = self.lanes.run([partial(mlp.below, i, delta), partial(mlp.weight_gradient, i, delta)])[0]
        mlp.weight_gradient(0, delta)
        return torch.tensor(loss, dtype=torch.float32), {"log_prob": now.log_prob}

    def _each(self, work: Callable[[int], Any]) -> None:
        """``work(e)`` for every critic e, each in its lane."""
        self.lanes.run([partial(work, e) for e in range(len(self.critics))])


class FusedRuns:
    """The same for several runs: each whole update has a lane, and lanes meet once."""

    def __init__(self, runs: list[FusedGradients]) -> None:
        self.runs, self.lanes = runs, Lanes()

    def critic_gradient(
        self, temperature: Tensor, batch: Batch, next_noise: Tensor, noise: Tensor
    ) -> tuple[Tensor, Metrics]:
        """As ``FusedGradients.critic_gradient``, with a leading run axis on everything."""

        def one(r: int) -> tuple[Tensor, Metrics]:
            return self.runs[r].critic_gradient(temperature[r], _of_run(batch, r), next_noise[r], noise[r])

        return self._stack(one)

    def actor_gradient(self, temperature: Tensor) -> tuple[Tensor, Metrics]:
        """As ``FusedGradients.actor_gradient``, with a leading run axis on everything."""
        return self._stack(lambda r: self.runs[r].actor_gradient(temperature[r]))

    def _stack(self, one: Callable[[int], tuple[Tensor, Metrics]]) -> tuple[Tensor, Metrics]:
        losses, metrics = zip(*self.lanes.run([partial(one, r) for r in range(len(self.runs))]), strict=True)
        return torch.stack(losses), {name: torch.stack([m[name] for m in metrics]) for name in metrics[0]}


def _of_run(batch: Batch, r: int) -> Batch:
    """Run r's part of a batch (R, B, …) of vectors."""
    assert isinstance(batch.obs, Tensor) and isinstance(batch.next_obs, Tensor) and batch.weight is not None
    return batch._replace(
        obs=batch.obs[r], action=batch.action[r], reward=batch.reward[r], next_obs=batch.next_obs[r],
        terminated=batch.terminated[r], discount=batch.discount[r], weight=batch.weight[r], index=batch.index[r],
    )  # fmt: skip
