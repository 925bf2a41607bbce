"""Many simulations of one MuJoCo model, stepped together: on MuJoCo's thread pool, or one ``MjData`` per row."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from rlopt.envs.arrays import Array


class Physics(Protocol):
    """N simulations. ``fields`` holds MuJoCo's data by name, refreshed in place by every call: (N, …) each, or where N
    is 1 without that axis."""

    fields: dict[str, Array]

    def step(self, ctrl: Array, nstep: int, rows: Array | None) -> None:
        """Take ``nstep`` substeps under the controls (N, A), in all rows or in ``rows`` (sorted indices)."""
        ...

    def reset(self, rows: Array, qpos: Array, qvel: Array) -> None:
        """Begin anew in ``rows`` at positions (k, nq) and velocities (k, nv)."""
        ...

    def state(self) -> Array:
        """Return the integration states (N, S), warm start of the solver included."""
        ...

    def set_state(self, state: Array) -> None:
        """Put back what ``state`` returned. Derived fields are those of the next step."""
        ...

    def close(self) -> None:
        """End the threads."""
        ...


def pool_size(n: int, threads: int | None = None) -> int:
    """Return threads for n rows: torch's number by default (a run's ``threads``; else one per physical core), and never
    more than rows or than cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(threads or torch.get_num_threads(), cores, n))


class BatchPhysics:
    """``mujoco.batch.Batch``: the rows' states in one array, and MuJoCo's own threads.

    Its rows equal single simulations bit by bit. It cannot compute ``cfrc_ext``.
    """

    def __init__(self, model: Any, n: int, threads: int, derived: Sequence[str]) -> None:
        from mujoco.batch import Batch

        self._batch = Batch(model, n, threads)
        # mj_forward leaves the state alone: after a reset it is only for what is read beside it.
        self._forward = bool(derived) or model.nsensor > 0
        self._fresh: Array = self._batch.state[0].copy()  # what mj_resetData makes of a row
        self.fields = {name: self._batch.bind(name) for name in ("qpos", "qvel", "ctrl", *derived)}

    def step(self, ctrl: Array, nstep: int, rows: Array | None) -> None:
        if rows is None:
            self.fields["ctrl"][:] = ctrl
        else:
            self.fields["ctrl"][rows] = ctrl[rows]
        self._batch.step(rows, nstep)

    def reset(self, rows: Array, qpos: Array, qvel: Array) -> None:
        self._batch.state[rows] = self._fresh
        self.fields["qpos"][rows], self.fields["qvel"][rows] = qpos, qvel
        if self._forward:
            self._batch.forward(rows)

    def state(self) -> Array:
        return self._batch.state.copy()  # type: ignore[no-any-return]

    def set_state(self, state: Array) -> None:
        self._batch.state[:] = state

    def close(self) -> None:
        pass


class SinglePhysics:
    """One simulation in the caller's thread, by the very calls that Gymnasium makes; ``fields`` are views of it."""

    def __init__(self, model: Any, derived: Sequence[str], contact_forces: bool) -> None:
        import mujoco

        self._mujoco, self._model, self._contact_forces = mujoco, model, contact_forces
        self._data = mujoco.MjData(model)
        self._ctrl: Array = self._data.ctrl
        self.fields: dict[str, Array] = {name: getattr(self._data, name) for name in ("qpos", "qvel", "ctrl", *derived)}

    def step(self, ctrl: Array, nstep: int, rows: Array | None) -> None:
        self._ctrl[:] = ctrl
        self._mujoco.mj_step(self._model, self._data, nstep)
        if self._contact_forces:
            self._mujoco.mj_rnePostConstraint(self._model, self._data)

    def reset(self, rows: Array, qpos: Array, qvel: Array) -> None:
        self._mujoco.mj_resetData(self._model, self._data)
        self.fields["qpos"][:], self.fields["qvel"][:] = qpos, qvel
        self._mujoco.mj_forward(self._model, self._data)

    def state(self) -> Array:
        kind = int(self._mujoco.mjtState.mjSTATE_INTEGRATION)
        state = np.zeros((1, self._mujoco.mj_stateSize(self._model, kind)))
        self._mujoco.mj_getState(self._model, self._data, state[0], kind)
        return state

    def set_state(self, state: Array) -> None:
        kind = int(self._mujoco.mjtState.mjSTATE_INTEGRATION)
        self._mujoco.mj_setState(self._model, self._data, state.reshape(-1), kind)

    def close(self) -> None:
        pass


class ThreadedPhysics:
    """N single simulations shared out among Python threads, for MuJoCo releases the interpreter's lock.

    It computes the contact forces, which the batch cannot.
    """

    def __init__(self, model: Any, n: int, threads: int, derived: Sequence[str]) -> None:
        self._rows = [SinglePhysics(model, derived, contact_forces=True) for _ in range(n)]
        first = self._rows[0].fields
        self.fields = {name: np.zeros((n, *array.shape), array.dtype) for name, array in first.items()}
        self._threads = min(threads, n)
        self._pool = ThreadPoolExecutor(self._threads - 1, "mujoco") if self._threads > 1 else None

    def _publish(self, i: int) -> None:
        for name, array in self._rows[i].fields.items():
            self.fields[name][i] = array

    def _advance(self, ctrl: Array, nstep: int, rows: Sequence[int]) -> None:
        for i in rows:
            self._rows[i].step(ctrl[i], nstep, None)
            self._publish(i)

    def step(self, ctrl: Array, nstep: int, rows: Array | None) -> None:
        chosen: Sequence[int] = range(len(self._rows)) if rows is None else rows.tolist()
        k = self._threads
        others = (
            [self._pool.submit(self._advance, ctrl, nstep, chosen[t::k]) for t in range(1, k)] if self._pool else []
        )
        self._advance(ctrl, nstep, chosen[::k])
        for other in others:
            other.result()

    def reset(self, rows: Array, qpos: Array, qvel: Array) -> None:
        for i, q, v in zip(rows.tolist(), qpos, qvel, strict=True):
            self._rows[i].reset(rows, q, v)
            self._publish(i)

    def state(self) -> Array:
        return np.concatenate([row.state() for row in self._rows])

    def set_state(self, state: Array) -> None:
        for i, row in enumerate(self._rows):
            row.set_state(state[i])
            self._publish(i)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
