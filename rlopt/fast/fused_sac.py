"""SAC's update written out by hand for plain ReLU networks on the CPU.

``rlopt.agents.sac`` is the definition; this computes the same numbers (a test holds them equal) with fewer passes over
memory and without the interpreter: an update is one call of compiled code (``rlopt.fast.sac_update``) in every
thread. Here the networks, optimisers and buffers are described to it.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlopt.buffers import Batch
from rlopt.fast.adam import describe, refresh
from rlopt.fast.lanes import Lanes
from rlopt.fast.mlp import FusedMLP, ensemble, single
from rlopt.fast.plain import is_plain, plain
from rlopt.fast.products import Array, Products, array, counters, products_available, rounds
from rlopt.fast.sac_update import (
    ACTOR_LOSS,
    CRITIC_LOSS,
    ENTROPY,
    FINISH,
    MEAN_Q,
    PROBES,
    TEMPERATURE,
    WATCHED,
    WEIGHTS,
    Constants,
    Data,
    PolicyBuffers,
    Scratch,
    act_rows,
    update_phases,
)  # fmt: skip
from rlopt.jit import compiles
from rlopt.nn import PRECISIONS, Net, Optimiser
from rlopt.types import Metrics, Update

if TYPE_CHECKING:
    from rlopt.agents.sac import SAC
    from rlopt.agents.temperature import Temperature

log = logging.getLogger(__name__)


METHODS = (
    "prepare", "watch", "stages", "stage", "critic_stage", "actor_stage", "target_stage", "critic_objective",
    "actor_objective", "per_run", "descend", "learning", "rate", "td", "act", "exploration",
)  # fmt: skip
"""What of an agent's class the compiled functions stand for."""


def applies(agent: SAC, written: type[SAC], temperature: type[Temperature]) -> bool:
    """Return whether all that ``agent`` is made of is what the formulas below assume, those of the given classes.

    Decided on what was built, and only by what is known here: a method, module, rule or loss that is anything else
    takes the readable path until it is written here as well.
    """
    optimisers = [agent.actor_optimiser, agent.critic_optimiser, agent.temperature.optimiser]
    return (
        agent.device.type == "cpu"
        and agent.precision in ("float32", "bf16")
        and all(getattr(type(agent), name) is getattr(written, name) for name in METHODS)
        and type(agent.temperature) is temperature
        and agent.config.td_loss in ("auto", "squared", "huber")
        and all(o is None or (type(o) is Optimiser and o.config.name in ("adam", "adamw")) for o in optimisers)
        and all(is_plain(m, (F.relu,)) for net in (agent.actor, agent.critic, agent.target) for m in net.modules)
        and products_available()
    )


