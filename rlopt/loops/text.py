"""Learning from text games: groups of whole episodes in words, one update, and nothing is kept."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, Self

from rlopt.agents.gigpo_llm import GiGPOLLM, GiGPOLLMConfig
from rlopt.agents.text_rollout import TextEpisode, TextTurn, differing
from rlopt.config import changed
from rlopt.loops.base import Loop, Progress
from rlopt.loops.configuration import EnvConfig, EvalConfig, TrainConfig
from rlopt.loops.group import group_seeds
from rlopt.loops.metrics import MetricSums, add_metrics
from rlopt.loops.text_play import (
    MOST_GAMES,
    Games,
    Speaker,
    as_episode,
    demonstration,
    evaluate_words,
    open_games,
    play,
    words_of,
)
from rlopt.nn.language import TINY
from rlopt.policy import EvaluationMode
from rlopt.policy.language import LanguagePolicy
from rlopt.random import numpy_generator, torch_generator
from rlopt.registry import get_agent
from rlopt.types import Episode, RloptError, State, resolve_device

log = logging.getLogger(__name__)


class TextLoop(Loop):
    """Drives an agent that writes.

    One ``advance`` is one rollout of ``groups`` x ``group_size`` episodes, those of a group with one task, and the
    update from it; or, while the agent has to be shown how (``warm_start``), one round of demonstrations, and now and
    then a rollout that only looks how many tasks it solves by now. Every row of a rollout draws from a stream of its
    own, named by the rollout's number, so that an exact resume needs nothing of the games: whole episodes are played.

    Steps are what the agent, or a demonstration, did in a game. The rollout in which ``total_steps`` is reached stops
    there; it counts, but nothing is learnt from it.

    Args:
        games: ``groups`` x ``group_size`` copies.
        evaluation: the environment that evaluations run in.
    """

    modes = ("precision",)

    def __init__(
        self,
        agent: GiGPOLLM,
        games: Games,
        total_steps: int,
        evaluation: EnvConfig,
        protocol: EvalConfig,
        seed: int = 0,
    ) -> None:
        super().__init__(agent, total_steps)
        self.agent: GiGPOLLM = agent
        self.config: GiGPOLLMConfig = agent.config
        self.games, self.seed = games, seed
        self.group = [g for g in range(self.config.groups) for _ in range(self.config.group_size)]
        if len(games.copies) != len(self.group):
            raise RloptError(f"this TextLoop needs {len(self.group)} copies of the game")
        self.evaluation, self.protocol = evaluation, protocol
        self._evaluated: Games | None = None
        self.iteration = self.warmed = 0
        """Rollouts and rounds of demonstrations so far."""

    @classmethod
    def from_config(cls, config: TrainConfig) -> Self:
        options = config.agent
        assert isinstance(options, GiGPOLLMConfig)
        if config.eval.epsilon is not None:
            raise RloptError("eval.epsilon: a policy that writes takes no random actions; leave it out")
        games = open_games(config.env, options.groups * options.group_size)
        try:
            device = resolve_device(config.device)
            kind = get_agent(str(options.name))
            agent = kind(games.spec, options, seed=config.seed, device=device, precision=config.precision)
            return cls(agent, games, config.total_steps, config.env.for_evaluation(), config.eval, config.seed)
        except BaseException:
            games.close()
            raise

    @classmethod
    def resolve(cls, config: TrainConfig) -> TrainConfig:
        options, found = config.agent, dict[str, Any]()
        assert isinstance(options, GiGPOLLMConfig)
        if options.reward == "auto":
            found["reward"] = "raw"
        if options.model == TINY and not options.words:
            found["words"] = words_of(config.env, options, options.tasks)
        return replace(config, agent=changed(options, **found)) if found else config

    def advance(self) -> Progress:
        begin = perf_counter()
        if bool(self.agent.warming):
            return self._imitate()
        episodes, played = self._collect_differing() if self.config.resample else self._collect("group")
        shown = self._shown(played, "rollout", self.iteration - 1)
        middle = perf_counter()
        metrics: MetricSums = {}
        before = self.agent.clock.updates
        if episodes:
            add_metrics(metrics, self.agent.update(episodes).metrics)
        updates = self.agent.clock.updates - before
        return self._progress(played, metrics, updates, middle - begin, perf_counter() - middle, shown)

    def _progress(
        self,
        played: Sequence[TextEpisode],
        metrics: MetricSums,
        updates: int,
        env_seconds: float,
        learn_seconds: float,
        shown: list[dict[str, Any]],
    ) -> Progress:
        kinds = self.games.copies[0].kinds
        episodes = [as_episode(one, kinds) for one in played if one.complete]
        return Progress(episodes, metrics, updates, env_seconds, learn_seconds, shown)

    def _collect(self, stream: str) -> tuple[list[TextEpisode], list[TextEpisode]]:
        """Return what is to be learnt from in one rollout (nothing where it was cut), and all that was played."""
        c, number = self.config, self.iteration
        seeds = group_seeds(c, self.seed, number)
        tasks = [self.games.tasks[seeds[g] % len(self.games.tasks)] for g in self.group]
        streams = [torch_generator(self.seed, stream, number, "words", row) for row in range(len(tasks))]
        speaker = Speaker(self.agent.model, c, c.temperature, streams)
        played = play(
            self.games.copies, tasks, self.group, speaker, horizon=c.horizon, limit=self.total_steps - self.step,
            exact=c.anchored and (c.anchor == "exact" or self.games.copies[0].tells_exact), pool=self.games.pool,
        )  # fmt: skip
        self.iteration += 1
        self._count(sum(len(one.turns) for one in played))
        played = [one for one in played if one.turns]
        return (played if all(one.complete for one in played) else []), played

    def _collect_differing(self) -> tuple[list[TextEpisode], list[TextEpisode]]:
        """Return episodes of groups whose returns differ, out of one rollout and up to ``resample`` further ones; where
        there is no such group, the last rollout."""
        found: list[TextEpisode] = []
        every: list[TextEpisode] = []
        groups = 0
        for _ in range(1 + self.config.resample):
            episodes, played = self._collect("group")
            every += played
            if not episodes:
                return [], every
            for group in differing(episodes)[: self.config.groups - groups]:
                found += [one._replace(group=groups) for one in episodes if one.group == group]
                groups += 1
            if groups == self.config.groups or self.step >= self.total_steps:
                break
        return found or episodes, every

    def _imitate(self) -> Progress:
        """Learn from one round of demonstrations, and look at times whether they are enough."""
        c, begin, number = self.config, perf_counter(), self.warmed
        seeds = group_seeds(c, self.seed, number, "warm")
        turns: list[TextTurn] = []
        for g, seed in enumerate(seeds):
            task = self.games.tasks[seed % len(self.games.tasks)]
            draw = numpy_generator(self.seed, "warm", number, g)
            shown = demonstration(self.games.copies[0], task, self.agent.model, c, c.warm_noise, draw)
            turns += shown.turns[: self.total_steps - self.step - len(turns)]
        self._count(len(turns))
        self.warmed += 1
        middle = perf_counter()
        metrics: MetricSums = {}
        before = self.agent.clock.updates
        if self.step < self.total_steps:
            add_metrics(metrics, self.agent.imitate(turns).metrics)
        after, played, told = perf_counter(), list[TextEpisode](), list[dict[str, Any]]()
        done = self.warmed >= c.warm_start
        if c.warm_success is not None and (done or self.warmed % c.warm_every == 0) and self.step < self.total_steps:
            _, played = self._collect("look")
            told = self._shown(played, "look", self.warmed)
            solved = sum(one.success for one in played) / max(len(played), 1)
            log.info("after %d rounds of demonstrations %.0f %% are solved", self.warmed, 100.0 * solved)
            if done and solved < c.warm_success:
                log.warning(
                    "agent.warm_start=%d rounds of demonstrations were not enough for %.0f %%", self.warmed,
                    100.0 * c.warm_success,
                )  # fmt: skip
            done = done or solved >= c.warm_success
        if done:
            self.agent.end_warm_start()
        looked = perf_counter() - after
        updates = self.agent.clock.updates - before
        return self._progress(played, metrics, updates, middle - begin + looked, after - middle, told)

    def _count(self, steps: int) -> None:
        self.step += steps
        self.agent.clock.env_steps = self.step

    def _shown(self, played: Sequence[TextEpisode], phase: str, number: int) -> list[dict[str, Any]]:
        """Return lines for ``trajectories.jsonl``."""
        most = self.config.shown_groups
        kept = [one for one in played if most is None or one.group < most]
        return [one.told(phase=phase, number=number) for one in kept]

    def evaluate(self, episodes: int) -> list[Episode]:
        if self._evaluated is None:
            self._evaluated = open_games(self.evaluation, min(episodes, MOST_GAMES))
        policy, mode = self.policy(), self.evaluation_mode
        assert isinstance(policy, LanguagePolicy)
        return evaluate_words(policy, self._evaluated, episodes, self.seed, mode.deterministic, self.protocol.max_steps)

    @property
    def evaluation_mode(self) -> EvaluationMode:
        """How policies act where they are evaluated: as ``eval.mode`` says, else at ``evaluation_temperature``."""
        return EvaluationMode(self.protocol.mode == "deterministic")

    def state_dict(self) -> State:
        return {
            "step": self.step,
            "iteration": self.iteration,
            "warmed": self.warmed,
            "agent": self.agent.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue exactly, with the next rollout or round of demonstrations."""
        self.step, self.iteration, self.warmed = (int(state[name]) for name in ("step", "iteration", "warmed"))
        self.agent.load_state_dict(state["agent"])

    def close(self) -> None:
        self.games.close()
        if self._evaluated is not None:
            self._evaluated.close()
