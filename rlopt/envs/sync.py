"""N Gymnasium environments stepped one after the other in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from rlopt.envs.arrays import Array
from rlopt.envs.base import ENDED, VALID, BaseVectorEnv, Env, Options, StepBuilder, ordinary_flags, row_seeds, rows_of
from rlopt.envs.edge import Edge
from rlopt.envs.snapshot import restore, snapshot
from rlopt.types import Obs, RloptError, State, Step


class SyncVectorEnv(BaseVectorEnv):
    """N environments in this process, behind the contract of ``rlopt.envs.vector.VectorEnv``.

    Fast environments (classic control, MuJoCo) gain nothing from worker processes: this is the default backend.
    ``Step.obs`` and ``Step.next_obs`` are one tensor where no row was reset: treat both as read-only.

    Args:
        env_fns: one function per environment, each building it.
        options: see ``Options``.

    Raises:
        RloptError: no environment, or a space without translation.
    """

    def __init__(self, env_fns: Sequence[Callable[[], Env]], **options: Unpack[Options]) -> None:
        super().__init__(len(env_fns), **options)
        self.envs: list[Env] = []
        try:
            for build in env_fns:
                self.envs.append(build())
            self._edge = Edge(self.envs[0], self._env_id)
            one = (self.envs[0].observation_space, self.envs[0].action_space)
            if any((e.observation_space, e.action_space) != one for e in self.envs):
                raise RloptError("the environments of one vector must have equal observation and action spaces")
        except BaseException:
            for env in self.envs:
                env.close()
            raise
        self.spec = self._edge.spec
        self._current = self._edge.observations.arrays(self.num_envs)
        self._paid = (self.num_envs, *self.spec.reward_shape)
        self._ended = [False] * self.num_envs
        self._steps = StepBuilder(self.spec, self.num_envs, self.device)

    def _begin(
        self,
        seeds: Sequence[int] | None,
        mask: Tensor | None,
        options: dict[str, Any] | None,
        noise_seeds: Sequence[int] | None,
    ) -> Obs:
        first, noise = row_seeds(seeds, self.num_envs), row_seeds(noise_seeds, self.num_envs)
        for i in rows_of(mask, self.num_envs):
            self._edge.reset(self.envs[i], self._current, i, first[i], options, noise[i])
            self._ended[i] = False
        return self._edge.observations.tensors(self._current, self._away)

    def step(self, action: Tensor) -> Step:
        """Step all rows; see ``VectorEnv.step``."""
        if not self._started:
            raise self._not_begun()
        n, edge, current, ended = self.num_envs, self._edge, self._current, self._ended
        step = edge.step
        reward = np.zeros(self._paid, np.float32)
        flags: Array | None = None  # most steps raise no flag, and building tensors is what costs time here
        facts: Array | None = None
        for i, (env, a) in enumerate(zip(self.envs, edge.actions.rows(action, n), strict=True)):
            if ended[i]:
                flags = ordinary_flags(n) if flags is None else flags
                flags[VALID, i] = False
                continue
            end = step(env, a, current, i, reward)
            if end is None:
                continue
            if end.facts:
                facts = np.full((n, len(end.facts)), np.nan, np.float32) if facts is None else facts
                facts[i] = end.facts
            if end.terminated or end.truncated:
                flags = ordinary_flags(n) if flags is None else flags
                flags[:VALID, i] = end.terminated, end.truncated, True
                ended[i] = not self.autoreset
        next_obs = observed = edge.observations.tensors(current, self._away)
        if flags is not None and self.autoreset:
            for i in flags[ENDED].nonzero()[0]:
                edge.reset(self.envs[i], current, i)
            observed = edge.observations.tensors(current, self._away)
        return self._steps.build(observed, next_obs, reward, flags, facts)

    def state_dict(self) -> State | None:
        """Return the exact state of all environments (see ``rlopt.envs.snapshot``), or None where one of them cannot be
        saved."""
        states = [snapshot(env) for env in self.envs]
        if not self._started or any(s is None for s in states):
            return None
        return pack_state(states, self._current, self._ended)

    def load_state_dict(self, state: State) -> Obs:
        """Continue where ``state_dict`` stood; returns the observations to act on.

        Raises:
            RloptError: the state is of another number of environments, or of another environment.
        """
        states = unpack_state(state, self._current, self._ended)
        for env, saved in zip(self.envs, states, strict=True):
            restore(env, saved)
        self._started = True
        return self._edge.observations.tensors(self._current, self._away)

    def _release(self) -> None:
        for env in self.envs:
            env.close()


def pack_state(states: Sequence[State | None], current: list[Any], ended: list[bool]) -> State:
    """Return the state tree of a vector environment from its environments' trees."""
    return {
        "envs": list(states),
        "observations": [torch.from_numpy(a.copy()) for a in current],
        "ended": list(ended),
    }


def unpack_state(state: State, current: list[Any], ended: list[bool]) -> list[State]:
    """Put back observations and flags in place and return the environments' trees."""
    if "envs" not in state:
        raise RloptError("the saved environment is not of a Gymnasium backend; resume with the backend that saved it")
    states = list(state["envs"])
    if len(states) != len(ended):
        raise RloptError(f"the saved state holds {len(states)} environments, but num_envs is {len(ended)}")
    for array, saved in zip(current, state["observations"], strict=True):
        if tuple(saved.shape) != array.shape:
            raise RloptError(
                f"saved observations have shape {tuple(saved.shape)}, the environment's {array.shape}; not the same env"
            )
        array[...] = saved.cpu().numpy()
    ended[:] = [bool(e) for e in state["ended"]]
    return states
