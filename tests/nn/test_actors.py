"""Acting networks: action scales and degenerate spaces."""

import numpy as np
import torch
from gymnasium import spaces

from rlopt.nn import Critic, NetworkConfig, SquashedGaussianActor, network_options

VECTOR = spaces.Box(-1.0, 1.0, (3,), np.float32)
SMALL = NetworkConfig(hidden=(8,))


def test_a_dimension_with_equal_bounds_is_zero_in_normalised_space():
    box = spaces.Box(np.array([-2.0, 0.5], np.float32), np.array([4.0, 0.5], np.float32))
    actor = SquashedGaussianActor(VECTOR, box, network_options(SMALL))
    normalised = actor.normalise(torch.tensor([[4.0, 0.5], [1.0, 0.5], [-2.0, 0.5]]))
    assert normalised.tolist() == [[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]]
    assert actor.to_env(normalised).tolist() == [[4.0, 0.5], [1.0, 0.5], [-2.0, 0.5]]


def test_one_discrete_action_keeps_its_axis():
    assert Critic(VECTOR, SMALL, outputs=1)(torch.zeros(5, 3)).shape == (2, 5, 1)
    assert Critic(VECTOR, SMALL)(torch.zeros(5, 3)).shape == (2, 5)
