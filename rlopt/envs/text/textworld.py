"""TextWorld (Côté et al. 2018, "TextWorld: A Learning Environment for Text-based Games", arXiv 1806.11532): games that
its generator makes here and its interpreter plays; it needs no Java."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlopt.config import hint
from rlopt.envs.text.game import ChoiceEnv, Moved, Seen, TextGame
from rlopt.types import RloptError
from rlopt.version import install

GAMES = {"coin_collector": 300, "treasure_hunter": 30, "cooking": 10}
"""Games, and how many levels each has."""
COOKING = (
    (1, 1, False, False), (1, 1, False, True), (1, 1, True, False), (1, 6, False, False), (1, 9, False, False),
    (1, 12, False, False), (1, 1, True, True), (3, 6, False, False), (3, 6, True, True), (3, 12, True, True),
)  # fmt: skip
"""Ingredients, rooms, and whether they are cut and cooked, by level: the ten levels of GATA's data (Adhikari et al.
2020, arXiv 2002.09127, and its code)."""
SIZES = {"train": 1_000, "seen": 100, "unseen": 100}
FIRST = {"train": 0, "seen": 10_000, "unseen": 20_000}
RECIPE = 1
"""Rises when what is asked of the generator changes: games that stand in the cache are others then."""
_making = threading.Lock()


class Level(NamedTuple):
    """A kind of task."""

    game: str
    level: int

    @property
    def name(self) -> str:
        return f"{self.game}-{self.level}"


class TextWorld(TextGame):
    """Games of TextWorld, each task a world of its own.

    ``seen`` tasks are new worlds, and so are ``unseen`` ones, in which cooking also asks for foods that training never
    shows. A world is made, in some seconds, when it is first begun, and stays in ``cache``. As in ALFWorld's lists of
    actions, ``look`` and ``inventory`` are not offered where ``free`` is False: they change nothing, and ``Seen.state``
    has what they say.

    Args:
        games: kinds of task, in turn: ``coin_collector-5,cooking-2`` are two games with their levels (1 without):
            ``coin_collector-1`` … (quests of so many rooms; from 101 and from 201 on with rooms that lead nowhere),
            ``treasure_hunter-1`` to ``30``, ``cooking-1`` to ``10``.
        horizon: actions after which a task is cut off.
        reward: ``success``, ``won`` at the end where the task was solved and 0 otherwise; or ``score``, by how much the
            game's own score, of which 1 is all, has risen.
        won: what success pays.
        free: whether actions that only look are offered.
        cache: where made worlds are kept (None: ``rlopt`` in the user's cache folder).

    Raises:
        RloptError: no such game, level or reward, or the package is missing; later, a world that cannot be made.
    """

    id = "textworld"

    def __init__(
        self,
        games: str = "coin_collector-5",
        horizon: int = 50,
        reward: str = "success",
        won: float = 10.0,
        free: bool = False,
        cache: str | None = None,
    ) -> None:
        if reward not in ("success", "score"):
            raise RloptError(f"reward={reward} is unknown; choose success or score")
        self.levels = parse_levels(games)
        if len(self.levels) > 1:
            self.kinds = tuple(level.name for level in self.levels)
        try:
            import textworld
        except ImportError as e:
            raise RloptError(f"TextWorld is not installed; {install('text')}") from e
        self.horizon, self.reward, self.won, self.free = horizon, reward, won, free
        folder = cache_folder() if cache is None else Path(cache).expanduser()
        self.folder = folder / f"textworld-{textworld.__version__}-{RECIPE}"
        self._engine: Any = None
        self._task: int | str | None = None
        self._taken, self._score = 0, 0.0

    def tasks(self, split: str) -> Sequence[int | str]:
        if split not in SIZES:
            raise RloptError(f"{self.id} has no list {split!r} of tasks; it has {', '.join(SIZES)}")
        return list(range(FIRST[split], FIRST[split] + SIZES[split]))

    def kind(self, task: int | str) -> str:
        return self._level(task).name

    def begin(self, task: int | str) -> Seen:
        import textworld

        if task != self._task:
            self.close()
            asked = textworld.EnvInfos(admissible_commands=True, description=True, inventory=True, max_score=True)
            path = self.world(task)
            try:
                self._engine, self._task = textworld.start(str(path), asked), task
            except Exception as e:
                raise RloptError(f"{self.id}: {path} cannot be played ({_one_line(e)}); delete it") from e
        self._taken, self._score = 0, 0.0
        state = self._engine.reset()
        return self._seen(state, state.description)

    def act(self, words: str) -> Moved:
        state, _, _ = self._engine.step(words)
        self._taken += 1
        won, lost = bool(state.won), bool(state.lost)
        score = float(state.score or 0) / max(1, int(state.max_score or 1))
        risen, self._score = score - self._score, score
        over = won or lost
        reward = self.won * won if self.reward == "success" else risen
        return Moved(self._seen(state, state.feedback), reward, over, not over and self._taken >= self.horizon, won)

    def exact(self) -> str:
        """Return every fact that is true now."""
        return "\n".join(sorted(str(fact) for fact in self._engine.state["_facts"]))

    def solution(self, task: int | str) -> Sequence[str] | None:
        from textworld import Game

        found = Game.load(str(self.world(task).with_suffix(".json"))).walkthrough
        return [words for words in found if self._offered(words)]

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = self._task = None

    def world(self, task: int | str) -> Path:
        """Return the file of a task's world, which is made where it is not there yet.

        Raises:
            RloptError: it cannot be made or written.
        """
        level = self._level(task)
        path = self.folder / f"{level.name}-{task}.z8"
        if not path.is_file():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                # Elsewhere first: other processes make the same one, and none may find half of it.
                with tempfile.TemporaryDirectory(dir=self.folder) as place, _making:
                    made = _make(level, int(task), Path(place) / path.name)
                    for suffix in (".json", ".z8"):
                        made.with_suffix(suffix).replace(path.with_suffix(suffix))
            except OSError as e:
                raise RloptError(f"{self.folder} cannot hold games ({_one_line(e)}); give env.kwargs.cache") from e
            except Exception as e:
                raise RloptError(f"{self.id}: task {task} of {level.name} cannot be made: {_one_line(e)}") from e
        return path

    def _level(self, task: int | str) -> Level:
        return self.levels[int(task) % len(self.levels)]

    def _offered(self, words: str) -> bool:
        return self.free or words not in ("look", "inventory")

    def _seen(self, state: Any, said: str) -> Seen:
        offered = filter(self._offered, state.admissible_commands)
        task = _plain(state.objective)
        around = (_plain(state.description or ""), _plain(state.inventory or ""))
        return Seen(_plain(said), task, "\n".join((task, *around)), tuple(sorted(offered)))


class TextWorldEnv(ChoiceEnv):
    """TextWorld as an environment of choices; the arguments are those of both."""

    def __init__(
        self,
        games: str = "coin_collector-5",
        horizon: int = 50,
        reward: str = "success",
        won: float = 10.0,
        free: bool = False,
        cache: str | None = None,
        split: str = "train",
        tasks: int | None = None,
        choices: int = 64,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(TextWorld(games, horizon, reward, won, free, cache), split, tasks, choices, render_mode)


def parse_levels(games: str) -> tuple[Level, ...]:
    """Return the levels of ``coin_collector-5,cooking-2``.

    Raises:
        RloptError: there is no such game, or it has no such level.
    """
    found = []
    for word in games.split(","):
        game, _, number = word.strip().partition("-")
        if game not in GAMES:
            raise RloptError(f"games={games}: TextWorld has no game {game!r}; {hint(game, list(GAMES))}")
        if (number and not number.isdecimal()) or not 1 <= int(number or 1) <= GAMES[game]:
            raise RloptError(f"games={games}: {game} has levels 1 to {GAMES[game]}, as in {game}-{min(5, GAMES[game])}")
        level = Level(game, int(number or 1))
        if game == "coin_collector" and (rooms := _rooms(level.level)) > 100:
            raise RloptError(f"games={games}: {level.name} has {rooms} rooms, and TextWorld makes no more than 100")
        if level in found:
            raise RloptError(f"games={games}: {level.name} stands there twice")
        found.append(level)
    return tuple(found)


def cache_folder() -> Path:
    """Return where rlopt keeps what it can make again: ``rlopt`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlopt"


def _rooms(level: int) -> int:
    return ((level - 1) // 100 + 1) * ((level - 1) % 100 + 1)


def _make(level: Level, task: int, path: Path) -> Path:
    """Make the world of a task, by the number of which alone it is drawn."""
    from textworld import GameOptions
    from textworld.challenges import CHALLENGES
    from textworld.generator import compile_game

    options = GameOptions()
    options.seeds, options.path = task, str(path)
    options.grammar.only_last_action = True  # else the way to the goal is part of what is asked for
    settings: dict[str, Any] = {"level": level.level}
    if level.game == "cooking":
        size, rooms, cut, cook = COOKING[level.level - 1]
        split = "test" if task >= FIRST["unseen"] else "train"
        settings = {"recipe": size, "take": size, "go": rooms, "cut": cut, "cook": cook, "open": False, "drop": False}
        settings |= {"recipe_seed": task + 1, "split": split}
    return Path(compile_game(CHALLENGES[f"tw-{level.game}"][1](settings, options), options))


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split()) or type(e).__name__


def _plain(text: str) -> str:
    """Return what the game says without its title, its status line and the question that ends it."""
    said = text.split("\n>", maxsplit=1)[0].split("Would you like to RESTART", maxsplit=1)[0]
    return re.sub(r"\s*\n\s*\n\s*", "\n", said).strip()
