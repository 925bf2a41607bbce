"""Deep DRPG against plain SAC and domain randomisation at equal samples: worst and mean return over a parameter grid.

    python experiments/drpg_deep.py pendulum --out results/drpg_deep
    python experiments/drpg_deep.py inverted_pendulum --out results/drpg_deep_inverted_pendulum
    python experiments/drpg_deep.py hopper --out results/drpg_deep_hopper       # hours
    python experiments/drpg_deep.py hopper --smoke --out /tmp/drpg_deep         # a minute: does it run?

The three methods are one agent with `agent.adversary` worst, uniform and nominal. The adversary simulates transitions
that nothing is learnt from, so "equal samples" has two readings, and both are in the table: baselines are evaluated
after as many training transitions (column `budget` = training), and again after as many more as the adversary of the
same seed used (`simulator`). Written: `table.csv`, `summary.md`, `grid.png` (mean over seeds).
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlopt.analysis.parameter_grid import draw_parameter_grid
from rlopt.analysis.statistics import probability_of_improvement
from rlopt.envs import make_env
from rlopt.loops.parameter_box import parametric
from rlopt.training import begin, train_config
from rlopt.training.grid_evaluation import GridCallback, GridEvaluation

Array = np.ndarray[Any, np.dtype[np.float64]]
METHODS = {"worst": "deep DRPG", "uniform": "domain randomisation", "nominal": "SAC"}


@dataclass(frozen=True)
class Preset:
    """One task: everything that the three methods share."""

    env: dict[str, Any]
    box: dict[str, tuple[float, float]]
    total_steps: int
    num_envs: int
    agent: dict[str, Any]
    grid: dict[str, Any]
    """Grid points per parameter and episodes at each."""
    smoke: dict[str, Any] = field(default_factory=dict)
    """What a smoke test changes."""

    @property
    def nominal(self) -> dict[str, float]:
        """The simulator's own parameters."""
        env = make_env(self.env["id"], 1, backend=self.env["backend"])
        try:
            return {name: float(parametric(env).parameters[name][0]) for name in self.box}
        finally:
            env.close()


SMALL: dict[str, Any] = {
    "name": "drpg_deep", "network": {"hidden": [64, 64]}, "batch_size": 128, "learning_rate": 1e-3,
    "update_ratio": [1, 2], "warmup_steps": 1_000, "bag": 16, "bag_share": 0.75,
    "search": {"candidates": 6, "episodes": 2, "rounds": 2},
}  # fmt: skip
"""An agent for tasks of two parameters that small networks learn."""

PRESETS = {
    "pendulum": Preset(
        env={"id": "Pendulum-v1", "backend": "torch"},
        # ±50 %. Pumping energy by hand swings up in 68 of the 200 steps nominally, and in 121 in the heaviest, longest
        # corner: there is something to be won everywhere.
        box={"m": (0.5, 1.5), "l": (0.5, 1.5)},
        total_steps=24_000,
        num_envs=8,
        agent={**SMALL, "adversary_every": 1_500},
        grid={"count": 10, "episodes": 10},
        smoke={"total_steps": 2_400, "adversary_every": 400},
    ),
    "inverted_pendulum": Preset(
        env={"id": "InvertedPendulum-v5", "backend": "native"},
        # M2TD3's box as in RRLS; nominal 5.0 and 10.5 kg. The longest possible return is 1000.
        box={"mass_pole": (1.0, 31.0), "mass_cart": (1.0, 11.0)},
        total_steps=40_000,
        num_envs=4,
        agent={**SMALL, "adversary_every": 2_000},
        grid={"count": 10, "episodes": 10},
        smoke={"total_steps": 1_200, "adversary_every": 400},
    ),
    "hopper": Preset(
        env={"id": "Hopper-v5", "backend": "native"},
        # M2TD3's box as in RRLS. The nominal masses, 3.67 and 4.06 kg, lie outside it; and below the foot's own
        # friction of 2 the floor's changes nothing for the foot, because MuJoCo takes the larger of the two.
        box={"friction_floor": (0.1, 3.0), "mass_torso": (0.1, 3.0), "mass_thigh": (0.1, 4.0)},
        total_steps=300_000,
        num_envs=4,
        agent={
            "name": "drpg_deep", "adversary_every": 25_000, "search": {"candidates": 8, "episodes": 1, "rounds": 3},
        },
        grid={"count": 10, "episodes": 2},
        smoke={"total_steps": 1_200, "adversary_every": 400},
    ),
}  # fmt: skip


def run(
    preset: Preset, adversary: str, seed: int, steps: int, every: int, folder: Path
) -> tuple[dict[int, GridEvaluation], int]:
    """Train and return the grid evaluations by step, and the transitions that the adversary simulated."""
    config = train_config(
        {
            "seed": seed, "total_steps": steps, "num_envs": preset.num_envs, "threads": 1, "device": "cpu",
            "run_dir": str(folder), "env": preset.env, "checkpoint": {"minutes": None},
            "agent": {**preset.agent, "box": preset.box, "adversary": adversary},
            "eval": {"every": every, "episodes": 1}, "log": {"every": every, "tensorboard": False},
        }
    )  # fmt: skip
    options = {k: v for k, v in preset.env.items() if k != "id"}
    grid = GridCallback(preset.env["id"], preset.box, **preset.grid, **options)
    trainer = begin(config, [grid])
    try:
        trainer.run()
        return grid.evaluations, int(trainer.loop.counters().get("adversary_steps", 0))
    finally:
        trainer.close()


