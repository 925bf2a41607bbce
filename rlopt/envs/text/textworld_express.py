"""TextWorld-Express (Jansen and Cote 2023, "TextWorldExpress: Simulating Text Games at One Million Steps Per Second",
arXiv 2208.01174): eight text games whose simulator comes with the package; it needs Java."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Sequence
from typing import Any, ClassVar

from rlopt.env_names import TEXT_GAMES
from rlopt.envs.text.game import ChoiceEnv, Moved, Seen, TextGame
from rlopt.types import RloptError
from rlopt.version import install

FOLDS = {"train": "train", "seen": "dev", "unseen": "test"}
ANSWER = 60.0
"""Seconds that the Java machine has for an answer."""
TRIES = 8
"""Ways that a game's solver tries, of which the shortest is a task's solution: some of them wander."""


class TextWorldExpress(TextGame):
    """One of the games.

    All games of a process share one Java machine, which is started by the first.

    Args:
        game: one of ``TEXT_GAMES``.
        params: what its tasks are like, as TextWorld-Express writes it: ``numLocations=6,includeDoors=1``.
        horizon: actions after which a task is cut off.
        reward: ``success``, ``won`` at the end where the task was solved and 0 otherwise; or ``score``, by how much the
            game's own score, from 0 to 1, has risen.
        won: what success pays.

    Raises:
        RloptError: no such game or parameter, or Java or the package is missing.
    """

    _machine: ClassVar[Any] = None
    _starting = threading.Lock()

    def __init__(
        self, game: str, params: str = "", horizon: int = 50, reward: str = "success", won: float = 10.0
    ) -> None:
        if game not in TEXT_GAMES:
            raise RloptError(f"TextWorld-Express has no game {game!r}; it has {', '.join(TEXT_GAMES)}")
        if reward not in ("success", "score"):
            raise RloptError(f"reward={reward} is unknown; choose success or score")
        self.id, self.game, self.horizon, self.reward, self.won = (
            f"textworld_express/{game}",
            game,
            horizon,
            reward,
            won,
        )
        self._simulator = _simulator(self._shared())
        try:
            self._simulator.load(game, params)
        except ValueError as e:
            raise RloptError(f"{self.id}: params={params!r}: {' '.join(str(e).split())}") from e
        self.params, self._taken, self._score = params, 0, 0.0

    @classmethod
    def _shared(cls) -> Any:
        with cls._starting:
            if TextWorldExpress._machine is None:
                try:
                    from py4j import java_gateway
                    from textworld_express import TextWorldExpressEnv
                except ImportError as e:
                    raise RloptError(f"TextWorld-Express is not installed; {install('text')}") from e
                if shutil.which("java") is None:
                    raise RloptError(
                        "TextWorld-Express needs Java, which is not on PATH; install a Java runtime, 8 or newer "
                        "(Debian: apt-get install default-jre-headless)"
                    )
                TextWorldExpress._machine = TextWorldExpressEnv()
                # What goes wrong is an error here; Py4J would also print each failed call, on the root logger.
                java_gateway.logging = logging.getLogger("py4j")
                java_gateway.logging.setLevel(logging.CRITICAL)
                limit(TextWorldExpress._machine, ANSWER)
            return TextWorldExpress._machine

    def tasks(self, split: str) -> Sequence[int | str]:
        if split not in FOLDS:
            raise RloptError(f"{self.id} has no list {split!r} of tasks; it has {', '.join(FOLDS)}")
        # Train, dev and test seeds of the package: 0 …, 10,000 …, 20,000 …
        return [int(seed) for seed in getattr(self._simulator, f"getValidSeeds{FOLDS[split].capitalize()}")()]

    def kind(self, task: int | str) -> str:
        return self.game

    def begin(self, task: int | str) -> Seen:
        self._taken, self._score = 0, 0.0
        fold = next(name for first, name in ((20_000, "test"), (10_000, "dev"), (0, "train")) if int(task) >= first)
        try:
            return _seen(self._simulator.reset(seed=int(task), gameFold=fold)[1])
        except Exception as e:
            self._is_lost(e)
            said = next((line for line in str(e).splitlines() if "Exception: " in line), str(e)).rpartition(
                "Exception: "
            )
            raise RloptError(f"{self.id}: task {task} cannot be made with params={self.params!r}: {said[2]}") from e

    def solution(self, task: int | str) -> Sequence[str] | None:
        found = [way for number in range(TRIES) if (way := self._way(task, number))]
        return min(found, key=len, default=None)

    def _way(self, task: int | str, number: int) -> list[str] | None:
        """Return what the package's solver of this game does, if it gets there; asked as usual it draws where to look
        from a stream that is another one every time."""
        self.begin(task)
        try:
            game, jvm = self._simulator.server.game(), self._simulator._gateway.jvm
            solver = game.getClass().getSimpleName().removesuffix("Game") + "GoldAgent"
            chance = jvm.scala.util.Random((1 << 32) + number)  # a smaller number would be no ``long``
            found = getattr(jvm.textworldexpress.goldagent, solver)(game).mkGoldPath(chance)
            return [str(words) for words in found._2][1:] if found._1 else None  # the first is how the task began
        except Exception as e:
            self._is_lost(e)
            raise

    def act(self, words: str) -> Moved:
        try:
            _, _, _, found = self._simulator.step(words)
        except Exception as e:
            self._is_lost(e)
            raise
        self._taken += 1
        success, failure = bool(found["tasksuccess"]), bool(found["taskfailure"])
        risen, self._score = float(found["score"]) - self._score, float(found["score"])
        reward = self.won * success if self.reward == "success" else risen
        terminated = success or failure
        return Moved(_seen(found), reward, terminated, not terminated and self._taken >= self.horizon, success)

    def _is_lost(self, e: Exception) -> None:
        """Say so where an error means that the Java machine is gone or does not answer; the next game begins another.

        Raises:
            RloptError: it is lost.
        """
        from py4j.protocol import Py4JJavaError

        if type(e).__module__.split(".")[0] != "py4j" or isinstance(e, Py4JJavaError):
            return
        with self._starting:
            machine, TextWorldExpress._machine = TextWorldExpress._machine, None
        if machine is not None:
            machine._gateway.java_process.kill()
        raise RloptError(
            f"{self.id}: its Java machine ended or did not answer within {ANSWER:g} s (is there memory left?); with "
            "env.backend=async every environment has one of its own, and one that stalls is replaced"
        ) from e


class TextWorldExpressEnv(ChoiceEnv):
    """TextWorld-Express as an environment of choices; the arguments are those of both."""

    def __init__(
        self,
        game: str = "coin",
        params: str = "",
        horizon: int = 50,
        reward: str = "success",
        won: float = 10.0,
        split: str = "train",
        tasks: int | None = None,
        choices: int = 32,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(TextWorldExpress(game, params, horizon, reward, won), split, tasks, choices, render_mode)


def limit(machine: Any, seconds: float) -> None:
    """Give a Java machine so long for each answer."""
    client = machine._gateway._gateway_client
    client.gateway_parameters.read_timeout = seconds
    for connection in client.deque:  # those that are open already, and are used again
        connection.socket.settimeout(seconds)


def _seen(found: dict[str, Any]) -> Seen:
    state = "\n".join((found["taskDescription"], found["look"], found["inventory"]))
    return Seen(found["observation"], found["taskDescription"], state, tuple(sorted(found["validActions"])))


def _simulator(machine: Any) -> Any:
    """Return one more simulator in the Java machine of another: starting one for each copy takes a second and 80 MB."""
    from textworld_express import TextWorldExpressEnv

    class Simulator(TextWorldExpressEnv):  # type: ignore[misc]
        def __init__(self) -> None:
            self._gateway = machine._gateway
            self.server = self._gateway.jvm.textworldexpress.runtime.PythonInterface()
            self.runHistory: list[dict[str, Any]] = []
            self.lastStepScore, self.envStepLimit = 0, 2**31 - 1  # the limit is ours
            self.seed, self.gameName, self.gameParams, self.gameFold = None, None, "", "train"

        def addStepToHistory(self, step: Any) -> None:
            """Keep the last alone, which ``help`` shows."""
            self.runHistory = [dict(step)]

        def close(self) -> None:
            """Leave the machine to the others."""

    return Simulator()
