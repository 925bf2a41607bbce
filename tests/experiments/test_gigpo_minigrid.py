"""The summary of GiGPO, GRPO and PPO on MiniGrid, also of runs of which some are missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from rlopt.types import RloptError


@pytest.fixture
def summary(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("gigpo_minigrid")


def run(root: Path, name: str, seed: int, returns: list[float], finished: bool = True) -> None:
    """One episode in the middle of each window of 20,000 steps."""
    folder = root / name / f"seed{seed}"
    folder.mkdir(parents=True)
    rows = "".join(f"{i * 20_000 + 10_000},{x},10\n" for i, x in enumerate(returns))
    (folder / "episodes.csv").write_text(f"step,return,length\n{rows}")
    if finished:
        (folder / "policy").mkdir()


def test_methods_are_compared_by_seed_and_what_is_missing_is_said(tmp_path: Path, summary: ModuleType) -> None:
    """On DoorKey GiGPO ends 0.5 above GRPO on both seeds they share; PPO has one; of MultiRoom nothing is there yet."""
    root, out = tmp_path / "runs", tmp_path / "out"
    for seed in (0, 1):
        run(root, "doorkey_gigpo", seed, [0.1, 0.8 + 0.1 * seed])
        run(root, "doorkey_grpo", seed, [0.1, 0.3 + 0.1 * seed])
    run(root, "doorkey_gigpo", 2, [0.0, 0.0], finished=False)
    run(root, "doorkey_ppo", 0, [0.2, 0.9])
    summary.main(["--root", str(root), "--out", str(out)])
    assert {path.name for path in out.iterdir()} == {"README.md", "curves.csv", "curves.png"}
    page = (out / "README.md").read_text()
    assert "**Unfinished: 5 of 30 runs so far.**" in page
    rows = {tuple(cells[1:3]): cells for cells in ([c.strip() for c in line.split("|")] for line in page.splitlines())}
    doorkey = "MiniGrid-DoorKey-5x5-v0"
    assert rows[doorkey, "gigpo"][3:5] == ["2", "0.85 [0.21, 1.49]"]
    assert rows[doorkey, "grpo"][6:8] == ["+0.50 [+0.50, +0.50]", "+0.25 [+0.25, +0.25]"]
    assert rows[doorkey, "ppo"][3:7] == ["1", "0.90", "0.55", "-0.10"]
    assert rows["MiniGrid-MultiRoom-N2-S4-v0", "grpo"][3:5] == ["0", "-"]
    assert (out / "curves.csv").read_text().count("\n") == 1 + 5 * 2


def test_no_run_is_one_line(tmp_path: Path, summary: ModuleType) -> None:
    with pytest.raises(RloptError, match="has no finished run yet"):
        summary.main(["--root", str(tmp_path), "--out", str(tmp_path / "out")])
