"""What a policy remembers travels everywhere it acts: both loops, evaluation, films, simulators, export, resume."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.agents.base import Agent, ReplayAgentConfig
from rlopt.agents.group import GroupAgentConfig
from rlopt.agents.reinforce import Reinforce, ReinforceConfig, policy_outputs
from rlopt.buffers import ReplayBuffer
from rlopt.envs.torch_env import TorchEnv
from rlopt.loops.evaluation import run_episodes
from rlopt.loops.group import GroupLoop
from rlopt.loops.parameter_box import ParameterBox, Simulator
from rlopt.loops.replay import ReplayLoop
from rlopt.nn import Actor, NetworkConfig, register_actor
from rlopt.nn.actors import ACTORS
from rlopt.policy import Policy, load_policy, save_policy
from rlopt.state import load_state, save_state
from rlopt.training.video import _film
from rlopt.types import Act, Carry, EnvSpec, Obs, RloptError, Update, begin_anew, next_carry

OBSERVATION, ACTION = spaces.Box(-1.0, 1.0, (1,), np.float32), spaces.Box(-100.0, 100.0, (1,), np.float32)


class Counting(Actor):
    """Answers every observation with how many it has seen of the episode."""

    kind = "test_counting"

    def __init__(self, observation_space: Any, action_space: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options
        self.unit = torch.nn.Parameter(torch.ones(1))

    def initial_carry(self, rows: int) -> Carry:
        return {"seen": torch.zeros(rows, 1, device=self.unit.device)}

    @torch.no_grad()
    def act(self, obs: Obs, carry: Carry = None, deterministic: bool = False, generator: Any = None) -> Any:
        assert carry is not None
        seen = carry["seen"] + self.unit
        return seen, {"seen": seen}


class Echo(TorchEnv):
    """Pays the action, for 2 to 6 steps as drawn at the reset; ``scale`` multiplies it."""

    observation_space, action_space = OBSERVATION, ACTION
    episode_limit = 6
    defaults = {"scale": 1.0}

    def initial(self, streams: Any) -> torch.Tensor:
        return 2.0 + (5.0 * streams.uniform()).floor()

    def dynamics(self, state: torch.Tensor, action: torch.Tensor) -> Any:
        return state - 1.0, action[:, 0] * self.parameters["scale"], state <= 1.0

    def observe(self, state: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(state)[:, None]

    def frame(self) -> Any:
        return np.zeros((4, 4, 3), np.uint8)


SPEC = EnvSpec("Echo-v0", OBSERVATION, ACTION, 6)


def policy() -> Policy:
    return Policy(SPEC, Counting(OBSERVATION, ACTION, {}))


def right(total_reward: float, length: int) -> bool:
    """1 + 2 + … + length."""
    return total_reward == length * (length + 1) / 2


class Remembers(Agent):
    """Acts by counting and learns nothing."""

    name = "test_remembers"
    config_class = ReplayAgentConfig

    def build(self) -> None:
        self.actor = self.net("actor", lambda: Counting(OBSERVATION, ACTION, {}))

    def act(self, obs: Obs, carry: Carry = None, deterministic: bool = False) -> Act:
        return Act(*self.policy.actor.act(obs, carry))

    def update(self, batch: Any) -> Update:
        self.clock.updates += 1
        self.batch = batch
        return Update({})

    @property
    def policy(self) -> Policy:
        assert isinstance(self.actor.module, Actor)
        return Policy(self.spec, self.actor.module)


@dataclass(frozen=True, kw_only=True)
class GroupConfig(GroupAgentConfig):
    learning_rate: float = 1.0


class RemembersGroups(Remembers):
    loop = "group"
    config_class = GroupConfig


def replay_loop(rows: int = 3, total_steps: int = 200) -> ReplayLoop:
    env = Echo(rows, seed=1)
    buffer = ReplayBuffer(500, OBSERVATION, ACTION, num_envs=rows)
    return ReplayLoop(Remembers(SPEC, ReplayAgentConfig(warmup_steps=0, batch_size=4)), env, buffer, total_steps)


# One row of the truth table of ``Step`` each: ended, valid, and what the row remembers then.
TABLE = {
    "ordinary step or lost life": (False, True, "after"),
    "end": (True, True, "initial"),
    "surplus row": (False, False, "before"),
    "episode lost": (True, False, "initial"),
}


@pytest.mark.parametrize("case", TABLE)
def test_what_a_row_remembers_after_a_step(case: str) -> None:
    ended, valid, expected = TABLE[case]
    carries: dict[str, Carry] = {n: {"x": torch.full((2, 3), i)} for i, n in enumerate(("initial", "before", "after"))}
    flags = torch.tensor([[ended, False], [valid, True]])  # the second row only steps
    found = next_carry(carries["before"], carries["after"], carries["initial"], *flags)
    assert found is not None and found["x"].shape == (2, 3)
    assert found["x"][:, 0].tolist() == [["initial", "before", "after"].index(expected), 2]
    assert next_carry(None, None, None, *flags) is None


@pytest.mark.parametrize("slots", [1, 4, 10])
def test_evaluation_begins_every_episode_anew(slots: int) -> None:
    found = run_episodes(policy(), Echo(slots, autoreset=False), 10, seed=3)
    assert len({e.length for e in found}) > 2
    assert all(right(e.total_reward, e.length) for e in found)


def test_the_replay_loop_begins_every_episode_anew_and_resumes_in_the_middle_of_one(tmp_path: Path) -> None:
    loop = replay_loop()
    episodes = [e for _ in range(20) for e in loop.advance().episodes]
    assert len(episodes) > 5 and all(right(e.total_reward, e.length) for e in episodes)
    assert loop.carry is not None and bool(loop.carry["seen"].any())
    save_state(tmp_path / "state", loop.state_dict())
    again = replay_loop()
    again.load_state_dict(load_state(tmp_path / "state"))
    assert again.carry is not None and torch.equal(again.carry["seen"], loop.carry["seen"])
    rest = [[e for _ in range(20) for e in one.advance().episodes] for one in (loop, again)]
    assert rest[0] == rest[1] and all(right(e.total_reward, e.length) for e in rest[0])


def test_an_environment_that_cannot_be_saved_is_begun_anew() -> None:
    loop = replay_loop()
    for _ in range(8):
        loop.advance()
    again = replay_loop()
    again.load_state_dict({**loop.state_dict(), "env": None})
    assert again.carry is not None and not bool(again.carry["seen"].any())
    episodes = [e for _ in range(12) for e in again.advance().episodes]
    assert episodes and all(right(e.total_reward, e.length) for e in episodes)


def test_a_row_that_gave_nothing_finite_begins_anew() -> None:
    loop = replay_loop()
    loop.advance()
    step = loop.env.step

    def poisoned(action: torch.Tensor) -> Any:
        given = step(action)
        return given._replace(reward=given.reward.clone().index_fill(0, torch.tensor([1]), float("nan")))

    loop.env.step = poisoned  # type: ignore[method-assign]
    loop.advance()
    loop.env.step = step  # type: ignore[method-assign]
    assert loop.carry is not None and loop.carry["seen"][1] == 0.0


def test_group_rollouts_begin_anew() -> None:
    env = Echo(6, autoreset=False)
    loop = GroupLoop(RemembersGroups(SPEC, GroupConfig(groups=3, group_size=2)), env, 1000)
    for _ in range(3):
        episodes = loop.advance().episodes
        assert len(episodes) == 6 and all(right(e.total_reward, e.length) for e in episodes)


def test_simulators_begin_anew_at_every_wave() -> None:
    simulator = Simulator(Echo(4, autoreset=False), ParameterBox.of({"scale": (0.0, 2.0)}), episodes=2)
    points = torch.tensor([[0.5], [1.0], [0.5]], dtype=torch.float64)
    found = simulator.returns(policy(), points, seed=5)
    assert all(x in [n * (n + 1) / 2 for n in range(2, 7)] for x in found[0].tolist())
    assert torch.equal(found[0], found[2]) and torch.equal(2 * found[0], found[1])


def test_films_are_of_a_policy_that_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlopt.training import video

    frames: list[Any] = []
    monkeypatch.setattr(video, "_frame", lambda env: env.frame())
    writer: Any = type("Writer", (), {"append_data": staticmethod(frames.append)})
    env: Any = Echo(1, autoreset=False)
    episode = _film(policy(), env, writer, 0, None, None)
    assert right(episode.total_reward, episode.length) and len(frames) == episode.length + 1


# An agent that learns with it


class Recall(TorchEnv):
    """Shows +1 or -1 at the first of three steps, zeros after that, and pays 1 where the last action repeats it.
    Without a memory no policy gets more than 0.5 on average."""

    observation_space, action_space = OBSERVATION, spaces.Discrete(2)
    episode_limit = 3
    defaults: ClassVar[dict[str, float]] = {}

    def initial(self, streams: Any) -> torch.Tensor:
        return torch.stack((2.0 * (streams.uniform() < 0.5) - 1.0, torch.zeros(self.num_envs)), 1)

    def dynamics(self, state: torch.Tensor, action: torch.Tensor) -> Any:
        cue, t = state.unbind(1)
        over = t == 2.0
        return torch.stack((cue, t + 1.0), 1), (over & (action == (cue > 0))).float(), over

    def observe(self, state: torch.Tensor) -> torch.Tensor:
        return (state[:, 0] * (state[:, 1] == 0.0))[:, None]


def reinforce(memory: str, action_space: spaces.Space[Any] = Recall.action_space) -> Reinforce:
    size = 8 if memory == "gru" else None
    network = NetworkConfig(hidden=(8,), activation="tanh", memory=memory, memory_size=size)
    config = ReinforceConfig(network=network, groups=8, group_size=8, learning_rate=2e-2)
    return Reinforce(EnvSpec("Recall-v0", OBSERVATION, action_space, 3), config)


def test_reinforce_remembers_what_it_cannot_see() -> None:
    found = {}
    for memory in ("none", "gru"):
        loop = GroupLoop(reinforce(memory), Recall(64, autoreset=False), 12_000)
        while loop.step < loop.total_steps:
            loop.advance()
        episodes = run_episodes(loop.policy(), Recall(40, autoreset=False), 40, seed=1)
        found[memory] = sum(e.total_reward for e in episodes) / 40
    assert found["gru"] == 1.0 and found["none"] < 0.8


@pytest.mark.parametrize("action_space", [Recall.action_space, ACTION], ids=["discrete", "box"])
def test_the_update_sees_the_policy_that_acted(action_space: spaces.Space[Any]) -> None:
    agent = reinforce("gru", action_space)
    obs, carry = torch.randn(5, 4, 1), agent.initial_carry(4)
    outputs = []
    for t in range(5):
        found, _ = agent.actor_module.read(obs[t], carry)
        outputs.append(found if isinstance(found, tuple) else (found,))
        carry = agent.act(obs[t], carry).carry
    found = policy_outputs(agent.actor, agent.actor.params, obs)
    together = found if isinstance(found, tuple) else (found,)
    for a, parts in zip(together, zip(*outputs, strict=True), strict=True):
        torch.testing.assert_close(a, torch.cat(parts))


# For a user


def test_a_recurrent_policy_gives_its_carry_to_whoever_calls_it(tmp_path: Path) -> None:
    register_actor("test_counting", Counting)
    try:
        save_policy(policy(), tmp_path)
        loaded = load_policy(tmp_path)
    finally:
        del ACTORS["test_counting"]
    assert loaded.recurrent
    carry = loaded.initial_carry()
    for expected in (1.0, 2.0, 3.0):
        action, carry = loaded(np.zeros(1), carry)
        assert isinstance(action, np.ndarray) and action.tolist() == [expected]
    many = begin_anew(carry, loaded.initial_carry(1), torch.tensor([True]))
    assert many is not None and many["seen"].tolist() == [[0.0]]
    action, many = loaded(torch.zeros(4, 1), loaded.initial_carry(4))
    assert isinstance(action, torch.Tensor) and action.tolist() == [[1.0]] * 4


def test_a_carry_that_is_missing_or_unfit_is_one_clear_line() -> None:
    one, plain = policy(), Policy(SPEC, Actor())
    for call, words in (
        (lambda: one(np.zeros(1)), r"keep its carry: .* carry = policy.initial_carry\(\)"),
        (lambda: one(np.zeros((2, 1)), one.initial_carry()), r"must be \{'seen': \(2, 1\)\}, not \{'seen': \(1, 1\)\}"),
        (lambda: one(np.zeros(1), True), "not bool"),
        (lambda: plain(np.zeros(1), one.initial_carry()), "remembers nothing"),
    ):
        with pytest.raises(RloptError, match=words) as e:
            call()
        assert "\n" not in str(e.value)
