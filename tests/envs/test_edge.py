"""The edge: what fits passes, and what an environment gives amiss is told in one line with its name and the value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from rlopt.envs import AsyncVectorEnv, SyncVectorEnv, TorchEnv, VectorAdapter, VectorEnv
from rlopt.envs.counting import CountEnv
from rlopt.envs.edge import observation_writer
from rlopt.envs.factory import EnvFactory, find_spec
from rlopt.envs.spaces import ObservationCodec
from rlopt.types import RloptError

BOX, IMAGE = spaces.Box(-1.0, 1.0, (3,), np.float32), spaces.Box(0, 255, (3,), np.uint8)
GOOD = np.zeros(3, np.float32)


class Odd(gymnasium.Env[Any, Any]):
    """Gives what it is told, from the ``since``-th step on: 0 is the first reset, and a later reset is 5.

    ``obs``, ``reward``, ``terminated`` and ``info`` replace parts of a step; ``step`` and ``first`` all of what a step
    or a reset gives. Episodes last three steps.
    """

    def __init__(self, space: Any = BOX, since: int = 1, good: Any = GOOD, **odd: Any) -> None:
        self.observation_space, self.action_space = space, spaces.Discrete(2)
        self.since, self.good, self.odd, self.calls, self.t = since, good, odd, -1, 0

    def _or(self, name: str, usual: Any) -> Any:
        return self.odd.get(name, usual) if self.calls >= self.since else usual

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.calls, self.t = self.calls + 1, 0
        return self._or("first", (self._or("obs", self.good), {}))

    def step(self, action: Any) -> Any:
        self.calls, self.t = self.calls + 1, self.t + 1
        obs, reward = self._or("obs", self.good), self._or("reward", 1.0)
        return self._or("step", (obs, reward, self._or("terminated", self.t == 3), self._or("truncated", False), {}))


class NoSeed(Odd):
    def reset(self) -> Any:  # type: ignore[override]
        return GOOD, {}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    for name, cls in (("Odd-v0", Odd), ("NoSeed-v0", NoSeed)):
        gymnasium.register(f"rlopt-tests/{name}", entry_point=cls)
    yield
    for name in ("Odd-v0", "NoSeed-v0"):
        del gymnasium.registry[f"rlopt-tests/{name}"]


def factory(name: str = "Odd", **kwargs: Any) -> EnvFactory:
    return EnvFactory(find_spec(f"rlopt-tests/{name}-v0"), kwargs)


def play(env: VectorEnv) -> None:
    """A reset, five steps, in which an episode ends and another begins."""
    try:
        env.reset()
        for _ in range(5):
            env.step(torch.zeros(env.num_envs, dtype=torch.int64))
    finally:
        env.close()


def told(env: VectorEnv) -> str:
    with pytest.raises(RloptError) as caught:
        play(env)
    text = str(caught.value)
    assert "\n" not in text and "rlopt-tests/Odd-v0" in text
    return text


SINGLE: dict[str, Callable[[EnvFactory], VectorEnv]] = {
    "sync": lambda make: SyncVectorEnv([make] * 2),
    "async": lambda make: AsyncVectorEnv([make]),
}

NESTED = spaces.Dict(a=spaces.Discrete(5), b=spaces.Tuple((BOX, spaces.MultiBinary(2))))
NEST = {"a": 4, "b": (GOOD, np.ones(2, np.int8))}
STEPS = "Gymnasium's five are observation, reward, terminated, truncated, info"
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "too short": ({"obs": np.zeros(1, np.float32)}, "has shape (1,), but its observation_space says (3,)"),
    "a scalar": ({"obs": 0.5}, "has shape (), but its observation_space says (3,): 0.5"),
    "a scalar in a later reset": ({"obs": 0.5, "since": 4}, "has shape (), but its observation_space says (3,)"),
    "too short at first": ({"obs": np.zeros(1), "since": 0}, "has shape (1,), but its observation_space says (3,)"),
    "None": ({"obs": None}, "its observation is None, which holds no numbers"),
    "words": ({"obs": ["1", "2", "3"]}, "its observation is ['1', '2', '3'], which holds no numbers"),
    "complex numbers": ({"obs": GOOD + 1j}, "which holds no numbers"),
    "ragged": ({"obs": [[1.0], [1.0, 2.0], 3.0]}, "which is no array of numbers"),
    "fractions in an image": (
        {"space": IMAGE, "good": [0, 1, 2], "obs": np.array([0.2, 0.5, 0.9])},
        "[0.2, 0.5, 0.9]), with fractions, for Box(0, 255, (3,), uint8); give whole numbers, or declare a Box of",
    ),
    "300 in an image": (
        {"space": IMAGE, "good": [0, 1, 2], "obs": np.array([0, 300, 1])},
        "has 300, which lies outside of Box(0, 255, (3,), uint8)",
    ),
    "-1 in an image": ({"space": IMAGE, "good": [0, 1, 2], "obs": [0, -1, 1]}, "has -1, which lies outside of Box(0"),
    "7 of 5": ({"space": spaces.Discrete(5), "good": 0, "obs": 7}, "has 7, which lies outside of Discrete(5)"),
    "7 of 5 from NumPy": ({"space": spaces.Discrete(5), "good": np.int64(4), "obs": np.int32(7)}, "has 7, which lies"),
    "1.7 in Discrete": (
        {"space": spaces.Discrete(5), "good": 0, "obs": 1.7},
        "is 1.7, with fractions, for Discrete(5)",
    ),
    "MultiDiscrete": (
        {"space": spaces.MultiDiscrete([2, 3]), "good": [1, 2], "obs": np.array([1, 3])},
        "has 3, which lies outside of MultiDiscrete([2 3])",
    ),
    "a missing key": ({"space": NESTED, "good": NEST, "obs": {"a": 1}}, "its observation lacks 'b/0'; it is {'a': 1}"),
    "no dict": ({"space": NESTED, "good": NEST, "obs": GOOD}, "its observation lacks 'a'; it is array("),
    "a part of it": (
        {"space": NESTED, "good": NEST, "obs": {**NEST, "b": (0.0, np.ones(2))}},
        "its observation b/0 has shape (), but its observation_space says (3,)",
    ),
    "a key too many": (
        {"space": NESTED, "good": NEST, "obs": {**NEST, "c": 1}, "since": 0},
        "its observation has 'c', which its observation_space lacks",
    ),
    "an entry too many": (
        {"space": NESTED, "good": NEST, "obs": {**NEST, "b": (*NEST["b"], 3)}, "since": 0},
        "its observation has 'b/2', which its observation_space lacks",
    ),
    "reward None": ({"reward": None}, "the reward is None, which is no number"),
    "a reward in words": ({"reward": "0.5"}, "the reward is '0.5', which is no number"),
    "a complex reward": ({"reward": 1j}, "the reward is 1j, which is no number"),
    "two rewards": ({"reward": np.ones(2)}, "gives rewards of shape (2,), not (); agents that are paid apart"),
    "terminated None": ({"terminated": None}, "terminated is None; it must be True or False"),
    "truncated in words": ({"truncated": "no"}, "truncated is 'no'; it must be True or False"),
    "truncated 0.5": ({"truncated": 0.5}, "truncated is 0.5; it must be True or False"),
    "terminated 2": ({"terminated": 2}, "terminated is 2; it must be True or False"),
    "step None": ({"step": None}, f"step gave None; {STEPS}"),
    "step of old Gym": ({"step": (GOOD, 1.0, False, {})}, f"step gave 4 values, as old Gym's step did; {STEPS}"),
    "step alone": ({"step": GOOD}, "step gave ndarray alone: array("),
    "reset of old Gym": ({"first": GOOD, "since": 0}, "reset gave ndarray alone: array([0., 0., 0.]"),
    "reset None": ({"first": None, "since": 0}, "reset gave None, not the pair observation, info (a dict)"),
    "reset without info": ({"first": (GOOD, GOOD), "since": 0}, "reset gave two values, (array("),
    "a later reset of old Gym": ({"first": GOOD, "since": 4}, "not the pair observation, info (a dict)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_does_not_fit_is_told_in_one_line(name: str) -> None:
    kwargs, words = MISTAKES[name]
    assert words in told(SINGLE["sync"](factory(**kwargs)))


@pytest.mark.parametrize("name", ["too short", "a scalar in a later reset", "reward None", "step of old Gym", "7 of 5"])
def test_workers_tell_the_same(name: str) -> None:
    kwargs, words = MISTAKES[name]
    assert words in told(SINGLE["async"](factory(**kwargs)))


@pytest.mark.parametrize("backend", SINGLE)
def test_a_reset_without_a_seed_is_told(backend: str) -> None:
    with pytest.raises(
        RloptError, match=r"rlopt-tests/NoSeed-v0: its reset takes no seed .*write reset\(self, \*, seed"
    ):
        play(SINGLE[backend](factory("NoSeed")))


FITS: dict[str, dict[str, Any]] = {
    "a reward of size 1": {"reward": np.array([[0.5]])},
    "a float32 reward": {"reward": np.float32(0.5)},
    "a whole reward": {"reward": 1},
    "a reward that is a flag": {"reward": np.bool_(True)},
    "a reward from torch": {"reward": torch.tensor(0.5)},
    "flags of NumPy": {"terminated": np.bool_(False), "truncated": np.array([False])},
    "flags as numbers": {"terminated": 0, "truncated": np.int64(0)},
    "a list": {"obs": [0.0, 1, np.float32(2)]},
    "doubles": {"obs": np.ones(3)},
    "whole numbers in a Box of floats": {"obs": np.ones(3, np.int64)},
    "a tensor": {"obs": torch.ones(3)},
    "an image of int64": {"space": IMAGE, "good": [0, 1, 2], "obs": np.array([0, 255, 7])},
    "an image of flags": {"space": IMAGE, "good": [0, 1, 2], "obs": np.array([True, False, True])},
    "an index of int32": {"space": spaces.Discrete(5, start=3), "good": 3, "obs": np.int32(7)},
    "an index in an array": {"space": spaces.Discrete(5), "good": 0, "obs": np.array(4)},
    "nested": {"space": NESTED, "good": NEST, "obs": {"a": np.int64(0), "b": ([0, 0, 1], [True, False])}},
    "not finite": {"obs": np.array([np.nan, np.inf, 0.0]), "reward": np.nan},  # which loops keep out
    "a step that is a list": {"step": [GOOD, 1.0, False, False, {}]},
}


@pytest.mark.parametrize("name", FITS)
def test_what_fits_passes(name: str) -> None:
    play(SINGLE["sync"](factory(**FITS[name])))


def test_values_arrive_as_they_are() -> None:
    env = SyncVectorEnv([factory(obs=[0.5, 1, 2], reward=np.array([[0.25]]))])
    env.reset()
    step = env.step(torch.zeros(1, dtype=torch.int64))
    assert (step.obs.tolist(), step.reward.tolist()) == ([[0.5, 1.0, 2.0]], [0.25])
    codec = ObservationCodec(spaces.Discrete(5, start=3))
    arrays = codec.arrays(2)
    observation_writer("test", codec, 2)(arrays, slice(None), np.array([3, 7], np.int32))
    assert arrays[0].tolist() == [3, 7]


# Vectors of Gymnasium's


class OddVector(gymnasium.vector.VectorEnv[Any, Any, Any]):
    """A vector of two, in SAME_STEP mode, which gives what it is told from the first step on."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
    num_envs = 2
    single_observation_space, single_action_space = BOX, spaces.Discrete(2)

    def __init__(self, **odd: Any) -> None:
        self.odd, self.spec = odd, gymnasium.spec("rlopt-tests/Odd-v0")

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return self.odd.get("first", (np.zeros((2, 3), np.float32), {}))

    def step(self, actions: Any) -> Any:
        usual = {"obs": np.zeros((2, 3)), "reward": np.zeros(2), "terminated": np.zeros(2, bool)}
        obs, reward, terminated = (self.odd.get(key, value) for key, value in usual.items())
        return self.odd.get("step", (obs, reward, terminated, np.zeros(2, bool), {}))


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"obs": np.zeros((2, 1))}, "has shape (2, 1), but its observation_space says (2, 3)"),
        ({"obs": np.zeros(3)}, "has shape (3,), but its observation_space says (2, 3)"),
        ({"reward": np.zeros(1)}, "gives rewards of shape (1,), not (2,)"),
        ({"reward": [None, 1.0]}, "the reward is [None, 1.0], which is no number"),
        ({"terminated": None}, "terminated is None; it must be an array of 2 flags"),
        ({"terminated": np.zeros(3, bool)}, "it must be an array of 2 flags"),
        ({"terminated": np.zeros(2)}, "it must be an array of 2 flags"),
        ({"step": None}, "step gave None"),
        ({"first": np.zeros((2, 3))}, "reset gave ndarray alone"),
    ],
)
def test_a_vector_of_gymnasiums_is_checked_too(odd: dict[str, Any], words: str) -> None:
    assert words in told(VectorAdapter(OddVector(**odd)))
    play(VectorAdapter(OddVector()))


