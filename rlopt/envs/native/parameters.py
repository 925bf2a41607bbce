"""Simulator parameters of the native MuJoCo tasks: masses of bodies and friction of geoms, one value per row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlopt.config import hint
from rlopt.envs.arrays import Array
from rlopt.envs.base import Env
from rlopt.envs.native.env import NativeVectorEnv
from rlopt.envs.native.physics import BatchPhysics
from rlopt.envs.native.tasks import Task
from rlopt.types import Obs, RloptError, State


class ParametricNativeEnv(NativeVectorEnv):
    """``NativeVectorEnv`` with ``set_parameters``: ``mass_<body>`` in kg, and ``friction_<geom>``, the coefficient of
    sliding friction. (Of two geoms in contact MuJoCo takes the larger one.)

    As in RRLS (github.com/SuReLI/RRLS) and M2TD3 a mass changes without the body's inertia; unlike there, the model's
    derived constants follow it (``mj_setConst``). Arguments are those of ``NativeVectorEnv``.
    """

    def __init__(self, env: Env, make_task: Callable[[Any], Task], num_envs: int, **options: Any) -> None:
        model: Any = env.unwrapped.model  # type: ignore[attr-defined]
        super().__init__(env, make_task, num_envs, **options)
        self._model = model
        self._fields: dict[str, tuple[str, tuple[int, ...]]] = {}
        """By parameter: the model's field, and where in it."""
        for i in range(1, model.nbody):
            self._fields[f"mass_{model.body(i).name}"] = ("body_mass", (i,))
        for i in range(model.ngeom):
            if model.geom(i).name:
                self._fields[f"friction_{model.geom(i).name}"] = ("geom_friction", (i, 0))
        self.parameters: dict[str, Tensor] = {
            name: torch.full((num_envs,), float(getattr(model, field)[place]), dtype=torch.float64)
            for name, (field, place) in self._fields.items()
        }
        """(N,) each, on the CPU; written by ``set_parameters``."""

    def set_parameters(self, **values: float | Tensor) -> None:
        """Give parameters new values, one number for all rows or (N,); they last until the next call. Rows whose values
        stay as they were go on undisturbed.

        Raises:
            RloptError: a parameter that the model lacks, a tensor of another shape, or a task with contact forces.
        """
        changed = np.zeros(self.num_envs, np.bool_)
        for name, value in values.items():
            if name not in self._fields:
                raise RloptError(f"{self.spec.id} has no parameter {name!r}; {hint(name, self._fields)}")
            new = torch.as_tensor(value, dtype=torch.float64).cpu()
            if new.shape not in ((), (self.num_envs,)):
                raise RloptError(
                    f"parameter {name} has shape {tuple(new.shape)}; it must be one number or ({self.num_envs},)"
                )
            new = new.expand(self.num_envs)
            differs = (new != self.parameters[name]).numpy()
            if differs.any():
                field, place = self._fields[name]
                where: tuple[Any, ...] = (slice(None), *place)
                self._array(field)[where] = new.numpy()
                self.parameters[name].copy_(new)
                changed |= differs if field == "body_mass" else False
        if changed.any():
            self._derive(np.flatnonzero(changed))

    def _array(self, field: str) -> Array:
        """Return a model field of every row, (N, …), to be written in place."""
        if self._task.contact_forces:
            raise RloptError(f"{self.spec.id} observes or pays for contact forces and has no simulator parameters here")
        if isinstance(self._physics, BatchPhysics):
            return self._physics._batch.expand(field)  # type: ignore[no-any-return]
        return getattr(self._model, field)[None]  # type: ignore[no-any-return]

    def _derive(self, rows: Array) -> None:
        """Let what the model derives from masses follow in ``rows``."""
        if isinstance(self._physics, BatchPhysics):
            self._physics._batch.set_const(rows)
        else:
            import mujoco

            mujoco.mj_setConst(self._model, mujoco.MjData(self._model))

    def state_dict(self) -> State | None:
        state = super().state_dict()
        if state is not None:
            state["parameters"] = {name: value.clone() for name, value in self.parameters.items()}
        return state

    def load_state_dict(self, state: State) -> Obs:
        obs = super().load_state_dict(state)
        self.set_parameters(**state.get("parameters", {}))
        return obs
