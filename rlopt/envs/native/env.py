"""Gymnasium's MuJoCo tasks, N at once, behind the contract."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import gymnasium
import numpy as np
import torch
from gymnasium.utils import seeding
from gymnasium.wrappers import TimeLimit
from torch import Tensor

from rlopt.envs.arrays import Array
from rlopt.envs.base import ENDED, VALID, BaseVectorEnv, Env, Options, StepBuilder, ordinary_flags, rows_of
from rlopt.envs.edge import spec_of
from rlopt.envs.native.physics import BatchPhysics, Physics, SinglePhysics, ThreadedPhysics, pool_size
from rlopt.envs.native.tasks import Task
from rlopt.envs.spaces import ActionCodec, ObservationCodec
from rlopt.random import numpy_state, set_numpy_state
from rlopt.types import Obs, RloptError, State, Step


class NativeVectorEnv(BaseVectorEnv):
    """N copies of one of Gymnasium's MuJoCo tasks, behind the contract of ``rlopt.envs.vector.VectorEnv``.

    For equal seeds and actions it returns what ``SyncVectorEnv`` does, bit for bit: the physics is MuJoCo's, each slot
    has Gymnasium's own generator, and the tasks repeat Gymnasium's arithmetic. ``state_dict`` continues exactly.
    ``Step.obs`` and ``Step.next_obs`` are one tensor where no row was reset: treat both as read-only.

    One row is stepped in the caller's thread. More run on ``mujoco.batch``'s threads or, where contact forces are
    observed or paid for (Ant-v5, Humanoid, HumanoidStandup), on Python threads with one ``MjData`` per row, because
    the batch does not compute those.

    Args:
        env: the environment as Gymnasium builds it, whose model, numbers, spaces and time limit are used; it is closed.
        make_task: the task's arithmetic from the unwrapped environment.
        num_envs: N.
        threads: at most so many; by default torch's number. Never more than the cores that this process may use.
        dtype: of observations and rewards; float64 is for comparisons with a reference.
        options: see ``Options``.

    Raises:
        RloptError: wrappers other than the time limit, or observations that do not fit their space.
    """

    def __init__(
        self,
        env: Env,
        make_task: Callable[[Any], Task],
        num_envs: int,
        *,
        threads: int | None = None,
        dtype: type[np.floating[Any]] = np.float32,
        **options: Unpack[Options],
    ) -> None:
        # Python finds attributes faster while there are at most 30.
        super().__init__(num_envs, **options)
        observations, self._actions = ObservationCodec(env.observation_space), ActionCodec(env.action_space)
        self.spec = spec_of(env, observations, self._actions, self._env_id)
        inner: Any = env.env if isinstance(env, TimeLimit) else env
        if isinstance(inner, gymnasium.Wrapper):
            raise RloptError(f"{self.spec.id} has the wrapper {type(inner).__name__}; use backend=sync")
        self._limit: float = env._max_episode_steps if isinstance(env, TimeLimit) else math.inf
        self._task, self._frame_skip = make_task(inner), int(inner.frame_skip)
        self._physics = self._simulations(inner.model, threads)
        self._lead = () if num_envs == 1 else (num_envs,)  # the rows' axis in physics and task
        env.close()
        self._dtype = np.dtype(dtype)
        self._generators = [np.random.default_rng(0) for _ in range(num_envs)]  # replaced by the first reset
        shape = self._task.observe(self._physics.fields).shape[len(self._lead) :]
        self._check_shape(shape, observations.shapes[0])
        self._action_shape = (num_envs, *self._actions.row_shape)
        self._observed: Array = np.zeros((num_envs, *shape))
        self._measured: Array = self._task.measure(self._physics.fields)
        self._clock = 0
        self._begun = np.zeros(num_envs, np.int64)  # the clock when each row's episode began
        self._ended = np.zeros(num_envs, np.bool_)
        self._frozen = False  # whether any row has ended and waits for its reset
        self._next_limit = math.inf  # the clock before which no row can reach the time limit
        self._steps = StepBuilder(self.spec, num_envs, self.device)

    def _check_shape(self, found: tuple[int, ...], declared: tuple[int, ...]) -> None:
        if found != declared:
            raise RloptError(f"{self.spec.id} observes shape {found}, but its observation_space says {declared}")

    def _simulations(self, model: Any, threads: int | None) -> Physics:
        n, task = self.num_envs, self._task
        size = pool_size(n, threads)
        if n == 1:
            return SinglePhysics(model, task.derived, task.contact_forces)
        if task.contact_forces:
            return ThreadedPhysics(model, n, size, task.derived)
        return BatchPhysics(model, n, size, task.derived)

    def _begin(
        self,
        seeds: Sequence[int] | None,
        mask: Tensor | None,
        options: dict[str, Any] | None,
        noise_seeds: Sequence[int] | None,
    ) -> Obs:
        """Raises RloptError where ``options`` are given. After their first states these tasks draw nothing."""
        if options:
            raise RloptError(f"{self.spec.id} on backend=native takes no reset options; use backend=sync for them")
        rows = rows_of(mask, self.num_envs)
        self._seed_rows(rows, seeds)
        self._draw(np.array(rows, np.int64))
        self._seed_rows(rows, noise_seeds)
        self._look_ahead()
        return self._tensor(self._observed)

    def _seed_rows(self, rows: list[int], seeds: Sequence[int] | None) -> None:
        for i in rows if seeds is not None else ():
            self._generators[i], _ = seeding.np_random(seeds[i])  # type: ignore[index]

    def step(self, action: Tensor) -> Step:
        """Step all rows; see ``VectorEnv.step``."""
        if not self._started:
            raise self._not_begun()
        controls = self._controls(action)
        fields, task = self._physics.fields, self._task
        live = np.flatnonzero(~self._ended) if self._frozen else None
        if live is not None and not live.size:
            return self._idle()
        self._physics.step(controls, self._frame_skip, live)
        self._clock += 1
        measured = task.measure(fields)
        reward, terminated = task.outcome(fields, controls if self._lead else controls[0], self._measured, measured)
        observed = task.observe(fields)
        if live is not None:
            keep = self._ended
            reward[keep], observed[keep], measured[keep] = 0, self._observed[keep], self._measured[keep]
        self._observed, self._measured = observed.reshape(self._observed.shape), measured
        next_obs = self._tensor(self._observed)
        rewards = np.asarray(reward, self._dtype).reshape(self.num_envs)
        timed_out = self._clock >= self._next_limit
        if not (timed_out or self._frozen or (terminated is not None and np.count_nonzero(terminated))):
            return self._steps.build(next_obs, next_obs, rewards, None)
        flags = ordinary_flags(self.num_envs)
        if terminated is not None:
            flags[0] = terminated
        if timed_out:
            flags[1] = self._clock - self._begun >= self._limit
        if self._frozen:
            flags[:ENDED, self._ended] = False
            flags[VALID] = ~self._ended
        done = flags[ENDED] = flags[0] | flags[1]
        if not self.autoreset:
            self._ended |= done
            self._look_ahead()
            return self._steps.build(next_obs, next_obs, rewards, flags)
        over = np.flatnonzero(done)
        if over.size:
            self._draw(over)
        if timed_out:
            self._look_ahead()
        return self._steps.build(self._tensor(self._observed) if over.size else next_obs, next_obs, rewards, flags)

    def _controls(self, action: Tensor) -> Array:
        """Return the controls (N, A) of actions."""
        if action.dtype is torch.float32 and action.shape == self._action_shape:
            return action.numpy(force=True)  # without a copy: it is only read, and not kept
        return self._actions.batch(action, self.num_envs)

    def _idle(self) -> Step:
        """All rows have ended and wait for their reset."""
        obs, flags = self._tensor(self._observed), ordinary_flags(self.num_envs)
        flags[VALID] = False
        return self._steps.build(obs, obs, np.zeros(self.num_envs, self._dtype), flags)

    def _draw(self, rows: Array) -> None:
        """Start new episodes in ``rows`` with their own generators."""
        if not rows.size:
            return
        starts = [self._task.draw(self._generators[i]) for i in rows]
        self._physics.reset(rows, np.array([qpos for qpos, _ in starts]), np.array([qvel for _, qvel in starts]))
        fields = self._physics.fields
        if rows.size == self.num_envs:
            self._measured = self._task.measure(fields)
        else:
            fields = {name: array[rows] for name, array in fields.items() if name != "ctrl"}
            self._measured[rows] = self._task.measure(fields)
        self._observed[rows] = self._task.observe(fields)
        self._begun[rows] = self._clock  # later than before, so the next limit known stays a lower bound
        self._ended[rows] = False

    def _look_ahead(self) -> None:
        """What a step need not look at while it cannot be."""
        self._frozen = bool(self._ended.any())
        self._next_limit = int(self._begun.min()) + self._limit

    def _tensor(self, array: Array) -> Obs:
        """Return a copy of observations in the returned precision, on the device."""
        tensor = torch.from_numpy(array.astype(self._dtype))
        return tensor if self._away is None else tensor.to(self._away)

    def state_dict(self) -> State | None:
        """Return the rows' whole state; None before the first reset."""
        if not self._started:
            return None
        return {
            "physics": torch.from_numpy(self._physics.state()),
            "observed": torch.from_numpy(self._observed.copy()),
            "measured": torch.from_numpy(self._measured.reshape(self.num_envs).copy()),
            "elapsed": torch.from_numpy(self._clock - self._begun),
            "ended": torch.from_numpy(self._ended.copy()),
            "generators": [numpy_state(g) for g in self._generators],
        }

    def load_state_dict(self, state: State) -> Obs:
        """Continue where ``state_dict`` stood; returns the observations to act on.

        Raises:
            RloptError: the state is of another backend, number of environments, task or version of MuJoCo.
        """
        mine = {
            "physics": self._physics.state(),
            "observed": self._observed,
            "measured": self._measured.reshape(self.num_envs),
            "elapsed": self._begun,
            "ended": self._ended,
        }
        if not mine.keys() <= state.keys():
            raise RloptError("the saved environment is not of backend=native; resume with the backend that saved it")
        if len(state["generators"]) != self.num_envs:
            raise RloptError(
                f"the saved state holds {len(state['generators'])} environments, but num_envs is {self.num_envs}"
            )
        for name, array in mine.items():
            if tuple(state[name].shape) != array.shape:
                raise RloptError(
                    f"the saved state ({name}) has shape {tuple(state[name].shape)}, this environment's {array.shape}; "
                    "use the task, the kwargs and the mujoco version of the saved run"
                )
        for name, array in mine.items():
            array[...] = state[name].cpu().numpy()
        self._physics.set_state(mine["physics"])
        self._measured = mine["measured"].reshape(self._lead)
        self._clock, self._begun = 0, -self._begun
        for generator, saved in zip(self._generators, state["generators"], strict=True):
            set_numpy_state(generator, saved)
        self._look_ahead()
        self._started = True
        return self._tensor(self._observed)

    def _release(self) -> None:
        self._physics.close()
