"""From a name to one Gymnasium environment: ids, wrappers, and clear words where something is missing."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import metadata
from types import ModuleType
from typing import Any

import gymnasium
import torch
from gymnasium.envs.registration import EnvSpec as GymSpec
from gymnasium.envs.registration import load_env_creator

from rlopt.config import call_options, nearest
from rlopt.env_names import ELSEWHERE, EXTRAS, installs, unknown
from rlopt.envs.minigrid import Symbols, has_mission
from rlopt.envs.teams.names import VMAS, pettingzoo_spec, team_spec
from rlopt.envs.torch_env import class_spec, own_class
from rlopt.registry import register_games
from rlopt.types import RloptError

Env = gymnasium.Env[Any, Any]
Wrapper = str | Mapping[str, Any] | Callable[[Env], Env]

_GRAPHICS = re.compile(r"[/\\\\](OpenGL|mujoco[/\\\\](egl|glfw|osmesa|rendering|gl_context))\b")
_NORMALIZING = {"NormalizeObservation": "normalize_obs", "NormalizeReward": "normalize_reward"}
"""Wrappers with statistics of their own, and the option of ``env`` that does what they do."""


def _missing(module: str, needed_by: str) -> RloptError:
    package = module.partition(".")[0]
    return RloptError(f"{needed_by} needs the package {module}, which is not installed; {installs(package)}")


def _import(module: str, needed_by: str) -> ModuleType:
    """Import a module of the user's.

    Raises:
        ImportError: it or what it needs is not there.
        RloptError: the name is no module's, or importing it fails.
    """
    if module.startswith("."):
        raise RloptError(f"{needed_by}: {module} is no module's name; write module:Name for module.py on PYTHONPATH")
    try:
        return importlib.import_module(module)
    except ImportError:
        raise
    except (Exception, SystemExit) as e:
        raise RloptError(f"{needed_by}: importing {module} fails: {said(e)}") from e


def find_spec(env_id: str) -> GymSpec:
    """Return Gymnasium's registration of ``env_id`` (``Name-v0``, ``ALE/Name-v5`` or ``module:Name-v0``), or what
    stands for one where it is ``module:Class`` with a ``TorchEnv``, a team's name (``mamujoco/…``) or
    ``pettingzoo:module``.

    Raises:
        RloptError: unknown id (with the nearest known one), a module that cannot be imported, or a missing extra.
    """
    module, _, name = env_id.rpartition(":")
    if module == "pettingzoo":
        return pettingzoo_spec(env_id, name)
    if module:
        try:
            _import(module, f"env={env_id}")
        except ModuleNotFoundError as e:
            raise RloptError(f"env={env_id}: no module named {e.name}; install it or put it on PYTHONPATH") from e
        except ImportError as e:
            raise RloptError(f"env={env_id}: importing {module} fails: {said(e)}") from e
        if (own := class_spec(env_id)) is not None:
            return own
    try:
        register_games(name)
    except ModuleNotFoundError as e:
        raise _missing(e.name or "?", f"env={env_id}") from e
    if name not in gymnasium.registry:
        if not module and (team := team_spec(name)) is not None:
            return team
        raise RloptError(f"env={env_id} {unknown(name)}")
    return gymnasium.registry[name]


def find_wrapper(name: str) -> Callable[..., Env]:
    """Return the class of ``module:Class``, or the bare name of a class in ``gymnasium.wrappers``."""
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
        build, kwargs = find_wrapper(wrapper), dict[str, Any]()
    elif isinstance(wrapper, Mapping):
        unknown = sorted(set(wrapper) - {"class", "kwargs"})
        if unknown or "class" not in wrapper:
            raise RloptError(f"env.wrappers: a mapping has the keys class and kwargs, not {sorted(wrapper)}")
        build, kwargs = find_wrapper(str(wrapper["class"])), wrapper.get("kwargs") or {}
        if not isinstance(kwargs, Mapping):
            raise RloptError(f"env.wrappers: kwargs of {wrapper['class']} must be a mapping, not {kwargs!r}")
    elif callable(wrapper):
        build, kwargs = wrapper, {}
    else:
        raise RloptError(
            f"env.wrappers: {wrapper!r} is neither module:Class, a mapping with class and kwargs, nor callable"
        )
    label = wrapper if isinstance(wrapper, str) else getattr(build, "__name__", repr(build))
    try:
        wrapped = build(env, **kwargs)
    except (Exception, SystemExit) as e:
        raise RloptError(f"env.wrappers: {label} refuses this environment: {said(e)}") from e
    if not isinstance(wrapped, gymnasium.Env):
        raise RloptError(f"env.wrappers: {label} returned {type(wrapped).__name__}, not a gymnasium.Env")
    return wrapped


def said(error: BaseException) -> str:
    """Return the first line of what an error says; of one that says nothing, where it was raised; of one from a
    graphics library that the user chose, that it cannot be used."""
    text = str(error).strip().splitlines()
    chosen = os.environ.get("MUJOCO_GL")
    if chosen and any(_GRAPHICS.search(frame.filename) for frame in traceback.extract_tb(error.__traceback__)):
        what = text[0] if text else type(error).__name__
        return f"MUJOCO_GL={chosen} cannot be used here ({what}); unset it, or install libegl1 or libosmesa6"
    if text and not isinstance(error, SystemExit | LookupError):
        return text[0]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {frame.filename}, line {frame.lineno}: {frame.line}"


def _versions(spec: GymSpec) -> str:
    """Return which versions of a well-known package and of MuJoCo have met, where an environment of it fails."""
    package = spec.entry_point.partition(".")[0] if isinstance(spec.entry_point, str) else ""
    with contextlib.suppress(metadata.PackageNotFoundError):
        if package in ELSEWHERE:
            name = package.replace("_", "-")
            told = f"{name} {metadata.version(name)} with mujoco {metadata.version('mujoco')}"
            return f" ({told}, which may not go together: try another version of {name})"
    return ""


def _refuse_words(spec: GymSpec, kwargs: Mapping[str, Any]) -> None:
    """Refuse text where an environment's keyword is a number by default: many would fail only when they use it."""
    skip = kwargs.get("frame_skip", 1)
    if isinstance(skip, int | float) and (skip < 1 or skip != int(skip)):
        raise RloptError(f"env={spec.id}: env.kwargs.frame_skip: expected a whole number of at least 1, got {skip}")
    if not any(isinstance(value, str) for value in kwargs.values()):
        return
    entry = spec.entry_point
    try:
        creator: Any = load_env_creator(entry) if isinstance(entry, str) else entry
        own = call_options(creator) if creator else {}
        kinds = typing.get_type_hints(creator.__init__ if isinstance(creator, type) else creator)  # type: ignore[misc]
    except Exception:  # making it tells what is missing
        return
    for key, value in kwargs.items():
        default, kind = own.get(key), kinds.get(key, float)
        words = isinstance(value, str) and str not in (kind, *typing.get_args(kind))
        if words and isinstance(default, int | float) and not isinstance(default, bool):
            raise RloptError(f"env={spec.id}: env.kwargs.{key}: expected a number, got {value!r}")


