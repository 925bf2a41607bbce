"""``make_env``: from a name to a vector environment, and the registry of backends."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import torch
from gymnasium import VectorizeMode

from rlopt.config import hint
from rlopt.envs import atari
from rlopt.envs.adapter import VectorAdapter
from rlopt.envs.factory import EnvFactory, EnvRequest, Wrapper, find_spec, with_facts
from rlopt.envs.sync import SyncVectorEnv
from rlopt.envs.teams.names import VMAS, one_name, twin
from rlopt.envs.torch_env import own_class
from rlopt.envs.vector import VectorEnv
from rlopt.envs.workers import AsyncVectorEnv
from rlopt.types import RloptError, resolve_device

log = logging.getLogger(__name__)

MANY = 1_000
"""Environments from which on it is said that they are being built."""
MOST_ENVS = 1_000_000
"""More are a slip of the finger, and building them would take for ever."""
TIMEOUT = 60.0
"""Seconds that one step of a worker may take, if nothing else is said."""


@dataclass(frozen=True)
class Backend:
    """A way of running N copies of an environment, and what others must know of it."""

    build: Callable[[EnvRequest], VectorEnv] | str
    """Builds a vector environment, or raises RloptError where it cannot; or ``module:function``, which is imported when
    it is asked for, because it needs a package that is no dependency or takes long to import."""
    steps_on_cpu: bool = True
    """Whether its tensors are made on the CPU, and not on the device."""
    batched: bool = False
    """Whether its rows are one computation, which costs about the same for few rows as for many."""
    has_workers: bool = False
    """Whether its environments are processes that may stall (``timeout``)."""
    has_parameters: bool = False
    """Whether its environments may have simulator parameters (``set_parameters``)."""
    protocols: tuple[str, ...] = ()
    """Words of ``env.protocol``, where what it runs is played in more ways than one."""


def _sync(request: EnvRequest) -> VectorEnv:
    return SyncVectorEnv([request.factory] * request.num_envs, **request.common)


def _async(request: EnvRequest) -> VectorEnv:
    return AsyncVectorEnv([request.factory] * request.num_envs, timeout=request.timeout, **request.common)


def _vector(request: EnvRequest) -> VectorEnv:
    spec = request.factory.spec
    if spec.vector_entry_point is None:
        raise RloptError(f"env={request.id} has no vector version of its own; use env.backend=sync or async")
    if request.factory.wrappers:
        raise RloptError(
            "env.wrappers wrap single environments; env.backend=vector has none: use env.backend=sync or async"
        )
    if spec.namespace == "ALE":
        raise RloptError(
            f"env={request.id} with env.backend=vector is another task: it clips rewards, shows four grey frames of "
            "84 x 84 and begins with no-ops; use env.protocol=dopamine or classic (env.backend=atari)"
        )
    kwargs = dict(request.factory.kwargs)
    try:
        env = gymnasium.make_vec(spec, request.num_envs, vectorization_mode=VectorizeMode.VECTOR_ENTRY_POINT, **kwargs)
    except (TypeError, ValueError, gymnasium.error.Error) as e:
        raise RloptError(f"env={request.id} cannot be built as a vector with env.kwargs={kwargs}: {e}") from e
    if request.factory.facts:
        env.metadata = with_facts(env.metadata, request.factory.facts)
    return VectorAdapter(env, **request.common)


_BACKENDS: dict[str, Backend] = {
    "sync": Backend(_sync),
    "gymnasium": Backend(_sync),
    "async": Backend(_async, has_workers=True),
    "vector": Backend(_vector),
    "native": Backend("rlopt.envs.native:build", batched=True, has_parameters=True),
    "envpool": Backend("rlopt.envs.envpool:build"),
    "atari": Backend("rlopt.envs.atari:build", protocols=tuple(atari.PROTOCOLS)),
    "torch": Backend("rlopt.envs.torch_backend:build", steps_on_cpu=False, batched=True, has_parameters=True),
    "warp": Backend("rlopt.envs.warp:build", steps_on_cpu=False, batched=True),
    "vmas": Backend("rlopt.envs.teams.vmas:build", steps_on_cpu=False, batched=True),
}


def register_backend(name: str, backend: Backend) -> None:
    """Make ``backend`` available as ``make_env(…, backend=name)``.

    Raises:
        RloptError: the name is taken.
    """
    if name in _BACKENDS or name == "auto":
        raise RloptError(f"a backend named {name!r} is registered already; choose another name")
    _BACKENDS[name] = backend


def find_backend(name: str) -> Backend:
    """Return the backend of that name.

    Raises:
        RloptError: there is none.
    """
    if name not in _BACKENDS:
        raise RloptError(f"backend={name!r} is unknown; {hint(name, backend_names())}")
    return _BACKENDS[name]


def backend_names() -> list[str]:
    """Return what ``backend=`` accepts."""
    return ["auto", *_BACKENDS]


def stepping_device(backend: str, device: torch.device) -> torch.device:
    """Return where the tensors of a backend's environments are made: on the CPU for those that step there, else on
    ``device``, where ``auto`` (not resolved: solvers read a model) leaves them too. Left on the CPU, what only the host
    looks at needs no way to ``device`` and back."""
    return torch.device("cpu") if backend != "auto" and find_backend(backend).steps_on_cpu else device


def resolve_backend(
    id: str,
    backend: str = "auto",
    *,
    kwargs: Mapping[str, Any] | None = None,
    wrappers: Sequence[Wrapper] = (),
    facts: Sequence[str] = (),
) -> str:
    """Return the backend that ``make_env`` uses: ``auto`` is ``torch`` for a ``TorchEnv`` of the user's and for teams
    that are written in torch too, ``atari`` for a game that is not wrapped, ``native`` where that is exact, else
    ``sync``.

    A saved environment continues only with the backend that saved it, so a run writes down this name, not ``auto``.

    Raises:
        RloptError: an unknown backend; with ``auto`` an unknown id, or a game with what no protocol has.
    """
    if backend == "auto":
        from rlopt.envs.native import refusal

        spec = find_spec(id)
        if own_class(spec) is not None:
            return "torch"
        why = atari.refusal(spec, kwargs or {}, bool(wrappers), bool(facts))
        if why is None:
            return "atari"
        if atari.is_atari(spec) and not wrappers and not {"obs_type", "render_mode"} & set(kwargs or ()):
            raise RloptError(f"{why}; {atari.RAW}")
        if spec.entry_point == VMAS:
            return "vmas"
        if twin(spec.id) is not None and not wrappers and not facts and (kwargs or {}).get("render_mode") is None:
            return "torch"
        return "sync" if refusal(EnvFactory(spec, dict(kwargs or {}), tuple(wrappers), tuple(facts))) else "native"
    find_backend(backend)
    return backend


def make_env(
    id: str,
    num_envs: int = 1,
    seed: int = 0,
    backend: str = "auto",
    device: str | torch.device = "cpu",
    *,
    autoreset: bool = True,
    kwargs: Mapping[str, Any] | None = None,
    wrappers: Sequence[Wrapper] = (),
    facts: Sequence[str] = (),
    timeout: float = TIMEOUT,
    stream: str = "env",
    evaluation: bool = False,
    protocol: str | None = None,
) -> VectorEnv:
    """Return N copies of the environment ``id`` behind the one contract (``rlopt.envs.vector.VectorEnv``).

    Args:
        id: a registered Gymnasium id, ``ALE/Name-v5``, ``module:Name-v0`` (the module is imported and registers it),
            ``module:Class`` where that is a ``TorchEnv``, a team (``mamujoco/HalfCheetah-2x3``, ``mpe/spread``, …), or
            ``pettingzoo:module`` of a parallel environment.
        num_envs: N.
        seed: the run's seed; slot i's first reset uses ``derive_seed(seed, stream, i)``.
        backend: ``auto`` (``torch`` for a ``TorchEnv`` and teams that have one, ``atari`` for a game without wrappers,
            ``native`` where that equals Gymnasium exactly, else ``sync``), ``sync`` or ``gymnasium`` (Gymnasium's
            environments in this process), ``async`` (worker processes, replaced when they die or stall), ``vector``
            (the environment's own vector version), ``native`` (Gymnasium's MuJoCo tasks on MuJoCo's thread pool),
            ``atari`` (ale-py's vector environment), ``envpool``, ``torch`` and ``warp`` (on the device), or a
            registered name.
        device: where the tensors that it returns live; ``auto`` is CUDA where there is one.
        autoreset: whether ended rows are reset inside ``step`` (training) or wait for ``reset`` (evaluation).
        kwargs: keywords of the environment's constructor, or of ``gymnasium.make`` (``max_episode_steps``,
            ``render_mode``).
        wrappers: applied inside each environment, the first innermost: ``module:Class``, the bare name of a class in
            ``gymnasium.wrappers``, ``{"class": …, "kwargs": {…}}``, or a callable from environment to environment.
        facts: names in the last ``info`` of an episode (success, …) that become ``Episode.facts``, beside those that an
            environment declares itself, in ``metadata["facts"]``.
        timeout: seconds that one step of a worker may take (``async``; elsewhere there is nothing to wait for).
        stream: the name of the random stream; evaluation uses its own.
        evaluation: whether it is for evaluations, which a backend may run otherwise than training (lost lives).
        protocol: of Atari games, ``classic`` or ``dopamine``; by default as the id registers (``rlopt.envs.atari``).

    Time limits stay, and truncation stays apart from termination. An environment whose ``state_dict()`` is None
    cannot be saved: at resume it is reset with a fresh derived seed, its partial episode is dropped, n-step windows
    are cut there, and a warning is logged.

    Raises:
        RloptError: an unknown id, backend or wrapper (with the nearest right name), a missing extra, a wrong
            keyword, or a space that rlopt has no tensor for.
    """
    if not 1 <= num_envs <= MOST_ENVS:
        limit = "at least 1" if num_envs < 1 else f"at most {MOST_ENVS:,}"
        raise RloptError(f"num_envs={num_envs} must be {limit}")
    id, kwargs = one_name(id, kwargs or {})
    chosen = resolve_backend(id, backend, kwargs=kwargs, wrappers=wrappers, facts=facts)
    if num_envs >= MANY and not find_backend(chosen).batched:
        log.info("%s: building %s environments, one by one", id, f"{num_envs:,}")
    factory = EnvFactory(find_spec(id), kwargs, tuple(wrappers), tuple(facts))
    home, found = resolve_device(device), find_backend(chosen)
    if protocol is not None and not found.protocols:
        why = atari.refusal(factory.spec, factory.kwargs, bool(wrappers), bool(facts))
        raise RloptError(f"env.protocol={protocol}: {why or f'backend={chosen} has no protocols; use backend=atari'}")
    request = EnvRequest(id, factory, num_envs, seed, stream, home, autoreset, timeout, evaluation, protocol)
    if timeout != TIMEOUT and not found.has_workers:
        raise RloptError(
            f"env.timeout={timeout:g} has no effect with env.backend={chosen}, which has no workers; leave it out, or "
            "use env.backend=async"
        )
    build = found.build
    if isinstance(build, str):
        module, _, function = build.partition(":")
        build = getattr(importlib.import_module(module), function)
    return build(request)
