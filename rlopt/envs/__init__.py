"""Vector environments: one contract, one file per backend behind it."""

from rlopt.envs import registered as _registered  # noqa: F401 - importing it makes the names known
from rlopt.envs.adapter import VectorAdapter
from rlopt.envs.factory import EnvRequest
from rlopt.envs.make import Backend, backend_names, make_env, register_backend
from rlopt.envs.normalize import Normalizer
from rlopt.envs.snapshot import restore, snapshot
from rlopt.envs.sync import SyncVectorEnv
from rlopt.envs.torch_env import TorchEnv
from rlopt.envs.vector import VectorEnv
from rlopt.envs.workers import AsyncVectorEnv

__all__ = [
    "AsyncVectorEnv",
    "Backend",
    "EnvRequest",
    "Normalizer",
    "SyncVectorEnv",
    "TorchEnv",
    "VectorAdapter",
    "VectorEnv",
    "backend_names",
    "make_env",
    "register_backend",
    "restore",
    "snapshot",
]
