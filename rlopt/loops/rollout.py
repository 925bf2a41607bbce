"""On-policy learning: a fixed number of steps of every environment with the present policy, an update, and anew."""

from __future__ import annotations

from time import perf_counter
from typing import Any, Self

import torch
from torch import Tensor

from rlopt.agents.base import Agent
from rlopt.agents.rollout_agent import RolloutAgentConfig
from rlopt.buffers import Rollout, Transition
from rlopt.envs import Normalizer, VectorEnv
from rlopt.loops.base import Progress
from rlopt.loops.configuration import TrainConfig
from rlopt.loops.evaluation import Evaluator
from rlopt.loops.metrics import MetricSums
from rlopt.loops.stepping import OnPolicyLoop
from rlopt.types import State


class RolloutLoop(OnPolicyLoop):
    """Drives an agent that learns from rollouts: T = ``rollout_steps`` vector steps, then ``agent.update(rollout)``.

    One ``advance`` is one vector step, the last one of a rollout with its update, so that a run may be stopped, saved
    and evaluated in the middle of a rollout: its rows are part of the state. The rollout in which ``total_steps`` is
    reached is shorter, and learnt from.

    Rows that are no transition hold zeros and are not ``valid``; a vector step of none is left out.
    """

    def __init__(
        self,
        agent: Agent,
        env: VectorEnv,
        total_steps: int,
        evaluator: Evaluator | None = None,
        normalizer: Normalizer | None = None,
        seed: int = 0,
    ) -> None:
        assert isinstance(agent.config, RolloutAgentConfig)
        super().__init__(agent, env, total_steps, evaluator, normalizer, seed)
        self.config: RolloutAgentConfig = agent.config
        self.steps: list[Transition] = []
        """Those of the open rollout, as the environment gave them."""

    @classmethod
    def from_config(cls, config: TrainConfig) -> Self:
        return cls._made(config, config.num_envs, autoreset=True)

    def advance(self) -> Progress:
        begin = perf_counter()
        obs, seen = self._see()
        act = self.agent.act(seen, self.carry)
        extras = self._extras(act)
        action = act.action.to(self.env.device)
        step = self.env.step(action)
        moved = step.valid
        step, valid, count = self._accept(step)
        if count or bool(step.ended.any()):
            flags = (step.terminated, step.truncated, step.ended, valid)
            self.steps.append(Transition(obs, action, step.reward, step.next_obs, *flags, extras))
        if self.normalizer is not None:
            self.normalizer.observe_reward(step)
        episodes = list(self._go_on(act, step, moved, count).values())
        middle = perf_counter()
        metrics: MetricSums = {}
        updates = 0
        if len(self.steps) == self.config.rollout_steps or self.step >= self.total_steps:
            updates = self._learn(metrics)
        return Progress(episodes, metrics, updates, middle - begin, perf_counter() - middle)

    def _learn(self, metrics: MetricSums) -> int:
        """Learn from the open rollout and forget it; return the number of updates."""
        steps, self.steps = self.steps, []
        rollout = Rollout.of(steps)
        # A step whose rows are all transitions says so by None, on the host.
        if all(step.valid is not None for step in steps) and not bool(rollout.valid.any()):
            return 0
        return self._learn_from(rollout, metrics)

    def updates_left(self) -> float | None:
        learnt = self.step - len(self.steps) * self.each  # about: rows that are no transition count here
        if learnt <= 0:
            return None
        return self.agent.clock.updates / learnt * (self.total_steps - learnt)

    def _drop_episodes(self) -> None:
        if self.steps:
            self.steps[-1] = self.steps[-1]._replace(ended=torch.ones_like(self.steps[-1].terminated))

    def state_dict(self) -> State:
        rows: State | None = None
        if self.steps:
            open_rollout = Rollout.of(self.steps)._asdict()
            rows = {name: value for name, value in open_rollout.items() if name not in ("group", "complete")}
        return {**super().state_dict(), "rollout": rows}

    def load_state_dict(self, state: State) -> None:
        rows = state["rollout"]
        self.steps = [] if rows is None else self._steps_of(rows)
        super().load_state_dict(state)

    def _steps_of(self, rows: State) -> list[Transition]:
        """Return the steps that ``state_dict`` stacked, where they are collected."""

        def at(tree: Any, t: int, device: torch.device) -> Any:
            if isinstance(tree, Tensor):
                return tree[t].to(device)
            return {name: at(child, t, device) for name, child in tree.items()}

        home = self.env.device
        fields = {name: child for name, child in rows.items() if name != "extras"}
        return [
            Transition(**at(fields, t, home), extras=at(rows["extras"], t, self.agent.device))
            for t in range(len(rows["reward"]))
        ]
