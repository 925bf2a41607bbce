"""An agent that holds two agents: what a switch between two learners, or a team of them, asks of the base."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rlopt.agents import SAC, ReplayAgent, ReplayAgentConfig, SACConfig
from rlopt.buffers import Batch
from rlopt.types import Update, option


@dataclass(frozen=True, kw_only=True)
class TwoLearnersConfig(ReplayAgentConfig):
    """Options of the two."""

    left: SACConfig = option(SACConfig, "of the one that acts")
    right: SACConfig = option(SACConfig, "of the one that watches")


class TwoLearners(ReplayAgent):
    """Two SACs learn from the same minibatches, stage by stage; the left one acts."""

    name = "two_learners"
    config_class = TwoLearnersConfig
    config: TwoLearnersConfig

    def build(self) -> None:
        c = self.config
        self.left = self.child("left", SAC, replace(c.left, fused=False))
        self.right = self.child("right", SAC, replace(c.right, fused=False))
        self.actor, self.actor_module = self.left.actor, self.left.actor_module

    def prepare(self, batch: Batch) -> Any:
        return {name: child.prepare(batch) for name, child in self.children.items()}

    def watch(self, work: Any) -> None:
        self.left.watch(work["left"])

    def stages(self) -> tuple[str, ...]:
        return tuple(f"{name}/{stage}" for name, child in self.children.items() for stage in child.stages())


class TwoUpdates(TwoLearners):
    """The same by whole updates of its children, one after the other."""

    def update(self, batch: Batch) -> Update:
        left, right = self.left.update(batch), self.right.update(batch)
        self.end_update()
        return Update({f"{k}_right": v for k, v in right.metrics.items()} | left.metrics, left.priority)
