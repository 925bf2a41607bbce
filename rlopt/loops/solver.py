"""Model-based solving: iterations on a known model, with no environment and no buffer."""

from __future__ import annotations

import logging
from time import perf_counter
from typing import Self

from torch import Tensor

from rlopt.agents.solver_agent import SolverAgent
from rlopt.loops.base import Loop, Progress
from rlopt.loops.configuration import TrainConfig
from rlopt.loops.construction import evaluator
from rlopt.loops.evaluation import Evaluator
from rlopt.loops.metrics import MetricSums, add_metrics
from rlopt.registry import get_agent
from rlopt.types import RloptError, State, resolve_device

log = logging.getLogger(__name__)


class SolverLoop(Loop):
    """Drives an agent that solves a model; one ``advance`` is one iteration.

    ``total_steps`` is the most that are done: once the agent has converged, the loop lowers it to where it stands,
    which ends the run in the ordinary way. Resuming such a run does nothing more.
    """

    unit = "iterations"

    def __init__(self, agent: SolverAgent, total_steps: int, evaluator: Evaluator | None = None) -> None:
        super().__init__(agent, total_steps, evaluator=evaluator)
        self.agent: SolverAgent = agent

    @classmethod
    def from_config(cls, config: TrainConfig) -> Self:
        e = config.env
        if e.normalize_obs or e.normalize_reward or e.wrappers:
            raise RloptError(
                f"agent={config.agent.name} reads the model of the bare environment; leave out env.wrappers, "
                "env.normalize_obs and env.normalize_reward"
            )
        device = resolve_device(config.device)
        kind = get_agent(str(config.agent.name))
        agent = kind(kind.model_of(e.id, e.kwargs), config.agent, seed=config.seed, device=device)
        return cls(agent, config.total_steps, evaluator(config, device))

    @classmethod
    def resolve(cls, config: TrainConfig) -> TrainConfig:
        """Return ``config`` as it is: a solver reads a model and steps nothing."""
        return config

    def advance(self) -> Progress:
        begin = perf_counter()
        metrics: MetricSums = {}
        add_metrics(metrics, self.agent.update().metrics)
        self.step += 1
        self.agent.clock.env_steps = self.step
        self._stop_if_converged()
        return Progress([], metrics, 1, 0.0, perf_counter() - begin)

    def results(self) -> dict[str, Tensor]:
        return self.agent.results()

    def _stop_if_converged(self) -> None:
        if self.step < self.total_steps and self.agent.converged:
            log.info("converged after %d iterations", self.step)
            self.total_steps = self.step

    def state_dict(self) -> State:
        return {"step": self.step, "agent": self.agent.state_dict()}

    def load_state_dict(self, state: State) -> None:
        self.step = int(state["step"])
        self.agent.load_state_dict(state["agent"])
        self._stop_if_converged()
