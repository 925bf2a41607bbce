"""Random reshuffling (RR-C) for Stable-Baselines3: a replay buffer class for its SAC, TD3, DDPG and DQN.

    from stable_baselines3 import SAC
    from rlopt.buffers.interop.sb3 import ReshuffledReplayBuffer

    model = SAC("MlpPolicy", env, replay_buffer_class=ReshuffledReplayBuffer)

For Dict observations ("MultiInputPolicy") take ``ReshuffledDictReplayBuffer``. What is stored, and what a draw returns,
is Stable-Baselines3's own; which transitions are drawn is ``rlopt.buffers.ReshuffledSampler``'s.
"""

# mypy: disable-error-code="misc"
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from rlopt.buffers.samplers.reshuffled import ReshuffledSampler
from rlopt.types import RloptError, State

try:
    from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
    from stable_baselines3.common.type_aliases import DictReplayBufferSamples, ReplayBufferSamples
except ImportError as e:
    raise RloptError('rlopt.buffers.interop.sb3 needs Stable-Baselines3: pip install "rlopt[sb3]"') from e

Slots = NDArray[np.int64]


class _Reshuffled:
    """What both buffers have in place of independent draws. Slot ``row * n_envs + environment`` is one transition."""

    n_envs: int
    buffer_size: int
    pos: int
    full: bool
    optimize_memory_usage: bool

    def __init__(self, *args: Any, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seed = int(np.random.randint(2**31 - 1)) if seed is None else seed
        self._bind()

    def _bind(self) -> None:
        self.sampler = ReshuffledSampler()
        self.sampler.bind(self.buffer_size * self.n_envs, torch.device("cpu"), self.seed)

    def reset(self) -> None:
        """Forget every transition, and the permutation with them."""
        super().reset()
        self._bind()

    def add(self, *args: Any, **kwargs: Any) -> None:
        row = self.pos
        super().add(*args, **kwargs)
        self.sampler.wrote(row * self.n_envs, self.n_envs, None)
        if self.optimize_memory_usage and self.full:
            # The newest next observation lies where the oldest transition has its first one.
            nothing = torch.zeros(self.n_envs, dtype=torch.bool)
            self.sampler.wrote(self.pos * self.n_envs, self.n_envs, nothing)

    def sample(self, batch_size: int, env: Any = None) -> Any:
        """A minibatch of the permutation's next ``batch_size`` transitions, normalised by ``env`` (a VecNormalize)."""
        size = (self.buffer_size if self.full else self.pos) * self.n_envs
        index, _ = self.sampler.sample(batch_size, size)
        return self._get_samples(index.numpy(), env=env)

    def _get_samples(self, batch_inds: Slots, env: Any = None) -> Any:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["sampler"] = self.sampler.state_dict()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        sampler: State = state.pop("sampler")
        self.__dict__.update(state)
        self._bind()
        self.sampler.load_state_dict(sampler)


class ReshuffledReplayBuffer(_Reshuffled, ReplayBuffer):
    """Stable-Baselines3's ``ReplayBuffer``, drawn by random reshuffling: between two epochs' ends every transition that
    stays is drawn once.

    Its options are honoured: several environments, ``optimize_memory_usage`` (with
    ``handle_timeout_termination=False``, as Stable-Baselines3 asks), ``handle_timeout_termination``, VecNormalize.
    ``save_replay_buffer`` and ``load_replay_buffer`` keep the permutation and its generator, so that draws go on
    exactly; they pickle, as all of Stable-Baselines3 does.

    Args:
        seed: of the permutations; by default drawn from NumPy's global generator, which the model's own ``seed`` sets.

    Raises:
        RloptError: for Dict observations.
    """

    def __init__(self, buffer_size: int, observation_space: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(observation_space, spaces.Dict):
            raise RloptError("Dict observations need replay_buffer_class=ReshuffledDictReplayBuffer")
        super().__init__(buffer_size, observation_space, *args, **kwargs)

    def _get_samples(self, batch_inds: Slots, env: Any = None) -> Any:
        row, column = np.divmod(batch_inds, self.n_envs)
        if self.optimize_memory_usage:
            next_obs = self.observations[(row + 1) % self.buffer_size, column]
        else:
            next_obs = self.next_observations[row, column]
        return ReplayBufferSamples(
            self.to_torch(self._normalize_obs(self.observations[row, column], env)),
            self.to_torch(self.actions[row, column]),
            self.to_torch(self._normalize_obs(next_obs, env)),
            # A time limit is no end of the task.
            self.to_torch((self.dones[row, column] * (1 - self.timeouts[row, column])).reshape(-1, 1)),
            self.to_torch(self._normalize_reward(self.rewards[row, column].reshape(-1, 1), env)),
        )


class ReshuffledDictReplayBuffer(_Reshuffled, DictReplayBuffer):
    """Stable-Baselines3's ``DictReplayBuffer``, drawn as ``ReshuffledReplayBuffer`` is.

    Raises:
        RloptError: for observations that are no Dict, and for ``optimize_memory_usage``, which Stable-Baselines3 does
            not offer for Dicts.
    """

    def __init__(self, buffer_size: int, observation_space: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(observation_space, spaces.Dict):
            raise RloptError("observations that are no Dict need replay_buffer_class=ReshuffledReplayBuffer")
        if kwargs.get("optimize_memory_usage"):
            raise RloptError("optimize_memory_usage does not go with Dict observations; leave it out")
        super().__init__(buffer_size, observation_space, *args, **kwargs)

    def _get_samples(self, batch_inds: Slots, env: Any = None) -> Any:
        row, column = np.divmod(batch_inds, self.n_envs)
        obs, next_obs = (
            self._normalize_obs({key: leaf[row, column] for key, leaf in stored.items()}, env)
            for stored in (self.observations, self.next_observations)
        )
        return DictReplayBufferSamples(
            observations={key: self.to_torch(leaf) for key, leaf in obs.items()},
            actions=self.to_torch(self.actions[row, column]),
            next_observations={key: self.to_torch(leaf) for key, leaf in next_obs.items()},
            dones=self.to_torch((self.dones[row, column] * (1 - self.timeouts[row, column])).reshape(-1, 1)),
            rewards=self.to_torch(self._normalize_reward(self.rewards[row, column].reshape(-1, 1), env)),
        )
