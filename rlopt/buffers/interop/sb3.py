"""Random reshuffling for Stable-Baselines3: replay buffer classes for its SAC, TD3, DDPG and DQN.

    from stable_baselines3 import SAC
    from rlopt.buffers.interop.sb3 import ReshuffledReplayBuffer

    model = SAC("MlpPolicy", env, replay_buffer_class=ReshuffledReplayBuffer)
    model = SAC("MlpPolicy", env, replay_buffer_class=ReshuffledReplayBuffer,
                replay_buffer_kwargs={"n_steps": 3, "gamma": 0.99})

For Dict observations ("MultiInputPolicy") take ``ReshuffledDictReplayBuffer``; for priorities, with an algorithm that
gives some, ``PrioritizedReshuffledReplayBuffer``. What is stored, and what a draw returns, is Stable-Baselines3's own;
which transitions are drawn is ``rlopt.buffers.ReshuffledSampler``'s.
"""

# mypy: disable-error-code="misc"
from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from rlopt.buffers.samplers.base import Sampler
from rlopt.buffers.samplers.prioritized_reshuffled import PrioritizedReshuffledSampler
from rlopt.buffers.samplers.reshuffled import ReshuffledSampler
from rlopt.types import RloptError, State
from rlopt.version import install

try:
    from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
    from stable_baselines3.common.type_aliases import DictReplayBufferSamples, ReplayBufferSamples
except ImportError as e:
    raise RloptError(f"rlopt.buffers.interop.sb3 needs Stable-Baselines3; {install('sb3')}") from e

Slots = NDArray[np.int64]
UNTOLD = 100
"""Draws without priorities after which a prioritised buffer says so."""
_log = logging.getLogger(__name__)


