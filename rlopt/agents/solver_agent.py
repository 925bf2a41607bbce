"""What the agents have in common that solve a model instead of learning from experience."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rlopt.agents.base import Agent
from rlopt.nn import Net, TabularActor
from rlopt.policy import Policy
from rlopt.robust import TabularMDP, from_toy_text
from rlopt.types import Act, Carry, Obs, RloptError, Update, resolve_device


class SolverAgent(Agent):
    """Base of the agents that ``SolverLoop`` drives: ``update(None)`` is one iteration on the model.

    ``SolverAgent(model, config, seed=0, device="cpu")``. The model is no part of the saved state: it comes from the
    configuration, like an environment.
    """

    loop: ClassVar[str] = "solver"
    models: ClassVar[tuple[type, ...]] = (TabularMDP,)
    """Kinds of model it solves; each has a ``spec`` and can be moved ``to`` a device."""

    def __init__(
        self, model: Any, *args: Any, seed: int = 0, device: torch.device | str = "cpu", config: Any = None
    ) -> None:
        if not isinstance(model, self.models):
            names = " or ".join(kind.__name__ for kind in self.models)
            raise RloptError(f"{type(self).__name__} solves a {names}, not a {type(model).__name__}; see from_toy_text")
        found: Any = model  # of one of ``models``, which mypy cannot read
        self.model = found.to(resolve_device(device))
        super().__init__(found.spec, *args, seed=seed, device=device, config=config)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        other = type(self)(self.model, config=self.config, seed=self.seed, device=self.device)
        other.load_state_dict(self.state_dict())
        memo[id(self)] = other
        return other

    @classmethod
    def model_of(cls, env_id: str, kwargs: Mapping[str, Any]) -> Any:
        """Return the model of an environment, as this agent takes it; RloptError where that shows none."""
        return from_toy_text(env_id, kwargs)

    def build_table(self) -> None:
        """Make ``table``, the policy: probabilities of actions in every state."""
        self.table = TabularActor(self.spec.observation_space, self.spec.action_space, {})
        self.actor = self.persist("actor", Net(self.table, self.device, trainable=False))

    @property
    def policy(self) -> Policy:
        return Policy(self.spec, self.table)

    def act(self, obs: Obs, carry: Carry = None, deterministic: bool = False) -> Act:
        """Return actions (N,) for states (N,)."""
        return Act(*self.table.act(obs, carry, deterministic, self.act_generator))

    def update(self, batch: None = None) -> Update:
        """Do one iteration; there is no batch."""
        raise NotImplementedError

    def results(self) -> dict[str, Tensor]:
        """Return what is worth keeping beside the policy, by name."""
        return {}

    @property
    def converged(self) -> bool:
        """Whether further iterations would change nothing that was asked for. Waits for the device."""
        raise NotImplementedError
