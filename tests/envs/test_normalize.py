"""Running normalisation, against numbers worked out by hand."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.envs import Normalizer, make_env
from rlopt.joint import own_obs
from rlopt.types import EnvSpec, RloptError, Step, map_obs


def _spec(space: Any) -> EnvSpec:
    return EnvSpec("test", space, spaces.Discrete(2))


def _observe(n: Normalizer, obs: Any, reward: list[float], ended: list[int], valid: list[int]) -> None:
    """``obs`` is what was acted on; what comes after it must not matter."""
    after = map_obs(lambda x: torch.full_like(x, 77), obs)
    no = torch.zeros(len(reward), dtype=torch.bool)
    flags = (torch.tensor(ended).bool(), torch.tensor(valid).bool())
    n.observe(obs, Step(after, after, torch.tensor(reward), no, no, *flags, {}))


BOX = spaces.Box(-np.inf, np.inf, (2,), np.float32)


class Batch(NamedTuple):
    obs: Any
    action: Tensor
    next_obs: Any
    reward: Tensor


def test_mean_and_variance_of_all_that_was_observed() -> None:
    n = Normalizer(_spec(BOX), epsilon=0.0)
    _observe(n, torch.tensor([[1.0, 10.0], [3.0, 10.0]]), [0, 0], [0, 0], [1, 1])
    _observe(n, torch.tensor([[8.0, 40.0], [99.0, 99.0]]), [0, 0], [1, 0], [1, 0])  # a surplus row is no data
    _observe(n, torch.tensor([[99.0, 0.0], [0.0, 20.0]]), [0, 0], [1, 0], [0, 1])  # nor is an episode that was lost
    # first column 1, 3, 8, 0: mean 3, variance (4 + 0 + 25 + 9)/4 = 9.5; second 10, 10, 40, 20: mean 20, variance 150
    found = n.normalize_obs(torch.tensor([[3.0 + 9.5**0.5, 20.0 - 2 * 150**0.5]]))
    assert isinstance(found, Tensor)
    assert found.dtype == torch.float32
    assert found.tolist()[0] == pytest.approx([1.0, -2.0], abs=1e-6)


def test_large_offsets_lose_no_precision() -> None:
    n = Normalizer(_spec(spaces.Box(-np.inf, np.inf, (1,), np.float32)), epsilon=0.0)
    for k in range(100):
        _observe(n, torch.tensor([[4096.0 + k % 2]]), [0], [0], [1])
    assert float(n.moments[""].variance) == pytest.approx(0.25, rel=1e-12)


def test_values_are_clipped_and_nothing_seen_means_no_change() -> None:
    n = Normalizer(_spec(BOX), clip=5.0, epsilon=0.0)
    assert n.normalize_obs(torch.tensor([[2.0, 100.0]])).tolist() == [[2.0, 5.0]]


def test_rewards_are_scaled_by_the_discounted_returns_spread_cut_at_ends() -> None:
    n = Normalizer(_spec(BOX), obs=False, reward=True, gamma=0.5, epsilon=0.0)
    obs = torch.zeros(2, 2)
    _observe(n, obs, [2.0, 1.0], [0, 0], [1, 1])  # returns 2, 1
    _observe(n, obs, [4.0, 9.0], [1, 0], [1, 0])  # 4 + 0.5·2 = 5, then cut; the second row is no transition
    _observe(n, obs, [1.0, 3.5], [0, 0], [1, 1])  # 1, and 3.5 + 0.5·1 = 4
    # returns 2, 1, 5, 1, 4: mean 2.6, variance (0.36 + 2.56 + 5.76 + 2.56 + 1.96)/5 = 2.64
    scaled = n.normalize_reward(torch.tensor([1.0, -3.0]))
    assert scaled.tolist() == pytest.approx([1 / 2.64**0.5, -3 / 2.64**0.5], rel=1e-6)


def test_a_batch_is_treated_in_obs_next_obs_and_reward_and_only_floats_are() -> None:
    space = spaces.Dict({"x": BOX, "image": spaces.Box(0, 255, (1, 2, 2), np.uint8), "index": spaces.Discrete(3)})
    n = Normalizer(_spec(space), reward=True, gamma=0.0, epsilon=0.0)
    image, index = torch.full((2, 1, 2, 2), 7, dtype=torch.uint8), torch.tensor([1, 2])
    obs = {"x": torch.tensor([[0.0, 0.0], [2.0, 4.0]]), "image": image, "index": index}
    _observe(n, obs, [0.0, 4.0], [0, 0], [1, 1])  # means 1, 2; deviations 1, 2; rewards' deviation 2
    batch = n.normalize_batch(Batch(obs, torch.tensor([0, 1]), {**obs, "x": obs["x"] + 1}, torch.tensor([1.0, 2.0])))
    assert batch.obs["x"].tolist() == [[-1.0, -1.0], [1.0, 1.0]]
    assert batch.next_obs["x"].tolist() == [[0.0, -0.5], [2.0, 1.5]]
    assert batch.reward.tolist() == [0.5, 1.0]
    assert batch.obs["image"] is image
    assert batch.obs["index"] is index
    assert batch.action.tolist() == [0, 1]


def test_saved_statistics_continue_exactly_and_reading_never_changes_them() -> None:
    torch.manual_seed(0)
    data = [(torch.randn(3, 2), torch.randn(3).tolist(), [0, 0, 1], [1, 1, 1]) for _ in range(6)]
    straight, broken = (Normalizer(_spec(BOX), reward=True) for _ in range(2))
    for step in data:
        _observe(straight, *step)
    for step in data[:3]:
        _observe(broken, *step)
    broken.normalize_obs(torch.randn(5, 2))
    resumed = Normalizer(_spec(BOX), reward=True)
    resumed.load_state_dict(broken.state_dict())
    for step in data[3:]:
        _observe(resumed, *step)
    probe = torch.randn(4, 2)
    assert torch.equal(straight.normalize_obs(probe), resumed.normalize_obs(probe))
    assert torch.equal(straight.normalize_reward(probe[:, 0]), resumed.normalize_reward(probe[:, 0]))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(RloptError, match="no floating observation"):
        Normalizer(_spec(spaces.Discrete(3)))
    saved = Normalizer(_spec(BOX)).state_dict()
    with pytest.raises(RloptError, match="other quantities"):
        Normalizer(_spec(BOX), reward=True).load_state_dict(saved)
    with pytest.raises(RloptError, match="differs"):
        Normalizer(_spec(spaces.Box(-1.0, 1.0, (3,), np.float32))).load_state_dict(saved)


def test_what_is_not_finite_never_reaches_the_statistics() -> None:
    n = Normalizer(_spec(BOX), obs=True, reward=True, gamma=0.5)
    nan, inf = float("nan"), float("inf")
    _observe(n, torch.tensor([[1.0, 2.0], [nan, 0.0]]), [1.0, inf], [0, 1], [1, 1])
    _observe(n, torch.tensor([[3.0, 4.0], [0.0, -inf]]), [1.0, nan], [0, 0], [1, 0])
    assert n.moments[""].mean.tolist() == [2.0, 3.0] and float(n.moments[""].count) == 2
    assert n.returns is not None
    assert float(n.returns.mean) == 1.25 and float(n.returns.count) == 2  # returns 1 and 1 + 0.5 of the first row


def test_scalar_observations_are_normalised() -> None:
    n = Normalizer(_spec(spaces.Box(-np.inf, np.inf, (), np.float32)), epsilon=0.0)
    _observe(n, torch.tensor([1.0, 3.0]), [0, 0], [0, 0], [1, 1])
    assert n.normalize_obs(torch.tensor([4.0])).tolist() == [2.0]


def test_runs_have_statistics_of_their_own_in_rows_one_after_the_other() -> None:
    together, singles = (
        Normalizer(_spec(BOX), reward=True, runs=3),
        [Normalizer(_spec(BOX), reward=True) for _ in "abc"],
    )
    torch.manual_seed(1)
    for _ in range(4):
        obs, reward = torch.randn(6, 2), torch.randn(6)
        ended, valid = (torch.rand(6) < 0.3).int(), (torch.rand(6) < 0.8).int()
        _observe(together, obs, reward.tolist(), ended.tolist(), valid.tolist())
        for r, single in enumerate(singles):
            rows = slice(2 * r, 2 * r + 2)
            _observe(single, obs[rows], reward[rows].tolist(), ended[rows].tolist(), valid[rows].tolist())
    for shape in ((12, 2), (12, 5, 2)):  # rows of all runs, and windows of them
        probe = 3 * torch.randn(shape)
        found = together.normalize_obs(probe)
        parts = [single.normalize_obs(part) for single, part in zip(singles, probe.split(4), strict=True)]
        assert torch.equal(found, torch.cat(parts))
        found = together.normalize_reward(probe[..., 0])
        parts = [single.normalize_reward(part) for single, part in zip(singles, probe[..., 0].split(4), strict=True)]
        assert torch.equal(found, torch.cat(parts))
    for r, single in enumerate(singles):
        assert torch.equal(together.of_run(r).normalize_obs(probe), single.normalize_obs(probe))
    resumed = Normalizer(_spec(BOX), reward=True, runs=3)
    resumed.load_state_dict(together.state_dict())
    assert torch.equal(resumed.normalize_obs(probe), together.normalize_obs(probe))


def test_a_teams_statistics_are_of_the_living_and_leave_masks_and_padding_alone() -> None:
    env = make_env("rlopt.envs.counting:rlopt/CountTeam-v0", 2, backend="sync", kwargs={"length": 4, "dies": 2})
    n = Normalizer(env.spec, reward=True)
    obs, zero = env.reset(), torch.zeros(2, 3, dtype=torch.int64)
    assert isinstance(obs, dict)
    seen: list[Tensor] = []
    for _ in range(4):
        step = env.step(zero)
        n.observe(obs, step)
        seen.append(obs["obs"])
        obs = step.obs
    counts = torch.tensor([0.0, 1.0, 2.0, 3.0]).double()
    moments = n.moments["obs"]
    assert moments.mean[:, 0].tolist() == [1.5, 0.5, 1.5], "agent 1 saw 0 and 1 before it died"
    assert moments.variance[:, 0].tolist() == [float(counts.var(correction=0)), 0.25, float(counts.var(correction=0))]
    assert moments.mean[0].tolist() == [1.5, 0, 0, 0]
    found = n.normalize_obs({**obs, "obs": seen[3], "state": obs["state"] + 50.0})
    assert isinstance(found, dict)
    assert found["action_mask"] is obs["action_mask"]
    assert found["alive"] is obs["alive"]
    assert found["obs"][0, 0, 2:].tolist() == [0.0, 0.0], "padding"
    assert (found["state"] != obs["state"] + 50.0).any(), "the critics' state is normalised like anything else"
    # One scale for all: that of the team's discounted return, so that the sum of rewards means what it did.
    team = torch.tensor([6.0, 12.0, 12.0, 16.0], dtype=torch.float64)
    returns = [float(sum(0.99 ** (t - k) * team[k] for k in range(t + 1))) for t in range(4)]
    scale = float(np.std(returns))
    reward = torch.tensor([[1.0, 2.0, 3.0]])
    assert n.normalize_reward(reward)[0].tolist() == pytest.approx([1 / scale, 2 / scale, 3 / scale])


def test_what_one_agent_sees_is_normalised_as_in_the_team() -> None:
    env = make_env("rlopt.envs.counting:rlopt/CountTeam-v0", 2, backend="sync", kwargs={"length": (4, 6)})
    n = Normalizer(env.spec)
    obs = env.reset()
    for _ in range(9):
        step = env.step(torch.zeros(2, 3, dtype=torch.int64))
        n.observe(obs, step)
        obs = step.obs
    together = n.normalize_obs(obs)
    for i, name in enumerate(env.spec.agents):
        own = n.of_agent(name)
        assert own is not None
        assert own.state_dict()["moments"].keys() == {"obs"}
        alone = own.normalize_obs(own_obs(env.spec, obs, i))
        expected = own_obs(env.spec, together, i)
        assert isinstance(alone, dict) and isinstance(expected, dict)
        assert all(torch.equal(alone[key], expected[key]) for key in alone)
        Normalizer(env.spec.of_agent(name)).load_state_dict(own.state_dict())
