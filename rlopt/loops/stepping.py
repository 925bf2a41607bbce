"""What loops share that step a vector of environments, and what those that learn on policy do with what they saw."""

from __future__ import annotations

import logging
import math
from typing import Self

import numpy as np
import torch
from torch import Tensor

from rlopt.agents.base import Agent, LearnerConfig
from rlopt.buffers import Rollout
from rlopt.buffers.samplers.sequence import CARRY
from rlopt.envs import Normalizer, VectorEnv
from rlopt.envs.make import stepping_device
from rlopt.loops import construction
from rlopt.loops.base import Loop, finite_rows, normalizer_state
from rlopt.loops.configuration import TrainConfig
from rlopt.loops.episodes import EpisodeCounter
from rlopt.loops.evaluation import Evaluator
from rlopt.loops.metrics import MetricSums, add_metrics
from rlopt.random import derive_seed
from rlopt.registry import get_agent
from rlopt.types import Act, Episode, Obs, State, Step, map_obs, next_carry, on_device, resolve_device

log = logging.getLogger(__name__)


class SteppingLoop(Loop):
    """Base of the loops that step environments: what is seen, which rows are transitions, what begins with an episode,
    and a state that continues exactly.

    Where the agent trains R runs side by side, the environment's R·N rows are theirs, run by run; every count of steps
    is that of one run. A row of one run that is no transition still counts as a step of it, because the runs go on
    together.

    The environment may lie on the CPU and the agent elsewhere: the observations go there once to be acted on, and the
    action's way back is then the only wait of a step.

    Args:
        env: built with ``autoreset=True``, unless the loop says otherwise.
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
        if env.num_envs % agent.runs:
            raise ValueError(f"{env.num_envs} environments cannot be shared by {agent.runs} runs")
        super().__init__(agent, total_steps, env, evaluator, normalizer)
        self.env: VectorEnv = env
        self.seed = seed
        self.carry = agent.initial_carry(env.num_envs)
        self.obs: Obs | None = None
        self.counter = EpisodeCounter(env.spec, env.num_envs, agent.runs)
        self.each = env.num_envs // agent.runs
        """Environments of one run."""
        self._stored_carry = [name.removeprefix(CARRY) for name in agent.extra_fields if name.startswith(CARRY)]

    def _extras(self, act: Act) -> dict[str, Tensor]:
        """Return {name: (N, …)} what is stored with a transition: what the agent gives, and the carry it acted with."""
        if not self._stored_carry:
            return act.extras
        assert self.carry is not None
        return {**act.extras, **{CARRY + name: self.carry[name] for name in self._stored_carry}}

    def _see(self) -> tuple[Obs, Obs]:
        """Return what is acted on, (N, …), raw as it will be stored and as the agent sees it."""
        if self.obs is None:
            self.obs = self.env.reset(seeds=self._seeds())
        seen = map_obs(lambda x: on_device(x, self.agent.device), self.obs)
        return self.obs, seen if self.normalizer is None else self.normalizer.normalize_obs(seen)

    def _go_on(self, act: Act, step: Step, moved: Tensor, count: int | None = None) -> dict[int, Episode]:
        """Count an accepted step, of which ``moved`` (N,) rows are transitions that were made and ``count`` are new
        ones of a run (None: all of a single one that are valid), and stand where it led; return the episodes that ended
        with it, by row."""
        episodes = self.counter.count(step, act.facts)
        count = int(self.counter.valid.sum()) if count is None else count
        self.obs = step.obs
        if act.carry is not None:
            begun = self.agent.initial_carry(self.env.num_envs)
            ended, moved = (on_device(x, self.agent.device) for x in (step.ended, moved))
            self.carry = next_carry(self.carry, act.carry, begun, ended, moved)
        self.step += count
        self.agent.clock.env_steps = self.step
        return episodes

    def _seeds(self, *name: str | int) -> list[int]:
        """Return a seed for every row: those that each run's environments would have alone."""
        return [derive_seed(self.seed + r, "env", i, *name) for r in range(self.runs) for i in range(self.each)]

    def _accept(self, step: Step) -> tuple[Step, Tensor | None, int]:
        """Decide which rows are kept: the real and finite ones, and of the last vector step only the remainder.

        Returns the step with its ``valid`` settled, that ``valid`` (None where all are), and how many rows count.
        """
        valid = step.valid
        remaining = self.total_steps - self.step
        if self.each <= remaining and self._all_well(step, valid):
            return step, None, self.each
        finite = self._finite(step, valid)
        if finite is not None:
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

    def _all_well(self, step: Step, *flags: Tensor) -> bool:
        """Return whether everything seen in a step is finite, in every row, and every flag (N,) set: the ordinary step,
        which should cost next to nothing."""
        assert self.obs is not None
        leaves = [step.reward]
        for group in (self.obs, step.next_obs):
            leaves += group.values() if isinstance(group, dict) else [group]
        floating = [leaf for leaf in leaves if leaf.is_floating_point()]
        if step.reward.device.type == "cpu":  # NumPy's calls cost less than torch's
            return all(flag.numpy().all() for flag in flags) and all(np.isfinite(x.numpy()).all() for x in floating)
        # Every look at a GPU waits for it and every operation is a launch, so there are few (see ``finite_rows``).
        looks = [flag.all().double() for flag in flags] + [leaf.sum(dtype=torch.float64) for leaf in floating]
        found = torch.stack(looks).tolist()
        return all(found[: len(flags)]) and all(math.isfinite(x) for x in found)

    def _finite(self, step: Step, looked_at: Tensor) -> Tensor | None:
        """Return which rows are finite, or not ``looked_at``, (N,) each; None where all are. ``first_bad`` tells what
        is not."""
        assert self.obs is not None
        finite = finite_rows(self.obs) & finite_rows(step.next_obs) & finite_rows(step.reward) | ~looked_at
        if bool(finite.all()):
            return None
        bad_reward = bool((~finite_rows(step.reward) & looked_at).any())
        self._bad = self._bad or ("reward" if bad_reward else "observation")
        return finite

    def _drop_episodes(self) -> None:
        """The open episodes were lost: nothing that is learnt may reach across this cut."""

    def state_dict(self) -> State:
        return {
            "step": self.step,
            "agent": self.agent.state_dict(),
            "env": None if self.obs is None or self.torn else self.env.state_dict(),
            "begun": self.obs is not None,
            "carry": self.carry,
            "counter": self.counter.state_dict(),
            "normalizer": normalizer_state(self.normalizer),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue exactly; an environment that could not be saved begins new episodes, across which nothing is
        learnt."""
        self.step = int(state["step"])
        if (carry := state["carry"]) is not None:
            self.carry = {name: leaf.to(self.agent.device) for name, leaf in carry.items()}
        self.agent.load_state_dict(state["agent"])
        self.counter.load_state_dict(state["counter"])
        if self.normalizer is not None:
            self.normalizer.load_state_dict(state["normalizer"])
        if not state["begun"]:
            return
        if state["env"] is not None:
            self.obs = self.env.load_state_dict(state["env"])
            return
        log.warning("this environment cannot be saved, or failed: new episodes begin here, the open ones are dropped")
        self.obs = self.env.reset(seeds=self._seeds("resume", self.step))
        self.carry = self.agent.initial_carry(self.env.num_envs)
        self.counter = EpisodeCounter(self.env.spec, self.env.num_envs, self.runs)
        self._drop_episodes()


class OnPolicyLoop(SteppingLoop):
    """Base of the loops that learn from what the present policy did, and then forget it.

    Statistics of observations stand still from the first step of a rollout to the last epoch of its update (they grow
    by all of its observations afterwards), so that the policy that learns is the one that acted: before the first
    gradient step the ratio of their probabilities is 1. The first rollout is seen as it is. Rewards are scaled once
    the rollout is complete, by statistics that know them.
    """

    modes = ("num_envs",)

    @classmethod
    def _made(cls, config: TrainConfig, num_envs: int, autoreset: bool) -> Self:
        """Return the loop that ``config`` describes, of ``num_envs`` rows."""
        device, options = resolve_device(config.device), config.agent
        home = stepping_device(config.env.backend, device)
        env = construction.environment(config, num_envs, home, "env", autoreset)
        try:
            agent = get_agent(str(options.name))(env.spec, options, seed=config.seed, device=device)
            normalizer = construction.normalizer(config, env, options.gamma, device)
            return cls(agent, env, config.total_steps, construction.evaluator(config, device), normalizer, config.seed)
        except BaseException:
            env.close()
            raise

    def _learn_from(self, rollout: Rollout, metrics: MetricSums) -> int:
        """Learn from a rollout as the environment gave it; return the number of updates."""
        options = self.agent.config
        assert isinstance(options, LearnerConfig)
        raw = rollout.map(lambda x: on_device(x, self.agent.device))
        rollout = raw.without_gaps().transformed(options.reward)
        if self.normalizer is not None:
            rollout = self.normalizer.normalize_batch(rollout)
        before = self.agent.clock.updates
        add_metrics(metrics, self.agent.update(rollout).metrics)
        if self.normalizer is not None:
            self.normalizer.observe_obs(map_obs(lambda x: x.flatten(0, 1), raw.obs), raw.valid.flatten())
        return self.agent.clock.updates - before
