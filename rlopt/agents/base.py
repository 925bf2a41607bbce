"""What an agent is to a loop: act, update, a clock, and a complete state."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rlopt.agents.saving import freeze, load_agent, nets_of, save_agent
from rlopt.agents.seen import observation_dims, takes_arrays
from rlopt.agents.td import TD_LOSSES, TDLoss, make_td_loss
from rlopt.buffers.transition import REWARD_TRANSFORMS
from rlopt.config import checked, hint
from rlopt.heap import keep_freed_memory
from rlopt.nn import (
    PRECISIONS,
    Net,
    NetworkConfig,
    Optimiser,
    OptimiserConfig,
    Schedule,
    build_seeded,
    hidden_products,
    make_optimiser,
)
from rlopt.nn.guard import Guard
from rlopt.policy import EvaluationMode, Policy
from rlopt.random import derive_seed, generator_state, set_generator_state, torch_generator
from rlopt.types import Act, Carry, Clock, EnvSpec, Obs, RloptError, Space, State, Update, option, resolve_device

log = logging.getLogger(__name__)

MANY_RUNS = 64
"""Runs from which on it is said that they are being built."""
X = TypeVar("X")
C = TypeVar("C", bound="Agent")
T = TypeVar("T", bound="Net | Optimiser | Guard | Clock | Tensor | torch.Generator | Agent")


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """What every agent's configuration has."""

    name: str | None = option(None, "a registered agent (null: made by hand, for the class it is given to)")
    gamma: float = option(0.99, "discount per step", low=0.0, high=1.0)


@dataclass(frozen=True, kw_only=True)
class LearnerConfig(AgentConfig):
    """What every agent that learns from an environment's rewards has."""

    reward: str = option(
        "auto",
        "what learning makes of each single reward: raw, its sign, clip to [-1, 1]; auto: as env.protocol, else raw",
        choices=tuple(REWARD_TRANSFORMS),
    )


@dataclass(frozen=True, kw_only=True)
class ReplayAgentConfig(LearnerConfig):
    """What every agent that learns from a replay buffer has; read by ``ReplayLoop``."""

    batch_size: int = option(256, "transitions per update", low=1, high=2**20)
    n_step: int = option(1, "length of the return window", low=1, high=10_000)
    update_ratio: tuple[int, int] = option(
        (1, 1), "updates per environment steps, as a pair of integers", low=1, high=100_000
    )
    warmup_steps: int = option(10_000, "environment steps with uniformly random actions", low=0)
    learning_starts: int | None = option(None, "environment steps before the first update (null: warmup_steps)", low=0)
    learning_rate: float = option(3e-4, "learning rate", above=0.0)
    lr_schedule: str = option("constant", "learning rate over time", choices=("constant", "linear", "cosine"))
    schedule_steps: int | None = option(
        None,
        "environment steps over which lr_schedule decays (null: total_steps)",
        low=1,
        needs={"lr_schedule": ("linear", "cosine")},
    )
    final_learning_rate: float = option(
        0.0,
        "fraction of the learning rate at the end of the schedule",
        low=0.0,
        high=1.0,
        needs={"lr_schedule": ("linear", "cosine")},
    )
    optimiser: OptimiserConfig = option(OptimiserConfig, "optimiser of every network")
    max_grad_norm: float | None = option(None, "clip each network's gradient to this norm (null: never)", above=0.0)
    td_loss: str = option(
        "auto",
        "critics' loss of a residual; auto: huber with buffer=lap, else squared (huber where values are all of it)",
        choices=TD_LOSSES,
    )
    td_threshold: float = option(
        1.0,
        "where huber and pal turn from quadratic (LAP: buffer.floor)",
        above=0.0,
        needs={"td_loss": ("huber", "pal")},
    )
    td_alpha: float = option(0.4, "pal's exponent", low=0.0, high=1.0, needs={"td_loss": ("pal",)})
    network: NetworkConfig = option(NetworkConfig, "shape of actor and critics")

    @property
    def first_update(self) -> int:
        """Environment steps before the first update."""
        return self.warmup_steps if self.learning_starts is None else self.learning_starts

    @property
    def auto_td_loss(self) -> str | None:
        """What ``td_loss=auto`` is where the sampler has no opinion; None where the critics' loss is of another
        kind."""
        return "squared"

    @property
    def huber(self) -> float:
        """Residuals beyond this have a gradient of this size; infinite where nothing is clipped."""
        return self.td_threshold if self.td_loss == "huber" else math.inf

    def critic_td_loss(self) -> TDLoss:
        kind = self.auto_td_loss if self.td_loss == "auto" else self.td_loss
        return make_td_loss(kind, self.td_threshold, self.td_alpha)

    def schedule(self) -> Schedule:
        return Schedule(self.lr_schedule, self.schedule_steps, self.final_learning_rate)


