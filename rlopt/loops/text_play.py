"""Playing text games: episodes side by side, evaluations, demonstrations, and the words of a game."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import Space
from torch import Tensor

from rlopt.agents.text_rollout import TextEpisode, TextTurn
from rlopt.envs.factory import EnvFactory, find_spec
from rlopt.envs.make import TIMEOUT
from rlopt.envs.text.game import Moved, Seen, TextGame, text_game
from rlopt.envs.text.remote import RemoteGame
from rlopt.loops.configuration import EnvConfig
from rlopt.nn.language import LanguageModel, pieces
from rlopt.policy.language import Answer, AnswerConfig, LanguagePolicy, ask, demonstrated
from rlopt.policy.prompts import Past, PromptConfig, answer, question
from rlopt.random import numpy_generator, torch_generator
from rlopt.types import EnvSpec, Episode, RloptError

TRIED, WANDERED, WORDS = 64, 40, 16_384
"""Tasks whose words are looked at, random actions in each, and words at most."""
TELL_EVERY = 5.0
"""Seconds between two lines of progress while the words of slow games are read."""
MOST_GAMES = 64
"""Copies of a game in an evaluation."""
Asking = Callable[[list[int], list[Seen], list[list[Past]]], list[Answer]]
"""``(rows, seen, past) → answers`` of those rows."""
_log = logging.getLogger(__name__)


class Games(NamedTuple):
    """Copies of one text game."""

    copies: list[TextGame]
    tasks: list[int | str]
    spec: EnvSpec
    pool: ThreadPoolExecutor | None = None
    """What waits for all copies at once, where each is in a process of its own."""

    def close(self) -> None:
        """Close every copy. Safe to call twice."""
        for game in self.copies:
            game.close()
        if self.pool is not None:
            self.pool.shutdown()


def open_games(config: EnvConfig, copies: int) -> Games:
    """Return ``copies`` of the text game that ``config`` names, with ``env.backend=async`` in workers.

    Raises:
        RloptError: it is no text game, or an option is set that text games lack.
    """
    for name in ("wrappers", "normalize_obs", "normalize_reward", "protocol"):
        if getattr(config, name):
            raise RloptError(f"env.{name}: a game that is played in words has no such option; leave it out")
    remote = config.backend == "async"
    if not remote and config.backend not in ("auto", "sync"):
        raise RloptError(
            f"env.backend={config.backend}: text games are played in this process (sync) or in workers (async)"
        )
    if not remote and config.timeout != TIMEOUT:
        raise RloptError(f"env.timeout={config.timeout:g} is of workers; leave it out, or give env.backend=async")
    factory = EnvFactory(find_spec(config.id), config.kwargs)
    if remote:
        return _open_workers(config, factory, copies)
    found: list[TextGame] = []
    try:
        for _ in range(copies):
            env = factory()
            try:
                game, tasks = text_game(env, config.id)
            except RloptError:
                env.close()
                raise
            found.append(game)
        return Games(found, tasks, _spec(config, found[0], env.observation_space, env.action_space))
    except BaseException:
        for game in found:
            game.close()
        raise


def _open_workers(config: EnvConfig, factory: EnvFactory, copies: int) -> Games:
    found: list[RemoteGame] = []
    try:
        for slot in range(copies):
            found.append(RemoteGame(factory, config.id, slot, config.timeout))
        hellos = [game.connect() for game in found]
        return Games(
            list(found), hellos[0].tasks, _spec(config, found[0], *hellos[0].spaces), ThreadPoolExecutor(copies)
        )
    except BaseException:
        for game in found:
            game.close()
        raise


def _spec(config: EnvConfig, game: TextGame, observation_space: Space[Any], action_space: Space[Any]) -> EnvSpec:
    facts = ("success", *(f"success/{kind}" for kind in game.kinds))
    if unknown := [name for name in config.facts if name not in facts]:
        raise RloptError(f"env.facts: {config.id} tells {', '.join(facts)}, and not {unknown[0]}")
    return EnvSpec(config.id, observation_space, action_space, facts=facts)


def play(
    games: Sequence[TextGame],
    tasks: Sequence[int | str],
    groups: Sequence[int],
    asking: Asking,
    *,
    horizon: int | None = None,
    limit: int | None = None,
    exact: bool = False,
    pool: Executor | None = None,
) -> list[TextEpisode]:
    """Play one episode of each task, side by side, and return them; those that are over are not asked any longer.

    Args:
        groups: whose episode each is.
        horizon: steps after which an episode is over.
        limit: steps of all together, after which those that go on are left as they are, not complete.
        exact: whether the true states are noted.
        pool: what waits for several games at once (in turn without).
    """
    at_once = map if pool is None else pool.map
    seen = list(at_once(_begin, games, tasks))
    past: list[list[Past]] = [[] for _ in tasks]
    turns: list[list[TextTurn]] = [[] for _ in tasks]
    success, alive, taken = [False] * len(tasks), list(range(len(tasks))), 0
    complete = [False] * len(tasks)
    while alive and (limit is None or taken < limit):
        rows = alive if limit is None else alive[: limit - taken]
        answers = asking(rows, [seen[r] for r in rows], [past[r] for r in rows])
        true = list(at_once(_exact, [games[r] for r in rows])) if exact else [None] * len(rows)
        done = list(at_once(_act, [games[r] for r in rows], [said.action for said in answers]))
        for r, said, moved, state in zip(rows, answers, done, true, strict=True):
            turns[r].append(TextTurn(seen[r], said, moved.reward, state))
            past[r].append(Past(seen[r].text, said.action))
            over = horizon is not None and len(turns[r]) >= horizon
            seen[r], success[r] = moved.seen, moved.success
            complete[r] = moved.terminated or moved.truncated or over
        taken += len(rows)
        alive = [r for r in alive if not complete[r]]
    kinds = [game.kind(task) for game, task in zip(games, tasks, strict=True)]
    rows_ = zip(tasks, kinds, groups, turns, complete, success, strict=True)
    return [TextEpisode(*row) for row in rows_]


def _begin(game: TextGame, task: int | str) -> Seen:
    return game.begin(task)


def _exact(game: TextGame) -> str:
    return game.exact()


def _act(game: TextGame, words: str) -> Moved:
    return game.act(words)


class Speaker:
    """Asks a model for all rows, each of which has a stream of its own.

    Args:
        streams: one generator for each row; None for the likeliest answers.
    """

    def __init__(
        self, model: LanguageModel, config: AnswerConfig, temperature: float, streams: list[torch.Generator] | None
    ) -> None:
        self.model, self.config, self.temperature, self.streams = model, config, temperature, streams
        self.tokens = 0
        """That were said so far."""

    def __call__(self, rows: list[int], seen: list[Seen], past: list[list[Past]]) -> list[Answer]:
        noise: Tensor | None = None
        if self.streams is not None:
            width = self.config.max_tokens if self.config.answers == "generate" else 1
            noise = torch.stack([torch.rand(width, generator=self.streams[r], dtype=torch.float64) for r in rows])
        found = ask(self.model, self.config, seen, past, noise, self.temperature)
        self.tokens += sum(len(said.tokens) for said in found)
        return found


def as_episode(played: TextEpisode, kinds: Sequence[str]) -> Episode:
    """Return what tables say of an episode: its raw return, and success, of its kind of task too."""
    facts = {"success": float(played.success)}
    facts |= {f"success/{kind}": facts["success"] for kind in kinds if kind == played.kind}
    return Episode(played.total, len(played.turns), facts=facts)


def evaluate_words(
    policy: LanguagePolicy,
    games: Games,
    episodes: int,
    seed: int,
    deterministic: bool,
    max_steps: int | None = None,
) -> list[Episode]:
    """Play episode i with task i of the list (which begins anew after its last), as often as there are copies of the
    game at once; the same answers every time."""
    found: list[Episode] = []
    for first in range(0, episodes, len(games.copies)):
        numbers = range(first, min(first + len(games.copies), episodes))
        streams = None if deterministic else [torch_generator(seed, "evaluation", "words", i) for i in numbers]
        speaker = Speaker(policy.model, policy.config, policy.config.evaluation_temperature, streams)
        tasks = [games.tasks[i % len(games.tasks)] for i in numbers]
        played = play(games.copies[: len(tasks)], tasks, [0] * len(tasks), speaker, horizon=max_steps, pool=games.pool)
        found += [as_episode(one, games.copies[0].kinds) for one in played]
    return found


def demonstration(
    game: TextGame, task: int | str, model: LanguageModel, c: AnswerConfig, noise: float, draw: np.random.Generator
) -> TextEpisode:
    """Return an episode in which the game's own solution is done; with the share ``noise`` of steps whose answer is
    another possible action, though the solution is what is done.

    Raises:
        RloptError: nobody knows how to solve this game.
    """
    solution = game.solution(task)
    if solution is None:
        raise RloptError(f"agent.warm_start: {game.id} knows no solutions of its tasks; leave it out")
    seen, past, turns, complete, success = game.begin(task), list[Past](), list[TextTurn](), False, False
    for action in solution:
        words, others = action, [one for one in seen.admissible if one != action]
        if others and draw.random() < noise:
            words = others[int(draw.integers(len(others)))]
        moved = game.act(action)
        turns.append(TextTurn(seen, demonstrated(model, c, seen, past, words), moved.reward))
        past.append(Past(seen.text, action))
        seen, complete, success = moved.seen, moved.terminated or moved.truncated, moved.success
        if complete:
            break
    return TextEpisode(task, game.kind(task), 0, turns, complete, success)


def words_of(config: EnvConfig, c: PromptConfig, tasks: int | None) -> tuple[str, ...]:
    """Return what a game's texts are made of, in alphabetical order: those of its tasks (and of the tasks that are
    evaluated), of their solutions, and of what random actions lead to."""
    found, told = set(pieces(answer("", c))), perf_counter()
    for one, most in ((config, tasks), (config.for_evaluation(), None)):
        with opened(one) as games:
            game = games.copies[0]
            tried = games.tasks[:most][:TRIED]
            for i, task in enumerate(tried):
                if perf_counter() - told > TELL_EVERY:
                    told = perf_counter()
                    _log.info("reading the words of %s for tiny-qwen2: task %d of %d", one.id, i + 1, len(tried))
                for actions in (iter(game.solution(task) or ()), _wandering(task)):
                    for text in _texts(game, task, c, actions):
                        found.update(pieces(text))
        if config.for_evaluation() is config:
            break
    if len(found) > WORDS:
        raise RloptError(f"{config.id} has {len(found)} words, too many for tiny-qwen2; give agent.model=…")
    return tuple(sorted(found))


@contextmanager
def opened(config: EnvConfig) -> Iterator[Games]:
    """Open one copy of a game for a while."""
    games = open_games(config, 1)
    try:
        yield games
    finally:
        games.close()


def _wandering(task: int | str) -> Iterator[float]:
    draw = numpy_generator(0, "words", task)
    return (float(draw.random()) for _ in range(WANDERED))


def _texts(game: TextGame, task: int | str, c: PromptConfig, actions: Iterator[str] | Iterator[float]) -> Iterator[str]:
    """Yield prompts and answers along ``actions``, words or numbers in [0, 1) that choose among the possible ones."""
    seen, past = game.begin(task), list[Past]()
    while True:
        yield question(seen, past, c, c.think)
        yield from (answer(words, c) for words in seen.admissible)
        chosen: Any = next(actions, None)
        if isinstance(chosen, float):
            chosen = seen.admissible[math.floor(chosen * len(seen.admissible))] if seen.admissible else None
        if not isinstance(chosen, str):
            return
        yield answer(chosen, c)
        moved = game.act(chosen)
        past.append(Past(seen.text, chosen))
        seen = moved.seen
        if moved.terminated or moved.truncated:
            yield question(seen, past, c, c.think)
            return
