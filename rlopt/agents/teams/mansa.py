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
3. The independent learner draws every transition, as it learns off policy; the centralised one those of its own calls
   (``centralised_learns=everything``: all). Global learns from the independent one's minibatches.
4. A cost is due at every central step (``cost_of=switch_on``: only where the step before was independent).
5. In training Global explores ε-greedily, and each learner as it does alone.
6. A call is a central step in acting: the fact ``calls`` of each episode, in training and in evaluation. What the
   centralised learner costs in training is the fact ``central_updates``: its updates, shared among the environments.
7. Evaluations and exported policies use Global, which needs the state. A decentralised rule is not distilled yet.

Controls behind the same switch are ``rule=independent | centralised | random | fixed``: whether it matters *where*
calls are made shows beside ``random`` at the same rate.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from gymnasium import spaces
from torch import Tensor

from rlopt import joint
from rlopt.agents.base import Agent, ReplayAgentConfig
from rlopt.agents.dqn import DQN, DQNConfig
from rlopt.buffers import Batch
from rlopt.config import build, over
from rlopt.nn import NetworkConfig
from rlopt.policy import EvaluationMode, Policy
from rlopt.policy.switching import RULES, SwitchingActor, switch_obs, switch_space
from rlopt.registry import agent_presets, get_agent
from rlopt.types import Act, Carry, EnvSpec, Metrics, Obs, RloptError, Update, option

SHARED = ("gamma", "reward", "batch_size", "n_step", "update_ratio", "warmup_steps", "learning_starts")
"""Options of both learners and of Global, given once."""
LEARNERS = ("independent", "centralised")
GLOBAL = {"rule": ("global",)}


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
    budget: int | None = option(None, "central steps per episode at most (null: no limit)", low=0)
    rate: float = option(0.5, "share of central steps", low=0.0, high=1.0, needs={"rule": ("random",)})
    every: int = option(10, "steps from one central step to the next", low=1, needs={"rule": ("fixed",)})
    centralised_learns: str = option(
        "calls", "what the centralised learner draws: its own steps, or everything", choices=("calls", "everything")
    )
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
        if c.rule == "global":
            own = {f.name: getattr(c, f.name) for f in fields(DQNConfig)}
            seen = EnvSpec(f"{spec.id}/switch", switch_space(spec, c.budget, costs_on), spaces.Discrete(2))
            self.switch = self.child("switch", self.learner, DQNConfig(**{**own, "name": "dqn"}), seen)
        networks: Any = [None] * self.runs if self.switch is None else self.switch.actor.modules
        options = {"rule": c.rule, "budget": c.budget, "rate": c.rate, "every": c.every, "on": costs_on}
        pairs = zip(*(each.policies for each in learners.values()), strict=True)
        self.actors = [
            SwitchingActor(spec, one.actor, other.actor, network, options)
            for (one, other), network in zip(pairs, networks, strict=True)
        ]
        """Of every run."""
        self.actor = self.actors[0]
        self.used = (c.rule,) if c.rule in LEARNERS and c.budget is None else LEARNERS
        """Who ever acts, and so learns."""
        masks = {"independent": None, "centralised": "switch" if c.centralised_learns == "calls" else None}
        self.draws = {name: mask for name, mask in masks.items() if name in self.used}
        self.extra_fields = {"switch": ((), torch.bool)}
        if c.budget is not None:
            self.extra_fields["remaining"] = ((), torch.float32)
        if costs_on:
            self.extra_fields["on"] = ((), torch.bool)
        self.untold = self.persist("untold", torch.zeros((), dtype=torch.int64))
        """Updates of the centralised learner since the latest step."""

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
        if made.extra_fields or made.draws:
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
        return self.actor.initial_carry(rows)

    @torch.no_grad()
    def act(self, obs: Obs, carry: Carry = None, deterministic: bool = False) -> Act:
        """Return joint actions (N, n, …) of whom the switch says, which both learners and Global explore."""
        if carry is None:
            raise RloptError("a switch needs its carry; an episode begins with initial_carry(rows)")
        actor, clock = self.actor, self.clock
        acted = clock.acted

        def answer(agent: Agent, seen: Obs) -> Tensor:
            clock.acted = acted  # each of them counts what it acts on
            return agent.act(seen, None, deterministic).action

        chosen = None if self.switch is None else answer(self.switch, actor.seen(obs, carry))
        each = len(carry["switch/time"]) // self.runs
        drawn = [own.draw(each, stream) for own, stream in zip(self.actors, self.act_generators, strict=True)]
        calls = actor.decide(carry, chosen, torch.cat(drawn) if actor.draws else None)  # type: ignore[arg-type]
        found = [answer(self.learners[name], obs) for name in self.used]
        action = found[0] if len(found) == 1 else actor.mix(calls, *found)
        after = actor.count(carry, calls)
        told = {"switch": calls, "remaining": carry["switch/remaining"], "on": carry["switch/on"] > 0}
        facts = {"calls": after["switch/on"]}
        if not deterministic:
            facts["central_updates"] = torch.full(calls.shape, float(self.untold) / each, device=self.device)
            self.untold.zero_()
        return Act(action, after, {name: told[name] for name in self.extra_fields}, facts)

    def update(self, batch: dict[str, Batch]) -> Update:
        """Let each learner learn from its own minibatch, and Global from the independent one's."""
        metrics: Metrics = {}
        priority: dict[str, Any] = {}
        for name, own in batch.items():
            done = self.learners[name].update(own._replace(extras={}))
            metrics |= {f"{name}/{word}": value for word, value in done.metrics.items()}
            priority[name] = done.priority
        if self.switch is not None:
            done = self.switch.update(self.switch_batch(batch["independent"]))
            metrics |= {f"switch/{word}": value for word, value in done.metrics.items()}
        self.untold += "centralised" in batch
        self.end_update()
        return Update(metrics, priority)

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
