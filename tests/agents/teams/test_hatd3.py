"""HATD3 and MATD3 by hand and with one agent; independent learners."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlopt.agents.sac import SAC, SACConfig
from rlopt.agents.td3 import TD3, TD3Config
from rlopt.agents.teams.hatd3 import HATD3, MATD3, actor_loss, smoothed_target
from rlopt.agents.teams.independent import ISAC, ISACConfig, solo
from rlopt.agents.teams.joint_critic import JointBatch, TeamNets
from rlopt.joint import own_action, own_obs
from rlopt.types import EnvSpec, RloptError
from tests.agents.cases import OBSERVATION, TORQUE, make_batch
from tests.agents.teams.games import SMALL, team, team_batch, team_spec


def stub() -> TeamNets:
    """Two agents whose action is their parameter; Q₁ = s + 2 a¹ + 3 a², Q₂ = Q₁ + 1."""

    def critic(params: float, obs: Tensor, action: Tensor) -> Tensor:
        q = params * (obs[:, 0] + 2.0 * action[:, 0] + 3.0 * action[:, 1])
        return torch.stack([q, q + 1.0])

    own: Any = SimpleNamespace(features=1)
    actor: Any = lambda params, obs: params.expand(len(obs), 1)  # noqa: E731
    return TeamNets((actor, actor), critic, (own, own))  # type: ignore[arg-type]


def test_targets_smooth_every_agents_action_and_clip_it_again() -> None:
    s, seen = torch.tensor([[1.0], [2.0]]), (torch.zeros(2, 1), torch.zeros(2, 1))
    batch = JointBatch(
        s, torch.zeros(2, 2), torch.tensor([1.0, 2.0]), s, torch.tensor([0.0, 1.0]), torch.tensor([0.9, 0.9]), None
    )
    noise = torch.tensor([[1.0, 9.0], [0.0, 0.0]])
    slow: Any = (torch.tensor([0.1]), torch.tensor([0.7]))
    y = smoothed_target(stub(), slow, 1.0, batch, seen, None, noise, 0.2, 0.5)  # type: ignore[arg-type]
    assert y.tolist() == pytest.approx([1.0 + 0.9 * (1.0 + 2.0 * 0.3 + 3.0 * 1.0), 2.0])
    alive = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    y = smoothed_target(stub(), slow, 1.0, batch, seen, alive, noise, 0.2, 0.5)  # type: ignore[arg-type]
    assert y.tolist() == pytest.approx([1.0 + 0.9 * 4.0, 2.0])


def test_an_actor_climbs_the_first_critic_where_it_lives() -> None:
    s, seen = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    actions, params = torch.tensor([[9.0, 4.0], [9.0, 5.0]]), torch.tensor([0.5])
    loss, _ = actor_loss(stub(), 0, params, 1.0, s, seen, actions, None)  # type: ignore[arg-type]
    assert float(loss) == pytest.approx(-((1.0 + 1.0 + 12.0) + (2.0 + 1.0 + 15.0)) / 2)
    loss, _ = actor_loss(stub(), 0, params, 1.0, s, seen, actions, torch.tensor([[0.0, 1.0], [1.0, 1.0]]))  # type: ignore[arg-type]
    assert float(loss) == pytest.approx(-18.0)
    nets = replace(stub(), rows=2)
    states, alive = torch.tensor([[1.0], [7.0], [2.0], [4.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    loss, _ = actor_loss(nets, 0, params, 1.0, states, seen, actions, alive)  # type: ignore[arg-type]
    assert float(loss) == pytest.approx(-(14.0 + (18.0 + 20.0) / 2) / 2), "the value of the living's states"


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("cls", [HATD3, MATD3])
def test_with_one_agent_it_is_td3_bit_for_bit(cls: type[HATD3], runs: int) -> None:
    spec, options = EnvSpec("t", OBSERVATION, TORQUE), {**SMALL, "warmup_steps": 2}
    one, other = TD3(spec, TD3Config(**options), runs=runs), cls(spec, cls.config_class(**options), runs=runs)
    for i in range(6):
        batch = make_batch(one, i, size=8 * runs)
        one.clock.env_steps = other.clock.env_steps = i
        if runs == 1:
            assert torch.equal(one.act(batch.obs).action, other.act(batch.obs).action)
        mine, its = one.update(batch), other.update(batch)
        assert all(torch.equal(value, its.metrics[name]) for name, value in mine.metrics.items())
        assert torch.equal(mine.priority, its.priority)  # type: ignore[arg-type]
    for name in ("actor", "critic", "target"):
        assert torch.equal(getattr(one, name).flat, getattr(other, name).flat)
    assert torch.equal(one.target_actor.flat, other.target_actors[0].flat)


def test_discrete_actions_are_anothers() -> None:
    with pytest.raises(RloptError, match=r"agent=matd3 acts in Box .* not in Discrete\(2\); use agent=hasac"):
        team(team_spec("discrete"), MATD3)  # type: ignore[arg-type]


def test_hatd3s_agents_see_the_new_policies_and_matd3s_the_stored_actions() -> None:
    spec = team_spec()
    for cls in (HATD3, MATD3):
        agent, batch = team(spec, cls, learning_rate=0.1), team_batch(spec)  # type: ignore[arg-type]
        agent.clock.updates = 1
        assert agent.stages()[0] == "critic" and len(agent.stages()) == (9 if cls is HATD3 else 5)
        work = agent.prepare(batch)
        agent.watch(work)
        agent.stage("critic", work)
        for i in range(3) if cls is HATD3 else ():
            agent.stage(f"show/{i}", work)
        before = work.actions.clone()
        agent.stage("actor/1", work)
        if cls is HATD3:
            agent.stage("show/1", work)
        with torch.no_grad():
            new = agent.actors[1].module(work.seen[1])
        mine = agent.nets.cut(work.actions, 1)[1]
        assert torch.equal(mine, new) == (cls is HATD3)
        assert torch.equal(work.actions, before) == (cls is MATD3)
        stored = torch.cat([own_action(spec, batch.action, i) for i in range(3)], -1)
        assert torch.equal(before, stored) == (cls is MATD3)


# --- independent learners


def test_every_agent_of_isac_is_the_sac_of_what_it_saw_did_and_was_paid() -> None:
    spec = team_spec(reward_shape=(3,))
    for together in (True, False):
        isac = ISAC(spec, ISACConfig(**SMALL, team_reward=together))
        alone = []
        for i, child in enumerate(isac.learners):
            one = SAC(spec.of_agent(i), SACConfig(fused=False, **SMALL), seed=child.seed)
            for name in ("actor", "critic", "target"):
                assert torch.equal(getattr(one, name).flat, getattr(child, name).flat)
            alone.append(one)
        for k in range(3):
            batch = team_batch(spec, k)
            isac.update(batch)
            for i, one in enumerate(alone):
                obs, next_obs = own_obs(spec, batch.obs, i), own_obs(spec, batch.next_obs, i)
                reward = batch.reward.sum(-1) if together else batch.reward[:, i]
                action = own_action(spec, batch.action, i)
                one.update(batch._replace(obs=obs, next_obs=next_obs, reward=reward, action=action))
        for one, child in zip(alone, isac.learners, strict=True):
            for name in ("actor", "critic", "target"):
                assert torch.equal(getattr(one, name).flat, getattr(child, name).flat)


def test_an_independent_learner_that_is_dead_learns_nothing() -> None:
    spec = team_spec(alive=True)
    agent = ISAC(spec, ISACConfig(**SMALL))
    batch, before = team_batch(spec), agent.learners[1].state_dict()
    obs = {**batch.obs, "alive": torch.tensor([True, False, True]).expand(8, 3)}  # type: ignore[dict-item]
    agent.update(batch._replace(obs=obs))
    after = agent.learners[1].state_dict()
    for name in ("actor", "critic"):
        assert all(torch.equal(x, after[name][key]) for key, x in before[name].items())
    one = solo(spec, 2)
    assert one.agents == ("c",)
    assert one.of_agent(0).action_space == spec.of_agent(2).action_space
    with pytest.raises(RloptError, match="trains several: use agent=sac"):
        ISAC(EnvSpec("t", OBSERVATION, TORQUE), ISACConfig(**SMALL))
