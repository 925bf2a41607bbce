"""SMAC and SMACv2 behind the contract of teams, with a game that has their interface and no StarCraft."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from rlopt.envs import make_env
from rlopt.types import RloptError

PLAYED: list[Any] = []


class StarCraft2Env:
    """Two units with four actions; the second dies at the second step, and the battle is won at the ``ends``-th, or
    its time is up."""

    def __init__(self, map_name: str = "", ends: int = 3, limit: int = 9, **options: Any) -> None:
        if map_name == "moon":
            raise KeyError(map_name)
        self.ends, self.limit, self.time, self.options = ends, limit, 0, {"map_name": map_name, **options}
        PLAYED.append(self)

    def get_env_info(self) -> dict[str, int]:
        return {"n_agents": 2, "n_actions": 4, "obs_shape": 3, "state_shape": 5, "episode_limit": self.limit}

    def reset(self) -> Any:
        self.time = 0
        return self.get_obs(), self.get_state()

    def get_obs(self) -> list[Any]:
        return [np.full(3, self.time), np.full(3, 10 + self.time)]

    def get_state(self) -> Any:
        return np.arange(5) + self.time

    def get_avail_actions(self) -> list[list[int]]:
        return [[0, 1, 1, 0], [1, 0, 0, 0] if self.time >= 2 else [0, 1, 0, 1]]

    def step(self, actions: list[int]) -> tuple[float, bool, dict[str, Any]]:
        possible = self.get_avail_actions()
        assert all(own[a] for own, a in zip(possible, actions, strict=True)), "the game takes nothing impossible"
        self.time += 1
        if self.time >= self.ends:
            return 20.0, True, {"battle_won": True}
        if self.time >= self.limit:
            return 0.5, True, {"episode_limit": True, "battle_won": False}
        return 0.5, False, {"battle_won": False}

    def close(self) -> None:
        pass


@pytest.fixture
def game(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, cls in (
        ("smac.env", "StarCraft2Env"),
        ("smacv2.env.starcraft2.wrapper", "StarCraftCapabilityEnvWrapper"),
    ):
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
        monkeypatch.setattr(sys.modules[name], cls, StarCraft2Env, raising=False)
    monkeypatch.setenv("SC2PATH", str(tmp_path))
    PLAYED.clear()


def play(env: Any, steps: int) -> list[Any]:
    env.reset()
    return [env.step(torch.tensor([[2, 3]])) for _ in range(steps)]


def test_a_battle_is_an_episode_of_a_team(game: None) -> None:
    env = make_env("smac/3m", 1, backend="sync")
    spec = env.spec
    assert spec.agents == ("unit_0", "unit_1") and spec.reward_shape == () and spec.facts == ("won",)
    obs = env.reset()
    assert obs["obs"].shape == (1, 2, 3) and obs["state"].tolist() == [[0, 1, 2, 3, 4]]
    assert obs["action_mask"].tolist() == [[[False, True, True, False], [False, True, False, True]]]
    first, second, last = play(env, 3)  # of the dead unit the game is told its no-op, whatever it was given
    assert first.next_obs["alive"].tolist() == [[True, True]] and second.next_obs["alive"].tolist() == [[True, False]]
    assert first.reward.tolist() == [0.5] and last.reward.tolist() == [20.0]
    assert last.terminated.tolist() == [True] and last.truncated.tolist() == [False]
    assert last.info["won"].tolist() == [1.0] and not bool(second.ended.any())
    env.close()


def test_a_battle_that_runs_out_of_time_is_truncated(game: None) -> None:
    env = make_env("smac/3m", 1, backend="sync", kwargs={"limit": 2})
    last = play(env, 2)[-1]
    assert last.terminated.tolist() == [False] and last.truncated.tolist() == [True] == last.ended.tolist()
    assert last.info["won"].tolist() == [0.0]
    env.close()


def test_smacv2_draws_its_units(game: None) -> None:
    make_env("smacv2/zerg_5_vs_6", 1, backend="sync").close()
    options = PLAYED[-1].options
    assert options["map_name"] == "10gen_zerg" and options["capability_config"]["n_enemies"] == 6
    for name in ("smacv2/zerg_5", "smacv2/orks_5_vs_5"):
        with pytest.raises(RloptError, match="RACE_UNITS_vs_ENEMIES"):
            make_env(name, 1, backend="sync")


def test_what_is_missing_is_said_in_one_line(game: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RloptError, match="does not take it: KeyError 'moon'"):
        make_env("smac/moon", 1, backend="sync")
    monkeypatch.setenv("SC2PATH", "/nowhere/at/all")
    with pytest.raises(RloptError, match="StarCraft II is not at /nowhere/at/all") as told:
        make_env("smac/3m", 1, backend="sync")
    assert "\n" not in str(told.value)
    monkeypatch.setitem(sys.modules, "smac.env", None)
    with pytest.raises(RloptError, match=r"pip install git\+https://github.com/oxwhirl/smac .the package smac of PyPI"):
        make_env("smac/3m", 1, backend="sync")
