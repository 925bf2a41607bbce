"""Networks, distributions and optimisers."""

from rlopt.nn.actors import (
    Actor,
    CategoricalActor,
    SquashedGaussianActor,
    TabularActor,
    make_actor,
    network_options,
    register_actor,
)
from rlopt.nn.module import Net, Params, build_seeded
from rlopt.nn.networks import PRECISIONS, Critic, NetworkConfig, hidden_products, make_encoder, register_encoder
from rlopt.nn.optim import Optimiser, OptimiserConfig, Schedule

__all__ = [
    "PRECISIONS",
    "Actor",
    "CategoricalActor",
    "Critic",
    "Net",
    "NetworkConfig",
    "Optimiser",
    "OptimiserConfig",
    "Params",
    "Schedule",
    "SquashedGaussianActor",
    "TabularActor",
    "build_seeded",
    "hidden_products",
    "make_actor",
    "make_encoder",
    "network_options",
    "register_actor",
    "register_encoder",
]
