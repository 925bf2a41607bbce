"""Ambiguity sets: what the adversary may do to the rows of a nominal kernel. One protocol for all of them.

A set is made with plain numbers (``L1(0.2)``) and *bound* to a nominal kernel by ``RobustMDP``, which lays its
parameters out on the kernel's successors. The adversary maximises: costs are minimised by the policy. z (K, S, A, B)
stands for c(s, a, s') + γ v(s') on the successors throughout.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from rlopt.robust.kernel import Kernel
from rlopt.types import RloptError

Self = TypeVar("Self", bound="Ambiguity")


class Backup(NamedTuple):
    """One robust Bellman backup."""

    value: Tensor
    """(K, S) min over policies of the state of max over kernels of the state."""
    policy: Tensor
    """(K, S, A) a minimiser."""
    rows: Tensor | None
    """(K, S, A, B) the adversary's side of the saddle point, where asked for: rows of the set, worth ``value`` to the
    best of the state's actions, both up to rounding, also where targets are all but equal."""


class Ambiguity(ABC):
    """The product of one set per (s, a) (``rectangular = "sa"``) or per state (``"s"``)."""

    rectangular: ClassVar[str] = "sa"
    kernel: Kernel

    def bind(self: Self, kernel: Kernel) -> Self:
        """Return this set around the rows of ``kernel``, as a copy; its parameters are spread to the kernel's shape."""
        bound = copy.copy(self)
        bound.kernel = kernel
        bound._spread()
        return bound

    @abstractmethod
    def _spread(self) -> None:
        """Check the parameters and lay them out on ``self.kernel``."""

    def worst(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the support function of every row, max_p p·z as (K, S, A), and rows (K, S, A, B) that attain it.

        An s-rectangular set has no such thing and raises RloptError.
        """
        raise RloptError(f"{type(self).__name__} couples the actions of a state; ask respond(z, policy) instead")

    def respond(self, z: Tensor, policy: Tensor) -> Tensor:
        """Return rows (K, S, A, B) that maximise Σ_a π(a|s) p_sa·z_sa in every state, for a policy (K, S, A)."""
        return self.worst(z)[1]

    def backup(self, cost: Tensor, gamma: float, value: Tensor, rows: bool = True) -> Backup:
        """Return the robust Bellman operator at ``value`` (K, S): min_x max_p Σ_a x_a p_sa·(c_sa + γ v), with its
        saddle.

        ``cost`` is (K, S, A, B) or (K, S, A, 1). Without ``rows`` the kernel's side is left out, which is cheaper.
        """
        worst, found = self.worst(cost + gamma * self.kernel.gather(value))
        best, action = worst.min(-1)
        policy = torch.zeros_like(worst).scatter_(-1, action[..., None], 1.0)
        return Backup(best, policy, found if rows else None)

    @abstractmethod
    def project(self, y: Tensor) -> Tensor:
        """Return the nearest rows (K, S, A, B) of the set to y, in the Euclidean norm."""

    @abstractmethod
    def excess(self, rows: Tensor) -> Tensor:
        """Return how far rows (K, S, A, B) lie outside: (K, S, A) or (K, S), at most 0 inside, in the set's own
        measure."""

    def per_row(self, given: Any, name: str, high: float = float("inf")) -> Tensor:
        """Return a parameter of every row as (K, S, A); RloptError where it does not fit or lies outside [0, high]."""
        k = self.kernel
        return _spread_to(given, (k.num_instances, k.num_states, k.num_actions), name, k, high)

    def per_state(self, given: Any, name: str) -> Tensor:
        """Return a parameter of every state as (K, S)."""
        return _spread_to(given, (self.kernel.num_instances, self.kernel.num_states), name, self.kernel, float("inf"))


class Nominal(Ambiguity):
    """No ambiguity: the nominal kernel alone. Robust methods on it are the ordinary ones."""

    def _spread(self) -> None: ...

    def worst(self, z: Tensor) -> tuple[Tensor, Tensor]:
        p = self.kernel.probabilities
        return (p * z).sum(-1), p

    def backup(self, cost: Tensor, gamma: float, value: Tensor, rows: bool = True) -> Backup:
        from rlopt.robust import sweeps

        if sweeps.usable(value):
            best, policy = sweeps.plain_sweep(self.kernel, cost, gamma, value)
            return Backup(best, policy, self.kernel.probabilities if rows else None)
        return super().backup(cost, gamma, value, rows)

    def project(self, y: Tensor) -> Tensor:
        return self.kernel.probabilities.expand_as(y)

    def excess(self, rows: Tensor) -> Tensor:
        return (rows - self.kernel.probabilities).abs().sum(-1)


def _spread_to(given: Any, shape: tuple[int, ...], name: str, kernel: Kernel, high: float) -> Tensor:
    x = torch.as_tensor(given, dtype=torch.float64, device=kernel.probabilities.device)
    try:
        x = x.expand(shape).contiguous()
    except RuntimeError as e:
        raise RloptError(f"{name} has shape {tuple(x.shape)}; it must be a number or spread to {shape}") from e
    if not bool(((x >= 0.0) & (x <= high)).all()):
        raise RloptError(f"{name} must lie between 0 and {high:g}, not {float(x.min()):g} … {float(x.max()):g}")
    return x
