"""Inventory control with an ambiguous demand law."""

from __future__ import annotations

import math

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from rlopt.robust.kernel import Kernel, check_room
from rlopt.robust.model import RobustMDP
from rlopt.robust.sets.ambiguity import Ambiguity
from rlopt.robust.sets.l1 import L1
from rlopt.types import EnvSpec, RloptError


def poisson(mean: float, largest: int) -> NDArray[np.float64]:
    """Return (largest + 1,) the Poisson law, with all that lies above ``largest`` put on it."""
    p = np.array([math.exp(-mean + d * math.log(mean) - math.lgamma(d + 1)) for d in range(largest + 1)])
    p[-1] += 1.0 - p.sum()
    return p


def inventory(
    capacity: int = 20,
    largest_order: int = 10,
    mean_demand: float = 4.0,
    largest_demand: int = 12,
    unit_cost: float = 1.0,
    order_cost: float = 2.0,
    holding_cost: float = 0.5,
    shortage_cost: float = 8.0,
    gamma: float = 0.95,
    ambiguity: Ambiguity | None = None,
) -> RobustMDP:
    """Return an inventory: stock s = 0 … capacity, orders a = 0 … largest_order that arrive at once, demand d by a
    truncated Poisson law.

    s' = max(0, min(s + a, capacity) - d) and the cost is order_cost·1{a > 0} + unit_cost·a + holding_cost·s' +
    shortage_cost·(unmet demand); demand that is not met is lost, and what does not fit is thrown away.

    A row of the kernel lists the *demands*, several of which lead to an empty store at different costs. So the
    ambiguity set (default: an L1 ball of radius 0.3) is around the demand law itself, chosen anew for every stock and
    order.
    """
    if min(capacity, largest_order, largest_demand) < 1 or mean_demand <= 0.0:
        raise RloptError("an inventory needs a capacity, orders and demands of at least 1, and a positive mean demand")
    check_room(capacity + 1, largest_order + 1, largest_demand + 1)
    stock, order, demand = np.ogrid[: capacity + 1, : largest_order + 1, : largest_demand + 1]
    held = np.minimum(stock + order, capacity)
    left = np.maximum(held - demand, 0)
    cost = (
        order_cost * (order > 0)
        + unit_cost * order
        + holding_cost * left
        + shortage_cost * np.maximum(demand - held, 0)
    )
    law = np.broadcast_to(poisson(mean_demand, largest_demand), left.shape)
    spec = EnvSpec("inventory", spaces.Discrete(capacity + 1), spaces.Discrete(largest_order + 1))
    return RobustMDP(Kernel(np.array(law), left), cost, gamma, ambiguity or L1(0.3), spec=spec, per_successor=True)
