"""Names of teams: what is listed can be found, and what can be found is listed."""

from __future__ import annotations

import gymnasium
import pytest

from rlopt.envs import make_env
from rlopt.envs.factory import find_spec
from rlopt.envs.teams.names import team_spec
from rlopt.envs.teams.partitions import SCENARIOS, SEGMENTED, partitions
from rlopt.loops.configuration import EnvConfig
from rlopt.registry import TEAMS
from rlopt.training import train_config
from rlopt.types import RloptError


def test_every_listed_name_is_found_and_registered() -> None:
    for name in TEAMS:
        assert find_spec(name).entry_point
        assert name in gymnasium.registry or name.startswith("pettingzoo:")


def test_every_partition_of_mamujoco_is_listed() -> None:
    for scenario in set(SCENARIOS) - set(SEGMENTED):
        assert {f"mamujoco/{scenario}-{part}" for part in partitions(scenario)} <= TEAMS.keys()
        assert team_spec(f"mamujoco/{scenario}-{partitions(scenario)[0]}-full").kwargs["view"] == "full"  # type: ignore[union-attr]


def test_the_two_views_of_mamujoco_are_two_ids_however_they_are_asked_for() -> None:
    """Tables are by id, and never hold both."""
    name = "mamujoco/HalfCheetah-2x3"
    for given in ({"id": name, "view": "full"}, {"id": f"{name}-full", "kwargs": {"view": "full"}}):
        env = train_config({"agent": {"name": "hasac"}, "env": {**given, "agent_obsk": 0}}).env
        assert (env.id, env.kwargs) == (f"{name}-full", {"agent_obsk": 0})
    assert EnvConfig(id=name, kwargs={"view": "obsk"}) == EnvConfig(id=name)
    with pytest.raises(RloptError, match=f"env.view=obsk: {name}-full is the view of HARL; write env={name}$"):
        EnvConfig(id=f"{name}-full", kwargs={"view": "obsk"})


def test_make_env_gives_the_two_views_two_ids_too() -> None:
    name = "mamujoco/HalfCheetah-2x3"
    for backend in ("auto", "sync"):
        env = make_env(name, backend=backend, kwargs={"view": "full", "agent_obsk": 0})
        assert env.spec.id == f"{name}-full"
        assert env.spec.of_agent(0).observation_space.shape == (17 + 2,)
        env.close()
    with pytest.raises(RloptError, match=r"env\.view=obsk: .* is the view of HARL"):
        make_env(f"{name}-full", kwargs={"view": "obsk"})


def test_names_that_are_not_listed_are_found_by_their_pattern() -> None:
    assert find_spec("lbf/3s-9x9-4p-2f-coop").kwargs == {
        "size": 9, "players": 4, "foods": 2, "sight": 3, "coop": True,
    }  # fmt: skip
    assert find_spec("mamujoco/ManySegmentSwimmer-4x2").max_episode_steps == 1000
    with pytest.raises(RloptError, match="did you mean speaker_listener"):
        find_spec("mpe/speaker_listner")
    with pytest.raises(RloptError, match="env=pettingzoo:: name the module, as pettingzoo:mpe2"):
        find_spec("pettingzoo:")
