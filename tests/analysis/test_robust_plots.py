"""Pictures of robust MDPs: they hold what was asked for, and a solver's run is drawn as its bounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from rlopt.analysis import robust_plots
from rlopt.analysis.plots import draw_run
from rlopt.analysis.robust_plots import (
    certified,
    draw_convergence,
    draw_grid_policy,
    draw_radius,
    draw_worst_kernel,
)
from rlopt.robust.problems.domains import GRID
from rlopt.types import RloptError


@pytest.fixture
def kept(monkeypatch) -> list[Figure]:
    figures: list[Figure] = []
    save = robust_plots.save_figure
    monkeypatch.setattr(robust_plots, "save_figure", lambda figure, out: (figures.append(figure), save(figure, out)))
    return figures


def test_convergence_has_the_mean_and_the_band_of_every_line(tmp_path: Path, kept: list[Figure]) -> None:
    values = np.array([[4.0, 2.0], [1.0, 0.5], [0.0, 0.0]])
    panels = {"a": {"one": values}, "b": {"two": values, "three": values[:, 0]}}
    draw_convergence(panels, tmp_path / "deep" / "c.png", floor=1e-3)
    assert (tmp_path / "deep" / "c.png").stat().st_size > 1000
    axes = kept[0].axes
    assert [len(place.lines) for place in axes] == [1, 2] and axes[0].get_yscale() == "log"
    assert axes[0].lines[0].get_ydata().tolist() == [3.0, 0.75, 1e-3]
    assert [len(place.collections) for place in axes] == [1, 1]


def test_radius_kernel_and_grid(tmp_path: Path, kept: list[Figure]) -> None:
    draw_radius([0.0, 1.0], {"x": [[1.0, 3.0], [2.0, 6.0]]}, tmp_path / "r.png")
    assert kept[0].axes[0].lines[0].get_ydata().tolist() == [2.0, 4.0]
    nominal, worst = np.full((2, 1, 2), 0.5), np.array([[[0.2, 0.8]], [[0.5, 0.5]]])
    draw_worst_kernel(nominal, worst, np.ones((2, 1)), tmp_path / "k.png")
    np.testing.assert_allclose(kept[1].axes[2].images[0].get_array(), [[-0.3, 0.3], [0.0, 0.0]])
    policy = np.zeros((16, 4))
    policy[:, 2], policy[0, 1:3] = 1.0, 0.5
    draw_grid_policy(GRID, {"p": policy}, {"p": np.arange(16.0)}, tmp_path / "g.png")
    shown = kept[2].axes[0].images[0].get_array()
    assert bool(shown.mask[1, 1]) and not bool(shown.mask[0, 0])  # a wall, the start
    with pytest.raises(RloptError, match="same names"):
        draw_grid_policy(GRID, {"p": policy}, {"q": np.arange(16.0)}, tmp_path / "g.png")
    with pytest.raises(RloptError, match=r"name a \.png"):
        draw_radius([0.0], {"x": [1.0]}, tmp_path / "r.doc")


def test_a_solvers_run_is_drawn_as_its_bounds(tmp_path: Path, kept: list[Figure]) -> None:
    from rlopt.cli.compose import compose
    from rlopt.training.setup import begin

    words = ["agent=drpg", "env=garnet", "env.states=4", "env.instances=3", "total_steps=12", "device=cpu", "threads=1"]
    trainer = begin(compose([*words, "log.tensorboard=false", "eval.episodes=1", f"run_dir={tmp_path / 'run'}"]))
    trainer.run()
    trainer.close()
    kept.clear()
    draw_run(tmp_path / "run", tmp_path / "curve.png", "iterations")
    left, right = kept[0].axes
    bounds = certified(tmp_path / "run")
    assert bounds is not None and bounds["step"].tolist() == list(range(1, 13))
    assert left.lines[0].get_ydata().tolist() == bounds["value"].tolist()
    assert right.lines[0].get_ydata().tolist() == bounds["gap"].tolist() and right.get_yscale() == "log"
