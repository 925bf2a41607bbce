"""Short runs of the trainer, for its tests."""

import csv
from pathlib import Path

from rlopt.training import train_config

SMALL = {"name": "sac", "network": {"hidden": [16]}, "batch_size": 8, "warmup_steps": 20}


def config(run_dir: Path, **more):
    base = {
        "total_steps": 100,
        "device": "cpu",
        "run_dir": str(run_dir),
        "agent": SMALL,
        "env": {"id": "Pendulum-v1"},
        "eval": {"every": 50, "episodes": 2},
        "log": {"every": 25, "tensorboard": False},
    }
    return train_config({**base, **more})


def run_to_end(trainer):
    try:
        return trainer.run()
    finally:
        trainer.close()
        trainer.folder.close()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as f:
        return list(csv.DictReader(f))


PLAIN = {"name": "sac", "network": {"hidden": [8]}, "batch_size": 8, "warmup_steps": 20, "fused": False}
