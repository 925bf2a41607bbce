"""Parallel environments of PettingZoo as one, told by a small one whose every number is written down by hand."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.envs import make_env
from rlopt.envs.teams.pettingzoo import PettingZooEnv, _tell_of_truncation
from rlopt.types import RloptError

NO, YES = False, True


class Climb:
    """A ``lead`` that sees two numbers and has three actions, and a ``second`` with four and two: both see the height,
    times 1, 2 …, and are paid it and their action. ``second`` falls at height 2, or its time is up there (``alone``),
    and it may come back at 3 (``joins``); at 4 it is over, by ``end``."""

    metadata: dict[str, Any] = {"name": "climb"}

    def __init__(
        self, end: str = "truncate", masks: bool = False, kind: str = "discrete", alone: bool = NO, joins: bool = NO
    ) -> None:
        self.possible_agents, self.agents = ["lead", "second"], list[str]()
        self.end, self.masks, self.kind, self.alone, self.joins = end, masks, kind, alone, joins
        self.sizes = {"lead": 2, "second": 4}
        self.state_space = spaces.Box(0.0, 9.0, (1, 2), np.float64)

    def observation_space(self, agent: str) -> Any:
        seen = spaces.Box(0.0, 99.0, (self.sizes[agent],), np.float64)
        mask = spaces.Box(0, 1, (self._count(agent),), np.int8)
        return spaces.Dict({"observation": seen, "action_mask": mask}) if self.masks else seen

    def _count(self, agent: str) -> int:
        return 3 if agent == "lead" else 2

    def action_space(self, agent: str) -> Any:
        if self.kind == "box":
            return spaces.Box(-1.0, 1.0, (self._count(agent),), np.float32)
        if agent == "second" and self.kind == "mixed":
            return spaces.Box(-1.0, 1.0, (1,), np.float32)
        return spaces.Discrete(self._count(agent))

    def _seen(self) -> dict[str, Any]:
        found = {}
        for name in self.agents:
            seen: Any = self.height * np.arange(1.0, self.sizes[name] + 1)
            mask = np.ones(self._count(name), np.int8)
            mask[-1] = self.height % 2 == 0
            found[name] = {"observation": seen, "action_mask": mask} if self.masks else seen
        return found

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        self.agents, self.height = list(self.possible_agents), 0
        return self._seen(), {name: {} for name in self.agents}

    def state(self) -> Any:
        return np.array([[self.height, len(self.agents)]])

    def step(self, actions: dict[str, Any]) -> Any:
        assert list(actions) == self.agents, "only those who are there act"
        assert self.kind == "box" or all(type(action) is int for action in actions.values())
        self.height += 1
        over = self.height == 4
        out = {name: name == "second" and self.height == 2 for name in self.agents}
        falls = {name: (out[name] and not self.alone) or (over and self.end == "terminate") for name in self.agents}
        late = {name: (out[name] and self.alone) or (over and self.end == "truncate") for name in self.agents}
        paid = {name: self.height + float(np.sum(action)) for name, action in actions.items()}
        infos = {name: {"height": self.height} for name in self.agents}
        seen = self._seen()
        self.agents = [name for name in self.agents if not (falls[name] or late[name])]
        if self.joins and self.height == 3:
            self.agents.append("second")
        return seen, paid, falls, late, infos

    def render(self) -> Any:
        return np.zeros((2, 2, 3), np.uint8)

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("climbing")
    module.parallel_env = Climb  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "climbing", module)
    monkeypatch.setitem(sys.modules, "not_climbing", types.ModuleType("not_climbing"))


@pytest.mark.parametrize("end", ["truncate", "terminate"])
def test_agents_that_differ_are_padded_and_one_dies(end: str) -> None:
    env = make_env("pettingzoo:climbing", 2, kwargs={"end": end, "masks": True}, facts=["height/lead"])
    spec = env.spec
    assert (spec.agents, spec.reward_shape) == (("lead", "second"), (2,))
    assert spec.of_agent("lead").action_space == spaces.Discrete(3)
    assert spec.of_agent("second").observation_space["obs"].shape == (4,)  # type: ignore[index]
    obs = env.reset()
    assert isinstance(obs, dict)
    assert obs["action_mask"][0].tolist() == [[YES, YES, YES], [YES, YES, NO]]
    assert obs["state"].tolist() == [[0, 2]] * 2
    step = env.step(torch.tensor([[2, 1], [0, 0]]))
    assert isinstance(step.obs, dict)
    assert step.reward.tolist() == [[3, 2], [1, 1]]
    assert step.obs["obs"][0].tolist() == [[1, 2, 0, 0], [1, 2, 3, 4]]
    assert step.obs["action_mask"][0].tolist() == [[YES, YES, NO], [YES, NO, NO]]
    step = env.step(torch.tensor([[0, 0], [0, 1]]))
    assert isinstance(step.obs, dict)
    assert step.reward.tolist() == [[2, 2], [2, 3]], "it is paid for the step in which it falls"
    assert step.obs["alive"].tolist() == [[YES, NO]] * 2
    assert step.obs["obs"][0].tolist() == [[2, 4, 0, 0], [0, 0, 0, 0]]
    assert not step.obs["action_mask"][0, 1].any()
    assert not step.ended.any()
    step = env.step(torch.tensor([[0, 0], [0, 0]]))
    assert step.reward.tolist() == [[3, 0], [3, 0]]
    step = env.step(torch.tensor([[0, 0], [0, 0]]))
    assert isinstance(step.obs, dict)
    assert isinstance(step.next_obs, dict)
    assert step.ended.all()
    assert step.truncated.all() == (end == "truncate")
    assert step.terminated.all() == (end == "terminate")
    assert step.next_obs["alive"].tolist() == [[YES, NO]] * 2, "whose time is up goes on living in its bootstrap"
    assert step.next_obs["obs"][0, 0].tolist() == [4, 8, 0, 0]
    assert step.info["height/lead"].tolist() == [4, 4]
    assert step.obs["alive"].all()


def test_one_whose_time_is_up_alone_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    _tell_of_truncation.cache_clear()
    for _ in range(2):
        env = make_env("pettingzoo:climbing", 2, kwargs={"alone": True})
        env.reset()
        for _ in range(2):
            step = env.step(torch.zeros(2, 2, dtype=torch.int64))
        assert isinstance(step.next_obs, dict)
        assert step.next_obs["alive"].tolist() == [[YES, NO]] * 2, "a row has one time limit"
        assert not (step.truncated.any() or step.ended.any())
    assert caplog.text.count("climbing: an agent is truncated while others go on; its bootstrap is cut") == 1


def test_one_that_joins_after_the_reset_is_refused() -> None:
    env = make_env("pettingzoo:climbing", 1, kwargs={"joins": True})
    env.reset()
    action = torch.zeros(1, 2, dtype=torch.int64)
    for _ in range(2):
        env.step(action)
    with pytest.raises(RloptError, match=r"^climbing: second joined after the reset; agents may only leave"):
        env.step(action)


def test_actions_in_boxes_and_a_common_reward() -> None:
    env = make_env("pettingzoo:climbing", 1, kwargs={"kind": "box", "alive": False, "shared_reward": True})
    assert env.spec.reward_shape == ()
    obs = env.reset()
    assert isinstance(obs, dict)
    assert obs.keys() == {"obs", "state"}
    assert env.step(torch.tensor([[[1.0, 0.5, 0.25], [1.0, 1.0, 0.0]]])).reward.tolist() == [2.75]


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("pettingzoo:nowhere.climb_v0", {}, "no module named nowhere; install it"),
        ("pettingzoo:not_climbing", {}, "not_climbing has no parallel_env"),
        ("pettingzoo:climbing", {"kind": "mixed"}, "the actions of the agents are of different kinds"),
        ("pettingzoo:climbing", {"wrong": 1}, "unexpected keyword argument 'wrong'"),
    ],
)
def test_mistakes_are_one_clear_line(name: str, kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(RloptError) as caught:
        make_env(name, kwargs=kwargs)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_environment_that_exists() -> None:
    pytest.importorskip("mpe2")
    env = PettingZooEnv("mpe2.simple_tag_v3", render_mode="rgb_array", max_cycles=3)
    env.reset(seed=0)
    assert env.agents == ("adversary_0", "adversary_1", "adversary_2", "agent_0")
    assert env.render().shape == (700, 700, 3)
    for k in range(3):
        seen, paid, terminated, truncated, _ = env.step(np.zeros(4, np.int64))
        assert (paid.shape, terminated, truncated) == ((4,), False, k == 2)
        assert seen["alive"].all()
