"""Off-policy learning: step the environments, store, and update at an exact ratio."""

from __future__ import annotations

import logging
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from time import perf_counter
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor

from rlopt.agents.base import Agent, ReplayAgentConfig
from rlopt.buffers import ReplayBuffer, Sampler
from rlopt.buffers.samplers.per_run import RunSamplers
from rlopt.config import changed
from rlopt.envs import Normalizer, VectorEnv
from rlopt.envs.make import stepping_device
from rlopt.loops import construction
from rlopt.loops.base import Loop, Progress, finite_rows, normalizer_state
from rlopt.loops.captured import CapturedUpdate, has_graphs, why_eager
from rlopt.loops.configuration import TrainConfig, schedule_end
from rlopt.loops.episodes import EpisodeCounter
from rlopt.loops.evaluation import Evaluator
from rlopt.loops.metrics import Sums, add_metrics
from rlopt.random import derive_seed
from rlopt.registry import get_agent, get_sampler
from rlopt.state import RowLog
from rlopt.types import Obs, RloptError, State, Step, map_obs, next_carry, on_device, resolve_device

log = logging.getLogger(__name__)


class ReplayLoop(Loop):
    """Drives an agent that learns from a replay buffer.

    One ``advance`` is one vector step and the updates it owes: ``update_ratio = (u, s)`` means u updates for every s
    transitions after ``first_update``, as an exact integer debt that is saved with everything else.

    Where the agent trains R runs side by side, the environment's R·N rows are theirs, run by run; every count of steps
    and updates is that of one run. A row of one run that is no transition still counts as a step of it, because the
    runs go on together.

    The environment may lie on the CPU and the agent elsewhere: the observations go there once to be acted on, and the
    action's way back is then the only wait of a step.

    With ``overlap`` the environments step in a thread of their own while the updates owed so far are made: the
    transitions of a step are learnt from one step later, and the policy that acts has seen one step's updates less. The
    last step pays all that is owed.
    """

    modes = ("num_envs", "num_runs", "overlap", "precision", "update_mode", "buffer")

    def __init__(
        self,
        agent: Agent,
        env: VectorEnv,
        buffer: ReplayBuffer,
        total_steps: int,
        evaluator: Evaluator | None = None,
        normalizer: Normalizer | None = None,
        seed: int = 0,
        overlap: bool = False,
        update_mode: str = "eager",
    ) -> None:
        assert isinstance(agent.config, ReplayAgentConfig)
        if env.num_envs % agent.runs:
            raise ValueError(f"{env.num_envs} environments cannot be shared by {agent.runs} runs")
        super().__init__(agent, total_steps, env, evaluator, normalizer)
        self.env: VectorEnv = env
        self.config: ReplayAgentConfig = agent.config
        self.buffer, self.seed = buffer, seed
        self.owed = 0
        self.carry = agent.initial_carry(env.num_envs)
        self.obs: Obs | None = None
        self.counter = EpisodeCounter(env.num_envs, agent.runs)
        self.each = env.num_envs // agent.runs
        """Environments of one run."""
        self.captured: CapturedUpdate | None = None
        if update_mode == "captured":
            self.captured = CapturedUpdate(agent, buffer, self.config.batch_size * agent.runs, normalizer)
        self._aside = ThreadPoolExecutor(1, "rlopt-env") if overlap else None
        self._cut = False

    @classmethod
    def from_config(cls, config: TrainConfig, **more: Any) -> Self:
        """Do what ``build`` says; ``more`` are further arguments of the constructor."""
        device, options = resolve_device(config.device), config.agent
        assert isinstance(options, ReplayAgentConfig)
        runs, rows = config.num_runs, config.num_runs * config.num_envs
        if runs > 1 and (config.env.normalize_obs or config.env.normalize_reward):
            raise RloptError(
                f"num_runs={runs}: statistics of observations or rewards are kept for one run only; leave num_runs "
                "out, or env.normalize_obs and env.normalize_reward"
            )
        home = stepping_device(config.env.backend, device)
        env = construction.environment(config, rows, home, "env", autoreset=True)
        try:
            agent = get_agent(str(options.name))(
                env.spec, options, seed=config.seed, device=device, runs=runs, precision=config.precision
            )
            buffer = _buffer(config, options, agent, env)
            normalizer = construction.normalizer(config, env, options.gamma, device)
            return cls(
                agent,
                env,
                buffer,
                config.total_steps,
                construction.evaluator(config, device),
                normalizer,
                config.seed,
                config.overlap,
                _update_mode(config, agent),
                **more,
            )
        except BaseException:
            env.close()
            raise

    @classmethod
    def settle(cls, config: TrainConfig) -> TrainConfig:
        """Return ``config`` with the backend, the length of a schedule and the critics' loss decided."""
        assert isinstance(config.agent, ReplayAgentConfig)
        found: dict[str, Any] = {"schedule_steps": schedule_end(config) or config.agent.schedule_steps}
        if config.agent.td_loss == "auto":
            found["td_loss"] = getattr(get_sampler(config.buffer.name), "td_loss", "squared")
            if found["td_loss"] == "huber":
                found["td_threshold"] = getattr(config.buffer, "floor", 1.0)
        return replace(super().settle(config), agent=changed(config.agent, **found))

    def advance(self) -> Progress:
        begin = perf_counter()
        if self.obs is None:
            self.obs = self.env.reset(seeds=self._seeds())
        seen = map_obs(lambda x: on_device(x, self.agent.device), self.obs)
        if self.normalizer is not None:
            seen = self.normalizer.normalize_obs(seen)
        act = self.agent.act(seen, self.carry)
        action = act.action.to(self.env.device)
        metrics: Sums = {}
        updates, aside_seconds = 0, 0.0
        if self._aside is None:
            step = self.env.step(action)
        else:
            stepping = self._aside.submit(self.env.step, action)
            middle = perf_counter()
            updates = self._learn(metrics)
            aside_seconds = perf_counter() - middle
            step = stepping.result()
        moved = step.valid  # a row that is one too many to be stored has moved too
        step, valid, count = self._accept(step)
        if count or bool(step.ended.any()):  # not where every row is surplus
            with torch.no_grad():
                self.buffer.add(
                    self.obs,
                    action,
                    step.reward,
                    step.next_obs,
                    step.terminated,
                    step.truncated,
                    step.ended,
                    valid,
                    **act.extras,
                )
        if self.normalizer is not None:
            self.normalizer.observe(self.obs, step)
        episodes = list(self.counter.count(step).values())
        self.obs = step.obs
        if act.carry is not None:
            begun = self.agent.initial_carry(self.env.num_envs)
            ended, moved = (on_device(x, self.agent.device) for x in (step.ended, moved))
            self.carry = next_carry(self.carry, act.carry, begun, ended, moved)
        self.step += count
        self.agent.clock.env_steps = self.step
        learning = self.step - max(self.step - count, self.config.first_update)
        self.owed += max(learning, 0) * self.config.update_ratio[0]
        middle = perf_counter()
        if self._aside is None or self.step >= self.total_steps:
            updates += self._learn(metrics)
        learn_seconds = perf_counter() - middle + aside_seconds
        return Progress(episodes, metrics, updates, middle - begin - aside_seconds, learn_seconds)

    def _learn(self, metrics: Sums) -> int:
        """Make the updates that are owed; their number."""
        updates, self.owed = divmod(self.owed, self.config.update_ratio[1])
        for _ in range(updates):
            if self.captured is not None:
                update, index = self.captured(), self.captured.index
            else:
                batch = self.buffer.sample(self.config.batch_size * self.runs)
                if self.normalizer is not None:
                    batch = self.normalizer.normalize_batch(batch)
                update, index = self.agent.update(batch), batch.index
            self.buffer.update_priority(index, update.priority)
            add_metrics(metrics, update.metrics)
        return updates

    def _seeds(self, *name: str | int) -> list[int]:
        """A seed for every row: those that each run's environments would have alone."""
        return [derive_seed(self.seed + r, "env", i, *name) for r in range(self.runs) for i in range(self.each)]

    def _accept(self, step: Step) -> tuple[Step, Tensor | None, int]:
        """Which rows are stored: the real and finite ones, and of the last vector step only the remainder.

        Returns the step with its ``valid`` settled, ``valid`` for the buffer (None where all are), and how many count.
        """
        assert self.obs is not None
        valid = step.valid
        remaining = self.total_steps - self.step
        if self.each <= remaining and _all_well(self.obs, step.next_obs, step.reward, valid):
            return step, None, self.each
        finite = finite_rows(self.obs) & finite_rows(step.next_obs) & step.reward.isfinite() | ~valid
        all_finite = bool(finite.all())
        if not all_finite:
            bad_reward = bool((~step.reward.isfinite() & valid).any())
            self._bad = self._bad or ("reward" if bad_reward else "observation")
            valid = valid & finite
            # Even where the run stops here: resumed, it must not begin with what stopped it.
            obs = self.env.reset(mask=~finite)
            step = step._replace(
                obs=obs,
                terminated=step.terminated & finite,
                truncated=step.truncated & finite,
                ended=step.ended | ~finite,
            )
        by_run = valid.view(self.runs, self.each)
        count = int(by_run.sum(1).max())
        if count > remaining:
            kept = (by_run & (by_run.cumsum(1) <= remaining)).flatten()
            self.counter.drop(valid & ~kept)
            valid, count = kept, remaining
        return step._replace(valid=valid), None if bool(valid.all()) else valid, count

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
        self.step, self.owed = int(state["step"]), int(state["owed"])
        if (carry := state["carry"]) is not None:
            self.carry = {name: leaf.to(self.agent.device) for name, leaf in carry.items()}
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
        self.obs = self.env.reset(seeds=self._seeds("resume", self.step))
        self.carry = self.agent.initial_carry(self.env.num_envs)
        self.counter = EpisodeCounter(self.env.num_envs, self.runs)
        self._cut = True

    def after_logs(self) -> None:
        """Called once the buffer's rows are back: an empty row keeps windows from crossing a dropped episode."""
        if self._cut:
            self.buffer.add_cut()
            self._cut = False

    def close(self) -> None:
        if self._aside is not None:
            self._aside.shutdown()
        super().close()

    def row_logs(self) -> dict[str, RowLog]:
        side = {f"replay-frames-{name}": store for name, store in self.buffer.side_stores().items()}
        return {"replay": self.buffer, **side}


