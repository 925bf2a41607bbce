"""N Gymnasium environments stepped one after the other in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from rlopt.envs.edge import facts_info, told_facts
from rlopt.envs.snapshot import restore, snapshot
from rlopt.envs.spaces import ActionCodec, Array, ObservationCodec
from rlopt.random import derive_seed
from rlopt.types import EnvSpec, Obs, RloptError, State, Step

Env = gymnasium.Env[Any, Any]
_FIVE = "observation, reward, terminated, truncated, info"


DECLARED = ("agents", "agent_spaces", "reward_shape", "derived", "frame_stack", "facts")
"""Fields of ``EnvSpec`` that Gymnasium has no place for: an environment declares them in its ``metadata``, which every
wrapper, worker process and vector of environments passes on."""


def spec_of(
    env: Env | gymnasium.vector.VectorEnv[Any, Any, Any],
    observations: ObservationCodec,
    actions: ActionCodec,
    env_id: str | None = None,
) -> EnvSpec:
    """Return what a Gymnasium environment, or a vector of them, is in rlopt's words.

    Raises:
        RloptError: what it declares in its metadata does not fit its spaces.
    """
    registered, declared = env.spec, {key: env.metadata[key] for key in DECLARED if key in (env.metadata or {})}
    if "agent_spaces" in declared:
        pairs = declared["agent_spaces"]
        declared["agent_spaces"] = [(ObservationCodec(seen).space, ActionCodec(done).space) for seen, done in pairs]
    return EnvSpec(
        id=env_id or (registered.id if registered else type(env.unwrapped).__name__),
        observation_space=observations.space,
        action_space=actions.space,
        episode_limit=registered.max_episode_steps if registered else None,
        **declared,
    )


def check_reward(reward: Any, spec: EnvSpec, *rows: int) -> Any:
    """Return the reward of one environment, or of a vector of ``rows``, as it came.

    Raises:
        RloptError: it has not the shape that the environment's spec says.
    """
    if np.shape(reward) != (*rows, *spec.reward_shape):
        raise RloptError(
            f"{spec.id} gives rewards of shape {np.shape(reward)}, not {(*rows, *spec.reward_shape)}; agents that are "
            "paid apart have metadata['reward_shape'] = (n,)"
        )
    return reward


def reset_seeds(seeds: Sequence[int] | None, n: int) -> list[int | None]:
    """One seed or None for each of n rows.

    Raises:
        RloptError: the number of seeds is not n.
    """
    if seeds is None:
        return [None] * n
    if len(seeds) != n:
        raise RloptError(f"reset got {len(seeds)} seeds for {n} environments; give one seed per environment")
    return [int(s) for s in seeds]


def reset_rows(mask: Tensor | None, n: int) -> list[int]:
    """The rows that a reset concerns."""
    if mask is None:
        return list(range(n))
    if mask.shape != (n,):
        raise RloptError(f"reset's mask has shape {tuple(mask.shape)}; it must be ({n},)")
    return [int(i) for i in mask.nonzero()]


_TERMINATED, _TRUNCATED, ENDED, VALID = range(4)


def ordinary_flags(n: int) -> Array:
    """Flags (4, n) of a step in which nothing ends: rows TERMINATED, TRUNCATED, ENDED and VALID."""
    flags = np.zeros((4, n), np.bool_)
    flags[VALID] = True
    return flags


class StepBuilder:
    """Builds each ``Step``. Steps in which nothing ends share their flag tensors: treat them as read-only.

    Should a caller have written into the shared tensors all the same, torch's version counter shows it and they are
    made anew.
    """

    def __init__(self, n: int, device: torch.device) -> None:
        self._n, self._device = n, device
        self._cpu = device.type == "cpu"
        self._renew()

    def _renew(self) -> None:
        self._no = torch.zeros(self._n, dtype=torch.bool, device=self._device)
        self._yes = torch.ones(self._n, dtype=torch.bool, device=self._device)

    def build(
        self, obs: Obs, next_obs: Obs, reward: Array, flags: Array | None, info: dict[str, Tensor] | None = None
    ) -> Step:
        """``reward`` (N, …) float32 and ``flags`` (4, N), None for an ordinary step; the arrays are handed over."""
        rewards = torch.from_numpy(reward)
        if not self._cpu:
            rewards = rewards.to(self._device)
        if flags is None:
            if self._no._version or self._yes._version:
                self._renew()
            return Step(obs, next_obs, rewards, self._no, self._no, self._no, self._yes, {})
        terminated, truncated, ended, valid = torch.from_numpy(flags).to(self._device).unbind(0)
        return Step(obs, next_obs, rewards, terminated, truncated, ended, valid, info or {})


class SyncVectorEnv:
    """N environments in this process, behind the contract of ``rlopt.envs.vector.VectorEnv``.

    Fast environments (classic control, MuJoCo) gain nothing from worker processes: this is the default backend.
    ``Step.obs`` and ``Step.next_obs`` are one tensor where no row was reset: treat both as read-only.

    Args:
        env_fns: one function per environment, each building it.
        seed: the run's seed; slot i's first reset uses ``derive_seed(seed, stream, i)``.
        device: where the tensors that it returns live.
        autoreset: see ``VectorEnv``.
        env_id: the name reported in ``spec``; by default the registered one.
        stream: the name of the random stream.

    Raises:
        RloptError: no environment, or a space without translation.
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], Env]],
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        autoreset: bool = True,
        env_id: str | None = None,
        stream: str = "env",
    ) -> None:
        if not env_fns:
            raise RloptError("a vector environment needs num_envs of at least 1")
        self.envs: list[Env] = []
        try:
            for build in env_fns:
                self.envs.append(build())
            self._describe(env_id)
        except BaseException:
            for env in self.envs:
                env.close()
            raise
        self.num_envs, self.device, self.autoreset = len(self.envs), torch.device(device), autoreset
        self._first_seeds = [derive_seed(seed, stream, slot) for slot in range(self.num_envs)]
        self._current = self._observations.arrays(self.num_envs)
        self._ended = [False] * self.num_envs
        self._steps = StepBuilder(self.num_envs, self.device)
        self._started = False
        self._closed = False

    def _describe(self, env_id: str | None) -> None:
        first = self.envs[0]
        for name in ("observation_space", "action_space"):
            if getattr(first, name, None) is None:
                raise RloptError(f"{first} has no {name}; set it in its __init__")
        spaces = (first.observation_space, first.action_space)
        if any((e.observation_space, e.action_space) != spaces for e in self.envs):
            raise RloptError("the environments of one vector must have equal observation and action spaces")
        self._observations, self._actions = ObservationCodec(first.observation_space), ActionCodec(first.action_space)
        self.spec = spec_of(first, self._observations, self._actions, env_id)

    def reset(
        self, seeds: Sequence[int] | None = None, mask: Tensor | None = None, options: dict[str, Any] | None = None
    ) -> Obs:
        """Begin new episodes; see ``VectorEnv.reset``. The first reset uses the slots' derived seeds."""
        if seeds is None and not self._started:
            seeds, mask = self._first_seeds, None
        row_seeds = reset_seeds(seeds, self.num_envs)
        for i in reset_rows(mask, self.num_envs):
            obs, _ = self.envs[i].reset(seed=row_seeds[i], options=dict(options) if options else None)
            self._observations.check(obs)
            self._observations.write(self._current, i, obs)
            self._ended[i] = False
        self._started = True
        return self._observations.tensors(self._current, self.device)

    def step(self, action: Tensor) -> Step:
        """Step all rows; see ``VectorEnv.step``."""
        if not self._started:
            raise RloptError("step was called before reset; call reset() once after building the environment")
        n, codec, current, ended = self.num_envs, self._observations, self._current, self._ended
        write = codec.write
        reward, apart = np.zeros((n, *self.spec.reward_shape), np.float32), bool(self.spec.reward_shape)
        flags: Array | None = None  # most steps raise no flag, and building tensors is what costs time here
        facts: Array | None = None
        for i, (env, a) in enumerate(zip(self.envs, self._actions.rows(action, n), strict=True)):
            if ended[i]:
                flags = ordinary_flags(n) if flags is None else flags
                flags[VALID, i] = False
            else:
                given = env.step(a)
                if len(given) != 5:
                    raise RloptError(f"{env}: step gives {len(given)} values; Gymnasium's five are {_FIVE}")
                obs, paid, terminated, truncated, info = given
                try:
                    reward[i] = check_reward(paid, self.spec) if apart else paid
                except (TypeError, ValueError):
                    check_reward(paid, self.spec)
                    raise
                write(current, i, obs)
                if terminated or truncated:
                    flags = ordinary_flags(n) if flags is None else flags
                    flags[:VALID, i] = terminated, truncated, True
                    if self.spec.facts:
                        facts = np.zeros((n, len(self.spec.facts)), np.float32) if facts is None else facts
                        facts[i] = told_facts(info, self.spec)
                    ended[i] = not self.autoreset
        next_obs = observed = codec.tensors(current, self.device)
        if flags is not None and self.autoreset:
            for i in flags[ENDED].nonzero()[0]:
                write(current, i, self.envs[i].reset()[0])
            observed = codec.tensors(current, self.device)
        return self._steps.build(observed, next_obs, reward, flags, facts_info(self.spec.facts, facts, self.device))

    def state_dict(self) -> State | None:
        """All environments exactly (see ``rlopt.envs.snapshot``), or None where one of them cannot be saved."""
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
        return self._observations.tensors(self._current, self.device)

    def close(self) -> None:
        """Close every environment. Safe to call twice."""
        if not self._closed:
            self._closed = True
            for env in self.envs:
                env.close()


def pack_state(states: Sequence[State | None], current: list[Any], ended: list[bool]) -> State:
    """The state tree of a vector environment from its environments' trees."""
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
