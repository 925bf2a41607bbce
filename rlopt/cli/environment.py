"""Settings of the process that must stand before torch is imported."""

from __future__ import annotations

import os

WAIT_POLICY = {
    # OpenMP threads that spin while they wait make small networks many times slower as soon as another process is busy.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
}


def prepare_environment() -> None:
    """Let waiting threads sleep, unless the caller's environment says otherwise; call it before torch is imported."""
    for name, value in WAIT_POLICY.items():
        os.environ.setdefault(name, value)
