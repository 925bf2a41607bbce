"""Value factorisation for teams with discrete actions: QMIX (Rashid et al. 2018, arXiv 1803.11485; 2020, JMLR 21), VDN
(Sunehag et al. 2017, arXiv 1706.05296) and IQL (Tan 1993); the code read beside them is uoe-agents/epymarl @cbc38c0.

Every agent has a deep Q-network of what it sees. In VDN and QMIX one value of the team is made of theirs, and learns
from the team's reward: their sum, or a network whose weights come from the state and are never negative. Since the
team's value then rises with each agent's, the best joint action is everybody's own best one, and agents can act alone.
In IQL each learns from the reward by itself. With one agent IQL is DQN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rlopt import joint
from rlopt.agents.dqn import DQN, DQNConfig
from rlopt.agents.sequences import Course, Memories, mean_of_rows, observations, priorities, recall, rows
from rlopt.agents.td import TDLoss
from rlopt.agents.teams.members import ActingTeam, Members, rows_of
from rlopt.buffers import Batch
from rlopt.nn import Net, NetworkConfig, OptimiserConfig, Params, QActor
from rlopt.nn.encoders import encoder_of, features_of
from rlopt.types import Act, Carry, Metrics, Obs, RloptError, Space, map_obs, option

MIXERS = ("none", "sum", "monotone")
CARRY_NAME = "critic"
"""Of what the agents' networks remember, where they do."""


@dataclass(frozen=True, kw_only=True)
class QMIXConfig(DQNConfig):
    """Options of IQL, VDN and QMIX; the defaults are EPyMARL's where it has them, in environment steps."""

    mixer: str = option(
        "monotone",
        "how the team's value is made of its agents': none (IQL), sum (VDN), monotone (QMIX)",
        choices=MIXERS,
    )
    mixing_units: int = option(32, "units of the mixing network", low=1, needs={"mixer": ("monotone",)})
    hyper_units: int = option(64, "hidden units of what makes its weights", low=1, needs={"mixer": ("monotone",)})
    share_parameters: bool = option(True, "one network acts for all agents, which is told who it is")
    team_reward: bool = option(
        True, "each learns from the sum of all rewards, else from its own", needs={"mixer": ("none",)}
    )
    double: bool = option(True, "the network chooses the next action, its target only values it")
    warmup_steps: int = option(1_000, "environment steps with uniformly random actions", low=0)
    learning_rate: float = option(5e-4, "learning rate", above=0.0)
    epsilon_end: float = option(0.05, "fraction of random actions in the end", low=0.0, high=1.0)
    evaluation_epsilon: float = option(0.0, "fraction of random actions in evaluations", low=0.0, high=1.0)
    target_every: int = option(200, "after how many of target_counts the target is copied", low=1)
    target_counts: str = option("updates", "what target_every counts", choices=("env_steps", "updates"))
    optimiser: OptimiserConfig = option(OptimiserConfig, "optimiser of all networks together")
    max_grad_norm: float | None = option(
        10.0, "clip the gradient of all networks to this norm (null: never)", above=0.0
    )
    network: NetworkConfig = option(lambda: NetworkConfig(hidden=(64, 64)), "shape of every agent's network")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.values != "scalar" or self.noisy is not None:
            raise RloptError("agent.values and agent.noisy: values of teams are numbers, of networks without noise")

    @property
    def auto_td_loss(self) -> str | None:
        return "squared"


