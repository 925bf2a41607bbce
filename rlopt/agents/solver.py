"""What the agents have in common that solve a model instead of learning from experience."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from rlopt.agents.base import Agent
from rlopt.robust import TabularMDP
from rlopt.types import RloptError, Update


class SolverAgent(Agent):
    """Base of the agents that ``SolverLoop`` drives: ``update(None)`` is one iteration on the model.

    ``SolverAgent(model, config, seed=0, device="cpu")``. The model is no part of the saved state: it comes from the
    configuration, like an environment.
    """

    loop: ClassVar[str] = "solver"

    def __init__(
        self, model: TabularMDP, *args: Any, seed: int = 0, device: torch.device | str = "cpu", config: Any = None
    ) -> None:
        if not isinstance(model, TabularMDP):
            raise RloptError(
                f"{type(self).__name__} solves a TabularMDP, not a {type(model).__name__}; see from_toy_text"
            )
        self.model = model
        super().__init__(model.spec, *args, seed=seed, device=device, config=config)
        self.model = model.to(self.device)

    def update(self, batch: None = None) -> Update:
        """One iteration; there is no batch."""
        raise NotImplementedError

    @property
    def converged(self) -> bool:
        """Whether further iterations would change nothing that was asked for. Waits for the device."""
        raise NotImplementedError
