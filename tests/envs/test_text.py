"""Text games as environments of choices, the table that chooses, and TextWorld-Express (where it and Java are)."""

from __future__ import annotations

import os
import shutil
import signal
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from rlopt.agents import GiGPO, GiGPOConfig
from rlopt.envs import VectorEnv, make_env
from rlopt.envs.text.game import ChoiceEnv, Moved, Seen, TextGame, number_of, text_game
from rlopt.loops.evaluation import run_episodes
from rlopt.loops.group import GroupLoop
from rlopt.nn import ChoiceTable, NetworkConfig, OptimiserConfig
from rlopt.policy import load_policy, save_policy
from rlopt.types import RloptError


class Doors(TextGame):
    """Task k: of three doors only door k mod 3 leads on, twice; then one has won. Another door is the end."""

    id = "doors"

    def __init__(self, sizes: dict[str, int] | None = None) -> None:
        self.sizes = sizes or {"train": 6, "seen": 2, "unseen": 1}

    def tasks(self, split: str) -> list[int | str]:
        return list(range(self.sizes[split]))

    def kind(self, task: int | str) -> str:
        return "doors"

    def begin(self, task: int | str) -> Seen:
        self.right, self.room = int(task) % 3, 0
        return self._seen("you stand in a room")

    def act(self, words: str) -> Moved:
        if words == "wait":
            return Moved(self._seen("you wait"), 0.0, False, False, False)
        opened = words == f"open {'abc'[self.right]}"
        self.room += opened
        won = self.room == 2
        return Moved(self._seen("a door opens" if opened else "a trap"), float(won), won or not opened, False, won)

    def _seen(self, text: str) -> Seen:
        doors = tuple(f"open {c}" for c in ("cab" if self.room else "abc"))
        state = f"door {self.right} is right, room {self.room}"
        return Seen(text, "open the right doors", state, (*doors, "wait") if self.room else doors)


def doors(**options: Any) -> ChoiceEnv:
    return ChoiceEnv(Doors(), choices=4, **options)


def test_choices_are_what_the_game_offers_in_its_order() -> None:
    env = doors()
    obs, _ = env.reset(seed=7)
    assert env.observation_space.contains(obs) and obs["action_mask"].tolist() == [1, 1, 1, 0]
    assert obs["choices"].tolist() == [number_of(f"open {c}") for c in "abc"] + [0]
    obs, reward, terminated, truncated, info = env.step(1)
    assert (reward, terminated, truncated, info) == (0.0, False, False, {"success": 0.0})
    assert obs["state"] == number_of("door 1 is right, room 1") and obs["action_mask"].tolist() == [1, 1, 1, 1]
    obs, reward, terminated, _, info = env.step(2)
    assert (reward, terminated, info) == (1.0, True, {"success": 1.0})


def test_a_seed_is_a_task() -> None:
    env = doors(tasks=4)
    first = [int(env.reset(seed=seed)[0]["state"]) for seed in range(8)]
    assert first == [number_of(f"door {k % 3} is right, room 0") for k in (0, 1, 2, 3) * 2]
    env.reset(seed=5)
    assert len({int(env.reset()[0]["state"]) for _ in range(20)}) == 3


def test_what_is_not_offered_is_waiting() -> None:
    env = doors()
    env.reset(seed=0)
    env.step(3)
    assert env.render() == "you wait"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"split": "test"}, "split=test is unknown; choose one of train, seen, unseen"),
        ({"tasks": 7}, "tasks=7: doors has 6 in its train list"),
        ({"tasks": 0}, "tasks=0: doors has 6"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RloptError, match=said):
        doors(**options)


def test_more_choices_than_there_is_room_for_are_refused() -> None:
    with pytest.raises(RloptError, match=r"doors offers 3 actions; give env\.choices=3 or more"):
        ChoiceEnv(Doors(), choices=2).reset(seed=0)


def test_a_game_is_found_in_its_environment() -> None:
    game, tasks = text_game(gym.make("rlopt-tests/Doors-v0", tasks=4), "rlopt-tests/Doors-v0")
    assert game.id == "doors" and tasks == [0, 1, 2, 3] and game.solution(0) is None
    with pytest.raises(RloptError, match="env=CartPole-v1 is no text game"):
        text_game(gym.make("CartPole-v1"), "CartPole-v1")


# The table


def table(size: int = 1 << 16) -> ChoiceTable:
    env = doors()
    return ChoiceTable(env.observation_space, env.action_space, {"size": size})


def test_a_pair_of_state_and_action_has_one_entry_wherever_the_action_stands() -> None:
    actor = table()
    state, choices = torch.tensor([5, 5, 6]), torch.tensor([[7, 8, 9, 0], [9, 7, 8, 0], [7, 8, 9, 0]])
    entries = actor.entries(state, choices)
    assert entries[0, 0] == entries[1, 1] and entries[0, 2] == entries[1, 0] and (entries >= 0).all()
    assert not set(entries[0].tolist()) & set(entries[2].tolist())


def test_entries_are_spread_evenly() -> None:
    generator = torch.Generator().manual_seed(0)
    state = torch.randint(2**31 - 1, (2_000,), generator=generator)
    choices = torch.arange(4).expand(2_000, 4) + 100
    filled = torch.bincount(table(1_000).entries(state, choices).flatten(), minlength=1_000)
    assert filled.sum() == 8_000 and filled.float().std() < 1.2 * 8**0.5  # as of a Poisson number


