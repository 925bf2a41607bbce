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

from rlopt import joint
from rlopt.agents.dqn import DQN, DQNConfig
from rlopt.agents.td import TDLoss
from rlopt.agents.teams.members import ActingTeam, Members
from rlopt.buffers import Batch
from rlopt.nn import Net, NetworkConfig, OptimiserConfig, Params, QActor
from rlopt.nn.encoders import encoder_of, features_of
from rlopt.types import Act, Carry, Metrics, Obs, RloptError, Space, option

MIXERS = ("none", "sum", "monotone")


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
        """Return Q_tot (B,) of the agents' values (B, n)."""
        s = self.encoder(state)
        first = self.first(s).abs().view(-1, self.agents, self.units)
        hidden = F.elu((q.unsqueeze(-2) @ first).squeeze(-2) + self.bias(s))
        return ((hidden * self.second(s).abs()).sum(-1, keepdim=True) + self.value(s)).squeeze(-1)  # type: ignore[no-any-return]


class TeamValues(nn.Module):
    """Every agent's values, and the mixer where there is one: all that one optimiser moves."""

    def __init__(self, actors: Sequence[QActor], count: int, mixer: Mixer | None) -> None:
        super().__init__()
        self.actors, self.count, self.mixer = nn.ModuleList(actors), count, mixer

    def forward(self, seen: Sequence[Obs], mixed: tuple[Tensor, Obs] | None = None) -> Any:
        """Return the values (B, K_i) of each agent's actions; of ``mixed``, the chosen values (B, n) and the state,
        the team's value (B,)."""
        if mixed is not None:
            assert self.mixer is not None
            return self.mixer(*mixed)
        if len(self.actors) == self.count:
            return [actor(own)[0] for actor, own in zip(self.actors, seen, strict=True)]
        first = seen[0]
        assert isinstance(first, dict)
        rows: Obs = {key: torch.cat([own[key] for own in seen]) for key in first}  # type: ignore[index]
        return self.actors[0](rows)[0].chunk(self.count)


