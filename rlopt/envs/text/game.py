"""The protocol of text environments: words in, words out.

A text environment is a ``TextGame``: lists of tasks, and from each task's one beginning on ``act(words)`` until it is
over. Several side by side are a list of games: who plays them gives each its words and leaves those alone that are
over; nothing but ``begin`` is needed to go on after a resume, since whole episodes are played. ``ChoiceEnv`` makes an
ordinary environment of one, for policies that choose among what it offers. ``text_game`` finds the game in whatever is
registered with Gymnasium as such an environment, for policies that write words, so that ``env=`` takes the same names
and options for both.

A new one costs a subclass of ``TextGame``, one of ``ChoiceEnv`` with the options of both, and its id in
``rlopt.envs.registered``.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces

from rlopt.types import RloptError

SPLITS = ("train", "seen", "unseen")
"""Fixed lists of tasks: to learn from, and to be tested on, of the kinds learnt from and of others."""
NAMES = 2**31 - 1
"""Texts become numbers in [0, NAMES)."""


class Seen(NamedTuple):
    """What a game shows."""

    text: str
    """Its answer to what was just done; at the start, to looking around."""
    task: str
    """What is to be done, in its own words; the same throughout a task."""
    state: str
    """All there is to know without doing anything: the task, what one sees, what one carries. Of two moments with equal
    ones an observer without a memory cannot tell which is which."""
    admissible: tuple[str, ...]
    """What can be done now, in an order that depends on nothing else."""


class Moved(NamedTuple):
    """What an action came to."""

    seen: Seen
    reward: float
    terminated: bool
    truncated: bool
    success: bool


class TextGame(ABC):
    """A game of words with fixed lists of tasks, each of which begins the same way every time."""

    id: str
    kinds: tuple[str, ...] = ()
    """Of its tasks, where there are several: successes are counted by each."""

    @abstractmethod
    def tasks(self, split: str) -> Sequence[int | str]:
        """Return the tasks of one of ``SPLITS``, in an order that depends on no file system and no machine.

        Raises:
            RloptError: there is no such list.
        """

    @abstractmethod
    def kind(self, task: int | str) -> str:
        """Return what kind of task it is: successes are counted by it."""

    @abstractmethod
    def begin(self, task: int | str) -> Seen:
        """Begin a task anew."""

    @abstractmethod
    def act(self, words: str) -> Moved:
        """Do something. What the game does not understand is an action too, which it answers."""

    def exact(self) -> str:
        """Return the true state, of which ``Seen.state`` may show a part.

        Raises:
            RloptError: the game does not tell.
        """
        raise RloptError(f"{self.id} does not tell its true state; leave out ExactState, or agent.anchor=exact")

    @property
    def tells_exact(self) -> bool:
        """Whether it tells its true state."""
        return type(self).exact is not TextGame.exact

    def solution(self, task: int | str) -> Sequence[str] | None:
        """Return actions that solve a task from its beginning, for supervised learning; None where nobody knows any.

        What was begun before is given up.
        """
        return None

    def close(self) -> None:  # noqa: B027
        """Release what the game holds. Safe to call twice."""


class ChoiceEnv(gymnasium.Env[dict[str, Any], Any]):
    """A text game as an environment of choices: the action is which of the admissible ones to take.

    Observations are numbers that stand for texts: ``state``, which one it is, ``choices`` (K,), what each action would
    be, and ``action_mask`` (K,), which of them there are. ``info`` has ``success``, and where tasks are of several
    kinds ``success/KIND`` (not a number for those of other kinds), which are facts of episodes. ``reset(seed=s)``
    begins the task ``s`` modulo how many there are.

    Args:
        game: a new game, which is closed with the environment.
        split: which list of tasks (see ``SPLITS``).
        tasks: the first so many of the list; None for all.
        choices: K, the most actions that a state may offer.

    Raises:
        RloptError: a list, or so many tasks, that the game does not have; later, a state with more choices.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 4}

    def __init__(
        self,
        game: TextGame,
        split: str = "train",
        tasks: int | None = None,
        choices: int = 32,
        render_mode: str | None = None,
    ) -> None:
        if split not in SPLITS:
            raise RloptError(f"split={split} is unknown; choose one of {', '.join(SPLITS)}")
        if choices < 1:
            raise RloptError(f"choices={choices}: a state offers at least one")
        self.game, self.render_mode = game, render_mode
        every = game.tasks(split)
        if tasks is not None and not 1 <= tasks <= len(every):
            raise RloptError(f"tasks={tasks}: {game.id} has {len(every)} in its {split} list")
        self.tasks = list(every[:tasks])
        self.observation_space = spaces.Dict(
            {
                "state": spaces.Discrete(NAMES),
                "choices": spaces.MultiDiscrete(np.full(choices, NAMES)),
                "action_mask": spaces.MultiBinary(choices),
            }
        )
        self.action_space: spaces.Space[Any] = spaces.Discrete(choices)
        if game.kinds:
            self.metadata = {**self.metadata, "facts": ("success", *(f"success/{kind}" for kind in game.kinds))}
        self._seen, self._kind = Seen("", "", "", ()), ""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], Any]:
        """Begin a task; see the class."""
        super().reset(seed=seed)
        at = int(self.np_random.integers(len(self.tasks))) if seed is None else seed % len(self.tasks)
        self._seen, self._kind = self.game.begin(self.tasks[at]), self.game.kind(self.tasks[at])
        return self._observation(), {}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Take one of the choices; one that is not there is nothing done, which the game is told as ``wait``."""
        there = self._seen.admissible
        moved = self.game.act(there[int(action)] if int(action) < len(there) else "wait")
        self._seen = moved.seen
        info = {"success": float(moved.success)}
        info |= {f"success/{kind}": info["success"] if kind == self._kind else math.nan for kind in self.game.kinds}
        return self._observation(), moved.reward, moved.terminated, moved.truncated, info

    def exact_state(self) -> str:
        """Return the game's true state, of this task."""
        return self.game.exact()

    def render(self) -> Any:
        """Return what the game last said."""
        return self._seen.text

    def close(self) -> None:
        """Close the game."""
        self.game.close()

    def _observation(self) -> dict[str, Any]:
        offered, k = self._seen.admissible, int(self.action_space.n)  # type: ignore[attr-defined]
        if len(offered) > k:
            raise RloptError(f"{self.game.id} offers {len(offered)} actions; give env.choices={len(offered)} or more")
        choices, mask = np.zeros(k, np.int64), np.zeros(k, np.int8)
        choices[: len(offered)] = [number_of(words) for words in offered]
        mask[: len(offered)] = 1
        return {"state": np.int64(number_of(self._seen.state)), "choices": choices, "action_mask": mask}


def text_game(env: gymnasium.Env[Any, Any], id: str) -> tuple[TextGame, list[int | str]]:
    """Return the game in an environment of choices, and its tasks.

    Raises:
        RloptError: there is none in it.
    """
    inner = env.unwrapped
    if not isinstance(inner, ChoiceEnv):
        raise RloptError(f"env={id} is no text game, which speaks in words; `rlopt list envs` shows some")
    return inner.game, inner.tasks


def ask_game(env: gymnasium.Env[Any, Any], id: str, method: str, arguments: Sequence[Any]) -> Any:
    """Return what a method of the game in an environment returns; of ``about`` its id, its kinds of task, whether
    it tells its true state, and the tasks.

    Raises:
        RloptError: there is no game in it.
    """
    game, tasks = text_game(env, id)
    if method == "about":
        return game.id, game.kinds, game.tells_exact, tasks
    return getattr(game, method)(*arguments)


def number_of(text: str) -> int:
    """Return a number in [0, ``NAMES``) that stands for a text, the same on every machine (BLAKE2b)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") % NAMES
