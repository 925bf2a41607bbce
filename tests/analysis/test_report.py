"""Reports over synthetic run folders: what is judged, what is said, and that the page needs nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlopt.analysis.expected import Expected, expected_of
from rlopt.analysis.plots import caption, draw_runs
from rlopt.analysis.report_page import as_html, write_report
from rlopt.analysis.reporting import Preset, Report, report
from rlopt.analysis.run_results import curves, load_run
from rlopt.analysis.statistics import performance_profile
from rlopt.training.config_files import group_files, shipped_configs
from rlopt.types import RloptError

MakeRun = Callable[..., Path]
RANGE = Expected(90.0, 150.0, 10_000, "evaluation")


def preset(**settings: Any) -> Callable[[str], Preset]:
    return lambda name: Preset({"env.id": "HalfCheetah-v4", **settings}, RANGE)


def seeds(make_run: MakeRun, name: str, values: list[float], **options: Any) -> list[Path]:
    """A run per value, with two evaluations of two episodes about it."""
    return [
        make_run(f"{name}{i}", {5000: [0.0, 2.0], 10_000: [v - 5, v + 5]}, seed=i, experiment="mine", **options)
        for i, v in enumerate(values)
    ]


def section(found: Report, title: str) -> Any:
    return next(each for each in found.sections if each.title == title)


def test_every_experiments_range_can_be_read() -> None:
    files = group_files("experiment", [shipped_configs()])
    told = {name: expected_of(file) for name, file in files.items()}
    assert told["sac_hopper_v4"] == Expected(
        1919, 3655, 1_000_000, "evaluation", "the published mean +- sd of the one evaluation there."
    )
    assert told["sac_pointmaze_hindsight"].measure == "success"  # type: ignore[union-attr]
    for name, file in files.items():
        text = file.read_text(encoding="utf-8")
        if "expected:" in text:
            unknown = re.search(r"^# expected:  unknown: ", text, re.MULTILINE) is not None
            assert unknown == isinstance(told[name], str), f"{name}: write `unknown: …` or the range as others do"


@pytest.mark.parametrize(
    ("values", "status"), [([100.0, 120.0], "inside"), ([10.0, 20.0], "below"), ([200.0, 400.0], "above")]
)
def test_a_verdict_is_of_the_mean_over_seeds(values: list[float], status: str, make_run: MakeRun) -> None:
    (verdict,) = report(seeds(make_run, "a", values), preset()).verdicts
    assert verdict.status == status
    assert f"{sum(values) / 2:.4g}" in verdict.text and "2 seeds" in verdict.text


def test_other_settings_other_environments_and_short_runs_are_no_verdict(make_run: MakeRun) -> None:
    paths = seeds(make_run, "a", [100.0, 120.0])
    (other,) = report(paths, preset(**{"agent.learning_rate": 3e-4, "env.backend": "sync"})).verdicts
    assert other.status == "other" and "agent.learning_rate=0.001" in other.text and "backend" not in other.text
    (elsewhere,) = report(paths, preset(**{"env.id": "Ant-v4"})).verdicts
    assert elsewhere.status == "open" and "Ant-v4" in elsewhere.text
    (none,) = report(paths, lambda name: Preset({}, "not run here yet")).verdicts
    assert none.status == "open" and "not run here yet" in none.text
    (gone,) = report(paths, lambda name: None).verdicts
    assert gone.status == "open" and "no such experiment" in gone.text
    short = make_run("short", {1000: [100.0]}, experiment="mine")
    (early,) = report([short], preset()).verdicts
    assert early.status == "open" and "these runs are at 1k" in early.text


def test_ranges_of_the_last_evaluations_of_training_and_of_facts(make_run: MakeRun) -> None:
    folder = make_run("a", {s: [float(s)] for s in range(1, 21)}, training=[(5, 1.0), (18, 3.0)], env="Pendulum-v1")
    from rlopt.analysis.run_results import seed_groups

    (group,) = seed_groups([load_run(folder)])
    assert Expected(0, 1, 20, "last ten evaluations").measured(group) == pytest.approx([15.5])
    assert Expected(0, 1, 20, "training return").measured(group) == pytest.approx([2.0])
    assert Expected(0, 1, 90, "training return").measured(group) is None
    assert Expected(0, 1, 20, "success").measured(group) is None
    table = "step,episode,return,length,success\n10,0,1,9,0\n20,0,1,9,1\n20,1,1,9,0\n"
    (folder / "evaluations.csv").write_text(table)
    (group,) = seed_groups([load_run(folder)])
    assert Expected(0, 1, 20, "success").measured(group) == pytest.approx([0.5])


def test_a_report_compares_curves_and_tells_what_differs(make_run: MakeRun) -> None:
    paths = seeds(make_run, "a", [100.0, 120.0, 140.0]) + seeds(make_run, "b", [10.0, 20.0, 30.0], agent={"gamma": 0.9})
    for path in paths:
        (path / "metrics.csv").write_text(
            "step,steps_per_second,env_seconds,learn_seconds\n5000,100,10,30\n10000,50,20,70\n"
        )
    found = report(paths, preset())
    (table,) = section(found, "Probability of improvement").tables
    first = table.rows[0]
    assert "gamma=0.9" in first[1] and first[3].startswith("1.00")
    assert any("Tianshou" in row[1] for row in table.rows)
    (returns,) = section(found, "Returns").tables
    assert returns.rows[0][:4] == ["HalfCheetah-v4", returns.rows[0][1], "10k", "3"]
    assert "±" in returns.rows[0][4] and "[" in returns.rows[0][5]
    (clock,) = section(found, "Wall-clock").tables
    assert clock.rows[0][2:6] == ["2 min", "67", "20%", "67%"]  # 5000/100 + 5000/50 = 150 s
    differ = section(found, "Configuration").tables[0]
    assert [row[0] for row in differ.rows] == ["agent.gamma"]
    assert section(found, "Performance profiles").pictures
    assert ["torch", "2.13.0"] in [list(row) for row in section(found, "Versions").tables[0].rows]


def test_the_page_loads_nothing_and_shows_names_as_text(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run("a", {5000: [1.0, 3.0]}, env="<script>alert(1)</script>-v0")
    found = report([run], preset(), title="A & B")
    page = as_html(found)
    assert "<script" not in page and "A &amp; B" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "http://" not in page and "https://" not in page
    assert page == as_html(report([run], preset(), title="A & B"))
    written = write_report(report([run], preset(), one_picture=True), tmp_path / "new" / "report.md")
    assert [path.name for path in written] == ["report.md", "report-curves.png"]
    text = written[0].read_text()
    assert "![learning curves](report-curves.png)" in text and "<script" not in text
    with pytest.raises(RloptError, match="no report's name"):
        write_report(found, tmp_path / "report.pdf")
    with pytest.raises(RloptError, match="none of these runs has an evaluation"):
        report([make_run("empty", {})], preset())


def test_one_seed_keeps_an_interval_over_its_episodes(tmp_path: Path, make_run: MakeRun) -> None:
    one = make_run("a", {5000: [1.0, 3.0]}, env="Pendulum-v1")
    (row,) = draw_runs([one], tmp_path / "x.png")
    assert row["low"] < 1.0 and row["high"] > 3.0 and row["mean"] == 2.0
    (curve,) = curves([load_run(one)])
    assert "not that of seeds" in caption([curve]) and "bootstrap" not in caption([curve])
    others = [make_run(f"b{i}", {5000 * k: [1.0] for k in range(1, 3 + i)}, seed=i) for i in (0, 1)]
    (many,) = curves(map(load_run, others))
    assert "dashed" in caption([many]) and "episodes" not in caption([many])
    returns = next(s for s in report([one], preset()).sections if s.title == "Returns")
    assert returns.tables[0].rows[0][5].endswith("over episodes")


def test_profiles_are_fractions_of_runs() -> None:
    estimate, low, high = performance_profile([[1.0, 3.0], [2.0, 2.0, 2.0, 5.0]], [0.0, 1.5, 4.0, 9.0])
    assert estimate.tolist() == [1.0, 0.75, 0.125, 0.0]
    assert (low <= estimate).all() and (estimate <= high).all()
    assert np.isnan(performance_profile([[1.0], [2.0]], [0.0])[1:]).all()
