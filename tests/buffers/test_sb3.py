"""The replay buffer class for Stable-Baselines3, inside its own algorithms."""

from __future__ import annotations

import pickle
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

pytest.importorskip("stable_baselines3")

from stable_baselines3 import DQN, SAC, TD3
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from rlopt.buffers.interop import sb3
from rlopt.buffers.interop.sb3 import (
    PrioritizedReshuffledReplayBuffer,
    ReshuffledDictReplayBuffer,
    ReshuffledReplayBuffer,
)
from rlopt.types import RloptError

BOX, ACTION = spaces.Box(-1e6, 1e6, (2,)), spaces.Box(-1, 1, (1,))


def small() -> dict[str, Any]:
    """Options made anew: Stable-Baselines3 writes into ``policy_kwargs``."""
    return {"policy_kwargs": {"net_arch": [8]}, "learning_starts": 20, "batch_size": 16, "device": "cpu", "seed": 5}


def fill(buffer: Any, rows: int, first: int = 0) -> None:
    """Rows whose every number is made from the row and the environment: transition ``row * n_envs + environment``."""
    for row in range(first, first + rows):
        number = row * buffer.n_envs + np.arange(buffer.n_envs)
        obs = np.stack([number, -number], 1).astype(np.float32)
        done = number % 5 == 0
        infos = [{"TimeLimit.truncated": bool(n % 10 == 0)} for n in number]
        action = (number % 3)[:, None].astype(np.float32)
        if isinstance(buffer, DictReplayBuffer):
            leaf = {"a": obs, "b": obs[:, :1]}
            buffer.add(leaf, {key: x + 0.5 for key, x in leaf.items()}, action, number * 2.0, done, infos)
        else:
            buffer.add(obs, obs + 0.5, action, number * 2.0, done, infos)


def make(size: int = 60, n_envs: int = 3, **options: Any) -> ReshuffledReplayBuffer:
    return ReshuffledReplayBuffer(size, BOX, ACTION, device="cpu", n_envs=n_envs, **{"seed": 1, **options})


def numbers(batch: Any) -> list[int]:
    observations = batch.observations["a"] if isinstance(batch.observations, dict) else batch.observations
    return observations[:, 0].int().tolist()


