"""What agents share that act with one network and learn from a replay buffer: acting, runs, the course of an update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rlopt.agents.base import Agent, ReplayAgentConfig
from rlopt.agents.sequences import Memories
from rlopt.buffers import Batch
from rlopt.nn import Actor, Net, Optimiser, Schedule
from rlopt.policy import Policy
from rlopt.types import Act, Carry, Metrics, Obs, Update, map_obs

FEW = 32
"""Up to so many rows an actor is called row by row where it can be."""


class ReplayAgent(Agent):
    """An agent that acts with the network ``actor``, which its ``build`` makes, and learns from a replay buffer.

    An update is a sequence of stages. A subclass writes ``prepare``, ``stages``, and a method for each stage: the stage
    ``critic`` is ``critic_stage(work)``, the stage ``actor/3`` is ``actor_stage(work, 3)``, and ``left/critic`` is the
    stage ``critic`` of the child ``left`` on ``work["left"]``. Each takes its steps in place and returns what it
    reports. On a GPU each stage is recorded once, and replayed in whatever order ``stages``
    names: what is decided on the host belongs into ``stages`` and ``end_update``, never into a stage.
    """

    supports_runs = True
    config: ReplayAgentConfig
    actor: Net
    actor_module: Actor
    """The first run's acting network."""
    fast_act: Callable[[Tensor, Tensor | None], Tensor] | None = None
    """Actions at a few vector observations (R·N, O) with this noise (R·N, A), where an agent has a faster way."""
    memories: Memories | None = None
    """What its networks remember, where they do."""
    recorded_rate: Tensor | None = None
    """() float64, what ``rate`` returns while updates are recorded."""

    # --- acting

    @property
    def policy(self) -> Policy:
        return self.policies[0]

    @property
    def policies(self) -> list[Policy]:
        found = [Policy(self.spec, module) for module in self.actor.modules if isinstance(module, Actor)]
        for policy in found:
            policy.evaluation_mode = self.evaluation_mode
        return found

    def initial_carry(self, rows: int) -> Carry:
        return super().initial_carry(rows) if self.memories is None else self.memories.initial_carry(rows)

    @torch.no_grad()
    def act(self, obs: Obs, carry: Carry = None, deterministic: bool = False) -> Act:
        """Return actions (N, …) in environment units: uniform during the warm-up, then explored, or the mode.

        Of several runs the rows are R·N, run by run. Where nobody moves ``clock.env_steps``, the warm-up ends after as
        many rows acted on.
        """
        module, streams = self.actor_module, self.act_generators
        rows = next(iter(obs.values())).shape[0] if isinstance(obs, dict) else obs.shape[0]
        each = rows // self.runs
        recalled = None
        if self.memories is not None:  # in the warm-up too: what is remembered is stored from the first step on
            recalled, carry = self.memories.step(obs, carry)
        random = not deterministic and self.clock.steps < self.config.warmup_steps
        if not deterministic:
            self.clock.acted += each
        if random:
            draws = [module.uniform(each, g, _rows(obs, r * each, each)) for r, g in enumerate(streams)]
            return Act(_join(draws), carry)
        if self.fast_act is not None and isinstance(obs, Tensor) and rows <= FEW:
            return Act(self.fast_act(obs, None if deterministic else self.exploration(each)))
        if recalled is not None:
            return Act(module.choose(recalled, None if deterministic else self.exploration(each)), carry)
        if self.runs == 1:
            return Act(*module.act(obs, carry, deterministic, streams[0]))
        by_run = map_obs(lambda x: x.view(self.runs, each, *x.shape[1:]), obs)
        inside = () if deterministic else self.weight_noise()
        outputs = (self.actor if self.beside else torch.vmap(self.actor))(self.actor.params, by_run, *inside)
        flat = tuple(o.flatten(0, 1) for o in outputs) if isinstance(outputs, tuple) else outputs.flatten(0, 1)
        return Act(module.choose(flat, None if deterministic else self.exploration(each)))

    def exploration(self, rows: int) -> Tensor:
        """Return the noise (R·rows, …) of as many explored actions of every run, each from the run's own stream."""
        return _join([self.actor_module.noise(rows, g) for g in self.act_generators])

    def weight_noise(self) -> tuple[Tensor, ...]:
        """Return further arguments (R, …) of the networks where several runs explore by noise in their weights."""
        return ()

    # --- learning

    def prepare(self, batch: Any) -> Any:
        """Return what the stages of one update read: tensors in tuples and dicts, made of a minibatch and of noise."""
        raise NotImplementedError

    def watch(self, work: Any) -> None:
        """Open the update's guard with the inputs of ``prepare``."""
        raise NotImplementedError

    def stages(self) -> tuple[str, ...]:
        """Return the names of what the next update does, in order.

        Asking changes nothing: what an order depends on (the clock, or an order drawn from a registered generator)
        moves in ``end_update``.
        """
        raise NotImplementedError

    def learning(self, work: Any) -> Tensor | None:
        """Return whether the critic has anything to learn from, as ``descend`` takes it; None: always."""
        return None

    def stage(self, name: str, work: Any) -> Update:
        """Do one stage of an update; its metrics are (), of several runs (R,)."""
        kind, _, rest = name.partition("/")
        child = self._persistent.get(kind)
        if isinstance(child, ReplayAgent):
            return child.stage(rest, work[kind])
        method = getattr(self, f"{kind}_stage")
        done: Update = method(work, int(rest)) if rest else method(work)
        return done

    def update(self, batch: Any) -> Update:
        """Do the stages of one update on a minibatch of R·B transitions, run by run."""
        work = self.prepare(batch)
        done = self.compiled(work)
        if done is None:
            self.watch(work)
            done = join_updates([self.stage(name, work) for name in self.stages()])
        self.end_update()
        return done

    def compiled(self, work: Any) -> Update | None:
        """Do all stages at once where an agent has compiled code for them, here and now; None where it has not."""
        return None

    @cached_property
    def schedule(self) -> Schedule:
        return self.config.schedule()

    def rate(self) -> float | Tensor:
        return self.schedule.factor(self.clock) if self.recorded_rate is None else self.recorded_rate

    def constants(self) -> list[Any]:
        """Return the numbers of the host that the stages read and that a user may change between updates."""
        found: list[Any] = [(o.learning_rate, o.max_grad_norm) for o in self.registered(Optimiser)]
        found += [net.learns for net in self.registered(Net)]
        return found + [child.constants() for child in self.registered(ReplayAgent)]

    def by_run(self, batch: Batch) -> Batch:
        """Return a minibatch (R·B, …) as (R, B, …), with weights where it has none; of one run as it is."""
        if self.runs == 1:
            return batch
        weight = batch.weight
        if weight is None:  # one of a slice, too
            weight = torch.ones_like(batch.reward if batch.mask is None else batch.mask[:, 0])
        return batch._replace(weight=weight).map(lambda x: x.reshape(self.runs, -1, *x.shape[1:]))


def join_updates(parts: Sequence[Update]) -> Update:
    """Return all metrics of the stages of an update, and the priorities of the last that has some."""
    metrics: Metrics = {}
    priority = None
    for part in parts:
        metrics |= part.metrics
        priority = priority if part.priority is None else part.priority
    return Update(metrics, priority)


def _rows(obs: Obs, first: int, count: int) -> Obs:
    return map_obs(lambda x: x[first : first + count], obs)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
