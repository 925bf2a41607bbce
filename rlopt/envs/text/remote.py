"""Text games in worker processes: they play at once, and one that dies or stalls does not end the run."""

from __future__ import annotations

import logging
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

from gymnasium import Space

from rlopt.envs.base import Env
from rlopt.envs.processes import worker_context
from rlopt.envs.text.game import Moved, Seen, TextGame
from rlopt.envs.workers import MAX_LOSSES, STARTUP, EnvWorker, Lost, end_workers
from rlopt.types import RloptError

log = logging.getLogger(__name__)
_starting = threading.Lock()


class Hello(NamedTuple):
    """What a worker says first."""

    spaces: tuple[Space[Any], Space[Any]]
    """Of observations and actions, of its environment of choices."""
    tasks: list[int | str]


class RemoteGame(TextGame):
    """A text game in a process of its own; ``connect`` waits for it.

    A worker that dies, or that does not answer in time, is replaced. The new one begins the same task and repeats what
    was done since: tasks begin the same way every time, so nothing is lost, and a run stays reproducible.

    Args:
        env_fn: builds the environment of choices that the game is in; picklable.
        slot: which of several it is, for messages.
        timeout: seconds that an answer may take.

    Raises:
        RloptError: it cannot be sent to a process, cannot be built, is no text game, or raises an error; later, a
            worker that is lost more than three times in a row.
    """

    def __init__(self, env_fn: Callable[[], Env], env_id: str, slot: int = 0, timeout: float = 60.0) -> None:
        self._env_fn, self._env_id, self._slot, self._timeout = env_fn, env_id, slot, timeout
        self._task: int | str | None = None
        self._done: list[str] = []
        self._tells = self._closed = False
        self._worker: list[EnvWorker | None] = [None]
        # See AsyncVectorEnv: the workers of what is never closed end before multiprocessing waits for them.
        self._end = Finalize(self, end_workers, (self._worker,), exitpriority=10)
        self._start()

    def connect(self) -> Hello:
        """Wait until the worker has built its game (several are built at once where all are made before)."""
        try:
            observation_space, action_space, _ = pickle.loads(self._receive(max(STARTUP, self._timeout)))
        except Lost as e:
            raise RloptError(
                f"the worker of game {self._slot} {e} while starting; a script must build it under "
                '`if __name__ == "__main__":`, and env.backend=sync shows what goes wrong'
            ) from e
        self.id, self.kinds, self._tells, tasks = self._exchange("about")
        return Hello((observation_space, action_space), tasks)

    @property
    def tells_exact(self) -> bool:
        return self._tells

    def tasks(self, split: str) -> Sequence[int | str]:
        found: Sequence[int | str] = self._ask("tasks", split)
        return found

    def kind(self, task: int | str) -> str:
        return str(self._ask("kind", task))

    def begin(self, task: int | str) -> Seen:
        self._task, self._done = task, []
        seen: Seen = self._ask("begin", task)
        return seen

    def act(self, words: str) -> Moved:
        moved: Moved = self._ask("act", words)
        self._done.append(words)
        return moved

    def exact(self) -> str:
        return str(self._ask("exact"))

    def solution(self, task: int | str) -> Sequence[str] | None:
        self._task = None
        found: Sequence[str] | None = self._ask("solution", task)
        return found

    def close(self) -> None:
        self._closed = True
        self._end()
        self._worker[0] = None

    def _start(self) -> None:
        with _starting:  # it changes this process's environment for a moment
            self._worker[0] = EnvWorker(worker_context(), self._slot, self._env_fn, False, self._env_id)

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Return what the game says, of a new worker where this one is lost."""
        for losses in range(MAX_LOSSES + 1):
            try:
                if losses:
                    self._repeat(method)
                return self._exchange(method, *arguments)
            except Lost as e:
                if self._closed:
                    raise
                log.warning("the worker of game %d %s; a new one goes on with its task", self._slot, e)
                worker, self._worker[0] = self._worker[0], None
                if worker is not None:
                    worker.kill()
        raise RloptError(
            f"the worker of game {self._slot} was lost {MAX_LOSSES + 1} times in a row; raise env.timeout (now "
            f"{self._timeout:g} s) or find out why the game dies with env.backend=sync"
        )

    def _repeat(self, method: str) -> None:
        """Bring a new worker to where the lost one stood when it was asked for ``method``."""
        self._start()
        self.connect()
        if self._task is not None and method != "begin":
            self._exchange("begin", self._task)
            for words in self._done:
                self._exchange("act", words)

    def _exchange(self, method: str, *arguments: Any) -> Any:
        worker = self._worker[0]
        if worker is None:
            raise RloptError("the game is closed")
        worker.send(b"t" + pickle.dumps((method, arguments)))
        return pickle.loads(self._receive(self._timeout))

    def _receive(self, seconds: float) -> bytes:
        worker = self._worker[0]
        assert worker is not None
        return worker.receive(time.monotonic() + seconds)
