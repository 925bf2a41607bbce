"""The examples run as they are printed, and the one that trains learns."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

from rlopt.registry import AGENTS

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for their types
    spec.loader.exec_module(module)
    return module


def test_the_custom_loop_runs_past_its_warm_up(capsys):
    returns = load("custom_loop").main(steps=1_030)
    assert len(returns) == 5 and all(math.isfinite(r) and -2_000 < r < 0 for r in returns)


def test_the_custom_loop_over_a_vector_runs_past_its_warm_up():
    lengths = load("custom_vector_loop").main(steps=260)
    assert len(lengths) > 20 and min(lengths) > 4 and sum(lengths) <= 4 * 260


def test_the_custom_loop_is_short():
    body = (EXAMPLES / "custom_loop.py").read_text().split("def main")[1].splitlines()
    assert sum(bool(line.strip()) for line in body) <= 32


def test_an_agent_of_ones_own_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlopt.registry.AGENTS", dict(AGENTS))
    load("own_agent").main(total_steps=60)
    (run,) = (tmp_path / "runs").iterdir()
    assert [len(list((run / "policy").glob(f"run{r}/policy.json"))) for r in range(2)] == [1, 1]


@pytest.mark.slow
def test_the_custom_loop_learns():
    returns = load("custom_loop").main(steps=10_000)
    assert sum(returns[-10:]) / 10 > -250


def test_stable_baselines_with_reshuffling(capsys):
    pytest.importorskip("stable_baselines3")
    assert -2_000 < load("sb3_reshuffled").main(steps=130) < 0
    assert "mean return" in capsys.readouterr().out


@pytest.mark.slow
def test_stable_baselines_with_reshuffling_learns():
    pytest.importorskip("stable_baselines3")
    assert load("sb3_reshuffled").main() > -500


@pytest.mark.parametrize("prioritized", [False, True])
def test_torchrl_with_reshuffling(prioritized):
    pytest.importorskip("torchrl")
    assert 8 <= load("torchrl_reshuffled").main(steps=700, prioritized=prioritized) <= 500


@pytest.mark.slow
@pytest.mark.parametrize("prioritized", [False, True])
def test_torchrl_with_reshuffling_learns(prioritized):
    pytest.importorskip("torchrl")
    assert load("torchrl_reshuffled").main(prioritized=prioritized) > 80


NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_as_they_ran(path):
    """In order, without an error, small, and with what they draw."""
    book = json.loads(path.read_text("utf-8"))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 200_000
    assert max(len(cell["source"]) for cell in book["cells"]) < 30
    assert not [word for word in ("/root/", "/home/", "/tmp/") if word in path.read_text("utf-8")]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path):
    """pip install -c constraints.txt -e ".[notebooks]" && pytest -m slow tests/test_examples.py -k notebooks_run"""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    book = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
