"""Optimisers of other packages: ``torch:CLASS`` of ``torch.optim``, and ``pytorch_optimizer:CLASS`` of PyPI's
pytorch-optimizer (the extra ``optim``).

They step over leaves as a module has them, on the host: whether a step is taken is read there, so no graph can hold
one. What they are made of nobody here knows, so a class is tried on a few small leaves before it is used, and refused
in one line where it asks for more than gradients, draws from a global generator, or keeps what no checkpoint can hold.
"""

from __future__ import annotations

import importlib
import inspect
import json
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import repeat
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rlopt.config import hint, refuse
from rlopt.nn.module import Net
from rlopt.nn.networks import EnsembleLayerNorm, EnsembleLinear
from rlopt.nn.optim import Optimiser, OptimiserConfig
from rlopt.types import RloptError, State
from rlopt.version import install

PACKAGES = {"torch": "torch.optim", "pytorch_optimizer": "pytorch_optimizer"}
"""What may stand before the colon, and the module whose classes may stand behind it."""
TRIED = 16
"""Steps of the trial; half of them after a save."""


def make_optimiser(
    what: Net | Tensor, learning_rate: float, config: OptimiserConfig, max_grad_norm: float | None = None
) -> Optimiser:
    """Return the optimiser that ``config`` names, of a network or of one tensor, (P,) or (R, P)."""
    if ":" in config.name:
        return TorchOptimiser(what, learning_rate, config, max_grad_norm)
    return Optimiser(what.flat if isinstance(what, Net) else what, learning_rate, config, max_grad_norm)


class SteppedLeaf(NamedTuple):
    """One leaf of one run, as its optimiser steps over it."""

    parameter: nn.Parameter
    """Its own memory; what the network holds is copied into it before a step, and back after."""
    value: Tensor
    """A view of the parameters."""
    gradient: Tensor
    """A view of the gradient."""
    hidden: bool
    """Whether it is a matrix between an input and a hidden layer, or two hidden layers."""


class TorchOptimiser(Optimiser):
    """A ``torch.optim.Optimizer`` for each run, over leaves.

    Critics that are stacked are leaves of their own, and so are matrices (outputs, inputs), as in ``nn.Linear``. A
    class that wants to be told which matrices are hidden (Muon and its relatives) is: those step with the learning
    rate, the other leaves of a network with ``kwargs.adamw_lr`` where that is given.

    Raises:
        RloptError: there is no such class, it lacks an argument of ``kwargs``, or it cannot be used here.
    """

    recordable: ClassVar[bool] = False
    splits: ClassVar[bool] = False

    def __init__(
        self, what: Net | Tensor, learning_rate: float, config: OptimiserConfig, max_grad_norm: float | None = None
    ) -> None:
        self.what = what
        super().__init__(what.flat if isinstance(what, Net) else what, learning_rate, config, max_grad_norm)

    def begin(self) -> None:
        name, kwargs = self.config.name, self.config.kwargs
        _refuse_unfit(name, json.dumps(kwargs, sort_keys=True, default=str))
        self.initial_rate = self.learning_rate
        self.leaves = [_leaves(self.what, self.flat, self.grad, r) for r in range(self.count.numel())]
        self.stepping = [
            _construct(name, kwargs, [leaf.parameter for leaf in run], [leaf.hidden for leaf in run], self.initial_rate)
            for run in self.leaves
        ]
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.stepping]

    @torch.no_grad()
    def apply(self, lr: float | Tensor, ok: Tensor, learns: Tensor | None = None) -> None:
        scale = float(lr) / self.initial_rate
        idle = None if learns is None else learns.logical_not().flatten().cpu()
        for leaves, optimizer, rates, takes in zip(
            self.leaves, self.stepping, self.rates, ok.reshape(-1).tolist(), strict=True
        ):
            if not takes:
                continue
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
            for leaf in leaves:
                leaf.parameter.copy_(leaf.value)
                leaf.parameter.grad = leaf.gradient.clone(memory_format=torch.contiguous_format)
                if idle is not None and idle[leaf.value.storage_offset()]:
                    leaf.parameter.grad = None  # a leaf without a gradient is left as it is, with its state
            optimizer.step()
            for leaf in leaves:
                leaf.value.copy_(leaf.parameter)

    def state_dict(self) -> State:
        runs = [_saved(optimizer, leaves) for optimizer, leaves in zip(self.stepping, self._parameters(), strict=True)]
        return {"count": self.count.clone(), "runs": runs}

    def load_state_dict(self, state: State) -> None:
        self.count.copy_(state["count"])
        for optimizer, leaves, saved in zip(self.stepping, self._parameters(), state["runs"], strict=True):
            _restore(optimizer, leaves, saved)

    def _parameters(self) -> list[list[nn.Parameter]]:
        return [[leaf.parameter for leaf in run] for run in self.leaves]


