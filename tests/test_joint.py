"""The agent axis: specifications of several agents, and joint tensors put together and taken apart."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt import joint
from rlopt.policy.specification import MAX_AGENTS, spec_from_json, spec_to_json
from rlopt.types import AgentSpaces, EnvSpec, RloptError

Space = spaces.Space[Any]


def box(*shape: int, high: float = 1.0) -> spaces.Box:
    return spaces.Box(-high, high, shape, np.float32)


OWN: list[tuple[Space, Space]] = [
    (spaces.Dict(obs=box(2), action_mask=spaces.MultiBinary(3)), spaces.Discrete(3)),
    (spaces.Dict(obs=box(4), action_mask=spaces.MultiBinary(2)), spaces.Discrete(2)),
    (spaces.Dict(obs=box(1), action_mask=spaces.MultiBinary(5)), spaces.Discrete(5)),
]
ARMS: list[tuple[Space, Space]] = [(box(2), box(1)), (box(4), box(3, high=2.0)), (box(3), box(2))]
HEADS: list[tuple[Space, Space]] = [(box(2), spaces.MultiDiscrete([3, 2])), (box(2), spaces.MultiDiscrete([4]))]


def team(own: list[tuple[Space, Space]], state: Space | None = None, alive: bool = False, **more: Any) -> EnvSpec:
    observation, action = joint.join_spaces(own, state, alive)
    names = tuple("abc"[: len(own)])
    return EnvSpec(
        "Team-v0", observation, action, agents=names, agent_spaces=tuple(AgentSpaces(*o) for o in own), **more
    )


def test_joint_spaces_are_padded_to_the_largest_agent() -> None:
    spec = team(OWN, box(7), alive=True, reward_shape=(3,))
    assert spec.observation_space["obs"].shape == (3, 4)
    assert spec.observation_space["obs"].high.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert spec.observation_space["action_mask"] == spaces.MultiBinary((3, 5))
    assert spec.observation_space["alive"] == spaces.MultiBinary(3)
    assert spec.action_space == spaces.MultiDiscrete([3, 2, 5])
    assert team(ARMS).action_space.high.tolist() == [[1, 0, 0], [2, 2, 2], [1, 1, 0]]
    assert team(HEADS).action_space == spaces.MultiDiscrete([[3, 2], [4, 1]]), "a padded head has one action"


def test_of_agent_is_what_one_agent_may_see_and_do() -> None:
    spec = team(OWN, box(7), alive=True, reward_shape=(3,), episode_limit=9)
    one = spec.of_agent("b")
    assert one == spec.of_agent(1)
    assert (one.id, one.episode_limit, one.agents, one.reward_shape) == ("Team-v0/b", 9, (), ())
    assert one.observation_space == OWN[1][0]
    assert one.action_space == spaces.Discrete(2)
    for nobody in ("d", 3, -1):
        with pytest.raises(RloptError, match=r"no agent .*; its agents are a, b, c"):
            spec.of_agent(nobody)


def test_agents_that_declare_nothing_have_their_rows() -> None:
    space = spaces.Dict(obs=box(2, 3), action_mask=spaces.MultiBinary((2, 4)), alive=spaces.MultiBinary(2))
    spec = EnvSpec("Alike-v0", space, spaces.MultiDiscrete([4, 4], start=[0, 5]), agents=("a", "b"))
    own = spaces.Dict(obs=box(3), action_mask=spaces.MultiBinary(4))
    assert spec.agent_spaces == (AgentSpaces(own, spaces.Discrete(4)), AgentSpaces(own, spaces.Discrete(4, start=5)))
    bare = EnvSpec("Alike-v0", spaces.Dict(obs=box(2, 3)), box(2, 2), agents=("a", "b"))
    assert bare.agent_spaces[0] == AgentSpaces(box(3), box(2)), "a single leaf obs is the observation itself"
    heads = EnvSpec("Heads-v0", spaces.Dict(obs=box(2, 3)), spaces.MultiDiscrete([[2, 3], [2, 3]]), agents=("a", "b"))
    assert heads.of_agent(0).action_space == spaces.MultiDiscrete([2, 3])


def test_joint_tensors_come_apart_and_together_again() -> None:
    spec = team(OWN, box(7), alive=True)
    obs = {
        "obs": torch.arange(24.0).view(2, 3, 4),
        "action_mask": torch.ones(2, 3, 5, dtype=torch.bool),
        "state": torch.zeros(2, 7),
        "alive": torch.tensor([[True, False, True], [True, True, True]]),
    }
    for leading in ((2,), (1, 2), ()):  # rows, rows of several runs, one row
        tree = {k: (v[1] if not leading else v.view(*leading, *v.shape[1:])) for k, v in obs.items()}
        own = joint.own_obs(spec, tree, 0)
        assert isinstance(own, dict)
        assert own.keys() == {"obs", "action_mask"}
        assert own["obs"].shape == (*leading, 2)
        assert own["obs"].flatten()[-2:].tolist() == [12.0, 13.0]
        assert own["action_mask"].shape == (*leading, 3)
        actions = [torch.full(leading, i) for i in range(3)]
        together = joint.join_actions(spec, actions)
        assert together.shape == (*leading, 3)
        assert all(torch.equal(joint.own_action(spec, together, i), actions[i]) for i in range(3))
        who = joint.alive(spec, tree)
        assert who is not None
        assert who.shape == (*leading, 3)

    arms = team(ARMS)
    parts = [torch.full((2, size), 1.0 + size) for size in (1, 3, 2)]
    together = joint.join_actions(arms, parts)
    assert together[0].tolist() == [[2, 0, 0], [4, 4, 4], [3, 3, 0]]
    assert all(torch.equal(joint.own_action(arms, together, i), parts[i]) for i in range(3))
    assert isinstance(joint.own_obs(arms, {"obs": obs["obs"]}, 2), torch.Tensor)
    assert joint.own_entries(arms).tolist() == [[True, False, False], [True] * 3, [True, True, False]]
    assert joint.own_entries(arms, "obs").sum(1).tolist() == [2, 4, 3]
    heads = team(HEADS)
    assert joint.join_actions(heads, [torch.tensor([[2, 1]]), torch.tensor([[3]])]).tolist() == [[[2, 1], [3, 0]]]


def test_rows_of_an_environment_are_padded_with_zeros() -> None:
    spec = team(OWN)
    assert isinstance(spec.observation_space, spaces.Dict)
    rows = joint.join_rows(spec.observation_space["obs"], {0: [1.0, 2.0], 2: np.array([3.0])})
    assert rows.tolist() == [[1, 2, 0, 0], [0, 0, 0, 0], [3, 0, 0, 0]]
    assert joint.join_rows(spec.observation_space["action_mask"], {1: [1, 1]}).dtype == np.int8
    assert joint.join_rows(spec.action_space, {1: 1}).tolist() == [0, 1, 0]


def test_a_critic_sees_the_state_where_there_is_one() -> None:
    obs = {"obs": torch.ones(2, 3, 4), "state": torch.zeros(2, 7), "action_mask": torch.ones(2, 3, 5)}
    blind, shared = team(OWN), team(OWN, box(7))
    assert joint.critic_space(shared) == joint.critic_space(shared, 1) == box(7)
    assert joint.critic_obs(shared, obs) is obs["state"]
    assert joint.critic_space(blind).shape == (3, 4)
    assert joint.critic_obs(blind, obs) is obs["obs"], "else what the agents see, without masks"
    each = team(OWN, box(3, 7))
    obs["state"] = torch.arange(42.0).view(2, 3, 7)
    assert joint.critic_space(each).shape == (3, 7)
    assert joint.critic_space(each, 1) == box(7)
    seen = joint.critic_obs(each, obs, 1)
    assert isinstance(seen, torch.Tensor)
    assert torch.equal(seen, obs["state"][:, 1])
    alone = each.of_agent(0)
    assert joint.critic_space(alone) == alone.observation_space


def test_the_team_is_paid_the_sum() -> None:
    apart, shared = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([4.0])
    assert joint.team_reward(team(OWN, reward_shape=(3,)), apart).tolist() == [6.0]
    assert joint.team_reward(team(OWN), shared) is shared


def test_a_shared_network_sees_padded_rows_and_who_it_is() -> None:
    spec = team(OWN, box(7), alive=True)
    shared = joint.shared_agent(spec)
    assert shared.observation_space == spaces.Dict(
        {"obs": box(4), "action_mask": spaces.MultiBinary(5), "agent": spaces.Discrete(3)}
    )
    assert shared.action_space == spaces.Discrete(5)
    obs = {"obs": torch.ones(2, 3, 4), "state": torch.zeros(2, 7), "action_mask": torch.ones(2, 3, 5)}
    seen = joint.shared_obs(spec, obs)
    assert seen.keys() == {"obs", "action_mask", "agent"}
    assert seen["agent"].tolist() == [[0, 1, 2], [0, 1, 2]]
    with pytest.raises(RloptError, match="act in different spaces"):
        joint.shared_agent(team(ARMS))
    unmasked = [(box(2), spaces.Discrete(2)), (box(2), spaces.Discrete(3))]
    with pytest.raises(RloptError, match="act in different spaces"):
        joint.shared_agent(team(unmasked))


GOOD: dict[str, Any] = {
    "id": "T",
    "observation_space": spaces.Dict(obs=box(2, 3)),
    "action_space": box(2, 1),
    "agents": ("a", "b"),
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"agents": ("a", "a")}, "agents must have names of their own, not 'a', 'a'"),
        ({"agents": ()}, None),
        ({"agents": (), "reward_shape": (2,)}, "are for several agents; name those in agents"),
        ({"reward_shape": (3,)}, r"reward_shape=\(3,\) must be \(\) or \(2,\) with 2 agents"),
        ({"observation_space": box(2, 3)}, r"2 agents see a Dict of leaves \(2, …\), not Box"),
        ({"observation_space": spaces.Dict(obs=box(3, 2))}, r"leaf obs must be of shape \(2, …\), as there are 2"),
        ({"observation_space": spaces.Dict(obs=spaces.Discrete(2))}, r"leaf obs must be of shape \(2, …\)"),
        ({"observation_space": spaces.Dict(state=box(3))}, "see nothing but masks"),
        ({"observation_space": spaces.Dict(obs=box(2, 3), state=box(3, 3))}, r"state must be Box \(S,\) or \(2, S\)"),
        ({"observation_space": spaces.Dict(obs=box(2, 3), alive=box(2))}, r"alive must be MultiBinary \(2,\)"),
        (
            {"observation_space": spaces.Dict(obs=box(2, 3), action_mask=spaces.MultiBinary(2))},
            r"action_mask must be MultiBinary \(2, K\)",
        ),
        (
            {"observation_space": spaces.Dict(obs=box(2, 3), action_mask=spaces.MultiBinary((2, 3)))},
            "a has 0 discrete actions; its own action_mask must be as long",
        ),
        ({"action_space": box(3, 1)}, r"2 agents act in Box \(2, A\), MultiDiscrete \(2,\)"),
        ({"action_space": spaces.Discrete(2)}, "2 agents act in Box"),
        ({"agent_spaces": [(box(3), box(1))]}, "agent_spaces are of 1 agents, not of 2"),
        ({"agent_spaces": [(box(3), box(1)), (box(4), box(1))]}, "b's obs, Box.*does not fit the joint Box"),
        ({"agent_spaces": [(box(3), box(1)), (box(3), box(1, high=2.0))]}, "b's actions, Box.*fit the joint Box"),
        ({"agent_spaces": [(box(3), box(1)), (spaces.Dict(see=box(3)), box(1))]}, "b's see, Box.*fit the joint None"),
        ({"agent_spaces": [(box(3), box(1)), (spaces.Dict(), box(1))]}, "b sees nothing"),
        ({"derived": {"obs": np.zeros((2, 3), int)}}, "'obs' is a gather of the leaf 'state'; both must be Boxes"),
    ],
)  # fmt: skip
def test_agents_and_spaces_that_do_not_fit_are_one_clear_line(change: dict[str, Any], words: str | None) -> None:
    if words is None:
        EnvSpec(**{**GOOD, **change})
        return
    with pytest.raises(RloptError, match="^T: .*" + words) as caught:
        EnvSpec(**{**GOOD, **change})
    assert "\n" not in str(caught.value)


def test_derived_leaves_point_into_the_state() -> None:
    space = spaces.Dict(obs=box(2, 3), state=box(4))
    index = np.array([[0, 1, -1], [2, 3, 0]])
    spec = EnvSpec("T", space, box(2, 1), agents=("a", "b"), derived={"obs": index})
    assert spec.derived == {"obs": ((0, 1, -1), (2, 3, 0))}
    assert replace(spec, derived={"obs": torch.as_tensor(index)}) == spec
    with pytest.raises(RloptError, match="points outside the state, which has 4 entries"):
        replace(spec, derived={"obs": index + 1})
    with pytest.raises(RloptError, match=r"must hold whole numbers of shape \(2, 3\), not \(2, 2\)"):
        replace(spec, derived={"obs": index[:, :2]})


def test_specifications_of_teams_survive_json() -> None:
    facts: dict[str, Any] = {"reward_shape": (3,), "facts": ("success",), "frame_stack": 4, "episode_limit": 5}
    spec = team(OWN, box(3, 7), alive=True, **facts)
    alike = EnvSpec(
        "T", spaces.Dict(obs=box(2, 3), state=box(4)), box(2, 1), agents=("a", "b"),
        derived={"obs": [[0, 1, -1], [2, 3, 0]]},
    )  # fmt: skip
    for one in (spec, alike, spec.of_agent(0), joint.shared_agent(spec)):
        assert spec_from_json(json.loads(json.dumps(spec_to_json(one), allow_nan=False))) == one


@pytest.mark.parametrize(
    "change",
    [
        {"agents": [str(i) for i in range(MAX_AGENTS + 1)], "agent_spaces": []},
        {"agents": "abc"},
        {"agent_spaces": [[{"type": "Box", "dtype": "float32", "shape": [1 << 25], "low": 0, "high": 1}] * 2] * 3},
        {"agent_spaces": [[], [], []]},
        {"agent_spaces": 3},
        {"reward_shape": [1 << 40]},
        {"derived": {"obs": [[1 << 70]]}},
        {"derived": {"obs": "__import__"}},
        {"frame_stack": "four"},
    ],
)
def test_hostile_teams_are_refused_before_anything_is_allocated(change: dict[str, Any]) -> None:
    data = {**spec_to_json(team(OWN, box(7))), **change}
    with pytest.raises((RloptError, ValueError, TypeError, KeyError, OverflowError)):
        spec_from_json(json.loads(json.dumps(data)))


def test_agents_of_different_kinds_have_no_joint_space() -> None:
    with pytest.raises(RloptError, match="actions of the agents are of different kinds"):
        joint.join_spaces([(box(1), box(1)), (box(1), spaces.Discrete(2))])
    with pytest.raises(RloptError, match="leaves obs of the agents are of different kinds"):
        joint.join_spaces([(box(1), box(1)), (box(1, 1), box(1))])


class Batch(NamedTuple):
    obs: Any
    action: torch.Tensor
    reward: torch.Tensor
    next_obs: Any
    terminated: torch.Tensor
    weight: torch.Tensor | None
    other: str = "stays"


def test_an_independent_learner_sees_its_own_part_of_a_minibatch() -> None:
    spec = team(OWN, box(7), alive=True, reward_shape=(3,))
    seen = {"obs": torch.arange(24.0).view(2, 3, 4), "action_mask": torch.ones(2, 3, 5), "state": torch.zeros(2, 7)}
    before = {**seen, "alive": torch.tensor([[True, True, True], [True, False, True]])}
    after = {**seen, "alive": torch.tensor([[True, False, True], [True, False, True]])}
    action, reward = torch.tensor([[2, 1, 4], [0, 0, 3]]), torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 6.0]])
    batch = Batch(before, action, reward, after, torch.tensor([0.0, 1.0]), None)
    own = joint.own_batch(spec, batch, 1)
    assert own.obs.keys() == {"obs", "action_mask"}
    assert own.action.tolist() == [1, 0]
    assert own.reward.tolist() == [6.0, 10.0], "the team's, by default"
    assert own.terminated.tolist() == [1.0, 1.0], "its own death cuts its bootstrap"
    assert own.weight.tolist() == [1.0, 0.0], "what happened after its death teaches it nothing"
    assert own.other == "stays"
    alone = joint.own_batch(spec, batch._replace(weight=torch.tensor([0.5, 0.5])), 2, team=False)
    assert alone.reward.tolist() == [3.0, 6.0]
    assert alone.terminated.tolist() == [0.0, 1.0]
    assert alone.weight.tolist() == [0.5, 0.5]
    immortal = team(OWN)
    plain = joint.own_batch(immortal, Batch(seen, action, reward[:, 0], seen, torch.zeros(2), None), 0, team=False)
    assert plain.weight is None
    assert plain.reward.tolist() == [1.0, 4.0], "one reward is everyone's"
