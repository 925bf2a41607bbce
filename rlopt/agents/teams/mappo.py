"""PPO for teams: IPPO, whose agents take each other for a part of the world (de Witt et al. 2020, arXiv 2011.09533),
MAPPO, whose value functions see the state (Yu et al. 2022, "The Surprising Effectiveness of PPO in Cooperative
Multi-Agent Games", arXiv 2103.01955), and HAPPO, whose agents learn one after the other (Kuba et al. 2022, ICLR, arXiv
2109.11251; the code read beside it is PKU-MARL/HARL @d539bad).

Every agent is a PPO, whole: its own networks, epochs and minibatches over what the team did together, from the team's
reward. HAPPO's agents weigh its advantages by how much likelier those before them have made what happened. With one
agent all three are PPO.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor

from rlopt import joint
from rlopt.agents.base import Agent
from rlopt.agents.ppo import PPO, PolicyAndValue, PPOConfig
from rlopt.agents.teams.members import Members
from rlopt.agents.teams.sequential import ORDERS, Order, update_in_order
from rlopt.buffers import Rollout
from rlopt.nn import Critic
from rlopt.policy import Policy
from rlopt.types import Act, Carry, Clock, EnvSpec, Obs, RloptError, Space, Update, option


@dataclass(frozen=True, kw_only=True)
class MAPPOConfig(PPOConfig):
    """Options of MAPPO and IPPO: those of every agent's PPO."""

    share_parameters: bool = option(False, "whether one network learns and acts for all agents")
    team_reward: bool = option(True, "whether each learns from the sum of all rewards, else from its own")


@dataclass(frozen=True, kw_only=True)
class HAPPOConfig(PPOConfig):
    """Options of HAPPO: those of every agent's PPO, and their order."""

    order: str = option("random", "in which the agents are updated: drawn anew each time, or theirs", choices=ORDERS)


def pack(name: str, tree: Any) -> dict[str, Any]:
    """Return an observation, or a space of some, as leaves ``name`` or ``name/…``."""
    leaves = tree.spaces if isinstance(tree, spaces.Dict) else tree
    return {f"{name}/{key}": leaf for key, leaf in leaves.items()} if isinstance(leaves, dict) else {name: leaves}


def unpack(name: str, leaves: Any) -> Any:
    """Return what ``pack`` made leaves of."""
    return leaves[name] if name in leaves else {
        key.removeprefix(f"{name}/"): leaf for key, leaf in leaves.items() if key.startswith(f"{name}/")
    }  # fmt: skip


class TwoViews(PolicyAndValue):
    """A policy and a value function that see different parts, ``own`` and ``critic``, of an observation."""

    def forward(
        self, obs: Obs, carry: Carry = None, ended: Tensor | None = None, valid: Tensor | None = None
    ) -> tuple[Any, Tensor, Carry]:
        return self.actor(unpack("own", obs)), self.critic(unpack("critic", obs))[0], None


class Member(PPO):
    """One agent's PPO in a team: its policy sees what the agent sees, its value function what the team lets it see."""

    supports_memory = False

    def make_networks(self) -> PolicyAndValue:
        own, seen = (_space(unpack(name, dict(self.spec.observation_space.items()))) for name in ("own", "critic"))  # type: ignore[attr-defined]
        return TwoViews(self.make_policy(own), Critic(seen, self.config.network, ensemble=1))

    def own_view(self, obs: Obs) -> Obs:
        own: Obs = unpack("own", obs)
        return own

    def begun(self, position: Tensor) -> Clock:
        assert isinstance(self.parent, IPPO)
        return self.parent.rollout_began

    def end_update(self) -> None:
        self.clock.updates += 1  # it is the members that step


def _space(found: Any) -> Space:
    return spaces.Dict(found) if isinstance(found, dict) else found


