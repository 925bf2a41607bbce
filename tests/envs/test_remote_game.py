"""Text games in worker processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlopt.envs.factory import EnvFactory, find_spec
from rlopt.envs.text.remote import RemoteGame
from rlopt.types import RloptError
from tests.agents.corridor import Corridor

ID = "tests.agents.corridor:Corridor-v0"


@pytest.fixture
def make() -> Iterator[Callable[..., RemoteGame]]:
    made: list[RemoteGame] = []

    def build(env_id: str = ID, timeout: float = 60.0, **kwargs: Any) -> RemoteGame:
        made.append(RemoteGame(EnvFactory(find_spec(env_id), kwargs), env_id, 3, timeout))
        made[-1].connect()
        return made[-1]

    yield build
    for game in made:
        game.close()


@pytest.mark.parametrize(("trouble", "timeout"), [("die", 60.0), ("stall", 1.0)])
def test_a_new_worker_goes_on_where_the_lost_one_stood(
    make: Any, trouble: str, timeout: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote, local = make(timeout=timeout, trouble=str(tmp_path / "once")), Corridor()
    assert (remote.id, remote.kinds, remote.tells_exact) == (local.id, local.kinds, True)
    assert remote.tasks("seen") == local.tasks("seen") and remote.kind(1) == local.kind(1)
    with caplog.at_level(logging.WARNING):
        for game in (remote, local):  # the solution of another task is asked for in between
            game.begin(1)
            assert game.solution(0) == ["go west", "go west", "take coin"]
        assert remote.begin(2) == local.begin(2)
        for words in ("go west", trouble, "go west", "go west", "take coin"):
            assert remote.act(words) == local.act(words)
            assert remote.exact() == local.exact()
    said = {"die": "died", "stall": "did not answer in time"}[trouble]
    assert f"the worker of game 3 {said}; a new one goes on with its task" in caplog.text


def test_what_is_always_lost_ends_the_run(make: Any, tmp_path: Path) -> None:
    game = make(trouble=str(tmp_path / "always"))
    game.begin(0)
    with pytest.raises(RloptError, match=r"game 3 was lost 4 times in a row; raise env.timeout \(now 60 s\)"):
        game.act("die")


def test_what_is_no_text_game_is_refused(make: Any) -> None:
    with pytest.raises(RloptError, match="is no text game, which speaks in words"):
        make("Pendulum-v1")


def test_a_closed_game_says_so(make: Any) -> None:
    game = make()
    game.close()
    with pytest.raises(RloptError, match="the game is closed"):
        game.begin(0)