def _leaves(what: Net | Tensor, flat: Tensor, grad: Tensor, run: int) -> list[SteppedLeaf]:
    """Return the leaves of one run, each critic's apart."""
    if not isinstance(what, Net):
        values = [(x if x.dim() == 1 else x[run]) for x in (flat, grad)]
        return [SteppedLeaf(nn.Parameter(torch.empty_like(values[0])), values[0], values[1], False)]
    owners = {id(p): owner for owner in what.module.modules() for p in owner.parameters(recurse=False)}
    pairs: list[tuple[nn.Parameter, Tensor, Tensor]] = []
    for p, *both in zip(what.module.parameters(), what.cut(flat), what.cut(grad), strict=True):
        owner = owners[id(p)]
        value, gradient = (x[run] if what.stacked else x for x in both)
        if isinstance(owner, EnsembleLinear) and p is owner.weight:
            pairs += zip(repeat(p), value.mT, gradient.mT)
        elif isinstance(owner, EnsembleLinear | EnsembleLayerNorm):
            pairs += zip(repeat(p), value.flatten(1), gradient.flatten(1))
        else:
            pairs.append((p, value, gradient))
    output = next((p for p, value, _ in reversed(pairs) if value.dim() == 2), None)
    return [
        SteppedLeaf(
            nn.Parameter(torch.empty_like(value, memory_format=torch.contiguous_format)), value, gradient,
            value.dim() == 2 and p is not output,
        )
        for p, value, gradient in pairs
    ]  # fmt: skip


# --- classes of other packages


def _find(name: str) -> type[torch.optim.Optimizer]:
    """Return the class that ``package:CLASS`` names."""
    package, _, wanted = name.partition(":")
    if package not in PACKAGES:
        raise RloptError(f"agent.optimiser.name={name}: give torch:CLASS or pytorch_optimizer:CLASS")
    try:
        module = importlib.import_module(PACKAGES[package])
    except ImportError as e:
        raise RloptError(f"agent.optimiser.name={name} needs pytorch-optimizer; {install('optim')}") from e
    base = torch.optim.Optimizer
    classes = {n: c for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, base) and c is not base}
    if wanted not in classes:
        raise RloptError(f"agent.optimiser.name={name}: no such class; {hint(wanted, list(classes))}")
    return classes[wanted]


def _construct(
    name: str, kwargs: dict[str, Any], parameters: Sequence[nn.Parameter], hidden: Sequence[bool], lr: float
) -> torch.optim.Optimizer:
    """Return an instance over ``parameters``, of which the ``hidden`` ones are matrices of hidden layers."""
    cls = _find(name)
    known = inspect.signature(cls).parameters
    if (first := next(iter(known))) != "params":
        raise _unfit(name, f"it is made of `{first}`, not of parameters")
    if "lr" not in known:
        raise _unfit(name, "it has no learning rate")
    if hasattr(cls, "train") and hasattr(cls, "eval"):
        raise _unfit(name, "it acts with other weights than it trains")
    # What goes into **kwargs unread would be ignored in silence, so it must be asked for by name somewhere.
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    source = _source(name) if open_ended else ""
    words = [p.name for p in known.values() if p.name not in ("params", "lr") and p.kind is not p.VAR_KEYWORD]
    for key in kwargs:
        if key == "lr":
            raise RloptError("agent.optimiser.kwargs.lr: the learning rate is agent.learning_rate")
        if key not in words and f"get('{key}'" not in source:
            refuse(f"agent.optimiser.kwargs.{key}", key, words, "agent.optimiser.kwargs")
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in kwargs.items()}
    groups: list[Any] = list(parameters)
    if "'use_muon'" in source:
        matrices = [p for p, inside in zip(parameters, hidden, strict=True) if inside]
        others = [p for p, inside in zip(parameters, hidden, strict=True) if not inside]
        other_rate = given.get("adamw_lr", lr) if matrices else lr
        groups = [{"params": matrices, "use_muon": True}] if matrices else []
        groups += [{"params": others, "use_muon": False, "lr": other_rate}] if others else []
    return cls(groups, lr=lr, **given)  # type: ignore[call-arg]  # torch's own base takes neither


@cache
def _source(name: str) -> str:
    """Return the text of a class and of those that it derives from in its package."""
    cls = _find(name)
    package = cls.__module__.split(".")[0]
    return "".join(inspect.getsource(c) for c in cls.__mro__ if c.__module__.split(".")[0] == package)


def _unfit(name: str, why: str) -> RloptError:
    return RloptError(f"agent.optimiser.name={name} cannot be used here: {why}; choose another optimiser")


