"""The summary of MANSA's runs: a table, a picture, and jobs whose random calls match a rate, from a made-up root."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml


@pytest.fixture
def mansa(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("mansa")


def write(folder: Path, returns: list[float], calls: float, steps: tuple[int, ...] = (50, 100), **facts: float) -> None:
    """Two seeds in one run folder: every evaluation has an episode of 10 steps each."""
    folder.mkdir(parents=True)
    config = {"seed": 0, "total_steps": 100, "env": {"id": "lbf/8x8-2p-2f-coop"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with (folder / "evaluations.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["step", "episode", "return", "length", "run", "calls", *facts])
        for step in steps:
            for run, paid in enumerate(returns):
                table.writerow([step, 0, paid, 10, run, calls + run, *facts.values()])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    write(root / "coop_il" / "seed0", [0.0, 0.5], 0.0)
    write(root / "coop_cost_mid" / "seed0", [1.0, 0.5], 2.0, **{"distilled/return": 0.4, "distilled/calls": 1.0})
    write(root / "coop_random" / "seed0", [0.5, 0.25], 2.0, steps=(50,))
    return root


def test_a_partial_root_is_summarised(root: Path, tmp_path: Path, mansa: ModuleType) -> None:
    out = tmp_path / "out"
    assert mansa.main([str(root), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["pareto.png", "table.csv", "table.md"]
    with (out / "table.csv").open() as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["il", "cost_mid", "random"]
    middle = rows["cost_mid"]
    assert middle["return"].startswith("0.750 [") and middle["calls"] == "2.5" and middle["call rate"] == "0.250"
    assert middle["failures"] == "0.50" and middle["distilled return"].startswith("0.400")
    assert middle["P(better than random)"] == "1.00 of 2" and middle["P(better than il)"] == "0.75 of 2"
    assert rows["random"]["finished"] == "no" and rows["il"]["P(better than il)"] == ""


def test_random_calls_are_made_at_the_rate_of_each_seed(root: Path, tmp_path: Path, mansa: ModuleType) -> None:
    from rlopt.cli.compose import compose

    file = tmp_path / "random.yaml"
    assert mansa.main([str(root), "--jobs", str(file)]) == 0
    (job,) = yaml.safe_load(file.read_text())["jobs"]
    assert job["name"] == "coop_random" and job["seeds"] == [0] and "agent.rates=[0.2,0.3]" in job["overrides"]
    agent = compose([f"experiment={job['experiment']}", *job["overrides"]]).agent
    assert (agent.rule, agent.rates) == ("random", (0.2, 0.3))


def test_nothing_to_summarise_is_told_in_one_line(tmp_path: Path, mansa: ModuleType, capsys) -> None:
    assert mansa.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
