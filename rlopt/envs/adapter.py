"""Any Gymnasium vector environment, in any autoreset mode, behind rlopt's contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv as GymAsync
from gymnasium.vector import AutoresetMode
from torch import Tensor

from rlopt.envs.arrays import Array
from rlopt.envs.base import (
    ENDED,
    VALID,
    BaseVectorEnv,
    Options,
    StepBuilder,
    one_stream,
    ordinary_flags,
    row_seeds,
    rows_of,
)
from rlopt.envs.edge import (
    check_first,
    check_flags,
    check_reward,
    check_step,
    observation_writer,
    spec_of,
    told_facts,
)
from rlopt.envs.spaces import ActionCodec, ObservationCodec
from rlopt.types import Obs, RloptError, State, Step

GymVector = gymnasium.vector.VectorEnv[Any, Any, Any]


def autoreset_mode(env: GymVector) -> AutoresetMode:
    """Return the mode that ``env`` says it is in.

    Its own attribute goes before its metadata: ale-py 0.12 writes into one metadata dict shared by all instances.

    Raises:
        RloptError: the environment does not say.
    """
    mode = getattr(env.unwrapped, "autoreset_mode", None) or (env.metadata or {}).get("autoreset_mode")
    if mode is None:
        raise RloptError("the vector environment does not say its autoreset mode; set metadata['autoreset_mode']")
    return AutoresetMode(mode)


class VectorAdapter(BaseVectorEnv):
    """Translates ``env`` to the contract of ``rlopt.envs.vector.VectorEnv``.

    - SAME_STEP: ``final_obs`` becomes ``next_obs`` where an episode ended, with or without Gymnasium's mask
      ``_final_obs``.
    - DISABLED: ended rows are reset at once through ``reset_mask``.
    - NEXT_STEP: the first observation of an episode comes only with the call after the end. The row that ended has
      its last observation also in ``obs``, as a stand-in; the next row ignores its action and is a surplus row with
      the first observation in ``obs`` and ``next_obs``.

    With ``autoreset=False`` ended rows are frozen here, whatever happens underneath, until they are reset.
    Its state cannot be saved: ``state_dict`` returns None. ALE's ``life_loss_info`` ends no episode and cannot be
    told from an end here; leave it off.

    Args:
        env: the vector environment, which the adapter then owns.
        options: see ``Options``; slots have seeds of their own where ``env`` takes a list of them.

    Raises:
        RloptError: a space without translation, or an unknown autoreset mode.
    """

    def __init__(self, env: GymVector, **options: Unpack[Options]) -> None:
        super().__init__(env.num_envs, **options)
        self.env, self.mode = env, autoreset_mode(env)
        self._observations = ObservationCodec(env.single_observation_space)
        self._actions = ActionCodec(env.single_action_space)
        self.spec = spec_of(env, self._observations, self._actions, self._env_id)
        self._write = observation_writer(self.spec.id, self._observations)
        self._write_all = observation_writer(self.spec.id, self._observations, self.num_envs)
        self._current = self._observations.arrays(self.num_envs)
        self._steps = StepBuilder(self.spec, self.num_envs, self.device)
        no = np.zeros(self.num_envs, np.bool_)
        self._ended = no.copy()  # frozen rows, where autoreset is off
        self._over = no.copy()  # rows whose episode is over underneath: NEXT_STEP resets them in the next call
        # Gymnasium's worker without shared memory forgets that an explicit reset has already done what it is about to
        # do.
        inner = env.unwrapped
        self._resets_twice = isinstance(inner, GymAsync) and not inner.shared_memory

    def _begin(
        self,
        seeds: Sequence[int] | None,
        mask: Tensor | None,
        options: dict[str, Any] | None,
        noise_seeds: Sequence[int] | None,
    ) -> Obs:
        """Raises RloptError where ``mask`` leaves rows out, but the environment can only reset all of them."""
        if noise_seeds is not None:
            raise one_stream(self.spec.id)
        if rows := rows_of(mask, self.num_envs):
            chosen = np.zeros(self.num_envs, np.bool_)
            chosen[rows] = True
            self._reset_underneath(chosen, row_seeds(seeds, self.num_envs), options, visible=chosen)
            self._ended[rows] = False
        return self._observations.tensors(self._current, self._away)

    def step(self, action: Tensor) -> Step:
        """Step all rows; see ``VectorEnv.step``."""
        if not self._started:
            raise self._not_begun()
        n, disabled = self.num_envs, self.mode == AutoresetMode.DISABLED
        if disabled and self._over.any():  # Gymnasium refuses to step ended rows, so frozen ones play on unseen
            self._reset_underneath(self._over.copy(), [None] * n, None, visible=np.zeros(n, np.bool_))
        try:
            given = self.env.step(self._actions.batch(action, n))
        except (EOFError, BrokenPipeError, ConnectionResetError) as e:
            raise RloptError(
                "a worker of Gymnasium's vector environment died; backend=async replaces dead workers"
            ) from e
        obs, reward, terminated, truncated, info = check_step(given, self.spec.id)
        terminated, truncated = (
            check_flags(flag, name, self.spec.id, n)
            for flag, name in ((terminated, "terminated"), (truncated, "truncated"))
        )
        done = terminated | truncated
        phantom = self._over if self.mode == AutoresetMode.NEXT_STEP else np.zeros(n, np.bool_)
        live = ~(phantom | self._ended)
        flags = ordinary_flags(n)
        flags[:VALID] = terminated, truncated, done
        flags[:VALID, ~live] = False
        flags[VALID] = live
        rewards = np.zeros((n, *self.spec.reward_shape), np.float32)
        rewards[live] = check_reward(reward, self.spec, n)[live]
        self._over = done
        if not self.autoreset:
            # A row reset by hand that resets once more underneath shows its new first observation, and is no
            # transition.
            self._keep(obs, ~self._ended)
            self._finals(info, done & live)
            self._ended |= done & live
            next_obs = observed = self._observations.tensors(self._current, self._away)
        elif self.mode == AutoresetMode.NEXT_STEP or not done.any():
            self._keep(obs, None)
            next_obs = observed = self._observations.tensors(self._current, self._away)
        else:
            self._keep(obs, None)
            after = [a.copy() for a in self._current]
            self._finals(info, done)
            next_obs = self._observations.tensors(self._current, self._away)
            for array, now in zip(self._current, after, strict=True):
                array[...] = now
            if disabled:
                self._reset_underneath(done, [None] * n, None, visible=done)
            observed = self._observations.tensors(self._current, self._away)
        ordinary = not flags[:VALID].any() and flags[VALID].all()
        facts = self._facts(info, flags[ENDED])
        return self._steps.build(observed, next_obs, rewards, None if ordinary else flags, facts)

    def state_dict(self) -> State | None:
        """Return None: a Gymnasium vector environment cannot be saved. The documented rule for that is in
        ``rlopt.envs.snapshot``."""
        return None

    def load_state_dict(self, state: State) -> Obs:
        """Refuse, since ``state_dict`` never gives a state."""
        raise RloptError(
            "a Gymnasium vector environment (backend=vector) cannot be restored; use backend=sync or async"
        )

    def _release(self) -> None:
        self.env.close()

    def _keep(self, obs: Any, rows: Array | None) -> None:
        """Make ``obs`` the current observations, of all rows or of some."""
        if rows is None or rows.all():
            self._write_all(self._current, slice(None), obs)
        else:
            for i in np.flatnonzero(rows).tolist():
                self._write(self._current, i, self._observations.row(obs, i))

    def _finals(self, info: dict[str, Any], rows: Array) -> None:
        """Where SAME_STEP has already reset ``rows``, put their true last observations into the current ones."""
        if self.mode != AutoresetMode.SAME_STEP or not rows.any():
            return
        final = info["final_obs"]
        for i in np.flatnonzero(rows).tolist():
            objects = isinstance(final, np.ndarray) and final.dtype == object
            self._write(self._current, i, final[i] if objects else self._observations.row(final, i))

    def _facts(self, info: dict[str, Any], ended: Array) -> Array | None:
        """Return the facts (N, F) of every row; None where there are no facts."""
        if not self.spec.facts:
            return None
        facts, every = np.zeros((self.num_envs, len(self.spec.facts)), np.float32), np.ones(self.num_envs, bool)
        final = info.get("final_info", info) if self.mode == AutoresetMode.SAME_STEP else info
        for i, over in enumerate(ended.tolist()):
            last = final if over else info
            told = {k: v[i] for k, v in last.items() if k[0] != "_" and last.get(f"_{k}", every)[i]}
            facts[i] = told_facts(told, self.spec, over)
        return facts

    def _reset_underneath(
        self, rows: Array, seeds: list[int | None], options: dict[str, Any] | None, visible: Array
    ) -> None:
        """Reset ``rows``, and make the first observations of ``visible`` rows the current ones."""
        partial = not rows.all()
        given = dict(options) if options else {}
        if partial:
            given["reset_mask"] = rows.copy()  # a fresh dict each time: Gymnasium pops the mask out of it
        obs = self._call_reset(rows, seeds, given or None)
        if partial and self._started:
            self._check_untouched(obs, ~(rows | self._ended | self._over))
        self._keep(obs, visible)
        if not (self._resets_twice and self.mode == AutoresetMode.NEXT_STEP):
            self._over &= ~rows

    def _call_reset(self, rows: Array, seeds: list[int | None], options: dict[str, Any] | None) -> Any:
        if all(s is None for s in seeds):
            return check_first(self.env.reset(options=options), self.spec.id)
        wanted = [seeds[i] for i in rows.nonzero()[0]]
        forms: list[Any] = [
            [s if row else None for s, row in zip(seeds, rows, strict=True)],  # Gymnasium's own
            np.array(wanted, np.int64),  # ale-py
            wanted[0],  # environments with one generator for all rows
        ]
        for form in forms[:-1]:
            try:
                return check_first(self.env.reset(seed=form, options=dict(options) if options else None), self.spec.id)
            except (TypeError, ValueError, gymnasium.error.Error):
                continue
        return check_first(self.env.reset(seed=forms[-1], options=options), self.spec.id)

    def _check_untouched(self, obs: Any, rows: Array) -> None:
        check = self._observations.arrays(self.num_envs)
        self._write_all(check, slice(None), obs)
        same = all(
            np.array_equal(a[rows], b[rows], equal_nan=a.dtype.kind == "f")
            for a, b in zip(check, self._current, strict=True)
        )
        if not same:
            raise RloptError(
                f"{self.spec.id} as a vector environment can only reset all rows at once; use backend=sync"
            )