def test_what_is_not_offered_has_no_probability() -> None:
    env = doors()
    obs = {key: torch.as_tensor(np.asarray(x)).unsqueeze(0) for key, x in env.reset(seed=0)[0].items()}
    obs["action_mask"] = obs["action_mask"].bool()
    actor = table()
    assert actor(obs).softmax(-1).tolist() == [pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0])]
    drawn = actor.uniform(1, torch.Generator().manual_seed(0), obs)
    assert int(drawn) < 3


def test_a_table_of_choices_needs_choices() -> None:
    with pytest.raises(RloptError, match="needs observations with the leaves state, choices and action_mask"):
        GiGPO(doors().observation_space["state"], doors().action_space, GiGPOConfig(table=64))  # type: ignore[index]
    with pytest.raises(RloptError, match="a table of 0 entries"):
        table(0)
    with pytest.raises(RloptError, match="takes the place of the network"):
        GiGPOConfig(table=64, network=NetworkConfig(hidden=(8,)))


# Learning


gym.register("rlopt-tests/Doors-v0", entry_point=doors)


def vector(n: int) -> VectorEnv:
    return make_env("rlopt-tests/Doors-v0", n, autoreset=False, facts=("success",))


@pytest.mark.parametrize("estimator", ["gigpo", "grpo"])
def test_doors_are_learnt_and_the_policy_is_exported(estimator: str, tmp_path: Any) -> None:
    config = GiGPOConfig(
        groups=3, group_size=8, tasks=6, table=1 << 14, estimator=estimator, learning_rate=10.0,
        optimiser=OptimiserConfig(name="sgd"), max_grad_norm=None,
        **({"anchor": "state"} if estimator == "gigpo" else {}),
    )  # fmt: skip
    env = vector(24)
    loop = GroupLoop(GiGPO(env.spec, config), env, 100_000)
    begun = loop.advance().episodes
    for _ in range(40):
        done = loop.advance().episodes
    assert np.mean([e.facts["success"] for e in begun]) < 0.4
    assert np.mean([e.facts["success"] for e in done]) > 0.9
    save_policy(loop.policy(), tmp_path / "policy")
    played = run_episodes(load_policy(tmp_path / "policy"), vector(4), 12, 0)
    assert [e.facts["success"] for e in played] == [1.0] * 12


# TextWorld-Express

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="TextWorld-Express needs Java")


@needs_java
def test_textworld_express_repeats_its_tasks() -> None:
    pytest.importorskip("textworld_express")
    kwargs = {"params": "numLocations=3,includeDoors=1", "tasks": 2}
    env = make_env("textworld_express/coin", 4, autoreset=False, kwargs=kwargs, facts=("success",))
    obs = env.reset(seeds=[0, 0, 1, 2])
    assert isinstance(obs, dict)
    state, choices = obs["state"].tolist(), obs["choices"].tolist()
    assert state[0] == state[1] == state[3] != state[2] and choices[0] == choices[1]
    for _ in range(3):  # the same done in copies side by side comes to the same
        obs = env.step(torch.zeros(4, dtype=torch.int64)).obs
        assert isinstance(obs, dict) and obs["state"][0] == obs["state"][1] == obs["state"][3]
    env.close()


@needs_java
def test_textworld_express_knows_solutions() -> None:
    pytest.importorskip("textworld_express")
    kwargs = {"params": "numLocations=3,includeDoors=1", "tasks": 2}
    game, tasks = text_game(gym.make("textworld_express/coin", disable_env_checker=True, **kwargs), "coin")
    for task in tasks:
        words = game.solution(task)
        assert words and words == game.solution(task)  # the same every time
        assert game.begin(task).task == game.begin(task).state.splitlines()[0]
        moved = [game.act(one) for one in words]
        assert [m.success for m in moved] == [False] * (len(words) - 1) + [True]
    game.close()


@needs_java
def test_textworld_express_says_what_is_wrong() -> None:
    pytest.importorskip("textworld_express")
    with pytest.raises(RloptError, match=r"params='nonsense=1'"):
        make_env("textworld_express/coin", 1, kwargs={"params": "nonsense=1"})
    env = make_env("textworld_express/mapreader", 1, kwargs={"params": "numLocations=5"})
    with pytest.raises(RloptError, match=r"task \d+ cannot be made with params='numLocations=5': ERROR: No locations"):
        for seed in range(40):
            env.reset(seeds=[seed])
    with pytest.raises(RloptError, match="has 1000 in its train list"):
        make_env("textworld_express/coin", 1, kwargs={"tasks": 5_000})


@needs_java
def test_a_java_machine_that_does_not_answer_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("textworld_express")
    from rlopt.envs.text import textworld_express

    monkeypatch.setattr(textworld_express.TextWorldExpress, "_machine", None)
    game = textworld_express.TextWorldExpress("coin", "numLocations=2,includeDoors=0")
    offered = game.begin(0).admissible
    machine = textworld_express.TextWorldExpress._machine
    process = machine._gateway.java_process
    textworld_express.limit(machine, 0.2)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(RloptError, match="Java machine ended or did not answer"):
        game.act(offered[0])
    assert process.wait(5) != 0 and textworld_express.TextWorldExpress._machine is None
    assert "Traceback" not in capfd.readouterr().err


def test_without_java_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("textworld_express")
    from rlopt.envs.text.textworld_express import TextWorldExpress

    monkeypatch.setattr(TextWorldExpress, "_machine", None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RloptError, match="needs Java, which is not on PATH; install a Java runtime"):
        TextWorldExpress("coin")
