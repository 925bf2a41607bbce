"""The skeleton of off-policy teams with one critic of the state and everybody's actions: networks, masks, the order of
agents, and the stages of an update.

An algorithm brings its losses, as pure functions, and says in ``target_values`` and ``agent_objective`` what they are
evaluated on, by ``sees_present`` whether an agent's loss sees what the others do now or what they did, and by
``refreshes`` whether it sees what they do once they are updated.

Shape letters beside the package's: F numbers of the joint action, M rows of a critic: B, or B·n where each agent has a
state of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from rlopt import joint
from rlopt.agents.actor_critic import ActorCritic, ActorCriticConfig
from rlopt.agents.td import TDLoss
from rlopt.agents.teams.members import ActingTeam, Members, OwnActions
from rlopt.agents.teams.sequential import ORDERS, Order, update_in_order
from rlopt.buffers import Batch
from rlopt.nn import Actor, Critic, Net, Optimiser, Params, network_options
from rlopt.types import EnvSpec, Metrics, Obs, RloptError, Update, is_state, map_obs, obs_leaves, option, shape_of


@dataclass(frozen=True, kw_only=True)
class JointCriticConfig(ActorCriticConfig):
    """What every off-policy team with a joint critic has."""

    order: str = option("random", "in which the agents are updated: drawn anew each time, or theirs", choices=ORDERS)
    share_parameters: bool = option(False, "whether one network acts for all agents")


class JointBatch(NamedTuple):
    """A minibatch as a joint critic sees it; of several runs with a leading axis R."""

    obs: Obs
    """(M, …)."""
    action: Tensor
    """(B, F), of the dead 0."""
    reward: Tensor
    """(B,) the team's."""
    next_obs: Obs
    terminated: Tensor
    """(M,) 1 where the bootstrap is cut: also where nobody, or not the agent whose state it is, lives on."""
    discount: Tensor
    """(B,)."""
    weight: Tensor | None
    """(M,); 0 where nobody, or not the agent whose state it is, acts."""


class TeamWork(NamedTuple):
    """What the stages of one update read, and ``actions`` and ``log_prob`` what those before left for those after."""

    batch: JointBatch
    seen: tuple[Obs, ...]
    """(B, …) each, what the agents saw."""
    seen_next: tuple[Obs, ...]
    alive: Tensor | None
    """(B, n) float, who acted; None where all always do."""
    alive_next: Tensor | None
    noise: tuple[Tensor, ...]
    """Standard normal (B, F) each: for the next actions, and of stochastic policies for the present ones."""
    actions: Tensor
    """(B, F) what an agent's loss sees the others do: what they did, until they are shown."""
    log_prob: Tensor
    """(B, n) of what the agents did when they were updated, of stochastic ones."""


