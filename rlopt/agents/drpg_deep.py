"""Deep DRPG: the double loop of Wang, Ho and Petrik 2023 ("Policy Gradient in Robust MDPs with Global Convergence
Guarantee", arXiv 2212.10439) with a neural policy and a family of simulators.

The set of transition kernels is a simulator whose parameters ξ lie in a box. The inner loop climbs the policy's cost in
ξ until it is within ε_t of what first-order information promises, with ε_{t+1} = decay · ε_t as in the paper; the outer
loop is SAC on episodes simulated at the worst ξ found, and at earlier ones from a bag. Such a family is in general not
rectangular, so the paper's guarantee does not carry over: what is found is the worst ξ found, no bound.

With ``adversary=uniform`` the same agent is SAC with domain randomisation, with ``nominal`` plain SAC.

``RobustLoop`` simulates; nothing here touches an environment. Points of the box are in unit coordinates, [0, 1] per
parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from rlopt.agents.replay_agent import ReplayAgent
from rlopt.agents.sac import SAC, SACConfig
from rlopt.agents.sac_discrete import DiscreteSAC, DiscreteSACConfig
from rlopt.random import torch_generator
from rlopt.types import RloptError, option

ADVERSARIES = ("worst", "uniform", "nominal")
WORST = {"adversary": ("worst",)}
NEAR = 0.05
"""Members of the bag are at least this far apart in some parameter, as a fraction of the box's side."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Options of the inner ascent."""

    candidates: int = option(8, "parameters tried per round, side by side (at least 1 + 2 per parameter)", low=3)
    episodes: int = option(2, "episodes per candidate, with the same random numbers for all", low=1)
    rounds: int = option(4, "rounds of one ascent, at most", low=1)
    step: float = option(0.25, "first step of the finite differences, in sides of the box", above=0.0, high=1.0)
    tolerance: float = option(0.2, "ε_0, as a fraction of the range of returns that the ascent met", low=0.0)
    tolerance_decay: float = option(0.9, "ε_{t+1} = tolerance_decay · ε_t", above=0.0, high=1.0)


@dataclass(frozen=True, kw_only=True)
class RobustOptions:
    """What the double loop adds to the options of an off-policy agent."""

    box: dict[str, tuple[float, float]] = option(dict, "simulator parameters and their bounds: {name: [low, high]}")
    adversary: str = option("worst", "who sets the parameters (uniform: domain randomisation)", choices=ADVERSARIES)
    adversary_every: int = option(2_000, "environment steps between inner ascents", low=1, needs=WORST)
    bag: int = option(8, "worst parameters kept, the present ones included", low=1, needs=WORST)
    bag_share: float = option(0.5, "share of episodes simulated at a member of the bag", low=0.0, high=1.0, needs=WORST)
    search: SearchConfig = option(SearchConfig, "the inner ascent", needs=WORST)

    def __post_init__(self) -> None:
        for name, (low, high) in self.box.items():
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise RloptError(f"agent.box.{name}: [{low:g}, {high:g}] is no interval; give two numbers, low < high")
        least = 1 + 2 * len(self.box)
        if self.search.candidates < least:
            raise RloptError(
                f"agent.search.candidates={self.search.candidates}: finite differences in {len(self.box)} parameters "
                f"take {least}; give at least as many"
            )


class Ascent(NamedTuple):
    """What an inner ascent found."""

    point: Tensor
    """(d,) the worst point met."""
    cost: float
    left: float
    """What may be left to gain, in cost; see ``ascend_box``."""
    spread: float
    """Highest less lowest cost met."""
    rounds: int


def ascend_box(
    cost: Callable[[Tensor], Tensor],
    start: Tensor,
    tolerance: float,
    options: SearchConfig,
    generator: torch.Generator,
    explore: Tensor | None = None,
) -> Ascent:
    """Climb ``cost`` on the unit cube from ``start``, projected to it, until at most ``tolerance`` · spread is left.

    A round tries, in one call of ``cost``: the incumbent u, its neighbours at ± step along each axis, and elsewhere
    ``explore`` (first round) and uniform draws. The best becomes the incumbent; if none is better the step is halved.
    What is left to gain is taken to be the larger of the round's improvement and the Frank-Wolfe gap
    max_{v in cube} ⟨∇, v - u⟩ with the gradient by central differences: were the cost concave, as J is not, that would
    bound what is missing, and it vanishes in a corner that all slopes lead into.

    Args:
        cost: (P, d) points to (P,) costs, P = ``options.candidates``, by common random numbers: the same point has the
            same cost in every round.
        start: (d,).
        tolerance: ε_t as a fraction of the range of costs met.
        explore: (K, d) points to be tried elsewhere first.
    """
    d = len(start)
    u, step = start.clamp(0.0, 1.0), options.step
    lowest, highest, rounds = math.inf, -math.inf, 0
    while True:
        rounds += 1
        elsewhere = torch.rand((options.candidates - 1 - 2 * d, d), generator=generator, dtype=start.dtype)
        if rounds == 1 and explore is not None:
            elsewhere[: len(explore)] = explore[: len(elsewhere)]
        offsets = step * torch.eye(d, dtype=start.dtype)
        up, down = (u + offsets).clamp(max=1.0), (u - offsets).clamp(min=0.0)
        points = torch.cat((u[None], up, down, elsewhere))
        costs = cost(points).to(start.dtype)
        lowest, highest = min(lowest, float(costs.min())), max(highest, float(costs.max()))
        slope = (costs[1 : 1 + d] - costs[1 + d : 1 + 2 * d]) / (up - down).diagonal()
        gap = float(torch.maximum(slope * (1.0 - u), -slope * u).sum())
        best = int(costs.argmax())
        left = max(gap, float(costs[best] - costs[0]))
        if costs[best] > costs[0]:
            u = points[best].clone()
        else:
            step = 0.5 * step
        spread = highest - lowest
        if left <= tolerance * spread or rounds == options.rounds:
            return Ascent(u, highest, left, spread, rounds)


