"""Exact state: a restored environment goes on bit for bit, and what cannot be saved says so."""

from __future__ import annotations

import json
import logging
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.envs import VectorEnv, make_env, restore, snapshot
from rlopt.envs.counting import CountEnv
from rlopt.types import RloptError, Step

MUJOCO = [f"{name}-{v}" for v in ("v4", "v5") for name in ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid")]
MUJOCO += ["Pusher-v5", "Swimmer-v5", "InvertedDoublePendulum-v5"]
PLAIN = ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCarContinuous-v0", "FrozenLake-v1", "CliffWalking-v1"]
PLAIN += [next(i for i in ("Taxi-v4", "Taxi-v3") if i in gymnasium.registry)]


def _actions(space: Any, count: int, n: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(count)
    if isinstance(space, spaces.Discrete):
        return [torch.randint(int(space.n), (n,), generator=g) for _ in range(count)]
    low, high = torch.from_numpy(space.low), torch.from_numpy(space.high)
    return [low + (high - low) * torch.rand(n, *space.shape, generator=g) for _ in range(count)]


def _flat(step: Step) -> list[Tensor]:
    obs = [v for o in (step.obs, step.next_obs) for v in (o.values() if isinstance(o, dict) else (o,))]
    return [*obs, step.reward, step.terminated, step.truncated, step.ended, step.valid]


def _as_saved(tree: Any) -> Any:
    """What a checkpoint keeps: tensors apart, the rest through strict JSON."""
    tensors: list[Tensor] = []

    def take(node: Any) -> Any:
        if isinstance(node, Tensor):
            tensors.append(node.clone())
            return {"@": len(tensors) - 1}
        if isinstance(node, dict):
            assert all(type(k) is str for k in node)
            return {k: take(v) for k, v in node.items()}
        if isinstance(node, list):
            return [take(v) for v in node]
        assert node is None or type(node) in (bool, int, float, str), type(node)
        return node

    def put(node: Any) -> Any:
        if isinstance(node, dict):
            return tensors[node["@"]] if "@" in node else {k: put(v) for k, v in node.items()}
        return [put(v) for v in node] if isinstance(node, list) else node

    return put(json.loads(json.dumps(take(tree), allow_nan=False)))


def _check_continues(build: Callable[[int], VectorEnv], before: int = 13, after: int = 60) -> None:
    env = build(1)
    env.reset()
    for action in _actions(env.spec.action_space, before, env.num_envs):
        env.step(action)
    state = env.state_dict()
    assert state is not None
    state = _as_saved(state)
    actions = _actions(env.spec.action_space, after, env.num_envs)
    wanted = [_flat(env.step(a)) for a in actions]
    env.close()
    assert any(bool(w[-2].any()) for w in wanted)  # an episode ended, so resets are compared too

    fresh = build(2)
    obs = fresh.load_state_dict(state)
    assert (list(obs.values()) if isinstance(obs, dict) else [obs])[0].shape[0] == fresh.num_envs
    for k, action in enumerate(actions):
        for found, want in zip(_flat(fresh.step(action)), wanted[k], strict=True):
            assert torch.equal(found, want), f"step {k}"
    fresh.close()


@pytest.mark.parametrize("env_id", [*PLAIN, *MUJOCO])
def test_a_restored_environment_goes_on_bit_for_bit(env_id: str) -> None:
    if env_id in MUJOCO:
        pytest.importorskip("mujoco")
    _check_continues(lambda seed: make_env(env_id, seed=seed, kwargs={"max_episode_steps": 25}))


@pytest.mark.parametrize("backend", ["sync", "async"])
@pytest.mark.parametrize("env_id", ["Hopper-v5", "FrozenLake-v1"])
def test_three_environments_go_on_together(backend: str, env_id: str) -> None:
    if env_id == "Hopper-v5":
        pytest.importorskip("mujoco")
    _check_continues(lambda seed: make_env(env_id, 3, seed=seed, backend=backend))


def test_a_state_moves_between_backends_and_keeps_frozen_rows() -> None:
    envs = [make_env("CartPole-v1", 2, seed=4, backend=b, autoreset=False) for b in ("sync", "async")]
    envs[0].reset()
    push = torch.tensor([1, 1])
    while envs[0].step(push).valid.all():
        pass
    state = envs[0].state_dict()
    assert state is not None
    envs[1].load_state_dict(_as_saved(state))
    for _ in range(3):
        for a, b in zip(*(_flat(env.step(push)) for env in envs), strict=True):
            assert torch.equal(a, b)
    envs[1].close()


@pytest.mark.parametrize("game", ["Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders"])
def test_minatar_goes_on_with_its_old_generators(game: str) -> None:
    pytest.importorskip("minatar")
    env_id, kwargs = f"MinAtar/{game}-v1", {"max_episode_steps": 50}
    _check_continues(lambda seed: make_env(env_id, 2, seed=seed, kwargs=kwargs))


def test_atari_with_preprocessing_and_stacked_frames() -> None:
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    wrappers = ["AtariPreprocessing", {"class": "FrameStackObservation", "kwargs": {"stack_size": 4}}]
    kwargs = {"frameskip": 1, "max_episode_steps": 30}
    _check_continues(lambda seed: make_env("ALE/Breakout-v5", seed=seed, kwargs=kwargs, wrappers=wrappers))


def test_atari_goes_on_bit_for_bit_with_sticky_actions() -> None:
    pytest.importorskip("ale_py")
    _check_continues(lambda seed: make_env("ALE/Pong-v5", seed=seed, backend="sync", kwargs={"max_episode_steps": 30}))


def test_wrappers_with_state_come_along() -> None:
    wrappers = [
        {"class": "FrameStackObservation", "kwargs": {"stack_size": 2}},
        "RecordEpisodeStatistics",
        {"class": "DelayObservation", "kwargs": {"delay": 2}},
    ]
    wrappers.append({"class": "RescaleAction", "kwargs": {"min_action": -1.0, "max_action": 1.0}})
    kwargs = {"max_episode_steps": 25}
    _check_continues(lambda seed: make_env("Pendulum-v1", seed=seed, kwargs=kwargs, wrappers=wrappers))


class Odd(CountEnv):
    """Every kind of attribute that the walk understands, with shared and nested ones; each step changes them all."""

    def __init__(self) -> None:
        super().__init__(5, "truncate")
        self.observation_space = spaces.Box(-np.inf, np.inf, (12,), np.float64)
        self.shared = [0.0]
        self.alias = self.shared
        self.grid = np.zeros((3, 4), order="F")
        self.row = self.grid[1]
        self.nested = {("key", 1): (1, [2], {3}), 2: float("inf"), None: frozenset({4})}
        self.queue: deque[int] = deque([1, 2], maxlen=3)
        self.dice = random.Random(0)
        self.tensor = torch.zeros(2)
        self.scalar, self.text, self.raw = np.float32(0.1), np.array(["a", "bc"]), b"\x00"
        self.objects = np.array([None, (1, 2)], dtype=object)
        self.callback = max

    def _observation(self) -> Any:
        first, second = self.nested[("key", 1)][:2]
        values = [self.shared[0], self.alias[0], self.grid.sum(), self.row[2], first, second[0], self.queue[0]]
        values += [float(self.tensor[1]), float(self.scalar), len(self.raw), self.objects[1][0], len(self.text[1])]
        return np.array(values, np.float64)

    def step(self, action: Any) -> Any:
        self.shared[0] += self.dice.random()
        self.row += self.np_random.random(4)
        first, second, third = self.nested[("key", 1)]  # type: ignore[misc]
        second[0] += 1
        self.nested[("key", 1)] = (first + 1, second, third)  # type: ignore[index]
        self.queue.append(self.count)
        self.tensor += torch.tensor([1.0, 0.3])
        self.scalar = self.scalar * np.float32(1.1)
        self.raw += b"x"
        self.objects[1] = (self.objects[1][0] + 1, 2)
        return super().step(action)


def test_every_kind_of_attribute_survives_with_its_aliases() -> None:
    env, fresh = Odd(), Odd()
    env.reset(seed=1)
    for _ in range(3):
        env.step(np.zeros(1))
    state = snapshot(env)
    assert state is not None
    restore(fresh, _as_saved(state))
    assert fresh.alias is fresh.shared
    assert fresh.row.base is fresh.grid
    assert fresh.grid.flags.f_contiguous
    assert fresh.queue.maxlen == 3
    assert type(fresh.nested[("key", 1)]) is tuple
    assert fresh.nested[None] == frozenset({4})
    assert type(fresh.scalar) is np.float32
    assert fresh.text.dtype == env.text.dtype
    assert fresh.np_random_seed == 1
    for _ in range(7):
        ours, theirs = env.step(np.zeros(1)), fresh.step(np.zeros(1))
        assert ours[0].tolist() == theirs[0].tolist()
        assert ours[1:4] == theirs[1:4]


def test_a_snapshot_is_not_touched_by_what_follows() -> None:
    env = gymnasium.make("CartPole-v1")
    env.reset(seed=0)
    state, copy = snapshot(env), snapshot(env)
    for _ in range(5):
        env.step(1)
    restore(env, state)  # type: ignore[arg-type]
    env.step(1)
    assert json.dumps(_as_saved(state), default=str) == json.dumps(_as_saved(copy), default=str)


class Opaque(CountEnv):
    def __init__(self, part: Any = None) -> None:
        super().__init__()
        self.part = part


class Speaks(Opaque):
    """Says itself what its state is, whatever its attributes."""

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "at": (self.episodes, np.arange(2))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, (self.episodes, array) = state["count"], state["at"]
        assert array.tolist() == [0, 1]


@pytest.mark.parametrize(
    "part",
    [object(), iter([1]), np.random.default_rng(0).normal, np.random.Generator(np.random.MT19937(0)), open],
    ids=["object", "iterator", "bound-generator", "other-generator", "function"],
)
def test_what_is_not_understood_cannot_be_saved(part: Any, caplog: pytest.LogCaptureFixture) -> None:
    env = Opaque(part)
    with caplog.at_level(logging.INFO, "rlopt.envs.snapshot"):
        found = snapshot(env)
    if part is open:  # a plain function is wiring
        assert found is not None
    else:
        assert found is None
        assert "Opaque cannot be saved" in caplog.text


def test_an_environment_may_say_itself_what_its_state_is() -> None:
    env, fresh = gymnasium.wrappers.TimeLimit(Speaks(object()), 9), gymnasium.wrappers.TimeLimit(Speaks(object()), 9)
    env.reset()
    env.step(np.zeros(1))
    state = snapshot(env)
    assert state is not None
    restore(fresh, _as_saved(state))
    assert fresh.step(np.zeros(1))[0].tolist() == [2.0, 0.0]
    assert fresh._elapsed_steps == 2


def test_a_state_of_something_else_is_refused() -> None:
    state = make_env("CartPole-v1", 2)
    assert state.state_dict() is None  # not reset yet: there is nothing to go on from
    state.reset()
    saved = state.state_dict()
    assert saved is not None
    with pytest.raises(RloptError, match="holds 2 environments"):
        make_env("CartPole-v1", 3).load_state_dict(saved)
    with pytest.raises(RloptError, match="not the same env"):
        make_env("Pendulum-v1", 2).load_state_dict(saved)
    with pytest.raises(RloptError, match="ClipReward"):
        make_env("CartPole-v1", 2, wrappers=[{"class": "ClipReward", "kwargs": {"max_reward": 1}}]).load_state_dict(
            saved
        )
    with pytest.raises(RloptError, match="use backend=sync or async"):
        make_env("CartPole-v1", 2, backend="vector").load_state_dict(saved)
