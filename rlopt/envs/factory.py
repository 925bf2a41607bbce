"""From a name to one Gymnasium environment: ids, wrappers, and clear words where something is missing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import gymnasium
import torch
from gymnasium.envs.registration import EnvSpec as GymSpec

from rlopt.config import nearest
from rlopt.envs.torch_env import class_spec
from rlopt.types import RloptError

Env = gymnasium.Env[Any, Any]
Wrapper = str | Mapping[str, Any] | Callable[[Env], Env]

_EXTRAS = {"mujoco": "mujoco", "imageio": "mujoco", "ale_py": "atari", "shimmy": "atari"}


def _missing(module: str, needed_by: str) -> RloptError:
    package = module.partition(".")[0]
    advice = f'pip install "rlopt[{_EXTRAS[package]}]"' if package in _EXTRAS else f"pip install {package}"
    return RloptError(f"{needed_by} needs the package {module}, which is not installed; {advice}")


def _import(module: str, needed_by: str) -> ModuleType:
    if module.startswith("."):
        raise RloptError(f"{needed_by}: {module} is no module's name; write module:Name for module.py on PYTHONPATH")
    return importlib.import_module(module)


def find_spec(env_id: str) -> GymSpec:
    """Gymnasium's registration of ``env_id`` (``Name-v0``, ``ALE/Name-v5`` or ``module:Name-v0``), or what stands for
    one where it is ``module:Class`` with a ``TorchEnv``.

    Raises:
        RloptError: unknown id (with the nearest known one), a module that cannot be imported, or a missing extra.
    """
    module, _, name = env_id.rpartition(":")
    if module:
        try:
            _import(module, f"env={env_id}")
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
        near = nearest(name, gymnasium.registry)
        advice = f"did you mean {near}?" if near else "`rlopt list envs` shows what there is"
        raise RloptError(f"env={env_id} is not a registered environment; {advice}")
    return gymnasium.registry[name]


def _version(env_id: str) -> int:
    return int(env_id.rpartition("-v")[2])


def find_wrapper(name: str) -> Callable[..., Env]:
    """``module:Class``, or the bare name of a class in ``gymnasium.wrappers``."""
    module, _, attribute = name.rpartition(":")
    try:
        home = _import(module or "gymnasium.wrappers", f"env.wrappers: {name}")
    except ImportError as e:
        raise RloptError(f"env.wrappers: cannot import {name!r}: {e}") from e
    found = getattr(home, attribute, None)
    if not callable(found):
        near = nearest(attribute, dir(home) if module else gymnasium.wrappers.__all__)
        advice = f"; did you mean {near}?" if near else ""
        raise RloptError(f"env.wrappers: {home.__name__} has no class {attribute!r}{advice}")
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


def with_facts(metadata: Mapping[str, Any] | None, facts: Sequence[str]) -> dict[str, Any]:
    """Return an environment's metadata in which it declares ``facts`` beside its own."""
    declared = (metadata or {}).get("facts", ())
    return {**(metadata or {}), "facts": tuple(dict.fromkeys((*declared, *facts)))}


@dataclass(frozen=True)
class EnvFactory:
    """Builds one environment; picklable, so that worker processes can be told what to build."""

    spec: GymSpec
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    wrappers: Sequence[Wrapper] = ()
    facts: tuple[str, ...] = ()
    """Names in the last ``info`` of an episode, beside those that the environment's own metadata declare."""

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
        except MemoryError as e:
            raise RloptError(f"{name} does not fit in memory with env.kwargs={dict(self.kwargs)}") from e
        except (gymnasium.error.Error, ImportError, ValueError, AssertionError, OSError, AttributeError) as e:
            raise RloptError(f"{name} cannot be built: {_first_line(e)}") from e
        for wrapper in self.wrappers:
            env = wrap(env, wrapper)
        if self.facts:
            env.metadata = with_facts(env.metadata, self.facts)
        return env


@dataclass(frozen=True)
class EnvRequest:
    """What a backend is asked to build."""

    id: str
    factory: EnvFactory
    """Builds one Gymnasium environment of this kind, wrappers included."""
    num_envs: int
    seed: int
    stream: str
    """Slot i's seed is ``derive_seed(seed, stream, i)``."""
    device: torch.device
    autoreset: bool
    timeout: float
    """Seconds that one step of a worker may take."""
    evaluation: bool = False
    """Whether it is for evaluations, where a backend's protocol may differ (lost lives, clipped rewards)."""

    @property
    def common(self) -> dict[str, Any]:
        """What every vector environment takes by keyword, whatever else it needs."""
        return {
            "seed": self.seed,
            "device": self.device,
            "autoreset": self.autoreset,
            "env_id": self.id,
            "stream": self.stream,
        }