# Environments in torch


class OddTorch(TorchEnv):
    observation_space, action_space, facts = BOX, spaces.Discrete(2), ("half",)
    odd: dict[str, Any] = {}

    def initial(self, streams: Any) -> Any:
        return torch.zeros(self.num_envs)

    def dynamics(self, state: Any, action: Any) -> Any:
        n = self.num_envs
        usual = {"reward": torch.zeros(n), "terminated": state >= 2, "truncated": None, "broken": None}
        given = tuple(self.odd.get(key, value) for key, value in usual.items())
        facts = self.odd.get("facts", {"half": state / 2})
        return self.odd.get("all", (state + 1, *given, facts))

    def observe(self, state: Any) -> Any:
        return self.odd.get("obs", state[:, None].expand(-1, 3))


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"reward": torch.zeros(1)}, "the reward has shape (1,); it must be (2,)"),
        (
            {"terminated": torch.zeros(2)},
            "terminated is torch.float32 of shape (2,); it must be torch.bool of shape (2,)",
        ),
        ({"terminated": torch.tensor(False)}, "terminated is torch.bool of shape (); it must be"),
        ({"truncated": torch.zeros(2, 1).bool()}, "truncated is torch.bool of shape (2, 1); it must be"),
        ({"all": torch.zeros(2)}, "dynamics gave Tensor, not a tuple of state, reward, terminated and, where"),
        ({"all": (torch.zeros(2), torch.zeros(2))}, "dynamics gave tuple, not a tuple of"),
        ({"facts": {}}, "dynamics gave the facts {}; they must be ('half',), each (2,)"),
        ({"obs": torch.zeros(2, 1)}, "observe gave {'': (2, 1)}, but its observation_space says {'': (2, 3)}"),
        ({"obs": {"a": torch.zeros(2, 3)}}, "observe gave {'a': (2, 3)}"),
    ],
)
def test_an_environment_in_torch_is_checked_too(odd: dict[str, Any], words: str) -> None:
    class Env(OddTorch):
        pass

    play(Env(2))
    Env.odd = odd
    with pytest.raises(RloptError) as caught:
        play(Env(2))
    assert words in str(caught.value) and str(caught.value).startswith("Env: ") and "\n" not in str(caught.value)


