"""Group rollouts: fixed tasks reshuffled, noise of one's own, groups that teach nothing, rows that are over."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from rlopt.agents import GiGPO, GiGPOConfig
from rlopt.buffers import Rollout
from rlopt.envs import make_env
from rlopt.loops.group import GroupLoop, differing_groups, of_groups
from rlopt.nn import NetworkConfig
from rlopt.random import derive_seed
from rlopt.state import states_equal
from rlopt.types import Act


class Coins(gym.Env):
    """A seed's draw says how long an episode is, 1 to 3; each step shows a coin thrown by the noise and pays the
    action, but nothing where the seed is odd."""

    observation_space = gym.spaces.MultiDiscrete([4, 2, 8])
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.pays, self.t = seed is None or seed % 2 == 0, 0
        self.length = 1 + int(self.np_random.integers(3))
        return np.array([self.length, 0, 0]), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        coin = int(self.np_random.integers(2))
        return np.array([self.length, coin, self.t]), float(action) * self.pays, self.t == self.length, False, {}


gym.register("rlopt-tests/Coins-v0", entry_point=Coins)


class Recorder(GiGPO):
    """Keeps what it learns from and how many rows it acted for."""

    def act(self, obs: Any, carry: Any = None, deterministic: bool = False) -> Act:
        self.__dict__.setdefault("rows", []).append(len(obs))
        return super().act(obs, carry, deterministic)

    def update(self, batch: Any) -> Any:
        self.__dict__.setdefault("rollouts", []).append(batch)
        return super().update(batch)


def make(total_steps: int = 1_000, **options: Any) -> GroupLoop:
    config = GiGPOConfig(**{"groups": 4, "group_size": 4, "network": NetworkConfig(hidden=()), **options})
    env = make_env("rlopt-tests/Coins-v0", config.groups * config.group_size, autoreset=False)
    return GroupLoop(Recorder(env.spec, config), env, total_steps)


def seeds_of(loop: GroupLoop) -> list[int]:
    return [env.unwrapped.np_random_seed for env in loop.env.envs][:: loop.config.group_size]  # type: ignore[attr-defined]


def test_each_of_the_tasks_comes_up_once_in_a_pass_over_them() -> None:
    loop = make(tasks=6, groups=3)
    passes = []
    for _ in range(4):
        loop.advance()
        passes += seeds_of(loop)
    assert sorted(passes[:6]) == sorted(passes[6:]) == list(range(6)) and passes[:6] != passes[6:]


def test_members_share_their_noise_unless_each_is_to_have_its_own() -> None:
    for noise in ("shared", "independent"):
        loop = make(noise=noise, groups=8)
        loop.advance()
        (rollout,) = loop.agent.rollouts  # type: ignore[attr-defined]
        assert torch.equal(rollout.obs[0, 0::4], rollout.obs[0, 1::4])
        longest = rollout.obs[0, :, 0] == 3
        coins = rollout.obs[1:3, longest, 1].view(2, -1, 4)
        assert bool((coins == coins[..., :1]).all()) == (noise == "shared")


def test_groups_that_teach_nothing_are_replaced() -> None:
    plain, resampled = make(tasks=8), make(tasks=8, resample=10)
    plain.advance()
    resampled.advance()
    (first,), (second,) = plain.agent.rollouts, resampled.agent.rollouts  # type: ignore[attr-defined]
    some = differing_groups(first)
    assert 0 < len(some) < 4 and all(seeds_of(plain)[g] % 2 == 0 for g in some)
    assert differing_groups(second) == [0, 1, 2, 3] and second.group.tolist() == plain.group.tolist()
    assert resampled.iteration > 1 and resampled.step > int(second.valid.sum())  # all that was collected counts
    assert resampled.agent.clock.updates == 1


def test_where_no_group_teaches_the_last_rollout_is_learnt_from(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = make(tasks=1, resample=2, groups=1, group_size=2)
    monkeypatch.setattr("rlopt.loops.group.group_seeds", lambda *_: [1])
    loop.advance()
    assert loop.iteration == 3 and len(loop.agent.rollouts) == 1  # type: ignore[attr-defined]


def test_time_lines_beside_each_other_are_padded_with_what_is_no_transition() -> None:
    loop = make(groups=2, group_size=2)
    for _ in range(6):
        loop.advance()
    parts = sorted(loop.agent.rollouts, key=lambda one: len(one.reward))[::5]  # type: ignore[attr-defined]
    assert len(parts[0].reward) < len(parts[1].reward)
    both = Rollout.beside(parts)
    assert both.valid.shape == (len(parts[1].reward), 8) and both.group.tolist() == [0, 0, 1, 1] * 2  # type: ignore[union-attr]
    for part, columns in zip(parts, (slice(0, 4), slice(4, 8)), strict=True):
        steps = len(part.reward)
        assert torch.equal(both.reward[:steps, columns], part.reward) and torch.equal(
            both.obs[:steps, columns], part.obs
        )
        rest = (both.valid, both.ended, both.terminated, both.truncated, both.reward)
        assert not any(bool(x[steps:, columns].any()) for x in rest)


def test_chosen_groups_are_called_anew() -> None:
    loop = make()
    loop.advance()
    (rollout,) = loop.agent.rollouts  # type: ignore[attr-defined]
    some = of_groups(rollout, [2, 0], 1)
    assert some.group.tolist() == [1] * 4 + [2] * 4  # type: ignore[union-attr]
    assert torch.equal(some.obs[:, :4], rollout.obs[:, 8:12]) and torch.equal(some.obs[:, 4:], rollout.obs[:, :4])


def test_nobody_acts_for_episodes_that_are_over() -> None:
    loop = make()
    loop.advance()
    (rollout,) = loop.agent.rollouts  # type: ignore[attr-defined]
    assert loop.agent.rows == rollout.valid.sum(1).tolist() and len(set(loop.agent.rows)) > 1  # type: ignore[attr-defined]


def test_it_goes_on_exactly() -> None:
    options: dict[str, Any] = {"tasks": 5, "noise": "independent", "resample": 3}
    whole, begun = make(**options), make(**options)
    for _ in range(3):
        whole.advance()
    begun.advance()
    again = make(**options)
    again.load_state_dict(begun.state_dict())
    for _ in range(2):
        again.advance()
    assert states_equal(whole.state_dict(), again.state_dict()) is None


def test_the_seeds_of_new_tasks_are_derived() -> None:
    loop = make()
    loop.advance()
    assert seeds_of(loop) == [derive_seed(0, "group", 0, g) for g in range(4)]
