"""Independent learners: every agent of a team is a learner of its own, of what it saw and did itself, and takes the
others for a part of its world. ISAC (after IQL, Tan 1993; in this form de Witt et al. 2020, arXiv 2011.09533, have it
for PPO) is what a joint critic must beat."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlopt import joint
from rlopt.agents.teams.hasac import HASAC, HASACConfig, SoftConfig
from rlopt.agents.teams.members import ActingTeam
from rlopt.buffers import Batch
from rlopt.policy.team import TeamActor
from rlopt.types import AgentSpaces, EnvSpec, Obs, RloptError, Update, obs_leaves, option


@dataclass(frozen=True, kw_only=True)
class ISACConfig(SoftConfig):
    """Options of ISAC: those of every agent's SAC."""

    team_reward: bool = option(True, "whether each learns from the sum of all rewards, else from its own")


def solo(spec: EnvSpec, i: int) -> EnvSpec:
    """Return what agent i alone sees and does, as a team of one: so its death is still told apart from the end."""
    own, name = spec.agent_spaces[i], spec.agents[i]
    observation, action = joint.join_spaces([own], alive="alive" in obs_leaves(spec.observation_space))
    return EnvSpec(
        f"{spec.id}/{name}", observation, action, spec.episode_limit, (name,), (AgentSpaces(*own),),
        frame_stack=spec.frame_stack,
    )  # fmt: skip


class ISAC(ActingTeam):
    """Independent soft actor-critics, one for each agent of a team; each is a HASAC of one agent, which is SAC."""

    name: ClassVar[str] = "isac"
    config_class = ISACConfig
    config: ISACConfig
    learner: ClassVar[type[HASAC]] = HASAC

    def build(self) -> None:
        spec = self.spec
        if not spec.agents:
            raise RloptError(f"{spec.id} has one agent; agent={self.name} trains several: use agent=sac")
        if not self.config.team_reward and not spec.reward_shape:
            raise RloptError(f"agent.team_reward=false: {spec.id} pays its agents one reward together; leave it out")
        options = {f.name: getattr(self.config, f.name) for f in fields(SoftConfig)}
        config = HASACConfig(**options, critic_temperature="agents")
        self.learners = [
            self.child(f"learner_{i}", self.learner, config, solo(spec, i)) for i in range(len(spec.agents))
        ]
        actors: list[list[Any]] = [[each.actor.modules[r] for each in self.learners] for r in range(self.runs)]
        self.teams = [TeamActor(spec, own) for own in actors]

    def prepare(self, batch: Batch) -> dict[str, Any]:
        work: dict[str, Any] = {
            f"learner_{i}": child.prepare(self.own(batch, i)) for i, child in enumerate(self.learners)
        }
        if joint.alive(self.spec, batch.obs) is not None:
            work["priority"] = torch.zeros(len(batch.terminated), device=self.device)
        return work

    def own(self, batch: Batch, i: int) -> Batch:
        """Return the minibatch of agent i as a team of one."""

        def seen(obs: Obs) -> Obs:
            own, who = joint.own_obs(self.spec, obs, i), joint.alive(self.spec, obs)
            rows = {key: x.unsqueeze(1) for key, x in (own if isinstance(own, dict) else {"obs": own}).items()}
            return rows if who is None else {**rows, "alive": who[:, i : i + 1]}

        apart = bool(self.spec.reward_shape) and not self.config.team_reward
        reward: Tensor = batch.reward[:, i] if apart else joint.team_reward(self.spec, batch.reward)
        action = joint.own_action(self.spec, batch.action, i).unsqueeze(1)
        return batch._replace(obs=seen(batch.obs), next_obs=seen(batch.next_obs), reward=reward, action=action)

    def watch(self, work: dict[str, Any]) -> None:
        self.open_update()
        for i, child in enumerate(self.learners):
            child.look_at(work[f"learner_{i}"])

    def stages(self) -> tuple[str, ...]:
        return tuple(f"learner_{i}/{stage}" for i, child in enumerate(self.learners) for stage in child.stages())

    def stage(self, name: str, work: Any) -> Update:
        """Do one stage of an agent's update; a transition's priority is that of the last agent that lives in it."""
        done, (learner, _, _) = super().stage(name, work), name.partition("/")
        agent, priority = self.spec.agents[int(learner.removeprefix("learner_"))], done.priority
        if isinstance(priority, Tensor) and "priority" in work:
            lives = work[learner].alive.flatten() > 0.0
            priority = torch.where(lives, priority, work["priority"], out=work["priority"])
        return Update({f"{word}/{agent}": value for word, value in done.metrics.items()}, priority)
