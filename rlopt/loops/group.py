"""On-policy learning from groups: run whole episodes side by side, update once, throw them away."""

from __future__ import annotations

from time import perf_counter
from typing import Self

import torch
from torch import Tensor

from rlopt.agents.base import Agent
from rlopt.agents.group import GroupAgentConfig
from rlopt.buffers import Rollout, Transition
from rlopt.envs import Normalizer, VectorEnv
from rlopt.loops.base import Progress, finite_rows, normalizer_state
from rlopt.loops.configuration import TrainConfig
from rlopt.loops.episodes import EpisodeCounter
from rlopt.loops.evaluation import Evaluator
from rlopt.loops.metrics import MetricSums
from rlopt.loops.stepping import OnPolicyLoop
from rlopt.random import derive_seed
from rlopt.types import Episode, Obs, RloptError, State, Step, map_obs, on_device


class GroupLoop(OnPolicyLoop):
    """Drives an agent that learns from groups of episodes with one first state each.

    One ``advance`` is one rollout of ``groups`` x ``group_size`` episodes and the update from it. Every episode of
    group g in iteration i is reset with the seed ``derive_seed(seed, "group", i, g)``, so the members share the first
    state and, since the environment draws from that seed on, its noise too. As every row of a rollout begins with a
    seeded reset, an exact resume needs nothing of the environment: the iteration number is enough.

    Steps are real transitions. The rollout in which ``total_steps`` is reached stops there; it counts, but nothing is
    learnt from it, because the episodes that had ended by then are the short ones.

    Args:
        env: ``groups`` x ``group_size`` rows with ``autoreset=False``.
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
        assert isinstance(agent.config, GroupAgentConfig)
        self.config: GroupAgentConfig = agent.config
        rows = self.config.groups * self.config.group_size
        if env.autoreset or env.num_envs != rows:
            raise RloptError(f"this GroupLoop needs an environment of {rows} rows with autoreset=False")
        super().__init__(agent, env, total_steps, evaluator, normalizer, seed)
        self.iteration = 0
        self.group = torch.arange(self.config.groups).repeat_interleave(self.config.group_size)
        """(N,) of every row."""

    @classmethod
    def from_config(cls, config: TrainConfig) -> Self:
        options = config.agent
        assert isinstance(options, GroupAgentConfig)
        rows = options.groups * options.group_size
        if config.num_envs not in (1, rows):
            raise RloptError(
                f"num_envs={config.num_envs}: agent={options.name} runs agent.groups x agent.group_size = {rows} "
                "environments side by side; change those and leave num_envs out"
            )
        return cls._made(config, rows, autoreset=False)

    def advance(self) -> Progress:
        begin = perf_counter()
        rollout, episodes = self._collect()
        middle = perf_counter()
        metrics: MetricSums = {}
        updates = 0 if rollout is None else self._learn_from(rollout, metrics)
        return Progress(episodes, metrics, updates, middle - begin, perf_counter() - middle)

    @torch.no_grad()
    def _collect(self) -> tuple[Rollout | None, list[Episode]]:
        """Return one rollout (None where there is nothing to learn from), and its finished episodes in the order of
        rows."""
        n, device = self.env.num_envs, self.env.device
        alive = self._begin()
        complete = torch.zeros(n, dtype=torch.bool, device=device)
        taken = torch.zeros(n, dtype=torch.int64, device=device)
        finished: dict[int, Episode] = {}
        steps: list[Transition] = []
        going = alive.cpu()
        while self.step < self.total_steps and bool(going.any()):
            obs, seen = self._see()
            act = self.agent.act(seen, self.carry)
            extras = self._extras(act)
            action = act.action.to(device)
            step = self._judge(self.env.step(action), alive, taken)
            flags = (step.terminated, step.truncated, step.ended, step.valid)
            steps.append(Transition(obs, action, step.reward, {}, *flags, extras))
            if self.normalizer is not None:
                self.normalizer.observe_reward(step)
            complete |= step.ended & step.valid
            alive = alive & ~step.ended
            taken += step.valid
            finished.update(self._go_on(act, step, step.valid))
            going = going & ~self.counter.ended
        episodes = [finished[row] for row in sorted(finished)]
        if bool(alive.any()) or not bool(complete.any()):
            return None, episodes
        home = self.agent.device
        rollout = Rollout.of(steps, on_device(self.group, home), on_device(complete, home))
        if bool((rollout.valid[1:] & ~rollout.valid[:-1]).any()):  # a surplus row between transitions: they move up
            order = rollout.valid.byte().argsort(stable=True, dim=0, descending=True)
            rollout = rollout.map(lambda x: _in_order(x, order.to(x.device)))
        return rollout, episodes

    def _begin(self) -> Tensor:
        """Begin this iteration's episodes; return which rows (N,) have one."""
        seeds = [derive_seed(self.seed, "group", self.iteration, g) for g in range(self.config.groups)]
        self.obs = self.env.reset(seeds=[seeds[g] for g in self.group.tolist()])
        self.iteration += 1
        self.carry = self.agent.initial_carry(self.env.num_envs)
        self.counter = EpisodeCounter(self.env.spec, self.env.num_envs)
        finite = finite_rows(self.obs)
        if not bool(finite.all()):
            self._bad = self._bad or "observation"
            self.obs = _without_nonfinite(self.obs)
        return finite

    def _judge(self, step: Step, alive: Tensor, taken: Tensor) -> Step:
        """Return ``step`` as the running rows made it, after ``taken`` (N,) transitions of their episodes: what is
        beyond the horizon, the last of ``total_steps`` or what is finite is not in it.

        A row that lost its episode stays out for the rest of the rollout.
        """
        valid, lost, obs = step.valid & alive, ~step.valid & step.ended & alive, step.obs
        if not self._all_well(step):
            obs, finite = _without_nonfinite(obs), self._finite(step, alive)
            if finite is not None:
                valid, lost = valid & finite, lost | ~finite
        valid = valid & (valid.cumsum(0) <= self.total_steps - self.step)
        over = step.ended if self.config.horizon is None else step.ended | (taken + 1 >= self.config.horizon)
        terminated, over = step.terminated & valid, over & valid
        truncated = over & ~terminated
        reward = torch.where(valid.view(-1, *[1] * (step.reward.dim() - 1)), step.reward, 0.0)
        return Step(obs, step.next_obs, reward, terminated, truncated, over | lost, valid, step.info)

    def state_dict(self) -> State:
        return {
            "step": self.step,
            "iteration": self.iteration,
            "agent": self.agent.state_dict(),
            "normalizer": normalizer_state(self.normalizer),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue exactly, with the next rollout."""
        self.step, self.iteration = int(state["step"]), int(state["iteration"])
        self.agent.load_state_dict(state["agent"])
        if self.normalizer is not None:
            self.normalizer.load_state_dict(state["normalizer"])


def _without_nonfinite(obs: Obs) -> Obs:
    """Return observations with 0 for what a row that was given up may go on showing."""
    return map_obs(lambda x: x.nan_to_num(0.0, 0.0, 0.0) if x.is_floating_point() else x, obs)


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    """Return ``x`` (T, N, …) with the rows of each column in ``order`` (T, N)."""
    return x.gather(0, order.view(*order.shape, *[1] * (x.ndim - 2)).expand_as(x))
