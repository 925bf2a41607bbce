"""What the trainer drives. A new kind of agent gets a loop, never a special case in the trainer."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from rlopt.agents.base import Agent
from rlopt.config import changed, default_of
from rlopt.envs import Normalizer, VectorEnv
from rlopt.envs.atari import RAW, Protocol, protocol_of, refusal
from rlopt.envs.factory import find_spec
from rlopt.envs.make import find_backend, resolve_backend
from rlopt.loops.configuration import TrainConfig, schedule_end
from rlopt.loops.evaluation import Evaluator
from rlopt.policy import EvaluationMode, Policy
from rlopt.state import RowLog
from rlopt.types import Episode, Obs, RloptError, State

log = logging.getLogger(__name__)
MODES = ("num_envs", "num_runs", "overlap", "precision", "update_mode", "buffer")
"""Top-level options that not every loop has."""


class Progress(NamedTuple):
    """What one ``advance`` did."""

    episodes: list[Episode]
    """Training episodes that ended (a solver has none)."""
    metrics: dict[str, tuple[Tensor, int]]
    """Sums of 0-d tensors and how many each sums; empty where nothing was learnt."""
    updates: int
    """Updates applied."""
    env_seconds: float
    """Wall-clock time spent in environments, acting and storing."""
    learn_seconds: float
    """Wall-clock time spent drawing batches and updating."""
    trajectories: Sequence[Mapping[str, Any]] = ()
    """Lines for ``trajectories.jsonl``: episodes as they were seen, said and paid."""


class Loop(ABC):
    """One way of turning computation into a policy. A kind of loop adds ``from_config``, ``advance`` and its state to
    what stands here, and a name in ``rlopt.registry.LOOPS``, which agents give as their ``loop``."""

    unit: ClassVar[str] = "environment steps"
    """What ``step`` counts: ``environment steps`` or ``iterations``."""
    modes: ClassVar[tuple[str, ...]] = ()
    """Those of ``MODES`` that this loop has; a configuration that sets another one is refused."""

    def __init__(
        self,
        agent: Agent,
        total_steps: int,
        env: VectorEnv | None = None,
        evaluator: Evaluator | None = None,
        normalizer: Normalizer | None = None,
    ) -> None:
        self.agent, self.env, self.evaluator, self.normalizer = agent, env, evaluator, normalizer
        self.runs = agent.runs
        """Runs trained side by side; steps and updates are counted for one of them."""
        self.total_steps = total_steps
        """Reached exactly; ``advance`` never goes past it."""
        self.step = 0
        self.torn = False
        """Whether an error left ``advance`` in the middle: what is saved then begins new episodes when it goes on."""
        self._bad: str | None = None
        if env is not None and evaluator is not None:
            evaluator.tell_limit(env.spec)

    @classmethod
    def build(cls, config: TrainConfig) -> Self:
        """Return the loop that ``config`` describes, with its agent, environments and data.

        Raises RloptError where it sets a mode that this loop lacks, or where its parts do not fit each other.
        """
        for option in MODES:
            value = getattr(config, option)
            if option not in cls.modes and value != default_of(TrainConfig, option):
                word = getattr(value, "name", value)
                raise RloptError(f"{option}={word}: agent={config.agent.name} has no such mode; leave {option} out")
        return cls.from_config(config)

    @classmethod
    @abstractmethod
    def from_config(cls, config: TrainConfig) -> Self:
        """Do what ``build`` says; the modes have been checked."""

    @classmethod
    def resolve(cls, config: TrainConfig) -> TrainConfig:
        """Return ``config`` with what it leaves open decided: the environment's backend and protocol, what is made of
        rewards, the length of a schedule.

        Raises:
            RloptError: evaluations alone ask for what no protocol of the training's game has.
        """
        e, other = config.env, config.env.for_evaluation()
        backend = resolve_backend(e.id, e.backend, kwargs=e.kwargs, wrappers=e.wrappers, facts=e.facts)
        if e.backend == "auto" and find_backend(backend).protocols:
            why = refusal(find_spec(e.id), other.kwargs, bool(other.wrappers), bool(other.facts))
            if why is not None:
                raise RloptError(f"env.evaluation: {why}; {RAW}")
        asked = resolve_backend(other.id, e.backend, kwargs=other.kwargs, wrappers=other.wrappers, facts=other.facts)
        config = replace(config, env=replace(e, backend=backend if asked == backend else "sync"))
        protocol = None
        if find_backend(config.env.backend).protocols:
            protocol = protocol_of(find_spec(e.id), e.protocol)
            if e.protocol is None:
                log.info("%s is played by env.protocol=%s: %s", e.id, protocol.name, protocol.says)
            config = replace(config, env=replace(config.env, protocol=protocol.name))
        decided = cls.decide(config, protocol)
        return replace(config, agent=changed(config.agent, **decided)) if decided else config

    @classmethod
    def decide(cls, config: TrainConfig, protocol: Protocol | None) -> dict[str, Any]:
        """Return those of the agent's options that ``config`` leaves open and a loop decides, for an environment that
        is played by ``protocol``."""
        decided: dict[str, Any] = {}
        if getattr(config.agent, "reward", None) == "auto":
            decided["reward"] = "raw" if protocol is None else protocol.reward
        end = schedule_end(config)
        if end is not None and getattr(config.agent, "schedule_steps", end) is None:
            decided["schedule_steps"] = end
        return decided

    @abstractmethod
    def advance(self) -> Progress:
        """Do the smallest indivisible piece of work: a vector step and its updates, a group rollout, an iteration."""

    @abstractmethod
    def state_dict(self) -> State:
        """Return everything a bit-exact continuation needs, row logs excepted."""

    @abstractmethod
    def load_state_dict(self, state: State) -> None:
        """Continue from what ``state_dict`` gave."""

    def evaluate(self, episodes: int) -> list[Episode]:
        """Run evaluation episodes with the policy of every run; touches nothing that training uses."""
        return [] if self.evaluator is None else self.evaluator.evaluate_runs(self.policies(), episodes)

    def policies(self) -> list[Policy]:
        """Return what one deploys of every run, with its observation statistics and the mode in which it is
        evaluated."""
        policies = self.agent.policies
        if self.normalizer is not None:
            each = enumerate(policies)
            policies = [Policy(policy.spec, policy.actor, self.normalizer.of_run(r)) for r, policy in each]
        for policy in policies:
            policy.evaluation_mode = self.evaluation_mode
        return policies

    @property
    def evaluation_mode(self) -> EvaluationMode:
        """How policies act where they are evaluated: as the protocol says, and where it is silent as the agent does."""
        mode = self.agent.evaluation_mode
        return mode if self.evaluator is None else self.evaluator.mode_of(mode)

    def policy(self) -> Policy:
        """Return the first run's."""
        return self.policies()[0]

    def counters(self) -> dict[str, float]:
        """Return further numbers for each row of ``metrics.csv``, such as replaced workers."""
        restarts = getattr(self.env, "restarts", None)
        return {} if restarts is None else {"worker_restarts": float(restarts)}

    def updates_left(self) -> float | None:
        """Return how many updates are to be made from here to ``total_steps``; None where that cannot be told."""
        return None

    def idle_reason(self) -> str | None:
        """Return why this run, as it is configured, ends without a single update; None where it will learn."""
        return None

    def first_bad(self) -> str | None:
        """Return ``observation`` or ``reward`` where the environment gave a non-finite one, else what the agent's guard
        met first."""
        return self._bad or self.agent.guard.first_bad()

    def bad_now(self) -> bool:
        """Return whether the environment has given something non-finite; costs no waiting for the device."""
        return self._bad is not None

    def clear_bad(self) -> None:
        """Forget what ``first_bad`` reported, once it has been told."""
        self._bad = None
        self.agent.guard.clear()

    def results(self) -> dict[str, Tensor]:
        """Return what a complete run leaves beside its policy, by name; nothing unless the agent solves a model."""
        return {}

    def row_logs(self) -> dict[str, RowLog]:
        """Return append-only data, by name."""
        return {}

    def rows_restored(self) -> None:  # noqa: B027
        """Go on after ``load_state_dict`` once the row logs hold their rows again."""

    def close(self) -> None:
        """Release the environments. Safe to call twice."""
        if self.env is not None:
            self.env.close()
        if self.evaluator is not None:
            self.evaluator.close()


def normalizer_state(normalizer: Normalizer | None) -> State | None:
    """Return the statistics' state, None where nothing is normalised."""
    return None if normalizer is None else normalizer.state_dict()


def finite_rows(obs: Obs) -> Tensor:
    """Return (N,) true where every floating leaf of an observation (N, …) is finite."""
    leaves = list(obs.values()) if isinstance(obs, dict) else [obs]
    finite = torch.ones(leaves[0].shape[0], dtype=torch.bool, device=leaves[0].device)
    for leaf in leaves:
        if leaf.is_floating_point():
            # A sum is finite only if every element is, and it is one pass where ``isfinite().all()`` is two. In float64
            # none of finite float32 numbers overflows.
            finite = finite & leaf.reshape(len(leaf), -1).sum(1, dtype=torch.float64).isfinite()
    return finite
