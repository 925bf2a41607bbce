"""Synthetic run folders: what a real run leaves behind, in miniature."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

MakeRun = Callable[..., Path]


def write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_run(
    folder: Path,
    returns: dict[int, list[float]],
    *,
    env: str = "HalfCheetah-v4",
    seed: int = 0,
    agent: dict[str, Any] | None = None,
    training: list[tuple[int, float]] = (),
    total_steps: int = 110_000,
    **config: Any,
) -> Path:
    """A run folder whose evaluation at each step of ``returns`` gave those episode returns."""
    folder.mkdir(parents=True)
    tree = {
        "seed": seed,
        "total_steps": total_steps,
        "num_envs": 1,
        "run_dir": str(folder),
        "agent": {"name": "sac", "learning_rate": 1e-3, **(agent or {})},
        "env": {"id": env, "kwargs": {}},
        "buffer": {"name": "uniform"},
        "eval": {"every": 5000, "episodes": 10},
        **config,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    versions = {"rlopt": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "mujoco": "3.17.0", "cpu": "Some CPU @ 2.0GHz"}
    (folder / "versions.json").write_text(json.dumps(versions), encoding="utf-8")
    rows = [[step, i, value, 1000] for step, values in returns.items() for i, value in enumerate(values)]
    write_csv(folder / "evaluations.csv", ["step", "episode", "return", "length"], rows)
    if training:
        write_csv(folder / "episodes.csv", ["step", "return", "length"], [[s, r, 1000] for s, r in training])
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``make_run(name, returns, …)`` writes ``tmp_path/name``."""
    return lambda name, returns, **options: write_run(tmp_path / name, returns, **options)
