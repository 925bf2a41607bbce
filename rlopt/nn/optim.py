"""Optimisers by name, over flat parameters, each with the guard that keeps non-finite numbers out of the weights.

``gather(grads)``, then ``step(norm(), ok)``: one step where the boolean ``ok`` is true; where it is false, parameters
*and* state stay untouched, without the host ever reading the flag. Names with a colon are those of other packages: see
``torch_optim``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from rlopt.config import hint
from rlopt.types import Clock, RloptError, State, option

LARGE = 2**18
"""Numbers in a leaf from which on its gradient is not worth a copy."""
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """An optimiser and its constants; the learning rate is the agent's."""

    name: str = option("adam", "adam, adamw, sgd, rmsprop, rmsprop_tf; torch:CLASS, pytorch_optimizer:CLASS")
    beta1: float = option(0.9, "Adam's first-moment decay; SGD's momentum", low=0.0, high=1.0)
    beta2: float = option(0.999, "Adam's second-moment decay; that of both of RMSprop's", low=0.0, high=1.0)
    epsilon: float = option(1e-8, "added to the denominator of Adam and RMSprop", above=0.0)
    weight_decay: float = option(0.0, "decoupled weight decay (adamw) or L2 penalty (adam, sgd)", low=0.0)
    kwargs: dict[str, Any] = option(dict, "of torch:… and pytorch_optimizer:…, the class's own arguments")

    def __post_init__(self) -> None:
        # Adam divides by 1 - βᵗ inside its kernel, out of the guard's sight.
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if value >= 1.0:
                raise RloptError(f"agent.optimiser.{name}={value:g} must be below 1; the usual one is 0.9 or 0.999")
        reads: tuple[str, ...] = ("kwargs",)
        if ":" not in self.name:
            if self.name not in RULES:
                raise RloptError(f"agent.optimiser.name: no such choice '{self.name}'; {_advice(self.name)}")
            reads = RULES[self.name].reads
        for f in fields(self):
            if f.name not in ("name", *reads) and getattr(self, f.name) != getattr(OptimiserConfig, f.name, {}):
                raise RloptError(
                    f"agent.optimiser.{f.name}={getattr(self, f.name)}: {self.name} does not read it; it reads "
                    f"{', '.join(reads)}"
                )


def _advice(name: str) -> str:
    if isinstance(getattr(torch.optim, name, None), type):
        return f"did you mean torch:{name}?"
    return f"{hint(name, list(RULES))}, or torch:CLASS, or pytorch_optimizer:CLASS"


# --- rules


class Part(NamedTuple):
    """Parameters (P,) or (R, P), all of an optimiser's or some, with what belongs to them."""

    flat: Tensor
    grad: Tensor
    state: dict[str, Tensor]


Step = Callable[[Sequence[Part], Tensor, float | Tensor, Tensor], None]
"""``rule(parts, count, lr, ok)`` takes one step in place where ``ok``, () or (R,): ``count`` are the steps applied,
this one included, ``lr`` is a number or () float."""


class Rule(NamedTuple):
    """A built-in optimiser."""

    make: Callable[[OptimiserConfig], Step]
    slots: tuple[str, ...]
    """Names of its state, each as large as the parameters; zeros at first."""
    reads: tuple[str, ...]
    """The options that it reads."""


def adam(c: OptimiserConfig) -> Step:
    """Return Adam (Kingma and Ba 2015), or with decoupled weight decay AdamW (Loshchilov and Hutter 2019)."""

    def fused(parts: Sequence[Part], count: Tensor, lr: float | Tensor, skipped: Tensor) -> None:
        """One run: one pass over memory."""
        kernel = torch._fused_adam_ if c.name == "adam" else torch._fused_adamw_
        kernel(
            [x.flat for x in parts], [x.grad for x in parts], [x.state["first"] for x in parts],
            [x.state["second"] for x in parts], [], [count] * len(parts), lr=lr, beta1=c.beta1, beta2=c.beta2,
            weight_decay=c.weight_decay, eps=c.epsilon, amsgrad=False, maximize=False, grad_scale=None,
            found_inf=skipped,
        )  # fmt: skip

    def step(parts: Sequence[Part], count: Tensor, lr: float | Tensor, ok: Tensor) -> None:
        whole = parts[0]
        if count.dim() > 0 and whole.flat.device.type != "cpu":
            stacked_adam(c, whole, count, lr, ok)
            return
        if isinstance(lr, Tensor) and lr.is_cuda:
            lr = lr.float()  # all that the kernel reads there
        for some, counted, skipped in _by_run(parts, count, ok):
            fused(some, counted, lr, skipped)

    return step


