"""The stages of an update: in the order that the agent names, each in place, each reporting its own."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch

from rlopt.agents import SACConfig
from rlopt.agents.replay_agent import join_updates
from rlopt.buffers import ReplayBuffer
from rlopt.loops.captured import CapturedUpdate, why_eager
from rlopt.nn import NetworkConfig, OptimiserConfig
from rlopt.types import EnvSpec, RloptError, Update
from tests.agents.cases import ACTOR_CRITICS, OBSERVATION, TORQUE, every_learner, make_agent
from tests.agents.three_actors import ThreeActors
from tests.agents.two_learners import TwoLearners, TwoLearnersConfig, TwoUpdates

TEAM_OF_ONE = ("critic", "actor/0", "target")
STAGES = {
    "sac_2018": ("value", "critic", "actor", "target"),
    **dict.fromkeys(("hasac", "masac", "hatd3", "matd3"), TEAM_OF_ONE),
}


def three_actors(seed: int = 0) -> ThreeActors:
    config = SACConfig(network=NetworkConfig(hidden=(8,)), batch_size=8, warmup_steps=0, fused=False)
    return ThreeActors(EnvSpec("test", OBSERVATION, TORQUE), config, seed=seed)


@every_learner
def test_an_update_is_its_stages_and_each_changes_its_own_part_alone(name: str, make_agent, make_batch) -> None:
    options = {"fused": False} if name in ("sac", "drpg_deep") else {}
    agent, whole = make_agent(name, **options), make_agent(name, **options)
    usual = ("critic", "actor", "target") if name in ACTOR_CRITICS else ("critic", "target")
    assert agent.stages() == agent.stages() == STAGES.get(name, usual)
    work = agent.prepare(make_batch(agent, 0))
    agent.watch(work)
    nets = [net for net in ("actor", "critic", "value", "target") if net in agent.parts]
    parts = {part: getattr(agent, part).flat for part in nets}
    done = []
    for stage in agent.stages():
        before = {part: flat.clone() for part, flat in parts.items()}
        done.append(agent.stage(stage, work))
        assert {part for part, flat in parts.items() if not torch.equal(flat, before[part])} == {
            stage.partition("/")[0]
        }
    agent.end_update()
    update, expected = join_updates(done), whole.update(make_batch(whole, 0))
    assert update.metrics == expected.metrics and torch.equal(update.priority, expected.priority)
    for part, flat in parts.items():
        assert torch.equal(flat, getattr(whole, part).flat)


def test_a_policy_delay_is_a_missing_stage(make_agent, make_batch) -> None:
    agent = make_agent("sac", fused=False, policy_delay=2)
    for i in range(4):
        assert agent.stages() == (("critic", "actor", "target") if i % 2 == 0 else ("critic", "target"))
        assert ("actor_loss" in agent.update(make_batch(agent, i)).metrics) == (i % 2 == 0)


SPEC = EnvSpec("test", OBSERVATION, TORQUE)
HOST = OptimiserConfig(name="torch:Adagrad")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (three_actors, None),
        (lambda: TwoLearners(SPEC), None),
        (lambda: make_agent("ppo"), "the updates of agent=ppo are no stages"),
        (lambda: TwoUpdates(SPEC), "the updates of agent=two_learners are more than its stages"),
        (lambda: make_agent("td3", optimiser=HOST), "agent.optimiser.name=torch:Adagrad steps on the host"),
        (
            lambda: TwoLearners(SPEC, TwoLearnersConfig(right=SACConfig(optimiser=HOST))),
            "agent.optimiser.name=torch:Adagrad steps on the host",
        ),
    ],
)
def test_why_updates_are_not_recorded_is_told(make, reason: str | None) -> None:
    """Of children too: what stands against a part stands against the whole."""
    agent = make()
    assert why_eager(agent) == reason
    buffer = ReplayBuffer(16, OBSERVATION, TORQUE)
    if reason is None:
        assert CapturedUpdate(agent, buffer, 8).agent is agent
        return
    told = f"update_mode=captured cannot be: {reason}; use update_mode=eager"
    with pytest.raises(RloptError, match=re.escape(told)):
        CapturedUpdate(agent, buffer, 8)


def test_the_priorities_are_those_of_the_last_stage_that_has_some() -> None:
    one, two = torch.ones(2), torch.zeros(2)
    parts = [Update({"a": one}, one), Update({"b": two}, two), Update({"a": two})]
    joined = join_updates(parts)
    assert joined.metrics == {"a": two, "b": two} and joined.priority is two


def test_stages_in_a_random_order_report_guard_and_resume_in_any(make_batch) -> None:
    agent, orders = three_actors(), []
    for i in range(12):
        orders.append(agent.stages())
        assert agent.stages() == orders[-1]
        update = agent.update(make_batch(agent, i))
        assert {f"actor_loss/{k}" for k in range(3)} <= update.metrics.keys()
        seen = [update.metrics[f"seen/{stage[-1]}"] for stage in orders[-1] if stage.startswith("actor")]
        assert all(a != b for a, b in pairwise(seen))  # each has seen one more
        if i == 5:
            resumed = three_actors(seed=1)
            resumed.load_state_dict(agent.state_dict())
    assert len(set(orders)) > 3
    for i in range(6, 12):
        assert resumed.stages() == orders[i]
        resumed.update(make_batch(resumed, i))
    for mine, theirs in zip(agent.actors, resumed.actors, strict=True):
        assert torch.equal(mine.flat, theirs.flat)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_the_first_culprit_of_a_random_order_is_named_and_those_before_it_have_learnt(bad: int, make_batch) -> None:
    agent = three_actors()
    for i in range(6):
        agent.guard.clear()
        agent.actors[bad].flat.fill_(float("nan"))
        order = [int(stage[-1]) for stage in agent.stages() if stage.startswith("actor")]
        counts = [optimiser.count.item() for optimiser in agent.optimisers]
        agent.update(make_batch(agent, i))
        assert agent.guard.first_bad() == f"actor/{bad} loss"
        learnt = [k for k in range(3) if agent.optimisers[k].count.item() > counts[k]]
        assert learnt == sorted(order[: order.index(bad)])
