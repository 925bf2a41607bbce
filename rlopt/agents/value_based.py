"""What agents share that act by the values of discrete actions: ε-greedy exploration, and copies of the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlopt.agents.base import ReplayAgentConfig
from rlopt.agents.replay_agent import ReplayAgent
from rlopt.agents.td import TDLoss
from rlopt.nn import Net
from rlopt.nn.encoders import Conv
from rlopt.policy import EvaluationMode
from rlopt.types import Act, Carry, Clock, Obs, option

EPSILON_STEPS = 250_000
"""``epsilon_steps`` in a loop of one's own: Dopamine's."""


@dataclass(frozen=True, kw_only=True)
class ValueBasedConfig(ReplayAgentConfig):
    """Options of exploring ε-greedily and of following by copies."""

    epsilon_start: float = option(1.0, "fraction of random actions when the warm-up is over", low=0.0, high=1.0)
    epsilon_end: float = option(0.01, "fraction of random actions in the end", low=0.0, high=1.0)
    epsilon_steps: int | None = option(
        None, "environment steps over which it falls, linearly (null: a tenth of total_steps)", low=1
    )
    evaluation_epsilon: float = option(0.001, "fraction of random actions in evaluations", low=0.0, high=1.0)
    target_every: int = option(8_000, "after how many of target_counts the target is copied", low=1)
    target_counts: str = option(
        "env_steps", "what target_every counts (papers differ)", choices=("env_steps", "updates")
    )
    tau: float = option(1.0, "step of the target towards the network it follows (1: a copy)", above=0.0, high=1.0)

    def epsilon(self, clock: Clock) -> float:
        """Return the fraction of random actions, which falls from the end of the warm-up on.

        Papers that count updates instead (LAP: 250,000, one for every four steps) come to the same number of steps.
        """
        steps = EPSILON_STEPS if self.epsilon_steps is None else self.epsilon_steps
        done = min(max(clock.steps - self.warmup_steps, 0) / steps, 1.0)
        return self.epsilon_start + (self.epsilon_end - self.epsilon_start) * done


class ValueBased(ReplayAgent):
    """An agent whose acting networks are ``QActor``s, or hold some, and whose target follows now and then.

    ``build`` calls ``begin``; ``stages`` asks ``target_is_due``.
    """

    config: ValueBasedConfig

    def lie_beside(self, net: Net) -> None:
        """Let the losses of several runs see all of them at once where ``net``, and so its target, can."""
        self.beside = self.runs > 1 and self.precision == "float32" and net.stacks

    def td_loss(self) -> TDLoss:
        """Return the loss of residuals; of runs that lie beside each other a number of each."""
        td = self.config.critic_td_loss()
        return torch.vmap(td) if self.beside else td

    def begin(self) -> None:
        self.evaluation_mode = EvaluationMode(True, self.config.evaluation_epsilon)
        self.latest = self.persist("latest", Clock(self.config.first_update))
        """The clock after the latest update."""
        if self.device.type == "cpu" and any(isinstance(m, Conv) for m in self.actor.module.modules()):
            from rlopt.fast.image_actor import compiled_actor  # numba takes a second to load

            self.fast_act = compiled_actor(self)

    def target_is_due(self) -> bool:
        """Return whether a multiple of ``target_every`` lies between the latest update and the next one."""
        every, now, before = self.config.target_every, self.clock, self.latest
        if self.config.target_counts == "updates":
            return (now.updates + 1) // every > now.updates // every
        return now.steps // every > before.steps // every

    def end_update(self) -> None:
        super().end_update()
        self.latest.load_state_dict(self.clock.state_dict())

    def act(self, obs: Obs, carry: Carry = None, deterministic: bool = False) -> Act:
        epsilon = self.config.epsilon(self.clock)
        for module in self.actor.modules:
            explorer: Any = module
            explorer.epsilon = epsilon
        return super().act(obs, carry, deterministic)

    def weight_noise(self) -> tuple[Tensor, ...]:
        modules: list[Any] = self.actor.modules
        if not modules[0].noise_size:
            return ()
        streams = zip(modules, self.act_generators, strict=True)
        return (torch.stack([module.weight_noise(g) for module, g in streams]),)