class Adversary:
    """The inner player: the worst point it knows, a bag of those it knew, and its tolerance."""

    def __init__(self, options: RobustOptions, seed: int) -> None:
        d = len(options.box)
        self.options = options
        self.nominal = torch.zeros(d, dtype=torch.float64)
        """The simulator's own parameters, which may lie outside the box."""
        self.worst = torch.zeros(d, dtype=torch.float64)
        self.bag = torch.zeros((options.bag, d), dtype=torch.float64)
        """Oldest first; the first ``members`` rows count."""
        self.counts = torch.zeros(2, dtype=torch.int64)
        """Ascents made, members of the bag."""
        self.generator = torch_generator(seed, "adversary")

    def begin(self, nominal: Tensor) -> None:
        """Start from the simulator's own parameters (d,), put into the box."""
        self.nominal.copy_(nominal)
        if self.ascents == 0:
            self.worst.copy_(nominal.clamp(0.0, 1.0))
            self.counts[1] = 0
            self.remember(self.worst)

    @property
    def ascents(self) -> int:
        return int(self.counts[0])

    @property
    def members(self) -> Tensor:
        """(K, d) the bag."""
        return self.bag[: int(self.counts[1])]

    @property
    def tolerance(self) -> float:
        """ε_t of the next ascent, as a fraction of the range of returns."""
        return self.options.search.tolerance * self.options.search.tolerance_decay**self.ascents

    def draw(self, n: int) -> Tensor:
        """Return (n, d) points at which the next episodes are simulated."""
        d = len(self.nominal)
        if self.options.adversary == "nominal":
            return self.nominal.expand(n, d).clone()
        if self.options.adversary == "uniform":
            return torch.rand((n, d), generator=self.generator, dtype=torch.float64)
        earlier = torch.rand(n, generator=self.generator) < self.options.bag_share
        member = torch.randint(len(self.members), (n,), generator=self.generator)
        return torch.where(earlier[:, None], self.members[member], self.worst)

    def attack(self, cost: Callable[[Tensor], Tensor]) -> Ascent:
        """Do one inner ascent from the worst point known, with the bag's newest members to look at first."""
        found = ascend_box(
            cost, self.worst, self.tolerance, self.options.search, self.generator, self.members.flip(0)[1:]
        )
        self.worst.copy_(found.point)
        self.remember(self.worst)
        self.counts[0] += 1
        return found

    def remember(self, point: Tensor) -> None:
        """Make ``point`` the bag's newest member. Members near it go, then the oldest if there are too many."""
        far = (self.members - point).abs().amax(1) >= NEAR
        kept = torch.cat((self.members[far], point[None]))[-self.options.bag :]
        self.bag[: len(kept)] = kept
        self.counts[1] = len(kept)


class RobustLearner(ReplayAgent):
    """An off-policy agent with an adversary; ``RobustLoop`` drives it."""

    loop: ClassVar[str] = "robust"
    supports_runs = False
    supports_memory = False

    def build(self) -> None:
        super().build()
        self.adversary = Adversary(cast(RobustOptions, self.config), self.seed)
        for name in ("nominal", "worst", "bag", "counts", "generator"):
            self.persist(f"adversary_{name}", getattr(self.adversary, name))


@dataclass(frozen=True, kw_only=True)
class DeepDRPGConfig(RobustOptions, SACConfig):
    """Options of deep DRPG."""


class DeepDRPG(RobustLearner, SAC):
    """Deep DRPG with soft actor-critic, for bounded Box action spaces."""

    name: ClassVar[str] = "drpg_deep"
    config_class = DeepDRPGConfig
    config: DeepDRPGConfig


@dataclass(frozen=True, kw_only=True)
class DiscreteDeepDRPGConfig(RobustOptions, DiscreteSACConfig):
    """Options of deep DRPG with discrete actions."""


class DiscreteDeepDRPG(RobustLearner, DiscreteSAC):
    """Deep DRPG with discrete soft actor-critic, for Discrete action spaces."""

    name: ClassVar[str] = "drpg_deep_discrete"
    config_class = DiscreteDeepDRPGConfig
    config: DiscreteDeepDRPGConfig
