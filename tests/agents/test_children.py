"""Agents that hold agents: one clock, derived streams, one guard, one state."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from rlopt.agents import SAC, SACConfig
from rlopt.nn import NetworkConfig
from rlopt.types import EnvSpec
from tests.agents.cases import OBSERVATION, TORQUE
from tests.agents.completeness import tensors_of, unregistered
from tests.agents.two_learners import TwoLearners, TwoLearnersConfig, TwoUpdates

SMALL = SACConfig(network=NetworkConfig(hidden=(8,)), batch_size=8, fused=False)
CONFIG = TwoLearnersConfig(left=SMALL, right=SMALL, warmup_steps=0)
every_kind = pytest.mark.parametrize("cls", [TwoLearners, TwoUpdates])


def make(cls: type[TwoLearners] = TwoLearners, seed: int = 0, runs: int = 1) -> TwoLearners:
    return cls(EnvSpec("test", OBSERVATION, TORQUE), CONFIG, seed=seed, runs=runs)


def nets(agent: TwoLearners) -> list[torch.Tensor]:
    return [net.flat for child in (agent.left, agent.right) for net in (child.actor, child.critic, child.target)]


@every_kind
def test_children_share_the_clock_and_learn_each_on_its_own(cls, make_batch) -> None:
    agent = make(cls)
    assert agent.left.clock is agent.right.clock is agent.clock
    for i in range(3):
        agent.update(make_batch(agent, i))
        agent.clock.env_steps = i
    assert agent.clock.updates == agent.left.clock.updates == 3 and agent.right.clock.env_steps == 2
    assert not torch.equal(agent.left.actor.flat, agent.right.actor.flat)  # their seeds differ
    assert agent.left.seed != agent.right.seed != agent.seed


def test_stages_of_children_are_theirs(make_batch) -> None:
    agent = make()
    assert agent.stages() == tuple(f"{c}/{s}" for c in ("left", "right") for s in ("critic", "actor", "target"))
    whole = make(TwoUpdates)
    for i in range(3):
        agent.update(make_batch(agent, i))
        whole.update(make_batch(whole, i))
    assert all(torch.equal(a, b) for a, b in zip(nets(agent), nets(whole), strict=True))


@every_kind
def test_the_guard_names_whose_quantity_it_was(cls, make_batch) -> None:
    agent = make(cls)
    agent.right.critic.flat.fill_(torch.nan)
    before = agent.right.actor.flat.clone(), agent.left.actor.flat.clone()
    agent.update(make_batch(agent, 0))
    assert agent.guard.first_bad() == "right/critic loss"
    assert torch.equal(agent.right.actor.flat, before[0]) and not torch.equal(agent.left.actor.flat, before[1])
    batch = make_batch(agent, 1)
    agent.guard.clear()
    agent.update(batch._replace(reward=batch.reward * torch.inf))
    assert agent.guard.first_bad() == "left/reward"


def test_compiled_and_readable_children_share_one_code(make_batch) -> None:
    """The first culprit is that of the readable child, which only says so when it is asked."""

    class Mixed(TwoUpdates):
        def build(self) -> None:
            self.left, self.right = (self.child(n, SAC, replace(SMALL, fused=n == "right")) for n in ("left", "right"))
            self.actor, self.actor_module = self.left.actor, self.left.actor_module

    agent = make(Mixed)
    assert agent.left.fused is None and agent.right.fused is not None
    for child, name in ((agent.right, "right/critic loss"), (agent.left, "left/critic loss")):
        child.critic.flat.fill_(torch.nan)
        agent.update(make_batch(agent, 0))
        assert agent.guard.first_bad() == name
        agent.guard.clear()


@every_kind
@pytest.mark.parametrize("runs", [1, 2])
def test_the_state_of_children_is_part_of_their_parents_and_resumes_exactly(cls, runs: int, make_batch) -> None:
    straight, resumed = make(cls, runs=runs), make(cls, seed=9, runs=runs)
    for i in range(2):
        straight.update(make_batch(straight, i, size=8 * runs))
    state = straight.state_dict()
    assert {"clock", "guard", "left", "right"} < state.keys() and "clock" not in state["left"]
    resumed.load_state_dict(state)
    assert unregistered(straight, tensors_of(make(cls, seed=5, runs=runs))) == []
    obs = torch.randn(2 * runs, 4)
    for agent in (straight, resumed):
        for i in range(2, 4):
            agent.update(make_batch(agent, i, size=8 * runs))
    assert torch.equal(straight.act(obs).action, resumed.act(obs).action)
    assert all(torch.equal(a, b) for a, b in zip(nets(straight), nets(resumed), strict=True))
    with pytest.raises(KeyError, match="right"):
        resumed.load_state_dict({k: v for k, v in state.items() if k != "right"})


def test_each_run_of_a_parent_is_a_parent_of_that_seed(make_batch) -> None:
    together, alone = make(seed=3, runs=2), [make(seed=3 + r) for r in range(2)]
    for r in range(2):
        for stacked, single in zip(nets(together), nets(alone[r]), strict=True):
            assert torch.equal(stacked[r], single)
    obs = torch.randn(4, 4)
    actions = torch.cat([agent.act(part).action for agent, part in zip(alone, obs.split(2), strict=True)])
    torch.testing.assert_close(together.act(obs).action, actions)


def test_a_copied_child_goes_on_alone(make_batch) -> None:
    agent = make()
    agent.update(make_batch(agent, 0))
    alone, whole = copy.deepcopy(agent.right), copy.deepcopy(agent)
    assert alone.parent is None and alone.clock is not agent.clock
    for i in range(1, 3):
        alone.update(make_batch(agent, i))
        agent.update(make_batch(agent, i))
        whole.update(make_batch(agent, i))
    assert torch.equal(alone.critic.flat, agent.right.critic.flat) and alone.clock.updates == 3
    assert torch.equal(whole.right.critic.flat, agent.right.critic.flat)
