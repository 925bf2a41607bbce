"""N Gymnasium environments in worker processes of their own, any of which may die or stall without ending the run."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import struct
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from rlopt.envs.arrays import Array
from rlopt.envs.base import ENDED, VALID, BaseVectorEnv, Env, Options, StepBuilder, ordinary_flags, row_seeds, rows_of
from rlopt.envs.edge import Edge
from rlopt.envs.processes import SAFE_PATH, end_with_parent, restore_safe_path, safe_path, worker_context
from rlopt.envs.snapshot import restore, snapshot
from rlopt.envs.spaces import ActionCodec, ObservationCodec
from rlopt.envs.sync import pack_state, unpack_state
from rlopt.envs.text.game import ask_game
from rlopt.types import EnvSpec, Obs, RloptError, State, Step

_log = logging.getLogger(__name__)
STARTUP = 120.0
"""Seconds that a worker has for its imports and for building the environment."""
MAX_LOSSES = 3
"""How often in a row one slot is replaced before the run ends, and how many that die while they start are started
again."""
_GRACE = 5.0
"""Seconds that a worker has to close its environment."""
_HEAD = struct.Struct("<BBB")
"""Terminated, truncated, whether a first observation follows the reward (float64) and the observation."""


class Lost(Exception):
    """A worker died or did not answer in time."""


class Died(Lost):
    """It died."""


def _swap(tree: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """``tree`` with every leaf of type ``kind`` changed: tensors travel between processes as NumPy arrays."""
    if isinstance(tree, dict):
        return {k: _swap(v, kind, change) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_swap(v, kind, change) for v in tree]
    return change(tree) if isinstance(tree, kind) else tree


def _answer(env: Env, edge: Edge, row: list[Array], message: bytes, autoreset: bool) -> bytes:
    """Return what a worker does with one message, a letter and its payload; ``row`` is room for one observation."""

    def packed() -> bytes:
        return b"".join(a.tobytes() for a in row)

    match message[:1]:
        case b"s":
            actions = edge.actions
            array = np.frombuffer(message, actions.dtype, offset=1).reshape(actions.row_shape).copy()
            reward = np.zeros((1, *edge.spec.reward_shape))
            end = edge.step(env, int(array) if actions.discrete else array, row, 0, reward)
            terminated, truncated, told = end or (False, False, [])
            again = autoreset and (terminated or truncated)
            numbers = np.array([*np.ravel(reward), *told], np.float64).tobytes()
            body = _HEAD.pack(terminated, truncated, again) + numbers + packed()
            if again:
                edge.reset(env, row, 0)
            return b"o" + body + (packed() if again else b"")
        case b"r":
            edge.reset(env, row, 0, *pickle.loads(message[1:]))
            return b"o" + packed()
        case b"g":
            state = snapshot(env)
            return b"d" + pickle.dumps(_swap(state, Tensor, lambda t: t.numpy()))
        case b"t":  # a text game, of which more is asked than of an environment
            return b"d" + pickle.dumps(ask_game(env, edge.spec.id, *pickle.loads(message[1:])))
        case b"p":
            restore(env, _swap(pickle.loads(message[1:]), np.ndarray, torch.from_numpy))
            return b"d"
    raise ValueError(f"unknown message {message[:1]!r}")


def _work(
    connection: Connection,
    env_fn: Callable[[], Env],
    autoreset: bool,
    env_id: str | None,
    users_safe_path: str | None,
    grace: float,
) -> None:
    """A worker's life: build, answer messages, end when the pipe does. ``users_safe_path`` is the trainer's
    PYTHONSAFEPATH, which holds for what the environment starts."""
    restore_safe_path(users_safe_path)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C and SIGTERM reach the whole group; the parent decides when we end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent(grace)
    torch.set_num_threads(1)
    env = None
    try:
        env = env_fn()
        edge = Edge(env, env_id)
        row = edge.observations.arrays(1)
        connection.send_bytes(b"d" + pickle.dumps((env.observation_space, env.action_space, edge.spec)))
        while (message := connection.recv_bytes()) != b"c":
            connection.send_bytes(_answer(env, edge, row, message, autoreset))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except Exception as e:
        first = (str(e).strip().splitlines() or [""])[0]
        summary = first if isinstance(e, RloptError) else f"{type(e).__name__}: {first}"
        with contextlib.suppress(OSError):
            connection.send_bytes(b"e" + pickle.dumps((summary, traceback.format_exc(), isinstance(e, RloptError))))
    finally:
        if env is not None:
            with contextlib.suppress(Exception):
                env.close()


class EnvWorker:
    """The parent's end of one worker."""

    def __init__(self, context: Any, slot: int, env_fn: Callable[[], Env], autoreset: bool, env_id: str | None) -> None:
        self.slot = slot
        self.connection, theirs = context.Pipe()
        arguments = (theirs, env_fn, autoreset, env_id, os.environ.get(SAFE_PATH), _GRACE)
        self.process = context.Process(target=_work, args=arguments, name=f"rlopt-env-{slot}", daemon=True)
        try:
            with safe_path():
                self.process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as e:
            raise RloptError(
                f"the environment cannot be sent to a worker process ({e}); use backend=sync, or wrappers and entry "
                "points that can be imported by name"
            ) from e
        finally:
            theirs.close()

    def send(self, message: bytes) -> None:
        try:
            self.connection.send_bytes(message)
        except OSError as e:
            raise Died("died") from e

    def receive(self, deadline: float) -> bytes:
        """Return the worker's next answer without its letter.

        Raises:
            Lost: it died, or did not answer before ``deadline`` (of ``time.monotonic``).
            RloptError: the environment raised an error.
        """
        try:
            if not self.connection.poll(max(0.0, deadline - time.monotonic())):
                raise Lost("did not answer in time")
            answer: bytes = self.connection.recv_bytes()
        except (EOFError, OSError) as e:
            raise Died("died") from e
        if answer[:1] == b"e":
            summary, trace, is_user_error = pickle.loads(answer[1:])
            if is_user_error:
                raise RloptError(summary)
            error = RloptError(f"environment {self.slot} failed: {summary}")
            error.add_note(f"in worker process {self.process.pid}:\n{trace}")
            raise error
        return answer[1:]

    def kill(self) -> None:
        self.connection.close()
        if self.process.pid is not None:
            self.process.kill()
            self.process.join()

    def close(self) -> None:
        """Ask it to close its environment; kill it where that takes more than a few seconds."""
        with contextlib.suppress(Lost):
            self.send(b"c")
        self.process.join(_GRACE)
        self.kill()


