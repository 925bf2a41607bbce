"""Names of teams: what is listed can be found, and what can be found is listed."""

from __future__ import annotations

import gymnasium
import pytest

from rlopt.envs.factory import find_spec
from rlopt.envs.teams.names import team_spec
from rlopt.envs.teams.partitions import SCENARIOS, SEGMENTED, partitions
from rlopt.registry import TEAMS
from rlopt.types import RloptError


def test_every_listed_name_is_found_and_registered() -> None:
    for name in TEAMS:
        assert find_spec(name).entry_point
        assert name in gymnasium.registry or name.startswith("pettingzoo:")


def test_every_partition_of_mamujoco_is_listed() -> None:
    for scenario in set(SCENARIOS) - set(SEGMENTED):
        assert {f"mamujoco/{scenario}-{part}" for part in partitions(scenario)} <= TEAMS.keys()
        assert team_spec(f"mamujoco/{scenario}-{partitions(scenario)[0]}-full").kwargs["view"] == "full"  # type: ignore[union-attr]


def test_names_that_are_not_listed_are_found_by_their_pattern() -> None:
    assert find_spec("lbf/3s-9x9-4p-2f-coop").kwargs == {
        "size": 9, "players": 4, "foods": 2, "sight": 3, "coop": True,
    }  # fmt: skip
    assert find_spec("mamujoco/ManySegmentSwimmer-4x2").max_episode_steps == 1000
    with pytest.raises(RloptError, match="did you mean speaker_listener"):
        find_spec("mpe/speaker_listner")