class TeamRows(NamedTuple):
    """A minibatch of B transitions of n agents."""

    seen: tuple[Obs, ...]
    """(B, …) of each agent."""
    seen_next: tuple[Obs, ...]
    state: Obs
    """(B, …) what the mixer sees; nothing without one."""
    state_next: Obs
    action: Tensor
    """(B, n) int64, from 0."""
    reward: Tensor
    """(B, n), or (B,) the team's."""
    terminated: Tensor
    """(B, n), also where an agent is dead afterwards, or (B,) of the team."""
    discount: Tensor
    """(B,)."""
    weight: Tensor | None
    """(B, n) or (B,)."""
    alive: Tensor | None
    """(B, n) 1 where an agent acts; None where all always do."""
    alive_next: Tensor | None


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

    Metrics include ``td`` (B,), the size of each error (of independent agents the mean).
    """
    with torch.no_grad():
        after = nets.target(target, batch.seen_next)
        chooses = nets.q(params, batch.seen_next) if double else after
        best = [values.argmax(-1) for values in chooses]
        next_q = living(taken(after, best), batch.alive_next)
        next_value = mix(nets.target, target, nets.mixer, next_q, batch.state_next)
        discount = batch.discount if batch.terminated.dim() == 1 else batch.discount.unsqueeze(-1)
        # A time limit is no end (``terminated`` is 0 there): the value goes on beyond it.
        y = batch.reward + discount * (1.0 - batch.terminated) * next_value
    chosen = living(taken(nets.q(params, batch.seen), batch.action.unbind(-1)), batch.alive)
    error = mix(nets.q, params, nets.mixer, chosen, batch.state) - y
    size = error.detach().abs()
    metrics = {"q": chosen.detach().mean(), "td": size if size.dim() == 1 else size.mean(-1)}
    if error.dim() == 1:
        return td(error, batch.weight), metrics
    return td(error.T, None if batch.weight is None else batch.weight.T), metrics


def taken(values: Sequence[Tensor], action: Sequence[Tensor]) -> Tensor:
    """Return the values (B, n) of what each agent does, (B,), from those of all its actions, (B, K_i)."""
    pairs = zip(values, action, strict=True)
    return torch.stack([q.gather(-1, a.unsqueeze(-1)).squeeze(-1) for q, a in pairs], -1)


def living(q: Tensor, alive: Tensor | None) -> Tensor:
    """Return values (B, n), 0 of the dead (whose actions may all be impossible)."""
    return q if alive is None else torch.where(alive > 0, q, 0.0)


def mix(net: Net, params: Params, mixer: str, q: Tensor, state: Obs) -> Tensor:
    """Return the team's value (B,) of its agents' (B, n); those themselves without a mixer."""
    if mixer == "none":
        return q
    return q.sum(-1) if mixer == "sum" else net(params, (), (q, state))


class QMIX(ActingTeam, DQN):
    """IQL, VDN and QMIX for teams in Discrete action spaces."""

    name: ClassVar[str] = "qmix"
    supports_memory = False
    config_class = QMIXConfig
    config: QMIXConfig

    def build(self) -> None:
        c, spec = self.config, self.spec
        if not spec.agents and c.mixer != "none":
            raise RloptError(
                f"agent.mixer={c.mixer}: {spec.id} has one agent, so there is nothing to mix; use agent=dqn"
            )
        if not c.team_reward and not spec.reward_shape:
            raise RloptError(f"agent.team_reward=false: {spec.id} pays its agents one reward together; leave it out")
        self.members = members = Members(spec, c.share_parameters)
        options, own = c.network_options(), members.specs[:1] if members.shared else members.specs

        def make() -> TeamValues:
            mixer = None
            actors = [QActor(one.observation_space, one.action_space, options) for one in own]
            if c.mixer == "monotone":
                mixer = Mixer(joint.critic_space(spec), members.count, c.mixing_units, c.hyper_units)
            return TeamValues(actors, members.count, mixer)

        self.actor = self.critic = self.net("critic", make)
        self.critic_optimiser = self.add_optimiser("critic_optimiser", self.critic, c.learning_rate)
        self.target = self.persist("target", self.critic.target())
        modules: list[Any] = self.critic.modules
        self.teams = [members.team(list(module.actors)) for module in modules]
        self.explorers: list[Any] = [actor for module in modules for actor in module.actors]
        starts = [int(getattr(one.action_space, "start", 0)) for one in members.specs]
        self.starts = torch.tensor(starts, device=self.device)
        nets = Nets(self.critic, self.target, c.mixer)
        self.loss = partial(loss, nets, double=c.double, td=c.critic_td_loss())
        self.begin()

    def act(self, obs: Obs, carry: Carry = None, deterministic: bool = False) -> Act:
        epsilon = self.config.epsilon(self.clock)
        for explorer in self.explorers:
            explorer.epsilon = epsilon
        return super().act(obs, carry, deterministic)

    def q(self, obs: Obs, action: Tensor) -> Tensor:
        """Return the values (n, N) that the agents give to joint actions (N, n)."""
        own = self.members.acts(action)
        values = self.critic.module(self.members.seen(obs))
        return taken(values, [a - int(s) for a, s in zip(own, self.starts.tolist(), strict=True)]).T

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Any:
        spec, c = self.spec, self.config
        action = torch.stack(self.members.acts(batch.action), -1) - self.starts
        apart = bool(spec.reward_shape) and not c.team_reward
        reward = batch.reward if apart else joint.team_reward(spec, batch.reward)
        batch = self.by_run(batch._replace(action=action, reward=reward))
        alive, alive_next = joint.alive(spec, batch.obs), joint.alive(spec, batch.next_obs)
        terminated, weight = batch.terminated, batch.weight
        each = c.mixer == "none"
        if each:
            reward = batch.reward if apart else batch.reward.unsqueeze(-1).expand(batch.action.shape)
            terminated = terminated.unsqueeze(-1).expand(batch.action.shape)
            weight = None if weight is None else weight.unsqueeze(-1).expand(batch.action.shape)
        else:
            reward = batch.reward
        if alive is not None and alive_next is not None:
            alive, alive_next = alive.to(reward.dtype), alive_next.to(reward.dtype)
            acts, lives = (alive, alive_next) if each else (alive.amax(-1), alive_next.amax(-1))
            terminated = torch.maximum(terminated, 1.0 - lives)
            weight = acts if weight is None else weight * acts
        nothing: Obs = {}
        state, state_next = nothing, nothing
        if c.mixer == "monotone":
            state, state_next = (joint.critic_obs(spec, obs) for obs in (batch.obs, batch.next_obs))
        rows = TeamRows(
            self.members.seen(batch.obs), self.members.seen(batch.next_obs), state, state_next, batch.action, reward,
            terminated, batch.discount, weight, alive, alive_next,
        )  # fmt: skip
        return Work(rows)

    def watch(self, work: Any) -> None:
        batch: TeamRows = work.batch
        self.open_update()
        for word, each in (("observation", batch.seen), ("next observation", batch.seen_next)):
            for i, seen in enumerate(each):
                self.guard.passes(self.members.metric(word, i), seen)
        if batch.state != {}:
            self.guard.passes("state", batch.state)
            self.guard.passes("next state", batch.state_next)
        self.guard.passes("reward", batch.reward)