def stacked_adam(c: OptimiserConfig, x: Part, count: Tensor, lr: float | Tensor, ok: Tensor) -> None:
    """Step all runs at once, on a device where every call costs a launch; the fused kernel knows one skip flag only."""
    grad = x.grad if c.name == "adamw" else x.grad + c.weight_decay * x.flat
    first = torch.lerp(x.state["first"], grad, 1.0 - c.beta1)
    second = torch.lerp(x.state["second"], grad * grad, 1.0 - c.beta2)
    count = count.unsqueeze(-1).clamp(min=1.0)
    size = (second / (1.0 - c.beta2**count)).sqrt_().add_(c.epsilon)
    moved = x.flat * (1.0 - lr * c.weight_decay) if c.name == "adamw" else x.flat
    moved = moved - lr / (1.0 - c.beta1**count) * first / size
    _put(ok, {"first": first, "second": second}, x.state)
    torch.where(ok.unsqueeze(-1), moved, x.flat, out=x.flat)


def sgd(c: OptimiserConfig) -> Step:
    """Return gradient descent with momentum, as torch has it."""

    def step(parts: Sequence[Part], count: Tensor, lr: float | Tensor, ok: Tensor) -> None:
        if not _kernels(ok):
            stacked_sgd(c, parts, lr, ok)
            return
        for some, _, skipped in _by_run(parts, count, ok):
            torch._fused_sgd_(
                [x.flat for x in some], [x.grad for x in some], [x.state["first"] for x in some if c.beta1], lr=lr,
                momentum=c.beta1, weight_decay=c.weight_decay, dampening=0.0, nesterov=False, maximize=False,
                is_first_step=False, grad_scale=None, found_inf=skipped,
            )  # fmt: skip

    return step


def stacked_sgd(c: OptimiserConfig, parts: Sequence[Part], lr: float | Tensor, ok: Tensor) -> None:
    """Step all runs at once, as ``stacked_adam``."""
    for flat, grad, state in parts:
        _put(ok, {"first": c.beta1 * state["first"] + (grad + c.weight_decay * flat)}, state)
        torch.where(ok.unsqueeze(-1), flat - lr * state["first"], flat, out=flat)


def _by_run(parts: Sequence[Part], count: Tensor, ok: Tensor) -> Iterator[tuple[Sequence[Part], Tensor, Tensor]]:
    """Yield each run's parts and count, and 1 where it skips the step: what torch's fused kernels take."""
    skipped = ok.logical_not().to(parts[0].flat.dtype)
    if count.dim() == 0:
        yield parts, count, skipped
        return
    flat, grad, state = parts[0]
    for r in range(len(count)):
        yield [Part(flat[r], grad[r], {name: x[r] for name, x in state.items()})], count[r], skipped[r]


