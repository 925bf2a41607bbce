"""Agents that solve robust MDPs: a solver of ``rlopt.robust`` behind the trainer's contract."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlopt.agents.base import AgentConfig
from rlopt.agents.solver_agent import SolverAgent
from rlopt.robust import (
    KL,
    L1,
    Ambiguity,
    ChiSquared,
    Contamination,
    LInf,
    RobustMDP,
    Solution,
    StateL1,
    TabularMDP,
)
from rlopt.robust.problems.environments import model_of
from rlopt.robust.problems.garnet import random_policy
from rlopt.robust.solvers.base import Solver
from rlopt.robust.solvers.solve import solution
from rlopt.types import RloptError, Update, option

SETS: dict[str, type[Any]] = {
    "l1": L1, "state_l1": StateL1, "linf": LInf, "kl": KL, "chi2": ChiSquared, "contamination": Contamination
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RobustConfig(AgentConfig):
    """What every solver of robust MDPs has."""

    gamma: float | None = option(  # type: ignore[assignment]  # of a solver's discount, no loop asks
        None, "discount (null: the model's own; 0.95 where it has none)", low=0.0, high=1.0
    )
    tolerance: float | None = option(
        1e-3, "stop once every instance's certified gap is at most this (null: never)", above=0.0
    )
    start: str = option("uniform", "first policy: uniform, or random rows ~ U(0.1, 0.5) as in the DRPG paper",
                        choices=("uniform", "random"))  # fmt: skip
    ambiguity: str | None = option(
        None, "ambiguity set put around the nominal model (null: the model's own, l1 where it has none)",
        choices=(None, *SETS),
    )  # fmt: skip
    radius: float | None = option(None, "its radius, where the set is not the model's own (null: 0.2)", low=0.0)

    def __post_init__(self) -> None:
        if self.gamma is not None and self.gamma >= 1.0:
            raise RloptError(f"agent.gamma={self.gamma:g}: robust MDPs need a discount below 1; use agent.gamma=0.99")

    def make_set(self) -> Ambiguity:
        made: Ambiguity = SETS[self.ambiguity or "l1"](0.2 if self.radius is None else self.radius)
        return made

    def make_model(self, given: TabularMDP | RobustMDP) -> RobustMDP:
        """Return the model as these options want it."""
        if isinstance(given, TabularMDP):
            return RobustMDP.from_tabular(given, 0.95 if self.gamma is None else self.gamma, self.make_set())
        if self.ambiguity is not None:
            given = given.replace(self.make_set())
        elif self.radius is not None:
            raise RloptError(
                f"agent.radius={self.radius:g}: the model brings its own ambiguity set; name the set that is to "
                "have this radius, such as agent.ambiguity=l1"
            )
        return given if self.gamma is None else given.with_gamma(self.gamma)


class RobustAgent(SolverAgent):
    """Base of the agents below it: every instance of the model at once, one step of ``solver_class`` per update.

    ``solver.state`` is registered tensor by tensor. The deployed policy is the best one found so far, of all instances:
    a table over the states k·S + s.
    """

    models: ClassVar[tuple[type, ...]] = (TabularMDP, RobustMDP)
    solver_class: ClassVar[type[Solver]]
    config: RobustConfig

    @classmethod
    def model_of(cls, env_id: str, kwargs: Mapping[str, Any]) -> Any:
        return model_of(env_id, kwargs)

    def build(self) -> None:
        c = self.config
        self.robust_model = c.make_model(self.model).to(self.device)
        start = random_policy(self.robust_model, self.seed) if c.start == "random" else None
        options = self.solver_class.options_class
        names = [f.name for f in dataclasses.fields(options)]
        self.solver = self.solver_class(self.robust_model, options(**{n: getattr(c, n) for n in names}), start)
        for name, tensor in self.solver.state.items():
            self.persist(name, tensor)
        self.build_table()

    @torch.no_grad()
    def update(self, batch: None = None) -> Update:
        """Do one iteration of every instance.

        Metrics, in the model's own sign: ``value`` J(π_t, p_t), the certified ``lower`` and ``upper`` bounds, and
        ``inner``, the adversary's steps, as means over instances; of the certified ``gap`` the mean, the 5th and 95th
        percentile and the largest.
        """
        step = self.solver.step()
        sign = self.robust_model.sign
        if sign < 0:
            step = step | {"value": -step["value"], "lower": -step["upper"], "upper": -step["lower"]}
        best = self.solver.state["best_policy"]
        self.table.probabilities.copy_(best.reshape(-1, best.shape[-1])[: len(self.table.probabilities)])
        self.end_update()
        metrics: dict[str, Tensor] = {name: x.mean() for name, x in step.items()}
        for percent in (5, 95):
            metrics[f"gap_{percent}"] = torch.quantile(step["gap"], percent / 100)
        return Update(metrics | {"gap_max": step["gap"].amax()})

    @property
    def converged(self) -> bool:
        tolerance = self.config.tolerance
        return tolerance is not None and float((self.solver.upper - self.solver.lower).amax()) <= tolerance

    def results(self) -> dict[str, Tensor]:
        """Return the ``solution`` so far by its names, without its history; this agent goes on as if it had not been
        asked."""
        found = copy.deepcopy(self).solution()._asdict()
        return {name: tensor for name, tensor in found.items() if name != "history"}

    def solution(self) -> Solution:
        """Return the best policy, the worst kernel found for it, its value and the bounds, tightened once more."""
        return solution(self.solver, {})
