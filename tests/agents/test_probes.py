"""Probe problems: each isolates one ability of an agent, with an answer known in closed form.

Transitions are written straight into a replay buffer: nothing but act, replay and update takes part. Values are told in
units of the reward. γ = 0.5 keeps horizons short. Temperatures are small, so that the entropy bonus, at most
αγ log 2/(1 - γ) = 0.14 with sac_2018's α = 1/5 and 0.035 elsewhere, stays inside the tolerances.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gymnasium import spaces

from rlopt.buffers import ReplayBuffer
from rlopt.nn import NetworkConfig
from rlopt.registry import get_agent
from tests.agents.cases import AGENTS

OBSERVATION = spaces.Box(-1.0, 1.0, (1,))
GAMMA = 0.5
Transition = tuple[float, float, float, float, bool, bool]
"""obs, action in [-1, 1], reward, next obs, terminated, truncated."""


class Probe:
    """One agent with actions in [-1, 1]: a discrete agent knows the two ends, a continuous one sees nine of them."""

    def __init__(self, name: str, updates: int = 150, n_step: int = 1) -> None:
        case = AGENTS[name]
        assert case.probe is not None
        options: dict[str, Any] = {
            "gamma": GAMMA,
            "batch_size": 32,
            "warmup_steps": 0,
            "learning_rate": 2e-2,
            "lr_schedule": "linear",
            "schedule_steps": updates,
            "tau": 0.2,
            "n_step": n_step,
            "network": NetworkConfig(hidden=(32,)),
            **case.probe.options,
        }
        self.discrete = isinstance(case.actions, spaces.Discrete)
        self.actions = (-1.0, 1.0) if self.discrete else tuple(i / 4 - 1.0 for i in range(9))
        space: spaces.Space[Any] = spaces.Discrete(2) if self.discrete else spaces.Box(-1.0, 1.0, (1,))
        cls = get_agent(name)
        config = cls.config_class(**options)
        self.updates, self.scale = updates, getattr(config, "reward_scale", 1.0)
        self.agent: Any = cls(OBSERVATION, space, config=config)
        self.buffer = ReplayBuffer(10_000, OBSERVATION, space, n_step=n_step, gamma=GAMMA, seed=1)

    def _action(self, action: float) -> torch.Tensor:
        return torch.tensor([int(action > 0)]) if self.discrete else torch.tensor([[action]])

    def train(self, transitions: list[Transition]) -> None:
        for obs, action, reward, next_obs, terminated, truncated in transitions:
            self.buffer.add(
                torch.tensor([[obs]]),
                self._action(action),
                torch.tensor([reward]),
                torch.tensor([[next_obs]]),
                torch.tensor([terminated]),
                torch.tensor([truncated]),
            )
        for i in range(self.updates):
            self.agent.clock.env_steps = i
            self.agent.update(self.buffer.sample(32))
        assert self.agent.guard.first_bad() is None

    @torch.no_grad()
    def q(self, obs: float, action: float) -> float:
        """Mean of the critics, in units of the reward."""
        return float(self.agent.q(torch.tensor([[obs]]), self._action(action)).mean()) / self.scale

    def acts(self, obs: float) -> float:
        """The deterministic action, as -1 … 1."""
        action = float(self.agent.act(torch.tensor([[obs]]), deterministic=True).action.squeeze())
        return 2.0 * action - 1.0 if self.discrete else action


every_agent = pytest.mark.parametrize("name", [name for name, case in AGENTS.items() if case.probe is not None])


@every_agent
def test_one_step_value(name: str) -> None:
    """A reward of 1 and the end: Q = 1 whatever the action."""
    probe = Probe(name)
    probe.train([(0.0, a, 1.0, 0.0, True, False) for a in probe.actions])
    assert [probe.q(0.0, a) for a in (-1.0, 1.0)] == pytest.approx([1.0, 1.0], abs=0.08)


@every_agent
def test_value_depends_on_the_observation(name: str) -> None:
    """The reward is the observation: Q(±1) = ±1."""
    probe = Probe(name)
    probe.train([(s, a, s, s, True, False) for s in (-1.0, 1.0) for a in probe.actions])
    assert [probe.q(s, a) for s in (-1.0, 1.0) for a in (-1.0, 1.0)] == pytest.approx([-1, -1, 1, 1], abs=0.1)


@every_agent
def test_a_delayed_reward_is_discounted(name: str) -> None:
    """0 then 1: Q(last) = 1, Q(first) = γ = 0.5, not 1."""
    probe = Probe(name)
    probe.train(
        [row for a in probe.actions for row in ((-1.0, a, 0.0, 1.0, False, False), (1.0, a, 1.0, 1.0, True, False))]
    )
    assert probe.q(1.0, 1.0) == pytest.approx(1.0, abs=0.05)
    assert probe.q(-1.0, 1.0) == pytest.approx(0.5, abs=0.1)


@every_agent
def test_the_policy_finds_the_better_action(name: str) -> None:
    """The reward is the action's sign."""
    probe = Probe(name)
    probe.train([(0.0, a, a, 0.0, True, False) for a in probe.actions])
    assert [probe.q(0.0, a) for a in (-1.0, 1.0)] == pytest.approx([-1.0, 1.0], abs=0.1)
    assert probe.acts(0.0) > 0.8


