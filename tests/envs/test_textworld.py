"""TextWorld: levels and caches without it; where it is installed, a world made, solved and made once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlopt.envs import make_env
from rlopt.envs.text import textworld as module
from rlopt.envs.text.game import text_game
from rlopt.envs.text.textworld import Level, TextWorld, TextWorldEnv, cache_folder, parse_levels
from rlopt.types import RloptError


def test_levels_are_read() -> None:
    assert parse_levels("coin_collector-5, cooking") == (Level("coin_collector", 5), Level("cooking", 1))
    assert parse_levels("coin_collector-150") == (Level("coin_collector", 150),)  # 2 x 50 rooms


@pytest.mark.parametrize(
    ("games", "said"),
    [
        ("coin_colector-5", "TextWorld has no game 'coin_colector'; did you mean coin_collector?"),
        ("cooking-11", "cooking has levels 1 to 10, as in cooking-5"),
        ("cooking-0", "cooking has levels 1 to 10"),
        ("treasure_hunter-x", "treasure_hunter has levels 1 to 30"),
        ("coin_collector-170", "coin_collector-170 has 140 rooms, and TextWorld makes no more than 100"),
        ("cooking-1,cooking", "cooking-1 stands there twice"),
    ],
)
def test_levels_that_cannot_be_are_refused(games: str, said: str) -> None:
    with pytest.raises(RloptError, match=said.replace("?", r"\?")):
        make_env("textworld", 1, kwargs={"games": games})


def test_a_reward_that_is_none_is_refused() -> None:
    with pytest.raises(RloptError, match="reward=steps is unknown; choose success or score"):
        TextWorld(reward="steps")


def test_without_the_package_one_line_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "textworld", None)
    with pytest.raises(RloptError, match=r"TextWorld is not installed; .*\[text\]"):
        make_env("textworld")


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "rlopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "rlopt"


def test_tasks_are_numbers_in_turn_of_the_games(tmp_path: Path) -> None:
    pytest.importorskip("textworld")
    env = TextWorldEnv("coin_collector-1,cooking-2", cache=str(tmp_path), tasks=3)
    kinds = ("coin_collector-1", "cooking-2")
    assert env.tasks == [0, 1, 2] and [env.game.kind(task) for task in env.tasks] == [*kinds, kinds[0]]
    assert env.metadata["facts"] == ("success", *(f"success/{kind}" for kind in kinds))
    every = [set(env.game.tasks(split)) for split in ("train", "seen", "unseen")]
    assert [len(tasks) for tasks in every] == [1_000, 100, 100] and not (every[0] & every[1] | every[1] & every[2])
    with pytest.raises(RloptError, match="has no list 'test' of tasks"):
        env.game.tasks("test")


def test_worlds_are_made_once_and_never_half(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("textworld")
    made: list[Any] = []

    def make(level: Level, task: int, path: Path) -> Path:
        made.append((level, task))
        for suffix in (".json", ".z8"):
            path.with_suffix(suffix).write_text("world")
            if task == 7:
                raise ValueError("no such\nworld")
        return path

    monkeypatch.setattr(module, "_make", make)
    game = TextWorld("coin_collector-3", cache=str(tmp_path))
    assert game.world(5) == game.world(5) and made == [(Level("coin_collector", 3), 5)]
    assert TextWorld("coin_collector-4", cache=str(tmp_path)).world(5) != game.world(5)
    with pytest.raises(RloptError, match="task 7 of coin_collector-3 cannot be made: no such world"):
        game.world(7)
    assert sorted(path.name for path in game.folder.iterdir()) == [
        f"coin_collector-{level}-5.{suffix}" for level in (3, 4) for suffix in ("json", "z8")
    ]
    with pytest.raises(RloptError, match=r"coin_collector-3-5\.z8 cannot be played .*; delete it"):
        game.begin(5)
    (tmp_path / "file").write_text("")
    with pytest.raises(RloptError, match=r"cannot hold games .*; give env\.kwargs\.cache"):
        TextWorld(cache=str(tmp_path / "file")).world(0)


def test_the_engine_plays_what_was_made(tmp_path: Path) -> None:
    """One world, which takes seconds to make: everything that needs one is asked of it."""
    pytest.importorskip("textworld")
    states = np.random.get_state()[1].copy()  # type: ignore[union-attr, index]
    kwargs = {"games": "treasure_hunter-4", "cache": str(tmp_path), "tasks": 1, "horizon": 3}
    env = make_env("textworld", 2, autoreset=False, kwargs=kwargs, facts=("success",))
    first = env.reset(seeds=[0, 1])
    assert isinstance(first, dict) and first["state"][0] == first["state"][1]
    assert np.array_equal(states, np.random.get_state()[1]), "drawn from its own generators"  # type: ignore[index]
    game, tasks = text_game(TextWorldEnv(**kwargs), "textworld")
    words = game.solution(tasks[0])
    assert words is not None and len(words) == 2 and words[-1].startswith("take ")
    begun = game.begin(0)
    assert begun.text in begun.state and begun.state.startswith(begun.task)
    assert words[0] in begun.admissible and not {"look", "inventory"} & set(begun.admissible)
    exact = [game.exact()]
    moved = []
    for one in words:
        moved.append(game.act(one))
        exact.append(game.exact())
    assert [m.reward for m in moved] == [0.0, 10.0] and [m.success for m in moved] == [False, True]
    assert moved[-1].terminated and not moved[-1].truncated and len(set(exact)) == 3
    assert game.begin(0) == begun and game.exact() == exact[0]
    assert game.act("sing").seen.admissible == begun.admissible  # what it does not understand is answered
    game.act("sing")
    assert game.act("sing").truncated
    by_score = TextWorld("treasure_hunter-4", reward="score", free=True, cache=str(tmp_path))
    assert "look" in by_score.begin(0).admissible
    assert math.isclose(sum(by_score.act(one).reward for one in words), 1.0)
    for closed in (game, by_score, env):
        closed.close()
    assert torch.is_tensor(first["choices"])
