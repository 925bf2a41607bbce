"""Environments written in torch: the base class, the random streams, and a class of one's own."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.utils._python_dispatch import TorchDispatchMode

from rlopt.envs import TorchEnv, VectorEnv, make_env
from rlopt.envs.classic import CLASSIC, CartPole
from rlopt.envs.streams import RowStreams
from rlopt.random import derive_seed
from rlopt.types import RloptError

# The shared contract test, run on a batched counting environment: pytest collects the imported functions, and they
# take this module's ``build``.

_path = Path(__file__).with_name("test_contract.py")
_spec = importlib.util.spec_from_file_location("rlopt_contract", _path)
assert _spec is not None and _spec.loader is not None
contract = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(contract)

test_rows_equal = contract.test_rows_equal_the_hand_written_ones_and_a_reset_in_mid_episode_begins_anew
test_returns_lengths_and_step_count_are_exact = contract.test_returns_lengths_and_step_count_are_exact
test_without_autoreset = contract.test_without_autoreset_ended_rows_wait_for_their_reset
test_a_masked_reset = contract.test_a_masked_reset_in_mid_episode_leaves_the_other_rows_alone


class Count(TorchEnv):
    """Counts up to a length that may differ between even and odd episodes; ends by 1 terminate, 2 truncate, 3 both."""

    observation_space = spaces.Box(0.0, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    defaults = {"even": 3, "odd": 3, "end_even": 1, "end_odd": 1}

    def initial(self, streams: RowStreams) -> torch.Tensor:
        before = self.state[:, 1] if self._started else torch.full((self.num_envs,), -1.0)
        return torch.stack((torch.zeros_like(before), before + 1), 1)

    def dynamics(self, state: Any, action: Any) -> Any:
        count, episode = state[:, 0] + 1, state[:, 1]
        p, odd = self.parameters, state[:, 1] % 2 == 1
        over = count >= torch.where(odd, p["odd"], p["even"])
        end = torch.where(odd, p["end_odd"], p["end_even"])
        return torch.stack((count, episode), 1), count, over & (end != 2), over & (end != 1)

    def observe(self, state: Any) -> Any:
        return state


@pytest.fixture
def build() -> Iterator[Any]:
    def make(autoreset: bool) -> VectorEnv:
        env = Count(3, autoreset=autoreset)
        env.set_parameters(
            even=torch.tensor([3, 2, 1]), odd=torch.tensor([3, 2, 4]),
            end_even=torch.tensor([1, 2, 3]), end_odd=torch.tensor([1, 2, 2]),
        )  # fmt: skip
        return env

    yield make


def test_mistakes_of_the_caller_are_named() -> None:
    env = Count(3)
    assert env.state_dict() is None
    with pytest.raises(RloptError, match="before reset"):
        env.step(torch.zeros(3, 1))
    with pytest.raises(RloptError, match="2 seeds for 3"):
        env.reset(seeds=[1, 2])
    env.reset()
    with pytest.raises(RloptError, match=r"must be \(3,\)"):
        env.reset(mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(RloptError, match=r"want \(3, 1\)"):
        env.step(torch.zeros(2, 1))
    with pytest.raises(RloptError, match="no reset options"):
        env.reset(options={"low": 0.0})
    with pytest.raises(RloptError, match="no parameter 'evn'; did you mean even"):
        env.set_parameters(evn=1.0)
    with pytest.raises(RloptError, match=r"one number or \(3,\)"):
        env.set_parameters(even=torch.ones(2))
    saved = env.state_dict()
    assert saved is not None
    with pytest.raises(RloptError, match="holds 3 environments, but num_envs is 2"):
        Count(2).load_state_dict(saved)
    with pytest.raises(RloptError, match="not of CartPole"):
        CartPole(3).load_state_dict(saved)


def test_what_a_caller_writes_into_a_step_never_comes_back() -> None:
    env = Count(2, even=9, odd=9)  # its observation is its state, so a view would be written through
    env.reset().fill_(7.0)
    for k in range(3):
        step = env.step(torch.zeros(2, 1))
        assert step.obs.tolist() == step.next_obs.tolist() == [[k + 1.0, 0.0]] * 2
        assert step.valid.all()
        for field in step[:-1]:
            field.zero_()


# Random streams

MASK64 = 2**64 - 1


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def test_streams_are_splitmix64() -> None:
    gamma = 0x9E3779B97F4A7C15
    published = [6457827717110365317, 3203168211198807973]  # the first two numbers for the seed 1234567
    assert [_mix(1234567 + k * gamma & MASK64) for k in (1, 2)] == published
    streams = RowStreams(3)
    streams.seed([0, 5, 2**31 - 1])
    drawn = torch.cat((streams.uniform()[:, None], streams.uniform(size=2)), 1)
    for row, seed in enumerate([0, 5, 2**31 - 1]):
        key = _mix(seed + gamma & MASK64)
        expected = [(_mix(key + k * gamma & MASK64) >> 11) / 2**53 for k in (1, 2, 3)]
        assert drawn[row].tolist() == expected


def test_only_rows_that_used_their_numbers_move_on() -> None:
    streams = RowStreams(2)
    streams.seed([1, 2])
    first = streams.uniform(size=4)
    streams.commit(torch.tensor([True, False]))
    second = streams.uniform(size=4)
    assert torch.equal(second[1], first[1])
    assert not torch.isin(second[0], first[0]).any()
    alone = RowStreams(1)
    alone.seed([1])
    assert torch.equal(alone.uniform(size=8)[0], torch.cat((first[0], second[0])))


def test_uniform_and_normal_numbers_have_their_laws() -> None:
    streams = RowStreams(2_000)
    streams.seed(range(2_000))
    for drawn, cdf in (
        (streams.uniform(-1.0, 3.0, 10), lambda x: (x + 1) / 4),
        (streams.normal(10), lambda x: 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
    ):
        place = cdf(drawn.flatten().sort().values)
        n = len(place)
        gap = torch.maximum(place - torch.arange(n) / n, torch.arange(1, n + 1) / n - place).max()
        assert gap < 1.95 / math.sqrt(n)  # Kolmogorov and Smirnov, 0.1 %
        for other in (drawn[:, 1:], drawn[1:]):  # neighbours in a stream, and neighbouring seeds
            here = drawn[: len(other), : other.shape[1]]
            assert torch.corrcoef(torch.stack((here.flatten(), other.flatten())))[0, 1].abs() < 4 / math.sqrt(n)


# Seeds, saving, time limits


@pytest.mark.parametrize("env_id", CLASSIC)
def test_a_row_depends_on_its_own_seed_alone(env_id: str) -> None:
    few, many = make_env(env_id, 2, seed=3, backend="torch"), make_env(env_id, 5, seed=3, backend="torch")
    first, also = few.reset(), many.reset()
    assert torch.equal(first, also[:2])
    assert len(set(map(tuple, also.tolist()))) == 5
    seeds = [derive_seed(3, "env", i) for i in range(5)]
    assert torch.equal(few.reset(seeds=[seeds[4], seeds[2]]), also[[4, 2]])


def _play(env: VectorEnv, steps: int, generator: torch.Generator) -> list[Any]:
    found = []
    for _ in range(steps):
        if isinstance(env.spec.action_space, spaces.Discrete):
            action = torch.randint(int(env.spec.action_space.n), (env.num_envs,), generator=generator)
        else:
            action = torch.rand(env.num_envs, 1, generator=generator) * 2 - 1
        found.append(env.step(action)[:-1])
    return found


@pytest.mark.parametrize("env_id", CLASSIC)
@pytest.mark.parametrize("autoreset", [True, False])
def test_a_restored_environment_goes_on_bit_for_bit(env_id: str, autoreset: bool) -> None:
    def make() -> VectorEnv:
        return make_env(env_id, 4, seed=1, backend="torch", autoreset=autoreset, kwargs={"max_episode_steps": 15})

    env = make()
    env.reset()
    last = _play(env, 20, torch.Generator().manual_seed(0))[-1][0]
    saved = env.state_dict()
    expected = _play(env, 40, torch.Generator().manual_seed(1))
    again = make()
    assert torch.equal(again.load_state_dict(saved), last)
    found = _play(again, 40, torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for s, t in zip(expected, found, strict=True) for a, b in zip(s, t, strict=True))
    assert any(s[5].any() for s in expected) == autoreset  # without it all rows had ended before


def test_time_limits_come_from_gymnasium_the_class_or_the_user() -> None:
    assert make_env("CartPole-v1", backend="torch").spec.episode_limit == 500
    for kwargs, limit in (({"max_episode_steps": 3}, 3), ({"max_episode_steps": -1}, None)):
        env = make_env("Pendulum-v1", 2, backend="torch", kwargs=kwargs)
        assert env.spec.episode_limit == limit
        env.reset()
        seen = [env.step(torch.zeros(2, 1)) for _ in range(4)]
        assert [s.truncated.all().item() for s in seen] == [False, False, limit == 3, False]
        assert not any(s.terminated.any() for s in seen)


class _NoWaiting(TorchDispatchMode):
    """Refuses what would make a GPU wait for the host, or depend on the data in shape."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "_unique", "unique", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.REFUSED, f"{func} in a step"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("env_id", CLASSIC)
