"""The skeleton of off-policy actor-critics: networks, optimisers and targets, and the stages of an update.

An algorithm brings its losses, as pure functions with their equations, and says in ``critic_objective`` and
``actor_objective`` what they are evaluated on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, cast

from torch import Tensor, nn

from rlopt.agents.base import ReplayAgentConfig
from rlopt.agents.replay_agent import ReplayAgent
from rlopt.agents.sequences import Memories, Remembering, observations
from rlopt.agents.td import TDLoss
from rlopt.agents.temperature import Temperature
from rlopt.buffers import Batch
from rlopt.nn import Actor, Net, network_options
from rlopt.types import Metrics, Obs, Space, Update, option

A = TypeVar("A", bound=Actor)


@dataclass(frozen=True, kw_only=True)
class ActorCriticConfig(ReplayAgentConfig):
    """What every off-policy actor-critic has."""

    actor_learning_rate: float | None = option(None, "of the actor (null: learning_rate)", above=0.0)
    tau: float = option(0.005, "step of the target network towards the one it follows", above=0.0, high=1.0)


@dataclass(frozen=True)
class Nets:
    """The functions the losses are made of."""

    actor: Callable[..., Any]
    critic: Callable[..., Any]


class Work(NamedTuple):
    """What the stages of one update read; of several runs with a leading axis R."""

    batch: Batch
    """The minibatch, with actions as the losses want them; of slices their ``rows``."""
    noise: tuple[Tensor, ...] = ()
    """Standard normal (B, A) each, as many as the losses need."""


class ActorCritic(ReplayAgent):
    """An agent that learns ``critic`` and, by it, ``actor``; ``target`` follows the critic slowly.

    Stages: ``critic``; ``actor``, with the step of the temperature where there is one; ``target``.
    """

    config: ActorCriticConfig
    nets: Nets
    temperature: Temperature | None = None

    @cached_property
    def td(self) -> TDLoss:
        return self.config.critic_td_loss()

    def build_actor(self, kind: Callable[[Space, Space, dict[str, object]], A]) -> A:
        """Make ``actor`` and its optimiser; return the first run's network."""
        c, spec, options = self.config, self.spec, network_options(self.config.network)
        self.actor = self.net("actor", lambda: kind(spec.observation_space, spec.action_space, options))
        self.actor_optimiser = self.add_optimiser(
            "actor_optimiser", self.actor, c.actor_learning_rate or c.learning_rate
        )
        return cast(A, self.actor.module)

    def build_critic(self, make: Callable[[], nn.Module]) -> None:
        """Make ``critic`` and its optimiser."""
        self.critic = self.net("critic", make)
        self.critic_optimiser = self.add_optimiser("critic_optimiser", self.critic, self.config.learning_rate)

    def build_target(self, source: Net) -> None:
        """Make ``target``, a slow copy of ``source``."""
        self.followed, self.target = source, self.persist("target", source.target())

    def build_memories(self) -> None:
        """Let the losses and the collector see ``actor`` and ``critic`` as networks with a memory."""
        self.memories = Memories(self, {"actor": self.actor, "critic": self.critic})
        self.nets = Nets(Remembering(self.actor, "actor"), Remembering(self.critic, "critic"))

    def q(self, obs: Obs, action: Tensor) -> Tensor:
        module: Any = self.actor_module
        values: Tensor = self.critic.module(obs, module.normalise(action))
        return values

    def critic_objective(self, work: Work) -> tuple[Tensor, Metrics]:
        """Return the critics' loss, () or (R,), and its metrics with ``q`` and the residuals ``td`` (B,)."""
        raise NotImplementedError

    def actor_objective(self, work: Work) -> tuple[Tensor, Metrics]:
        """Return the actor's loss, () or (R,), and its metrics, of a stochastic actor with ``log_prob`` (B,)."""
        raise NotImplementedError

    def constants(self) -> list[Any]:
        return [*super().constants(), *([self.temperature.target_entropy] if self.temperature else [])]

    def watch(self, work: Work) -> None:
        batch = work.batch
        seen, next_seen = observations(batch.obs), observations(batch.next_obs)
        self.open_update(observation=seen, next_observation=next_seen, reward=batch.reward)

    def stages(self) -> tuple[str, ...]:
        return "critic", "actor", "target"

    def critic_stage(self, work: Work) -> Update:
        loss, metrics = self.critic_objective(work)
        self.descend("critic", self.critic_optimiser, loss, self.critic, self.learning(work))
        # Priorities are the plain errors: a weight corrects the loss for how often a transition is drawn, and in its
        # priority it would undo what the priority is for.
        priority = metrics.pop("td").flatten()
        return Update(metrics | {"critic_loss": loss.detach()}, priority)

    def actor_stage(self, work: Work) -> Update:
        loss, aux = self.actor_objective(work)
        self.descend("actor", self.actor_optimiser, loss, self.actor)
        if self.temperature is not None:
            self.temperature.descend(aux["log_prob"])
        entropy = {"entropy": -aux["log_prob"].mean(-1)} if "log_prob" in aux else {}
        return Update({"actor_loss": loss.detach(), **entropy})

    def target_stage(self, work: Work) -> Update:
        self.target.follow(self.followed, self.config.tau)
        return Update({})