@pytest.mark.parametrize("n_envs", [1, 3])
def test_an_epoch_draws_every_transition_once_with_its_own_fields(n_envs: int) -> None:
    buffer = make(60, n_envs)
    fill(buffer, 2 * 60 // n_envs)  # every slot overwritten once
    batches = [buffer.sample(20) for _ in range(3)]
    assert sorted(n for batch in batches for n in numbers(batch)) == list(range(60, 120))
    for batch in batches:
        n = np.array(numbers(batch))
        assert batch.observations.tolist() == np.stack([n, -n], 1).tolist()
        assert batch.next_observations.tolist() == (np.stack([n, -n], 1) + 0.5).tolist()
        assert batch.rewards.flatten().tolist() == (n * 2.0).tolist() and batch.rewards.shape == (20, 1)
        assert batch.actions.flatten().tolist() == (n % 3).tolist()
        # Every fifth ends an episode; every tenth by a time limit, which is no end of the task.
        assert batch.dones.flatten().tolist() == ((n % 5 == 0) & (n % 10 != 0)).tolist()
        assert batch.dones.shape == (20, 1)


def test_time_limits_count_as_ends_where_they_are_asked_to() -> None:
    buffer = make(handle_timeout_termination=False)
    fill(buffer, 20)
    batch = buffer.sample(60)
    assert batch.dones.flatten().tolist() == [float(n % 5 == 0) for n in numbers(batch)]


def use_counts(buffer: ReplayBuffer, ratio: int, batch_size: int) -> np.ndarray[Any, Any]:
    """How often each transition was drawn between being written and overwritten, ``ratio`` draws for each write."""
    rows, steps = buffer.buffer_size, 12 * buffer.buffer_size
    counts = np.zeros(steps * buffer.n_envs)
    fill(buffer, rows)
    owed = 0
    for row in range(rows, steps):
        fill(buffer, 1, row)
        owed += ratio * buffer.n_envs
        while owed >= batch_size:
            np.add.at(counts, numbers(buffer.sample(batch_size)), 1)
            owed -= batch_size
    return counts[2 * rows * buffer.n_envs : -rows * buffer.n_envs]


def test_use_counts_vary_by_a_third_and_not_like_poisson() -> None:
    """Eight draws per write: r give or take one with reshuffling (variance 1/3), r with replacement."""
    ours = use_counts(make(300, 2), ratio=8, batch_size=50)
    assert ours.mean() == pytest.approx(8, abs=0.02)
    assert set(ours) <= {7, 8, 9}
    assert ours.var() == pytest.approx(1 / 3, abs=0.05)
    np.random.seed(0)
    theirs = use_counts(ReplayBuffer(300, BOX, ACTION, device="cpu", n_envs=2), ratio=8, batch_size=50)
    assert theirs.var() == pytest.approx(8, abs=1.0)


def test_saving_memory_never_draws_the_transition_without_its_observation() -> None:
    buffer = make(40, 2, optimize_memory_usage=True, handle_timeout_termination=False)
    for row in range(55):
        number = row * 2 + np.arange(2)
        obs = np.stack([number, -number], 1).astype(np.float32)
        buffer.add(obs, obs + np.array([2, -2]), np.zeros((2, 1)), number * 2.0, number < 0, [{}, {}])
        if row < 3:
            continue
        batch = buffer.sample(30)
        n = np.array(numbers(batch))
        assert batch.rewards.flatten().tolist() == (2.0 * n).tolist()
        assert batch.next_observations[:, 0].tolist() == (n + 2).tolist()
        assert n.min() >= 2 * max(0, row - 18) and n.max() <= 2 * row + 1
    epoch = [n for _ in range(38) for n in numbers(buffer.sample(1))]
    assert set(epoch) <= set(range(72, 110)) and len(set(epoch)) > 30
    with pytest.raises(ValueError, match="simultaneously"):
        make(optimize_memory_usage=True)


def test_a_saved_buffer_goes_on_with_its_permutation() -> None:
    buffer = make(60, 3)
    fill(buffer, 15)
    buffer.sample(17)
    again = pickle.loads(pickle.dumps(buffer))
    for row in range(15, 40):
        for b in (buffer, again):
            fill(b, 1, row)
        assert numbers(buffer.sample(7)) == numbers(again.sample(7))


def test_a_reset_begins_anew() -> None:
    buffer = make(60, 3)
    fill(buffer, 20)
    first = [numbers(buffer.sample(10)) for _ in range(4)]
    buffer.reset()
    assert buffer.size() == 0
    fill(buffer, 20)
    assert [numbers(buffer.sample(10)) for _ in range(4)] == first


def test_dict_observations() -> None:
    space = spaces.Dict({"a": BOX, "b": spaces.Box(-1e6, 1e6, (1,))})
    buffer = ReshuffledDictReplayBuffer(60, space, ACTION, device="cpu", n_envs=3, seed=1)
    fill(buffer, 20)
    batches = [buffer.sample(20) for _ in range(3)]
    assert sorted(n for batch in batches for n in numbers(batch)) == list(range(60))
    n = np.array(numbers(batches[0]))
    assert batches[0].observations["b"].flatten().tolist() == n.tolist()
    assert batches[0].next_observations["a"][:, 1].tolist() == (-n + 0.5).tolist()
    assert batches[0].rewards.flatten().tolist() == (2.0 * n).tolist()
    with pytest.raises(RloptError, match="ReshuffledDictReplayBuffer"):
        ReshuffledReplayBuffer(60, space, ACTION)
    with pytest.raises(RloptError, match="ReshuffledReplayBuffer"):
        ReshuffledDictReplayBuffer(60, BOX, ACTION)
    with pytest.raises(RloptError, match="optimize_memory_usage"):
        ReshuffledDictReplayBuffer(60, space, ACTION, optimize_memory_usage=True)


@pytest.mark.parametrize(
    ("algorithm", "env", "n_envs"), [(SAC, "Pendulum-v1", 2), (TD3, "Pendulum-v1", 1), (DQN, "CartPole-v1", 1)]
)
def test_algorithms_train_the_same_again_with_the_same_seed(algorithm: Any, env: str, n_envs: int) -> None:
    """With environments normalised by VecNormalize, whose statistics move between a draw and the next."""

    def weights() -> list[Any]:
        vector = VecNormalize(DummyVecEnv([lambda: gymnasium.make(env)] * n_envs))
        model = algorithm("MlpPolicy", vector, replay_buffer_class=ReshuffledReplayBuffer, buffer_size=50, **small())
        model.learn(120)
        assert isinstance(model.replay_buffer, ReshuffledReplayBuffer) and model.replay_buffer.full
        assert model._n_updates > 20
        return [p.detach().clone() for p in model.policy.parameters()]

    first, second = weights(), weights()
    assert all(bool((a == b).all()) for a, b in zip(first, second, strict=True))
    assert all(bool(p.isfinite().all()) for p in first)


def test_stable_baselines_saves_and_loads_it(tmp_path: Any) -> None:
    model = SAC("MlpPolicy", "Pendulum-v1", replay_buffer_class=ReshuffledReplayBuffer, **small())
    model.learn(60)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    again = SAC.load(tmp_path / "model", env=model.get_env(), device="cpu")
    again.load_replay_buffer(tmp_path / "buffer")
    before, after = model.replay_buffer, again.replay_buffer
    assert isinstance(after, ReshuffledReplayBuffer) and after is not before and after.size() == 60
    for _ in range(5):
        a, b = before.sample(16), after.sample(16)
        assert all(bool((x == y).all()) for x, y in zip(a[:5], b[:5], strict=True))


@pytest.mark.parametrize("n_envs", [1, 2])
def test_windows_of_several_steps_by_hand(n_envs: int) -> None:
    """γ = ½, n = 3. Numbers 5, 15, … end for good, 10, 20, … by a time limit; rewards are 2n; the newest row ends a
    window, too."""
    buffer = make(20 * n_envs, n_envs, n_steps=3, gamma=0.5)
    fill(buffer, 30)
    newest = 30 * n_envs
    seen = {}
    for _ in range(4):
        batch = buffer.sample(5 * n_envs)
        rows = zip(numbers(batch), batch.rewards, batch.next_observations, batch.dones, batch.discounts, strict=True)
        for n, reward, next_obs, done, discount in rows:
            window = [n]
            while len(window) < 3 and window[-1] % 5 and window[-1] + n_envs < newest:
                window.append(window[-1] + n_envs)
            assert reward.item() == sum(0.5**k * 2.0 * m for k, m in enumerate(window))
            assert next_obs[0].item() == window[-1] + 0.5 and discount.item() == 0.5 ** len(window)
            assert done.item() == float(window[-1] % 5 == 0 and window[-1] % 10 != 0)
            seen[n] = len(window)
    assert len(seen) == 20 * n_envs and set(seen.values()) == {1, 2, 3}


def test_windows_that_cannot_be() -> None:
    with pytest.raises(RloptError, match="does not go with n_steps above 1"):
        make(n_steps=2, optimize_memory_usage=True, handle_timeout_termination=False)
    with pytest.raises(RloptError, match="n_steps must be at least 1"):
        make(n_steps=0)


def test_algorithms_learn_from_windows() -> None:
    options = {"replay_buffer_class": ReshuffledReplayBuffer, "replay_buffer_kwargs": {"n_steps": 3, "gamma": 0.9}}
    model = DQN("MlpPolicy", "CartPole-v1", **options, **small())
    model.learn(60)
    assert model.replay_buffer.n_steps == 3 and model._n_updates > 5  # type: ignore[union-attr]
    assert model.replay_buffer.sample(4).discounts is not None  # type: ignore[union-attr]


def test_priorities_of_ones_own_algorithm() -> None:
    """Masses |δ|: one transition has nearly all of it, until it has been drawn more often than that asks for."""
    buffer = PrioritizedReshuffledReplayBuffer(
        60, BOX, ACTION, device="cpu", n_envs=3, seed=1, alpha=1.0, floor=1e-6, beta=1.0
    )
    fill(buffer, 20)
    with pytest.raises(RloptError, match="call sample first"):
        buffer.update_priority(np.ones(60))
    first = buffer.sample(60)
    buffer.update_priority(np.array([1000.0 if n == 7 else 1e-3 for n in numbers(first)]))
    counts = np.zeros(60)
    for _ in range(40):
        n = numbers(buffer.sample(2))
        counts[n] += 1
        assert buffer.weight is not None and buffer.weight.shape == (2, 1)
    assert counts.argmax() == 7 and counts[7] == 40
    with pytest.raises(RloptError, match="a real number for each"):
        buffer.update_priority(np.ones(3))
    again = pickle.loads(pickle.dumps(buffer))
    assert all(numbers(buffer.sample(5)) == numbers(again.sample(5)) for _ in range(5))


def test_a_prioritised_buffer_without_priorities_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sb3, "UNTOLD", 5)
    model = DQN("MlpPolicy", "CartPole-v1", replay_buffer_class=PrioritizedReshuffledReplayBuffer, **small())
    model.learn(60)
    assert [r.getMessage() for r in caplog.records if "priorities" in r.getMessage()] == [
        "5 draws and no priorities: call update_priority, or use ReshuffledReplayBuffer"
    ]


def test_without_stable_baselines_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "rlopt.buffers.interop.sb3")
    monkeypatch.setitem(sys.modules, "stable_baselines3.common.buffers", None)
    with pytest.raises(RloptError, match=r'pip install -c constraints.txt -e "\.\[sb3\]"'):
        import rlopt.buffers.interop.sb3  # noqa: F401