class Mixer(nn.Module):
    """The team's value Q_tot(s, q) of its agents' values q (QMIX, figure 2): two layers whose weights are made of the
    state by networks of two layers, and are made positive; biases are free.

    Args:
        space: of the state.
        agents: n.
        units: of the mixing network.
        hyper: hidden units of the networks that make its weights.
    """

    def __init__(self, space: Space, agents: int, units: int, hyper: int) -> None:
        super().__init__()
        self.encoder = encoder_of(space, NetworkConfig())
        size = features_of(self.encoder)
        self.agents, self.units = agents, units

        def made(outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(size, hyper), nn.ReLU(), nn.Linear(hyper, outputs))

        self.first, self.second = made(agents * units), made(units)
        self.bias = nn.Linear(size, units)
        self.value = nn.Sequential(nn.Linear(size, units), nn.ReLU(), nn.Linear(units, 1))

    def forward(self, q: Tensor, state: Obs) -> Tensor:
        """Return Q_tot (…, B) of the agents' values (…, B, n)."""
        s = self.encoder(state)
        first = self.first(s).abs().unflatten(-1, (self.agents, self.units))
        hidden = F.elu((q.unsqueeze(-2) @ first).squeeze(-2) + self.bias(s))
        return ((hidden * self.second(s).abs()).sum(-1, keepdim=True) + self.value(s)).squeeze(-1)  # type: ignore[no-any-return]


Seen = tuple[Obs | Course, ...]
"""What each network sees (``Members.rows``)."""


class TeamValues(nn.Module):
    """Every agent's values, and the mixer where there is one: all that one optimiser moves.

    Args:
        actors: a network of each agent, or the one that all share.
        count: n.
        shared: whether they share it.
    """

    def __init__(self, actors: Sequence[QActor], count: int, shared: bool, mixer: Mixer | None) -> None:
        super().__init__()
        self.actors, self.count, self.shared, self.mixer = nn.ModuleList(actors), count, shared, mixer

    def forward(self, seen: Seen, mixed: tuple[Tensor, Obs] | None = None, carry: Carry = None) -> Any:
        """Return the values of each agent's actions, a list of (…, B, K_i), of a shared network (…, n, B, K); of
        ``mixed``, the chosen values (…, B, n) and the state, the team's value (…, B).

        Of courses they are those of every step. With the ``carry`` of a memory, ``memory`` (…, B, n, H), a single step
        is seen, and the next carry returned too.
        """
        if mixed is not None:
            assert self.mixer is not None
            return self.mixer(*mixed)
        if carry is not None:
            return self._step(seen, carry["memory"])
        pairs = zip(self.actors, seen, strict=True)
        found = [
            recall(actor, own, CARRY_NAME)[0] if isinstance(own, Course) else actor(own)[0] for actor, own in pairs
        ]
        return found[0].unflatten(-2, (self.count, -1)) if self.shared else found

    def _step(self, seen: Seen, memory: Tensor) -> Any:
        if self.shared:
            before = {"memory": memory.transpose(-3, -2).flatten(-3, -2)}
            (values, _), after = self.actors[0](seen[0], carry=before)
            last = after["memory"].unflatten(-2, (self.count, -1)).transpose(-3, -2)
            return values.unflatten(-2, (self.count, -1)), {"memory": last}
        triples = zip(self.actors, seen, memory.unbind(-2), strict=True)
        found = [actor(own, carry={"memory": before}) for actor, own, before in triples]
        return [each[0][0] for each in found], {"memory": torch.stack([each[1]["memory"] for each in found], -2)}

    def initial_carry(self, rows: int) -> Carry:
        """Return the carry with which ``rows`` episodes begin; None without a memory."""
        first: Any = self.actors[0]
        carry = first.initial_carry(rows * self.count)
        return None if carry is None else {"memory": carry["memory"].unflatten(0, (rows, self.count))}


class TeamRows(NamedTuple):
    """A minibatch of B transitions of n agents; of several runs with a leading axis R, (…)."""

    seen: Seen
    seen_next: Seen
    state: Obs
    """(…, B, …) what the mixer sees; nothing without one."""
    state_next: Obs
    action: Tensor
    """(…, B, n) int64, from 0."""
    reward: Tensor
    """(…, B, n), or (…, B) the team's."""
    terminated: Tensor
    """(…, B, n), also where an agent is dead afterwards, or (…, B) of the team."""
    discount: Tensor
    """(…, B)."""
    weight: Tensor | None
    """(…, B, n) or (…, B)."""
    alive: Tensor | None
    """(…, B, n) 1 where an agent acts; None where all always do."""
    alive_next: Tensor | None
    mask: Tensor | None = None
    """Of slices, whose steps are the rows: (…, B, L) 1 where a step counts."""