def rmsprop(c: OptimiserConfig) -> Step:
    """Return centred RMSprop (Graves 2013, arXiv 1308.0850, eq. 38 to 41, without momentum): the gradient over its
    standard deviation.

    ``rmsprop`` adds ε to the root, as torch does; ``rmsprop_tf`` under it, as TensorFlow, Optax and so the published
    DQN do.
    """

    def step(parts: Sequence[Part], count: Tensor, lr: float | Tensor, ok: Tensor) -> None:
        if _kernels(ok) and parts[0].flat.dtype == torch.float32:
            compiled_rmsprop(c, parts, lr, ok)
            return
        for flat, grad, state in parts:
            mean = torch.lerp(state["first"], grad, 1.0 - c.beta2)
            square = torch.lerp(state["second"], grad * grad, 1.0 - c.beta2)
            variance = (square - mean * mean).clamp_(min=0.0)  # rounding may have left less than nothing
            size = (variance + c.epsilon).sqrt_() if c.name == "rmsprop_tf" else variance.sqrt_().add_(c.epsilon)
            _put(ok, {"first": mean, "second": square}, state)
            torch.where(ok.unsqueeze(-1), flat - lr * grad / size, flat, out=flat)

    return step


def _kernels(ok: Tensor) -> bool:
    """Return whether SGD and RMSprop step by kernels of the CPU, whose last bits are not those of the lines here."""
    return ok.is_cpu


def compiled_rmsprop(c: OptimiserConfig, parts: Sequence[Part], lr: float | Tensor, ok: Tensor) -> None:
    """Step float32 parameters on a CPU, in one pass over memory; reading ``ok`` and ``lr`` waits for nothing there."""
    from rlopt.nn.rmsprop_loops import rmsprop as loops  # numba takes a second to load

    going, rate = ok.view(-1).numpy(), float(lr)
    inside, outside = (c.epsilon, 0.0) if c.name == "rmsprop_tf" else (0.0, c.epsilon)
    for flat, grad, state in parts:
        arrays = [x.detach().view(len(going), -1).numpy() for x in (flat, grad, state["first"], state["second"])]
        loops(*arrays, going, rate, c.beta2, inside, outside)
        torch.autograd.graph.increment_version(flat)  # a loss that is older cannot be differentiated any more


def _put(ok: Tensor, new: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    for name, value in new.items():
        torch.where(ok.unsqueeze(-1), value, state[name], out=state[name])


MOMENTS, OF_ADAM = ("first", "second"), ("beta1", "beta2", "epsilon", "weight_decay")
RULES: dict[str, Rule] = {
    "adam": Rule(adam, MOMENTS, OF_ADAM),
    "adamw": Rule(adam, MOMENTS, OF_ADAM),
    "sgd": Rule(sgd, ("first",), ("beta1", "weight_decay")),
    "rmsprop": Rule(rmsprop, MOMENTS, ("beta2", "epsilon")),
    "rmsprop_tf": Rule(rmsprop, MOMENTS, ("beta2", "epsilon")),
}


# --- what agents use


@dataclass(frozen=True)
class Schedule:
    """A factor in [0, 1] on the learning rate, read from the clock's environment steps."""

    kind: str = "constant"
    steps: int | None = None
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.kind != "constant" and not self.steps:
            raise RloptError(f"lr_schedule={self.kind} needs schedule_steps, the steps over which it decays")

    def factor(self, clock: Clock) -> float:
        if self.kind == "constant":
            return 1.0
        assert self.steps
        x = min(clock.steps / self.steps, 1.0)
        shape = 1.0 - x if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * x))
        return self.final + (1.0 - self.final) * shape