class _Sampled:
    """Draws by one of rlopt's samplers, in every class below. Slot ``row * n_envs + environment`` is one transition."""

    n_envs: int
    buffer_size: int
    pos: int
    full: bool
    optimize_memory_usage: bool
    sampler: Sampler

    def __init__(self, *args: Any, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seed = int(np.random.randint(2**31 - 1)) if seed is None else seed
        self._bind()

    def _make_sampler(self) -> Sampler:
        return ReshuffledSampler()

    def _bind(self) -> None:
        self.sampler = self._make_sampler()
        self.sampler.bind(self.buffer_size * self.n_envs, torch.device("cpu"), self.seed)

    def reset(self) -> None:
        """Forget every transition, and the order of draws with them."""
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
        """Return the sampler's next ``batch_size`` transitions, normalised by ``env`` (a VecNormalize)."""
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


class ReshuffledReplayBuffer(_Sampled, ReplayBuffer):
    """Stable-Baselines3's ``ReplayBuffer`` and ``NStepReplayBuffer``, drawn by random reshuffling: between two epochs'
    ends every transition that stays is drawn once.

    Its options are honoured: several environments, ``optimize_memory_usage`` (with
    ``handle_timeout_termination=False``, as Stable-Baselines3 asks), ``handle_timeout_termination``, VecNormalize.
    ``save_replay_buffer`` and ``load_replay_buffer`` keep the permutation and its generator, so that draws go on
    exactly; they pickle, as all of Stable-Baselines3 does.

    Args:
        seed: of the permutations; by default drawn from NumPy's global generator, which the model's own ``seed`` sets.
        n_steps: length of the return window. An algorithm's own ``n_steps`` does not reach a replay buffer class: give
            it in ``replay_buffer_kwargs``, with ``gamma``.
        gamma: discount inside the window.

    Raises:
        RloptError: for Dict observations, and for windows with ``optimize_memory_usage``.
    """

    def __init__(
        self, buffer_size: int, observation_space: Any, *args: Any, n_steps: int = 1, gamma: float = 0.99, **kwargs: Any
    ) -> None:
        if isinstance(observation_space, spaces.Dict):
            raise RloptError("Dict observations need replay_buffer_class=ReshuffledDictReplayBuffer")
        if n_steps < 1:
            raise RloptError(f"n_steps must be at least 1, not {n_steps}")
        self.n_steps, self.gamma = n_steps, gamma
        super().__init__(buffer_size, observation_space, *args, **kwargs)
        if n_steps > 1 and self.optimize_memory_usage:
            raise RloptError("optimize_memory_usage does not go with n_steps above 1; leave it out")

    def _get_samples(self, batch_inds: Slots, env: Any = None) -> Any:
        row, column = np.divmod(batch_inds, self.n_envs)
        last, reward, discount = row, self._normalize_reward(self.rewards[row, column], env), None
        if self.n_steps > 1:
            reward, last, length = self._windows(row, column, env)
            discount = self.to_torch((self.gamma**length).astype(np.float32).reshape(-1, 1))
        if self.optimize_memory_usage:
            next_obs = self.observations[(row + 1) % self.buffer_size, column]
        else:
            next_obs = self.next_observations[last, column]
        # A time limit is no end of the task.
        done = self.dones[last, column] * (1 - self.timeouts[last, column])
        samples = ReplayBufferSamples(
            self.to_torch(self._normalize_obs(self.observations[row, column], env)),
            self.to_torch(self.actions[row, column]),
            self.to_torch(self._normalize_obs(next_obs, env)),
            self.to_torch(done.reshape(-1, 1)),
            self.to_torch(reward.reshape(-1, 1)),
        )
        return samples if discount is None else samples._replace(discounts=discount)

    def _windows(self, row: Slots, column: Slots, env: Any) -> tuple[NDArray[Any], Slots, Slots]:
        """Return n-step returns (B,), last rows and lengths: a window ends with its episode and at the newest row."""
        rows = (row[:, None] + np.arange(self.n_steps)) % self.buffer_size
        newest = rows == (self.pos - 1) % self.buffer_size
        over = (self.dones[rows, column[:, None]] != 0) | (self.timeouts[rows, column[:, None]] != 0) | newest
        length = np.where(over.any(1), over.argmax(1) + 1, self.n_steps)
        inside = np.arange(self.n_steps) < length[:, None]
        reward = self._normalize_reward(self.rewards[rows, column[:, None]], env)
        returns = (np.where(inside, reward, 0.0) * self.gamma ** np.arange(self.n_steps, dtype=np.float32)).sum(1)
        return returns.astype(np.float32), (row + length - 1) % self.buffer_size, length


class ReshuffledDictReplayBuffer(_Sampled, DictReplayBuffer):
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


class PrioritizedReshuffledReplayBuffer(ReshuffledReplayBuffer):
    """``ReshuffledReplayBuffer`` with priorities: reshuffling by masking (RR-M).

    Stable-Baselines3's algorithms give no priorities; one of your own calls, after each of its updates::

        samples = self.replay_buffer.sample(batch_size)
        ...
        self.replay_buffer.update_priority(td_error)  # (B,) of what was drawn last

    Importance weights of what was drawn last are ``weight``, (B, 1), or None with the paper's defaults. Without
    priorities it draws like ``ReshuffledReplayBuffer``, and says so.

    Args:
        alpha, beta, anneal_draws, epsilon, floor, max_decay: see ``rlopt.buffers.PrioritizedReshuffledSampler``; the
            rest as ``ReshuffledReplayBuffer``.
    """

    def __init__(self, buffer_size: int, observation_space: Any, *args: Any, **kwargs: Any) -> None:
        names = ("alpha", "beta", "anneal_draws", "epsilon", "floor", "max_decay")
        self.options = {name: kwargs.pop(name) for name in names if name in kwargs}
        self.index: torch.Tensor | None = None
        self.weight: torch.Tensor | None = None
        self._untold = 0
        """Minibatches drawn before the first priorities; -1 once there were some."""
        super().__init__(buffer_size, observation_space, *args, **kwargs)

    def _make_sampler(self) -> Sampler:
        return PrioritizedReshuffledSampler(**self.options)

    def sample(self, batch_size: int, env: Any = None) -> Any:
        """Return a minibatch; ``index`` and ``weight`` say which transitions and with what importance."""
        size = (self.buffer_size if self.full else self.pos) * self.n_envs
        self.index, weight = self.sampler.sample(batch_size, size)
        self.weight = None if weight is None else weight.view(-1, 1).to(self.device)
        self._untold += self._untold >= 0
        if self._untold == UNTOLD:
            _log.warning("%d draws and no priorities: call update_priority, or use ReshuffledReplayBuffer", UNTOLD)
        return self._get_samples(self.index.numpy(), env=env)

    def update_priority(self, td_error: Any) -> None:
        """Take the errors δ (B,) of the minibatch drawn last. Raises RloptError where nothing was drawn, or another
        number."""
        if self.index is None:
            raise RloptError("priorities are of the minibatch drawn last; call sample first")
        self._untold = -1
        error = torch.as_tensor(td_error).detach().cpu().reshape(-1)
        self.sampler.update_priority(self.index, error)