class Work(NamedTuple):
    """What the stages of one update read."""

    batch: TeamRows
    noise: tuple[()] = ()


class Nets(NamedTuple):
    """The functions the loss is made of."""

    q: Net
    target: Net
    mixer: str


def loss(
    nets: Nets, params: Params, target: Params, batch: TeamRows, noise: Any, double: bool, td: TDLoss
) -> tuple[Tensor, Metrics]:
    """Return the loss of the team's value (QMIX, eq. 6): between Q_tot(s, Q₁(o₁, a₁) … Qₙ(oₙ, aₙ)) and
    y = r + γᵏ (1 - terminated) Q̄_tot(s', Q̄₁(o₁', a₁') …), aᵢ' = argmax_a Qᵢ(oᵢ', a) (of the target unless ``double``);
    without a mixer of each agent's Qᵢ by itself, and their sum over the agents. The dead count 0.

    Metrics include ``td`` (…, B), the size of each error (of independent agents the mean over the living), 0 where
    nobody lives. Everything may have a leading run axis, where ``td`` has it too.
    """
    apart = nets.mixer == "none"
    with torch.no_grad():
        after = nets.target(target, batch.seen_next)
        best = greedy(nets.q(params, batch.seen_next) if double else after)
        next_q = living(taken(after, best), batch.alive_next)
        next_value = mix(nets.target, target, nets.mixer, next_q, batch.state_next)
        discount = batch.discount.unsqueeze(-1) if apart else batch.discount
        # A time limit is no end (``terminated`` is 0 there): the value goes on beyond it.
        y = batch.reward + discount * (1.0 - batch.terminated) * next_value
    chosen = living(taken(nets.q(params, batch.seen), batch.action), batch.alive)
    error = mix(nets.q, params, nets.mixer, chosen, batch.state) - y
    size, own = error.detach().abs(), chosen.detach().mean(-1)
    if batch.alive is not None:
        counts = batch.alive if apart else batch.alive.amax(-1)
        size = (size * counts).sum(-1) / counts.sum(-1).clamp(min=1.0) if apart else size * counts
    elif apart:
        size = size.mean(-1)
    metrics = {
        "q": chosen.detach().flatten(-2).mean(-1) if batch.mask is None else mean_of_rows(own, batch.mask),
        "td": priorities(size, batch.mask),
    }
    if not apart:
        return td(error, batch.weight), metrics
    return td(error.mT, None if batch.weight is None else batch.weight.mT), metrics


