"""From words to the objects that loops build themselves from: checked once, handed on as they are."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import pytest
from gymnasium import spaces

from rlopt import registry
from rlopt.agents import Agent, AgentConfig, DiscreteSACConfig
from rlopt.agents.sac import SACConfig
from rlopt.cli.compose import compose
from rlopt.loops.base import MODES, Loop, Progress
from rlopt.loops.configuration import BufferConfig, TrainConfig
from rlopt.training import train_config
from rlopt.training.setup import make_loop, resolve_config
from rlopt.types import EnvSpec, RloptError, State

SMALL = ["env=Pendulum-v1", "device=cpu", "agent.network.hidden=[8]", "agent.fused=false", "buffer.capacity=100"]


def trace(option: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record every function, outside ``rlopt.config`` which does it for them, that reads this option of SAC's."""
    readers: list[str] = []
    read = object.__getattribute__

    def reading(self: SACConfig, name: str) -> Any:
        if name == option:
            frame = sys._getframe(1)
            while frame.f_back is not None and frame.f_globals["__name__"] in ("rlopt.config", __name__):
                frame = frame.f_back
            where = f"{frame.f_globals['__name__']}:{frame.f_code.co_qualname}"
            if where.startswith("rlopt.") and where not in readers:
                readers.append(where)
        return read(self, name)

    monkeypatch.setattr(SACConfig, "__getattribute__", reading)
    return readers


def test_an_options_way_to_the_optimiser_goes_through_four_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """``compose`` makes a mapping of text, ``train_config`` a checked object of the mapping; of that object the loop
    decides what was left open, and the agent gives it to the optimiser. (Each optimiser's is read where that is
    made; here those of actor and temperature are not of this option.)"""
    readers = trace("learning_rate", monkeypatch)
    others = ["agent.actor_learning_rate=1e-3", "agent.temperature_learning_rate=1e-3"]
    config = compose([*SMALL, *others, "agent.learning_rate=0.00125"])
    assert readers == []
    config = resolve_config(config)
    loop = make_loop(config)
    assert readers == ["rlopt.loops.base:Loop.resolve", "rlopt.agents.actor_critic:ActorCritic.build_critic"]
    assert (
        loop.agent.config is config.agent
        and resolve_config(config) == config
        and resolve_config(config).agent is config.agent
    )
    assert loop.agent.critic_optimiser.learning_rate == 0.00125
    loop.close()


def test_agent_and_buffer_are_checked_objects() -> None:
    config = compose([*SMALL, "buffer=prioritized", "buffer.alpha=1"])
    assert type(config.agent) is SACConfig and config.agent.name == "sac"
    assert isinstance(config.buffer, BufferConfig) and config.buffer.name == "prioritized"
    assert config.buffer.alpha == 1.0  # type: ignore[attr-defined]
    assert config == train_config({"agent": config.agent, "buffer": config.buffer, "env": config.env, "device": "cpu"})
    with pytest.raises(RloptError, match="agent: expected options"):
        train_config({"agent": DiscreteSACConfig(name="sac")})


# ---- loops by name


@dataclass(frozen=True, kw_only=True)
class IdleConfig(AgentConfig):
    """No further options."""


class Idle(Agent):
    """Does nothing."""

    name, loop, config_class = "idle", "idle", IdleConfig

    def build(self) -> None:
        pass


class IdleLoop(Loop):
    """Counts to its end."""

    modes = ("num_envs",)

    @classmethod
    def from_config(cls, config: TrainConfig) -> IdleLoop:
        space = spaces.Discrete(2)
        return cls(Idle(EnvSpec("nowhere", space, space), config.agent), config.total_steps)

    def advance(self) -> Progress:
        self.step += 1
        return Progress([], {}, 0, 0.0, 0.0)

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        pass


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setitem(registry.AGENTS, "idle", Idle)
    monkeypatch.setitem(registry.LOOPS, "idle", IdleLoop)
    return {"agent": {"name": "idle"}, "device": "cpu", "env": {"id": "Pendulum-v1"}}


def test_a_new_kind_of_agent_is_a_loop_and_a_name(idle: dict[str, Any]) -> None:
    loop = make_loop(resolve_config(train_config({**idle, "num_envs": 3})))
    assert isinstance(loop, IdleLoop) and isinstance(loop.agent, Idle)


OTHER = {"num_envs": 2, "num_runs": 2, "overlap": True, "precision": "bf16", "update_mode": "eager",
         "buffer": {"name": "reshuffled"}}  # fmt: skip


def test_every_mode_is_refused_by_a_loop_that_lacks_it(idle: dict[str, Any]) -> None:
    assert set(OTHER) == set(MODES)
    for option, value in OTHER.items():
        config = train_config({**idle, option: value})
        if option in IdleLoop.modes:
            make_loop(config)
            continue
        with pytest.raises(RloptError, match=f"^{option}=.*: agent=idle has no such mode; leave {option} out$"):
            make_loop(config)


def test_a_loop_that_nobody_registered_is_told(monkeypatch: pytest.MonkeyPatch, idle: dict[str, Any]) -> None:
    monkeypatch.setattr(Idle, "loop", "repaly")
    with pytest.raises(RloptError, match="no loop is called 'repaly'; did you mean replay"):
        make_loop(train_config(idle))
