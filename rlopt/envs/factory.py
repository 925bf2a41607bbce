"""From a name to one Gymnasium environment: ids, wrappers, and clear words where something is missing."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec as GymSpec

from rlopt.envs.torch_env import class_spec
from rlopt.types import RloptError

Env = gymnasium.Env[Any, Any]
Wrapper = str | Mapping[str, Any] | Callable[[Env], Env]

_EXTRAS = {"mujoco": "mujoco", "imageio": "mujoco", "ale_py": "atari", "shimmy": "atari"}


def _missing(module: str, needed_by: str) -> RloptError:
    package = module.partition(".")[0]
    advice = f'pip install "rlopt[{_EXTRAS[package]}]"' if package in _EXTRAS else f"pip install {package}"
    return RloptError(f"{needed_by} needs the package {module}, which is not installed; {advice}")


def _nearest(env_id: str) -> str:
    found = difflib.get_close_matches(env_id, gymnasium.registry, n=1, cutoff=0.4)
    if not found:
        lowered = {name.lower(): name for name in gymnasium.registry}
        found = [lowered[n] for n in difflib.get_close_matches(env_id.lower(), lowered, n=1, cutoff=0.4)]
    return f"; did you mean {found[0]}?" if found else "; `rlopt list envs` shows what there is"


def find_spec(env_id: str) -> GymSpec:
    """Gymnasium's registration of ``env_id`` (``Name-v0``, ``ALE/Name-v5`` or ``module:Name-v0``), or what stands for
    one where it is ``module:Class`` with a ``TorchEnv``.

    Raises:
        RloptError: unknown id (with the nearest known one), a module that cannot be imported, or a missing extra.
    """
    module, _, name = env_id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as e:
            raise RloptError(f"env={env_id}: no module named {e.name}; install it or put it on PYTHONPATH") from e
        if (own := class_spec(env_id)) is not None:
            return own
    if name.startswith("ALE/"):
        try:
            gymnasium.register_envs(importlib.import_module("ale_py"))
        except ModuleNotFoundError as e:
            raise _missing("ale_py", f"env={env_id}") from e
    if name not in gymnasium.registry and "-v" not in name:
        versions = [s for s in gymnasium.registry if s.rpartition("-v")[0] == name]
        if versions:
            raise RloptError(f"env={env_id} lacks its version; did you mean {max(versions, key=_version)}?")
    if name not in gymnasium.registry:
        raise RloptError(f"env={env_id} is not a registered environment{_nearest(name)}")
    return gymnasium.registry[name]


def _version(env_id: str) -> int:
    return int(env_id.rpartition("-v")[2])


def find_wrapper(name: str) -> Callable[..., Env]:
    """``module:Class``, or the bare name of a class in ``gymnasium.wrappers``."""
    module, _, attribute = name.rpartition(":")
    try:
        found = getattr(importlib.import_module(module or "gymnasium.wrappers"), attribute, None)
    except ImportError as e:
        raise RloptError(f"env.wrappers: cannot import {name!r}: {e}") from e
    if not callable(found):
        names = gymnasium.wrappers.__all__ if not module else dir(importlib.import_module(module))
        near = difflib.get_close_matches(attribute, names, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RloptError(f"env.wrappers: {module or 'gymnasium.wrappers'} has no class {attribute!r}{hint}")
    return found  # type: ignore[no-any-return]


def wrap(env: Env, wrapper: Wrapper) -> Env:
    """Apply one wrapper: a name, ``{"class": name, "kwargs": {…}}`` or a callable."""
    if isinstance(wrapper, str):
        build, kwargs = find_wrapper(wrapper), {}
    elif isinstance(wrapper, Mapping):
        unknown = sorted(set(wrapper) - {"class", "kwargs"})
        if unknown or "class" not in wrapper:
            raise RloptError(f"env.wrappers: a mapping has the keys class and kwargs, not {sorted(wrapper)}")
        build, kwargs = find_wrapper(str(wrapper["class"])), dict(wrapper.get("kwargs") or {})
    elif callable(wrapper):
        build, kwargs = wrapper, {}
    else:
        raise RloptError(
            f"env.wrappers: {wrapper!r} is neither module:Class, a mapping with class and kwargs, nor callable"
        )
    label = wrapper if isinstance(wrapper, str) else getattr(build, "__name__", repr(build))
    try:
        wrapped = build(env, **kwargs)
    except (TypeError, ValueError, AssertionError, AttributeError) as e:
        raise RloptError(f"env.wrappers: {label} refuses this environment: {_first_line(e)}") from e
    if not isinstance(wrapped, gymnasium.Env):
        raise RloptError(f"env.wrappers: {label} returned {type(wrapped).__name__}, not a gymnasium.Env")
    return wrapped


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


@dataclass(frozen=True)
class EnvFactory:
    """Builds one environment; picklable, so that worker processes can be told what to build."""

    spec: GymSpec
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    wrappers: Sequence[Wrapper] = ()

    def __call__(self) -> Env:
        """A new environment, not yet reset.

        Gymnasium's own checkers are left out because they cost as much as a fast environment's step; the time limit
        stays.

        Raises:
            RloptError: a missing package, a wrong keyword, or an environment that fails while it is built.
        """
        bare = deepcopy(self.spec)
        bare.order_enforce, bare.disable_env_checker = False, True
        name = f"env={self.spec.id}"
        try:
            env = gymnasium.make(bare, **self.kwargs)
        except gymnasium.error.DependencyNotInstalled as e:
            module = next(
                (m for m in _EXTRAS if m.replace("_", "") in str(e).lower().replace("-", "").replace("_", "")), ""
            )
            if module:
                raise _missing(module, name) from e
            raise RloptError(f"{name} needs a package that is not installed: {_first_line(e)}") from e
        except ModuleNotFoundError as e:
            raise _missing(e.name or "?", name) from e
        except TypeError as e:
            raise RloptError(f"{name} cannot be built with env.kwargs={dict(self.kwargs)}: {_first_line(e)}") from e
        except (gymnasium.error.Error, ImportError, ValueError, AssertionError, OSError, AttributeError) as e:
            raise RloptError(f"{name} cannot be built: {_first_line(e)}") from e
        for wrapper in self.wrappers:
            env = wrap(env, wrapper)
        return env
