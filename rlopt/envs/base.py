"""What vector environments share: how they are told what they are, begun and closed, and how their steps are built."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, TypedDict

import gymnasium
import numpy as np
import torch
from torch import Tensor

from rlopt.envs.arrays import Array
from rlopt.random import derive_seed
from rlopt.types import EnvSpec, Obs, RloptError, Step

Env = gymnasium.Env[Any, Any]
TERMINATED, TRUNCATED, ENDED, VALID = range(4)


class Options(TypedDict, total=False):
    """Keywords of every vector environment.

    ``seed`` is the run's (0); slot i's first reset uses ``derive_seed(seed, stream, i)``, where ``stream`` (``env``)
    names the random stream. ``device`` (the CPU) is where the tensors that it returns live, ``autoreset`` (true) see
    ``VectorEnv``, ``env_id`` the name reported in ``spec``, by default the registered one.
    """

    seed: int
    device: torch.device | str
    autoreset: bool
    env_id: str | None
    stream: str


class BaseVectorEnv(ABC):
    """N rows that begin and end as ``rlopt.envs.vector.VectorEnv`` says. A backend adds ``_begin``, ``step`` and what
    it has to save and to close.

    Args:
        num_envs: N.
        options: see ``Options``.

    Raises:
        RloptError: there is not one row.
    """

    spec: EnvSpec

    def __init__(
        self,
        num_envs: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        autoreset: bool = True,
        env_id: str | None = None,
        stream: str = "env",
    ) -> None:
        if num_envs < 1:
            raise RloptError("a vector environment needs num_envs of at least 1")
        self.num_envs, self.device, self.autoreset = num_envs, torch.device(device), autoreset
        self._env_id, self._seed_of = env_id, partial(derive_seed, seed, stream)
        self._away = None if self.device.type == "cpu" else self.device
        """Where observations are brought from the CPU; asking a device for its type at every step costs time."""
        self._started = self._closed = False

    def reset(
        self,
        seeds: Sequence[int] | None = None,
        mask: Tensor | None = None,
        options: dict[str, Any] | None = None,
        noise_seeds: Sequence[int] | None = None,
    ) -> Obs:
        """Begin new episodes; see ``VectorEnv.reset``. The first reset begins all rows, from seeds of their own unless
        others are given."""
        n = self.num_envs
        for name, given in (("seeds", seeds), ("noise_seeds", noise_seeds)):
            if given is not None and len(given) != n:
                raise RloptError(f"reset got {len(given)} {name} for {n} environments; give one seed per environment")
        if mask is not None and mask.shape != (n,):
            raise RloptError(f"reset's mask has shape {tuple(mask.shape)}; it must be ({n},)")
        if not self._started:
            seeds, mask = [self._seed_of(slot) for slot in range(n)] if seeds is None else seeds, None
        obs = self._begin(seeds, mask, options, noise_seeds)
        self._started = True
        return obs

    @abstractmethod
    def _begin(
        self,
        seeds: Sequence[int] | None,
        mask: Tensor | None,
        options: dict[str, Any] | None,
        noise_seeds: Sequence[int] | None,
    ) -> Obs:
        """Do what ``reset`` says, of arguments that fit."""

    @abstractmethod
    def step(self, action: Tensor) -> Step:
        """Step all rows; see ``VectorEnv.step``."""

    def _not_begun(self) -> RloptError:
        return RloptError("step was called before reset; call reset() once after building the environment")

    def close(self) -> None:
        """Release what it holds. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._release()

    def _release(self) -> None:  # noqa: B027
        """Do what ``close`` says, once."""


def one_stream(env_id: str) -> RloptError:
    """Return the refusal of ``noise_seeds`` where first states and noise come from one generator."""
    return RloptError(
        f"{env_id} has one random stream for first states and for noise on this backend; noise_seeds need "
        "env.backend=sync, async, native or torch"
    )


def rows_of(mask: Tensor | None, n: int) -> list[int]:
    """Return the rows that a reset concerns."""
    return list(range(n)) if mask is None else [int(i) for i in mask.nonzero()]


def row_seeds(seeds: Sequence[int] | None, n: int) -> list[int | None]:
    """Return one seed or None for each of n rows."""
    return [None] * n if seeds is None else [int(s) for s in seeds]


def ordinary_flags(n: int) -> Array:
    """Return the flags (4, n) of a step in which nothing ends: rows TERMINATED, TRUNCATED, ENDED and VALID."""
    flags = np.zeros((4, n), np.bool_)
    flags[VALID] = True
    return flags


class StepBuilder:
    """Builds each ``Step``. Steps in which nothing ends share their flag tensors: treat them as read-only.

    Should a caller have written into the shared tensors all the same, torch's version counter shows it and they are
    made anew.
    """

    def __init__(self, spec: EnvSpec, n: int, device: torch.device) -> None:
        self._facts, self._n, self._device = spec.facts, n, device
        self._cpu = device.type == "cpu"
        self._renew()

    def _renew(self) -> None:
        self._no = torch.zeros(self._n, dtype=torch.bool, device=self._device)
        self._yes = torch.ones(self._n, dtype=torch.bool, device=self._device)

    def build(self, obs: Obs, next_obs: Obs, reward: Array, flags: Array | None, facts: Array | None = None) -> Step:
        """Return the step of ``reward`` (N, …) float32, ``flags`` (4, N), None for an ordinary one, and ``facts``
        (N, F) float32 where something is told of ``spec.facts``; the arrays are handed over."""
        rewards = torch.from_numpy(reward)
        if not self._cpu:
            rewards = rewards.to(self._device)
        info: dict[str, Tensor] = {}
        if facts is not None and self._facts:
            info = dict(zip(self._facts, torch.from_numpy(facts).to(self._device).unbind(1), strict=True))
        if flags is None:
            if self._no._version or self._yes._version:
                self._renew()
            return Step(obs, next_obs, rewards, self._no, self._no, self._no, self._yes, info)
        terminated, truncated, ended, valid = torch.from_numpy(flags).to(self._device).unbind(0)
        return Step(obs, next_obs, rewards, terminated, truncated, ended, valid, info)
