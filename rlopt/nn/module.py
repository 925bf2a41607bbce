"""A network whose parameters live in one flat tensor.

The update path is a handful of operations on whole networks: one fused optimiser call, one Polyak step, one gradient
norm. Losses call a network with the parameters as an argument, so they are pure functions that ``torch.func`` can map.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rlopt.types import State

Params = dict[str, Tensor]
M = TypeVar("M", bound=nn.Module)


def build_seeded(factory: Callable[[], M], seed: int) -> M:
    """Build a module whose initial weights depend on ``seed`` alone; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every CUDA generator too
        return factory()


class Net:
    """A module and its parameters, flattened.

    ``flat`` (P,) holds all parameters; ``params`` names the leaves, each a view into ``flat``. Calling the net with
    its own ``params`` runs the module directly; with any other mapping of the same names it runs
    ``torch.func.functional_call``.
    """

    def __init__(self, module: nn.Module, device: torch.device | str = "cpu", trainable: bool = True) -> None:
        self.module = module.to(device)
        leaves = list(module.parameters())
        self.flat = torch.cat([p.detach().reshape(-1) for p in leaves])
        offset = 0
        for p in leaves:
            p.data = self.flat[offset : offset + p.numel()].view_as(p)
            p.requires_grad_(trainable)
            offset += p.numel()
        self.params: Params = dict(module.named_parameters())
        self.leaves: list[Tensor] = list(self.params.values())

    def __call__(self, params: Params, *args: Any) -> Any:
        if params is self.params:
            return self.module(*args)
        return functional_call(self.module, params, args)

    def target(self) -> Net:
        """A frozen copy with storage of its own."""
        return Net(copy.deepcopy(self.module), self.flat.device, trainable=False)

    def follow(self, source: Net, tau: float) -> None:
        """Polyak averaging: every parameter moves a fraction ``tau`` of the way to ``source``'s."""
        self.flat.lerp_(source.flat, tau)

    def state_dict(self) -> State:
        return {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}

    def load_state_dict(self, state: State) -> None:
        """Copy in place; a missing, surplus or misshapen tensor is an error."""
        self.module.load_state_dict(state, strict=True)
