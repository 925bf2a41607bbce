import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from matplotlib.image import imread

from rlopt.analysis.tables import write_csv

MakeRun = Callable[..., Path]


@pytest.fixture
def summarise(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("summarise")


@pytest.fixture
def root(tmp_path: Path, make_run: MakeRun) -> Path:
    """Tianshou's preset on two tasks, the classic one on the first, one seed unfinished and one not begun."""
    for seed in range(3):
        returns = {95_000: [2000.0], 100_000: [5000.0 + seed, 7000.0 + seed], 110_000: [8000.0]}
        if seed == 2:
            del returns[110_000]
        make_run(f"root/sac_halfcheetah_v4_tianshou/seed{seed}", returns, seed=seed)
        make_run(f"root/sac_hopper_v4_tianshou/seed{seed}", {100_000: [18.791]}, env="Hopper-v4", seed=seed)
    make_run("root/sac_halfcheetah_v4/seed0", {100_000: [10574.0]})
    make_run("root/sac_halfcheetah_v4/seed1", {}, seed=1)
    return tmp_path / "root"


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_results_folder(tmp_path: Path, root: Path, summarise: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert summarise.main(["--root", str(root), "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "curves.png",
        "evaluations.csv",
        "table.csv",
        "table.md",
    ]
    assert capsys.readouterr().out.strip() == (out / "table.md").read_text().strip()

    before = imread(out / "curves.png")
    assert summarise.main(["--redraw", "sac", "--out", str(out)]) == 0
    assert np.allclose(imread(out / "curves.png"), before, atol=0.02)
    evaluations = _rows(out / "evaluations.csv")
    assert len(evaluations) == 8 + 3 + 1
    assert list(evaluations[1].values()) == ["HalfCheetah-v4", "tianshou", "0", "100000", "2", "6000.000"]


def test_table_of_numbers(tmp_path: Path, root: Path, summarise: ModuleType) -> None:
    summarise.main(["--root", str(root), "--out", str(tmp_path)])
    rows = {(r["env"], r["name"], r["step"], r["statistic"]): r for r in _rows(tmp_path / "table.csv")}
    ours, classic = "rlopt (v4, tianshou preset)", "rlopt (v4, classic preset)"
    row = rows["HalfCheetah-v4", ours, "100000", "single"]
    assert [row[k] for k in ("seeds", "mean", "sd", "iqm", "low", "high")] == [
        "3",
        "6001.0",
        "1.0",
        "6001.0",
        "6000.0",
        "6002.0",
    ]
    assert rows["HalfCheetah-v4", ours, "100000", "window"]["mean"] == "4000.5"
    assert rows["HalfCheetah-v4", ours, "110000", "single"]["seeds"] == "2"
    # Pooled over both tasks: seeds (6000, 6001, 6002 + 289.415) / 10863.415 and three zeros; a quarter of six is one at
    # either end, so the mean of 0, 0, 0.5790, 0.5791.
    pair = "pooled: HalfCheetah Hopper"
    assert float(rows[pair, ours, "100000", "single"]["iqm"]) == pytest.approx(0.28952, abs=1e-4)
    assert (pair, classic, "100000", "single") not in rows
    # Over the one task that the classic preset has: it is at TD3's own return.
    assert rows["pooled: HalfCheetah", classic, "100000", "single"]["iqm"] == "1.0000"
    tianshou = rows["pooled: HalfCheetah", "Tianshou SAC (v3, 10 seeds)", "100000", "window"]
    assert (tianshou["seeds"], round(float(tianshou["iqm"]) * 10863.415 - 289.415, -1)) == ("10", 5760)


def test_table_to_read(tmp_path: Path, root: Path, summarise: ModuleType) -> None:
    summarise.main(["--root", str(root), "--out", str(tmp_path), "--steps", "100000"])
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[2] == "| SAC | at | HalfCheetah | Hopper | IQM, 2 tasks | IQM, 1 task |"
    assert lines[4].startswith("| rlopt (v4, tianshou preset) | 100k | 6001 ± 1 (3) | 19 ± 0 (3) | 0.29 [")
    dash = "\N{EN DASH}"
    assert lines[5] == f"| rlopt (v4, classic preset) | 100k | 10574 (1) | {dash} | {dash} | 1.00 |"
    assert "| SimbaV2-repository SAC (v4, 10 seeds) | 100k | 6156 ± 738 (10) | 1103 ± 388 (10) |" in text
    assert "| Tianshou SAC (v3, 10 seeds) | 100k | 5829 ± 412 (10) | 1621 ± 756 (10) |" in text
    assert "110k" not in text


def test_readme_states_the_conditions_and_is_kept(tmp_path: Path, root: Path, summarise: ModuleType) -> None:
    out = tmp_path / "out"
    summarise.main(["--root", str(root), "--out", str(out)])
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "| tianshou | HalfCheetah-v4 | 0, 1, 2 | 100k, 110k |" in text
    assert "every 5000 steps, 1 or 2 episodes" in text
    assert "rlopt 0.1.0, python 3.11.9, torch 2.13.0, mujoco 3.17.0" in text
    assert "two x86-64 server cores, no GPU" in text
    assert "`python experiments/summarise.py --root root --out out`" in text
    assert "Some CPU" not in text and str(tmp_path) not in text
    (out / "README.md").write_text("findings\n")
    summarise.main(["--root", str(root), "--out", str(out)])
    assert (out / "README.md").read_text() == "findings\n"
    summarise.main(["--root", str(root), "--out", str(out), "--readme"])
    assert (out / "README.md").read_text(encoding="utf-8") == text


def test_another_agent_beside_a_script_of_elsewhere_with_returns_of_training(
    tmp_path: Path, make_run: MakeRun, summarise: ModuleType
) -> None:
    agent = {"name": "ppo"}
    for name, at in (("ppo_hopper_v4", 100.0), ("ppo_hopper_v4_cleanrl", 200.0), ("ppo_hopper_v4_script", 300.0)):
        training = [(step, at + step / 1000) for step in range(1_000, 60_001, 1_000)]
        make_run(f"root/{name}/seed0", {50_000: [at]}, env="Hopper-v4", agent=agent, training=training)
    words = ["--root", str(tmp_path / "root"), "--out", str(tmp_path / "out"), "--steps", "50000"]
    summarise.main([*words, "--training"])
    table = [r for r in _rows(tmp_path / "out" / "table.csv") if r["env"] == "Hopper-v4"]
    rows = {(r["name"], r["statistic"]): r["mean"] for r in table}
    names = ("rlopt (v4, default preset)", "rlopt (v4, cleanrl preset)", "CleanRL's script (v4)")
    for name, at in zip(names, (100, 200, 300), strict=True):
        # Five bins of ten episodes; those after the last evaluation are left out.
        assert rows[name, "single"] == f"{at:.1f}" and float(rows[name, "training"]) == at + 25.5
    text = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "| PPO | at | Hopper |" in text and "training episodes in the 50k steps before" in text
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8").startswith("# PPO on MuJoCo")


def test_nothing_there_yet(tmp_path: Path, summarise: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert summarise.main(["--root", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "has no run with an evaluation yet" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert summarise.main(["--redraw", "sac", "--out", str(tmp_path)]) == 2
    assert "evaluations.csv cannot be read" in capsys.readouterr().err


def test_returns_of_training_are_told_run_by_run(tmp_path: Path, make_run: MakeRun, summarise: ModuleType) -> None:
    folder = make_run("root/ppo_hopper_v4/seed0", {}, env="Hopper-v4", agent={"name": "ppo"}, num_runs=2)
    rows = [(10_000, run, 10.0 * run) for run in (0, 1)]
    write_csv(
        folder / "evaluations.csv",
        ["step", "episode", "return", "length", "run"],
        [[s, 0, x, 9, r] for s, r, x in rows],
    )
    write_csv(folder / "episodes.csv", ["step", "return", "length", "run"], [[s - 1, x, 9, r] for s, r, x in rows])
    summarise.main(["--root", str(tmp_path / "root"), "--out", str(tmp_path / "out"), "--steps", "10000", "--training"])
    table = [
        r
        for r in _rows(tmp_path / "out" / "table.csv")
        if r["name"].startswith("rlopt") and r["statistic"] == "training"
    ]
    assert [(r["seeds"], float(r["mean"])) for r in table if r["env"] == "Hopper-v4"] == [("2", 5.0)]
