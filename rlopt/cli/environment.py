"""Settings of the process that must stand before torch is imported."""

from __future__ import annotations

import os

PROCESS_SETTINGS = {
    # How long an idle OpenMP thread spins before it sleeps. The default, practically for ever, makes small networks
    # many times slower as soon as another process is busy; not at all takes away what a second thread gains. A thousand
    # rounds, some microseconds, keep both (results/sac_throughput).
    "GOMP_SPINCOUNT": "1000",
    "KMP_BLOCKTIME": "0",
    # torch asks for huge pages for tensors of 2 MiB and more, where the system lets programs ask. Images and gradients
    # of convolutions are that large, and have so many small pages that an update of DQN on Atari takes a tenth longer.
    "THP_MEM_ALLOC_ENABLE": "1",
}


def prepare_environment() -> None:
    """Let waiting threads sleep soon unless the environment says otherwise; call it before torch is imported."""
    for name, value in PROCESS_SETTINGS.items():
        os.environ.setdefault(name, value)
