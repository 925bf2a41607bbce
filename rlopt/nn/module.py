"""A network whose parameters live in one flat tensor.

The update path is a handful of operations on whole networks: one fused optimiser call, one Polyak step, one gradient
norm. Losses call a network with the parameters as an argument, so they are pure functions that ``torch.func`` can map.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rlopt.nn.encoders import Conv, FirstConv
from rlopt.types import State

Params = dict[str, Tensor]
M = TypeVar("M", bound=nn.Module)


def build_seeded(factory: Callable[[], M], seed: int) -> M:
    """Build a module whose initial weights depend on ``seed`` alone; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every CUDA generator too
        return factory()


class Net:
    """A module and its parameters, flattened; or R modules of one shape, one per run, and theirs.

    ``flat`` (P,) holds all parameters; ``leaves`` are views into it. ``params`` names them, and the buffers that belong
    to the module's state. Calling the net with its own ``params`` runs the module directly; with any other mapping of
    the same names it runs ``torch.func.functional_call``. Of several runs ``flat`` is (R, P) and everything in
    ``params`` (R, …); ``torch.vmap`` over it then calls the net once for all runs. Module r always sees run r's
    parameters and buffers.

    Where it ``stacks``, several runs' net may be called with its own ``params`` too, on inputs (R, …): the same numbers
    at a fraction of the cost that ``torch.vmap`` has on the host.
    """

    def __init__(
        self, modules: nn.Module | Sequence[nn.Module], device: torch.device | str = "cpu", trainable: bool = True
    ) -> None:
        self.modules = [m.to(device) for m in ([modules] if isinstance(modules, nn.Module) else modules)]
        self.module = self.modules[0]
        self.stacked = len(self.modules) > 1
        rows = torch.stack([torch.cat([p.detach().reshape(-1) for p in m.parameters()]) for m in self.modules])
        self.flat = rows if self.stacked else rows[0]
        for module, row in zip(self.modules, rows, strict=True):
            offset = 0
            for p in module.parameters():
                p.data = row[offset : offset + p.numel()].view_as(p)
                offset += p.numel()
        own = dict(self.module.named_parameters())
        learns = [trainable and p.requires_grad for p in own.values()]
        self._by_run = [list(module.parameters()) for module in self.modules]
        for parameters in self._by_run:
            for p, one in zip(parameters, learns, strict=True):
                p.requires_grad_(one)
        self.leaves: list[Tensor] = list(own.values())
        if self.stacked:
            self.leaves = [leaf.requires_grad_(one) for leaf, one in zip(self.cut(self.flat), learns, strict=True)]
        self.buffers = self._stack_buffers() if self.stacked else dict(_lasting_buffers(self.module))
        self.params: Params = {**dict(zip(own, self.leaves, strict=True)), **self.buffers}

    def _stack_buffers(self) -> dict[str, Tensor]:
        every = [dict(_lasting_buffers(module)) for module in self.modules]
        stacked = {name: torch.stack([buffers[name] for buffers in every]) for name in every[0]}
        for name, values in stacked.items():
            for buffers, value in zip(every, values, strict=True):
                buffers[name].data = value
        return stacked

    @property
    def learns(self) -> list[bool]:
        """Return for each leaf, of several runs for each run of each leaf, whether an update may move it: whether
        ``requires_grad`` is on, of the leaf and of the module's parameter."""
        if not self.stacked:
            return [leaf.requires_grad for leaf in self.leaves]
        by_leaf = zip(self.leaves, *self._by_run, strict=True)
        return [leaf.requires_grad and p.requires_grad for leaf, *runs in by_leaf for p in runs]

    @property
    def frozen(self) -> tuple[str, ...]:
        """The names of the leaves that no update may move in any run."""
        learns, runs = self.learns, len(self.modules)
        return tuple(
            name
            for i, name in zip(range(len(self.leaves)), self.params, strict=False)
            if not any(learns[i * runs : (i + 1) * runs])
        )

    def frozen_parts(self, flat: Tensor) -> list[Tensor]:
        """Return views into ``flat``, the parameters or a gradient, of all that no update may move."""
        rows = [row for leaf in self.cut(flat) for row in (leaf if self.stacked else [leaf])]
        return [row for row, learns in zip(rows, self.learns, strict=True) if not learns]

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Return ∂ loss () / ∂ leaf of every leaf; 0 where it is frozen."""
        learnt = [leaf for leaf in self.leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(loss, learnt) if learnt else ())
        return [next(found) if leaf.requires_grad else torch.zeros_like(leaf) for leaf in self.leaves]

    def cut(self, flat: Tensor) -> list[Tensor]:
        """Return a tensor like ``flat``, (P,) or (R, P), as views of the shapes of the leaves of one run, or of all."""
        shapes = [p.shape for p in self.module.parameters()]
        pieces = torch.split(flat, [shape.numel() for shape in shapes], -1)
        return [piece.view(*flat.shape[:-1], *shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def __call__(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        if params is self.params:
            return (self._beside if self.stacked else self.module)(*args, **kwargs)
        return functional_call(self.module, params, args, kwargs)

    @property
    def stacks(self) -> bool:
        """Whether one call takes all runs at once: every parameter is a linear layer's or, on a CPU, a convolution's,
        and there are no buffers. (A GPU is faster with one convolution in groups than with one of each run.)"""
        known = (nn.Linear, Conv, FirstConv) if self.flat.is_cpu else (nn.Linear,)
        modules = list(self.module.modules())
        owners = [m for m in modules if next(m.parameters(recurse=False), None) is not None]
        pools = any(isinstance(m, nn.MaxPool2d) for m in modules)  # they know no axis of runs
        return not self.buffers and not pools and all(type(m) in known for m in owners)

    @cached_property
    def _beside(self) -> nn.Module:
        """The module with the parameters of all runs."""
        if not self.stacks:
            raise TypeError(f"runs of {type(self.module).__name__} do not lie side by side; map them with torch.vmap")
        twin = copy.deepcopy(self.module)
        for own in twin.modules():
            if type(own) is nn.Linear:
                own.__class__ = _Linears
        for name, leaf in zip(dict(self.module.named_parameters()), self.leaves, strict=True):
            owner, _, last = name.rpartition(".")
            twin.get_submodule(owner)._parameters[last] = leaf  # type: ignore[assignment]
        return twin

    def target(self) -> Net:
        """Return a frozen copy with storage of its own."""
        return Net(copy.deepcopy(self.modules), self.flat.device, trainable=False)

    def follow(self, source: Net, tau: float) -> None:
        """Average (Polyak): move every parameter and floating buffer a fraction ``tau`` of the way to ``source``'s;
        buffers of whole numbers become its."""
        self.flat.lerp_(source.flat, tau)
        for name, mine in self.buffers.items():
            if mine.is_floating_point():
                mine.lerp_(source.buffers[name], tau)
            else:
                mine.copy_(source.buffers[name])

    def state_dict(self) -> State:
        """Return every tensor of the module by name; of several runs stacked, (R, …)."""
        states = [module.state_dict() for module in self.modules]
        if not self.stacked:
            return {name: tensor.detach().clone() for name, tensor in states[0].items()}
        return {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}

    def load_state_dict(self, state: State) -> None:
        """Copy in place; a missing, surplus or misshapen tensor is an error."""
        for r, module in enumerate(self.modules):
            module.load_state_dict({k: v[r] for k, v in state.items()} if self.stacked else state, strict=True)


class _Linears(nn.Linear):
    """The linear layers of R runs, weights (R, out, in), as one product: (R, …, in) to (R, …, out).

    It is Y' = W X', not Y = X W', so that the gradient of the weights lies in memory as they do: to turn it round on
    its way into the optimiser took a third of the time of a layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3:
            return self(x.flatten(1, -2)).unflatten(1, x.shape[1:-1])  # type: ignore[no-any-return]
        if self.bias is None:
            return torch.bmm(self.weight, x.mT).mT
        return torch.baddbmm(self.bias.unsqueeze(2), self.weight, x.mT).mT


def _lasting_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return the buffers that are part of the module's state: running statistics, say, and no constants."""
    lasting = module.state_dict(keep_vars=True)
    return ((name, buffer) for name, buffer in module.named_buffers() if name in lasting)