class IPPO(Agent):
    """Independent PPO: one for each agent of a team, which sees and values its own observations."""

    name: ClassVar[str] = "ippo"
    loop: ClassVar[str] = "rollout"
    supports_teams = True
    config_class: ClassVar[type[PPOConfig]] = MAPPOConfig
    config: Any
    learner: ClassVar[type[Member]] = Member
    central: ClassVar[bool] = False
    """Whether values are of the state."""

    def build(self) -> None:
        c, spec = self.config, self.spec
        if not spec.agents:
            raise RloptError(f"{spec.id} has one agent; agent={self.name} trains several: use agent=ppo")
        if not getattr(c, "team_reward", True) and not spec.reward_shape:
            raise RloptError(f"agent.team_reward=false: {spec.id} pays its agents one reward together; leave it out")
        if c.shared_encoder:
            raise RloptError(f"agent.shared_encoder=true: agent={self.name} has policies and values of different views")
        self.members = Members(spec, getattr(c, "share_parameters", False))
        shared = self.members.shared
        self.learners = [
            self.child("shared" if shared else f"learner_{i}", self.learner, c, self.member_spec(i))
            for i in range(1 if shared else self.members.count)
        ]
        self.team = self.members.team([each.actor_module for each in self.learners])
        self.boxed = isinstance(spec.action_space, spaces.Box)
        if self.boxed:
            self.extra_fields = {"sample": (tuple(spec.action_space.shape or ()), torch.float32)}
        self.rollout_began = Clock()
        """When the latest rollout did, which schedules read."""

    def member_spec(self, i: int) -> EnvSpec:
        """Return what agent i's PPO sees, ``own`` and ``critic``, and does."""
        own = self.members.specs[i]
        state = joint.critic_space(self.spec, i) if self.central else own.observation_space
        seen = spaces.Dict({**pack("own", own.observation_space), **pack("critic", state)})
        return EnvSpec(own.id, seen, own.action_space, self.spec.episode_limit, frame_stack=self.spec.frame_stack)

    @property
    def policy(self) -> Policy:
        return Policy(self.spec, self.team)

    @torch.no_grad()
    def act(self, obs: Obs, carry: Carry = None, deterministic: bool = False) -> Act:
        """Return joint actions (N, n, …); in a Box with the unclipped ``sample`` (N, n, A)."""
        seen, acted = [self.views(obs, i) for i in range(self.members.count)], self.clock.acted
        if self.members.shared:
            rows = {key: torch.cat([one[key] for one in seen]) for key in seen[0]}  # type: ignore[index]
            act = self.learners[0].act(rows, None, deterministic)
            acts = [
                Act(action, None, {key: x.chunk(len(seen))[i] for key, x in act.extras.items()})
                for i, action in enumerate(act.action.chunk(len(seen)))
            ]
        else:
            acts = [one.act(own, None, deterministic) for one, own in zip(self.learners, seen, strict=True)]
        action = joint.join_actions(self.spec, [one.action for one in acts])
        self.clock.acted = acted + (0 if deterministic else len(action))  # not once for each agent
        if not self.boxed:
            return Act(action)
        width = action.shape[-1]
        samples = [F.pad(one.extras["sample"], (0, width - one.extras["sample"].shape[-1])) for one in acts]
        return Act(action, None, {"sample": torch.stack(samples, 1)})

    # --- what each agent learns from

    def own_rollout(self, rollout: Rollout, i: int) -> Rollout:
        """Return what agent i alone learns from: rows in which it was dead are no transitions, and its death is an
        end."""
        assert rollout.next_obs is not None
        before, after = joint.alive(self.spec, rollout.obs), joint.alive(self.spec, rollout.next_obs)
        valid, terminated = rollout.valid, rollout.terminated
        if before is not None and after is not None:
            valid, terminated = valid & before[..., i], terminated | ~after[..., i]
        apart = bool(self.spec.reward_shape) and not getattr(self.config, "team_reward", True)
        extras = {name: self.members.acts(x)[i] for name, x in rollout.extras.items()}
        return rollout._replace(
            obs=self.views(rollout.obs, i),
            action=self.members.acts(rollout.action)[i],
            reward=rollout.reward[..., i] if apart else joint.team_reward(self.spec, rollout.reward),
            next_obs=self.views(rollout.next_obs, i),
            terminated=terminated,
            valid=valid,
            extras=extras,
        )

    def views(self, obs: Obs, i: int) -> Obs:
        """Return what agent i's policy and value function see of joint observations."""
        own = self.members.seen(obs)[i]
        return {**pack("own", own), **pack("critic", joint.critic_obs(self.spec, obs, i) if self.central else own)}

    def rollouts(self, rollout: Rollout) -> list[Rollout]:
        """Return what each learner learns from; one that all agents share, from their time lines side by side."""
        every = [self.own_rollout(rollout, i) for i in range(self.members.count)]
        return [_side_by_side(every)] if self.members.shared else every

    def update(self, batch: Rollout) -> Update:
        """Let every agent learn from one rollout (T, N) for all of its epochs. Beside what PPO waits for, the host
        waits once for each agent, to know whether it acted at all."""
        self.rollout_began = Clock(max(0, self.clock.steps - int(batch.valid.sum())))
        rollouts = self.rollouts(batch)
        return self.learn_all(rollouts)

    def learn_all(self, rollouts: list[Rollout]) -> Update:
        return update_in_order(range(len(rollouts)), lambda i: self.learn(rollouts[i], i), None)

    def learn(self, rollout: Rollout, i: int) -> Update:
        """Let learner i learn from its own rollout."""
        if not bool(rollout.valid.any()):
            return Update({})
        done = self.learners[i].update(rollout)
        tell: Callable[[str], str] = (lambda word: word) if self.members.shared else partial(_of, self.members, i)
        return Update({tell(word): value for word, value in done.metrics.items()})


