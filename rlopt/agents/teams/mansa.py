"""MANSA: learn where to centralise (Mguni et al. 2023, "MANSA: Learning Fast and Slow in Multi-Agent Systems", ICML,
PMLR 202:24631, arXiv 2302.05910). A reconstruction: no code was published.

Verified, from the abstract: independent learners and a centralised one share a team, and a further agent, Global,
decides by switching controls at which states the centralised one acts; a budget of such calls is possible; claimed are
central calls in 1 % of steps on level-based foraging, 40 % fewer on SMAC, and better returns than independent learning.

Reconstructed, not verified: Global is paid r - c g, g = 1 where it calls, while both learners see r alone; with a
budget of n calls the remaining number is a part of its state.

Choices taken here, to be checked one by one by whoever has the paper:

1. Global is a double DQN with the choices 0 and 1, of the state that critics see. It calls where Q(s, 1) > Q(s, 0),
   the threshold form of v = max(M v, value of going on independently) (tables: ``rlopt.agents.teams.switch_tables``).
2. The budget is a hard mask: with no call left g = 0. The remaining share is an input.
3. The independent learner draws every transition, as it learns off policy (``independent_learns=own``: those of its
   own steps); the centralised one those of its own calls (``centralised_learns=everything``: all). Global learns from
   the independent one's minibatches, or where these are of its own steps alone from minibatches of all.
4. A cost is due at every central step (``cost_of=switch_on``: only where the step before was independent).
5. In training Global explores ε-greedily, and each learner as it does alone.
6. A call is a central step in acting: the fact ``calls`` of each episode, in training and in evaluation. What the
   centralised learner costs in training is the fact ``central_updates``: its updates, shared among the environments.
7. Evaluations and exported policies use Global, which needs the state. Beside it a rule is distilled by which each
   agent predicts Global's greedy choice from its own observation (cross-entropy, on the independent learner's
   minibatches): then each agent switches for itself, calls are the mean over the agents, and a budget is each one's
   own. Evaluations report it as the facts ``distilled/…``; ``policy.of_agent`` acts by it.
8. Learners with a memory both see every step; the centralised one learns from slices that begin with a call, of which
   its own calls count.

Controls behind the same switch are ``rule=independent | centralised | random | fixed``: whether it matters *where*
calls are made shows beside ``random`` at the same rate.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

import torch
from gymnasium import spaces
from torch import Tensor
from torch.utils._pytree import tree_map

from rlopt import joint
from rlopt.agents.base import Agent, ReplayAgentConfig
from rlopt.agents.dqn import DQN, DQNConfig
from rlopt.agents.sequences import priorities, steps
from rlopt.agents.teams.members import Members
from rlopt.buffers import Batch
from rlopt.buffers.samplers.sequence import CARRY
from rlopt.config import build, over
from rlopt.nn import CategoricalActor, Net, NetworkConfig, Params, network_options
from rlopt.policy import EvaluationMode, Policy
from rlopt.policy.switching import RULES, SwitchingActor, rule_spec, switch_obs, switch_space
from rlopt.policy.switching_apart import carry_as, carry_of
from rlopt.policy.team import TeamActor
from rlopt.registry import agent_presets, get_agent
from rlopt.types import Act, Carry, EnvSpec, Metrics, Obs, RloptError, Update, option

SHARED = ("gamma", "reward", "batch_size", "n_step", "update_ratio", "warmup_steps", "learning_starts")
"""Options of both learners and of Global, given once."""
LEARNERS = ("independent", "centralised")
GLOBAL = {"rule": ("global",)}
CALLING = {"rule": tuple(rule for rule in RULES if rule != "independent")}


@dataclass(frozen=True, kw_only=True)
class MANSAConfig(DQNConfig):
    """Options of MANSA: what the three learners share, Global's own, and the two learners' by name."""

    independent: dict[str, Any] = option(
        lambda: {"name": "iql"}, "the independent learner, an agent's name and its own options"
    )
    centralised: dict[str, Any] = option(
        lambda: {"name": "qmix"}, "the centralised learner, an agent's name and its own options"
    )
    rule: str = option("global", "who decides: global (learnt), or a control that learns no switch", choices=RULES)
    cost: float = option(0.1, "c, what a central step costs Global, in rewards", low=0.0, needs=GLOBAL)
    cost_of: str = option(
        "step", "whether every central step costs, or those before which was none", choices=("step", "switch_on"),
        needs=GLOBAL,
    )  # fmt: skip
    budget: int | None = option(None, "central steps per episode at most (null: no limit)", low=0, needs=CALLING)
    rate: float = option(0.5, "share of central steps", low=0.0, high=1.0, needs={"rule": ("random",)})
    rates: tuple[float, ...] | None = option(
        None, "of each of num_runs runs its own share (null: rate)", above=0.0, high=1.0, needs={"rule": ("random",)}
    )  # above 0: all runs update together, so one without a call would keep every centralised learner waiting
    every: int = option(10, "steps from one central step to the next", low=1, needs={"rule": ("fixed",)})
    independent_learns: str = option(
        "everything", "what the independent learner draws: everything, or its own steps", choices=("everything", "own")
    )
    centralised_learns: str = option(
        "calls", "what the centralised learner draws: its own steps, or everything", choices=("calls", "everything"),
        needs=CALLING,
    )  # fmt: skip
    batch_size: int = option(32, "transitions per update of each learner", low=1)
    double: bool = option(True, "Global's network chooses the next action, its target only values it")
    warmup_steps: int = option(1_000, "environment steps with uniformly random actions and calls", low=0)
    learning_rate: float = option(5e-4, "Global's learning rate", above=0.0)
    epsilon_end: float = option(0.05, "fraction of Global's random choices in the end", low=0.0, high=1.0)
    evaluation_epsilon: float = option(0.0, "fraction of random actions in evaluations", low=0.0, high=1.0)
    target_every: int = option(200, "after how many of target_counts Global's target is copied", low=1)
    target_counts: str = option("updates", "what target_every counts", choices=("env_steps", "updates"))
    network: NetworkConfig = option(lambda: NetworkConfig(hidden=(64, 64)), "shape of Global's network")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_step != 1:
            raise RloptError("agent.n_step: the switch may change between steps, so each is learnt alone; leave it out")


def distilled_loss(
    net: Net, params: Params, seen: Obs, wanted: Tensor, weight: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean cross-entropy () between what each agent predicts, from ``seen`` (n·B, …), and Global's choice
    ``wanted`` (B,), and the share of predictions that are right. Everything may have a leading run axis."""
    log_pi = net(params, seen).log_softmax(-1)
    n = log_pi.shape[-2] // wanted.shape[-1]

    def of_each(x: Tensor) -> Tensor:
        return x.unsqueeze(-2).expand(*x.shape[:-1], n, x.shape[-1]).flatten(-2)

    target = of_each(wanted)
    error = -log_pi.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    right = (log_pi.detach().argmax(-1) == target).float().mean(-1)
    return (error if weight is None else error * of_each(weight)).mean(-1), {"distilled/right": right}


