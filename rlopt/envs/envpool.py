"""``backend=envpool``: EnvPool's MuJoCo tasks (C++ simulation, observation and reward), behind the contract.

EnvPool brings a MuJoCo of its own, so its numbers are not those of the installed ``mujoco``, and it cannot be saved. A
step that ends an episode in both ways is reported as truncated only.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from torch import Tensor

from rlopt.envs.adapter import VectorAdapter
from rlopt.envs.base import rows_of
from rlopt.envs.native.physics import pool_size
from rlopt.random import derive_seed
from rlopt.types import Obs, RloptError
from rlopt.version import install

if TYPE_CHECKING:
    from rlopt.envs.factory import EnvRequest


class _Pool(gymnasium.vector.VectorEnv[Any, Any, Any]):
    """What Gymnasium's vector API leaves to EnvPool and EnvPool does otherwise.

    Seeds are EnvPool's only when it is built, so a reset with seeds builds it anew; and its reset of some rows returns
    those rows alone.
    """

    def __init__(self, name: str, num_envs: int, seeds: Sequence[int], kwargs: Mapping[str, Any], spec: Any) -> None:
        self._name, self.num_envs, self._kwargs = name, num_envs, dict(kwargs)
        self._pool = self._make(seeds)
        self._unused = True  # not reset yet: as good as one built with the same seeds
        self._seeds = list(seeds)
        self.single_observation_space, self.single_action_space = (
            self._pool.observation_space,
            self._pool.action_space,
        )
        self.metadata = dict(self._pool.metadata)
        self.spec = deepcopy(spec)
        self.spec.max_episode_steps = int(self._pool.config["max_episode_steps"])
        self._last: Any = None

    def _make(self, seeds: Sequence[int]) -> Any:
        import envpool

        return envpool.make(
            self._name,
            env_type="gymnasium",
            num_envs=self.num_envs,
            num_threads=pool_size(self.num_envs),
            seed=[int(s) for s in seeds],
            **self._kwargs,
        )

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        if seed is None:
            obs, info = self._pool.reset(options=options)
            rows = info["env_id"]
        else:
            seeds = [old if new is None else new for old, new in zip(self._seeds, seed, strict=True)]
            if not (self._unused and seeds == self._seeds):
                self._pool.close()
                self._pool, self._seeds = self._make(seeds), seeds
            rows = np.array([s is not None for s in seed])
            obs = self._pool.reset()[0][rows]
        self._unused = False
        if self._last is None:
            self._last = np.empty((self.num_envs, *obs.shape[1:]), obs.dtype)
        self._last[rows] = obs
        return self._last.copy(), {}

    def step(self, actions: Any) -> Any:
        obs, reward, terminated, truncated, _ = self._pool.step(actions)
        self._last[...] = obs
        return obs, reward, terminated, truncated, {}

    def close_extras(self, **kwargs: Any) -> None:
        self._pool.close()


class EnvPoolVectorEnv(VectorAdapter):
    """EnvPool behind the contract. Giving some rows new seeds restarts the others, so those must have ended."""

    def _begin(
        self,
        seeds: Sequence[int] | None,
        mask: Tensor | None,
        options: dict[str, Any] | None,
        noise_seeds: Sequence[int] | None,
    ) -> Obs:
        """Raises RloptError for seeds for some rows while others are in mid-episode, and for any ``options``."""
        if options:
            raise RloptError(f"backend=envpool takes no options in reset, but got {sorted(options)}")
        if seeds is not None and mask is not None:
            others = np.ones(self.num_envs, np.bool_)
            others[rows_of(mask, self.num_envs)] = False
            if not self._ended[others].all():
                raise RloptError("backend=envpool cannot seed some rows while others are in mid-episode; seed all rows")
        return super()._begin(seeds, mask, options, noise_seeds)


def build(request: EnvRequest) -> EnvPoolVectorEnv:
    """Return the backend ``envpool``.

    Raises:
        RloptError: EnvPool is not installed, does not have this environment, or refuses its keywords.
    """
    try:
        import envpool
    except ImportError as e:
        raise RloptError(f"backend=envpool needs the package envpool; {install('envpool')}") from e
    if request.factory.wrappers:
        raise RloptError("env.wrappers wrap single environments; backend=envpool has none: use backend=sync")
    if request.factory.facts:
        raise RloptError("env.facts are read from info, which backend=envpool leaves out; use backend=sync")
    spec = request.factory.spec
    if spec.id not in envpool.list_all_envs():
        raise RloptError(f"env={request.id} is not one of EnvPool's environments; use backend=auto")
    seeds = [derive_seed(request.seed, request.stream, slot) for slot in range(request.num_envs)]
    kwargs = {**spec.kwargs, **request.factory.kwargs}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about Gymnasium's older version beside the asked-for one
            pool = _Pool(spec.id, request.num_envs, seeds, kwargs, spec)
    except (TypeError, ValueError, AssertionError, RuntimeError) as e:
        raise RloptError(f"env={request.id} cannot be built by EnvPool with env.kwargs={kwargs}: {e}") from e
    return EnvPoolVectorEnv(pool, **request.common)