class Agent:
    """Base of every agent: owns the clock, the random streams, and the register of everything that must persist.

    A subclass sets ``name``, ``loop`` (which loop drives it, a name of ``rlopt.registry.LOOPS``) and
    ``config_class``, calls ``persist`` once for each network, optimiser, tensor and generator it owns, and writes
    ``build``, ``act``, ``update`` and ``policy``.

    ``Agent(spec, config, seed=0, device="cpu")``, or ``Agent(observation_space, action_space, config, …)``.

    With ``runs`` R > 1, where the agent ``supports_runs``, R independent runs with the seeds ``seed … seed + R - 1``
    learn side by side: parameters, optimisers and noise have a leading run axis, run r's rows of every batch of R·B (or
    observations of R·N) are the r-th part, and a metric is (R,). ``precision`` is that of the products between hidden
    layers: ``float32`` or ``bf16``.
    """

    name: ClassVar[str]
    loop: ClassVar[str] = "replay"
    config_class: ClassVar[type[AgentConfig]]
    supports_runs: ClassVar[bool] = False
    """Whether several runs can be stacked along a leading axis."""
    beside: bool = False
    """Whether its losses take a leading run axis themselves, which costs the host less than mapping them: their
    networks must stack (``Net.stacks``)."""
    evaluation_mode = EvaluationMode()
    """How its policies act where they are evaluated, unless ``eval.mode`` and ``eval.epsilon`` say otherwise."""
    supports_teams: ClassVar[bool] = False
    """Whether it trains several agents that act together (``spec.agents``)."""
    supports_memory: ClassVar[bool] = False
    """Whether its losses run networks with a memory over sequences."""
    extra_fields: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    """{name: (shape, dtype)} of tensors to be stored with each transition. Those named ``carry/<name>`` are filled by
    the collector, with the carry before the step; the others are ``Act.extras``."""
    draws: dict[str, str | None] = {}
    """{name: mask}: the minibatches of an update, where there are several, each with a sampler of its own over the same
    transitions. ``mask`` names the bool extra field that says which of them it may draw, None for all. ``update`` then
    gets a dict of batches (without those that have nothing to draw yet) and returns a dict of priorities."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let the methods of every agent that see observations take arrays, too."""
        super().__init_subclass__(**kwargs)
        for name in ("act", "q", "log_prob"):
            if name in cls.__dict__:
                setattr(cls, name, takes_arrays(cls.__dict__[name]))

    def __init__(
        self,
        spec: EnvSpec | Space,
        *args: Any,
        seed: int = 0,
        device: torch.device | str = "cpu",
        config: Any = None,
        runs: int = 1,
        precision: str = "float32",
        parent: tuple[Agent, str] | None = None,
    ) -> None:
        if isinstance(spec, spaces.Space):
            if not args or not isinstance(args[0], spaces.Space):
                raise RloptError(f"{type(self).__name__} needs an EnvSpec, or an observation space and an action space")
            spec, args = EnvSpec("custom", spec, args[0]), args[1:]
        if len(args) > 1 or (args and config is not None):
            raise RloptError(f"{type(self).__name__}(spec, config, seed=0, device='cpu') takes one configuration")
        self.spec, self.observation_dims = spec, observation_dims(spec.observation_space)
        self.config = args[0] if args else (config if config is not None else self.config_class())
        if not isinstance(self.config, self.config_class):
            raise RloptError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, not {type(self.config).__name__}"
            )
        self.config = checked(self.config)
        if spec.agents and not self.supports_teams:
            raise RloptError(
                f"{spec.id} has {len(spec.agents)} agents, but agent={self.name} trains one; choose an agent of teams, "
                "such as hasac"
            )
        if runs > 1 and not self.supports_runs:
            raise RloptError(f"num_runs={runs}: agent={self.name} trains one run at a time; leave num_runs out")
        network = getattr(self.config, "network", None)
        if isinstance(network, NetworkConfig) and network.memory != "none" and not self.supports_memory:
            raise RloptError(
                f"agent.network.memory={network.memory}: agent={self.name} learns from single steps, not from "
                "sequences; leave it out"
            )
        if precision not in PRECISIONS:
            raise RloptError(f"precision={precision} is unknown; choose one of {', '.join(PRECISIONS)}")
        self.seeds = [seed + r for r in range(runs)]
        """Of every run."""
        self.runs, self.precision = runs, precision
        self.device = resolve_device(device)
        if runs >= MANY_RUNS:
            log.info("agent=%s: building %d runs side by side", self.name, runs)
        self._persistent: dict[str, Net | Optimiser | Guard | Clock | Tensor | torch.Generator | Agent] = {}
        self.parent: Agent | None = None
        if parent is None:
            self.clock = Clock()
            self.guard = self.persist("guard", Guard(self.device, runs))
        else:
            self.parent, name = parent
            self.seeds = [derive_seed(one, "child", name) for one in self.parent.seeds]
            self.clock, self.guard = self.parent.clock, self.parent.guard.child(name)
        self.seed = self.seeds[0]
        self.act_generators = self._generators("act")
        self.update_generators = self._generators("update")
        self.act_generator, self.update_generator = self.act_generators[0], self.update_generators[0]
        self.build()

    def build(self) -> None:
        """Make networks, optimisers and tensors from ``self.spec`` and ``self.config``, and ``persist`` them."""
        raise NotImplementedError

    def act(self, obs: Obs, carry: Carry = None, deterministic: bool = False) -> Act:
        """Return actions for a batch of observations (N, …). Random ones draw from the agent's own stream."""
        raise NotImplementedError

    def initial_carry(self, rows: int) -> Carry:
        """Return the carry with which ``rows`` episodes begin; None for feed-forward agents."""
        return self.policy.initial_carry(rows)

    def update(self, batch: Any) -> Update:
        """Do one update; never waits for the device."""
        raise NotImplementedError

    @property
    def policy(self) -> Policy:
        """The part one deploys (of several runs the first one's); shares its network with the agent."""
        raise NotImplementedError

    @property
    def policies(self) -> list[Policy]:
        """The policy of every run."""
        return [self.policy]

    @takes_arrays
    def log_prob(self, obs: Obs, action: Tensor) -> Tensor:
        """Return log π(a|s) (N,) of actions (N, …) in environment units under the (first run's) policy.

        Raises:
            RloptError: the policy has no density, or remembers.
        """
        actor = self.policy.actor
        if self.policy.recurrent:
            raise RloptError(f"agent={self.name} remembers: what it does depends on more than these observations")
        return actor.log_prob(actor.read(obs, None)[0], action)

    def q(self, obs: Obs, action: Tensor) -> Tensor:
        """Return what each of C critics (of the first run) expects of actions (N, …) in environment units: (C, N).

        Raises:
            RloptError: this agent has no values of actions.
        """
        raise RloptError(f"agent={self.name} has no values of actions")

    def freeze(self, *names: str) -> None:
        """Let no update move the networks called ``names``, such as ``actor``. (For a part of one, turn off
        ``requires_grad`` of its parameters.)

        Raises:
            RloptError: there is no such network.
        """
        nets = nets_of(self)
        for name in names:
            if name not in nets:
                raise RloptError(f"agent={self.name} has no network {name!r}; {hint(name, list(nets))}")
            freeze(nets[name])

    def save(self, path: Path | str) -> None:
        """Write all that learning needs to go on into the folder ``path``; ``load`` reads it.

        Raises:
            OSError: if the disk fails or is full; what was there before is untouched.
            RloptError: ``path`` holds something else, or the agent cannot be saved without what it solves.
        """
        save_agent(self, path)

    @classmethod
    def load(cls, path: Path | str, device: torch.device | str = "cpu") -> Self:
        """Return the agent that ``save`` wrote; ``Agent.load`` takes every registered kind.

        Raises:
            RloptError: there is none, it is damaged, or another kind of agent.
        """
        return load_agent(path, cls, device)

    @property
    def parts(self) -> Mapping[str, Net | Optimiser | Guard | Clock | Tensor | torch.Generator | Agent]:
        """Everything that persists, by name."""
        return self._persistent

    def net(self, name: str, factory: Callable[[], nn.Module]) -> Net:
        """Return a trainable network, one of each run, with initial weights from streams of its own; registered as
        ``name``."""
        modules = [build_seeded(factory, derive_seed(seed, "init", name)) for seed in self.seeds]
        if self.device.type == "cpu" and any(isinstance(m, nn.Conv2d) for m in modules[0].modules()):
            keep_freed_memory()
        return self.persist(name, Net(modules, self.device))

    def add_optimiser(self, name: str, what: Net | Tensor, learning_rate: float) -> Optimiser:
        """Return an optimiser of a network, or of one tensor (P,) or (R, P), as ``config.optimiser`` and
        ``config.max_grad_norm`` describe it; registered as ``name``."""
        c: Any = self.config  # of an agent that learns by gradients
        return self.persist(name, make_optimiser(what, learning_rate, c.optimiser, c.max_grad_norm))

    def child(self, name: str, cls: type[C], config: AgentConfig, spec: EnvSpec | None = None) -> C:
        """Return an agent of class ``cls`` that is a part of this one; registered as ``name``.

        It reads this one's clock, its streams derive from this one's seeds and its name, its guard is this one's with
        names ``name/…``, and its state is part of this one's. Its ``update`` leaves counting to this one.

        Args:
            spec: what the child sees and does, where that is not what this one does.
        """
        made = cls(
            self.spec if spec is None else spec, config, device=self.device, runs=self.runs, precision=self.precision,
            parent=(self, name),
        )  # fmt: skip
        self.persist(name, made)
        return made

    def registered(self, kind: type[X]) -> list[X]:
        """Return what is registered and of this kind."""
        return [thing for thing in self._persistent.values() if isinstance(thing, kind)]

    @property
    def children(self) -> dict[str, Agent]:
        """The agents that are parts of this one, by name."""
        return {name: thing for name, thing in self._persistent.items() if isinstance(thing, Agent)}

    def family(self) -> Iterator[Agent]:
        """Yield this agent and all that are part of it."""
        yield self
        for child in self.children.values():
            yield from child.family()

    def noise(self, *shape: int) -> Tensor:
        """Return standard normal numbers for an update: ``shape``, of several runs (R, *shape), each from its own
        stream."""
        drawn = [torch.randn(shape, generator=g, device=self.device) for g in self.update_generators]
        return torch.stack(drawn) if self.runs > 1 else drawn[0]

    def per_run(self, loss: Callable[..., X]) -> Callable[..., X]:
        """Return a loss in this agent's precision. Of several runs it is mapped over the leading axis of all tensors in
        its (positional) arguments, unless runs lie ``beside`` each other in it."""

        def evaluated(*args: Any) -> X:
            mapped = loss
            if self.runs > 1 and not self.beside:
                mapped = torch.vmap(loss, tree_map(lambda x: 0 if isinstance(x, Tensor) else None, args))
            with hidden_products(PRECISIONS[self.precision]):
                return mapped(*args)

        return evaluated

    def _generators(self, name: str) -> list[torch.Generator]:
        streams = [torch_generator(seed, name, device=self.device) for seed in self.seeds]
        for r, generator in enumerate(streams):
            self.persist(f"{name}_generator" if self.runs == 1 else f"{name}_generator_{r}", generator)
        return streams

    def persist(self, name: str, thing: T) -> T:
        """Register something that every checkpoint must hold; returns it."""
        if name in self._persistent:
            raise ValueError(f"{name} is registered already")
        self._persistent[name] = thing
        return thing

    def open_update(self, **inputs: Obs | Tensor) -> None:
        """Open the guard of an update whose inputs, by what they are called (``_`` for a space), must be finite."""
        self.guard.begin()
        for name, value in inputs.items():
            self.guard.passes(name.replace("_", " "), value)

    def rate(self) -> float | Tensor:
        """Return the present factor on every learning rate."""
        return 1.0

    def descend(
        self, name: str, optimiser: Optimiser, loss: Tensor, net: Net | None, learns: Tensor | None = None
    ) -> None:
        """Take one optimiser step of ``net`` down the loss called ``name``, () or (R,); it is skipped on the device
        where this update met anything non-finite, and what is frozen (``requires_grad`` is off) stays where it is.

        Without a ``net`` the gradient already lies in the optimiser. ``learns``, () or (R,) bool, or of each parameter
        (P,) or (R, P), is false where there was nothing to learn from: there the optimiser's state stays, too.
        """
        self.guard.passes(f"{name} loss", loss)
        frozen: list[Tensor] = []
        if net is not None:
            optimiser.gather(net.gradients(loss.sum()))  # a run's loss knows only its own leaves
            if not all(net.learns):
                for x in net.frozen_parts(optimiser.grad):
                    x.zero_()
                frozen = net.frozen_parts(net.flat)
        before = [x.clone() for x in frozen]  # momentum and weight decay would move them without a gradient
        norm = optimiser.norm()
        ok, each = self.guard.passes(f"{name} gradient", norm), None
        if learns is not None:
            if learns.dim() > ok.dim():
                each, learns = learns, learns.any(-1)
            ok = ok & learns
        optimiser.step(norm, ok, self.rate(), each)
        for x, old in zip(frozen, before, strict=True):
            x.copy_(old)

    def end_update(self) -> None:
        """Move what an update moves on the host: the clock."""
        if self.parent is None:
            self.clock.updates += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return an agent that goes on alone from where this one stands; nothing is shared but the configuration."""
        other = type(self)(
            self.spec, self.config, seed=self.seed, device=self.device, runs=self.runs, precision=self.precision
        )
        shared = {"clock": self.clock.state_dict(), "guard": self.guard.state_dict()}
        other.load_state_dict({**shared, **self.state_dict()})
        copied = nets_of(other)
        for name, net in nets_of(self).items():
            freeze(copied[name], list(net.frozen))
        memo[id(self)] = other
        return other

    def state_dict(self) -> State:
        """Return everything registered, and the clock (which a child leaves to its parent), as copies."""
        state: State = {} if self.parent else {"clock": self.clock.state_dict()}
        for name, thing in self._persistent.items():
            if isinstance(thing, torch.Generator):
                state[name] = generator_state(thing)
            elif isinstance(thing, Tensor):
                state[name] = thing.detach().clone()
            else:
                state[name] = thing.state_dict()
        return state

    def load_state_dict(self, state: State) -> None:
        """Restore what ``state_dict`` gave, in place. Raises KeyError where anything is missing."""
        own = set() if self.parent else {"clock"}
        missing = (own | self._persistent.keys()) ^ state.keys()
        if missing:
            raise KeyError(f"this agent and the saved state differ in {', '.join(sorted(missing))}")
        if self.parent is None:
            self.clock.load_state_dict(state["clock"])
        for name, thing in self._persistent.items():
            if isinstance(thing, torch.Generator):
                set_generator_state(thing, state[name])
            elif isinstance(thing, Tensor):
                with torch.no_grad():
                    thing.copy_(state[name])
            else:
                thing.load_state_dict(state[name])
