"""The inventory instance of the DRPG paper: 8 states, 3 actions, radial features."""

from __future__ import annotations

import math
from importlib.resources import files

import numpy as np
import torch
from numpy.typing import NDArray

from rlopt.random import numpy_generator
from rlopt.robust.model import RobustMDP
from rlopt.robust.parametric import Parameters, ParametricSet
from rlopt.robust.sets.ambiguity import Nominal

Array = NDArray[np.float64]
STATES = np.array([[0.25, 0.5, 0.75, 1.0, 0.25, 0.5, 0.75, 1.0], [1.3, -2.1, 3.4, -1.0, 2.5, 0.5, 1.8, -0.8]]).T
ACTIONS = np.array([-3.0, -1.0, 5.0])
STATE_CENTRES = np.array([[-1.0, 2.0], [0.3, -0.6]])
PAIR_CENTRES = np.array([[1.3, 2.1, 1.0], [-0.7, 1.5, 0.5]])


def paper_inventory(seed: int | None = None) -> ParametricSet:
    """Return the published instance, or with a ``seed`` another of the same recipe.

    Costs |N(2, 2²)| rounded to cents, kernel rows in proportion to integers 1 … 9. The features are quadratic, without
    the exponential that their name suggests: φ_j = -‖s - c_j‖²/2/√(2π), ζ_k = -‖(s, a) - c_k‖²/8/√(8π). Uniform start
    (the authors draw an unseeded one), γ = 0.95, θ_c = (0.4, 0.9), λ_c = (0.7, 0.6), both radii 1.
    """
    cost: Array
    kernel: Array
    if seed is None:
        cost = _table("inventory_cost.csv").reshape(8, 3, 8)
        kernel = _table("inventory_kernel.csv").T.reshape(8, 3, 8)
    else:
        rng = numpy_generator(seed, "paper_inventory")
        cost = np.abs(rng.normal(2.0, 2.0, (8, 3, 8))).round(2)
        kernel = rng.integers(1, 10, (8, 3, 8)).astype(np.float64)
    kernel /= kernel.sum(-1, keepdims=True)
    pairs = np.concatenate([np.repeat(STATES[:, None], 3, 1), np.tile(ACTIONS[None, :, None], (8, 1, 1))], -1)
    phi = -((STATES[:, None] - STATE_CENTRES) ** 2).sum(-1) / 2.0 / math.sqrt(2.0 * math.pi)
    zeta = -((pairs[:, :, None] - PAIR_CENTRES) ** 2).sum(-1) / 8.0 / math.sqrt(8.0 * math.pi)
    model = RobustMDP(kernel, cost, 0.95, Nominal())
    features = torch.from_numpy(phi), torch.from_numpy(zeta)
    theta, lam = (torch.tensor(x, dtype=torch.float64) for x in ([0.4, 0.9], [0.7, 0.6]))
    return ParametricSet(model, *features, theta, lam)


def ones(ambiguity: ParametricSet) -> Parameters:
    """Return where the authors begin their ascent: all parameters 1."""
    centre = ambiguity.centre()
    return Parameters(torch.ones_like(centre.theta), torch.ones_like(centre.lam))


def _table(name: str) -> Array:
    text = files("rlopt.robust").joinpath("data", name).read_text(encoding="utf-8").splitlines()[1:]
    return np.array([[float(x) for x in line.split(",")[1:]] for line in text])
