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
from rlopt.envs.make import stepping_device
from rlopt.loops import construction
from rlopt.loops.base import Progress
from rlopt.loops.configuration import TrainConfig
from rlopt.loops.evaluation import Evaluator
from rlopt.loops.metrics import MetricSums, add_metrics
from rlopt.loops.stepping import SteppingLoop
from rlopt.registry import get_agent
from rlopt.types import Obs, State, map_obs, on_device, resolve_device


class RolloutLoop(SteppingLoop):
    """Drives an agent that learns from rollouts: T = ``rollout_steps`` vector steps, then ``agent.update(rollout)``.

    One ``advance`` is one vector step, the last one of a rollout with its update, so that a run may be stopped, saved
    and evaluated in the middle of a rollout: its rows are part of the state. The rollout in which ``total_steps`` is
    reached is shorter, and learnt from.

    Statistics of observations stand still from the first step of a rollout to the last epoch of its update (they grow
    by all of its observations afterwards), so that the policy that learns is the one that acted: before the first
    gradient step the ratio of their probabilities is 1. The first rollout is seen as it is. Rewards are scaled once
    the rollout is complete, by statistics that know them.

    Rows that are no transition hold zeros and are not ``valid``; a vector step of none is left out.
    """

    modes = ("num_envs",)

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
        device, options = resolve_device(config.device), config.agent
        home = stepping_device(config.env.backend, device)
        env = construction.environment(config, config.num_envs, home, "env", autoreset=True)
        try:
            agent = get_agent(str(options.name))(env.spec, options, seed=config.seed, device=device)
            normalizer = construction.normalizer(config, env, options.gamma, device)
            evaluator = construction.evaluator(config, device)
            return cls(agent, env, config.total_steps, evaluator, normalizer, config.seed)
        except BaseException:
            env.close()
            raise

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
        episodes = self._go_on(act, step, moved, count)
        middle = perf_counter()
        metrics: MetricSums = {}
        updates = 0
        if len(self.steps) == self.config.rollout_steps or self.step >= self.total_steps:
            updates = self._learn(metrics)
        return Progress(episodes, metrics, updates, middle - begin, perf_counter() - middle)

    def _learn(self, metrics: MetricSums) -> int:
        """Learn from the open rollout and forget it; return the number of updates."""
        steps, self.steps = self.steps, []
        raw = rollout = Rollout.of(steps).map(lambda x: on_device(x, self.agent.device))
        if any(step.valid is not None for step in steps):
            rollout = _without_gaps(rollout)
            if not bool(rollout.valid.any()):
                return 0
        rollout = rollout.transformed(self.config.reward)
        if self.normalizer is not None:
            rollout = self.normalizer.normalize_batch(rollout)
        before = self.agent.clock.updates
        add_metrics(metrics, self.agent.update(rollout).metrics)
        if self.normalizer is not None:
            self.normalizer.observe_obs(map_obs(lambda x: x.flatten(0, 1), raw.obs), raw.valid.flatten())
        return self.agent.clock.updates - before

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


def _without_gaps(rollout: Rollout) -> Rollout:
    """Return the rollout with zeros where a row is no transition: what is there may not even be finite."""
    valid = rollout.valid

    def cleaned(x: Tensor) -> Tensor:
        return torch.where(valid.view(*valid.shape, *[1] * (x.ndim - 2)), x, torch.zeros_like(x))

    def observed(obs: Obs | None) -> Obs | None:
        return None if obs is None else map_obs(cleaned, obs)

    return rollout._replace(
        obs=map_obs(cleaned, rollout.obs),
        next_obs=observed(rollout.next_obs),
        action=cleaned(rollout.action),
        reward=cleaned(rollout.reward),
        extras={name: cleaned(value) for name, value in rollout.extras.items()},
    )