def _refuse_render_mode(spec: GymSpec, mode: Any) -> None:
    """Refuse a way of drawing that the environment lacks, which Gymnasium only warns of."""
    try:
        creator: Any = load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
        own = list(creator.metadata["render_modes"])
    except Exception:  # it does not say; making it tells what is missing
        return
    human = ["human"] if {"rgb_array", "rgb_array_list"} & set(own) else []
    if mode not in (known := [*own, *human, *(f"{each}_list" for each in own)]):
        near = nearest(str(mode), known)
        others = f"choose from {', '.join(dict.fromkeys([*own, *human]))}" if own else "it cannot be drawn"
        advice = f"did you mean {near}?" if near else others
        raise RloptError(f"env={spec.id} has no render_mode={mode!r}; {advice}")


def prepare_graphics(mode: str = "rgb_array") -> None:
    """Let MuJoCo draw by EGL where there is no screen to draw on, unless the user has chosen (``MUJOCO_GL``), and
    pygame pictures without looking for one (``SDL_VIDEODRIVER``), of which it would complain."""
    if sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        return
    os.environ.setdefault("MUJOCO_GL", "egl")
    if mode.startswith("rgb_array"):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


def _refuse_statistics(env: Env, name: str) -> None:
    """Refuse wrappers that keep statistics: an evaluation, in environments of its own, would have others, and report
    scaled rewards."""
    while isinstance(env, gymnasium.Wrapper):
        for kind, option in _NORMALIZING.items():
            if isinstance(env, getattr(gymnasium.wrappers, kind)):
                raise RloptError(
                    f"{name}: the wrapper {kind} has statistics of its own, which evaluations would neither share nor "
                    f"see through; leave it out and use env.{option}=true"
                )
        env = env.env


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
        """Return a new environment, not yet reset.

        Gymnasium's own checkers are left out because they cost as much as a fast environment's step; the time limit
        stays.

        Raises:
            RloptError: a missing package, a wrong keyword, or an environment that fails while it is built.
        """
        name = f"env={self.spec.id}"
        if self.spec.entry_point == VMAS:
            raise RloptError(f"{name} takes no wrappers, facts or pictures (only env.backend=vmas runs it)")
        _refuse_words(self.spec, self.kwargs)
        if self.kwargs.get("render_mode") is not None:
            _refuse_render_mode(self.spec, self.kwargs["render_mode"])
            prepare_graphics(str(self.kwargs["render_mode"]))
        bare = deepcopy(self.spec)
        bare.order_enforce, bare.disable_env_checker = False, True
        try:
            env = gymnasium.make(bare, **self.kwargs)
        except gymnasium.error.DependencyNotInstalled as e:
            module = next(
                (m for m in EXTRAS if m.replace("_", "") in str(e).lower().replace("-", "").replace("_", "")), ""
            )
            if module:
                raise _missing(module, name) from e
            raise RloptError(f"{name} needs a package that is not installed: {said(e)}") from e
        except ModuleNotFoundError as e:
            raise _missing(e.name or "?", name) from e
        except gymnasium.error.Error as e:
            raise RloptError(f"{name} cannot be built: {said(e)}") from e
        except MemoryError as e:
            raise RloptError(f"{name} does not fit in memory with env.kwargs={dict(self.kwargs)}") from e
        except (Exception, SystemExit) as e:
            if own_class(self.spec) is not None:
                if "render_mode" in self.kwargs:
                    raise RloptError(f"{name} is written in torch and draws nothing; leave videos out") from e
                raise RloptError(
                    f"{name} is written in torch, where all rows step at once; use env.backend=torch, without wrappers"
                ) from e
            given = f" with env.kwargs={dict(self.kwargs)}" if self.kwargs else ""
            raise RloptError(f"{name} cannot be built{given}: {said(e)}{_versions(self.spec)}") from e
        for wrapper in self.wrappers:
            env = wrap(env, wrapper)
        if has_mission(env.observation_space):
            env = Symbols(env)
        _refuse_statistics(env, name)
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
    """Whether it is for evaluations, which a backend may run otherwise than training (lost lives)."""
    protocol: str | None = None
    """How a game is played and paid for, of a backend with ``Backend.protocols``; None for what the id says."""

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
