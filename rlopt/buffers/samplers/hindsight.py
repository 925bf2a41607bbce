"""Hindsight replay: what was reached counts as what was wanted (Andrychowicz et al. 2017, arXiv 1707.01495)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlopt.buffers.replay import ReplayBuffer
from rlopt.buffers.samplers.base import SamplerOver, check_identity
from rlopt.buffers.samplers.per_run import RunSamplers
from rlopt.buffers.transition import Batch
from rlopt.random import generator_state, set_generator_state, torch_generator
from rlopt.registry import get_sampler
from rlopt.types import Obs, RloptError, State

Judge = Callable[[Any, Any, dict[str, Any]], Any]
"""From achieved and desired goals, (B, …) arrays or one of each, and an info, to rewards or flags: a goal environment's
``compute_reward`` and ``compute_terminated``."""
ACHIEVED, DESIRED = "achieved_goal", "desired_goal"
OPEN = -1


class HindsightSampler(SamplerOver):
    """Draws as another sampler does, and puts a goal that was reached later in the episode in the place of the one that
    was wanted, in a share of every minibatch (the strategy ``future``).

    The goal is that of the transition itself or of any later one of its episode, with equal probability; of an episode
    that goes on, up to the newest. Reward and termination are then what the goal environment's own functions say of it,
    on the host and with an empty ``info``: ``HindsightSampler(env, over="reshuffled")``. Observations are a Dict with
    the leaves ``achieved_goal`` and ``desired_goal``.

    Args:
        env: a goal environment like the one that is learnt in, or anything else with ``compute_reward(achieved_goal,
            desired_goal, info)``, of (B, …) goals each (taken row by row where what it returns is not (B,)). Where it
            has ``compute_terminated``, that is asked of one pair of goals; else what was stored stays.
        over: the sampler, or its name, that chooses transitions; on the command line its options stand beside
            (``buffer=hindsight buffer.over=prioritized buffer.alpha=0.5``).
        relabelled: share of transitions with another goal; 0.8 is the paper's four to one.

    Raises:
        RloptError: ``env`` says nothing of goals, ``over`` relabels or slices itself, or a share outside 0 … 1.
    """

    def __init__(self, env: Any, over: Any = "uniform", relabelled: float = 0.8) -> None:
        super().__init__(get_sampler(over)() if isinstance(over, str) else over)
        if not 0 <= relabelled <= 1:
            raise RloptError(f"buffer.relabelled must be within 0 … 1, not {relabelled:g}")
        if isinstance(self.inner, SamplerOver):
            raise RloptError("buffer=hindsight relabels single transitions; buffer.over names a plain sampler")
        reward = _attribute(env, "compute_reward")
        if reward is None:
            raise RloptError(
                f"{env} has no compute_reward(achieved_goal, desired_goal, info); hindsight replay needs a goal "
                "environment"
            )
        self.compute_reward: Judge = reward
        self.compute_terminated: Judge | None = _attribute(env, "compute_terminated")
        self.relabelled = relabelled
        self._checked = False

    def bind(self, slots: int, device: torch.device, seed: int) -> None:
        super().bind(slots, device, seed)
        runs = len(self.inner.samplers) if isinstance(self.inner, RunSamplers) else 1
        self.generators = [torch_generator(seed + r, "hindsight") for r in range(runs)]
        self._ends: NDArray[np.int64] | None = None
        """(rows, N) the number of the row with which each transition's episode ends, ``OPEN`` while it goes on; None
        where that must be read from the flags stored."""
        self._begun: NDArray[np.int64] = np.empty(0, np.int64)
        """(N,) the number of the row with which each environment's open episode began, beside ``_ends``."""

    def attach(self, buffer: ReplayBuffer) -> None:
        super().attach(buffer)
        if buffer.n_step != 1:
            raise RloptError(f"agent.n_step={buffer.n_step} is not combined with buffer=hindsight; use n_step=1")
        fields = buffer.layout.fields
        goals = [fields.get(f"{prefix}/{leaf}") for prefix in ("obs", "next_obs") for leaf in (ACHIEVED, DESIRED)]
        if None in goals or goals[0] != goals[1] or buffer.reward_shape:
            raise RloptError(
                f"buffer=hindsight needs Dict observations with {ACHIEVED} and {DESIRED} of one shape, and one reward"
            )

    def wrote(self, first: int, count: int, valid: Tensor | None) -> None:
        super().wrote(first, count, valid)
        if self._ends is None:
            return
        newest, n = self.buffer.rows_written - 1, self.buffer.num_envs
        before = self._flags((newest - 1) % len(self._ends), 1)[0][0]
        if count > n or bool((before & (self._begun <= newest - 1)).any()):
            self._ends = None  # a data set, which also ended what came before it
        else:
            self._close(newest)

    # Where episodes end

    def _flags(self, row: int, rows: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return which of the ring's rows from ``row`` on (no wrap-around) cut their window, and which are
        transitions: (rows, N) each."""
        start, stop = self.buffer.slices["terminated"].start, self.buffer.slices["valid"].stop
        flags = self.buffer.block[row : row + rows, :, start:stop].cpu().numpy() != 0
        return flags[..., 0] | flags[..., 1], flags[..., 2]

    def _close(self, number: int) -> None:
        """Hear of row ``number`` since the beginning: some episodes end with it."""
        assert self._ends is not None
        ring = len(self._ends)
        cut, valid = (flag[0] for flag in self._flags(number % ring, 1))
        self._ends[number % ring] = OPEN
        self._begun = np.maximum(self._begun, number - ring + 1)
        for e in np.flatnonzero(cut | ~valid):
            last = number - (not valid[e])  # what is no transition lies between two episodes
            self._ends[np.arange(self._begun[e], last + 1) % ring, e] = last
            self._begun[e] = number + 1

    def _read_ends(self) -> NDArray[np.int64]:
        """Return the ends of every row held, from the flags stored."""
        buffer, ring = self.buffer, self.buffer.capacity_rows
        first, stop = max(0, buffer.rows_written - ring), buffer.rows_written
        order = np.arange(first, stop)
        cut, valid = (flag[order % ring] for flag in self._flags(0, min(ring, stop)))
        never = np.iinfo(np.int64).max
        last = np.where(valid & cut, order[:, None], never)
        last[:-1] = np.where(~valid[1:], np.minimum(last[:-1], order[:-1, None]), last[:-1])
        ends = np.minimum.accumulate(last[::-1])[::-1]
        self._ends = np.full((ring, buffer.num_envs), OPEN)
        self._ends[order % ring] = np.where(ends == never, OPEN, ends)
        closed = (cut | ~valid)[::-1]
        self._begun = np.where(closed.any(0), stop - closed.argmax(0), first)
        return self._ends

    # Draws

    def batch(self, index: Tensor, weight: Tensor | None) -> Batch:
        """Return the transitions of the slots ``index`` (B,), some of them with a goal that was reached later."""
        batch = self.buffer.gather(index, weight)
        obs, next_obs = batch.obs, batch.next_obs
        assert isinstance(obs, dict) and isinstance(next_obs, dict)
        achieved, desired = next_obs[ACHIEVED], next_obs[DESIRED]
        if not self._checked:
            self._check(batch, achieved, desired)
        chosen, later = self._choose(index.cpu())
        goals = self._achieved(later.to(index.device))
        mask = chosen.to(index.device)
        column = mask.view(-1, *[1] * (desired.ndim - 1))
        rows = (achieved[mask].cpu().numpy(), goals[mask].cpu().numpy())
        reward = batch.reward.clone()
        made = torch.from_numpy(self._judge(self.compute_reward, *rows).astype(np.float32))
        reward[mask] = self.buffer.transformed(made.to(reward.device))
        terminated = batch.terminated
        if self.compute_terminated is not None:
            ended = torch.from_numpy(self._row_by_row(self.compute_terminated, *rows).astype(np.float32))
            terminated = terminated.clone()
            terminated[mask] = ended.to(terminated.device)

        def relabelled(tree: dict[str, Tensor]) -> Obs:
            return {**tree, DESIRED: torch.where(column, goals, tree[DESIRED])}

        return batch._replace(obs=relabelled(obs), next_obs=relabelled(next_obs), reward=reward, terminated=terminated)

    def _choose(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return who gets another goal (B,) bool, and the slots (B,) of which."""
        ends = self._read_ends() if self._ends is None else self._ends
        n, ring, newest = self.buffer.num_envs, len(ends), self.buffer.rows_written - 1
        each = len(index) // len(self.generators)
        drawn = [torch.rand(2, each, generator=g, dtype=torch.float64) for g in self.generators]
        share, place = torch.cat(drawn, 1).numpy()
        row, column = np.divmod(index.numpy(), n)
        number = newest - (newest - row) % ring
        last = ends[row, column]
        last = np.where(last == OPEN, newest, last)
        later = number + np.floor(place * (last - number + 1)).astype(np.int64)
        slots = torch.from_numpy((later % ring) * n + column)
        return torch.from_numpy(share < self.relabelled), slots

    def _achieved(self, index: Tensor) -> Tensor:
        """Return the goals (B, …) that the transitions of the slots ``index`` (B,) achieved."""
        storage = self.buffer.storage
        return storage.leaf(f"next_obs/{ACHIEVED}", storage.gather(index), index)

    def _judge(self, function: Judge, achieved: Any, desired: Any) -> NDArray[Any]:
        """Return what ``function`` says of B pairs of goals: (B,)."""
        try:
            found = np.asarray(function(achieved, desired, {}))
        except (KeyError, TypeError, IndexError, ValueError) as e:
            raise RloptError(
                f"the environment's {getattr(function, '__name__', 'function')} fails with goals and an empty info "
                f"({type(e).__name__}: {' '.join(str(e).split())}); hindsight replay asks for no more than goals"
            ) from e
        return found if found.shape == (len(achieved),) else self._row_by_row(function, achieved, desired)

    @staticmethod
    def _row_by_row(function: Judge, achieved: Any, desired: Any) -> NDArray[Any]:
        return np.array([function(a, d, {}) for a, d in zip(achieved, desired, strict=True)], dtype=np.float64).reshape(
            len(achieved)
        )

    def _check(self, batch: Batch, achieved: Tensor, desired: Tensor) -> None:
        """Raises RloptError where rewards of the goals that were wanted are not those that were paid."""
        made = torch.from_numpy(
            self._judge(self.compute_reward, achieved.cpu().numpy(), desired.cpu().numpy()).astype(np.float32)
        )
        paid = batch.reward.cpu()
        wrong = ~torch.isclose(self.buffer.transformed(made), paid, rtol=1e-4, atol=1e-5)
        if bool(wrong.any()):
            i = int(wrong.byte().argmax())
            raise RloptError(
                f"compute_reward says {float(made[i]):g} where the environment paid {float(paid[i]):g}: a wrapper "
                "changes rewards; give it a compute_reward of its own, or leave it out"
            )
        self._checked = True

    # Saving

    def identity(self) -> State:
        return {"kind": "hindsight", "runs": len(self.generators)}

    def state_dict(self) -> State:
        return {**super().state_dict(), "generators": [generator_state(g) for g in self.generators]}

    def load_state_dict(self, state: State) -> None:
        check_identity(state, self.identity(), "sampler")
        super().load_state_dict(state)
        for generator, saved in zip(self.generators, state["generators"], strict=True):
            set_generator_state(generator, saved)
        self._ends = None


def _attribute(env: Any, name: str) -> Judge | None:
    """Return what an environment, or one of its wrappers, has of this name; None where none has."""
    if hasattr(env, "has_wrapper_attr"):
        return env.get_wrapper_attr(name) if env.has_wrapper_attr(name) else None
    found: Judge | None = getattr(env, name, None)
    return found
