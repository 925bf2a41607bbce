from collections.abc import Callable
from pathlib import Path

import pytest

from rlopt.analysis.run_results import curves, flatten, load_run
from rlopt.types import RloptError

MakeRun = Callable[..., Path]


def test_a_run_folder_as_data(make_run: MakeRun) -> None:
    run = load_run(make_run("a", {5000: [1.0, 3.0], 10000: [4.0, 8.0]}, env="Hopper-v4", seed=7))
    assert (run.agent, run.env_id) == ("sac", "Hopper-v4")
    (own,) = run.evaluations
    assert (own.seed, own.steps, own.means) == (7, [5000, 10000], [2.0, 6.0])


def test_several_runs_in_one_folder_are_several_seeds(make_run: MakeRun) -> None:
    folder = make_run("a", {}, seed=10)
    rows = ["step,episode,return,length,run", "500,0,1,9,0", "500,1,3,9,0", "500,0,5,9,1", "900,0,7,9,0", "900,0,9,9,1"]
    (folder / "evaluations.csv").write_text("\n".join(rows) + "\n")
    run = load_run(folder)
    assert [(e.seed, e.steps, e.means) for e in run.evaluations] == [(10, [500, 900], [2, 7]), (11, [500, 900], [5, 9])]


def test_a_run_without_evaluations_yet(make_run: MakeRun) -> None:
    folder = make_run("a", {})
    assert load_run(folder).evaluations == []
    (folder / "evaluations.csv").unlink()
    assert load_run(folder).evaluations == []
    assert curves([load_run(folder)]) == []


def test_a_line_that_is_being_written_is_left_out(make_run: MakeRun) -> None:
    folder = make_run("a", {5000: [1.0, 3.0]})
    with (folder / "evaluations.csv").open("a") as file:
        file.write("10000,0,12")
    assert load_run(folder).evaluations[0].steps == [5000]


def test_runs_that_differ_in_their_seed_are_one_curve(make_run: MakeRun) -> None:
    folders = [make_run(f"s{seed}", {5000: [float(seed)]}, seed=seed, total_steps=100 + seed) for seed in range(3)]
    other = make_run("other", {5000: [1.0]}, env="Hopper-v4")
    found = curves(load_run(folder) for folder in [*folders, other])
    assert [(c.name, c.env_id, c.scores.tolist()) for c in found] == [
        ("sac", "HalfCheetah-v4", [[0.0, 1.0, 2.0]]),
        ("sac", "Hopper-v4", [[1.0]]),
    ]


def test_a_seed_that_comes_twice_counts_once_the_longer_run(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    short = make_run("short", {5000: [1.0]}, seed=3)
    long = make_run("long", {5000: [1.0], 10000: [2.0]}, seed=3)
    other = make_run("other", {5000: [4.0], 10000: [6.0]}, seed=4)
    empty = make_run("empty", {}, seed=5)
    for order in ([short, long, other, empty], [long, other, empty, short]):
        caplog.clear()
        (curve,) = curves(map(load_run, order))
        assert curve.scores.tolist() == [[1.0, 4.0], [2.0, 6.0]]
        assert f"{short} is left out: {long} is the same experiment with seed 3" in caplog.messages
        assert f"{empty} is left out: it has no evaluation yet" in caplog.messages
        assert len(caplog.messages) == 2


def test_experiments_on_one_environment_are_named_after_their_difference(make_run: MakeRun) -> None:
    folders = [
        make_run("a", {1: [0.0]}),
        make_run("b", {1: [0.0]}, agent={"learning_rate": 3e-4}),
        make_run("c", {1: [0.0]}, buffer={"name": "reshuffled"}),
        make_run("d", {1: [0.0]}, agent={"name": "sac_2018"}),
    ]
    assert [curve.name for curve in curves(map(load_run, folders))] == [
        "sac, learning_rate=0.001, buffer=uniform",
        "sac, learning_rate=0.0003, buffer=uniform",
        "sac, learning_rate=0.001, buffer=reshuffled",
        "sac_2018",
    ]


def test_precision_and_overlap_make_another_experiment_and_older_runs_had_neither(make_run: MakeRun) -> None:
    folders = [
        make_run("a", {1: [0.0]}, seed=0),
        make_run("b", {1: [2.0]}, seed=1, precision="float32", overlap=False),
        make_run("c", {1: [0.0]}, seed=2, precision="bf16", overlap=False),
        make_run("d", {1: [0.0]}, seed=3, precision="float32", overlap=True),
    ]
    found = curves(map(load_run, folders))
    assert [(c.name, c.scores.shape[1]) for c in found] == [
        ("sac, precision=float32, overlap=False", 2),
        ("sac, precision=bf16, overlap=False", 1),
        ("sac, precision=float32, overlap=True", 1),
    ]


def test_flatten_dots_nested_keys() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2, 3]}}, "e": None}) == {"a.b": 1, "a.c.d": [2, 3], "e": None}


def test_folders_that_are_no_runs(tmp_path: Path, make_run: MakeRun) -> None:
    with pytest.raises(RloptError, match=r"no run folder \(it has no config.yaml\)"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 0\nenv: {id: x}\n")
    with pytest.raises(RloptError, match=r"lacks agent\.name"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [1\nb: }")
    with pytest.raises(RloptError, match="cannot be read") as caught:
        load_run(tmp_path)
    assert "\n" not in str(caught.value)
