"""Running normalisation of observations and rewards, applied when batches are drawn: what is stored stays raw."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.types import EnvSpec, Obs, RloptError, State, Step, obs_leaves, on_device


class RunningMoments:
    """Mean and variance of a stream, in float64, by Chan, Golub and LeVeque's parallel update (1979)."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.mean = torch.zeros(shape, dtype=torch.float64, device=device)
        self.square = torch.zeros(shape, dtype=torch.float64, device=device)
        """Sum of squared deviations from the mean."""
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, values: Tensor, rows: Tensor) -> None:
        """Add those of ``values`` (N, …) whose entry in ``rows`` (N,) is true. Never waits for the device."""
        weight = rows.to(torch.float64).reshape(-1, *[1] * (values.ndim - 1))
        batch = torch.where(weight > 0, values.to(torch.float64), 0.0)
        n = weight.sum()
        mean = batch.sum(0) / n.clamp(min=1.0)
        square = ((batch - mean).square() * weight).sum(0)
        total = (self.count + n).clamp(min=1.0)
        delta = mean - self.mean
        self.mean = torch.where(n > 0, self.mean + delta * (n / total), self.mean)
        self.square = torch.where(n > 0, self.square + square + delta.square() * (self.count * n / total), self.square)
        self.count = self.count + n

    @property
    def variance(self) -> Tensor:
        """Population variance; 1 before two values were seen."""
        return torch.where(self.count > 1, self.square / self.count.clamp(min=1.0), torch.ones_like(self.square))

    def state_dict(self) -> State:
        return {"mean": self.mean.clone(), "square": self.square.clone(), "count": self.count.clone()}

    def load_state_dict(self, state: State) -> None:
        if state["mean"].shape != self.mean.shape:
            raise RloptError(
                f"saved statistics have shape {tuple(state['mean'].shape)}, this one {tuple(self.mean.shape)}; "
                "the environment differs from the saved one"
            )
        for name in ("mean", "square", "count"):
            setattr(self, name, state[name].to(device=self.mean.device, dtype=torch.float64).clone())


