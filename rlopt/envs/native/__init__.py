"""``backend=native``: Gymnasium's MuJoCo tasks on MuJoCo's own thread pool, bit for bit what Gymnasium returns.

``backend=auto`` chooses it wherever ``refusal`` has nothing to say against it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from rlopt.envs.factory import EnvFactory, said
from rlopt.envs.native import tasks
from rlopt.envs.native.env import NativeVectorEnv
from rlopt.envs.native.parameters import ParametricNativeEnv
from rlopt.envs.native.tasks import Task
from rlopt.envs.teams.names import MAMUJOCO
from rlopt.types import RloptError

if TYPE_CHECKING:
    from rlopt.envs.factory import EnvRequest

__all__ = ["NativeVectorEnv", "build", "make_native", "refusal"]

_TASKS: dict[str, type[Task]] = {
    "ant": tasks.Ant,
    "half_cheetah": tasks.HalfCheetah,
    "hopper": tasks.Hopper,
    "humanoid": tasks.Humanoid,
    "humanoidstandup": tasks.HumanoidStandup,
    "inverted_double_pendulum": tasks.InvertedDoublePendulum,
    "inverted_pendulum": tasks.InvertedPendulum,
    "pusher": tasks.Pusher,
    "reacher": tasks.Reacher,
    "swimmer": tasks.Swimmer,
    "walker2d": tasks.Walker2d,
}
"""By the name of Gymnasium's module."""

_ENTRY_POINT = re.compile(r"gymnasium\.envs\.mujoco\.(\w+)_v([45]):\w+")


def _find(factory: EnvFactory) -> tuple[type[Task], int] | None:
    entry_point = factory.spec.entry_point
    match = _ENTRY_POINT.fullmatch(entry_point) if isinstance(entry_point, str) else None
    return (_TASKS[match[1]], int(match[2])) if match and match[1] in _TASKS else None


def refusal(factory: EnvFactory) -> str | None:
    """Return why this environment does not run natively, or None where it does."""
    kwargs = {**factory.spec.kwargs, **factory.kwargs}
    if factory.spec.entry_point != MAMUJOCO and _find(factory) is None:
        return "it is not one of Gymnasium's MuJoCo tasks of version 4 or 5"
    if factory.wrappers or factory.spec.additional_wrappers:
        return "wrappers wrap single environments"
    if factory.facts:
        return "it has no info to read facts from"
    if kwargs.get("render_mode") is not None:
        return "it does not render"
    try:
        import mujoco
        import mujoco.batch
    except ImportError:
        return "it needs mujoco 3.17 or newer"
    except Exception as e:  # its graphics library is looked for at once
        raise RloptError(f"env={factory.spec.id}: importing mujoco fails: {said(e)}") from e
    if "xml_file" in kwargs:
        env = factory()
        model = env.unwrapped.model  # type: ignore[attr-defined]
        env.close()
        if model.nplugin or model.opt.enableflags & mujoco.mjtEnableBit.mjENBL_SLEEP:
            return "the model uses plugins or sleeping, whose state cannot be saved"
    return None


def make_native(factory: EnvFactory, num_envs: int, **options: Any) -> NativeVectorEnv:
    """Return ``num_envs`` copies of what ``factory`` builds; ``options`` are those of ``NativeVectorEnv``.

    Raises:
        RloptError: the environment does not run natively; the line says why.
    """
    if (reason := refusal(factory)) is not None:
        raise RloptError(f"env={factory.spec.id} with backend=native: {reason}; use backend=sync")
    found = _find(factory)
    if found is None:
        from rlopt.envs.teams.mamujoco import native

        return native(factory, _TASKS, num_envs, **options)
    task, version = found
    return ParametricNativeEnv(factory(), lambda env: task(env, version), num_envs, **options)


def build(request: EnvRequest) -> NativeVectorEnv:
    """Return the backend ``native``; raises as ``make_native``."""
    return make_native(request.factory, request.num_envs, **request.common)
