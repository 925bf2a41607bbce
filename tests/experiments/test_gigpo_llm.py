"""The summary of language models: which rollouts count, what the page says, and when a run is stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from rlopt.types import RloptError

HEAD = (
    "step,env_seconds,learn_seconds,episode_return,imitation_loss,equal_groups,step_signal,invalid,answer_tokens,"
    "prompt_tokens,impossible"
)


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    pytest.importorskip("transformers")
    pytest.importorskip("textworld_express")
    return load_script("gigpo_llm")


def run(root: Path, way: str, seed: int, solved: list[int]) -> Path:
    """Two rounds of demonstrations, a look, and rollouts of 2 episodes x 5 steps of which so many are ``solved``; the
    last one was cut, and nothing was learnt from it."""
    folder = root / way / f"seed{seed}"
    folder.mkdir(parents=True)
    rows, episodes = ["10,1,1,,2.0,,,,,,", "30,1,1,0.0,1.0,,,,,,"], ["30,10.0,5,1.0", "30,0.0,5,0.0"]
    for i, n in enumerate(solved, 4):
        rows.append(f"{10 * i},1,4,{5 * n},1.0,0.0,0.5,0.25,8,100,0.5")
        episodes += [f"{10 * i},{10.0 * won},5,{float(won)}" for won in (n > 0, n > 1)]
    rows.append(f"{10 * (len(solved) + 4)},1,0,,1.0,,,,,,")
    (folder / "metrics.csv").write_text("\n".join([HEAD, *rows, ""]))
    (folder / "episodes.csv").write_text("\n".join(["step,return,length,success", *episodes, ""]))
    return folder


def test_ways_are_compared_by_seed(tmp_path: Path, script: ModuleType) -> None:
    """Seed 2 lacks GiGPO. In update 2 GiGPO solves one more than GRPO of two."""
    root, out = tmp_path / "runs", tmp_path / "out"
    for seed in (0, 1, 2):
        run(root, "grpo", seed, [0, 1])
    for seed in (0, 1):
        run(root, "gigpo", seed, [0, 2, 2])
    (run(root, "smollm2", 0, [0, 0]) / script.USAGE).write_text("peak_gib,core\n5.01,0.5\n")
    script.main(["--root", str(root), "--out", str(out), "--updates", "2", "--seeds"])
    assert {path.name for path in out.iterdir()} == {"README.md", "successes.csv", "curves.png"}
    page = (out / "README.md").read_text()
    cells = {line.split(" | ")[0]: line.split(" | ") for line in page.splitlines() if line.startswith("| g")}
    assert cells["| grpo"][1:5] == ["0.50", "0.00", "0.25", "0.25"]
    assert cells["| grpo"][5:] == ["+0.25 [+0.25, +0.25]", "+0.25 [+0.25, +0.25] |"]
    assert cells["| gigpo"][1:5] == ["0.50", "0.00", "0.50", "0.50"]
    assert "2 seeds" in page and "**5.01 GiB**" in page
    assert "80.0 tokens a second were written" in page and "270 a\nsecond were learnt from" in page
    assert "had 50% of a core" in page and "some 2 times as fast" in page
    assert (out / "successes.csv").read_text().count("\n") == 1 + 2 * 2 * 3


def test_runs_that_are_not_there_are_one_line(tmp_path: Path, script: ModuleType) -> None:
    run(tmp_path, "grpo", 0, [1])
    with pytest.raises(RloptError, match="no seed yet with 1 updates of both ways"):
        script.main(["--root", str(tmp_path), "--out", str(tmp_path / "out"), "--updates", "1", "--seeds"])