def end_workers(workers: list[EnvWorker | None]) -> None:
    """End all of them."""
    for worker in workers:
        if worker is not None:
            with contextlib.suppress(Lost):
                worker.send(b"c")  # all close at once; close() then waits for each
    for worker in workers:
        if worker is not None:
            worker.close()


class AsyncVectorEnv(BaseVectorEnv):
    """N environments in N worker processes, behind the contract of ``rlopt.envs.vector.VectorEnv``.

    Worth its cost where one environment step takes about a millisecond or more. A worker that dies, or that does not
    answer within ``timeout`` seconds, is replaced alone: its row of that step has ``valid`` false, ``ended`` true,
    reward 0, and the new environment's first observation in ``obs`` and ``next_obs``; the new environment's seed is
    ``derive_seed(seed, stream, slot, "restart", k)``, where k counts the slot's replacements from 1, or the one that
    ``ended`` was given if it was lost there. ``restarts`` counts all replacements; once it is not zero the run is no
    longer reproducible to the bit. A Python error inside an environment is not hidden: it ends the run.

    Scripts must build it under ``if __name__ == "__main__":``, as for any worker process that Python starts afresh.

    Args:
        env_fns: one picklable function per environment, each building it.
        timeout: seconds that a step or a reset may take.
        options: see ``Options``.

    Raises:
        RloptError: no environment, a space without translation, an environment that cannot be built or sent to a
            process, one that raises an error, or a slot whose worker is lost more than three times in a row.
    """

    def __init__(
        self, env_fns: Sequence[Callable[[], Env]], *, timeout: float = 60.0, **options: Unpack[Options]
    ) -> None:
        super().__init__(len(env_fns), **options)
        if timeout <= 0:
            raise RloptError(f"timeout={timeout} must be above 0 seconds")
        self.timeout, self._fns = timeout, list(env_fns)
        self._context = worker_context()
        self._workers: list[EnvWorker | None] = [None] * self.num_envs
        self._lost = [0] * self.num_envs  # replacements of each slot
        self._lost_in_a_row = [0] * self.num_envs
        self._dead_at_start = 0
        self._ended = [False] * self.num_envs
        # One that is never closed must end its workers before multiprocessing's exit hook (of priority 0) waits for
        # them for ever: they ignore its SIGTERM.
        self._end = Finalize(self, end_workers, (self._workers,), exitpriority=10)
        try:
            for slot in range(self.num_envs):
                self._workers[slot] = self._worker(slot)
            hellos = [self._hello(slot) for slot in range(self.num_envs)]
        except BaseException:
            self.close()
            raise
        observation_space, action_space, spec = hellos[0]
        if any(hello[:2] != hellos[0][:2] for hello in hellos):
            self.close()
            raise RloptError("the environments of one vector must have equal observation and action spaces")
        self._observations, self._actions = ObservationCodec(observation_space), ActionCodec(action_space)
        self.spec: EnvSpec = spec
        self._current = self._observations.arrays(self.num_envs)
        self._steps = StepBuilder(self.spec, self.num_envs, self.device)

    @property
    def restarts(self) -> int:
        """How many workers were replaced so far."""
        return sum(self._lost)

    def _begin(
        self,
        seeds: Sequence[int] | None,
        mask: Tensor | None,
        options: dict[str, Any] | None,
        noise_seeds: Sequence[int] | None,
    ) -> Obs:
        first, noise = row_seeds(seeds, self.num_envs), row_seeds(noise_seeds, self.num_envs)
        rows = rows_of(mask, self.num_envs)
        answers = self._exchange({i: b"r" + pickle.dumps((first[i], options, noise[i])) for i in rows})
        for i in rows:
            answer = answers[i]
            if answer is None:
                self._replace(i, first[i], options, noise[i])
            else:
                self._unpack(i, answer, 0)
            self._ended[i] = False
        return self._observations.tensors(self._current, self._away)

    def step(self, action: Tensor) -> Step:
        """Step all rows; see ``VectorEnv.step``."""
        if not self._started:
            raise self._not_begun()
        actions = self._actions.batch(action, self.num_envs)
        answers = self._exchange({i: b"s" + actions[i].tobytes() for i in range(self.num_envs) if not self._ended[i]})
        reward = np.zeros((self.num_envs, *self.spec.reward_shape), np.float32)
        flags = ordinary_flags(self.num_envs)
        facts = np.full((self.num_envs, len(self.spec.facts)), np.nan, np.float32)
        paid = reward[0].size
        firsts: list[tuple[int, bytes, int]] = []
        for i in range(self.num_envs):
            answer = answers.get(i)
            if answer is None:
                flags[VALID, i] = False
                continue
            self._lost_in_a_row[i] = 0
            terminated, truncated, again = _HEAD.unpack_from(answer)
            numbers = np.frombuffer(answer, np.float64, paid + facts.shape[1], _HEAD.size)
            reward[i], facts[i] = numbers[:paid].reshape(reward.shape[1:]), numbers[paid:]
            flags[:VALID, i] = terminated, truncated, terminated or truncated
            end = self._unpack(i, answer, _HEAD.size + numbers.nbytes)
            if again:
                firsts.append((i, answer, end))
            elif terminated or truncated:
                self._ended[i] = True
        for i in [i for i, answer in answers.items() if answer is None]:
            self._replace(i)
            flags[ENDED, i] = True
        next_obs = observed = self._observations.tensors(self._current, self._away)
        if firsts:
            for i, answer, offset in firsts:
                self._unpack(i, answer, offset)
            observed = self._observations.tensors(self._current, self._away)
        ordinary = not flags[:VALID].any() and flags[VALID].all()
        return self._steps.build(observed, next_obs, reward, None if ordinary else flags, facts)

    def state_dict(self) -> State | None:
        """Return the exact state of all environments (see ``rlopt.envs.snapshot``), or None where one of them cannot be
        saved or was lost."""
        if not self._started:
            return None
        answers = self._exchange(dict.fromkeys(range(self.num_envs), b"g"))
        trees = [None if a is None else pickle.loads(a) for a in answers.values()]
        if any(tree is None for tree in trees):
            return None
        states = [_swap(tree, np.ndarray, torch.from_numpy) for tree in trees]
        return {**pack_state(states, self._current, self._ended), "lost": list(self._lost)}

    def load_state_dict(self, state: State) -> Obs:
        """Continue where ``state_dict`` stood; returns the observations to act on.

        Raises:
            RloptError: the state is of another number of environments, or of another environment.
        """
        states = unpack_state(state, self._current, self._ended)
        self._lost = [int(k) for k in state.get("lost", [0] * self.num_envs)]
        messages = {i: b"p" + pickle.dumps(_swap(s, Tensor, lambda t: t.cpu().numpy())) for i, s in enumerate(states)}
        lost = [i for i, answer in self._exchange(messages).items() if answer is None]
        if lost:
            raise RloptError(f"the worker of environment {lost[0]} died while its saved state was put back")
        self._started = True
        return self._observations.tensors(self._current, self._away)

    def _release(self) -> None:
        self._end()

    def _worker(self, slot: int) -> EnvWorker:
        return EnvWorker(self._context, slot, self._fns[slot], self.autoreset, self._env_id)

    def _hello(self, slot: int) -> Any:
        """Return what the worker of ``slot`` says first. One that dies before it can is started again."""
        worker = self._workers[slot]
        assert worker is not None
        try:
            return pickle.loads(worker.receive(time.monotonic() + max(STARTUP, self.timeout)))
        except Lost as e:
            if isinstance(e, Died) and self._dead_at_start < MAX_LOSSES:
                self._dead_at_start += 1
                _log.warning("the worker of environment %d died while starting; it is started again", slot)
                worker.kill()
                self._workers[slot] = self._worker(slot)
                return self._hello(slot)
            raise RloptError(
                f"the worker of environment {slot} {e} while starting; a script must build it under "
                '`if __name__ == "__main__":`, and backend=sync shows what goes wrong'
            ) from e

    def _exchange(self, messages: dict[int, bytes]) -> dict[int, bytes | None]:
        """Send each worker its message and collect the answers; None for a worker that was lost (and is gone now)."""
        if self._closed:
            raise RloptError("the environment is closed")
        answers: dict[int, bytes | None] = {}
        reasons: dict[int, str] = {}
        for slot, message in messages.items():
            worker = self._workers[slot]
            try:
                if worker is None:
                    raise Lost("was gone")
                worker.send(message)
            except Lost as e:
                reasons[slot] = str(e)
        deadline = time.monotonic() + self.timeout
        try:
            for slot in messages:
                worker = self._workers[slot]
                answers[slot] = None
                if slot in reasons or worker is None:
                    continue
                try:
                    answers[slot] = worker.receive(deadline)
                except Lost as e:
                    reasons[slot] = str(e)
        except BaseException:  # also Ctrl-C: answers left in the pipes would be taken for those of the next step
            self.close()
            raise
        for slot, reason in reasons.items():
            worker = self._workers[slot]
            if worker is not None:
                _log.warning("the worker of environment %d %s", slot, reason)
                worker.kill()
                self._workers[slot] = None
        return answers

    def _replace(
        self,
        slot: int,
        seed: int | None = None,
        options: dict[str, Any] | None = None,
        noise_seed: int | None = None,
    ) -> None:
        """A new worker for ``slot``, reset with ``seed`` (its own restart seed without one); its first observation
        becomes the current one."""
        while True:
            self._lost[slot] += 1
            self._lost_in_a_row[slot] += 1
            if self._lost_in_a_row[slot] > MAX_LOSSES:
                self.close()
                raise RloptError(
                    f"the worker of environment {slot} was lost {MAX_LOSSES + 1} times in a row; "
                    f"raise env.timeout (now {self.timeout:g} s) or find out why the environment dies with backend=sync"
                )
            restart = self._seed_of(slot, "restart", self._lost[slot])
            _log.warning(
                "environment %d is replaced (restart %d): the run is no longer reproducible to the bit",
                slot,
                self._lost[slot],
            )
            self._workers[slot] = self._worker(slot)
            self._hello(slot)
            message = b"r" + pickle.dumps((restart if seed is None else seed, options, noise_seed))
            answer = self._exchange({slot: message})[slot]
            if answer is not None:
                self._unpack(slot, answer, 0)
                self._ended[slot] = False
                return

    def _unpack(self, row: int, answer: bytes, offset: int) -> int:
        """Copy one packed observation into the current ones; returns where it ends."""
        for array in self._current:
            target: Array = array[row : row + 1]
            flat = np.frombuffer(answer, target.dtype, target.size, offset)
            target[...] = flat.reshape(target.shape)
            offset += target.nbytes
        return offset
