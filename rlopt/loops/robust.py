"""Off-policy learning against an adversary that sets the simulator's parameters."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any, Self

from torch import Tensor

from rlopt.agents.base import Agent
from rlopt.agents.drpg_deep import RobustLearner, RobustOptions
from rlopt.envs import VectorEnv
from rlopt.envs.make import stepping_device
from rlopt.loops import construction
from rlopt.loops.base import Progress
from rlopt.loops.configuration import TrainConfig
from rlopt.loops.parameter_box import ParameterBox, Simulator, parametric
from rlopt.loops.replay import ReplayLoop
from rlopt.random import derive_seed
from rlopt.types import State, Step, resolve_device


class RobustLoop(ReplayLoop):
    """``ReplayLoop`` whose rows get parameters from the agent's adversary when an episode begins, and keep them to its
    end. (The first observation of an episode that ``autoreset`` began was made under the parameters of the one before.)

    Every ``adversary_every`` steps after the first update the adversary climbs: its candidates are simulated side by
    side in an environment of its own, with common random numbers. What that takes is counted apart, as
    ``adversary_steps`` of ``metrics.csv``; steps are, as ever, the transitions that are learnt from. The run's ordinary
    evaluations, and with them the best policy, are of the nominal parameters; for the whole box see
    ``rlopt.training.grid_evaluation.GridCallback`` and ``evaluate_grid``.

    Args:
        simulate: builds n environments with ``autoreset=False`` for the adversary. The rest is as for ``ReplayLoop``.
    """

    def __init__(
        self, agent: Agent, env: VectorEnv, *args: Any, simulate: Callable[[int], VectorEnv], **kwargs: Any
    ) -> None:
        super().__init__(agent, env, *args, **kwargs)
        assert isinstance(agent, RobustLearner) and isinstance(agent.config, RobustOptions)
        self.options: RobustOptions = agent.config
        self.adversary = agent.adversary
        self.box = ParameterBox.of(self.options.box)
        self.adversary.begin(self.box.nominal(parametric(env)))
        self.points: Tensor | None = None
        """(N, d) where the rows' present episodes are simulated; None before the first."""
        self.next_attack = self.config.first_update + self.options.adversary_every
        self.adversary_steps = 0
        self.last_attack: dict[str, float] = {}
        self._simulate = simulate
        self._simulator: Simulator | None = None

    @classmethod
    def from_config(cls, config: TrainConfig, **more: Any) -> Self:
        home = stepping_device(config.env.backend, resolve_device(config.device))
        simulate = lambda n: construction.environment(config, n, home, "adversary", autoreset=False)  # noqa: E731
        return super().from_config(config, simulate=simulate, **more)

    def advance(self) -> Progress:
        begin = perf_counter()
        if self.points is None:
            self.points = self.adversary.draw(self.env.num_envs)
            self._set_parameters()
        if self.options.adversary == "worst" and self.step >= self.next_attack:
            self._attack()
            self.next_attack = self.step + self.options.adversary_every
        aside = perf_counter() - begin
        progress = super().advance()
        return progress._replace(env_seconds=progress.env_seconds + aside)

    def _accept(self, step: Step) -> tuple[Step, Tensor | None, int]:
        """Rows that have begun an episode get their parameters for it."""
        accepted = super()._accept(step)
        ended = accepted[0].ended.cpu()
        if bool(ended.any()):
            assert self.points is not None
            self.points[ended] = self.adversary.draw(int(ended.sum()))
            self._set_parameters()
        return accepted

    def _set_parameters(self) -> None:
        assert self.points is not None
        parametric(self.env).set_parameters(**self.box.values(self.points))

    def _attack(self) -> None:
        """One inner ascent against the present policy, on starts that no earlier ascent has seen."""
        search = self.options.search
        if self._simulator is None:
            self._simulator = Simulator(self._simulate(search.candidates * search.episodes), self.box, search.episodes)
        simulator, before = self._simulator, self._simulator.steps
        policy, seed = self.policy(), derive_seed(self.seed, "adversary", self.adversary.ascents)
        tolerance = self.adversary.tolerance
        found = self.adversary.attack(lambda points: -simulator.returns(policy, points, seed).mean(1))
        self.adversary_steps += simulator.steps - before
        worst = self.box.values(found.point[None])
        self.last_attack = {
            "adversary_return": -found.cost,
            "adversary_rounds": float(found.rounds),
            "adversary_left": found.left,
            "adversary_tolerance": tolerance * found.spread,
            **{f"worst_{name}": float(value) for name, value in worst.items()},
        }

    def counters(self) -> dict[str, float]:
        if self.options.adversary != "worst":
            return super().counters()
        return {**super().counters(), "adversary_steps": float(self.adversary_steps), **self.last_attack}

    def state_dict(self) -> State:
        return {
            **super().state_dict(),
            "points": None if self.points is None else self.points.clone(),
            "next_attack": self.next_attack,
            "adversary_steps": self.adversary_steps,
            "last_attack": dict(self.last_attack),
        }

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.next_attack, self.adversary_steps = int(state["next_attack"]), int(state["adversary_steps"])
        self.last_attack = dict(state["last_attack"])
        self.points = None if state["points"] is None else state["points"].cpu().clone()
        if self.points is not None:
            self._set_parameters()

    def close(self) -> None:
        if self._simulator is not None:
            self._simulator.close()
        super().close()
