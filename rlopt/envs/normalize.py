"""Running normalisation of observations and rewards, applied when batches are drawn: what is stored stays raw."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.joint import team_reward
from rlopt.types import (
    EnvSpec,
    Obs,
    RloptError,
    State,
    Step,
    is_state,
    obs_leaves,
    on_device,
    own_index,
    own_leaves,
)


class RunningMoments:
    """Mean and variance of a stream, in float64, by Chan, Golub and LeVeque's parallel update (1979); of several runs
    those of each run's stream, with a leading axis R.

    Args:
        shape: of one value.
        device: where they live.
        runs: R, how many streams lie one after the other in what is observed.
        each: whether every entry of the value's first axis (an agent) is counted on its own.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device, runs: int = 1, each: bool = False) -> None:
        self.shape, self.runs = shape, runs
        lead = () if runs == 1 else (runs,)
        counted = (shape[0] if each else 1, *[1] * (len(shape) - 1)) if shape else ()
        self.mean = torch.zeros((*lead, *shape), dtype=torch.float64, device=device)
        self.square = torch.zeros((*lead, *shape), dtype=torch.float64, device=device)
        """Sum of squared deviations from the mean."""
        self.count = torch.zeros((*lead, *counted), dtype=torch.float64, device=device)

    def update(self, values: Tensor, rows: Tensor) -> None:
        """Add those of ``values`` (R·N, …) whose entry in ``rows`` (R·N,), of agents (R·N, n), is true. Never waits for
        the device."""
        weight = rows.to(torch.float64).reshape(*rows.shape, *[1] * (values.ndim - rows.ndim))
        batch, axis = torch.where(weight > 0, values.to(torch.float64), 0.0), 0
        if self.runs > 1:
            batch, weight = (x.view(self.runs, -1, *x.shape[1:]) for x in (batch, weight))
            axis = 1
        n = weight.sum(axis)
        mean = batch.sum(axis) / n.clamp(min=1.0)
        square = ((batch - mean.unsqueeze(axis)).square() * weight).sum(axis)
        total = (self.count + n).clamp(min=1.0)
        delta = mean - self.mean
        self.mean = torch.where(n > 0, self.mean + delta * (n / total), self.mean)
        self.square = torch.where(n > 0, self.square + square + delta.square() * (self.count * n / total), self.square)
        self.count = self.count + n

    @property
    def variance(self) -> Tensor:
        """Population variance; 1 before two values were seen."""
        return torch.where(self.count > 1, self.square / self.count.clamp(min=1.0), torch.ones_like(self.square))

    def beside(self, values: Tensor, *statistics: Tensor) -> tuple[Tensor, ...]:
        """Return ``values`` (R·…, *shape) as (R, …, *shape), and statistics of theirs so that they broadcast."""
        if self.runs == 1:
            return values, *(x.to(values.device) for x in statistics)
        middle = [1] * (values.ndim - len(self.shape))
        by_run = values.reshape(self.runs, -1, *values.shape[1:])
        return by_run, *(x.to(values.device).view(self.runs, *middle, *self.shape) for x in statistics)

    def state_dict(self) -> State:
        return {"mean": self.mean.clone(), "square": self.square.clone(), "count": self.count.clone()}

    def load_state_dict(self, state: State) -> None:
        saved, own = (tuple(x.shape) for x in (state["mean"], self.mean))
        if saved != own:
            raise RloptError(
                f"saved statistics have shape {saved}, this one {own}; the environment differs from the saved one"
            )
        for name in ("mean", "square", "count"):
            setattr(self, name, state[name].to(device=self.mean.device, dtype=torch.float64).clone())


