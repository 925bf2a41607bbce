"""Garnet problems: random MDPs of a given size and branching (Archibald, McKinnon and Thomas 1995), made robust."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlopt.random import numpy_generator
from rlopt.robust.kernel import Kernel, check_room
from rlopt.robust.model import RobustMDP
from rlopt.robust.sets.l1 import L1, StateL1
from rlopt.types import RloptError


def garnet(
    states: int = 10,
    actions: int = 6,
    branching: int = 3,
    instances: int = 1,
    gamma: float = 0.95,
    rectangular: str = "sa",
    radius: tuple[float, float] | None = None,
    seed: int = 0,
) -> RobustMDP:
    """Return G(states, actions, branching) by the recipe of the DRPG paper's code.

    Every (s, a) has ``branching`` distinct successors with weights U(0, 5); costs c(s, a, s') ~ U(0, 5), start weights
    U(0, 5); L1 sets on the support with κ_sa ~ U(0.1, 0.5), or κ_s ~ U(0.5, 1) where ``rectangular`` is ``s``.

    Args:
        instances: instance k is drawn from seed ``seed`` + k alone, so more of them change none.
        radius: the ends of the uniform law of κ.
    """
    if not 1 <= branching <= states:
        raise RloptError(f"branching={branching}: must lie between 1 and states={states}")
    if rectangular not in ("sa", "s"):
        raise RloptError(f"rectangular={rectangular!r}: choose sa or s")
    check_room(states, actions, states)
    check_room(instances, states, actions, branching)
    ends = radius or ((0.1, 0.5) if rectangular == "sa" else (0.5, 1.0))
    drawn = [_instance(numpy_generator(seed + k, "garnet"), states, actions, branching) for k in range(instances)]
    successors, weights, costs, start, budgets, state_budgets = (np.stack(x) for x in zip(*drawn, strict=True))
    kernel = Kernel(weights / weights.sum(-1, keepdims=True), None if branching == states else successors)
    low, high = ends
    if rectangular == "sa":
        ambiguity: L1 | StateL1 = L1(low + (high - low) * budgets)
    else:
        ambiguity = StateL1(low + (high - low) * state_budgets)
    return RobustMDP(kernel, costs, gamma, ambiguity, start / start.sum(-1, keepdims=True), per_successor=True)


def _instance(rng: np.random.Generator, states: int, actions: int, branching: int) -> tuple[Any, ...]:
    shape = (states, actions, branching)
    if branching == states:
        successors = np.broadcast_to(np.arange(states), shape)
    else:
        keys = rng.random((states, actions, states), dtype=np.float32)
        successors = np.sort(np.argpartition(keys, branching - 1, axis=-1)[..., :branching], axis=-1)
    weights, costs = 5.0 * (1.0 - rng.random(shape)), 5.0 * rng.random(shape)
    return successors, weights, costs, 1.0 - rng.random(states), rng.random((states, actions)), rng.random(states)


def random_policy(model: RobustMDP, seed: int = 0) -> Tensor:
    """Return (K, S, A) the paper's first policy: rows in proportion to U(0.1, 0.5); that of instance k depends on seed
    + k."""
    shape = (model.num_states, model.num_actions)
    rows = [numpy_generator(seed + k, "policy").uniform(0.1, 0.5, shape) for k in range(model.num_instances)]
    policy = torch.from_numpy(np.stack(rows)).to(model.device)
    return policy / policy.sum(-1, keepdim=True)
