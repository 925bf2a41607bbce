"""Household problems: fixed, solvable, apart for unseen tasks; and, where it is installed, ALFWorld itself."""

from __future__ import annotations

import hashlib
import math

import pytest

from rlopt.envs import make_env
from rlopt.envs.text.household import KINDS, pairs, problem
from rlopt.types import RloptError


def test_problems_are_the_same_everywhere() -> None:
    texts = [problem(number, unseen).pddl for unseen in (False, True) for number in range(12)]
    assert len(set(texts)) == 24
    assert hashlib.blake2b("".join(texts).encode(), digest_size=8).hexdigest() == "ade9e0d6923f9c36"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked_for_in_unseen_tasks_is_not_asked_for_in_training(kind: str) -> None:
    known, new = set(pairs(kind, unseen=False)), set(pairs(kind, unseen=True))
    assert known and new and not known & new
    assert problem(KINDS.index(kind)).kind == kind


def test_the_engine_solves_them_and_tells_success_by_kind() -> None:
    pytest.importorskip("alfworld")
    from rlopt.envs.text.alfworld import ALFWorld, ALFWorldEnv

    env = ALFWorldEnv(horizon=9)
    game = env.game
    assert isinstance(game, ALFWorld)
    env.reset(seed=3)
    assert env.render().endswith("Your task is to: heat some egg and put it in diningtable.")
    assert "help" not in env._seen.admissible and "look" not in env._seen.admissible
    states = {game.exact()}
    plan = game.plan()
    for words in plan:
        assert words in env._seen.admissible
        _, reward, terminated, truncated, info = env.step(env._seen.admissible.index(words))
        states.add(game.exact())
    assert (reward, terminated, truncated) == (10.0, True, False) and len(states) == len(plan) + 1
    told = {name for name, value in info.items() if not math.isnan(value)}
    assert told == {"success", "success/pick_heat_then_place_in_recep"} and env._seen.state.count("\n") == 3
    assert env.metadata["facts"] == ("success", *(f"success/{kind}" for kind in KINDS))
    with pytest.raises(RloptError, match="no list 'test' of tasks"):
        game.tasks("test")


def test_without_the_package_one_line_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "alfworld.info", None)
    with pytest.raises(RloptError, match=r"ALFWorld is not installed; .*\[text\]"):
        make_env("alfworld")
