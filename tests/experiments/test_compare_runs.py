import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from matplotlib.image import imread


@pytest.fixture
def compare(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("compare_runs")


@pytest.fixture
def root(tmp_path: Path, make_run: Callable[..., Path]) -> Path:
    """On Hopper reshuffling wins every pair by 100, on HalfCheetah at a lower ratio it loses; one seed is further."""
    for buffer, gain in (("uniform", 0.0), ("reshuffled", 100.0)):
        for seed in range(3):
            own = {"agent.update_ratio": [1, 1], "buffer.name": buffer}
            returns = {50_000: [10.0], 100_000: [500.0 + 10.0 * seed + gain]}
            if (buffer, seed) == ("uniform", 2):
                returns[150_000] = [900.0]
            make_run(f"root/hopper_{buffer}/seed{seed}", returns, env="Hopper-v4", seed=seed, **own)
            own = {"agent.update_ratio": [1, 4], "buffer.name": buffer}
            returns = {100_000: [3000.0 + seed - gain]}
            make_run(f"root/cheetah_{buffer}/seed{seed}", returns, env="HalfCheetah-v4", seed=seed, **own)
    return tmp_path / "root"


def test_arms_are_compared_where_all_have_been(
    tmp_path: Path, root: Path, compare: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert compare.main(["--root", str(root), "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["curves.png", "evaluations.csv", "table.csv", "table.md"]
    assert (out / "table.md").read_text().strip() == capsys.readouterr().out.strip()
    before = imread(out / "curves.png")
    assert compare.main(["--redraw", "--out", str(out)]) == 0
    assert np.allclose(imread(out / "curves.png"), before, atol=0.02)
    assert compare.main(["--redraw", "--by", "overlap", "--out", str(out)]) == 2
    assert "has no column overlap; name another --by" in capsys.readouterr().err
    with (out / "table.csv").open(encoding="utf-8") as file:
        rows = {(r["env"], r["updates"], r["buffer"]): r for r in csv.DictReader(file)}
    won = rows["Hopper-v4", "1 update per step", "reshuffled"]
    assert (won["step"], won["seeds"], won["mean"], won["paired difference"]) == ("100000", "3", "610", "+100 ± 0")
    assert won["probability of improvement"].startswith("1.00")
    lost = rows["HalfCheetah-v4", "1 update per 4 steps", "reshuffled"]
    assert lost["paired difference"] == "-100 ± 0" and lost["probability of improvement"].startswith("0.00")
    assert rows["Hopper-v4", "1 update per step", "uniform"]["paired difference"] == ""
    assert not [key for key in rows if key[0].endswith("tasks")]  # of one task each there is nothing to pool


@pytest.mark.parametrize(("word", "usual", "other"), [("precision", "float32", "bf16"), ("overlap", False, True)])
def test_other_words_are_compared_with_what_is_usual(
    tmp_path: Path, make_run: Callable[..., Path], compare: ModuleType, capsys: pytest.CaptureFixture[str],
    word: str, usual: object, other: object,
) -> None:  # fmt: skip
    for choice, value in ((usual, 10.0), (other, 30.0)):
        own = {"agent.update_ratio": [1, 1], "buffer.name": "uniform", word: choice}
        make_run(f"root/{choice}/seed0", {100: [value]}, env="Hopper-v4", seed=0, **own)
    assert compare.main(["--by", word, "--root", str(tmp_path / "root"), "--out", str(tmp_path / "out")]) == 0
    assert f"| {str(other).lower()} | 1 | 30 | +20 |" in capsys.readouterr().out


def test_agents_are_compared_whatever_their_update_ratios(
    tmp_path: Path, make_run: Callable[..., Path], compare: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, ratio, value in (("hasac", {"update_ratio": [1, 20]}, 0.95), ("mappo", {}, 0.915)):
        make_run(f"root/{name}/seed0", {100: [value]}, env="lbf/x", agent={"name": name, **ratio})
    assert compare.main(["--by", "agent", "--root", str(tmp_path / "root"), "--out", str(tmp_path / "out")]) == 0
    assert "| lbf/x | each agent's own | 100 | mappo | 1 | 0.915 | -0.035 |" in capsys.readouterr().out


def test_a_cautious_optimiser_is_another_one(
    tmp_path: Path, make_run: Callable[..., Path], compare: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, (name, kwargs) in enumerate((("adam", {}), ("pytorch_optimizer:Lion", {"cautious": True}))):
        agent = {"update_ratio": [1, 1], "optimiser": {"name": name, "kwargs": kwargs}}
        make_run(f"root/{i}/seed0", {100: [10.0 + 20.0 * i]}, env="Hopper-v4", agent=agent)
    assert compare.main(["--by", "optimiser", "--root", str(tmp_path / "root"), "--out", str(tmp_path / "out")]) == 0
    assert "| cautious lion | 1 | 30 | +20 |" in capsys.readouterr().out


def test_no_run_is_one_line(tmp_path: Path, compare: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--root", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "has no run with an evaluation yet" in capsys.readouterr().err
