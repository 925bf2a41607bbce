"""``rlopt evaluate RUN --grid``: a policy over a grid of simulator parameters, its worst case and its mean."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlopt.analysis.parameter_grid import draw_parameter_grid
from rlopt.envs.make import find_backend, resolve_backend
from rlopt.errors import RloptError
from rlopt.policy import load_policy
from rlopt.training.evaluate import environment_of, run_of
from rlopt.training.grid_evaluation import GridEvaluation, evaluate_grid
from rlopt.training.saved import saved_settings


def evaluate_over_grid(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Return the line to print and the JSON of ``--grid``; draws the picture that was asked for."""
    path = Path(arguments.path)
    policy = load_policy(path, arguments.device)
    env, settings = environment_of(path, policy, arguments.env, arguments.trust)
    if env.wrappers:
        raise RloptError(f"--grid cannot run wrappers, and {path} was trained with some")
    candidates = [resolve_backend(env.id, backend, kwargs=env.kwargs) for backend in (env.backend, "auto")]
    backend = next((name for name in candidates if find_backend(name).has_parameters), "torch")
    bounds = _bounds_of(arguments.grid) or _box(path)
    found = evaluate_grid(
        policy,
        env.id,
        bounds,
        count=arguments.points or 10,
        episodes=arguments.episodes or 10,
        seed=int(settings.get("seed", 0)) if arguments.seed is None else arguments.seed,
        backend=backend,
        kwargs=env.kwargs,
    )
    if arguments.picture:
        axes = {name: np.linspace(*ends, found.count) for name, ends in bounds.items()}
        try:
            draw_parameter_grid({env.id: found.means}, axes, arguments.picture)
        except OSError as error:
            raise RloptError(f"--picture {arguments.picture} cannot be written: {error}") from error
    return _told(found), _as_json(found)


def _bounds_of(texts: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return the range of each parameter of ``--grid``."""
    found: dict[str, tuple[float, float]] = {}
    for text in texts:
        name, _, ends = text.partition("=")
        try:
            low, high = map(float, ends.split(":"))
        except ValueError:
            low = high = math.nan
        if not (name and low < high and math.isfinite(high - low)):
            raise RloptError(f"--grid {text}: give parameters as NAME=LOW:HIGH, such as m=0.5:1.5")
        if name in found:
            raise RloptError(f"--grid {text}: {name} is given twice; give one range of each parameter")
        found[name] = low, high
    return found


def _box(path: Path) -> dict[str, tuple[float, float]]:
    """Return the box that the run was trained in."""
    run = run_of(path)
    agent = saved_settings(run).values.get("agent") if run else None
    box = agent.get("box") if isinstance(agent, dict) else None
    try:
        bounds = {str(name): (float(low), float(high)) for name, (low, high) in box.items()}  # type: ignore[union-attr]
    except (AttributeError, TypeError, ValueError):
        bounds = {}
    if not bounds:
        raise RloptError(f"{path} has no agent.box; name the parameters: --grid NAME=LOW:HIGH, such as m=0.5:1.5")
    return bounds


def _told(found: GridEvaluation) -> str:
    names = found.box.names
    worst = found.points[int(found.means.argmin())]
    where = ", ".join(f"{name}={value:.4g}" for name, value in zip(names, worst, strict=True))
    points = f"{' x '.join([str(found.count)] * len(names))} points of {', '.join(names)}"
    told = f"return {found.worst:.1f} at worst ({where}), {found.mean:.1f} on average"
    return f"{told}: {points}, {found.returns.shape[1]} episodes each"


def _as_json(found: GridEvaluation) -> dict[str, Any]:
    points = [
        {**dict(zip(found.box.names, point.tolist(), strict=True)), "return": float(returns.mean())}
        for point, returns in zip(found.points, found.returns, strict=True)
    ]
    return {"worst": found.worst, "mean": found.mean, "episodes": found.returns.shape[1], "points": points}