@every_agent
def test_the_policy_depends_on_the_observation(name: str) -> None:
    """The reward is action times observation: the policy must follow the observation's sign."""
    probe = Probe(name)
    probe.train([(s, a, s * a, s, True, False) for s in (-1.0, 1.0) for a in probe.actions])
    assert probe.acts(1.0) > 0.8
    assert probe.acts(-1.0) < -0.8


@every_agent
def test_bootstrap_goes_on_past_a_truncation(name: str) -> None:
    """A reward of 1 for ever, cut by a limit after every step: Q = 1/(1 - γ) = 2. Reading truncations
    as terminations would give 1."""
    probe = Probe(name)
    probe.train([(0.0, a, 1.0, 0.0, False, True) for a in probe.actions])
    assert [probe.q(0.0, a) for a in (-1.0, 1.0)] == pytest.approx([2.0, 2.0], abs=0.2)


@every_agent
def test_bootstrap_stops_at_a_termination(name: str) -> None:
    """The same rewards, but positive actions end the episode: Q = 1 there, else 1 + γ·2 = 2; the policy stays alive."""
    probe = Probe(name, updates=250)
    probe.train([(0.0, a, 1.0, 0.0, a > 0, False) for a in probe.actions])
    assert probe.q(0.0, 1.0) == pytest.approx(1.0, abs=0.1)
    assert probe.q(0.0, -1.0) == pytest.approx(2.0, abs=0.3)
    assert probe.acts(0.0) < -0.3


@every_agent
def test_n_step_returns(name: str) -> None:
    """n = 3. A chain of four rewards of 1 that terminates: values 1.875, 1.75, 1.5, 1. Beside it in the buffer, single
    steps of reward -1 that are truncated at once into the same state: value -1/(1 - γ) = -2.

    A window across an episode's end would mix the two; γ³ where the window has length 1 would make the second -1.14.
    """
    probe = Probe(name, updates=int(200 * AGENTS[name].probe.patience), n_step=3)
    chain = (-1.0, -0.5, 0.0, 0.5)
    rows: list[Transition] = []
    for a in probe.actions:
        rows += [(s, a, 1.0, s + 0.5, s == 0.5, False) for s in chain]
        rows += [(1.0, a, -1.0, 1.0, False, True)] * 3
    probe.train(rows)
    assert [probe.q(s, 1.0) for s in (*chain, 1.0)] == pytest.approx([1.875, 1.75, 1.5, 1.0, -2.0], abs=0.3)


@pytest.mark.parametrize(("name", "goal"), [("sac", -1.0), ("sac_discrete", 0.6)])
def test_the_temperature_brings_the_entropy_to_its_target(name: str, goal: float, make_agent, make_batch) -> None:
    """One-step rewards obs·action, from a temperature that is far too high: only its descent lets the entropy fall."""
    options = {"target_entropy": goal} if name == "sac" else {"target_entropy_ratio": goal / math.log(3.0)}
    agent = make_agent(name, learning_rate=1e-2, temperature_learning_rate=0.03, batch_size=32, **options)
    batch = make_batch(agent, 0, size=32)
    action = batch.action.reshape(32, -1)[:, 0] * (2.5 if name == "sac" else 1.0)
    batch = batch._replace(discount=torch.zeros(32), reward=3.0 * batch.obs[:, 0] * action)
    entropy = [agent.update(batch).metrics["entropy"] for _ in range(300)]
    assert float(entropy[0]) > goal + 0.3
    assert float(torch.stack(entropy[-100:]).mean()) == pytest.approx(goal, abs=0.2)