@pytest.mark.parametrize("autoreset", [True, False])
def test_a_step_never_looks_into_a_tensor_and_keeps_its_state_in_place(env_id: str, autoreset: bool) -> None:
    env = make_env(env_id, 3, backend="torch", autoreset=autoreset)
    assert isinstance(env, TorchEnv)
    env._looks = False  # which it does on the CPU alone
    env.reset()
    where = env.state.data_ptr()
    action = torch.zeros(3, 1) if isinstance(env.action_space, spaces.Box) else torch.zeros(3, dtype=torch.int64)
    mask = torch.tensor([True, False, False])
    with _NoWaiting():
        env.step(action)
        env.reset(mask=mask)
        with pytest.raises(AssertionError, match="in a step"):
            bool(env.state.sum() > 0)
    assert env.state.data_ptr() == where


# An environment of one's own

MODULE = """
import numpy as np
import torch
from gymnasium import register, spaces
from rlopt.envs import TorchEnv

class Drift(TorchEnv):
    observation_space = spaces.Dict({"place": spaces.Box(-9.0, 9.0, (1,), np.float32), "far": spaces.Discrete(2)})
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    episode_limit = 4
    defaults = {"wind": 0.5}
    dtype = torch.float32

    def initial(self, streams):
        return {"x": streams.uniform(0.0, 0.1), "k": torch.zeros(self.num_envs, dtype=torch.int64)}

    def dynamics(self, state, action):
        x = state["x"] + action[:, 0] + self.parameters["wind"]
        return {"x": x, "k": state["k"] + 1}, -x.abs(), x > 9.0

    def observe(self, state):
        return {"place": state["x"][:, None], "far": (state["x"] > 1.0).long()}

register("Drift-v0", entry_point="my_torch_env:Drift", max_episode_steps=3)
"""