@cache
def _refuse_unfit(name: str, kwargs: str) -> None:
    """Step over a few small leaves, save, restore and go on; ``kwargs`` are JSON.

    Raises:
        RloptError: the class asks for more than gradients (closures, gradients of gradients, a model), cannot run on
            such leaves, draws from a global generator, or does not go on exactly from what can be saved of it.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 4), (6,), (6, 6), (6,), (3, 6), (3,)]

    def make() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        fresh = torch.Generator().manual_seed(1)
        leaves = [nn.Parameter(torch.randn(shape, generator=fresh)) for shape in shapes]
        hidden = [len(shape) == 2 and shape[0] == 6 for shape in shapes]
        return leaves, _construct(name, json.loads(kwargs), leaves, hidden, 1e-3)

    def go(*both: tuple[list[nn.Parameter], torch.optim.Optimizer]) -> None:
        for _ in range(TRIED // 2):
            gradients = [torch.randn(shape, generator=generator) for shape in shapes]
            for leaves, optimizer in both:
                for leaf, gradient in zip(leaves, gradients, strict=True):
                    leaf.grad = gradient.clone()
                optimizer.step()

    try:
        with _untouched_streams(name), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one, other = make(), make()
            go(one)
            with torch.no_grad():
                for mine, theirs in zip(other[0], one[0], strict=True):
                    mine.copy_(theirs)
            _restore(other[1], other[0], _saved(one[1], one[0]))
            go(one, other)
    except RloptError:
        raise
    except Exception as e:
        told = " ".join(str(e).split())
        if "does not require grad" in told:
            told = "it needs gradients of gradients (create_graph)"
        raise _unfit(name, told or type(e).__name__) from e
    if not all(torch.equal(mine, theirs) for mine, theirs in zip(one[0], other[0], strict=True)):
        raise _unfit(name, "it does not go on exactly from its saved state")


@contextmanager
def _untouched_streams(name: str) -> Iterator[None]:
    """Put the global generators back, and refuse whatever has drawn from them."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
        drawn = not torch.equal(before[0], torch.get_rng_state()) or before[2] != random.getstate()
        drawn = drawn or str(before[1]) != str(np.random.get_state())
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
    if drawn:
        raise _unfit(name, "it draws from a global generator, which no checkpoint holds")


# --- state


def _saved(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> State:
    """Return what an optimiser keeps, of its groups what has words, as a state tree."""
    groups = []
    for group in optimizer.param_groups:
        plain = {name: value for name, value in group.items() if name != "params" and _has_words(value)}
        groups.append({name: _encoded(value) for name, value in plain.items()})
    leaves = [{name: _encoded(value) for name, value in optimizer.state.get(p, {}).items()} for p in parameters]
    return {"groups": groups, "leaves": leaves}


def _restore(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], state: State) -> None:
    for group, saved in zip(optimizer.param_groups, state["groups"], strict=True):
        group.update({name: _decoded(value, torch.device("cpu")) for name, value in saved.items()})
    optimizer.state.clear()
    for p, saved in zip(parameters, state["leaves"], strict=True):
        if saved:
            optimizer.state[p] = {name: _decoded(value, p.device) for name, value in saved.items()}


def _has_words(value: Any) -> bool:
    try:
        _encoded(value)
    except TypeError:
        return False
    return True


def _encoded(value: Any) -> Any:
    """Return a value as a state tree, in which tuples and dicts are told apart from what holds them."""
    if isinstance(value, Tensor):
        # A file keeps no strides, but a product of a matrix that lies by columns (as QR gives it) rounds otherwise.
        strides = value.stride()
        order = sorted(range(value.dim()), key=lambda i: -strides[i])
        laid = value.detach().permute(order).clone(memory_format=torch.contiguous_format)
        return laid if order == sorted(order) else {"permuted": [laid, order]}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [_encoded(x) for x in value]
    if type(value) is tuple:
        return {"tuple": [_encoded(x) for x in value]}
    if type(value) is dict and all(isinstance(name, str) for name in value):
        return {"dict": {name: _encoded(x) for name, x in value.items()}}
    raise TypeError(f"it keeps a {type(value).__name__} that cannot be saved")


def _decoded(value: Any, device: torch.device) -> Any:
    """Return what ``_encoded`` gave; tensors on ``device``, but single numbers, such as counts, where they are."""
    if isinstance(value, Tensor):
        return value.to(device).clone() if value.dim() > 0 else value.clone()
    if isinstance(value, list):
        return [_decoded(x, device) for x in value]
    if isinstance(value, dict):
        (kind, inside), *_ = value.items()
        if kind == "permuted":
            laid, order = _decoded(inside, device)
            return laid.permute([order.index(i) for i in range(len(order))])
        if kind == "tuple":
            return tuple(_decoded(x, device) for x in inside)
        return {name: _decoded(x, device) for name, x in inside.items()}
    return value