class MANSA(Agent):
    """An independent and a centralised learner of one team, and Global, which decides who acts."""

    name: ClassVar[str] = "mansa"
    supports_teams = True
    supports_runs = True
    config_class = MANSAConfig
    learner: ClassVar[type[DQN]] = DQN
    """Of Global."""
    config: MANSAConfig

    def build(self) -> None:
        c, spec = self.config, self.spec
        if not spec.agents:
            raise RloptError(f"{spec.id} has one agent, so there is nothing to centralise; use agent=dqn")
        self.evaluation_mode = EvaluationMode(True, c.evaluation_epsilon)
        learners: dict[str, Any] = {name: self.make_learner(name) for name in LEARNERS}
        self.learners = learners
        self.switch: DQN | None = None
        costs_on = c.cost_of == "switch_on"
        apart: Any = [None] * self.runs
        networks: Any = apart
        if c.rule == "global":
            own = {f.name: getattr(c, f.name) for f in fields(DQNConfig)}
            seen = EnvSpec(f"{spec.id}/switch", switch_space(spec, c.budget, costs_on), spaces.Discrete(2))
            self.switch = self.child("switch", self.learner, DQNConfig(**{**own, "name": "dqn"}), seen)
            networks, apart = self.switch.actor.modules, self.make_rule()
        pairs = zip(*(each.policies for each in learners.values()), strict=True)
        options = {"rule": c.rule, "budget": c.budget, "every": c.every, "on": costs_on}
        self.actors = [
            SwitchingActor(spec, one.actor, other.actor, networks[r], {**options, "rate": self.rate_of(r)}, apart[r])
            for r, (one, other) in enumerate(pairs)
        ]
        """Of every run."""
        self.actor = self.actors[0]
        self.used = (c.rule,) if c.rule in LEARNERS and c.budget is None else LEARNERS
        """Who ever acts, and so learns."""
        own_steps = c.independent_learns == "own"
        masks = {
            "independent": "alone" if own_steps else None,  # a mask is where a bool is true
            "centralised": "switch" if c.centralised_learns == "calls" else None,
        }
        self.draws = {name: mask for name, mask in masks.items() if name in self.used}
        self.extra_fields = {"switch": ((), torch.bool)}
        if own_steps:
            self.extra_fields["alone"] = ((), torch.bool)
            if self.switch is not None:
                self.draws["switch"] = None
        if c.budget is not None:
            self.extra_fields["remaining"] = ((), torch.float32)
        if costs_on:
            self.extra_fields["on"] = ((), torch.bool)
        for name in self.used:
            own_fields = self.learners[name].extra_fields
            self.extra_fields |= {f"{CARRY}{name}/{k.removeprefix(CARRY)}": kind for k, kind in own_fields.items()}
        self.untold = self.persist("untold", torch.zeros((), dtype=torch.int64))
        """Updates of the centralised learner since the latest step."""

    def rate_of(self, run: int) -> float:
        """Return the share of random calls of a run.

        Raises:
            RloptError: there is not one of each.
        """
        rates = self.config.rates
        if rates is not None and len(rates) != self.runs:
            raise RloptError(f"agent.rates has {len(rates)} shares for num_runs={self.runs}; give one of each run")
        return self.config.rate if rates is None else rates[run]

    def make_rule(self) -> list[TeamActor]:
        """Make the network by which each agent predicts when Global calls; return it as an actor of every run."""
        spec = rule_spec(self.spec)
        self.members = Members(spec, shared=True)
        one, options = self.members.specs[0], network_options(self.config.network)
        self.rule = self.net("distilled", lambda: CategoricalActor(one.observation_space, one.action_space, options))
        self.rule_optimiser = self.add_optimiser("distilled_optimiser", self.rule, self.config.learning_rate)
        self.beside = self.runs > 1 and self.precision == "float32" and self.rule.stacks
        modules: list[Any] = self.rule.modules
        return [TeamActor(spec, [module], shared=True) for module in modules]

    def make_learner(self, name: str) -> Agent:
        """Return the learner that the option ``name`` describes.

        Raises:
            RloptError: there is none, it cannot learn from what others did, or an option is not its own.
        """
        c, where = self.config, f"agent.{name}"
        given = {"name": "iql" if name == "independent" else "qmix", **getattr(c, name)}
        if not isinstance(word := given["name"], str):
            raise RloptError(f"{where}.name: expected the name of an agent, got {word}")
        cls = get_agent(word)
        if cls.loop != "replay" or issubclass(cls, MANSA):
            raise RloptError(
                f"{where}.name={word} learns from its own steps alone, and half of these are another's; choose an "
                "off-policy agent of teams, such as iql, vdn, qmix, isac or masac"
            )
        for key in SHARED:
            if key in given:
                raise RloptError(f"{where}.{key}: all of mansa's learners share it; give agent.{key}")
        shared: dict[str, Any] = {key: getattr(c, key) for key in SHARED}
        options = over(over(agent_presets(word).get("agent", {}), given), shared)
        own = cls.config_class.__dataclass_fields__
        if "epsilon_steps" in own and options.get("epsilon_steps") is None:
            options["epsilon_steps"] = c.epsilon_steps
        if options.get("lr_schedule", "constant") != "constant" and options.get("schedule_steps") is None:
            raise RloptError(f"{where}.lr_schedule needs {where}.schedule_steps here; add it")
        config: ReplayAgentConfig = build(cls.config_class, options, where)
        made: Agent = self.child(name, cls, config)
        if made.draws or any(not field.startswith(CARRY) for field in made.extra_fields):
            raise RloptError(f"{where}.name={word} stores more than transitions, which mansa does not; choose another")
        return made

    @property
    def policy(self) -> Policy:
        return self.policies[0]

    @property
    def policies(self) -> list[Policy]:
        made = [Policy(self.spec, actor) for actor in self.actors]
        for policy in made:
            policy.evaluation_mode = self.evaluation_mode
        return made

    def initial_carry(self, rows: int) -> Carry:
        """Return the switch's part and, where they remember, those of the learners that act (of the agent's networks,
        not those of the policy)."""
        found = self.actor.switch_carry(rows)
        for name in self.used:
            if remembers(self.learners[name]):
                found |= carry_as(name, self.learners[name].initial_carry(rows))
        return found

    @torch.no_grad()
    def act(self, obs: Obs, carry: Carry = None, deterministic: bool = False) -> Act:
        """Return joint actions (N, n, …) of whom the switch says, which both learners and Global explore."""
        if carry is None:
            raise RloptError("a switch needs its carry; an episode begins with initial_carry(rows)")
        actor, clock = self.actor, self.clock
        acted = clock.acted

        def answer(agent: Agent, seen: Obs, own: Carry = None) -> Act:
            clock.acted = acted  # each of them counts what it acts on
            return agent.act(seen, own, deterministic)

        chosen = None if self.switch is None else answer(self.switch, actor.seen(obs, carry)).action
        each = len(carry["switch/time"]) // self.runs
        drawn = [own.draw(each, stream) for own, stream in zip(self.actors, self.act_generators, strict=True)]
        calls = actor.decide(carry, chosen, torch.cat(drawn) if actor.draws else None)  # type: ignore[arg-type]
        found = {name: answer(self.learners[name], obs, carry_of(carry, name)) for name in self.used}
        acts = [one.action for one in found.values()]
        action = acts[0] if len(acts) == 1 else actor.mix(calls, *acts)
        after = actor.count(carry, calls)
        for name, one in found.items():
            after |= carry_as(name, one.carry)
        told = {"switch": calls, "alone": ~calls, "remaining": carry["switch/remaining"], "on": carry["switch/on"] > 0}
        facts = {"calls": after["switch/on"]}
        if not deterministic:
            facts["central_updates"] = torch.full(calls.shape, float(self.untold) / each, device=self.device)
            self.untold.zero_()
        return Act(action, after, {name: told[name] for name in self.extra_fields if name in told}, facts)

    def update(self, batch: dict[str, Batch]) -> Update:
        """Let each learner learn from its own minibatch, and Global and its prediction from the independent one's, or
        from one of their own."""
        metrics: Metrics = {}
        priority: dict[str, Any] = {}

        def note(name: str, done: Update) -> None:
            metrics.update({f"{name}/{word}": value for word, value in done.metrics.items()})
            if name in batch:
                given, drawn = done.priority, batch[name]
                of_steps = isinstance(given, Tensor) and drawn.mask is not None and len(given) != len(drawn.index)
                priority[name] = priorities(given, drawn.mask) if of_steps else given  # type: ignore[arg-type]

        for name in self.used:
            if name in batch:
                note(name, self.learners[name].update(self.own(name, batch[name])))
        if self.switch is not None:
            every = steps(batch["switch" if "switch" in self.draws else "independent"], self.runs)
            seen = self.switch_batch(every)
            note("switch", self.switch.update(seen))
            metrics |= self.distil(every, seen)
        self.untold += "centralised" in batch
        self.end_update()
        return Update(metrics, priority)

    def own(self, name: str, batch: Batch) -> Batch:
        """Return a minibatch as the learner ``name`` takes it: slices where it remembers, in which of a learner of its
        own calls nothing else counts."""
        mask = self.draws[name]
        if batch.mask is not None and mask is not None:
            batch = batch._replace(mask=batch.mask * batch.extras[mask])
        carry = None if batch.carry is None else carry_of(batch.carry, name)
        batch = batch._replace(extras={}, carry=carry)
        return batch if remembers(self.learners[name]) else steps(batch, self.runs)

    def distil(self, batch: Batch, seen: Batch) -> Metrics:
        """Do one update of the rule by which each agent predicts what Global, which saw ``seen``, does."""
        assert self.switch is not None
        wanted = self.switch.act(seen.obs, None, deterministic=True).action
        obs, weight = batch.obs, batch.weight
        if self.runs > 1:
            obs, wanted, weight = tree_map(
                lambda x: None if x is None else x.view(self.runs, -1, *x.shape[1:]), (obs, wanted, weight)
            )
        rows: Any = self.members.rows(obs)[0]
        self.open_update()
        loss, metrics = self.per_run(partial(distilled_loss, self.rule))(self.rule.params, rows, wanted, weight)
        self.descend("distilled", self.rule_optimiser, loss, self.rule)
        return metrics | {"distilled/loss": loss.detach()}

    def switch_batch(self, batch: Batch) -> Batch:
        """Return a minibatch of the team as Global's: r - c g, with the calls that are left before and after."""
        c, calls = self.config, batch.extras["switch"]
        made, left, on = calls.to(torch.float32), batch.extras.get("remaining"), batch.extras.get("on")
        paid = made if on is None else made * ~on.bool()
        after = None if left is None else left - made
        args = (c.budget, left, on, on is not None)
        return batch._replace(
            obs=switch_obs(self.spec, batch.obs, *args),
            next_obs=switch_obs(self.spec, batch.next_obs, c.budget, after, calls, on is not None),
            action=calls.long(),
            reward=joint.team_reward(self.spec, batch.reward) - c.cost * paid,
            extras={},
        )


def remembers(agent: Agent) -> bool:
    """Return whether an agent's networks have a memory, which is stored with each transition."""
    return any(field.startswith(CARRY) for field in agent.extra_fields)
