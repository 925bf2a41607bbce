"""How a policy does over a grid of simulator parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlopt.envs import make_env
from rlopt.envs.make import resolve_backend, stepping_device
from rlopt.loops.configuration import MOST_EPISODES
from rlopt.loops.evaluation import check_spaces
from rlopt.loops.parameter_box import MAX_ROWS, Array, Bounds, ParameterBox, Simulator, parametric
from rlopt.policy import Policy
from rlopt.random import derive_seed
from rlopt.runs.csv_table import CsvTable
from rlopt.training.result import Result
from rlopt.training.trainer import Callback, Trainer
from rlopt.types import Episode, RloptError


@dataclass(frozen=True)
class GridEvaluation:
    """Returns of a policy over a grid of parameters."""

    box: ParameterBox
    count: int
    """Grid points per parameter."""
    returns: Array
    """(count**d, E), the last parameter varying fastest."""

    @property
    def points(self) -> Array:
        """(count**d, d) in the simulator's units."""
        return np.stack([v.numpy() for v in self.box.values(self.box.grid(self.count)).values()], 1)

    @property
    def means(self) -> Array:
        """(count, …, count) mean returns, an axis per parameter."""
        means: Array = self.returns.mean(1).reshape((self.count,) * len(self.box.names))
        return means

    @property
    def worst(self) -> float:
        """The least mean return of a grid point: the figure that robust control is about."""
        return float(self.means.min())

    @property
    def mean(self) -> float:
        """The mean over the grid."""
        return float(self.means.mean())

    def append_to(self, table: CsvTable, **first: Any) -> None:
        """Append a row per grid point: what is in ``first``, the parameters, mean and least return."""
        for point, returns in zip(self.points, self.returns, strict=True):
            named = dict(zip(self.box.names, point.tolist(), strict=True))
            table.append({**first, **named, "return": returns.mean(), "least_return": returns.min()})


def evaluate_grid(
    policy: Policy,
    env_id: str,
    bounds: Bounds,
    *,
    count: int = 10,
    episodes: int = 4,
    seed: int = 0,
    backend: str = "torch",
    kwargs: Mapping[str, Any] | None = None,
) -> GridEvaluation:
    """Evaluate ``policy`` on a grid of simulator parameters, with the same ``episodes`` starts at every point.

    Args:
        bounds: {name: (low, high)}.
        count: grid points per parameter, both ends among them.

    Raises:
        RloptError: an environment without these parameters, or with other spaces than the policy's.
    """
    box = ParameterBox.of(bounds)
    if (asked := count ** len(bounds) * episodes) > MOST_EPISODES:
        points = f"{count:,} points of each of {len(bounds)} parameters and {episodes:,} episodes at each"
        raise RloptError(f"{points} are {asked:,} episodes; at most {MOST_EPISODES:,} are run, so take fewer points")
    rows = min(count ** len(bounds) * episodes, max(MAX_ROWS, episodes))
    backend = resolve_backend(env_id, backend, kwargs=kwargs)
    home = stepping_device(backend, policy.device)
    env = make_env(env_id, rows, seed, backend, home, autoreset=False, kwargs=kwargs, stream="grid")
    try:
        check_spaces(policy.spec, env.spec)
        box.nominal(parametric(env))
        returns = Simulator(env, box, episodes).returns(policy, box.grid(count), derive_seed(seed, "grid"))
    finally:
        env.close()
    return GridEvaluation(box, count, returns.numpy())


class GridCallback(Callback):
    """Evaluates the policy on the grid whenever the trainer evaluates, into the run's ``robust_evaluations.csv``.

    Arguments are those of ``evaluate_grid``.
    """

    def __init__(self, env_id: str, bounds: Bounds, **options: Any) -> None:
        self.env_id, self.bounds, self.options = env_id, bounds, options
        self.evaluations: dict[int, GridEvaluation] = {}
        """Those of this process, by step."""

    def on_start(self, trainer: Trainer) -> None:
        path = Path(trainer.folder.path) / "robust_evaluations.csv"
        self._table = CsvTable(path, ["step", *self.bounds, "return", "least_return"])
        self._table.truncate_after(trainer.loop.step)

    def on_evaluation(self, trainer: Trainer, episodes: list[Episode]) -> None:
        found = evaluate_grid(trainer.loop.policy(), self.env_id, self.bounds, **self.options)
        self.evaluations[trainer.loop.step] = found
        found.append_to(self._table, step=trainer.loop.step)
        self._table.flush()

    def on_end(self, trainer: Trainer, result: Result) -> None:
        self._table.close()