def compare(preset: Preset, seed: int, folder: Path, both: bool) -> tuple[list[dict[str, Any]], dict[str, Array]]:
    """Rows of the table for one seed, and the last grid of every method."""
    rows: list[dict[str, Any]] = []
    last: dict[str, Array] = {}
    every, extra = preset.total_steps, 0
    for method, label in METHODS.items():
        begin = time.perf_counter()
        found, used = run(preset, method, seed, every + extra, every, folder / f"{method}-s{seed}")
        extra = used if both and method == "worst" else extra
        for step, budget in ((every, "training"), (every + extra, "simulator"))[: 1 + both]:
            # the adversary's own samples count in the second reading, so deep DRPG's row is the same in both
            grid = found[every if method == "worst" else step]
            rows.append(
                {
                    "method": label, "budget": budget, "seed": seed,
                    "training_steps": every if method == "worst" else step, "adversary_steps": used,
                    "worst": grid.worst, "worst_point": worst_point(grid), "p10": float(np.percentile(grid.means, 10)),
                    "mean": grid.mean, "nominal": nominal_return(grid, preset),
                }
            )  # fmt: skip
        last[method] = grid.means
        took = time.perf_counter() - begin
        print(f"{label:<21} seed {seed}  worst {grid.worst:8.1f}  mean {grid.mean:8.1f}  {took:.0f} s", flush=True)
    return rows, last


def worst_point(grid: GridEvaluation) -> str:
    """Where on the grid the mean return is least."""
    point = grid.points[int(grid.means.argmin())]
    return " ".join(f"{name}={value:.3g}" for name, value in zip(grid.box.names, point, strict=True))


def nominal_return(grid: GridEvaluation, preset: Preset) -> float:
    """Mean return at the grid point nearest to the nominal parameters."""
    centre = np.array([preset.nominal[name] for name in grid.box.names])
    side = np.array(grid.box.high) - np.array(grid.box.low)
    nearest = np.abs((grid.points - centre) / side).sum(1).argmin()
    return float(grid.returns.mean(1)[nearest])


def summary(rows: list[dict[str, Any]]) -> str:
    """A table of means over seeds, ± the standard error, and how far deep DRPG lies above the other two."""
    lines = ["| equal | method | worst over the grid | 10th percentile | mean | near nominal |", "|---" * 6 + "|"]
    for budget in dict.fromkeys(row["budget"] for row in rows):
        for method in METHODS.values():
            chosen = [r for r in rows if (r["budget"], r["method"]) == (budget, method)]
            cells = []
            for key in ("worst", "p10", "mean", "nominal"):
                values = np.array([r[key] for r in chosen])
                error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
                cells.append(f"{values.mean():.1f} ± {error:.1f}")
            lines.append(f"| {budget} samples | {method} | {' | '.join(cells)} |")
    lines += [
        "",
        "Deep DRPG less each other (paired by seed), and the probability of improvement with its 95 % interval:",
        "",
    ]
    for budget in dict.fromkeys(row["budget"] for row in rows):
        for other in list(METHODS.values())[1:]:
            lines.append(f"- equal {budget} samples, {other}: {_ahead(rows, budget, other)}")
    return "\n".join(lines) + "\n"


def _ahead(rows: list[dict[str, Any]], budget: str, other: str) -> str:
    parts = []
    for key in ("worst", "mean"):
        ours, theirs = (
            np.array([r[key] for r in rows if (r["budget"], r["method"]) == (budget, method)])
            for method in (METHODS["worst"], other)
        )
        apart, p = ours - theirs, probability_of_improvement(ours, theirs)
        error = apart.std(ddof=1) / len(apart) ** 0.5 if len(apart) > 1 else float("nan")
        parts.append(f"{key} {apart.mean():.1f} ± {error:.1f}, {p}")
    return "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, help="keep the run folders here")
    parser.add_argument("--training-only", action="store_true", help="leave out the second reading, the long one")
    parser.add_argument("--smoke", action="store_true", help="a few steps of one seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    preset, seeds = PRESETS[arguments.preset], list(range(arguments.seeds))
    if arguments.smoke:
        preset, seeds = shortened(preset), [0]
    rows: list[dict[str, Any]] = []
    grids: dict[str, list[Array]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:  # written after every seed, so that a comparison cut short is worth what it has
            more, last = compare(preset, seed, arguments.runs or Path(scratch), not arguments.training_only)
            rows += more
            for method, means in last.items():
                grids[method].append(means)
            write(preset, rows, grids, arguments.out)
    print(summary(rows))


def write(preset: Preset, rows: list[dict[str, Any]], grids: dict[str, list[Array]], out: Path) -> None:
    """`table.csv`, `summary.md` and `grid.png`."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    (out / "summary.md").write_text(summary(rows))
    panels = {METHODS[method]: np.mean(found, 0) for method, found in grids.items()}
    axes = {name: np.linspace(low, high, preset.grid["count"]) for name, (low, high) in preset.box.items()}
    last = rows[-1]["budget"]
    title = f"{preset.env['id']}: return over the box, mean of {len(grids['worst'])} seeds, equal {last} samples"
    draw_parameter_grid(panels, axes, out / "grid.png", preset.nominal, title)


def shortened(preset: Preset) -> Preset:
    """The same comparison, too short to learn anything."""
    changes = dict(preset.smoke)
    steps, every = changes.pop("total_steps"), changes.pop("adversary_every")
    agent = {**preset.agent, "warmup_steps": every, "adversary_every": every}
    agent.update(changes.pop("agent", {}))
    return replace(preset, total_steps=steps, agent=agent, grid={"count": 3, "episodes": 2})


if __name__ == "__main__":
    main()