def _buffer(config: TrainConfig, options: ReplayAgentConfig, agent: Agent, env: VectorEnv) -> ReplayBuffer:
    """Return the replay buffer of every run, with a sampler for each."""
    b, runs = config.buffer, config.num_runs
    samplers = [b.make_sampler() for _ in range(runs)]
    place: torch.device | str = b.device
    if b.device != "disk":
        place = agent.device if b.device == "auto" else resolve_device(b.device)
    return ReplayBuffer(
        b.capacity * runs,
        env.spec.observation_space,
        env.spec.action_space,
        num_envs=env.num_envs,
        sampler=samplers[0] if runs == 1 else cast(Sampler, RunSamplers(samplers, env.num_envs)),
        n_step=options.n_step,
        gamma=options.gamma,
        extra_fields=agent.extra_fields,
        device=place,
        seed=config.seed,
        frame_stack=b.frame_stack,
        folder=b.folder,
        batch_device=agent.device,
    )


def _update_mode(config: TrainConfig, agent: Agent) -> str:
    """Return ``captured`` where it was asked for, or on a GPU where nothing stands against it."""
    if config.update_mode == "captured" and not has_graphs(agent.device):
        log.info("update_mode=captured on %s: the same calls as on a GPU, but no graph", agent.device)
    if config.update_mode != "auto":
        return config.update_mode
    if not has_graphs(agent.device):
        return "eager"
    reason = why_eager(agent)
    if reason is not None:
        log.info("updates are not captured: %s", reason)
    return "eager" if reason else "captured"


def _all_well(obs: Obs, next_obs: Obs, reward: Tensor, valid: Tensor) -> bool:
    """Whether every row is valid and finite: the ordinary step, which should cost next to nothing."""
    leaves = [reward]
    for group in (obs, next_obs):
        leaves += group.values() if isinstance(group, dict) else [group]
    floating = [leaf for leaf in leaves if leaf.is_floating_point()]
    if valid.device.type == "cpu":  # NumPy's calls cost less than torch's
        return bool(valid.numpy().all()) and all(np.isfinite(leaf.numpy()).all() for leaf in floating)
    # Every look at a GPU waits for it and every operation is a launch, so there are few (see ``finite_rows``).
    sums = torch.stack([valid.all().double(), *(leaf.sum(dtype=torch.float64) for leaf in floating)]).tolist()
    return bool(sums[0]) and all(math.isfinite(x) for x in sums)
