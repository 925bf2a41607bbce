"""A team of independent learners: what the simplest agent of several agents asks of every part of the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rlopt.agents import ReplayAgent, ReplayAgentConfig
from rlopt.agents.sac import SAC, SACConfig
from rlopt.agents.sac_discrete import DiscreteSAC, DiscreteSACConfig
from rlopt.joint import own_batch
from rlopt.policy import Policy
from rlopt.policy.team import TeamActor
from rlopt.types import Act, Carry, Obs, option


@dataclass(frozen=True, kw_only=True)
class IndependentConfig(ReplayAgentConfig):
    """Options of a team in a discrete joint space."""

    learner: DiscreteSACConfig = option(DiscreteSACConfig, "of every agent")
    team_reward: bool = option(True, "whether each learns from the sum of all rewards")


class Independent(ReplayAgent):
    """Every agent is a learner of its own, of what it saw and did itself."""

    name: ClassVar[str] = "independent"
    config_class = IndependentConfig
    supports_teams = True
    config: Any
    learner: ClassVar[type[ReplayAgent]] = DiscreteSAC

    def build(self) -> None:
        learners: dict[str, Any] = {
            name: self.child(name, self.learner, self.config.learner, self.spec.of_agent(name))
            for name in self.spec.agents
        }
        actors = [[learner.actor.modules[r] for learner in learners.values()] for r in range(self.runs)]
        self.teams = [TeamActor(self.spec, own) for own in actors]

    @property
    def policies(self) -> list[Policy]:
        return [Policy(self.spec, team) for team in self.teams]

    @torch.no_grad()
    def act(self, obs: Obs, carry: Carry = None, deterministic: bool = False) -> Act:
        assert isinstance(obs, dict)
        each, actions = len(obs["state"]) // self.runs, []
        for r, (team, generator) in enumerate(zip(self.teams, self.act_generators, strict=True)):
            rows = {key: leaf[r * each : (r + 1) * each] for key, leaf in obs.items()}
            if not deterministic and self.clock.env_steps < self.config.warmup_steps:
                actions.append(team.uniform(each, generator, rows))
            else:
                actions.append(team.act(rows, None, deterministic, generator)[0])
        return Act(torch.cat(actions))

    def prepare(self, batch: Any) -> Any:
        parts = (own_batch(self.spec, batch, i, self.config.team_reward) for i in range(len(self.children)))
        return {name: child.prepare(part) for (name, child), part in zip(self.children.items(), parts, strict=True)}

    def watch(self, work: Any) -> None:
        self.children["agent_0"].watch(work["agent_0"])

    def stages(self) -> tuple[str, ...]:
        return tuple(f"{name}/{stage}" for name, child in self.children.items() for stage in child.stages())


@dataclass(frozen=True, kw_only=True)
class IndependentBoxConfig(ReplayAgentConfig):
    """Options of a team in a joint Box."""

    learner: SACConfig = option(SACConfig, "of every agent")
    team_reward: bool = option(True, "whether each learns from the sum of all rewards")


class IndependentBox(Independent):
    """The same in a joint Box."""

    name: ClassVar[str] = "independent_box"
    config_class = IndependentBoxConfig
    learner = SAC
