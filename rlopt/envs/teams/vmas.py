"""VMAS's scenarios, all rows at once on any device (``env=vmas/balance``). VMAS is under the GPL: it is an optional
package of its own (the extra ``vmas``), and nothing of it is copied here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor

from rlopt.envs.base import BaseVectorEnv, Options, one_stream, rows_of
from rlopt.joint import join_spaces
from rlopt.random import derive_seed
from rlopt.types import EnvSpec, Obs, RloptError, Space, State, Step, shape_of
from rlopt.version import install

if TYPE_CHECKING:
    from rlopt.envs.factory import EnvRequest


class VmasEnv(BaseVectorEnv):
    """N rows of a scenario of VMAS (Bettini et al. 2022), behind the contract of ``rlopt.envs.vector.VectorEnv``.

    Observation: ``obs``, what each agent sees; each is paid its own reward. VMAS draws for all rows from one stream: a
    row's first state depends on the seeds of all. It cannot be saved: at resume it begins anew.

    Args:
        scenario: ``balance``, ``navigation`` …
        num_envs: N.
        continuous_actions: whether agents act in boxes, not in Discrete.
        max_episode_steps: after which episodes are truncated; None for never.
        scenario_options: keywords of the scenario.
        options: see ``Options``.

    Raises:
        RloptError: VMAS is not installed, has no such scenario, or its agents see something else than vectors.
    """

    def __init__(
        self,
        scenario: str,
        num_envs: int,
        *,
        continuous_actions: bool = True,
        max_episode_steps: int | None = 100,
        scenario_options: dict[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(num_envs, **options)
        self._limit = max_episode_steps if max_episode_steps is not None and max_episode_steps > 0 else None
        self._random: list[Any] = []
        self._inner = self._build(scenario, bool(continuous_actions), scenario_options or {})
        inner = self._inner
        seen = [_space(space) for space in inner.observation_space]
        if not all(isinstance(space, spaces.Box) and len(shape_of(space)) == 1 for space in seen):
            raise RloptError(f"vmas/{scenario}: its agents see {seen[0]}; only vectors are taken")
        own = list(zip(seen, map(_space, inner.action_space), strict=True))
        observation_space, action_space = join_spaces(own)
        names = tuple(agent.name for agent in inner.agents)
        self.spec = EnvSpec(
            self._env_id or f"vmas/{scenario}",
            observation_space,
            action_space,
            self._limit,
            agents=names,
            agent_spaces=own,  # type: ignore[arg-type]
            reward_shape=(len(names),),
        )
        self._sizes, self._width = [shape_of(space) for _, space in own], max(shape_of(space)[0] for space in seen)
        self._ended = torch.zeros(num_envs, dtype=torch.bool, device=self.device)
        self._obs: Tensor

    def _build(self, scenario: str, continuous: bool, given: dict[str, Any]) -> Any:
        try:
            import vmas
        except ImportError as e:
            raise RloptError(
                f"env=vmas/{scenario} needs the package {e.name}, which is not installed; {install('vmas')}"
            ) from e
        if scenario not in (known := [name.removesuffix(".py") for name in (*vmas.scenarios, *vmas.mpe_scenarios)]):
            raise RloptError(f"VMAS has no scenario {scenario!r}; it has {', '.join(sorted(known))}")
        kwargs = {"continuous_actions": continuous, "max_steps": self._limit, "terminated_truncated": True}
        with self._own_randomness(None):
            return vmas.make_env(
                scenario, self.num_envs, device=self.device, seed=0, clamp_actions=True, **kwargs, **given
            )

    @contextmanager
    def _own_randomness(self, inner: Any) -> Iterator[None]:
        """Let VMAS, which draws from generators that all of its environments and the process share, go on where this
        one stopped."""
        cuda = self.device.type == "cuda"
        before = torch.cuda.get_rng_state(self.device) if cuda else None
        shared = None if inner is None else type(inner).vmas_random_state
        outside = None if shared is None else list(shared)
        if shared is not None and self._random:
            shared[:] = self._random[:3]
            if cuda:
                torch.cuda.set_rng_state(self._random[3], self.device)
        try:
            yield
        finally:
            if shared is not None and outside is not None:
                self._random = [*shared, torch.cuda.get_rng_state(self.device) if cuda else None]
                shared[:] = outside
            if before is not None:
                torch.cuda.set_rng_state(before, self.device)

    def _begin(
        self,
        seeds: Sequence[int] | None,
        mask: Tensor | None,
        options: dict[str, Any] | None,
        noise_seeds: Sequence[int] | None,
    ) -> Obs:
        """Raises RloptError where ``options`` or ``noise_seeds`` are given."""
        if options:
            raise RloptError(f"{self.spec.id} takes no reset options")
        if noise_seeds is not None:
            raise one_stream(self.spec.id)
        with self._own_randomness(self._inner):
            if seeds is not None:
                self._inner.seed(derive_seed(seeds[0], "vmas", *map(int, seeds)))
            self._restart(mask)
        return {"obs": self._obs.clone()}

    def _restart(self, mask: Tensor | None) -> None:
        """Begin new episodes in some rows, or in all."""
        rows = rows_of(mask, self.num_envs)
        if len(rows) == self.num_envs:
            self._obs = self._joined(self._inner.reset())
        else:
            for row in rows:
                self._inner.reset_at(row, return_observations=False)
            fresh = self._joined(self._inner.get_from_scenario(True, False, False, False)[0])
            chosen = torch.zeros_like(self._ended)
            chosen[rows] = True
            self._obs = torch.where(chosen.view(-1, 1, 1), fresh, self._obs)
        self._ended[rows] = False

    def _joined(self, seen: Sequence[Tensor]) -> Tensor:
        return torch.stack([F.pad(own.float(), (0, self._width - own.shape[1])) for own in seen], 1)

    @torch.no_grad()
    def step(self, action: Tensor) -> Step:
        """Step all rows; see ``VectorEnv.step``."""
        if not self._started:
            raise self._not_begun()
        wanted = (self.num_envs, *shape_of(self.spec.action_space))
        if tuple(action.shape) != wanted:
            raise RloptError(f"actions have shape {tuple(action.shape)}, but {self.spec.id} wants {wanted}")
        action = action.to(self.device)
        given = [
            action[:, i, : shape[0]].clone() if shape else action[:, i, None].clone()
            for i, shape in enumerate(self._sizes)
        ]
        with self._own_randomness(self._inner):
            seen, rewards, over, late, _ = self._inner.step(given)
            valid = ~self._ended
            live = valid.view(-1, 1)
            next_obs = torch.where(live[..., None], self._joined(seen), self._obs)
            reward = torch.where(live, torch.stack(list(rewards), 1), 0.0).float()
            terminated, truncated = over & valid, late & valid
            ended = terminated | truncated
            self._obs = next_obs
            if not self.autoreset:
                self._ended |= ended
            elif bool(ended.any()):
                self._restart(ended)
        obs = {"obs": self._obs.clone()}
        return Step(obs, {"obs": next_obs.clone()}, reward, terminated, truncated, ended, valid, {})

    def state_dict(self) -> State | None:
        """Return None: scenarios keep numbers in places of their own."""
        return None

    def load_state_dict(self, state: State) -> Obs:
        raise RloptError(f"{self.spec.id} cannot be restored")


def _space(space: Any) -> Space:
    """Return a space of old Gym, which VMAS uses, as Gymnasium's."""
    if hasattr(space, "low"):
        return spaces.Box(np.asarray(space.low, np.float32), np.asarray(space.high, np.float32))
    return spaces.MultiDiscrete(space.nvec) if hasattr(space, "nvec") else spaces.Discrete(int(space.n))


def build(request: EnvRequest) -> VmasEnv:
    """Return the backend ``vmas``.

    Raises:
        RloptError: another environment, wrappers, facts or a render mode.
    """
    spec, kwargs = request.factory.spec, {**request.factory.spec.kwargs, **request.factory.kwargs}
    if spec.namespace != "vmas":
        raise RloptError(f"env={request.id} is no scenario of VMAS; leave env.backend=vmas")
    if request.factory.wrappers or request.factory.facts or kwargs.pop("render_mode", None) is not None:
        raise RloptError(f"env={request.id} takes no wrappers, facts or pictures")
    limit = kwargs.pop("max_episode_steps", spec.max_episode_steps)
    if limit is not None and not math.isfinite(limit):
        limit = None
    own = {"scenario": kwargs.pop("scenario"), "continuous_actions": kwargs.pop("continuous_actions")}
    return VmasEnv(**own, num_envs=request.num_envs, max_episode_steps=limit, scenario_options=kwargs, **request.common)
