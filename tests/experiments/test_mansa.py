"""The summary of MANSA's runs: tables, a picture, and jobs whose random calls match a rate, from a made-up root."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml


@pytest.fixture
def mansa(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("mansa")


def write(folder: Path, returns: list[float], calls: float, steps: tuple[int, ...] = (0, 50, 100), **more: Any) -> None:
    """Two seeds in one run folder: every evaluation has an episode of 10 steps each, of which that at step 0 earns
    nothing; training has two episodes, with calls in half of the steps."""
    folder.mkdir(parents=True)
    config = {
        "seed": 0, "total_steps": 100, "env": {"id": more.pop("env_id", "lbf/8x8-2p-2f-coop")},
        "experiment": more.pop("experiment", "mansa_lbf_6x6_2p_1f_coop"), "agent": more.pop("agent", {}),
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("evaluations", "episodes"):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            kinds = {"episodes": ["central_updates"], "evaluations": list(more)}[name]
            table.writerow(["step", "episode", "return", "length", "run", "calls", *kinds])
            for step in steps if name == "evaluations" else (40, 80):
                for run, paid in enumerate(returns):
                    own = more.values() if name == "evaluations" else [3.0]
                    made = 5 if name == "episodes" else calls + run
                    table.writerow([step, 0, paid if step else 0.0, 10, run, made, *own])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    write(root / "coop_il" / "seed0", [0.0, 0.5], 0.0)
    write(root / "coop_cost_mid" / "seed0", [1.0, 0.5], 2.0, **{"distilled/return": 0.4, "distilled/calls": 1.0})
    write(root / "coop_random" / "seed0", [0.5, 0.25], 2.0, steps=(0, 50))
    return root


def test_a_partial_root_is_summarised(root: Path, tmp_path: Path, mansa: ModuleType) -> None:
    out = tmp_path / "out"
    assert mansa.main([str(root), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["improvement.csv", "pareto.png", "summary.md", "table.csv"]
    with (out / "table.csv").open() as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["il", "cost_mid", "random"]
    middle = rows["cost_mid"]
    assert middle["return"].startswith("0.750 [") and middle["return over training"].startswith("0.750 [")
    assert middle["calls per episode"] == "2.50" and middle["call rate"] == "0.250"
    assert middle["call rate in training"] == "0.500" and middle["central updates"] == "6"
    assert middle["failed seeds"] == "1 of 2" and middle["steps to 0.9 of the best"] == ""  # of one seed of two
    assert middle["distilled return"].startswith("0.400") and rows["il"]["distilled return"] == ""
    told = (out / "summary.md").read_text()
    assert "coop_cl: no run" in told and "coop_random: at 50 of 100 steps" in told
    assert "coop_cost_mid 25.0 % (50.0 %)" in told and "coop_cost_mid 1 of 2 (alone 2)" in told


def test_what_is_unfinished_is_compared_at_equal_steps(root: Path, mansa: ModuleType) -> None:
    write(root / "sight_cost_mid" / "seed0", [1.0, 1.0], 2.0)
    write(root / "sight_random" / "seed0", [0.5, 0.5], 2.0)
    arms = mansa.load_arms(root)
    found = {(row["task"], row["beside"], row["measure"]): row for row in mansa.improvement_rows(arms)}
    assert found["coop", "random", "return"]["P(better)"] == "0.88"  # (1, 0.5) beside (0.5, 0.25)
    assert found["sight", "random", "return"] == {
        "task": "sight", "arm": "cost_mid", "beside": "random", "measure": "return", "P(better)": "1.00", "low": "1.00",
        "high": "1.00",
    }  # fmt: skip
    assert found["all", "random", "return"]["P(better)"] == "0.94" and ("all", "il", "return") not in found


def test_random_calls_are_made_at_the_rates_of_each_seed(root: Path, tmp_path: Path, mansa: ModuleType) -> None:
    """Those in the end and those over the training; where a seed made none, so few that they do not matter."""
    from rlopt.cli.compose import compose

    rooms = {"env_id": "two_rooms", "experiment": "mansa_two_rooms", "agent": {"independent_learns": "own"}}
    write(root / "own_cost_mid" / "seed0", [20.0, 15.0], 0.0, **rooms)
    file = tmp_path / "random.yaml"
    assert mansa.main([str(root), "--jobs", str(file)]) == 0
    jobs = {job["name"]: job for job in yaml.safe_load(file.read_text())["jobs"]}
    assert list(jobs) == ["coop_random", "coop_random_training", "own_random", "own_random_training"]
    agents = {
        name: compose([f"experiment={job['experiment']}", *job["overrides"]]).agent
        for name, job in jobs.items()
        if job["seeds"] == [0]
    }
    assert all(agent.rule == "random" for agent in agents.values())
    assert [agent.rates for agent in agents.values()] == [(0.2, 0.3), (0.5, 0.5), (1e-4, 0.1), (0.5, 0.5)]
    assert [agent.independent_learns for agent in agents.values()] == ["everything"] * 2 + ["own"] * 2
    assert "1 of 2" in {row["failed seeds"] for row in mansa.table_rows(mansa.load_arms(root))}


def test_nothing_to_summarise_is_told_in_one_line(root: Path, tmp_path: Path, mansa: ModuleType, capsys) -> None:
    assert mansa.main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    with (root / "coop_il" / "seed0" / "episodes.csv").open("a") as file:
        file.write("90,torn\n")
    assert mansa.main([str(root)]) == 2
    assert capsys.readouterr().err.strip().endswith("episodes.csv is no table of numbers; mend or remove it")