# Random numbers


class Sampler(gymnasium.Env[Any, Any]):
    """Observes samples of its own spaces, and a number of its own generator."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (3,), np.float32)
        self.action_space = spaces.Discrete(1000)

    def _obs(self) -> Any:
        action, own = self.action_space.sample(), self.observation_space.sample()
        return np.array([action / 1000, own[0], self.np_random.random()], np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        return self._obs(), 0.0, False, False, {}


gymnasium.register("rlopt-tests/Sampler-v0", entry_point=Sampler)


def samples(backend: str, seeds: list[int], noise: list[int] | None = None) -> list[Any]:
    make = EnvFactory(find_spec("rlopt-tests/Sampler-v0"), {}, ("PassiveEnvChecker",) if backend == "wrapped" else ())
    env: VectorEnv = AsyncVectorEnv([make] * 2) if backend == "async" else SyncVectorEnv([make] * 2)
    first = env.reset(seeds=seeds, noise_seeds=noise)
    later = env.step(torch.zeros(2, dtype=torch.int64)).obs
    env.close()
    return [first.tolist(), later.tolist()]  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", ["sync", "async", "wrapped"])
def test_what_an_environment_samples_from_its_spaces_is_seeded(backend: str) -> None:
    first = samples(backend, [1, 2])
    assert first == samples(backend, [1, 2]) == samples("sync", [1, 2])
    assert all(a != b for a, b in zip(first[0][0], first[0][1], strict=True)), "rows differ"
    assert first[0][0] == samples("sync", [1, 3])[0][0]


@pytest.mark.parametrize("backend", ["sync", "async"])
def test_noise_seeds_begin_what_comes_after_the_first_state(backend: str) -> None:
    first, later = samples(backend, [1, 1], [5, 6])
    assert first[0] == first[1] == samples(backend, [1, 1])[0][0]
    assert all(a != b for a, b in zip(*later, strict=True))
    other = samples(backend, [2, 1], [5, 5])
    assert other[0][0] != other[0][1] and other[1][0] == other[1][1] == later[0]


class Noisy(OddTorch):
    facts = ()

    def initial(self, streams: Any) -> Any:
        return streams.uniform()

    def dynamics(self, state: Any, action: Any) -> Any:
        return self.streams.uniform(), torch.zeros(2), state > 2


def test_noise_seeds_of_an_environment_in_torch_and_of_native_tasks() -> None:
    env = Noisy(2)
    first = env.reset(seeds=[1, 1], noise_seeds=[5, 6])
    later = env.step(torch.zeros(2, dtype=torch.int64)).obs
    assert torch.equal(first[0], first[1]) and not torch.equal(later[0], later[1])  # type: ignore[index]
    assert torch.equal(first, env.reset(seeds=[1, 1]))  # type: ignore[arg-type]
    pytest.importorskip("mujoco.batch")
    from rlopt.envs import make_env

    native = make_env("InvertedPendulum-v5", 2, backend="native", kwargs={"max_episode_steps": 1})
    start = native.reset(seeds=[1, 1], noise_seeds=[5, 6])
    again = native.step(torch.zeros(2, 1)).obs
    assert torch.equal(start[0], start[1]) and not torch.equal(again[0], again[1])  # type: ignore[index]
    with pytest.raises(RloptError, match="takes no reset options"):
        native.reset(options={"x": 1})


def test_a_vector_with_one_stream_refuses_noise_seeds() -> None:
    env = VectorAdapter(gymnasium.vector.SyncVectorEnv([CountEnv] * 2))
    with pytest.raises(RloptError, match=r"has one random stream .*noise_seeds need env.backend=sync"):
        env.reset(noise_seeds=[1, 2])
    with pytest.raises(RloptError, match="3 noise_seeds for 2 environments"):
        env.reset(noise_seeds=[1, 2, 3])
