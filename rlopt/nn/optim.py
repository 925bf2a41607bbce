"""Optimisers by name, over flat parameters, each with the guard that keeps non-finite numbers out of the weights.

``gather(grads)``, then ``step(norm(), ok)``: one step where the 0-d boolean ``ok`` is true; where it is false,
parameters *and* state stay untouched, without the host ever reading the flag.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlopt.types import Clock, RloptError, State, option

OPTIMISERS = ("adam", "adamw", "sgd")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """An optimiser and its constants; the learning rate is the agent's."""

    name: str = option("adam", "optimiser", choices=OPTIMISERS)
    beta1: float = option(0.9, "Adam's first-moment decay; SGD's momentum", low=0.0, high=1.0)
    beta2: float = option(0.999, "Adam's second-moment decay", low=0.0, high=1.0)
    epsilon: float = option(1e-8, "added to Adam's denominator", above=0.0)
    weight_decay: float = option(0.0, "decoupled weight decay (adamw) or L2 penalty (adam, sgd)", low=0.0)

    def __post_init__(self) -> None:
        # Adam divides by 1 - βᵗ inside its kernel, out of the guard's sight.
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if value >= 1.0:
                raise RloptError(f"agent.optimiser.{name}={value:g} must be below 1; the usual one is 0.9 or 0.999")


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
        x = min(clock.env_steps / self.steps, 1.0)
        shape = 1.0 - x if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * x))
        return self.final + (1.0 - self.final) * shape


class Optimiser:
    """One optimiser over one flat tensor (P,), or R independent ones over (R, P): each run has its own norm, clipping,
    count of steps and skip mask."""

    def __init__(self, flat: Tensor, learning_rate: float, config: OptimiserConfig, max_grad_norm: float | None = None):
        self.flat = flat
        self.learning_rate = learning_rate
        self.config = config
        self.max_grad_norm = max_grad_norm
        self.grad = torch.zeros_like(flat)
        self.count = torch.zeros(flat.shape[:-1], device=flat.device)
        """Steps applied (skipped ones excluded), () or (R,)."""
        self.first = torch.zeros_like(flat)
        self.second = torch.zeros_like(flat) if config.name != "sgd" else torch.zeros(0, device=flat.device)

    def gather(self, grads: Sequence[Tensor]) -> None:
        """Flatten the gradients of the leaves into ``self.grad``."""
        torch.cat([g.reshape(*self.count.shape, -1) for g in grads], -1, out=self.grad)

    def norm(self) -> Tensor:
        """Euclidean norm of the gradient, () or (R,)."""
        norm: Tensor = torch.linalg.vector_norm(self.grad, dim=-1)
        return norm

    def step(self, norm: Tensor, ok: Tensor, factor: float | Tensor = 1.0) -> None:
        """Apply the gathered gradient, clipped to ``max_grad_norm``, where ``ok``; ``factor`` scales the learning
        rate. ``norm`` and ``ok`` are () or (R,)."""
        if self.max_grad_norm is not None:
            self.grad.mul_((self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0).unsqueeze(-1))
        c, lr = self.config, self.learning_rate * factor
        if isinstance(lr, Tensor) and lr.is_cuda:
            lr = lr.float()  # all that the fused kernels read there
        skipped = ok.logical_not().to(self.flat.dtype)
        self.count.add_(1.0 - skipped)
        if c.name == "sgd":
            self._sgd(ok.unsqueeze(-1), lr)
        elif self.count.dim() == 0:
            self._fused_adam(self.flat, self.grad, self.first, self.second, self.count, skipped, lr)
        elif self.flat.device.type == "cpu":
            every = (self.flat, self.grad, self.first, self.second, self.count, skipped)
            for flat, grad, first, second, count, skip in zip(*every, strict=True):
                self._fused_adam(flat, grad, first, second, count, skip, lr)
        else:
            self._stacked_adam(ok.unsqueeze(-1), lr)

    def _sgd(self, ok: Tensor, lr: float | Tensor) -> None:
        decayed = self.grad + self.config.weight_decay * self.flat
        velocity = self.config.beta1 * self.first + decayed
        torch.where(ok, velocity, self.first, out=self.first)
        torch.where(ok, self.flat - lr * self.first, self.flat, out=self.flat)

    def _fused_adam(
        self,
        flat: Tensor,
        grad: Tensor,
        first: Tensor,
        second: Tensor,
        count: Tensor,
        skipped: Tensor,
        lr: float | Tensor,
    ) -> None:
        """One run: one pass over memory."""
        c = self.config
        kernel = torch._fused_adam_ if c.name == "adam" else torch._fused_adamw_
        kernel(
            [flat], [grad], [first], [second], [], [count], lr=lr, beta1=c.beta1, beta2=c.beta2,
            weight_decay=c.weight_decay, eps=c.epsilon, amsgrad=False, maximize=False, grad_scale=None,
            found_inf=skipped,
        )  # fmt: skip

    def _stacked_adam(self, ok: Tensor, lr: float | Tensor) -> None:
        """All runs at once on a device where every call costs a launch; the fused kernel knows one skip flag only."""
        c = self.config
        grad = self.grad if c.name == "adamw" else self.grad + c.weight_decay * self.flat
        first = torch.lerp(self.first, grad, 1.0 - c.beta1)
        second = torch.lerp(self.second, grad * grad, 1.0 - c.beta2)
        count = self.count.unsqueeze(-1).clamp(min=1.0)
        size = (second / (1.0 - c.beta2**count)).sqrt_().add_(c.epsilon)
        moved = self.flat * (1.0 - lr * c.weight_decay) if c.name == "adamw" else self.flat
        moved = moved - lr / (1.0 - c.beta1**count) * first / size
        torch.where(ok, first, self.first, out=self.first)
        torch.where(ok, second, self.second, out=self.second)
        torch.where(ok, moved, self.flat, out=self.flat)

    def state_dict(self) -> State:
        return {"count": self.count.clone(), "first": self.first.clone(), "second": self.second.clone()}

    def load_state_dict(self, state: State) -> None:
        for name in ("count", "first", "second"):
            getattr(self, name).copy_(state[name])