def _of(members: Members, i: int, word: str) -> str:
    return members.metric(word, i)


def _side_by_side(every: list[Rollout]) -> Rollout:
    """Return the rollouts (T, N) of n agents as one (T, n·N)."""
    first = every[0]
    fields: dict[str, Any] = {}
    for name in ("obs", "action", "reward", "next_obs", "terminated", "truncated", "ended", "valid", "extras"):
        values = [getattr(one, name) for one in every]
        if isinstance(values[0], dict):
            fields[name] = {key: torch.cat([value[key] for value in values], 1) for key in values[0]}
        else:
            fields[name] = torch.cat(values, 1)
    return first._replace(**fields)


class MAPPO(IPPO):
    """Multi-agent PPO: IPPO with values of the state, where there is one, else of all observations."""

    name: ClassVar[str] = "mappo"
    central: ClassVar[bool] = True


class HAPPO(MAPPO):
    """Heterogeneous-agent PPO: the agents of MAPPO learn in a random order, each knowing what those before it have
    become."""

    name: ClassVar[str] = "happo"
    config_class: ClassVar[type[PPOConfig]] = HAPPOConfig

    def build(self) -> None:
        super().build()
        self.order = Order(self, self.members.count, self.config.order)

    def learn_all(self, rollouts: list[Rollout]) -> Update:
        """Agent i's advantages are weighed by Π π_new(a|s) / π_old(a|s) of those before it."""
        with torch.no_grad():
            before = [one.judge(rollout)[0] for one, rollout in zip(self.learners, rollouts, strict=True)]
        factor = torch.ones_like(before[0])

        def losses(i: int) -> Update:
            return self.learn(rollouts[i].with_extras(factor=factor.clone()), i)

        def refresh(i: int) -> None:
            ratio = (self.learners[i].judge(rollouts[i])[0] - before[i]).exp()
            factor.mul_(torch.where(rollouts[i].valid, ratio, 1.0))

        return update_in_order(self.order(), losses, refresh)
