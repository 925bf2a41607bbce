"""Evaluation: how good a policy is, on environments and random streams that training never touches.

Episode i has a seed of its own and a slot of its own; a slot whose episode has ended idles until the others have.
Nothing is cut off or counted twice, so neither short nor long episodes are preferred, and the same policy, seed and
number of episodes give the same returns, bit for bit on the same machine, whenever they are asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from time import monotonic

import torch

from rlopt.envs import VectorEnv
from rlopt.loops.episodes import EpisodeCounter
from rlopt.policy import EvaluationMode, Policy
from rlopt.random import derive_seed, torch_generator
from rlopt.types import Act, Carry, EnvSpec, Episode, Obs, RloptError, State, map_obs, next_carry, obs_leaves, on_device

log = logging.getLogger(__name__)

MAX_SLOTS = 64
"""Episodes of one policy that an ``Evaluator`` runs side by side; more run in waves."""
PATIENCE = 10.0
"""Seconds after which it is told how far an evaluation is."""
MAX_LOST = 10
"""Times that one slot may lose its worker before the evaluation is given up."""
NO_LIMIT = 27_000
"""Steps after which an episode is cut off where neither the environment nor ``max_steps`` has a limit, because a policy
may never reach the end: the 108,000 frames of an Atari game."""


def step_limit(spec: EnvSpec, max_steps: int | None) -> int | None:
    """Return the steps after which an evaluation's episode is cut off; None where only the environment ends it."""
    return max_steps if max_steps is not None or spec.episode_limit is not None else NO_LIMIT


def run_episodes(
    policy: Policy,
    env: VectorEnv,
    episodes: int,
    seed: int,
    mode: EvaluationMode | None = None,
    max_steps: int | None = None,
) -> list[Episode]:
    """Run ``episodes`` whole episodes of ``policy`` and return them in the order of their seeds.

    Episode i starts from ``derive_seed(seed, "evaluation", i)`` in slot i modulo ``env.num_envs``; where there are more
    episodes than slots they run in waves. The policy always sees all rows, so that the shape of its batch, and with it
    the rounding, never depends on which episodes are still alive. Random actions draw from a stream of this call's own.

    Args:
        env: built with ``autoreset=False``; it is reset first, whatever it did before.
        mode: how the policy acts; by default as it says itself.
        max_steps: as ``step_limit`` takes it.

    Raises:
        RloptError: the policy does not fit the environment, or a slot keeps losing its worker process.
    """
    return _waves([policy], env, episodes, [seed], mode, max_steps)


def _waves(
    policies: Sequence[Policy],
    env: VectorEnv,
    episodes: int,
    seeds: Sequence[int],
    mode: EvaluationMode | None,
    max_steps: int | None,
) -> list[Episode]:
    """``episodes`` of every policy, each with its own seed and its own part of the slots; a policy's number is its
    episodes' ``run``, and they come policy by policy."""
    if env.autoreset:
        raise ValueError("evaluation needs an environment built with autoreset=False")
    check_spaces(policies[0].spec, env.spec)
    each = env.num_envs // len(policies)
    waves = [range(first, min(first + each, episodes)) for first in range(0, episodes, each)]
    players = [Player(policy, seed, mode) for policy, seed in zip(policies, seeds, strict=True)]
    done: list[Episode] = []
    told = monotonic()
    for wave in waves:
        done += _wave(players, env, wave, seeds, max_steps)
        if wave.stop < episodes and monotonic() - told >= PATIENCE:
            told = monotonic()
            log.info("evaluating: %s of %s episodes", f"{wave.stop:,}", f"{episodes:,}")
    return sorted(done, key=lambda e: e.run)


class Player:
    """A policy, the mode in which it acts, and the stream of its random actions."""

    def __init__(self, policy: Policy, seed: int, mode: EvaluationMode | None) -> None:
        self.policy, self.mode = policy, policy.evaluation_mode if mode is None else mode
        self.generator = torch_generator(seed, "evaluation", "noise", device=policy.device)

    def act(self, obs: Obs, carry: Carry) -> Act:
        return self.policy.act_as(self.mode, obs, carry, self.generator)


