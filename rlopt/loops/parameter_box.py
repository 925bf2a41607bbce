"""Simulators with parameters: a box of them, many simulated side by side on the same random numbers, a grid of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from rlopt.envs import VectorEnv
from rlopt.loops.episodes import EpisodeCounter
from rlopt.loops.evaluation import NO_LIMIT
from rlopt.policy import Policy
from rlopt.random import derive_seed
from rlopt.types import RloptError, next_carry, on_device

MAX_ROWS = 1024
"""Episodes that ``evaluate_grid`` simulates side by side."""

Array = np.ndarray[Any, np.dtype[np.float64]]
Bounds = Mapping[str, tuple[float, float]]


class ParametricEnv(VectorEnv, Protocol):
    """A vector environment whose simulator has parameters, one value per row."""

    parameters: dict[str, Tensor]
    """(N,) each."""

    def set_parameters(self, **values: float | Tensor) -> None: ...


def parametric(env: VectorEnv) -> ParametricEnv:
    """Return ``env`` itself. Raises RloptError where it has no parameters to set."""
    if not (hasattr(env, "set_parameters") and hasattr(env, "parameters")):
        raise RloptError(
            f"{env.spec.id} has no simulator parameters with this backend; use env.backend=torch (classic control, "
            "your own TorchEnv) or env.backend=native (MuJoCo)"
        )
    return cast(ParametricEnv, env)


@dataclass(frozen=True)
class ParameterBox:
    """Simulator parameters and their bounds. A point in unit coordinates has each parameter in [0, 1]."""

    names: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, bounds: Bounds) -> ParameterBox:
        """Return the box {name: (low, high)}. Raises RloptError where it is empty."""
        if not bounds:
            raise RloptError("agent.box is empty; give simulator parameters and bounds, such as agent.box.m=[0.7,1.3]")
        low, high = zip(*bounds.values(), strict=True)
        return cls(tuple(bounds), low, high)

    def values(self, points: Tensor) -> dict[str, Tensor]:
        """Return points (P, d) in unit coordinates as {name: (P,)} in the simulator's units."""
        return {
            name: low + (high - low) * points[:, i]
            for i, (name, low, high) in enumerate(zip(self.names, self.low, self.high, strict=True))
        }

    def nominal(self, env: ParametricEnv) -> Tensor:
        """Return (d,) the parameters of a new environment's first row, in unit coordinates.

        Raises:
            RloptError: a parameter that the environment lacks.
        """
        for name in self.names:
            if name not in env.parameters:
                raise RloptError(
                    f"agent.box.{name}: {env.spec.id} has no such parameter; it has {', '.join(env.parameters)}"
                )
        found = torch.tensor([float(env.parameters[name][0]) for name in self.names], dtype=torch.float64)
        low, high = (torch.tensor(side, dtype=torch.float64) for side in (self.low, self.high))
        return (found - low) / (high - low)

    def grid(self, count: int) -> Tensor:
        """Return (count**d, d) in unit coordinates, ends included, the last parameter varying fastest."""
        axis = torch.linspace(0.0, 1.0, count, dtype=torch.float64)
        return torch.cartesian_prod(*[axis] * len(self.names)).view(-1, len(self.names))


class Simulator:
    """Whole episodes of a policy at many points of a box, with common random numbers: episode e of every point begins
    from the same seed, and the policy acts deterministically.

    Args:
        env: built with ``autoreset=False``; its rows are shared by ``num_envs // episodes`` points at a time.
        episodes: E, of each point.
    """

    def __init__(self, env: VectorEnv, box: ParameterBox, episodes: int) -> None:
        if env.autoreset:
            raise ValueError("simulating whole episodes needs an environment built with autoreset=False")
        self.env, self.box, self.episodes = parametric(env), box, episodes
        self.width = env.num_envs // episodes
        if self.width < 1:
            raise ValueError(f"{env.num_envs} rows are too few for {episodes} episodes side by side")
        self.env.reset()
        self._beginning = env.state_dict()
        self.steps = 0
        """Transitions simulated so far."""

    def returns(self, policy: Policy, points: Tensor, seed: int) -> Tensor:
        """Return (P, E) undiscounted returns (float64) at ``points`` (P, d); episode e begins from
        ``derive_seed(seed, "episode", e)``."""
        seeds = [derive_seed(seed, "episode", e) for e in range(self.episodes)]
        found = []
        for wave in torch.split(points, self.width):
            # Always as many rows, so that rounding does not depend on how many points are left.
            padded = torch.cat((wave, wave[-1:].expand(self.width - len(wave), -1)))
            found.append(self._wave(policy, padded, seeds)[: len(wave)])
        return torch.cat(found)

    def _wave(self, policy: Policy, points: Tensor, seeds: Sequence[int]) -> Tensor:
        env, spare = self.env, self.env.num_envs - self.width * self.episodes
        rows = torch.cat((points.repeat_interleave(self.episodes, 0), points[-1:].expand(spare, -1)))
        if self._beginning is not None:  # nothing that survives a reset may make one wave depend on another
            env.load_state_dict(self._beginning)
        env.set_parameters(**self.box.values(rows))
        obs = env.reset(seeds=[*seeds] * self.width + [seeds[-1]] * spare)
        counter = EpisodeCounter(env.spec, env.num_envs)
        returns = torch.full((env.num_envs,), torch.nan, dtype=torch.float64)
        alive = torch.ones(env.num_envs, dtype=torch.bool)
        carry = begun = policy.initial_carry(env.num_envs)
        for _ in range(env.spec.episode_limit or NO_LIMIT):
            act = policy.act(obs, carry)
            step = env.step(act.action.to(env.device))
            if act.carry is not None:
                ended, valid = (on_device(x, policy.device) for x in (step.ended, step.valid))
                carry = next_carry(carry, act.carry, begun, ended, valid)
            obs = step.obs
            self.steps += int(alive.sum())
            for row, episode in counter.count(step).items():
                returns[row], alive[row] = episode.total_reward, False
            if not bool(alive.any()):
                break
        returns = torch.where(alive, counter.returns, returns)  # what the limit has cut, as it stands
        return returns[: env.num_envs - spare].view(self.width, self.episodes)

    def close(self) -> None:
        self.env.close()
