"""Networks, distributions and optimisers."""

from rlopt.nn.actors import (
    Actor,
    DeterministicActor,
    GaussianActor,
    SquashedGaussianActor,
    make_actor,
    register_actor,
)
from rlopt.nn.choices import ChoiceTable
from rlopt.nn.discrete_actors import CategoricalActor, MultiCategoricalActor, TabularActor
from rlopt.nn.encoders import make_encoder, register_encoder
from rlopt.nn.module import Net, Params, build_seeded
from rlopt.nn.networks import PRECISIONS, NetworkConfig, hidden_products, network_options
from rlopt.nn.optim import RULES, Optimiser, OptimiserConfig, Schedule
from rlopt.nn.q_actor import QActor
from rlopt.nn.torch_optim import make_optimiser
from rlopt.nn.values import Critic

__all__ = [
    "PRECISIONS",
    "RULES",
    "Actor",
    "CategoricalActor",
    "ChoiceTable",
    "Critic",
    "DeterministicActor",
    "GaussianActor",
    "MultiCategoricalActor",
    "Net",
    "NetworkConfig",
    "Optimiser",
    "OptimiserConfig",
    "Params",
    "QActor",
    "Schedule",
    "SquashedGaussianActor",
    "TabularActor",
    "build_seeded",
    "hidden_products",
    "make_actor",
    "make_encoder",
    "make_optimiser",
    "network_options",
    "register_actor",
    "register_encoder",
]
