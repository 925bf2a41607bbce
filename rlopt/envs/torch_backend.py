"""The backend ``torch``: classic control and the user's own ``TorchEnv`` classes."""

from __future__ import annotations

import importlib
import math

from rlopt.config import hint
from rlopt.envs.classic import CLASSIC
from rlopt.envs.factory import EnvRequest
from rlopt.envs.teams.names import twin
from rlopt.envs.torch_env import TorchEnv, own_class
from rlopt.types import RloptError


def build(request: EnvRequest) -> TorchEnv:
    """Return the backend ``torch``.

    Raises:
        RloptError: no torch version of this environment, or wrappers.
    """
    spec, own = request.factory.spec, dict(request.factory.spec.kwargs)
    cls = CLASSIC.get(spec.id) or own_class(spec)
    if (same := twin(spec.id)) is not None:
        (module, _, name), own = same[0].partition(":"), same[1]
        cls = getattr(importlib.import_module(module), name)
    if cls is None:
        raise RloptError(
            f"env={request.id} has no version in torch (there are {', '.join(CLASSIC)}, and teams); "
            "write one as a rlopt.envs.TorchEnv, or use env.backend=auto"
        )
    if request.factory.wrappers:
        fix = "leave them out" if own_class(spec) is not None else "use env.backend=sync"
        raise RloptError(f"env.wrappers wrap single environments; env.backend=torch has none: {fix}")
    if unknown := sorted(set(request.factory.facts) - set(cls.facts)):
        raise RloptError(
            f"env={request.id} on env.backend=torch tells no fact {unknown[0]!r}; {hint(unknown[0], cls.facts)}"
        )
    kwargs = {**own, **request.factory.kwargs}
    if kwargs.pop("render_mode", None) is not None:
        raise RloptError(f"env={request.id} draws no pictures on env.backend=torch; use env.backend=sync")
    limit = kwargs.pop("max_episode_steps", spec.max_episode_steps)
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in kwargs.values()):
        raise RloptError(f"env={request.id} on env.backend=torch takes numbers, not env.kwargs={kwargs}")
    return cls(request.num_envs, **request.common, max_episode_steps=limit, **kwargs)
