"""DRPG: double-loop robust policy gradient (Wang, Ho and Petrik 2023) and the baselines it is measured against.

The methods themselves stand in ``rlopt.robust``: ``drpg.py`` and ``baselines.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rlopt.agents.robust_agent import RobustAgent, RobustConfig
from rlopt.robust.solvers import baselines
from rlopt.robust.solvers.drpg import DRPGOptions, DRPGSolver
from rlopt.types import RloptError


@dataclass(frozen=True, kw_only=True)
class DRPGConfig(RobustConfig, DRPGOptions):
    """Options of DRPG."""


class DRPG(RobustAgent):
    """Double-loop robust policy gradient for tabular robust MDPs, with certified bounds."""

    name: ClassVar[str] = "drpg"
    config_class = DRPGConfig
    solver_class = DRPGSolver


class RobustValueIteration(RobustAgent):
    """Robust value iteration, with certified bounds."""

    name: ClassVar[str] = "robust_value_iteration"
    config_class = RobustConfig
    solver_class = baselines.ValueIterationSolver


@dataclass(frozen=True, kw_only=True)
class RobustModifiedPolicyIterationConfig(RobustConfig, baselines.ModifiedPolicyIterationOptions):
    """Options of robust modified policy iteration."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start != "uniform":
            raise RloptError(
                f"agent.start={self.start} has no effect: this method starts from the largest cost for ever; leave it "
                "out"
            )


class RobustModifiedPolicyIteration(RobustAgent):
    """Robust modified policy iteration, with certified bounds."""

    name: ClassVar[str] = "robust_modified_policy_iteration"
    config_class = RobustModifiedPolicyIterationConfig
    solver_class = baselines.ModifiedPolicyIterationSolver


@dataclass(frozen=True, kw_only=True)
class PartialPolicyIterationConfig(RobustConfig, baselines.PartialPolicyIterationOptions):
    """Options of partial policy iteration."""


class PartialPolicyIteration(RobustAgent):
    """Partial policy iteration for robust MDPs, with certified bounds: the fastest of these."""

    name: ClassVar[str] = "partial_policy_iteration"
    config_class = PartialPolicyIterationConfig
    solver_class = baselines.PartialPolicyIterationSolver


@dataclass(frozen=True, kw_only=True)
class RobustMirrorDescentConfig(RobustConfig, baselines.MirrorDescentOptions):
    """Options of robust mirror descent."""


class RobustMirrorDescent(RobustAgent):
    """Robust policy mirror descent, with certified bounds."""

    name: ClassVar[str] = "robust_mirror_descent"
    config_class = RobustMirrorDescentConfig
    solver_class = baselines.MirrorDescentSolver
