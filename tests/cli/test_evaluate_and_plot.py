"""``rlopt evaluate`` and ``rlopt plot`` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlopt.cli import main
from tests.cli.command_line import refused, rows


def test_evaluate_repeats_the_last_evaluation_of_the_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "result.json"
    assert main(["evaluate", str(trained), "--json", str(out)]) == 0
    assert "over 2 episodes (Pendulum-v1)" in capsys.readouterr().out
    result = json.loads(out.read_text())
    logged = [float(row["return"]) for row in rows(trained / "evaluations.csv")]
    assert [episode["return"] for episode in result["episodes"]] == logged
    assert main(["evaluate", str(trained), "--json", "-"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == result
    assert "over 2 episodes (Pendulum-v1)" in said.err
    assert main(["evaluate", str(trained / "policy"), "--episodes", "3", "--mode", "sample", "--seed", "5"]) == 0
    said = capsys.readouterr().out
    assert "over 3 episodes" in said
    assert "seed 5, samples of the policy" in said


def test_evaluate_over_a_grid_of_simulator_parameters(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["--grid", "m=0.5:1.5", "l=0.9:1.1", "--points", "2", "--episodes", "2"]
    out, picture = tmp_path / "grid.json", tmp_path / "grid.png"
    assert main(["evaluate", str(trained), *grid, "--json", str(out), "--picture", str(picture)]) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    returns = [point["return"] for point in found["points"]]
    assert [(point["m"], point["l"]) for point in found["points"]] == [(0.5, 0.9), (0.5, 1.1), (1.5, 0.9), (1.5, 1.1)]
    assert found["worst"] == min(returns) and found["mean"] == pytest.approx(sum(returns) / 4)
    worst = found["points"][returns.index(min(returns))]
    assert said.startswith(f"return {min(returns):.1f} at worst (m={worst['m']}, l={worst['l']}), ")
    assert "2 x 2 points of m, l, 2 episodes each" in said and picture.stat().st_size > 0
    for words, told in (
        ([], "has no agent.box; name the parameters: --grid NAME=LOW:HIGH, such as m=0.5:1.5"),
        (["m=2:1"], "--grid m=2:1: give parameters as NAME=LOW:HIGH, such as m=0.5:1.5"),
        (["mass=1:2"], "Pendulum-v1 has no such parameter; it has g, m, l"),
    ):
        assert told in refused(["evaluate", str(trained), "--grid", *words], capsys)
    other = ["evaluate", str(trained), "--env", "CartPole-v1", "--grid", "length=0.4:0.6"]
    assert "choose one with the same spaces" in refused(other, capsys)


def test_evaluate_refuses_an_environment_that_does_not_fit(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "choose one with the same spaces" in refused(["evaluate", str(trained), "--env", "CartPole-v1"], capsys)


def test_plot_draws_and_prints_the_table(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "curves.png"
    assert main(["plot", str(trained), "--out", str(out), "--at", "60"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    logged = [float(row["return"]) for row in rows(trained / "evaluations.csv")]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Pendulum-v1"))
    assert line.split()[2:5] == ["60", "1", f"{sum(logged) / 2:.1f}"]


@pytest.mark.parametrize(
    ("name", "words"), [("curves.foo", "name a .png, .pdf or .svg file"), ("file/curves.png", "cannot be written")]
)
def test_a_picture_that_cannot_be_written_is_one_line(
    name: str, words: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert words in refused(["plot", str(trained), "--out", str(tmp_path / name)], capsys)


def test_a_step_that_no_curve_reaches_is_told(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plot", str(trained), "--out", str(tmp_path / "a.png"), "--at", "70000"]) == 0
    assert capsys.readouterr().out.startswith("no table: there is no step that any curve reaches [70000]\n")
