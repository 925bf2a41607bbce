"""On-policy learning from groups: run whole episodes side by side, update once, throw them away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import perf_counter
from typing import Self

import torch
from torch import Tensor

from rlopt.agents.base import Agent
from rlopt.agents.group import INFO, GroupAgentConfig
from rlopt.buffers import Rollout, Transition
from rlopt.envs import Normalizer, VectorEnv
from rlopt.loops.base import Progress, finite_rows, normalizer_state
from rlopt.loops.configuration import TrainConfig
from rlopt.loops.episodes import EpisodeCounter
from rlopt.loops.evaluation import Evaluator
from rlopt.loops.metrics import MetricSums
from rlopt.loops.stepping import OnPolicyLoop
from rlopt.random import derive_seed, numpy_generator
from rlopt.types import Act, Episode, Obs, RloptError, State, Step, map_obs, on_device


class GroupLoop(OnPolicyLoop):
    """Drives an agent that learns from groups of episodes with one first state each.

    One ``advance`` is one rollout of ``groups`` x ``group_size`` episodes and the update from it. Every episode of
    group g in rollout i is reset with one seed: ``derive_seed(seed, "group", i, g)``, or with ``tasks`` K one of 0 …
    K - 1 in reshuffled order. So the members share the first state and, since the environment draws from that seed on,
    its noise too, unless ``noise=independent`` gives each its own. As every row of a rollout begins with a seeded
    reset, an exact resume needs nothing of the environment: the number of rollouts is enough. Episodes that are over
    are not acted for.

    A group whose returns are all equal teaches nothing relative to itself. With ``resample`` such groups are left out
    and further rollouts made, at most so many, until all groups differ.

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
        self._told = [name.removeprefix(INFO) for name in agent.extra_fields if name.startswith(INFO)]

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
        rollout, episodes = self._collect_differing() if self.config.resample else self._collect()
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
        told = {name: torch.full((n,), math.nan, device=device) for name in self._told}
        going = alive.cpu()
        while self.step < self.total_steps and bool(going.any()):
            obs, seen = self._see()
            act = self._act(seen, going)
            extras = self._extras(act) | {INFO + name: fact for name, fact in told.items()}
            action = act.action.to(device)
            step = self._judge(self.env.step(action), alive, taken)
            flags = (step.terminated, step.truncated, step.ended, step.valid)
            steps.append(Transition(obs, action, step.reward, {}, *flags, extras))
            told = {name: torch.where(step.valid, step.info[name], fact) for name, fact in told.items()}
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

    def _collect_differing(self) -> tuple[Rollout | None, list[Episode]]:
        """Return a rollout of groups whose returns differ, out of one and up to ``resample`` further ones; where there
        is no such group, the last rollout. Episodes are all that were finished."""
        found: list[Rollout] = []
        finished: list[Episode] = []
        left = self.config.groups
        for _ in range(1 + self.config.resample):
            rollout, episodes = self._collect()
            finished += episodes
            if rollout is None:
                return None, finished
            teaching = differing_groups(rollout)[:left]
            if teaching:
                found.append(of_groups(rollout, teaching, self.config.groups - left))
            left -= len(teaching)
            if not left or self.step >= self.total_steps:
                break
        return Rollout.beside(found) if found else rollout, finished

    def _act(self, seen: Obs, going: Tensor) -> Act:
        """Return the actions of all rows (N, …), asking the agent for those alone that are ``going`` (N,), on the host;
        the others, which nobody steps, repeat the first."""
        if bool(going.all()):
            return self.agent.act(seen, self.carry)
        rows, n = on_device(going.nonzero().flatten(), self.agent.device), len(going)
        carry = None if self.carry is None else {name: leaf[rows] for name, leaf in self.carry.items()}
        act = self.agent.act(map_obs(lambda x: x.index_select(0, rows), seen), carry)

        def spread(x: Tensor) -> Tensor:
            return x[:1].repeat(n, *[1] * (x.dim() - 1)).index_copy(0, rows, x)

        after = act.carry
        if after is not None:
            assert self.carry is not None
            after = {name: self.carry[name].index_copy(0, rows, leaf) for name, leaf in after.items()}
        extras, facts = ({k: spread(x) for k, x in tree.items()} for tree in (act.extras, act.facts))
        return Act(spread(act.action), after, extras, facts)

    def _begin(self) -> Tensor:
        """Begin this rollout's episodes; return which rows (N,) have one."""
        i, seeds = self.iteration, group_seeds(self.config, self.seed, self.iteration)
        noise = None
        if self.config.noise == "independent":
            noise = [derive_seed(self.seed, "group", i, "noise", row) for row in range(self.env.num_envs)]
        self.obs = self.env.reset(seeds=[seeds[g] for g in self.group.tolist()], noise_seeds=noise)
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


def group_seeds(c: GroupAgentConfig, seed: int, iteration: int, stream: str = "group") -> list[int]:
    """Return the seed of each group of a rollout: with ``tasks`` K, each of 0 … K - 1 comes once before one comes
    again."""
    if c.tasks is None:
        return [derive_seed(seed, stream, iteration, g) for g in range(c.groups)]
    seeds = []
    for at in range(iteration * c.groups, (iteration + 1) * c.groups):
        order = numpy_generator(seed, stream, "order", at // c.tasks).permutation(c.tasks)
        seeds.append(int(order[at % c.tasks]))
    return seeds


def differing_groups(rollout: Rollout) -> list[int]:
    """Return the groups of a rollout in which complete episodes have different returns."""
    assert rollout.group is not None and rollout.complete is not None
    total = rollout.reward.double().sum(0)
    columns = rollout.group.tolist(), rollout.complete.tolist(), total.view(len(total), -1).sum(1).tolist()
    returns: dict[int, set[float]] = {}
    for g, whole, one in zip(*columns, strict=True):
        if whole:
            returns.setdefault(g, set()).add(one)
    return [g for g, values in sorted(returns.items()) if len(values) > 1]


def of_groups(rollout: Rollout, groups: Sequence[int], first: int) -> Rollout:
    """Return the columns of these ``groups``, which are called ``first``, ``first`` + 1 … from now on."""
    assert rollout.group is not None
    numbers = rollout.group.tolist()
    index = [n for g in groups for n, number in enumerate(numbers) if number == g]
    renamed = [first + groups.index(numbers[n]) for n in index]
    home = rollout.group.device
    chosen = rollout.columns(torch.tensor(index, device=home))
    return chosen._replace(group=torch.tensor(renamed, device=home))


def _without_nonfinite(obs: Obs) -> Obs:
    """Return observations with 0 for what a row that was given up may go on showing."""
    return map_obs(lambda x: x.nan_to_num(0.0, 0.0, 0.0) if x.is_floating_point() else x, obs)


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    """Return ``x`` (T, N, …) with the rows of each column in ``order`` (T, N)."""
    return x.gather(0, order.view(*order.shape, *[1] * (x.ndim - 2)).expand_as(x))