class Optimiser:
    """One optimiser over one flat tensor (P,), or R independent ones over (R, P): each run has its own norm, clipping,
    count of steps and skip mask.

    Raises:
        RloptError: no built-in rule has the configuration's name.
    """

    recordable: ClassVar[bool] = True
    """Whether a step can be part of a graph."""
    splits: ClassVar[bool] = True
    """Whether the rule may be applied to a part of the parameters at a time."""

    def __init__(self, flat: Tensor, learning_rate: float, config: OptimiserConfig, max_grad_norm: float | None = None):
        self.flat = flat
        self.learning_rate = learning_rate
        self.config = config
        self.max_grad_norm = max_grad_norm
        self.grad = torch.zeros_like(flat)
        self.count = torch.zeros(flat.shape[:-1], device=flat.device)
        """Steps applied (skipped ones excluded), () or (R,)."""
        self.state: dict[str, Tensor] = {}
        self.begin()
        self.parts = self._whole = [Part(flat, self.grad, self.state)]
        self._cuts: list[tuple[bool, Part]] = []
        self._small: list[Tensor] = []

    def begin(self) -> None:
        """Make the state of a fresh optimiser."""
        rule = RULES.get(self.config.name)
        if rule is None:
            raise RloptError(f"agent.optimiser.name={self.config.name}: no such rule; {_advice(self.config.name)}")
        self.rule = rule.make(self.config)
        self.state = {name: torch.zeros_like(self.flat) for name in rule.slots}

    def gather(self, grads: Sequence[Tensor]) -> None:
        """Take the gradients of the leaves, flat in ``self.grad``; of one run on a CPU those of large leaves stay where
        they are until the step, and ``self.grad`` does not have them."""
        large = [g for g in grads if g.numel() >= LARGE]
        if not large or not self.splits or self.count.dim() or not self.flat.is_cpu:
            torch.cat([g.reshape(*self.count.shape, -1) for g in grads], -1, out=self.grad)
            return
        if not self._cuts:
            self._cut(grads)
        if self._small:
            torch._foreach_copy_(self._small, [g for g in grads if g.numel() < LARGE])
        stay = iter(large)
        self.parts = [
            x._replace(grad=next(stay).reshape(-1).contiguous()) if is_large else x for is_large, x in self._cuts
        ]

    def _cut(self, leaves: Sequence[Tensor]) -> None:
        """Cut the parameters at their large leaves, and find where the gradients of the others go."""
        place = 0
        for is_large, some in groupby(leaves, lambda leaf: leaf.numel() >= LARGE):
            for together in [[leaf] for leaf in some] if is_large else [list(some)]:
                sizes = [leaf.numel() for leaf in together]
                where = slice(place, place := place + sum(sizes))
                part = Part(self.flat[where], self.grad[where], {name: x[where] for name, x in self.state.items()})
                self._cuts.append((is_large, part))
                if not is_large:
                    pieces = zip(torch.split(part.grad, sizes), together, strict=True)
                    self._small += [piece.view(leaf.shape) for piece, leaf in pieces]

    def norm(self) -> Tensor:
        """Return the Euclidean norm of the gradient, () or (R,)."""
        norms: list[Tensor] = [torch.linalg.vector_norm(grad, dim=-1) for _, grad, _ in self.parts]
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))

    def step(self, norm: Tensor, ok: Tensor, factor: float | Tensor = 1.0, learns: Tensor | None = None) -> None:
        """Apply the gathered gradient, clipped to ``max_grad_norm``, where ``ok``; ``factor`` scales the learning
        rate. ``norm`` and ``ok`` are () or (R,); parameters where ``learns``, bool like them, is false stay, and so
        does their state."""
        if self.max_grad_norm is not None:
            scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0).unsqueeze(-1)
            if self.parts is self._whole:
                self.grad.mul_(scale)
            else:  # what autograd gave may be another leaf's gradient, too
                self.parts = [x._replace(grad=x.grad * scale) for x in self.parts]
        self.count.add_(ok)
        self.apply(self.learning_rate * factor, ok, learns)
        self.parts = self._whole

    def apply(self, lr: float | Tensor, ok: Tensor, learns: Tensor | None = None) -> None:
        """Take the step with the learning rate ``lr`` where ``ok`` and ``learns``."""
        whole = () if learns is None else (self.flat, *self.state.values())
        before = [x.clone() for x in whole]
        self.rule(self.parts, self.count, lr, ok)
        for x, old in zip(whole, before, strict=True):
            torch.where(learns, x, old, out=x)  # type: ignore[arg-type]

    def state_dict(self) -> State:
        return {"count": self.count.clone(), **{name: x.clone() for name, x in self.state.items()}}

    def load_state_dict(self, state: State) -> None:
        self.count.copy_(state["count"])
        for name, x in self.state.items():
            x.copy_(state[name])