def _wave(
    players: Sequence[Player], env: VectorEnv, wave: range, seeds: Sequence[int], max_steps: int | None
) -> list[Episode]:
    """Return the episodes with these numbers of each policy, one in each of its slots from the first on."""
    n, each = env.num_envs, env.num_envs // len(players)
    parts = [slice(r * each, (r + 1) * each) for r in range(len(players))]
    slots = torch.arange(n) % each
    row_seeds = [derive_seed(seed, "evaluation", wave.start + slot) for seed in seeds for slot in range(each)]
    alive = slots < len(wave)
    # Slots beyond the last episode are left as the wave before ended them, so that nothing steps them.
    obs = env.reset(seeds=row_seeds, mask=alive.to(env.device) if wave.start else None)
    counter, done = EpisodeCounter(env.spec, n, len(players)), dict[int, Episode]()
    begun, limit = [player.policy.initial_carry(each) for player in players], step_limit(env.spec, max_steps)
    carry = list(begun)
    while bool(alive.any()):
        acts = [player.act(_rows(obs, part), c) for player, part, c in zip(players, parts, carry, strict=True)]
        step = env.step(torch.cat([act.action for act in acts]).to(env.device))
        obs = step.obs
        for r, (act, part) in enumerate(zip(acts, parts, strict=True)):
            if act.carry is not None:
                ended, valid = (on_device(x[part], players[r].policy.device) for x in (step.ended, step.valid))
                carry[r] = next_carry(carry[r], act.carry, begun[r], ended, valid)
        facts = {name: torch.cat([act.facts[name] for act in acts]) for name in acts[0].facts}
        over = {i: episode for i, episode in counter.count(step, facts).items() if alive[i]}
        if limit is not None and (late := (alive & (counter.lengths >= limit)).nonzero().flatten().tolist()):
            if max_steps is None:  # else they were to be
                log.warning("%s: %d evaluation episodes were cut off after %d steps", env.spec.id, len(late), limit)
            over |= {i: counter.episode(i) for i in late}
        if int(counter.lost.max()) > MAX_LOST:
            raise RloptError(
                f"{env.spec.id}: an evaluation environment died {MAX_LOST} times; raise env.timeout or mend it"
            )
        if over:
            done |= over
            alive[list(over)] = False
    return [done[i] for i in sorted(done)]


def _rows(obs: Obs, part: slice) -> Obs:
    return map_obs(lambda x: x[part], obs)


def _beside(found: list[Episode], others: dict[str, list[Episode]]) -> list[Episode]:
    """Return episodes with what others with the same seeds reached as facts."""
    for name, episodes in others.items():
        told = [
            {f"{name}/return": e.total_reward, **{f"{name}/{fact}": x for fact, x in e.facts.items()}} for e in episodes
        ]
        found = [e._replace(facts={**e.facts, **facts}) for e, facts in zip(found, told, strict=True)]
    return found


