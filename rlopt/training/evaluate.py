"""Evaluation of saved policies: of a run folder, exactly as training did it, or of a policy folder."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlopt import hub
from rlopt.analysis.statistics import mean_interval
from rlopt.config import build
from rlopt.envs import VectorEnv, make_env
from rlopt.envs.make import resolve_backend, stepping_device
from rlopt.loops.configuration import EnvConfig, EvalConfig
from rlopt.loops.evaluation import Evaluator, check_spaces
from rlopt.loops.text_play import MOST_GAMES, evaluate_words, open_games
from rlopt.policy import EvaluationMode, Policy, load_policy, run_policies
from rlopt.policy.folder import DESCRIPTION
from rlopt.policy.language import LanguagePolicy
from rlopt.runs.run_folder import RunFolder
from rlopt.state import tag_floats
from rlopt.training.saved import MAX_STEPS, refuse_names, saved_settings
from rlopt.training.video import drawn_environment, record_episode
from rlopt.types import Episode, RloptError

log = logging.getLogger(__name__)

MAX_EPISODES = 10_000
"""More are not run because a file says so."""
MAX_THREADS = 1_024


@dataclass(frozen=True)
class Evaluation:
    """What evaluating a policy found. Returns are undiscounted sums of raw rewards."""

    episodes: list[Episode]
    env_id: str
    seed: int
    mode: EvaluationMode = EvaluationMode()  # noqa: RUF009 - a tuple
    meta: dict[str, Any] = field(default_factory=dict)
    """How the policy was trained, as its folder says."""

    @property
    def returns(self) -> list[float]:
        return [episode.total_reward for episode in self.episodes]

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """Standard deviation over episodes (n - 1 in the denominator); NaN for one episode."""
        return float(np.std(self.returns, ddof=1)) if len(self.episodes) > 1 else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The mean's 95 % interval by Student's t: mean ± t(n - 1) · std / √n; NaN for one episode."""
        found = mean_interval(self.returns)
        return found.low, found.high

    @property
    def min(self) -> float:
        return min(self.returns)

    @property
    def max(self) -> float:
        return max(self.returns)

    @property
    def facts(self) -> dict[str, float]:
        """Means over the episodes of what they were beside their return, by name."""
        names = dict.fromkeys(name for episode in self.episodes for name in episode.facts)
        return {name: float(np.mean([e.facts[name] for e in self.episodes if name in e.facts])) for name in names}

    def to_json(self) -> dict[str, Any]:
        """Return plain values; what is not finite is None, in ``policy`` tagged as ``rlopt.state.tag_floats`` does."""
        numbers = {
            "mean": self.mean,
            "std": self.std,
            "interval_low": self.interval[0],
            "interval_high": self.interval[1],
            "min": self.min,
            "max": self.max,
        }
        return {
            "env": self.env_id,
            "seed": self.seed,
            **self.mode._asdict(),
            **{name: _finite(value) for name, value in numbers.items()},
            "facts": {name: _finite(value) for name, value in self.facts.items()},
            "episodes": [
                {"return": _finite(e.total_reward), "length": e.length, **{k: _finite(v) for k, v in e.facts.items()}}
                for e in self.episodes
            ],
            "policy": tag_floats(self.meta),
        }


def describe(evaluation: Evaluation) -> str:
    """Return one line: ``mean return -148.2, 95% interval [-170.0, -126.4] over 20 episodes (Pendulum-v1)``, and the
    means of facts where there are some."""
    n = len(evaluation.episodes)
    facts = "".join(f"; {name} {value:.3g}" for name, value in evaluation.facts.items())
    if n == 1:
        return f"return {evaluation.mean:.1f} in 1 episode ({evaluation.env_id}){facts}"
    low, high = evaluation.interval
    interval = f"95% interval [{low:.1f}, {high:.1f}]"
    return f"mean return {evaluation.mean:.1f}, {interval} over {n} episodes ({evaluation.env_id}){facts}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# Saved policies


