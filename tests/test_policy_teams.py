"""Exported policies of teams: one network each or one for all, and what a single agent does with its part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.envs import Normalizer, VectorEnv, make_env
from rlopt.joint import own_action, own_entries, own_obs, shared_agent
from rlopt.nn import NetworkConfig, build_seeded, make_actor, network_options
from rlopt.policy import Policy, load_policy, save_policy
from rlopt.policy.team import TeamActor
from rlopt.state import checksum
from rlopt.types import EnvSpec, RloptError, map_obs

KINDS = {"discrete": "categorical", "heads": "multi_categorical", "box": "squashed_gaussian"}
CASES = [("discrete", False), ("heads", False), ("box", False), ("discrete", True)]
every_case = pytest.mark.parametrize(("actions", "shared"), CASES)
every_memory = pytest.mark.parametrize("memory", ["none", "gru"])


def team_env(actions: str) -> VectorEnv:
    return make_env("rlopt.envs.counting:rlopt/CountTeam-v0", 4, backend="sync", kwargs={"actions": actions})


def team_actor(spec: EnvSpec, kind: str, shared: bool, memory: str = "none", hidden: int = 8) -> TeamActor:
    size = {} if memory == "none" else {"memory_size": 4}
    options = network_options(NetworkConfig(hidden=(hidden,), memory=memory, **size))
    own = [shared_agent(spec)] if shared else [spec.of_agent(i) for i in range(3)]
    actors = [make_actor(kind, one.observation_space, one.action_space, options) for one in own]
    return TeamActor(spec, actors, shared)


def make(actions: str, shared: bool, memory: str = "none") -> tuple[Policy, dict[str, torch.Tensor]]:
    """A policy with statistics of what it saw, and observations."""
    env = team_env(actions)
    actor = build_seeded(lambda: team_actor(env.spec, KINDS[actions], shared, memory), 3)
    assert isinstance(actor, TeamActor)
    policy, obs = Policy(env.spec, actor, Normalizer(env.spec)), env.reset()
    assert policy.normalizer is not None
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        step = env.step(actor.uniform(4, generator, obs))
        policy.normalizer.observe(obs, step)
        obs = step.obs
    assert isinstance(obs, dict)
    env.close()
    return policy, obs


@every_memory
@every_case
def test_a_saved_team_comes_back_bit_for_bit(tmp_path: Path, actions: str, shared: bool, memory: str) -> None:
    policy, obs = make(actions, shared, memory)
    save_policy(policy, tmp_path, {"step": 3})
    loaded = load_policy(tmp_path)
    assert loaded.spec == policy.spec
    assert loaded.meta == {"step": 3}
    for deterministic in (True, False):
        carry = policy.initial_carry(4)
        for _ in range(2):
            acts = [p.act(obs, carry, deterministic, torch.Generator().manual_seed(4)) for p in (policy, loaded)]
            assert torch.equal(acts[0].action, acts[1].action)
            carry = acts[0].carry
            assert (carry is None) == (memory == "none")
    assert acts[0].action.shape == (4, *(policy.spec.action_space.shape or ()))
    assert not acts[0].action[:, ~own_entries(policy.spec)].any(), "padding stays 0"


@every_memory
@every_case
def test_one_agent_acts_on_its_own_observation_as_it_does_in_the_team(actions: str, shared: bool, memory: str) -> None:
    policy, obs = make(actions, shared, memory)
    together = policy.act(obs, policy.initial_carry(4))
    again = policy.act(obs, together.carry)
    for i, name in enumerate(policy.spec.agents):
        one = policy.of_agent(name)
        assert one.spec == policy.spec.of_agent(i)
        seen = own_obs(policy.spec, obs, i)
        first = one.act(seen, one.initial_carry(4))
        torch.testing.assert_close(first.action, own_action(policy.spec, together.action, i))
        torch.testing.assert_close(one.act(seen, first.carry).action, own_action(policy.spec, again.action, i))


@every_case
def test_a_team_needs_no_state_and_takes_it_when_given(actions: str, shared: bool) -> None:
    policy, obs = make(actions, shared)
    bare = {key: leaf for key, leaf in obs.items() if key not in ("state", "alive")}
    assert torch.equal(policy.act(bare).action, policy.act(obs).action)
    rows = {key: leaf.numpy() for key, leaf in obs.items()}
    many = policy(rows)
    assert isinstance(many, np.ndarray)
    assert np.array_equal(many, policy({key: rows[key] for key in bare}))
    one = policy({key: leaf[0] for key, leaf in rows.items()})
    np.testing.assert_allclose(one, many[0], rtol=1e-5)
    alone = policy.of_agent("agent_2")
    seen = map_obs(lambda x: x[0], own_obs(policy.spec, obs, 2))
    answer = alone(seen if isinstance(seen, torch.Tensor) else {k: v.numpy() for k, v in seen.items()})
    np.testing.assert_allclose(
        np.ravel(answer), own_action(policy.spec, torch.as_tensor(many[:1]), 2).ravel(), rtol=1e-5
    )
    with pytest.raises(RloptError, match="'other' too many"):
        policy({**rows, "other": np.zeros(4)})
    with pytest.raises(RloptError, match="the observation lacks 'obs'"):
        policy({"state": rows["state"], **{key: rows[key] for key in bare if key != "obs"}})


def test_masks_may_be_flags_or_numbers() -> None:
    one = make("discrete", False)[0].of_agent(0)
    seen = np.zeros(2, np.float32)
    for mask in ([True, False], [1, 0], np.array([1, 0], np.int8)):
        assert one({"obs": seen, "action_mask": mask}) == 0
    with pytest.raises(RloptError, match="an index lies outside"):
        one({"obs": seen, "action_mask": [2, 0]})
    with pytest.raises(RloptError, match="whole numbers"):
        one({"obs": seen, "action_mask": [1.0, 0.0]})


def test_a_policy_of_one_agent_is_a_policy_of_its_own(tmp_path: Path) -> None:
    policy, obs = make("box", False)
    one = policy.of_agent("agent_1")
    save_policy(one, tmp_path / "one")
    seen = own_obs(policy.spec, obs, 1)
    assert torch.equal(load_policy(tmp_path / "one").act(seen).action, one.act(seen).action)
    with torch.no_grad():
        for p in policy.actor.parameters():
            p.zero_()
    assert not one.act(seen).action.any(), "it shares its network with the team"
    shared, _ = make("discrete", True)
    with pytest.raises(RloptError, match="acts with a network that its team shares; save the policy of the team"):
        save_policy(shared.of_agent(0), tmp_path / "other")


def test_who_there_is_not_is_told() -> None:
    policy, _ = make("box", False)
    with pytest.raises(RloptError, match="has no agent 'nobody'; its agents are agent_0, agent_1, agent_2"):
        policy.of_agent("nobody")
    box = spaces.Box(-1.0, 1.0, (2,), np.float32)
    alone = Policy(EnvSpec("T", box, box), make_actor("squashed_gaussian", box, box, network_options(NetworkConfig())))
    with pytest.raises(RloptError, match="none: this is a single-agent environment"):
        alone.of_agent(0)
    with pytest.raises(RloptError, match="with 3 agents got 1 actors; give 3"):
        TeamActor(policy.spec, [alone.actor])


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["options"]["actors"].pop(),
        lambda d: d["options"].update(shared=True),
        lambda d: d["options"].update(actors={}),
        lambda d: d["options"]["actors"][0].update(kind="os.system"),
        lambda d: d["options"]["actors"][0].update(kind="team"),
        lambda d: d["options"]["actors"][0]["options"].update(hidden=[1 << 20] * 256),
        lambda d: d["options"].update(actors=d["options"]["actors"] * 100),
        lambda d: d["spec"].update(agents=[f"a{i}" for i in range(5000)]),
        lambda d: d["spec"].update(agents=["a", "b"], agent_spaces=[], reward_shape=[]),
        lambda d: d.update(kind="categorical"),
        lambda d: d["spec"].update(agents=[], agent_spaces=[], reward_shape=[]),
    ],
)
def test_a_hostile_team_is_refused_before_anything_is_allocated(tmp_path: Path, change: Any) -> None:
    policy, _ = make("discrete", False)
    save_policy(policy, tmp_path)
    data = json.loads((tmp_path / "policy.json").read_text())
    change(data)
    data["checksum"] = checksum(data)
    (tmp_path / "policy.json").write_text(json.dumps(data))
    with pytest.raises(RloptError) as caught:
        load_policy(tmp_path)
    assert "\n" not in str(caught.value)
