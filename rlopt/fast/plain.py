"""Which networks the compiled updates know."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from rlopt.fast.products import Array, array
from rlopt.nn import CategoricalActor, Critic, GaussianActor, SquashedGaussianActor
from rlopt.nn.encoders import Flatten, Numbers
from rlopt.nn.networks import MLP, EnsembleLinear, EnsembleMLP

ACTOR = {"encoder", "body", "options", "own", "memory"}
PLAIN: dict[type[nn.Module], set[str]] = {
    SquashedGaussianActor: ACTOR | {"action_features", "action_shape"},
    GaussianActor: ACTOR | {"action_features", "action_shape"},
    CategoricalActor: ACTOR | {"actions", "masked", "start"},
    Critic: {"encoders", "body", "memory", "scalar"},
    Flatten: {"parts", "leaves", "out_features", "identity"},
    Numbers: {"bytes", "out_features", "axes"},
    MLP: {"layers", "norms", "activation"},
    EnsembleMLP: {"layers", "norms", "activation", "ensemble"},
    nn.Linear: {"in_features", "out_features"},
    EnsembleLinear: set(),
}
"""The modules that are written out in compiled code, and what each consists of beside its parameters."""
ACTORS = (SquashedGaussianActor, GaussianActor, CategoricalActor)
_OF_EVERY_MODULE = vars(nn.Module()).keys()


def is_plain(net: nn.Module, activations: Collection[Callable[[Tensor], Tensor]]) -> bool:
    """Return whether a network reads one vector and is a perceptron, or an ensemble of such, with biases and one of
    ``activations``."""
    for module in net.modules():
        if isinstance(module, nn.ModuleList):
            continue
        own = vars(module).keys() - _OF_EVERY_MODULE | dict(module.named_children()).keys()
        if own != PLAIN.get(type(module)) or module._forward_hooks or module._forward_pre_hooks:
            return False
        if isinstance(module, Flatten) and not module.identity:
            return False
        if isinstance(module, MLP | EnsembleMLP) and (module.activation not in activations or len(module.layers) < 2):
            return False
        if isinstance(module, nn.Linear) and module.bias is None:
            return False
        for name in ("memory", "norms"):
            if getattr(module, name, None) is not None:
                return False
    return type(net) in ACTORS or next(net.buffers(), None) is None


def plain(x: Tensor) -> Array:
    """Return contiguous float32, the one kind of array that the functions above are compiled for."""
    return array(x.to(torch.float32).contiguous())
