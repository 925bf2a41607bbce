"""Robust MDPs as Gymnasium environments: what a policy meets that walks through the nominal model.

``env.unwrapped.robust_model`` is the model that solvers read. An environment of any other package may carry one too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np

from rlopt.envs.factory import EnvFactory, find_spec
from rlopt.robust.mdp import TabularMDP, from_toy_text
from rlopt.robust.model import RobustMDP
from rlopt.robust.problems.domains import GRID, grid_world, machine_replacement, river_swim
from rlopt.robust.problems.garnet import garnet
from rlopt.robust.problems.inventory import inventory
from rlopt.types import RloptError


class RobustEnv(gymnasium.Env[Any, Any]):
    """A walk through the nominal kernel of a ``RobustMDP``.

    An episode is one instance k, drawn at the reset, and its state s is observed as k·S + s. The reward is minus the
    cost, and every step is the last with probability 1 - γ: so the mean return is minus the nominal J.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(self, model: RobustMDP, render_mode: str | None = None) -> None:
        self.robust_model = model
        self.render_mode = render_mode
        self.observation_space, self.action_space = model.spec.observation_space, model.spec.action_space
        self._cumulative = model.kernel.probabilities.cumsum(-1).cpu().numpy()
        self._successors = model.kernel.successors.cpu().numpy()
        self._cost = model.cost.cpu().numpy()
        self._start = model.initial.cumsum(-1).cpu().numpy()
        self._at = (0, 0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        k = int(self.np_random.integers(self.robust_model.num_instances))
        self._at = (k, self._draw(self._start[k]))
        return self._observed(), {}

    def step(self, action: Any) -> tuple[int, float, bool, bool, dict[str, Any]]:
        k, s = self._at
        a = int(action)
        j = self._draw(self._cumulative[k, s, a])
        costs = self._cost[k, s, a]
        self._at = (k, int(self._successors[k, s, a, j]))
        ends = bool(self.np_random.random() >= self.robust_model.gamma)
        return self._observed(), -float(costs[j if len(costs) > 1 else 0]), ends, False, {}

    def _draw(self, cumulative: Any) -> int:
        # Sums end a rounding away from 1, and padding behind the successors adds nothing.
        return int(np.searchsorted(cumulative, self.np_random.random() * cumulative[-1], side="right"))

    def _observed(self) -> int:
        k, s = self._at
        return k * self.robust_model.num_states + s


def _own(gamma: float | None) -> dict[str, Any]:
    """Return the discount as an argument of a generator; None leaves it its own, as configurations do without
    agent.gamma."""
    return {} if gamma is None else {"gamma": gamma}


class GarnetEnv(RobustEnv):
    """Garnet problems with L1 sets, as in the DRPG paper."""

    def __init__(
        self,
        states: int = 10,
        actions: int = 6,
        branching: int = 3,
        instances: int = 1,
        gamma: float | None = None,
        rectangular: str = "sa",
        radius: Sequence[float] | None = None,
        seed: int = 0,
        render_mode: str | None = None,
    ) -> None:
        ends = None if radius is None else (float(radius[0]), float(radius[1]))
        sizes = (states, actions, branching, instances)
        super().__init__(garnet(*sizes, rectangular=rectangular, radius=ends, seed=seed, **_own(gamma)), render_mode)


class MachineReplacementEnv(RobustEnv):
    """Machine replacement: run an ageing machine or repair it."""

    def __init__(self, gamma: float | None = None, radius: float = 0.2, render_mode: str | None = None) -> None:
        super().__init__(machine_replacement(radius=radius, **_own(gamma)), render_mode)


class RiverSwimEnv(RobustEnv):
    """RiverSwim: swim against the current for a large reward."""

    def __init__(
        self, states: int = 6, gamma: float | None = None, radius: float = 0.2, render_mode: str | None = None
    ) -> None:
        super().__init__(river_swim(states, radius=radius, **_own(gamma)), render_mode)


class GridWorldEnv(RobustEnv):
    """A slippery grid with holes and an adversarial wind."""

    def __init__(
        self,
        rows: Sequence[str] = GRID,
        slip: float = 0.2,
        gamma: float | None = None,
        radius: float = 0.3,
        hole_cost: float = 20.0,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(grid_world(rows, slip, radius=radius, hole_cost=hole_cost, **_own(gamma)), render_mode)


class InventoryEnv(RobustEnv):
    """Inventory control with an ambiguous demand law."""

    def __init__(
        self,
        capacity: int = 20,
        largest_order: int = 10,
        mean_demand: float = 4.0,
        largest_demand: int = 12,
        unit_cost: float = 1.0,
        order_cost: float = 2.0,
        holding_cost: float = 0.5,
        shortage_cost: float = 8.0,
        gamma: float | None = None,
        render_mode: str | None = None,
    ) -> None:
        demand = (mean_demand, largest_demand)
        costs = (unit_cost, order_cost, holding_cost, shortage_cost)
        super().__init__(inventory(capacity, largest_order, *demand, *costs, **_own(gamma)), render_mode)


def model_of(id: str, kwargs: Mapping[str, Any] | None = None) -> RobustMDP | TabularMDP:
    """Return the model of an environment: its ``robust_model``, or else the table of a toy-text one.

    Raises:
        RloptError: it has neither, or its own arguments are refused.
    """
    env = EnvFactory(find_spec(id), dict(kwargs or {}))()
    try:
        model = getattr(env.unwrapped, "robust_model", None)
        if model is None and getattr(env.unwrapped, "P", None) is None:
            raise RloptError(
                f"env={id} shows no model; choose env=garnet, inventory, grid_world, river_swim or "
                "machine_replacement, or a toy-text environment such as FrozenLake-v1"
            )
    finally:
        env.close()
    return model if isinstance(model, RobustMDP) else from_toy_text(id, kwargs)