class Evaluator:
    """Evaluates policies on environments of its own, which it builds when first asked and keeps for the next time.

    Environments that can be saved are put back to where they began, so that whatever survives their resets (a counter,
    a wrapper's statistics) never makes one evaluation depend on those before it, nor on a resume between them.

    Args:
        make: builds ``n`` environments with ``autoreset=False``.
        seed: the run's; every evaluation runs the same episodes.
        together: whether ``evaluate_runs`` has one vector of environments for all runs, instead of one run after the
            other.
        max_steps: steps after which an episode is cut off; None for the environment's own limit, or ``NO_LIMIT`` where
            it has none, which is said once.
        mode: ``deterministic``, ``sample``, or ``agent`` for what the agent says; and so ``epsilon``, or None.
    """

    def __init__(
        self,
        make: Callable[[int], VectorEnv],
        seed: int,
        together: bool = False,
        max_steps: int | None = None,
        mode: str = "agent",
        epsilon: float | None = None,
    ) -> None:
        self._make, self._seed, self._together, self._max_steps = make, seed, together, max_steps
        self._mode, self._epsilon = mode, epsilon
        self._env: VectorEnv | None = None
        self._beginning: State | None = None
        self._said = False

    def mode_of(self, mode: EvaluationMode) -> EvaluationMode:
        """Return how an agent is evaluated that acts in ``mode`` where the protocol leaves it open."""
        deterministic = mode.deterministic if self._mode == "agent" else self._mode == "deterministic"
        return EvaluationMode(deterministic, mode.epsilon if self._epsilon is None else self._epsilon)

    def evaluate(
        self, policy: Policy, episodes: int, mode: EvaluationMode | None = None, run: int = 0
    ) -> list[Episode]:
        """Do ``run_episodes`` with one slot per episode, up to ``MAX_SLOTS``, and the seed of the run-th run; what the
        policy's variants reach are facts of the episodes."""

        def play(one: Policy) -> list[Episode]:
            return run_episodes(one, self._begun(episodes), episodes, self._seed + run, mode, self._max_steps)

        return _beside(play(policy), {name: play(other) for name, other in policy.variants.items()})

    def evaluate_runs(self, policies: Sequence[Policy], episodes: int) -> list[Episode]:
        """Do ``evaluate`` for the policy of every run; the episodes carry its number.

        All at once each policy still sees its own rows alone, in a batch of the same shape.
        """
        if self._together:
            seeds = [self._seed + r for r in range(len(policies))]

            def play(every: Sequence[Policy]) -> list[Episode]:
                return _waves(every, self._begun(episodes, len(every)), episodes, seeds, None, self._max_steps)

            each = [policy.variants for policy in policies]
            return _beside(play(policies), {name: play([own[name] for own in each]) for name in each[0]})
        every = (self.evaluate(policy, episodes, run=r) for r, policy in enumerate(policies))
        return [e._replace(run=r) for r, found in enumerate(every) for e in found]

    def _begun(self, episodes: int, runs: int = 1) -> VectorEnv:
        env = self.prepare(episodes, runs)
        if self._beginning is not None:
            env.load_state_dict(self._beginning)
        return env

    def prepare(self, episodes: int, runs: int = 1) -> VectorEnv:
        """Return the environments for an evaluation of ``episodes`` episodes of as many runs at once, built if need
        be."""
        slots = min(episodes, MAX_SLOTS) * runs
        if self._env is None or self._env.num_envs != slots:
            self.close()
            self._env = self._make(slots)
            self.tell_limit(self._env.spec)
            self._env.reset()
            self._beginning = self._env.state_dict()
        return self._env

    def tell_limit(self, spec: EnvSpec) -> None:
        """Say once what limit holds in an environment that declares none."""
        if not self._said and self._max_steps is None and spec.episode_limit is None:
            what = "has no time limit: episodes of evaluations are cut off after"
            log.warning("%s %s %d steps (eval.max_steps)", spec.id, what, NO_LIMIT)
        self._said = True

    def close(self) -> None:
        """Close the environments. Safe to call twice, and a later ``evaluate`` builds new ones."""
        if self._env is not None:
            env, self._env, self._beginning = self._env, None, None
            env.close()


def check_spaces(policy: EnvSpec, env: EnvSpec) -> None:
    """Refuse an environment whose observations the policy cannot read, or where its actions mean something else.

    Bounds of observations may differ; those of actions may not.

    Raises:
        RloptError: one line that names both spaces.
    """
    leaves = [
        {
            key: (type(s), s.shape, s.dtype, getattr(s, "n", None))
            for key, s in obs_leaves(spec.observation_space).items()
        }
        for spec in (policy, env)
    ]
    if leaves[0] != leaves[1]:
        what, ours, theirs = "sees", policy.observation_space, env.observation_space
    elif policy.action_space != env.action_space:
        what, ours, theirs = "acts in", policy.action_space, env.action_space
    else:
        return
    words = [" ".join(str(space).split()) for space in (ours, theirs)]
    raise RloptError(f"this policy {what} {words[0]}, but {env.id} has {words[1]}; choose one with the same spaces")