def test_an_environment_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_torch_env.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    env = make_env("my_torch_env:Drift", 2, kwargs={"wind": 1.0})
    registered = make_env("my_torch_env:Drift-v0", 2)
    assert isinstance(env, TorchEnv) and isinstance(registered, TorchEnv)
    assert (env.spec.id, env.spec.episode_limit, registered.spec.episode_limit) == ("my_torch_env:Drift", 4, 3)
    obs = env.reset()
    assert isinstance(obs, dict)
    start = obs["place"]
    assert (start.dtype, obs["far"].dtype, obs["far"].tolist()) == (torch.float32, torch.int64, [0, 0])
    step = env.step(torch.tensor([[0.0], [1.0]]))
    assert torch.allclose(step.obs["place"], start + torch.tensor([[1.0], [2.0]]))
    assert step.obs["far"].tolist() == [1, 1]
    env.set_parameters(wind=torch.tensor([0.0, 8.0]))
    after = env.step(torch.zeros(2, 1))
    assert after.terminated.tolist() == [False, True]
    assert torch.allclose(after.next_obs["place"], step.obs["place"] + torch.tensor([[0.0], [8.0]]))
    saved = env.state_dict()
    again = make_env("my_torch_env:Drift", 2)
    again.reset()
    assert torch.equal(again.load_state_dict(saved)["place"], after.obs["place"])
    assert torch.equal(again.step(torch.ones(2, 1)).next_obs["place"], env.step(torch.ones(2, 1)).next_obs["place"])
    del gymnasium.registry["Drift-v0"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"id": "FrozenLake-v1"}, "has no version in torch (there are CartPole-v1"),
        ({"id": "CartPole-v1", "wrappers": ["FlattenObservation"]}, "use env.backend=sync"),
        ({"id": "CartPole-v1", "kwargs": {"render_mode": "rgb_array"}}, "draws no pictures"),
        ({"id": "CartPole-v1", "kwargs": {"gravty": 1.0}}, "did you mean gravity?"),
        ({"id": "Pendulum-v1", "kwargs": {"g": "strong"}}, "takes numbers"),
        ({"id": "rlopt.envs.classic:CartPol"}, "not a registered environment"),
    ],
)
def test_mistakes_in_a_request_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(RloptError) as caught:
        make_env(**arguments, backend="torch")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


