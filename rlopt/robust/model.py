"""Robust Markov decision processes: nominal kernels, costs, and the set that the adversary chooses from."""

from __future__ import annotations

from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.robust.kernel import Kernel, normalised, told
from rlopt.robust.mdp import TabularMDP
from rlopt.robust.sets.ambiguity import Ambiguity, Backup
from rlopt.types import EnvSpec, RloptError


class RobustMDP:
    """K robust MDPs of one size, with float64 tensors on one device.

    Inside, costs are minimised and values are costs; ``sign`` is -1 where the user gave rewards, and what ``solve``
    returns is turned back.

    Args:
        kernel: nominal probabilities (S, A, S) or (K, S, A, S), or a ``Kernel`` of successor lists.
        cost: (S, A), or (S, A, S) with one entry per next *state*, with a leading K or not. Of a batched kernel with
            K = S = A the shapes (K, S, A) and (S, A, S) are one, and (K, S, A) wins: give (K, S, A, S) there.
        gamma: the discount, in [0, 1).
        ambiguity: the adversary's set, such as ``L1(0.2)``.
        initial: (S,) or (K, S) distribution of the first state (default: uniform); a sum within 1e-6 of one, as float32
            leaves it, is divided out.
        sense: ``cost`` (minimised) or ``reward`` (maximised).
        support: where the adversary may put mass: ``nominal`` (where the kernel has some), ``all``, or a mask.
        spec: what the exported policy acts on; by default one ``Discrete`` observation per instance and state,
            numbered k·S + s.
        per_successor: ``cost`` is (S, A, B) or (K, S, A, B) instead, one entry per entry of the kernel's successor
            lists. Never guessed from the shape: where B = S both would fit.

    Raises:
        RloptError: shapes that do not fit, values that are not finite, rows that are no distributions.
    """

    def __init__(
        self,
        kernel: Any,
        cost: Any,
        gamma: float,
        ambiguity: Ambiguity,
        initial: Any = None,
        sense: str = "cost",
        support: Any = "nominal",
        spec: EnvSpec | None = None,
        device: torch.device | str = "cpu",
        per_successor: bool = False,
    ) -> None:
        if not 0.0 <= gamma < 1.0:
            raise RloptError(f"gamma={gamma:g}: robust MDPs need a discount in [0, 1)")
        if sense not in ("cost", "reward"):
            raise RloptError(f"sense={sense!r}: choose cost or reward")
        self.kernel = kernel.to(device) if isinstance(kernel, Kernel) else Kernel.from_dense(kernel, support, device)
        k, s, a = self.num_instances, self.num_states, self.num_actions
        self.gamma, self.sign = float(gamma), 1.0 if sense == "cost" else -1.0
        self.cost = self.sign * self._cost(torch.as_tensor(cost, dtype=torch.float64, device=device), per_successor)
        rho = torch.as_tensor([1.0 / s] * s if initial is None else initial, dtype=torch.float64)
        if rho.shape[-1:] != (s,) or rho.ndim > 2 or (rho.ndim == 2 and len(rho) not in (1, k)):
            raise RloptError(f"initial has shape {tuple(rho.shape)}; this model needs ({s},) or ({k}, {s})")
        rho = rho.to(self.device).expand(k, s)
        start, bad = normalised(rho)
        if bool(bad.any()):
            raise RloptError(f"initial is no distribution {told(rho[int(bad.nonzero()[0])])}")
        self.initial = start.contiguous()
        self.ambiguity = ambiguity.bind(self.kernel)
        self.spec = spec or EnvSpec("robust", spaces.Discrete(k * s), spaces.Discrete(a))

    @property
    def num_instances(self) -> int:
        return self.kernel.num_instances

    @property
    def num_states(self) -> int:
        return self.kernel.num_states

    @property
    def num_actions(self) -> int:
        return self.kernel.num_actions

    @property
    def device(self) -> torch.device:
        return self.kernel.probabilities.device

    def _cost(self, cost: Tensor, per_successor: bool) -> Tensor:
        """(K, S, A, B) or (K, S, A, 1), zero in the padding."""
        if not bool(cost.isfinite().all()):
            raise RloptError("a cost is not finite; mend the model")
        k, s, a, b = self.kernel.probabilities.shape
        shape = tuple(cost.shape)
        if per_successor:
            if shape not in ((s, a, b), (k, s, a, b)):
                raise RloptError(
                    f"cost has shape {shape}; per successor this kernel needs ({s}, {a}, {b}), with a leading {k} or "
                    "not"
                )
            return cost.expand(k, s, a, b).masked_fill(~self.kernel.mask, 0.0).contiguous()
        if shape in ((s, a), (k, s, a)):
            return cost.expand(k, s, a)[..., None].contiguous()
        if shape in ((s, a, s), (k, s, a, s)):
            return self.kernel.pick(cost).contiguous()
        advice = "; or per_successor=True" if shape in ((s, a, b), (k, s, a, b)) else ""
        raise RloptError(
            f"cost has shape {shape}; this kernel needs ({s}, {a}) or ({s}, {a}, {s}), with a leading {k} or not"
            f"{advice}"
        )

    def to(self, device: torch.device | str) -> RobustMDP:
        """Return the same model with its tensors on ``device``."""
        return self.replace(self.ambiguity, device)

    def replace(self, ambiguity: Ambiguity, device: torch.device | str | None = None) -> RobustMDP:
        """Return the same nominal model with another ambiguity set."""
        other = object.__new__(RobustMDP)
        other.__dict__.update(self.__dict__)
        target = device or self.device
        other.kernel = self.kernel.to(target)
        other.cost, other.initial = self.cost.to(target), self.initial.to(target)
        other.ambiguity = ambiguity.bind(other.kernel)
        return other

    def with_gamma(self, gamma: float) -> RobustMDP:
        """Return the same model with another discount."""
        if not 0.0 <= gamma < 1.0:
            raise RloptError(f"gamma={gamma:g}: robust MDPs need a discount in [0, 1)")
        other = self.replace(self.ambiguity)
        other.gamma = float(gamma)
        return other

    @classmethod
    def from_tabular(cls, model: TabularMDP, gamma: float, ambiguity: Ambiguity, support: Any = "nominal") -> RobustMDP:
        """Return a robust model around a ``TabularMDP`` (rewards), such as one of ``from_toy_text``; spec and device
        stay.

        Rewards per next state follow the adversary's mass; expected ones (S, A) stay what they are.
        """
        return cls(model.kernel, model.reward, gamma, ambiguity, model.initial, "reward", support, model.spec,
                   model.kernel.device)  # fmt: skip

    def targets(self, value: Tensor) -> Tensor:
        """Return z (K, S, A, B) = c + γ v(s') on the successors, for a value (K, S)."""
        return self.cost + self.gamma * self.kernel.gather(value)

    def backup(self, value: Tensor, rows: bool = True) -> Backup:
        """Return the robust Bellman operator (``Ambiguity.backup``) at a value (K, S)."""
        return self.ambiguity.backup(self.cost, self.gamma, value, rows)

    def uniform_policy(self) -> Tensor:
        """Return (K, S, A) every action alike."""
        shape = (self.num_instances, self.num_states, self.num_actions)
        return torch.full(shape, 1.0 / self.num_actions, dtype=torch.float64, device=self.device)
