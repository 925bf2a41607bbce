"""Off-policy learning: step the environments, store, and update at an exact ratio."""

from __future__ import annotations

import logging
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from rlopt.agents.base import Agent, ReplayAgentConfig
from rlopt.buffers import ReplayBuffer
from rlopt.envs import Normalizer, VectorEnv
from rlopt.random import derive_seed
from rlopt.training.episodes import EpisodeCounter
from rlopt.training.evaluate import Evaluator
from rlopt.training.loop import Loop, Progress, RowLog, finite_rows, normalizer_state
from rlopt.training.metrics import Sums, add_metrics
from rlopt.types import Obs, State, Step

log = logging.getLogger(__name__)


class ReplayLoop(Loop):
    """Drives an agent that learns from a replay buffer.

    One ``advance`` is one vector step and the updates it owes: ``update_ratio = (u, s)`` means u updates for every s
    transitions after ``first_update``, as an exact integer debt that is saved with everything else.
    """

    def __init__(
        self,
        agent: Agent,
        env: VectorEnv,
        buffer: ReplayBuffer,
        total_steps: int,
        evaluator: Evaluator | None = None,
        normalizer: Normalizer | None = None,
        seed: int = 0,
        skip_nonfinite: bool = False,
    ) -> None:
        assert isinstance(agent.config, ReplayAgentConfig)
        super().__init__(agent, total_steps, env, evaluator, normalizer)
        self.env: VectorEnv = env
        self.config: ReplayAgentConfig = agent.config
        self.buffer, self.seed, self.skip_nonfinite = buffer, seed, skip_nonfinite
        self.owed = 0
        self.carry: Any = None
        self.obs: Obs | None = None
        self.counter = EpisodeCounter(env.num_envs)
        self._cut = False
        self._all = torch.ones(env.num_envs, dtype=torch.bool, device=env.device)

    def advance(self) -> Progress:
        begin = perf_counter()
        if self.obs is None:
            self.obs = self.env.reset()
        seen = self.obs if self.normalizer is None else self.normalizer.normalize_obs(self.obs)
        act = self.agent.act(seen, self.carry)
        step = self.env.step(act.action)
        step, valid, count = self._accept(step)
        with torch.no_grad():
            self.buffer.add(
                self.obs,
                act.action,
                step.reward,
                step.next_obs,
                step.terminated,
                step.truncated,
                step.reset,
                valid,
                **act.extras,
            )
        if self.normalizer is not None:
            self.normalizer.observe(step)
        episodes = self.counter.count(step)
        self.obs = step.obs
        self.carry = self.agent.reset_carry(act.carry, step.reset)
        self.step += count
        self.agent.clock.env_steps = self.step
        middle = perf_counter()

        metrics: Sums = {}
        updates = 0
        learning = self.step - max(self.step - count, self.config.first_update)
        if learning > 0:
            self.owed += learning * self.config.update_ratio[0]
            updates, self.owed = divmod(self.owed, self.config.update_ratio[1])
            for _ in range(updates):
                batch = self.buffer.sample(self.config.batch_size)
                if self.normalizer is not None:
                    batch = self.normalizer.normalize_batch(batch)
                update = self.agent.update(batch)
                self.buffer.update_priority(batch.index, update.priority)
                add_metrics(metrics, update.metrics)
        return Progress(episodes, metrics, updates, middle - begin, perf_counter() - middle)

    def _accept(self, step: Step) -> tuple[Step, Tensor | None, int]:
        """Which rows are stored: the real and finite ones, and of the last vector step only the remainder.

        Returns the step with its ``valid`` settled, ``valid`` for the buffer (None where all are), and how many count.
        """
        assert self.obs is not None
        valid = step.valid
        finite = finite_rows(self.obs) & finite_rows(step.next_obs) & step.reward.isfinite() | ~valid
        if not bool(finite.all()):
            bad_reward = bool((~step.reward.isfinite() & valid).any())
            self._bad = self._bad or ("reward" if bad_reward else "observation")
            valid = valid & finite
            if self.skip_nonfinite:
                obs = self.env.reset(mask=~finite)
                step = step._replace(obs=obs, reset=step.reset | ~finite)
        remaining = self.total_steps - self.step
        count = int(valid.sum())
        if count > remaining:
            valid = valid & (valid.cumsum(0) <= remaining)
            count = remaining
        everything = count == self.env.num_envs
        return step._replace(valid=valid), None if everything else valid, count

    def state_dict(self) -> State:
        return {
            "step": self.step,
            "owed": self.owed,
            "agent": self.agent.state_dict(),
            "buffer": self.buffer.state_dict(),
            "env": self.env.state_dict() if self.obs is not None else None,
            "begun": self.obs is not None,
            "carry": self.carry,
            "counter": self.counter.state_dict(),
            "normalizer": normalizer_state(self.normalizer),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue exactly; an environment that could not be saved begins new episodes, and no window crosses the
        cut."""
        self.step, self.owed, self.carry = int(state["step"]), int(state["owed"]), state["carry"]
        self.agent.load_state_dict(state["agent"])
        self.buffer.load_state_dict(state["buffer"])
        self.counter.load_state_dict(state["counter"])
        if self.normalizer is not None:
            self.normalizer.load_state_dict(state["normalizer"])
        if not state["begun"]:
            return
        if state["env"] is not None:
            self.obs = self.env.load_state_dict(state["env"])
            return
        log.warning("this environment cannot be saved: new episodes begin here, and the open ones are dropped")
        n = self.env.num_envs
        self.obs = self.env.reset(seeds=[derive_seed(self.seed, "env", i, "resume", self.step) for i in range(n)])
        self.carry = self.agent.reset_carry(self.carry, self._all)
        self.counter = EpisodeCounter(n)
        self._cut = True

    def after_logs(self) -> None:
        """Called once the buffer's rows are back: an empty row keeps windows from crossing a dropped episode."""
        if self._cut:
            self.buffer.add_cut()
            self._cut = False

    def row_logs(self) -> dict[str, RowLog]:
        side = {f"replay-frames-{name}": store for name, store in self.buffer.side_stores().items()}
        return {"replay": self.buffer, **side}
