"""N copies of an Atari game on ale-py's vector environment."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
import torch
from ale_py.vector_env import AtariVectorEnv
from gymnasium import spaces
from torch import Tensor

from rlopt.envs.arrays import Array
from rlopt.envs.atari.pictures import Follower
from rlopt.envs.atari.protocols import OPTIONS, Protocol
from rlopt.envs.atari.scores import human_normalised
from rlopt.envs.base import (
    ENDED,
    TERMINATED,
    TRUNCATED,
    VALID,
    BaseVectorEnv,
    Options,
    StepBuilder,
    one_stream,
    ordinary_flags,
    rows_of,
)
from rlopt.envs.native.physics import pool_size
from rlopt.envs.spaces import ActionCodec
from rlopt.random import derive_seed
from rlopt.types import EnvSpec, Obs, RloptError, State, Step

log = logging.getLogger(__name__)

NOOP, FIRE, AFTER_FIRE, RESET = 0, 1, 2, 128
FACT = "human_normalised"
MOST_FRAMES = 108_000
"""Of a game where no limit is given; of two that are given the smaller one holds."""


class AtariGames(BaseVectorEnv):
    """N copies of an Atari game under a protocol, behind the contract of ``rlopt.envs.vector.VectorEnv``.

    Observations are uint8 (N, stack, 84, 84), the newest frame last; rewards are those of the game. A step whose action
    the protocol chooses (see ``Protocol.lives``) is a surplus row; what it should earn is added to the next transition,
    so that returns are true scores. Where a game ends within such steps, its episode is lost. Evaluation plays the
    same way, but only the end of the game is an end. ``Step.obs`` and ``Step.next_obs`` are one tensor where no row
    begins anew: treat both as read-only.

    The vector environment cannot be saved. But from a seed on, a row is its actions: its state is the seed, the actions
    since, and what stands here, and ``load_state_dict`` plays them again before the next step. So that these are not
    too many, a row gets its next seed after ``reseed_after`` steps, where a game ends; loading a seed costs about 200
    steps.

    Args:
        game: ale-py's name of the game (``ms_pacman``).
        num_envs: N.
        protocol: how it is played.
        evaluation: whether it is for evaluations.
        threads: at most so many; by default torch's number. Never more than rows or than cores.
        reseed_after: see above; None for 160,000 / N, at least 5,000 and at most 20,000.
        numbers: single numbers of the protocol that are changed, see ``OPTIONS``.
        options: see ``Options``.

    Raises:
        RloptError: a number of the wrong kind or out of range.
    """

    def __init__(
        self,
        game: str,
        num_envs: int,
        protocol: Protocol,
        *,
        evaluation: bool = False,
        threads: int | None = None,
        reseed_after: int | None = None,
        full_action_space: bool = False,
        repeat_action_probability: float | None = None,
        noop_max: int | None = None,
        max_num_frames_per_episode: int | None = None,
        max_episode_steps: int | None = None,
        frameskip: int = 4,
        stack_num: int = 4,
        img_height: int = 84,
        img_width: int = 84,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(num_envs, **options)
        sticky = protocol.sticky if repeat_action_probability is None else repeat_action_probability
        noops = protocol.noops if noop_max is None else noop_max
        _check(
            full_action_space=full_action_space,
            repeat_action_probability=sticky,
            noop_max=noops,
            max_num_frames_per_episode=1 if max_num_frames_per_episode is None else max_num_frames_per_episode,
            max_episode_steps=1 if max_episode_steps is None else max_episode_steps,
            frameskip=frameskip,
            stack_num=stack_num,
            img_height=img_height,
            img_width=img_width,
        )
        frames = None if max_num_frames_per_episode is None else max_num_frames_per_episode // frameskip
        limits = [steps for steps in (frames, max_episode_steps) if steps is not None]
        self.game, self.protocol, self._evaluation = game, protocol, evaluation
        # The emulator's options for lives, FIRE, clipping, stacks and limits are other ones than the protocols': its
        # ``episodic_life`` begins a whole new game, ``life_loss_info`` never presses FIRE, ``reward_clipping`` hides
        # scores, and its stacks go on over a lost life. All of it is done here, from the lives that it reports.
        self._env = AtariVectorEnv(
            game,
            num_envs,
            num_threads=pool_size(num_envs, threads),
            max_num_frames_per_episode=2**31 - 1,  # there it would show a mixture of two frames, and learning reads it
            repeat_action_probability=sticky,
            full_action_space=full_action_space,
            autoreset_mode="SameStep",
            img_height=img_height,
            img_width=img_width,
            stack_num=1,
            frameskip=frameskip,
            noop_max=noops + 1,  # it draws from 0 to one less
            episodic_life=False,
            life_loss_info=False,
            reward_clipping=False,
            use_fire_reset=False,
        )
        names = [action.name for action in self._env.ale.get_action_set()]
        self._sticky, self._skip = sticky, frameskip
        self._follower: Follower | None = None
        opening = protocol.lives and len(names) > AFTER_FIRE and names[FIRE] == "FIRE"
        self._opening = [FIRE, AFTER_FIRE] if opening else []
        self._count, self._limit = len(names), max(1, min(limits, default=MOST_FRAMES // frameskip))
        self._actions = ActionCodec(spaces.Discrete(self._count))
        self.spec = EnvSpec(
            self._env_id or game,
            spaces.Box(0, 255, (stack_num, img_height, img_width), np.uint8),
            self._actions.space,
            episode_limit=self._limit,
            frame_stack=stack_num,
            facts=(FACT,) if human_normalised(game, 0.0) is not None else (),
        )
        n = num_envs
        self._stack = np.zeros((n, stack_num, img_height, img_width), np.uint8)
        self._frame = np.zeros((n, img_height, img_width), np.uint8)
        self.lives = np.zeros(n, np.int32)
        """Of each row, in the game that it shows next."""
        self.noops = np.zeros(n, np.int32)
        """Frames without action that began each row's game."""
        self._score = np.zeros(n)
        self._owed = np.zeros(n, np.float32)
        """Rewards of hidden steps, which the next transition brings."""
        self._owing = False
        self._idle = np.zeros(n, np.bool_)
        """Rows that wait for their reset."""
        self.hidden: list[list[int]] = [[] for _ in range(n)]
        """Actions of each row that are the protocol's, next first."""
        self._seeds = [0] * n
        self._played = [bytearray() for _ in range(n)]
        """Actions since the seed, plus ``RESET`` where a new game was begun after one."""
        self._elapsed = np.zeros(n, np.int64)
        """Steps of the open game, hidden ones included."""
        self._reseed_after = min(20_000, max(5_000, 160_000 // n)) if reseed_after is None else reseed_after
        self._behind = False
        """Whether the emulators are still to be brought to where the rest stands."""
        self._steps = StepBuilder(self.spec, n, self.device)

    def _begin(
        self,
        seeds: Sequence[int] | None,
        mask: Tensor | None,
        options: dict[str, Any] | None,
        noise_seeds: Sequence[int] | None,
    ) -> Obs:
        if noise_seeds is not None:
            raise one_stream(self.spec.id)
        if options:
            raise RloptError(f"{self.spec.id} on backend=atari takes no options in reset, but got {sorted(options)}")
        rows = rows_of(mask, self.num_envs)
        if len(rows) < self.num_envs:
            self._catch_up()
        self._behind = False
        if rows:
            self._seed(rows, [self._next_seed(i) if seeds is None else int(seeds[i]) % 2**31 for i in rows])
            for i in rows:
                self._open(i, list(self._opening))
                self._idle[i] = False
        return self._tensor()

    def _next_seed(self, row: int) -> int:
        return derive_seed(self._seeds[row], "next")

    def _seed(self, rows: Sequence[int], seeds: Sequence[int]) -> None:
        """Begin games in ``rows`` from seeds; nothing of what was played before remains."""
        self._reset_underneath(rows, np.array(seeds))
        for row, seed in zip(rows, seeds, strict=True):
            self._seeds[row], self._played[row] = seed, bytearray()

    def _reset_underneath(self, rows: Sequence[int], seeds: Array | None) -> None:
        """Begin games in ``rows``, without seeds by the emulators' own random numbers."""
        chosen = np.zeros(self.num_envs, np.bool_)
        chosen[rows] = True
        every = bool(chosen.all())  # the first reset must be of all rows
        frames, info = self._env.reset(seed=seeds, options=None if every else {"reset_mask": chosen})
        self._frame, self.lives = frames[:, 0], info["lives"]
        self.noops[rows] = info["episode_frame_number"][rows]

    def _open(self, row: int, hidden: list[int]) -> None:
        """Stand at the first frame of a game, with hidden steps to come."""
        self._refill(row, self.protocol.padding)
        self.hidden[row], self._score[row], self._owed[row], self._elapsed[row] = hidden, 0.0, 0.0, 0

    def _refill(self, row: int, padding: str) -> None:
        self._stack[row, :-1] = self._frame[row] if padding == "repeat" else 0
        self._stack[row, -1] = self._frame[row]

    def _tensor(self) -> Tensor:
        tensor = torch.from_numpy(self._stack.copy())
        return tensor if self._away is None else tensor.to(self._away)

    def step(self, action: Tensor) -> Step:
        """Step all rows; see ``VectorEnv.step``.

        Raises:
            RloptError: an action that the game does not have, or a call before the first reset.
        """
        if not self._started:
            raise self._not_begun()
        if self._behind:
            self._catch_up()
        acts = self._actions.batch(action, self.num_envs)
        if acts.min() < 0 or acts.max() >= self._count:  # the emulator's threads would wait for ever
            raise RloptError(f"{self.spec.id} has the actions 0 to {self._count - 1}, not {acts.tolist()}")
        hidden = np.array([bool(queue) for queue in self.hidden])
        live = ~(hidden | self._idle)
        ordinary = bool(live.all())
        if not ordinary:
            acts[self._idle] = NOOP
            for i in np.flatnonzero(hidden & ~self._idle):
                acts[i] = self.hidden[i].pop(0)
        before = self._stack[self._idle]
        frames, paid, over, _, info = self._env.step(acts)
        for played, act in zip(self._played, acts.tolist(), strict=True):
            played.append(act)
        self._elapsed += 1
        cut = (self._elapsed >= self._limit) & ~over
        lives, was = info["lives"], self.lives
        self.lives, self._frame = lives, frames[:, 0]
        reward = paid.astype(np.float32)
        self._score += reward
        if self._owing:
            reward[live] += self._owed[live]
            self._owed[live] = 0.0
            self._owing = bool(self._owed.any())
        stack = self._stack
        stack[:, :-1] = stack[:, 1:]
        stack[:, -1] = self._frame
        if over.any():  # these rows already show the next game
            stack[over, -1] = info["final_obs"][over, 0]
            self.noops[over] = info["episode_frame_number"][over]
        lost = (lives < was) & (lives > 0) & ~(over | cut) if self.protocol.lives else _never(over)
        if ordinary and not (over | cut | lost).any():
            seen = self._tensor()
            return self._steps.build(seen, seen, reward, None, self._facts(False))
        stack[self._idle] = before
        return self._eventful(reward, over, cut, lost, live, hidden)

    def _facts(self, ended: bool) -> Array | None:
        """Return the facts (N, F) where some game has ended, and at every step of an evaluation, which may be cut."""
        if not self.spec.facts or (self.autoreset and not ended):
            return None
        return np.array([[human_normalised(self.game, score)] for score in self._score], np.float32)

    def _eventful(self, reward: Array, over: Array, cut: Array, lost: Array, live: Array, hidden: Array) -> Step:
        """Return the step in which something else happens than transitions, and let rows begin anew."""
        done, idle = over | cut, self._idle
        hidden = hidden & ~idle
        self._owed[hidden] += reward[hidden]
        self._owing |= bool(self._owed.any())
        reward[~live] = 0.0
        flags = ordinary_flags(self.num_envs)
        flags[TERMINATED] = over & live if self._evaluation else (over | lost) & live
        flags[TRUNCATED] = cut & live
        flags[ENDED] = done & ~idle
        flags[VALID] = live
        facts = self._facts(bool(flags[ENDED].any()))
        next_obs = self._tensor()
        begins = flags[ENDED] if self.autoreset else flags[ENDED] & hidden  # a lost episode begins anew at once
        if old := [i for i in np.flatnonzero(begins).tolist() if len(self._played[i]) >= self._reseed_after]:
            self._seed(old, [self._next_seed(i) for i in old])
        if stopped := [i for i in np.flatnonzero(begins & cut).tolist() if i not in old]:
            self._reset_underneath(stopped, None)
            for i in stopped:
                self._played[i][-1] += RESET
        for i in np.flatnonzero(begins).tolist():
            self._open(i, self.hidden[i] if hidden[i] else list(self._opening))
        for i in np.flatnonzero((lost | hidden) & ~done & ~idle).tolist():
            self._refill(i, self.protocol.padding)
            if lost[i]:
                self.hidden[i] = [NOOP, *(self.hidden[i] if hidden[i] else self._opening)]
        self._idle = idle | (flags[ENDED] & ~begins)
        return self._steps.build(self._tensor(), next_obs, reward, flags, facts)

    def state_dict(self) -> State | None:
        """Return the seeds, the actions since and what stands here; None before the first reset."""
        if not self._started:
            return None
        return {
            "game": self.game,
            "seeds": list(self._seeds),
            "played": [torch.tensor(list(played), dtype=torch.uint8) for played in self._played],
            "hidden": [list(queue) for queue in self.hidden],
            **{name.strip("_"): torch.from_numpy(getattr(self, name).copy()) for name in _ARRAYS},
        }

    def load_state_dict(self, state: State) -> Obs:
        """Continue where ``state_dict`` stood; returns the observations to act on.

        The emulators follow before the next step.

        Raises:
            RloptError: the state is of another game or of another number of environments.
        """
        if state.get("game") != self.game or len(state["seeds"]) != self.num_envs:
            raise RloptError(
                f"the saved state is of {len(state.get('seeds', ()))} copies of {state.get('game')}, not of "
                f"{self.num_envs} of {self.game}; resume with the environment that saved it"
            )
        if tuple(state["stack"].shape) != self._stack.shape:
            raise RloptError(f"the saved frames are {tuple(state['stack'].shape)}, not {self._stack.shape}")
        self._seeds = [int(seed) for seed in state["seeds"]]
        self._played = [bytearray(played.tolist()) for played in state["played"]]
        self.hidden = [[int(a) for a in queue] for queue in state["hidden"]]
        for name in _ARRAYS:
            setattr(self, name, state[name.strip("_")].cpu().numpy().copy())
        self._started = self._behind = self._owing = True
        return self._tensor()

    def _catch_up(self) -> None:
        """Play all rows' actions since their seeds again, so that all come to their last one in the same step.

        Raises:
            RloptError: the emulator shows something else than it did.
        """
        if not self._behind:
            return
        self._behind = False
        frame, lives, noops, seeds, played = self._frame, self.lives, self.noops, list(self._seeds), list(self._played)
        self.noops = noops.copy()
        longest = max(map(len, played))
        if longest > 1_000:
            log.info("%s: the open games are played again from their seeds, %d steps", self.spec.id, longest)
        begins = [longest - len(actions) for actions in played]
        self._seed(range(self.num_envs), seeds)
        for t in range(longest + 1):
            if rows := [i for i, begin in enumerate(begins) if begin == t > 0]:
                self._seed(rows, [seeds[i] for i in rows])
            if t < longest:
                acts = [a[t - begin] if t >= begin else NOOP for a, begin in zip(played, begins, strict=True)]
                frames, _, _, _, info = self._env.step(np.array(acts) % RESET)
                self._frame, self.lives = frames[:, 0], info["lives"]
                if rows := [i for i, act in enumerate(acts) if act >= RESET]:
                    self._reset_underneath(rows, None)
        self._played, self.noops = played, noops
        if not (np.array_equal(self._frame, frame) and np.array_equal(self.lives, lives)):
            raise RloptError(
                f"{self.spec.id}: played again, the game is another; resume with the ale-py that the run began with"
            )

    def render(self) -> Array:
        """Return a picture (210, 160, 3) of the first row's game, uint8.

        Raises:
            RloptError: with ``autoreset``, where a row plays on from game to game.
        """
        if self.autoreset or not self._started:
            raise RloptError(f"{self.spec.id} is drawn where it was built with autoreset=False and begun")
        made = self._follower
        if made is None or made.seed != self._seeds[0] or made.played > len(self._played[0]):
            actions = list(self._env.ale.get_action_set())
            made = Follower(self.game, self._seeds[0], self._sticky, int(self.noops[0]), actions, self._skip)
            self._follower = made
        return made.picture(self._played[0])

    def _release(self) -> None:
        self._env.close()
        del self._env  # ends its threads


_ARRAYS = ("_stack", "_frame", "lives", "noops", "_score", "_owed", "_idle", "_elapsed")


def _never(flags: Array) -> Array:
    return np.zeros_like(flags)


def _check(**numbers: Any) -> None:
    """Refuse changed numbers of a protocol that are of the wrong kind or out of range."""
    for key, value in numbers.items():
        kind = OPTIONS[key]
        ok = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if kind is float:
            ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
        elif kind is int and ok:
            ok = value >= (0 if key == "noop_max" else 1)
        if not ok:
            words = {bool: "true or false", float: "a number from 0 to 1", int: "a whole number of at least 1"}
            raise RloptError(f"env.kwargs.{key}={value!r}: expected {words[kind]}")