class Normalizer:
    """Scales observations to zero mean and unit variance, and rewards by the standard deviation of the discounted
    return.

    Statistics grow only through ``observe``, which training calls once per vector step; not calling it freezes them.
    Floating leaves are treated; images (uint8) and indices pass through. Normalised values are clipped to
    [-clip, clip].
    The reward is scaled, not centred, by the return R_t = r_t + gamma·R_{t-1} of each environment, cut at ends (as
    in OpenAI Baselines' VecNormalize).

    Args:
        spec: the environment's.
        obs: whether observations are treated.
        reward: whether rewards are treated.
        gamma: discount of the return whose spread scales rewards.
        clip: bound of normalised values.
        epsilon: added to variances.
        device: where the statistics live; data on another device is normalised there.

    Raises:
        RloptError: observations are to be treated and none is floating.
    """

    def __init__(
        self,
        spec: EnvSpec,
        obs: bool = True,
        reward: bool = False,
        gamma: float = 0.99,
        *,
        clip: float = 10.0,
        epsilon: float = 1e-8,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device, self.gamma, self.clip, self.epsilon = torch.device(device), gamma, clip, epsilon
        leaves = obs_leaves(spec.observation_space) if obs else {}
        self.moments = {
            key: RunningMoments(tuple(space.shape), self.device)
            for key, space in leaves.items()
            if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)
        }
        if obs and not self.moments:
            raise RloptError(f"{spec.id} has no floating observation to normalise; set env.normalize_obs=false")
        self.returns = RunningMoments((), self.device) if reward else None
        self._running = torch.zeros(0, dtype=torch.float64, device=self.device)  # (N,) discounted returns so far

    @classmethod
    def from_state(cls, spec: EnvSpec, state: State, device: torch.device | str = "cpu") -> Normalizer:
        """The normaliser that gave ``state_dict() == state``."""
        settings = {name: float(state[name]) for name in ("gamma", "clip", "epsilon")}
        found = cls(spec, bool(state["moments"]), state["returns"] is not None, device=device, **settings)
        found.load_state_dict(state)
        return found

    def observe(self, obs: Obs, step: Step, gamma: float | None = None) -> None:
        """Add one vector step to the statistics; training only.

        Counts the transitions, rows that are ``valid``: the observations ``obs`` (N, …) that were acted on, and the
        rewards. So the statistics are the same in every mode of a backend. What is not finite is left out: statistics
        never recover from a single NaN. ``gamma`` replaces the constructor's from here on.
        """
        self.gamma = self.gamma if gamma is None else gamma
        valid, ended = (on_device(x, self.device) for x in (step.valid, step.ended))
        for key, moments in self.moments.items():
            leaf = on_device(obs[key] if isinstance(obs, dict) else obs, self.device)
            moments.update(leaf, valid & leaf.reshape(len(leaf), -1).isfinite().all(1))
        if self.returns is not None:
            reward = on_device(step.reward, self.device).to(torch.float64)
            valid = valid & reward.isfinite()
            if len(self._running) != len(reward):
                self._running = torch.zeros_like(reward)
            self._running = torch.where(valid, reward + self.gamma * self._running, self._running)
            self.returns.update(self._running, valid)
            self._running = torch.where(ended, 0.0, self._running)

    def normalize_obs(self, obs: Obs) -> Obs:
        """(…, *leaf shape) raw to normalised, float32."""
        if isinstance(obs, dict):
            return {key: self._leaf(key, value) for key, value in obs.items()}
        return self._leaf("", obs)

    def _leaf(self, key: str, value: Tensor) -> Tensor:
        if key not in self.moments:
            return value
        moments = self.moments[key]
        mean, scale = moments.mean, (moments.variance + self.epsilon).sqrt()
        scaled = (value.to(torch.float64) - mean.to(value.device)) / scale.to(value.device)
        return scaled.clamp(-self.clip, self.clip).to(torch.float32)

    def normalize_reward(self, reward: Tensor) -> Tensor:
        """(…) raw to scaled, float32."""
        if self.returns is None:
            return reward
        scale = (self.returns.variance + self.epsilon).sqrt()
        scaled = reward.to(torch.float64) / scale.to(reward.device)
        return scaled.clamp(-self.clip, self.clip).to(torch.float32)

    def normalize_batch(self, batch: Any) -> Any:
        """A NamedTuple with ``obs``, ``next_obs`` and ``reward``: those three normalised, the rest untouched."""
        return batch._replace(
            obs=self.normalize_obs(batch.obs),
            next_obs=self.normalize_obs(batch.next_obs),
            reward=self.normalize_reward(batch.reward),
        )

    def state_dict(self) -> State:
        """Statistics, running returns and settings."""
        return {
            "moments": {key: m.state_dict() for key, m in self.moments.items()},
            "returns": None if self.returns is None else self.returns.state_dict(),
            "running": self._running.clone(),
            "gamma": self.gamma,
            "clip": self.clip,
            "epsilon": self.epsilon,
        }

    def load_state_dict(self, state: State) -> None:
        """Continue with saved statistics; settings stay this object's own.

        Raises:
            RloptError: they are of other observations, or of another choice of what to normalise.
        """
        if set(state["moments"]) != set(self.moments) or (state["returns"] is None) != (self.returns is None):
            raise RloptError(
                "the saved normaliser treats other quantities than this one; use the saved run's "
                "env.normalize_obs and env.normalize_reward"
            )
        for key, moments in self.moments.items():
            moments.load_state_dict(state["moments"][key])
        if self.returns is not None:
            self.returns.load_state_dict(state["returns"])
        self._running = state["running"].to(device=self.device, dtype=torch.float64).clone()