class FusedActor:
    """Acts for every run of an agent, in a few rows at a time."""

    def __init__(self, agent: SAC) -> None:
        module, linear = agent.actor_module, agent.actor.leaves[0::2]
        self.flat = array(agent.actor.flat.detach().view(agent.runs, -1))
        sizes = [leaf.shape[-2:] for leaf in linear]
        self.widths = np.array([sizes[0][1], *(out for out, _ in sizes)])
        self.centre, self.half_range, self.shape = array(module.centre), array(module.half_range), module.action_shape

    def __call__(self, obs: Tensor, noise: Tensor | None) -> Tensor:
        """Return actions (R·N, …) at ``obs`` (R·N, O), samples where there is ``noise`` (R·N, A), else the mode."""
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

        def policy(net: FusedMLP, pair: Tensor) -> PolicyBuffers:
            return PolicyBuffers(
                net.table, array(net.space.z[-1]), array(actor[-1]), array(pair), np.zeros(rows, np.float32)
            )

        def numbers(*shape: int) -> Array:
            return np.zeros(shape, np.float32)

        temperature = agent.temperature
        last = temperature.optimiser or Optimiser(temperature.log, 1.0, c.optimiser)
        self.agent, self.optimisers = agent, (agent.critic_optimiser, agent.actor_optimiser, last)
        descents = [describe(optimiser, run) for optimiser in self.optimisers]
        code, target_flat = (t if run is None else t[run] for t in (agent.guard.code, agent.target.flat))
        self.memory = Scratch(
            counters(WEIGHTS + len(actor) // 2), self.products.state,
            policy(next_actor, next_pair), policy(now_actor, now_pair),
            np.stack([net.table for net in critics]), np.stack([net.table for net in probes]),
            np.stack([net.table for net in targets]), np.array(action_products), array(action_grads), array(pair),
            numbers(members, rows), numbers(members, rows), numbers(members, rows), array(delta),
            descents[0], array(target_flat.detach()), descents[1], descents[2],
            np.zeros(TEMPERATURE + 1), code.view(1).numpy(),
            np.array([agent.guard.number(name) for name in WATCHED]),
        )  # fmt: skip
        self.ones = np.ones(rows, np.float32)

    def __getstate__(self) -> Any:
        raise TypeError("an agent's compiled update holds addresses in memory: save agent.state_dict() instead")

    def __call__(self, batch: Batch, next_noise: Tensor, noise: Tensor, factor: float, act: bool) -> Update:
        """Make one update; of actor and temperature only where ``act``. The priorities are (B,)."""
        _tell_compiling()
        report, priority = self.report(batch, next_noise, noise, factor, act)
        return Update(_named(report, act), priority)

    def report(
        self, batch: Batch, next_noise: Tensor, noise: Tensor, factor: float, act: bool
    ) -> tuple[Tensor, Tensor]:
        """Do the same, with everything that is reported in one tensor (12,)."""
        obs, next_obs = batch.obs, batch.next_obs
        assert isinstance(obs, Tensor) and isinstance(next_obs, Tensor)
        m, td, agent = self.memory, torch.empty(len(batch.reward)), self.agent
        for descent, optimiser in zip((m.critic_step, m.actor_step, m.temperature_step), self.optimisers, strict=True):
            refresh(descent, optimiser)
        c = agent.config
        constants = Constants(
            c.tau, np.float32(c.huber), float(agent.temperature.target_entropy), agent.temperature.optimiser is not None
        )
        data = Data(
            plain(obs), plain(batch.action), plain(next_obs), plain(batch.reward), plain(batch.terminated),
            plain(batch.discount), self.ones if batch.weight is None else plain(batch.weight),
        )  # fmt: skip
        actor_round = rounds(m.progress, PROBES, len(m.critics)) if act else -1
        work = partial(
            update_phases, m, data, rounds(m.progress, FINISH, 1), actor_round, plain(next_noise), plain(noise),
            array(td), constants, factor,
        )  # fmt: skip
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

    def __call__(self, batch: Batch, next_noise: Tensor, noise: Tensor, factor: float, act: bool) -> Update:
        """As ``FusedUpdate``, with a leading run axis on everything; the priorities are (R·B,)."""

        def one(r: int) -> tuple[Tensor, Tensor]:
            return self.runs[r].report(batch.map(lambda x: x[r]), next_noise[r], noise[r], factor, act)

        _tell_compiling()
        reports, priorities = zip(*self.lanes.run([partial(one, r) for r in range(len(self.runs))]), strict=True)
        return Update(_named(torch.stack(reports, -1), act), torch.cat(priorities))


def _tell_compiling() -> None:
    if compiles(update_phases):
        log.info("compiling the update; the first time on a machine this takes up to half a minute")


def _named(report: Tensor, act: bool) -> Metrics:
    metrics = {"q": report[MEAN_Q], "critic_loss": report[CRITIC_LOSS]}
    if act:
        metrics |= {"actor_loss": report[ACTOR_LOSS], "entropy": report[ENTROPY]}
    return metrics | {"temperature": report[TEMPERATURE]}