class Normalizer:
    """Scales observations to zero mean and unit variance, and rewards by the standard deviation of the discounted
    return.

    Statistics grow only through ``observe``, which training calls once per vector step; not calling it freezes them.
    Floating leaves are treated; images (uint8), indices and masks pass through. Normalised values are clipped to
    [-clip, clip].
    The reward is scaled, not centred, by the return R_t = r_t + gamma·R_{t-1} of each environment, cut at ends (as
    in OpenAI Baselines' VecNormalize).

    Of several agents every entry of a leaf (n, …) has statistics of its own, so no agent's scale depends on another's;
    those of an agent are of the steps in which it was alive, and padding stays 0. Agents that are paid apart are all
    scaled by the return of the team: by returns of their own the sum of their rewards would become another goal.

    Several runs have statistics of their own each; then the rows of everything are theirs, run by run.

    Args:
        spec: the environment's.
        obs: whether observations are treated.
        reward: whether rewards are treated.
        gamma: discount of the return whose spread scales rewards.
        runs: R, runs side by side.
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
        runs: int = 1,
        clip: float = 10.0,
        epsilon: float = 1e-8,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device, self.gamma, self.clip, self.epsilon = torch.device(device), gamma, clip, epsilon
        self.spec, self.runs = spec, runs
        leaves = obs_leaves(spec.observation_space)
        self._mortal = bool(spec.agents) and "alive" in leaves
        self.moments = {
            key: RunningMoments(tuple(space.shape), self.device, runs, self._mortal and not is_state(key))
            for key, space in leaves.items()
            if obs and isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)
        }
        if obs and not self.moments:
            raise RloptError(f"{spec.id} has no floating observation to normalise; set env.normalize_obs=false")
        self.returns = RunningMoments((), self.device, runs) if reward else None
        self._running = torch.zeros(0, dtype=torch.float64, device=self.device)  # (R·N,) discounted returns so far

    def of_run(self, run: int) -> Normalizer:
        """Return the statistics of one run's observations as they are now, for its policy; a single run's are this very
        object, and stay up to date."""
        if self.runs == 1:
            return self
        found = self._frozen(self.spec)
        for key, moments in found.moments.items():
            every = self.moments[key]
            moments.mean, moments.square, moments.count = (
                x[run].clone() for x in (every.mean, every.square, every.count)
            )
        return found

    def of_agent(self, agent: int | str) -> Normalizer | None:
        """Return the statistics of what one agent sees as they are now, of a single run; None where nothing of it is
        treated."""
        one = self.spec.of_agent(agent)
        i = self.spec.agents.index(agent) if isinstance(agent, str) else agent
        own = {
            key if isinstance(one.observation_space, spaces.Dict) else "": key
            for key in own_leaves(one.observation_space)
        }
        if not any(key in self.moments for key in own.values()):
            return None
        found = self._frozen(one)
        for name, moments in found.moments.items():
            every, where = self.moments[own[name]], own_index(i, moments.shape)
            moments.mean, moments.square = every.mean[where].clone(), every.square[where].clone()
            moments.count = every.count[min(i, len(every.count) - 1)].reshape(moments.count.shape).clone()
        return found

    def _frozen(self, spec: EnvSpec) -> Normalizer:
        return Normalizer(spec, bool(self.moments), clip=self.clip, epsilon=self.epsilon, device=self.device)

    def observe(self, obs: Obs, step: Step, gamma: float | None = None) -> None:
        """Add one vector step to the statistics; training only.

        Counts the transitions, rows that are ``valid``: the observations ``obs`` (N, …) that were acted on, and the
        rewards. So the statistics are the same in every mode of a backend. What is not finite is left out: statistics
        never recover from a single NaN. ``gamma`` replaces the constructor's from here on.
        """
        self.observe_obs(obs, step.valid)
        self.observe_reward(step, gamma)

    def observe_obs(self, obs: Obs, valid: Tensor) -> None:
        """Add those of the observations (M, …) whose entry in ``valid`` (M,) is true, as ``observe`` does."""
        valid = on_device(valid, self.device)
        for key, moments in self.moments.items():
            leaf = on_device(obs[key] if isinstance(obs, dict) else obs, self.device)
            rows = valid & leaf.reshape(len(leaf), -1).isfinite().all(1)
            if self._mortal and not is_state(key):
                assert isinstance(obs, dict)
                rows = rows.unsqueeze(1) & on_device(obs["alive"], self.device)
            moments.update(leaf, rows)

    def observe_reward(self, step: Step, gamma: float | None = None) -> None:
        """Add the rewards of one vector step, as ``observe`` does."""
        self.gamma = self.gamma if gamma is None else gamma
        if self.returns is not None:
            valid, ended = (on_device(x, self.device) for x in (step.valid, step.ended))
            reward = team_reward(self.spec, on_device(step.reward, self.device).to(torch.float64))
            valid = valid & reward.isfinite()
            if len(self._running) != len(reward):
                self._running = torch.zeros_like(reward)
            self._running = torch.where(valid, reward + self.gamma * self._running, self._running)
            self.returns.update(self._running, valid)
            self._running = torch.where(ended, 0.0, self._running)

    def normalize_obs(self, obs: Obs) -> Obs:
        """Return (…, *leaf shape) raw to normalised, float32."""
        if isinstance(obs, dict):
            return {key: self._leaf(key, value) for key, value in obs.items()}
        return self._leaf("", obs)

    def _leaf(self, key: str, value: Tensor) -> Tensor:
        if key not in self.moments:
            return value
        moments = self.moments[key]
        scale = (moments.variance + self.epsilon).sqrt()
        by_run, mean, scale = moments.beside(value, moments.mean, scale)
        scaled = (by_run.to(torch.float64) - mean) / scale
        return scaled.clamp(-self.clip, self.clip).to(torch.float32).view(value.shape)

    def normalize_reward(self, reward: Tensor) -> Tensor:
        """Return (…) raw to scaled, float32."""
        if self.returns is None:
            return reward
        by_run, scale = self.returns.beside(reward, (self.returns.variance + self.epsilon).sqrt())
        scaled = by_run.to(torch.float64) / scale
        return scaled.clamp(-self.clip, self.clip).to(torch.float32).view(reward.shape)

    def normalize_batch(self, batch: Any) -> Any:
        """Return a NamedTuple with ``obs``, ``next_obs`` (None: there is none) and ``reward``, or each of a dict of
        such, with those three normalised and the rest untouched."""
        if isinstance(batch, dict):
            return {name: self.normalize_batch(each) for name, each in batch.items()}
        return batch._replace(
            obs=self.normalize_obs(batch.obs),
            next_obs=None if batch.next_obs is None else self.normalize_obs(batch.next_obs),
            reward=self.normalize_reward(batch.reward),
        )

    def state_dict(self) -> State:
        """Return statistics, running returns and settings."""
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
