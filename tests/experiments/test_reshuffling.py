import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from rlopt.buffers import DistinctSampler, ReshuffledSampler, UniformSampler


@pytest.fixture
def reshuffling(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("reshuffling")


def test_arms_are_compared_game_by_game_and_over_games(
    tmp_path: Path, reshuffling: ModuleType, make_run: Callable[..., Path]
) -> None:
    """Reshuffling wins every pair on Breakout by 2 and loses every one on Asterix by 1."""
    for game, base, gain in (("Breakout", 4.38, 2.0), ("Asterix", 2.48, -1.0)):
        for arm in ("uniform", "reshuffled"):
            for seed in range(3):
                own = {"agent.name": "dqn", "agent.update_ratio": [1, 4], "buffer.name": arm}
                score = base + 0.1 * (seed - 1) + (gain if arm == "reshuffled" else 0.0)
                make_run(
                    f"rr_minatar/{game}_{arm}/seed{seed}", {1000: [0.5], 300_000: [score]}, env=f"MinAtar/{game}-v1",
                    seed=seed, **own,
                )  # fmt: skip
    out = tmp_path / "out"
    assert reshuffling.main(["--root", str(tmp_path / "rr_minatar"), "--out", str(out)]) == 0
    assert {p.name for p in out.iterdir()} == {
        "table.csv", "games.csv", "table.md", "evaluations.csv", "curves_1in4.png",
    }  # fmt: skip
    with (out / "table.csv").open(encoding="utf-8") as file:
        rows = {(r["game"], r["sampler"]): r for r in csv.DictReader(file)}
    assert rows["Breakout", "RR-C"]["paired difference"] == "+2.00 [+2.00, +2.00]"
    assert rows["Asterix", "RR-C"]["paired difference"] == "-1.00 [-1.00, -1.00]"
    assert rows["Breakout", "uniform"]["normalised"] == "1.00"  # the mean of DQN with uniform replay
    assert rows["Breakout", "RR-C"]["normalised"] == "1.50"  # (6.38 - 0.38) / (4.38 - 0.38)
    with (out / "games.csv").open(encoding="utf-8") as file:
        totals = {r["sampler"]: r for r in csv.DictReader(file)}
    assert totals["RR-C"]["games"] == "2" and totals["RR-C"]["P(better than the baseline)"].startswith("0.50")
    assert float(totals["uniform"]["their variance"]) > 2.0 * float(totals["RR-C"]["their variance"])


@pytest.mark.parametrize("kind", ["ALE", "MinAtar"])
def test_a_game_of_both_names_is_told_apart_and_what_has_only_begun_waits(
    kind: str, tmp_path: Path, reshuffling: ModuleType, make_run: Callable[..., Path]
) -> None:
    """Breakout's human scale is 1.7 to 30.5 on Atari; on MinAtar 1 is these runs' own mean."""
    for arm, seed, reached in (("uniform", 0, 900), ("uniform", 1, 900), ("reshuffled", 0, 800), ("reshuffled", 1, 0)):
        own = {"agent.name": "dqn", "agent.update_ratio": [1, 4], "buffer.name": arm}
        returns = {step: [16.1] for step in range(0, reached + 1, 100)}
        make_run(f"study/{arm}/seed{seed}", returns, env=f"{kind}/Breakout-v1", seed=seed, **own)
    out = tmp_path / "out"
    assert reshuffling.main(["--root", str(tmp_path / "study"), "--out", str(out), "--window", "200"]) == 0
    with (out / "table.csv").open(encoding="utf-8") as file:
        rows = {r["sampler"]: r for r in csv.DictReader(file)}
    one = "0.50" if kind == "ALE" else "1.00"
    assert {name: (r["at"], r["seeds"], r["normalised"]) for name, r in rows.items()} == {
        "uniform": ("800", "2", one), "RR-C": ("800", "1", one),
    }  # fmt: skip
    text = (out / "table.md").read_text(encoding="utf-8")
    assert "Left out of dqn, 1 in 4, Breakout, as only begun: RR-C seed 1." in text
    assert ("1 a human" in text) == (kind == "ALE")


def test_a_setting_of_untrained_policies_waits(
    tmp_path: Path, reshuffling: ModuleType, make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"agent.name": "dqn", "agent.update_ratio": [1, 4], "buffer.name": "uniform"}
    asked = ["--root", str(tmp_path / "study"), "--out", str(tmp_path / "out")]
    make_run("study/later/seed0", {0: [1.0]}, env="MinAtar/Asterix-v1", **own)
    assert reshuffling.main(asked) == 2
    assert "only evaluations of untrained policies" in capsys.readouterr().err
    make_run("study/now/seed0", {0: [1.0], 1000: [9.0]}, env="MinAtar/Breakout-v1", **own)
    assert reshuffling.main(asked) == 0
    text = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "Left out of dqn, 1 in 4, Asterix, as only begun: uniform seed 0." in text
    assert "| dqn | 1 in 4 | Breakout | 1k | uniform | 1 | 9.0" in text and "| Asterix |" not in text


def test_what_lacks_its_baseline_or_its_scale_says_nothing(
    tmp_path: Path, reshuffling: ModuleType, make_run: Callable[..., Path]
) -> None:
    """Asterix has reshuffled draws alone, and nothing at one update in four steps, which its scale would be."""
    for game, ratio, arm in (
        ("Breakout", 4, "uniform"), ("Breakout", 4, "reshuffled"), ("Breakout", 16, "uniform"),
        ("Breakout", 16, "reshuffled"), ("Asterix", 16, "reshuffled"),
    ):  # fmt: skip
        own = {"agent.name": "dqn", "agent.update_ratio": [1, ratio], "buffer.name": arm}
        make_run(f"study/{game}_{ratio}_{arm}/seed0", {1000: [9.0]}, env=f"MinAtar/{game}-v1", **own)
    out = tmp_path / "out"
    assert reshuffling.main(["--root", str(tmp_path / "study"), "--out", str(out)]) == 0
    with (out / "table.csv").open(encoding="utf-8") as file:
        rows = {(r["updates"], r["game"], r["sampler"]): r for r in csv.DictReader(file)}
    alone = rows["1 in 16", "Asterix", "RR-C"]
    assert alone["P(better than the baseline)"] == alone["normalised"] == alone["paired difference"] == ""
    with (out / "games.csv").open(encoding="utf-8") as file:
        totals = {(r["updates"], r["sampler"]): r for r in csv.DictReader(file)}
    assert (
        totals["1 in 4", "RR-C"]["IQM of normalised scores"] and totals["1 in 4", "RR-C"]["P(better than the baseline)"]
    )
    assert totals["1 in 16", "RR-C"]["games"] == "2"
    assert totals["1 in 16", "RR-C"]["IQM of normalised scores"] == ""
    assert totals["1 in 16", "RR-C"]["P(better than the baseline)"] == ""
    assert totals["1 in 16", "uniform"]["IQM of normalised scores"] == ""  # of one game beside another's of two
    make_run("study/later/seed0", {2000: [9.0]}, env="MinAtar/Breakout-v1", **{
        "agent.name": "ddqn_lap", "agent.update_ratio": [1, 16], "buffer.name": "lap",
    })  # fmt: skip
    assert reshuffling.main(["--root", str(tmp_path / "study"), "--out", str(out)]) == 0
    with (out / "table.csv").open(encoding="utf-8") as file:  # 1 is what DQN has at 1000 steps: no scale of 2000
        assert {r["normalised"] for r in csv.DictReader(file)} == {""}


def test_tables_are_made_again_and_arms_added_without_the_runs(
    tmp_path: Path, reshuffling: ModuleType, make_run: Callable[..., Path]
) -> None:
    """From the evaluations alone come the same files; of a seed that the root has, too, the root's count, unless it
    went less far."""
    root, out, again = tmp_path / "study", tmp_path / "out", tmp_path / "again"
    for seed in range(2):
        for arm, score in (("uniform", 3.0), ("reshuffled", 4.0)):
            own = {"agent.name": "dqn", "agent.update_ratio": [1, 4], "buffer.name": arm}
            make_run(f"study/{arm}/seed{seed}", {1000: [score + seed]}, env="MinAtar/Breakout-v1", seed=seed, **own)
    assert reshuffling.main(["--root", str(root), "--out", str(out)]) == 0
    known = out / "evaluations.csv"
    assert reshuffling.main(["--evaluations", str(known), "--out", str(again)]) == 0
    for path in out.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name

    later = {"agent.name": "dqn", "agent.update_ratio": [1, 4], "buffer.name": "reshuffled"}
    for seed in range(2):
        make_run(f"later/a/seed{seed}", {1000: [9.0 + seed]}, env="MinAtar/Breakout-v1", seed=seed, **later)
    assert reshuffling.main(
        ["--root", str(tmp_path / "later"), "--evaluations", str(known), "--out", str(again)]
    ) == 0  # fmt: skip
    with (again / "table.csv").open(encoding="utf-8") as file:
        rows = {r["sampler"]: r for r in csv.DictReader(file)}
    assert [*rows] == ["uniform", "RR-C"] and {r["seeds"] for r in rows.values()} == {"2"}
    assert rows["RR-C"]["paired difference"] == "+6.00 [+6.00, +6.00]"

    later["buffer.name"] = "uniform"
    make_run("later/b/seed0", {0: [0.0]}, env="MinAtar/Breakout-v1", **later)  # begun once more
    asked = ["--root", str(tmp_path / "later"), "--evaluations", str(again / "evaluations.csv"), "--out", str(again)]
    before = (again / "evaluations.csv").read_bytes()
    assert reshuffling.main(asked) == 0
    assert (again / "evaluations.csv").read_bytes() == before


def test_what_went_less_far_is_not_among_the_games(
    tmp_path: Path, reshuffling: ModuleType, make_run: Callable[..., Path]
) -> None:
    """A game at 1000 steps measured by what DQN has at 2000 would look bad, and the arm without it good."""
    for game, arm, step in (
        ("Breakout", "uniform", 2000),
        ("Breakout", "reshuffled", 2000),
        ("Asterix", "uniform", 1000),
    ):
        own = {"agent.name": "dqn", "agent.update_ratio": [1, 4], "buffer.name": arm}
        make_run(f"study/{game}_{arm}/seed0", {step: [9.0]}, env=f"MinAtar/{game}-v1", **own)
    out = tmp_path / "out"
    assert reshuffling.main(["--root", str(tmp_path / "study"), "--out", str(out)]) == 0
    with (out / "games.csv").open(encoding="utf-8") as file:
        assert {r["sampler"]: r["games"] for r in csv.DictReader(file)} == {"uniform": "1", "RR-C": "1"}
    text = (out / "table.md").read_text(encoding="utf-8")
    assert "Not among the games of dqn, 1 in 4: Asterix, at 1k of 2k." in text


def test_two_runs_of_one_arm_and_seed_are_one_line(
    tmp_path: Path, reshuffling: ModuleType, make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"agent.name": "dqn", "agent.update_ratio": [1, 4], "buffer.name": "uniform"}
    for name in ("a", "b"):
        make_run(f"study/{name}/seed0", {1000: [9.0]}, env="MinAtar/Breakout-v1", **own)
    assert reshuffling.main(["--root", str(tmp_path / "study"), "--out", str(tmp_path / "out")]) == 2
    assert "has seed 0 of dqn with uniform on MinAtar/Breakout-v1 twice" in capsys.readouterr().err


HEAD = "agent,updates,environment,sampler,seed,step,return\n"
ROW = "dqn,1 in 4,MinAtar/Breakout-v1,uniform,0,1,1\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot be read"),
        ("agent,step\n", "is no evaluations.csv of this program"),
        (HEAD, "has no row"),
        (HEAD + ROW.replace("0,1,1", "0,x,1"), "0, x, 1 is no seed, step and return"),
        (HEAD + ROW + ROW.replace("MinAtar", "ALE"), "summarise each by itself"),
        (HEAD + ROW.replace("1 in 4", "often"), "often is no update ratio"),
        (HEAD + ROW + ROW, "is not in order, or twice"),
        (HEAD + ROW + ROW.replace("0,1,1", "1,1,1") + ROW.replace("0,1,1", "0,2,1"), "is not in order, or twice"),
    ],
)
def test_evaluations_of_another_kind_are_one_line(
    text: str | None, told: str, tmp_path: Path, reshuffling: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "evaluations.csv"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert reshuffling.main(["--evaluations", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert told in error and "\n" not in error


def test_atari_and_minatar_are_not_mixed(
    tmp_path: Path, reshuffling: ModuleType, make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("ALE", "MinAtar"):
        own = {"agent.name": "dqn", "agent.update_ratio": [1, 4]}
        make_run(f"{kind}/seed0", {1000: [1.0]}, env=f"{kind}/Breakout-v1", **own)
    assert reshuffling.main(["--root", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "some of it is on MinAtar and some on Atari" in capsys.readouterr().err


def test_uses_are_those_that_theory_expects(reshuffling: ModuleType) -> None:
    """Two draws in a life: with replacement Poisson, of variance 2; reshuffled 1/3 (arXiv 2503.02269)."""
    kinds = (UniformSampler, ReshuffledSampler, DistinctSampler)
    found = {cls.name: reshuffling.count_uses(cls(), 2 / 32, capacity=400) for cls in kinds}
    for mean, *_ in found.values():
        assert mean == pytest.approx(2.0, abs=0.15)
    assert found["uniform"][1] == pytest.approx(2.0, abs=0.4) and found["distinct"][1] == pytest.approx(2.0, abs=0.5)
    assert found["reshuffled"][1] == pytest.approx(1 / 3, abs=0.12)
    assert found["reshuffled"][2:4] == [1.0, 3.0]


def test_no_runs_is_one_line(tmp_path: Path, reshuffling: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert reshuffling.main(["--root", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "has no run with an evaluation yet" in capsys.readouterr().err
