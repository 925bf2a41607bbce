"""A text game without anything to install: five rooms in a row, and a coin at one end of them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import gymnasium

from rlopt.envs.text.game import ChoiceEnv, Moved, Seen, TextGame

SIZES = {"train": 4, "seen": 2, "unseen": 2}


class Corridor(TextGame):
    """Task k: the coin lies at the west end where k is even, and one begins k // 2 % 2 rooms off the middle."""

    id = "corridor"
    kinds = ("west", "east")

    def __init__(self, horizon: int = 6, won: float = 10.0, trouble: str | None = None) -> None:
        """``trouble`` names a file: whoever is told to ``die`` or to ``stall`` does so once, where it is not there yet,
        and always where it is called ``always``."""
        self.horizon, self.won, self.closed = horizon, won, 0
        self.trouble = None if trouble is None else Path(trouble)

    def tasks(self, split: str) -> list[int | str]:
        return list(range(SIZES[split]))

    def kind(self, task: int | str) -> str:
        return self.kinds[int(task) % 2]

    def begin(self, task: int | str) -> Seen:
        self.west, self.room, self.taken = int(task) % 2 == 0, 2 + int(task) // 2 % 2, 0
        return self._seen()

    def solution(self, task: int | str) -> list[str]:
        self.begin(task)
        way = self.room if self.west else 4 - self.room
        return [f"go {self.kind(task)}"] * way + ["take coin"]

    def act(self, words: str) -> Moved:
        if self.trouble is not None and words in ("die", "stall") and not self.trouble.exists():
            if self.trouble.name != "always":
                self.trouble.touch()
            if words == "die":
                os._exit(1)
            time.sleep(60.0)
        self.taken += 1
        here = self.room == (0 if self.west else 4)
        won = words == "take coin" and here
        self.room += (words == "go east" and self.room < 4) - (words == "go west" and self.room > 0)
        return Moved(self._seen(), self.won * won, won, not won and self.taken >= self.horizon, won)

    def exact(self) -> str:
        return f"{self.west} {self.room}"

    def _seen(self) -> Seen:
        ways = ("go east",) * (self.room < 4) + ("go west",) * (self.room > 0)
        text = f"You are in room {self.room}."
        task = f"Find the coin in the {'west' if self.west else 'east'}."
        return Seen(text, task, f"{task}\n{text}", (*ways, "take coin"))

    def close(self) -> None:
        self.closed += 1


class CorridorEnv(ChoiceEnv):
    """The corridor as an environment."""

    def __init__(
        self, horizon: int = 6, won: float = 10.0, split: str = "train", tasks: int | None = None, choices: int = 4,
        render_mode: Any = None, trouble: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(Corridor(horizon, won, trouble), split, tasks, choices, render_mode)


if "Corridor-v0" not in gymnasium.registry:
    gymnasium.register("Corridor-v0", entry_point=f"{__name__}:CorridorEnv")
