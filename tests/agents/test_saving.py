"""Agents in one's own hands: saved and loaded alone, frozen, asked for log-probabilities and values."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlopt.agents import SAC, Agent, SACConfig
from rlopt.agents.value_iteration import ValueIteration
from rlopt.nn import NetworkConfig
from rlopt.policy import load_policy
from rlopt.robust import from_toy_text
from rlopt.state import states_equal
from rlopt.training.setup import begin
from rlopt.types import RloptError
from tests.agents.cases import (
    ACTOR_CRITICS,
    AGENTS,
    LEARNERS,
    OBSERVATION,
    TORQUE,
    every_gradient_learner,
    every_learning_net,
    known,
    short_run,
)

SMALL = NetworkConfig(hidden=(8,))


@pytest.fixture
def make(make_agent: Any) -> Callable[..., Agent]:
    """A small agent, with nothing to compile."""
    return lambda name, **more: make_agent(name, **known(name, fused=False), **more)


@every_gradient_learner
def test_a_loaded_agent_goes_on_as_the_saved_one(name: str, make: Any, make_data: Any, tmp_path: Path) -> None:
    agent = make(name)
    for seed in range(3):
        agent.update(make_data(agent, seed))
    agent.save(tmp_path / "agent")
    loaded = Agent.load(tmp_path / "agent")
    assert type(loaded) is type(agent) and loaded.config == agent.config and loaded.spec == agent.spec
    assert states_equal(loaded.state_dict(), agent.state_dict()) is None
    for one in (agent, loaded):
        one.update(make_data(one, 7))
    assert states_equal(loaded.state_dict(), agent.state_dict()) is None
    obs = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(agent.act(obs).action, loaded.act(obs).action)
    assert type(agent).load(tmp_path / "agent").config == agent.config


def test_runs_side_by_side_and_an_agent_of_ones_own_are_saved(tmp_path: Path, make_batch: Any) -> None:
    class Mine(SAC):
        """Nobody registered it."""

        name = "mine"

    agent = Mine(
        OBSERVATION, TORQUE, SACConfig(network=SMALL, batch_size=8, warmup_steps=0, fused=False), seed=3, runs=2
    )
    agent.save(tmp_path / "mine")
    assert states_equal(Mine.load(tmp_path / "mine").state_dict(), agent.state_dict()) is None
    with pytest.raises(RloptError, match="no agent is called 'mine'"):
        Agent.load(tmp_path / "mine")


def test_a_folder_that_holds_something_else_is_neither_written_nor_read(tmp_path: Path, make: Any) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(RloptError, match="is there and is no agent"):
        make("sac").save(tmp_path / "mine")
    with pytest.raises(RloptError, match="holds no agent"):
        Agent.load(tmp_path / "mine")
    make("sac").save(tmp_path / "sac")
    make("sac", seed=1).save(tmp_path / "sac")
    assert SAC.load(tmp_path / "sac").seed == 1
    with pytest.raises(RloptError, match="it is a sac, no ValueIteration"):
        ValueIteration.load(tmp_path / "sac")
    with pytest.raises(RloptError, match="solves a model, which is not saved with it"):
        ValueIteration(from_toy_text("FrozenLake-v1", {})).save(tmp_path / "solver")


def test_damage_is_one_line(tmp_path: Path, make: Any) -> None:
    folder = tmp_path / "agent"
    make("sac").save(folder)
    text = (folder / "agent.json").read_text()
    changes = {'"tau": 0.005': '"tau": 0.5', '"seed": 0': '"seed": 1', "{": "[", '"agent"': '"agnt"'}
    for before, after in changes.items():
        (folder / "agent.json").write_text(text.replace(before, after, 1))
        with pytest.raises(RloptError, match="damaged") as told:
            Agent.load(folder)
        assert "\n" not in str(told.value)
    (folder / "agent.json").write_text(text)
    tensors = bytearray((folder / "tensors.safetensors").read_bytes())
    tensors[-3] ^= 1
    (folder / "tensors.safetensors").write_bytes(bytes(tensors))
    with pytest.raises(RloptError, match=r"damaged: tensors\.safetensors is not the file that was saved"):
        Agent.load(folder)


def test_a_hostile_size_is_refused_before_it_is_allocated(tmp_path: Path, make: Any) -> None:
    from rlopt.state import checksum

    folder = tmp_path / "agent"
    make("sac").save(folder)
    data = json.loads((folder / "agent.json").read_text())
    data["config"]["network"]["hidden"] = [10**6, 10**6]
    data["checksum"] = checksum(data)
    (folder / "agent.json").write_text(json.dumps(data))
    with pytest.raises(RloptError, match="are more than the"):
        Agent.load(folder)


# ---- frozen


@every_learning_net
def test_a_frozen_network_stands_still_and_the_others_learn(
    name: str, net: str, make: Any, make_data: Any, tmp_path: Path
) -> None:
    agent = make(name)
    agent.freeze(net)
    before = {each: getattr(agent, each).flat.clone() for each in AGENTS[name].nets}
    for seed in range(3):
        agent.update(make_data(agent, seed))
    for each, old in before.items():
        assert torch.equal(old, getattr(agent, each).flat) == (each == net), each
    agent.save(tmp_path / "agent")
    assert all(not leaf.requires_grad for leaf in getattr(Agent.load(tmp_path / "agent"), net).leaves)
    with pytest.raises(RloptError, match=f"has no network '{net[:-1]}'; did you mean {net}"):
        agent.freeze(net[:-1])


# ---- log-probabilities and values


@every_gradient_learner
def test_log_probabilities_and_values_are_those_of_the_networks(name: str, make: Any) -> None:
    agent = make(name)
    obs = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    action = agent.act(obs).action
    module = agent.policy.actor
    if "td3" in name or (name in LEARNERS and name not in ACTOR_CRITICS):
        with pytest.raises(RloptError, match=r"a (deterministic|greedy) policy has no density"):
            agent.log_prob(obs, action)
    else:
        torch.testing.assert_close(agent.log_prob(obs, action), module.log_prob(module(obs), action))
    if name not in LEARNERS:
        with pytest.raises(RloptError, match=f"agent={name} has no values of actions"):
            agent.q(obs, action)
        return
    values = agent.q(obs, action)
    assert values.shape == (2 if name in ACTOR_CRITICS else 1, 6)
    if name == "sac":
        torch.testing.assert_close(values, agent.critic(agent.critic.params, obs, action / 0.4))
    if name == "sac_discrete":
        every = agent.critic(agent.critic.params, obs)
        assert torch.equal(values, torch.stack([every[:, i, a - 2] for i, a in enumerate(action)], 1))


def test_an_agent_without_values_of_actions_says_so() -> None:
    agent = ValueIteration(from_toy_text("FrozenLake-v1", {}))
    with pytest.raises(RloptError, match="agent=value_iteration has no values of actions"):
        agent.q(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert agent.log_prob(torch.tensor([3]), torch.tensor([1])).shape == (1,)
    assert set(LEARNERS) < set(AGENTS) and copy.deepcopy(agent) is not agent


@pytest.mark.parametrize("name", ["sac_discrete", "ppo", "value_iteration"])
def test_the_best_agent_of_a_run_is_loaded_like_one_of_ones_own(name: str, tmp_path: Path) -> None:
    """It is the agent whose policy the run exported as its best; a solver leaves its policy alone."""
    with begin(short_run(name, tmp_path / "run")) as trainer:
        trainer.run()
        best = tmp_path / "run" / "checkpoints" / "best"
        if name == "value_iteration":
            assert not best.exists()
            return
        agent = Agent.load(best)
        assert type(agent) is type(trainer.loop.agent) and agent.clock.updates > 0
    obs = agent.spec.observation_space.sample()[None]
    policy = load_policy(tmp_path / "run" / "policy_best")
    assert np.array_equal(agent.policy(obs), policy(obs))
    assert agent.clock.env_steps == policy.meta["step"]