@dataclass(frozen=True)
class TeamNets:
    """The functions the losses are made of."""

    actors: tuple[Net, ...]
    critic: Net
    own: tuple[OwnActions, ...]
    rows: int = 1
    """Critic's rows per transition."""

    @property
    def widths(self) -> list[int]:
        return [one.features for one in self.own]

    def tile(self, x: Tensor) -> Tensor:
        """Return what holds of transitions, (B, …), as of a critic's rows, (M, …)."""
        if self.rows == 1:
            return x
        return x.unsqueeze(1).expand(len(x), self.rows, *x.shape[1:]).reshape(-1, *x.shape[1:])

    def spread(self, alive: Tensor) -> Tensor:
        """Return who acts, (…, n), for every number of the joint action, (…, F)."""
        parts = zip(alive.unbind(-1), self.widths, strict=True)
        return torch.cat([one.unsqueeze(-1).expand(*one.shape, width) for one, width in parts], -1)

    def put(self, actions: Tensor, i: int, own: Tensor) -> Tensor:
        """Return joint actions (B, F) with agent i's part ``own`` (B, F_i)."""
        if len(self.own) == 1:
            return own
        before, _, after = self.cut(actions, i)
        return torch.cat([before, own, after], -1)

    def cut(self, actions: Tensor, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return views (…, ·) of the parts of those before agent i, of its own, and of those after."""
        first, width = sum(self.widths[:i]), self.widths[i]
        return actions[..., :first], actions[..., first : first + width], actions[..., first + width :]


def critic_loss(
    nets: TeamNets, params: Params, batch: JointBatch, y: Tensor, alive: Tensor | None, td: TDLoss
) -> tuple[Tensor, Metrics]:
    """Return the Bellman residual of both critics: J = Σ ½ mean (Q(s, a) - y)², or what ``td`` makes of the residuals.

    ``y`` (M,) are the targets, ``alive`` is (B, n). Metrics include ``td`` (B,), the mean absolute residual of the two
    critics, of the living's states where each agent has one; 0 where nobody lives.
    """
    q = nets.critic(params, batch.obs, nets.tile(batch.action))
    residual = q - y
    size = residual.detach().abs().mean(0)
    return td(residual, batch.weight), {"q": q.detach().mean(), "td": of_transitions(size, nets.rows, alive)}


def of_transitions(x: Tensor, rows: int, alive: Tensor | None) -> Tensor:
    """Return the means of each transition's ``rows`` among (M,), or among those of K such minibatches (K·M,), over the
    rows of the living, ``alive`` (B, n); 0 where nobody lives."""
    if alive is None:
        return x if rows == 1 else x.view(-1, rows).mean(-1)
    counts = alive.amax(-1, True) if rows == 1 else alive
    return ((x.view(-1, *counts.shape) * counts).sum(-1) / counts.sum(-1).clamp(min=1.0)).flatten()


def living_mean(x: Tensor, alive: Tensor | None) -> Tensor:
    """Return the mean of ``x`` (B,) over the rows where an agent lives, (B,); of none 0."""
    return x.mean() if alive is None else (x * alive).sum() / alive.sum().clamp(min=1.0)


class JointCriticAgent(ActingTeam, ActorCritic):
    """A team that learns one ``critic`` of the state and all actions, and by it an actor of every agent, in order.

    Stages: ``critic``; ``actor/i`` and ``show/i`` of each agent i; ``target``.
    """

    config: JointCriticConfig
    nets: TeamNets  # type: ignore[assignment]
    noises: ClassVar[int] = 2
    """Draws of standard normal noise that the losses need."""
    sees_present: ClassVar[bool] = True
    """Whether an agent's loss sees the actions of the others' present policies; else those of the minibatch."""
    refreshes: ClassVar[bool] = True
    """Whether an agent's new actions are seen by those updated after it."""

    def build_team(
        self, kind: Callable[[EnvSpec, dict[str, object]], Actor], own: Callable[[Actor, EnvSpec], OwnActions]
    ) -> None:
        """Make actors, their optimisers, ``critic`` and ``target``, and the order."""
        c, spec, options = self.config, self.spec, network_options(self.config.network)
        if c.share_parameters and not spec.agents:
            raise RloptError(f"agent.share_parameters=true has no effect: {spec.id} has one agent; leave it out")
        self.members = members = Members(spec, c.share_parameters)
        rate = c.actor_learning_rate or c.learning_rate
        self.actors: list[Net] = []
        self.actor_optimisers: list[Optimiser] = []
        for i, one in enumerate(members.specs):
            if members.shared and i:
                self.actors.append(self.actors[0])
                self.actor_optimisers.append(self.actor_optimisers[0])
                continue
            name = "actor" if members.shared else members.name("actor", i)
            self.actors.append(self.net(name, lambda one=one: kind(one, options)))  # type: ignore[misc]
            self.actor_optimisers.append(self.add_optimiser(f"{name}_optimiser", self.actors[-1], rate))
        modules: list[list[Any]] = [[net.modules[r] for net in self.actors] for r in range(self.runs)]
        self.teams = [members.team(each) for each in modules]
        # A team of one is asked for its network like any other agent.
        self.actor, self.actor_module = self.actors[0], modules[0][0]
        parts = tuple(own(module, one) for module, one in zip(modules[0], members.agents, strict=True))
        state = joint.critic_space(spec)
        self.each_state = bool(spec.agents) and _has_own_states(spec)
        seen = joint.critic_space(spec, 0) if self.each_state else state
        features = sum(one.features for one in parts)
        self.build_critic(lambda: Critic(seen, c.network, features))
        self.build_target(self.critic)
        self.nets = TeamNets(tuple(self.actors), self.critic, parts, members.count if self.each_state else 1)
        self.order = Order(self, members.count, c.order)
        if c.order != "random" and not self.refreshes and not members.shared:
            raise RloptError(
                f"agent.order={c.order} has no effect: agent={self.name}'s agents learn at once, unless they share a "
                "network (agent.share_parameters=true); leave it out"
            )

    # --- what an algorithm says

    def target_values(self, work: TeamWork) -> tuple[Tensor, Metrics]:
        """Return the critic's targets y (M,) or (R, M), outside the graph, and metrics."""
        raise NotImplementedError

    def agent_objective(self, work: TeamWork, i: int) -> tuple[Tensor, Metrics]:
        """Return agent i's loss, () or (R,), and its metrics, of a stochastic actor with ``log_prob`` (B,)."""
        raise NotImplementedError

    def own_sample(self, i: int, params: Params, seen: Obs, noise: Tensor) -> Tensor:
        """Return what agent i does (B, F_i), a pure function of one run."""
        own = self.nets.own[i]
        return own.sample(self.nets.actors[i](params, seen), noise)[0]

    # --- the course of an update

    @torch.no_grad()
    def prepare(self, batch: Batch) -> TeamWork:
        spec, nets = self.spec, self.nets
        acts = zip(nets.own, self.members.acts(batch.action), strict=True)
        action = torch.cat([own.encode(done) for own, done in acts], -1)
        batch = self.by_run(batch._replace(action=action, reward=joint.team_reward(spec, batch.reward)))
        seen, seen_next = self.members.seen(batch.obs), self.members.seen(batch.next_obs)
        alive, alive_next = joint.alive(spec, batch.obs), joint.alive(spec, batch.next_obs)
        terminated, weight = batch.terminated, batch.weight
        if alive is not None and alive_next is not None:
            alive, alive_next = alive.to(action.dtype), alive_next.to(action.dtype)
            lives, lived = (alive_next, alive) if self.each_state else (alive_next.amax(-1, True), alive.amax(-1, True))
            terminated = torch.maximum(terminated.unsqueeze(-1), 1.0 - lives).flatten(-2)
            weight = (lived if weight is None else lived * weight.unsqueeze(-1)).flatten(-2)
            action = batch.action * nets.spread(alive)
        else:
            action, alive, alive_next = batch.action, None, None
            terminated = self._tiled(terminated)
            weight = None if weight is None else self._tiled(weight)
        data = JointBatch(
            self.critic_sees(batch.obs), action, batch.reward,
            self.critic_sees(batch.next_obs), terminated, batch.discount, weight,
        )  # fmt: skip
        noise = tuple(self.noise(*action.shape[-2:]) for _ in range(self.noises))
        log_prob = torch.zeros((*action.shape[:-1], self.members.count), device=self.device)
        return TeamWork(data, seen, seen_next, alive, alive_next, noise, action.clone(), log_prob)

    def critic_sees(self, obs: Obs) -> Obs:
        """Return what the critic sees of joint observations: (…, M, …)."""
        seen = joint.critic_obs(self.spec, obs)
        if not self.each_state:
            return seen
        axis = 0 if self.runs == 1 else 1
        return map_obs(lambda x: x.flatten(axis, axis + 1), seen)

    def _tiled(self, x: Tensor) -> Tensor:
        return x if self.nets.rows == 1 else x.repeat_interleave(self.nets.rows, -1)

    def watch(self, work: Any) -> None:
        self.open_update()
        self.look_at(work)

    def look_at(self, work: TeamWork) -> None:
        """Add the inputs of ``prepare`` to the guard of the open update."""
        batch = work.batch
        for name, value in (("observation", batch.obs), ("next observation", batch.next_obs), ("reward", batch.reward)):
            self.guard.passes(name, value)
        if self.spec.agents:
            for i in range(self.members.count):
                self.guard.passes(self.members.metric("observation", i), work.seen[i])
                self.guard.passes(self.members.metric("next observation", i), work.seen_next[i])

    def actor_stages(self) -> tuple[str, ...]:
        """Return the stages of the agents' steps, in the order of the template: ``actor/i`` learns, and ``show/i`` lets
        the others' losses see what agent i does, wherever one of them looks before that changes again."""
        order = self.order()
        stages: list[str] = []
        if self.sees_present and len(order) > 1:
            first = order[1:] if self.refreshes else order
            stages += [f"show/{i}" for i in (first[:1] if self.members.shared else first)]

        def learn(i: int) -> Update:
            stages.append(f"actor/{i}")
            return Update({})

        def show(i: int) -> None:
            if i != order[-1]:
                stages.append(f"show/{i}")

        update_in_order(order, learn, show if self.refreshes else None)
        return tuple(stages)

    def stages(self) -> tuple[str, ...]:
        return ("critic", *self.actor_stages(), "target")

    def critic_objective(self, work: Any) -> tuple[Tensor, Metrics]:
        y, told = self.target_values(work)
        pure = partial(critic_loss, self.nets, td=self.td)
        loss, metrics = self.per_run(pure)(self.critic.params, work.batch, y, work.alive)
        return loss, metrics | told

    def learning(self, work: Any) -> Tensor | None:
        return self.lives(work)

    def lives(self, work: TeamWork, i: int | None = None) -> Tensor | None:
        """Return whether agent i, or anybody, acts in any row, () or (R,) bool; None where all always do."""
        if work.alive is None:
            return None
        return (work.alive if i is None else work.alive[..., i : i + 1]).amax((-2, -1)) > 0.0

    def actor_stage(self, work: Any, i: int = 0) -> Update:
        """Take agent i's step down its own loss."""
        loss, aux = self.agent_objective(work, i)
        learns = self.lives(work, i)
        self.descend(self.members.metric("actor", i), self.actor_optimisers[i], loss, self.actors[i], learns)
        return Update({self.members.metric("actor_loss", i): loss.detach()} | self.learnt(work, i, aux))

    def learnt(self, work: TeamWork, i: int, aux: Metrics) -> Metrics:
        """Do what belongs to agent i's step beside its loss; return further metrics."""
        return {}

    @torch.no_grad()
    def show_stage(self, work: TeamWork, i: int) -> Update:
        """Let the others' losses see what agent i does now; where one network acts for all, what all do."""
        for k in range(self.members.count) if self.members.shared else [i]:
            noise = self.nets.cut(work.noise[-1], k)[1]
            own = self.per_run(partial(self.own_sample, k))(self.actors[k].params, work.seen[k], noise)
            if work.alive is not None:
                own = own * work.alive[..., k : k + 1]
            self.nets.cut(work.actions, k)[1].copy_(own)
        return Update({})

    def q(self, obs: Obs, action: Tensor) -> Tensor:
        acts = zip(self.nets.own, self.members.acts(action), strict=True)
        vector = torch.cat([own.encode(done) for own, done in acts], -1)
        values: Tensor = self.critic.module(self.critic_sees(obs), self.nets.tile(vector))
        return values if self.nets.rows == 1 else values.unflatten(-1, (-1, self.nets.rows)).mean(-1)  # type: ignore[no-untyped-call]


def _has_own_states(spec: EnvSpec) -> bool:
    """Return whether every agent has a state of its own.

    Raises:
        RloptError: some parts of the state are everybody's, others each agent's.
    """
    leaves = {key: leaf for key, leaf in obs_leaves(spec.observation_space).items() if is_state(key)}
    kinds = {len(shape_of(leaf)) == 2 for leaf in leaves.values()}
    if len(kinds) > 1:
        raise RloptError(f"{spec.id}: some leaves of its state are (S,), others (n, S); a joint critic reads one kind")
    return kinds == {True}