def evaluate_path(
    path: Path | str,
    episodes: int | None = None,
    *,
    env_id: str | None = None,
    mode: str = "agent",
    epsilon: float | None = None,
    max_steps: int | None = None,
    seed: int | None = None,
    video: Path | str | None = None,
    device: str | torch.device = "cpu",
    run: int | None = None,
    trust: bool = False,
) -> Evaluation:
    """Evaluate the policy of a run folder (its last one), of a policy folder, or at ``hub:user/name``.

    Without further arguments a run's final evaluation is repeated exactly: as many episodes (``eval.episodes``), the
    same seeds, the environment of ``config.yaml``, the statistics frozen with the policy. A policy folder tells its
    environment and seed itself; the default is then 20 episodes, or its run's where it lies in one.

    The ``config.yaml`` of a run of this user's may name modules of environments and wrappers, which are imported, just
    as training did. A run or a policy from elsewhere may only name what Gymnasium registers and its own wrappers.

    Args:
        env_id: another environment with the same spaces; it keeps the wrappers but not ``env.kwargs``.
        mode: ``deterministic`` for the most likely actions, ``sample``, or ``agent``: as it was evaluated in training,
            which the policy remembers; so too ``epsilon``, the fraction of actions that are random all the same.
        max_steps: steps after which an episode is cut off; the run's by default (``eval.max_steps``).
        seed: of the episodes; the run's by default.
        video: an mp4 file for episode 0.
        run: which policy, where a run folder holds those of several runs.
        trust: whether what a run or policy from elsewhere names may be imported.

    Raises:
        RloptError: no policy there, a configuration that is not what was trained, an environment that does not fit or
            may not be imported, or a video that cannot be made.
    """
    path = hub.local(path)
    policy = load_policy(path if run is None else run_policies(path)[run], device)
    env, settings = environment_of(path, policy, env_id, trust)
    home = run_of(path)
    values = policy.meta if home is None else saved_settings(home).values
    told = build(EvalConfig, values.get("eval", {}), "eval")
    if episodes is None and (episodes := 20 if home is None else told.episodes) > MAX_EPISODES:
        raise RloptError(f"{path} asks for {episodes} episodes; say how many (episodes=, --episodes)")
    if max_steps is None and (max_steps := told.max_steps) is not None and max_steps > MAX_STEPS:
        raise RloptError(f"{path} asks for episodes of {max_steps} steps; say how many (max_steps=, --max-steps)")
    given = {"episodes": episodes, "mode": mode, "epsilon": epsilon, "max_steps": max_steps}
    protocol = build(EvalConfig, given, "")
    if seed is None:
        seed = (settings if run is None else policy.meta).get("seed", 0)
        if not isinstance(seed, int):
            raise RloptError(f"{path} names no seed that is a whole number; give one (seed=, --seed)")

    if isinstance(policy, LanguagePolicy):
        found = _evaluated_in_words(policy, env, seed, protocol, settings, video)
        acting = EvaluationMode(protocol.mode == "deterministic")
        return Evaluation(found, env.id, seed, acting, policy.meta)
    backend = resolve_backend(env.id, env.backend, kwargs=env.kwargs, wrappers=env.wrappers, facts=env.facts)

    def make(n: int) -> VectorEnv:
        made = make_env(
            env.id, n, seed=seed, backend=backend, device=stepping_device(backend, policy.device), autoreset=False,
            kwargs=env.kwargs, wrappers=env.wrappers, facts=env.facts, timeout=env.timeout,
            stream="evaluation", evaluation=True, protocol=env.protocol,
        )  # fmt: skip
        try:
            check_spaces(policy.spec, made.spec)
        except RloptError:
            made.close()
            raise
        return made

    evaluator = Evaluator(make, seed, False, protocol.max_steps, protocol.mode, protocol.epsilon)
    acting = evaluator.mode_of(policy.evaluation_mode)
    with _threads(settings.get("threads", "auto")):
        try:
            evaluator.prepare(protocol.episodes)
            if video is not None:  # before the evaluation, because it fails where there is no graphics stack
                drawn = partial(drawn_environment, env, seed, policy.device)
                record_episode(policy, drawn, Path(video), seed, acting, protocol.max_steps)
            found = evaluator.evaluate(policy, protocol.episodes, acting)
        finally:
            evaluator.close()
    return Evaluation(found, env.id, seed, acting, policy.meta)


def _evaluated_in_words(
    policy: LanguagePolicy,
    env: EnvConfig,
    seed: int,
    protocol: EvalConfig,
    settings: Mapping[str, Any],
    video: Path | str | None,
) -> list[Episode]:
    """Return episodes of a policy that writes, exactly as training evaluates it."""
    if video is not None:
        raise RloptError("video: a text game shows nothing; look into the run's trajectories.jsonl")
    if protocol.epsilon is not None:
        raise RloptError("epsilon: a policy that writes takes no random actions; leave it out")
    with _threads(settings.get("threads", "auto")):
        games = open_games(replace(env, evaluation={}), min(protocol.episodes, MOST_GAMES))
        try:
            deterministic = protocol.mode == "deterministic"
            return evaluate_words(policy, games, protocol.episodes, seed, deterministic, protocol.max_steps)
        finally:
            games.close()


def run_of(path: Path) -> RunFolder | None:
    """Return the run that ``path`` is, or to whose ``policy/`` or ``policy_best/`` it belongs."""
    whole = Path(os.path.abspath(path))
    owners = [folder.parent for folder in (whole, whole.parent) if folder.name in ("policy", "policy_best")]
    runs = (RunFolder(folder) for folder in (whole, *owners))
    return next((run for run in runs if run.config_path.is_file()), None)


def environment_of(
    path: Path, policy: Policy, env_id: str | None = None, trust: bool = False
) -> tuple[EnvConfig, Mapping[str, Any]]:
    """Return the environment to evaluate ``policy`` in, from its run's configuration or from what a policy folder says
    of itself, and these settings whole. See ``evaluate_path`` for what may be named where."""
    settings: Mapping[str, Any] = policy.meta
    if (path / "config.yaml").is_file():
        found = saved_settings(RunFolder(path))
        settings, own = found.values, found.own
    else:
        own = _names_the_same(path, policy.meta.get("env"))
        if path.is_dir() and not (path / DESCRIPTION).is_file():
            log.warning("%s has no config.yaml: what its policy says of itself is used", path)
    env = build(EnvConfig, settings.get("env", {"id": policy.spec.id}), "env").for_evaluation()
    if not (own or trust):
        refuse_names(env, path, env_id, "--env ")
    if env_id is not None and env_id != env.id:
        env = replace(env, id=env_id, kwargs={}, backend="auto", facts=())  # these are the other one's
    return env, settings


def _names_the_same(path: Path, env: Any) -> bool:
    """Return whether the policy at ``path`` lies in a run of this user's, in the environment that it names."""
    with suppress(RloptError):
        if (run := run_of(path)) is not None:
            found = run.settings()
            return found.own and found.values.get("env") == env
    return False


@contextmanager
def _threads(threads: Any) -> Iterator[None]:
    """Return the run's number of torch threads, because sums are rounded differently with another."""
    if isinstance(threads, int) and threads > MAX_THREADS:
        raise RloptError(f"the run's configuration asks for {threads} threads, more than {MAX_THREADS}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads if isinstance(threads, int) and threads > 0 else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