class Fragile(TorchEnv):
    """Counts; a row whose action is positive breaks, leaving NaN behind."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    episode_limit = 3

    def initial(self, streams: RowStreams) -> torch.Tensor:
        return torch.stack((torch.zeros(self.num_envs, dtype=self.dtype), streams.uniform()), 1)

    def dynamics(self, state: Any, action: Any) -> Any:
        broken = action[:, 0] > 0
        count = torch.where(broken, torch.nan, state[:, 0] + 1)
        return torch.stack((count, state[:, 1]), 1), count, torch.zeros_like(broken), None, broken

    def observe(self, state: Any) -> Any:
        return state


class Remembers(Fragile):
    """Each leaf of its state is the one before's last value."""

    def initial(self, streams: RowStreams) -> dict[str, torch.Tensor]:
        zero = torch.zeros(self.num_envs)
        return {"now": zero, "before": zero, "long_ago": zero}

    def dynamics(self, state: Any, action: Any) -> Any:
        new = {"now": state["now"] + 1, "before": state["now"], "long_ago": state["before"]}
        return new, state["now"], torch.zeros(self.num_envs, dtype=torch.bool)

    def observe(self, state: Any) -> Any:
        return torch.stack((state["before"], state["long_ago"]), 1)


def test_a_state_may_hold_its_own_past() -> None:
    env = Remembers(1, max_episode_steps=-1)
    env.reset()
    assert [env.step(torch.zeros(1, 1)).obs[0].tolist() for _ in range(4)] == [[0, 0], [1, 0], [2, 1], [3, 2]]


@pytest.mark.parametrize("autoreset", [True, False])
def test_a_row_whose_simulation_fails_begins_anew_and_is_no_transition(autoreset: bool) -> None:
    env = Fragile(3, seed=1, autoreset=autoreset)
    env.reset()
    env.step(torch.zeros(3, 1))
    before = env.step(torch.zeros(3, 1)).obs
    step = env.step(torch.tensor([[0.0], [1.0], [0.0]]))
    assert step.valid.tolist() == [True, False, True]
    assert step.truncated.tolist() == [True, False, True]
    assert not step.terminated.any()
    assert step.ended.tolist() == [True] * 3
    assert step.reward.tolist() == [3.0, 0.0, 3.0]
    assert torch.equal(step.next_obs[[0, 2]], before[[0, 2]] + torch.tensor([1.0, 0.0]))
    assert torch.equal(step.next_obs[1], step.obs[1])
    assert step.obs[1, 0] == 0.0
    assert step.obs[1, 1] != before[1, 1]  # from the row's stream, which goes on
    later = env.step(torch.zeros(3, 1))
    assert later.valid.tolist() == [autoreset, True, autoreset]
    assert later.next_obs[1, 0] == 1.0
    assert not later.truncated.any()  # the limit counts from the new beginning


def test_the_example_runs_and_is_about_thirty_lines() -> None:
    path = Path(__file__).parents[2] / "examples" / "own_torch_env.py"
    if not path.is_file():
        pytest.skip("needs a checkout")
    spec = importlib.util.spec_from_file_location("own_torch_env", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert -35.0 < example.main(num_envs=256) < -20.0  # doing nothing gives about -100
    lines = path.read_text().split("class Chase")[1].split("def main")[0].splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 32
    idle = example.Chase(256, seed=1, autoreset=False)
    idle.reset()
    total = sum(idle.step(torch.zeros(256, 2)).reward for _ in range(100))
    assert float(total.mean()) < -80.0  # type: ignore[union-attr]