def greedy(values: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the best action (…, B, n) of each agent, by the values that ``TeamValues`` gives."""
    return values.argmax(-1).mT if isinstance(values, Tensor) else torch.stack([q.argmax(-1) for q in values], -1)


def taken(values: Tensor | Sequence[Tensor], action: Tensor) -> Tensor:
    """Return the values (…, B, n) of what each agent does, from those of all its actions."""
    if isinstance(values, Tensor):
        return values.gather(-1, action.mT.unsqueeze(-1)).squeeze(-1).mT
    pairs = zip(values, action.unbind(-1), strict=True)
    return torch.stack([q.gather(-1, a.unsqueeze(-1)).squeeze(-1) for q, a in pairs], -1)


def living(q: Tensor, alive: Tensor | None) -> Tensor:
    """Return values (…, B, n), 0 of the dead (whose actions may all be impossible)."""
    return q if alive is None else torch.where(alive > 0, q, 0.0)


def mix(net: Net, params: Params, mixer: str, q: Tensor, state: Obs) -> Tensor:
    """Return the team's value (…, B) of its agents' (…, B, n); those themselves without a mixer."""
    if mixer == "none":
        return q
    return q.sum(-1) if mixer == "sum" else net(params, (), (q, state))


class QMIX(ActingTeam, DQN):
    """IQL, VDN and QMIX for teams in Discrete action spaces.

    With ``network.memory`` every agent remembers its episode, as DQN does.
    """

    name: ClassVar[str] = "qmix"
    config_class = QMIXConfig
    config: QMIXConfig

    def build(self) -> None:
        c, spec = self.config, self.spec
        if not spec.agents and c.mixer != "none":
            raise RloptError(
                f"agent.mixer={c.mixer}: {spec.id} has one agent, so there is nothing to mix; use agent=dqn"
            )
        if not c.share_parameters and not spec.agents:
            raise RloptError(f"agent.share_parameters=false has no effect: {spec.id} has one agent; leave it out")
        if not c.team_reward and not spec.reward_shape:
            raise RloptError(f"agent.team_reward=false: {spec.id} pays its agents one reward together; leave it out")
        self.members = members = Members(spec, c.share_parameters)
        options, own = c.network_options(), members.specs[:1] if members.shared else members.specs

        def make() -> TeamValues:
            mixer = None
            actors = [QActor(one.observation_space, one.action_space, options) for one in own]
            if c.mixer == "monotone":
                mixer = Mixer(joint.critic_space(spec), members.count, c.mixing_units, c.hyper_units)
            return TeamValues(actors, members.count, members.shared, mixer)

        self.actor = self.critic = self.net("critic", make)
        self.critic_optimiser = self.add_optimiser("critic_optimiser", self.critic, c.learning_rate)
        self.target = self.persist("target", self.critic.target())
        modules: list[Any] = self.critic.modules
        self.teams = [members.team(list(module.actors)) for module in modules]
        self.explorers: list[list[Any]] = [list(module.actors) for module in modules]
        starts = [int(getattr(one.action_space, "start", 0)) for one in members.specs]
        self.starts = torch.tensor(starts, device=self.device)
        if c.network.memory != "none":
            self.memories = Memories(self, {CARRY_NAME: self.critic})
        self.lie_beside(self.critic)
        self.loss = partial(loss, Nets(self.critic, self.target, c.mixer), double=c.double, td=self.td_loss())
        self.begin()

    @torch.no_grad()
    def act(self, obs: Obs, carry: Carry = None, deterministic: bool = False) -> Act:
        random = self.begin_act(obs, deterministic)
        if random and self.memories is None:
            return Act(self.uniform(obs), carry)
        values, carry = self.answer(obs, carry)  # in the warm-up too: what is remembered is stored from then on
        return Act(self.uniform(obs) if random else self.choose(values, rows_of(obs), deterministic), carry)

    def answer(self, obs: Obs, carry: Carry) -> tuple[Any, Carry]:
        """Return the values of joint observations (R·N, …), as ``TeamValues`` gives them, and the next carry."""
        net, remembers = self.critic, self.memories is not None
        if remembers and carry is None:
            raise RloptError("an agent with a memory needs its carry; an episode begins with initial_carry(rows)")
        before = {"memory": carry[CARRY_NAME]} if remembers and carry is not None else {}

        def see(params: Params, part: Obs, old: dict[str, Tensor]) -> Any:
            return net(params, self.members.rows(part), None, old or None)

        if self.runs > 1:
            obs, before = tree_map(lambda x: x.view(self.runs, -1, *x.shape[1:]), (obs, before))
        found = (see if self.runs == 1 or self.beside else torch.vmap(see))(net.params, obs, before)
        if not remembers:
            return found, carry
        after = found[1]["memory"]
        return found[0], {CARRY_NAME: after if self.runs == 1 else after.flatten(0, 1)}

    def choose(self, values: Any, rows: int, deterministic: bool) -> Tensor:
        """Return joint actions (R·N, n): the best ones, or explored, with noise from each run's stream."""
        each, n, epsilon = rows // self.runs, self.members.count, self.config.epsilon(self.clock)
        noise: list[Tensor | None] = [None] * len(self.explorers[0])
        if not deterministic:
            size = each * n if self.members.shared else each
            drawn = [
                [actor.noise(size, stream, epsilon) for actor in own]
                for own, stream in zip(self.explorers, self.act_generators, strict=True)
            ]
            noise = [by_run[0] if self.runs == 1 else torch.stack(by_run) for by_run in zip(*drawn, strict=True)]
        if self.members.shared:  # drawn for one row's agents after the other
            noise = [None if x is None else x.view(*x.shape[:-2], each, n, 2).transpose(-3, -2) for x in noise]
            values = [values]
        pairs = zip(self.explorers[0], values, noise, strict=True)
        actions = [actor.choose((q, None), x) for actor, q, x in pairs]
        joined = actions[0].mT if self.members.shared else actions[0]
        if self.spec.agents and not self.members.shared:
            joined = joint.join_actions(self.spec, actions)
        found: Tensor = joined if self.runs == 1 else joined.flatten(0, 1)
        return found

    def q(self, obs: Obs, action: Tensor) -> Tensor:
        """Return the values (n, N) that the agents give to joint actions (N, n)."""
        if self.memories is not None:
            raise RloptError(f"agent={self.name} remembers: its values depend on more than these observations")
        values = self.critic.module(self.members.rows(obs))
        return taken(values, torch.stack(self.members.acts(action), -1) - self.starts).T

    def learning(self, work: Any) -> Tensor | None:
        batch: TeamRows = work.batch
        if batch.alive is None or batch.weight is None:
            return None
        counts = batch.weight if self.config.mixer == "none" else batch.alive * batch.weight.unsqueeze(-1)
        lives = counts.amax(-2) > 0.0  # (…, n)
        anybody = lives.any(-1, True)
        if self.members.shared:
            return anybody.squeeze(-1)
        module: Any = self.critic.module
        sizes = [sum(p.numel() for p in actor.parameters()) for actor in module.actors]
        parts = zip(
            [*torch.split(lives, 1, -1), anybody], [*sizes, self.critic.flat.shape[-1] - sum(sizes)], strict=True
        )
        return torch.cat([one.expand(*one.shape[:-1], size) for one, size in parts], -1)  # the mixer's are the last

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Any:
        spec, c = self.spec, self.config
        action = torch.stack(self.members.acts(batch.action), -1) - self.starts
        each = c.mixer == "none"
        apart = bool(spec.reward_shape) and not c.team_reward
        reward = batch.reward if apart else joint.team_reward(spec, batch.reward)
        batch = self.by_run(batch._replace(action=action, reward=reward))
        here, there = batch.obs, batch.next_obs
        if batch.mask is not None:  # the steps of all slices are rows
            axis = batch.mask.dim() - 2
            here, there = (map_obs(lambda x: x.flatten(axis, axis + 1), obs) for obs in (here, there))
        batch = rows(batch)
        alive, alive_next = joint.alive(spec, here), joint.alive(spec, there)
        reward, terminated, weight = batch.reward, batch.terminated, batch.weight
        if each:
            reward = reward if apart else reward.unsqueeze(-1).expand(batch.action.shape)
            terminated = terminated.unsqueeze(-1).expand(batch.action.shape)
            weight = None if weight is None else weight.unsqueeze(-1).expand(batch.action.shape)
        if alive is not None and alive_next is not None:
            alive, alive_next = alive.to(reward.dtype), alive_next.to(reward.dtype)
            acts, lives = (alive, alive_next) if each else (alive.amax(-1), alive_next.amax(-1))
            terminated = torch.maximum(terminated, 1.0 - lives)
            weight = acts if weight is None else weight * acts
        nothing: Obs = {}
        state, state_next = nothing, nothing
        if c.mixer == "monotone":
            state, state_next = joint.critic_obs(spec, here), joint.critic_obs(spec, there)
        found = TeamRows(
            self.members.rows(batch.obs), self.members.rows(batch.next_obs), state, state_next, batch.action, reward,
            terminated, batch.discount, weight, alive, alive_next, batch.mask,
        )  # fmt: skip
        return Work(found)

    def watch(self, work: Any) -> None:
        batch: TeamRows = work.batch
        self.open_update()
        for word, seen in (("observation", batch.seen), ("next observation", batch.seen_next)):
            for i, own in enumerate(seen):
                name = word if self.members.shared else self.members.metric(word, i)
                self.guard.passes(name, observations(own))
        if batch.state != {}:
            self.guard.passes("state", batch.state)
            self.guard.passes("next state", batch.state_next)
        self.guard.passes("reward", batch.reward)
