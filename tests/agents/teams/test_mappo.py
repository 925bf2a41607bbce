"""PPO for teams: with one agent PPO itself, HAPPO's factors by hand, and who moves what."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.agents.ppo import PPO, PPOConfig
from rlopt.agents.teams.mappo import HAPPO, IPPO, MAPPO
from rlopt.buffers import Rollout
from rlopt.nn import NetworkConfig
from rlopt.types import EnvSpec, RloptError
from tests.agents.cases import OBSERVATION, TORQUE
from tests.agents.teams.games import matrix_spec, team_batch, team_spec

SMALL: dict[str, Any] = {"network": NetworkConfig(hidden=(8,)), "rollout_steps": 4, "batch_size": 4, "epochs": 2}


def make(cls: type[IPPO], spec: EnvSpec, seed: int = 0, **options: Any) -> Any:
    return cls(spec, cls.config_class(**{**SMALL, **options}), seed=seed)


def rollout(agent: Any, seed: int = 0, steps: int = 4, rows: int = 2) -> Rollout:
    """Four steps of two environments, acted by the agent."""
    parts = [team_batch(agent.spec, 10 * seed + t, rows) for t in range(steps)]
    acts = [agent.act(part.obs) for part in parts]
    shape = (steps, rows)
    g = torch.Generator().manual_seed(seed)
    ends, yes = torch.rand(shape, generator=g) < 0.2, torch.ones(shape, dtype=torch.bool)
    stack = lambda trees: {key: torch.stack([tree[key] for tree in trees]) for key in trees[0]}  # noqa: E731
    extras = stack([act.extras for act in acts]) if acts[0].extras else {}
    return Rollout(
        stack([p.obs for p in parts]), torch.stack([a.action for a in acts]), torch.stack([p.reward for p in parts]),
        stack([p.next_obs for p in parts]), ends, ~yes, ends, yes, extras,
    )  # fmt: skip


def one_spec() -> EnvSpec:
    space = spaces.Dict(obs=spaces.Box(-9, 9, (1, 4)), state=spaces.Box(-9, 9, (4,)))
    return EnvSpec("t", space, spaces.Box(-0.4, 0.4, (1, 2), np.float32), agents=("alone",))


@pytest.mark.parametrize("cls", [IPPO, MAPPO, HAPPO])
def test_with_one_agent_it_is_ppo_bit_for_bit(cls: type[IPPO]) -> None:
    """That sees the state: acting, advantages, epochs, schedules."""
    options = {"lr_schedule": "linear", "schedule_steps": 100}
    agent = make(cls, one_spec(), **options)
    alone = PPO(
        EnvSpec("t", OBSERVATION, TORQUE), PPOConfig(**SMALL, **options, fused=False), seed=agent.learners[0].seed
    )
    assert torch.equal(alone.networks.flat, agent.learners[0].networks.flat)
    for k in range(3):
        data = rollout(agent, k)
        data.obs["state"].copy_(data.obs["obs"][:, :, 0])  # type: ignore[call-overload]
        data.next_obs["state"].copy_(data.next_obs["obs"][:, :, 0])  # type: ignore[call-overload,index]
        for t in range(4):
            assert torch.equal(alone.act(data.obs["state"][t]).action, data.action[t, :, 0])  # type: ignore[call-overload]
        agent.clock.env_steps = alone.clock.env_steps = 8 * k + 8
        mine = agent.update(data)
        its = alone.update(
            data._replace(
                obs=data.obs["state"], next_obs=data.next_obs["state"], action=data.action[:, :, 0],  # type: ignore[call-overload,index]
                extras={"sample": data.extras["sample"][:, :, 0]},
            )
        )  # fmt: skip
        assert mine.metrics.keys() == its.metrics.keys()
        assert all(torch.equal(value, its.metrics[name]) for name, value in mine.metrics.items())
        assert torch.equal(alone.networks.flat, agent.learners[0].networks.flat)
    assert agent.clock.updates == alone.clock.updates == 3 * 2 * 2


def test_happos_factor_is_how_much_likelier_those_before_have_made_what_happened() -> None:
    spec = team_spec("discrete", alive=True)
    agent, seen = make(HAPPO, spec, order="fixed", learning_rate=0.05), []
    data = rollout(agent)
    data.obs["alive"][1, 0, 1] = False  # type: ignore[call-overload]
    before = [one.judge(own)[0] for one, own in zip(agent.learners, agent.rollouts(data), strict=True)]
    for one in agent.learners:
        update = one.update
        one.update = lambda own, update=update: (seen.append(own.extras["factor"]), update(own))[1]
    agent.update(data)
    after = [one.judge(own)[0] for one, own in zip(agent.learners, agent.rollouts(data), strict=True)]
    assert torch.equal(seen[0], torch.ones(4, 2))
    first = (after[0] - before[0]).exp()
    torch.testing.assert_close(seen[1], first)
    both = first * (after[1] - before[1]).exp()
    both[1, 0] = first[1, 0]
    torch.testing.assert_close(seen[2], both)
    assert not torch.equal(first, torch.ones(4, 2))


def test_an_agents_advantage_is_multiplied_by_its_factor() -> None:
    """The surrogate -mean M min(ρ Â, clip(ρ) Â); with ρ = 1 its gradient is that of -mean M Â log π."""
    agent = make(HAPPO, matrix_spec((2, 2)), epochs=1, batch_size=8, normalise_advantage=False)
    data = rollout(agent)
    own, net = agent.rollouts(data)[0], agent.learners[0]
    factor = torch.linspace(0.5, 2.0, 8).view(4, 2)
    samples = net.samples(own.with_extras(factor=factor), own.positions())
    assert torch.equal(samples.factor, factor.flatten())
    from rlopt.agents.ppo import log_prob, ppo_loss

    _, terms = ppo_loss(net.networks, net.networks.params, samples, net.config, 0.2)
    torch.testing.assert_close(terms.policy, -(factor.flatten() * samples.advantage).mean())
    outputs, _, _ = net.module(samples.obs)
    torch.testing.assert_close(log_prob(net.actor_module, outputs, samples.sample), samples.log_prob)


def test_mappos_agents_do_not_wait_for_each_other_and_happos_do() -> None:
    spec, ends = team_spec("discrete"), {}
    for cls in (MAPPO, HAPPO):
        agent = make(cls, spec, learning_rate=0.05)
        agent.update(rollout(agent))
        ends[cls] = [one.networks.flat.clone() for one in agent.learners]
    same = [torch.equal(a, b) for a, b in zip(*ends.values(), strict=True)]
    assert sum(same) == 1, "only the first of the order is as it would be without an order"


def test_values_are_of_the_state_or_of_what_an_agent_sees() -> None:
    for each_state, width in ((False, 4), (True, 4)):
        spec = team_spec("box", each_state=each_state)
        central, alone = make(MAPPO, spec), make(IPPO, spec)
        for i in range(3):
            assert central.learners[i].module.critic.body.layers[0].weight.shape[1] == width
            assert alone.learners[i].module.critic.body.layers[0].weight.shape[1] == 2 + i
    data = rollout(central)
    own = central.own_rollout(data, 1)
    assert torch.equal(own.obs["critic"], data.obs["state"][:, :, 1])  # type: ignore[call-overload]


@pytest.mark.parametrize("cls", [IPPO, MAPPO, HAPPO])
def test_a_dead_agent_moves_no_weight(cls: type[IPPO]) -> None:
    ends = []
    for junk in (0.0, 0.7):
        agent = make(cls, team_spec("box", alive=True))
        before = agent.learners[1].networks.flat.clone()
        data = rollout(agent)
        for obs in (data.obs, data.next_obs):
            obs["alive"][..., 1] = False  # type: ignore[call-overload,index]
            obs["obs"][..., 1, :] = junk  # type: ignore[call-overload,index]
        data.action[..., 1, :] = junk
        data.extras["sample"][..., 1, :] = junk
        agent.update(data)
        assert torch.equal(agent.learners[1].networks.flat, before)
        ends.append([agent.learners[i].networks.flat.clone() for i in (0, 2)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert not torch.equal(ends[0][0], make(cls, team_spec("box", alive=True)).learners[0].networks.flat)


@pytest.mark.parametrize("actions", [(3, 3), (2, 2)])
def test_one_network_for_all_learns_from_everybodys_time_lines(actions: tuple[int, int]) -> None:
    agent = make(MAPPO, matrix_spec(actions), share_parameters=True)
    assert list(agent.children) == ["shared"]
    data = rollout(agent)
    (own,) = agent.rollouts(data)
    assert own.reward.shape == (4, 4)
    assert torch.equal(own.action[:, 2:], data.action[:, :, 1])
    assert own.obs["own/agent"][0].tolist() == [0, 0, 1, 1]  # type: ignore[call-overload]
    before = agent.learners[0].networks.flat.clone()
    told = agent.update(data).metrics
    assert "policy_loss" in told and not torch.equal(before, agent.learners[0].networks.flat)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(RloptError, match="trains several: use agent=ppo"):
        make(MAPPO, EnvSpec("t", OBSERVATION, TORQUE))
    with pytest.raises(RloptError, match=r"agent\.share_parameters=true: .* give each a network of its own"):
        make(IPPO, team_spec("box"), share_parameters=True)
    with pytest.raises(RloptError, match=r"team_reward=false: .* one reward together"):
        make(IPPO, team_spec("box"), team_reward=False)
