"""The throughput scripts: what they make of measurements, and that they can be tried out."""

import csv
import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """``load(name)`` imports ``benchmarks/<name>.py`` as it is when run: its folder comes first."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def imported(name: str) -> ModuleType:
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    return imported


def test_the_best_setting_is_the_highest_median(load):
    harness = load("harness")
    one, two = (harness.Entrant("rlopt", setting, "rlopt", 1) for setting in ("1 thread", "2 threads"))
    other = harness.Entrant("peer", "1 thread", "sbx", 1)
    speeds = {one: [10.0, 90.0, 12.0], two: [20.0, 22.0, 21.0], other: [7.0]}
    assert harness.best(speeds) == {"rlopt": (21.0, "2 threads"), "peer": (7.0, "1 thread")}
    assert harness.spread([3.0, 1.0, 2.0]) == ["2.0", "1.0", "3.0"]
    assert harness.verdict("a / b", 2.0, 2.0) == "a / b: 2.00 (target at least 2: met)"
    assert harness.verdict("a / b", 1.99, 2.0) == "a / b: 1.99 (target at least 2: missed)"


def test_disturbed_windows_do_not_count_unless_there_are_too_few_others(load):
    harness = load("harness")

    def counted(*shares: float) -> list[float]:
        return [w.others for w in harness.undisturbed([harness.Window(1.0, share) for share in shares])]

    assert counted(0.5, 0.01, 0.06, 0.0, 0.05, 0.02) == [0.0, 0.01, 0.02, 0.05]
    assert counted(0.5, 0.01, 0.4, 0.3) == [0.01, 0.3, 0.4]
    assert len(counted(*[math.nan] * 5)) == 5  # where it cannot be known, all do


def test_what_others_take_is_the_busy_time_that_is_not_ones_own(load, monkeypatch: pytest.MonkeyPatch):
    harness = load("harness")
    busy, own, clock = iter([1_000.0, 1_150.0]), iter([200.0, 320.0]), iter([10.0, 11.0])
    monkeypatch.setattr(harness, "_busy_ticks", lambda: next(busy))
    monkeypatch.setattr(harness, "_own_ticks", lambda processes: next(own))
    monkeypatch.setattr(harness, "_TICKS", 100)
    monkeypatch.setattr(harness.os, "cpu_count", lambda: 2)
    with monkeypatch.context() as m:
        m.setattr(harness.time, "perf_counter", lambda: next(clock))
        share = harness.Others([1]).share()
    assert share == pytest.approx(30 / 200)  # of one second of two cores, in ticks


def test_entrants_wait_and_run_in_turn_and_a_missing_peer_is_left_out(load):
    harness = load("harness")
    own = harness.Entrant("rlopt", "2 processes", "rlopt", 1, {"agent": {"batch_size": 8}}, processes=2)
    missing = harness.Entrant("peer", "1 thread", "no_such_library", 1)
    speeds, remarks, parked = harness.measure(
        [own, missing], {"env": "Pendulum-v1", "warmup": 4, "extra": 2}, rounds=2, seconds=0.05
    )
    try:
        assert list(speeds) == [own] and len(speeds[own]) == 2 and min(speeds[own]) > 0
        assert remarks[1:] == ["peer, 1 thread left out: ModuleNotFoundError: No module named 'no_such_library'"]
        assert parked[0].window(0.05).speed > 0
    finally:
        for p in parked:
            p.close()


def test_an_rlopt_entrant_that_fails_ends_the_benchmark(load):
    harness = load("harness")
    wrong = harness.Entrant("rlopt", "1 thread", "rlopt", 1, {"precision": "float7"})
    with pytest.raises(SystemExit, match=r"rlopt, 1 thread failed: .*float7"):
        harness.measure([wrong], {"env": "Pendulum-v1", "warmup": 4, "extra": 2}, rounds=1, seconds=0.05)


def test_sac_throughput_compares_best_settings(load, tmp_path: Path):
    sac = load("sac_throughput")
    told = {
        ("rlopt float32", 1): [100.0], ("rlopt float32", 2): [190.0, 200.0, 210.0],
        ("rlopt float32, overlap", 2): [220.0], ("rlopt float32, eager", 2): [160.0],
        ("rlopt bf16", 2): [230.0], ("rlopt bf16, overlap", 2): [250.0],
        ("Stable-Baselines3", 1): [80.0], ("Stable-Baselines3", 2): [100.0], ("SBX (JAX)", 1): [160.0],
    }  # fmt: skip
    speeds = {sac.Entrant(name, sac._threads(t), "rlopt", t): v for (name, t), v in told.items()}
    busy = {next(iter(speeds)): (100.0, 45.0)}
    made = sac.report(speeds, busy, ["X left out: why"])
    assert made.notes == [
        "rlopt float32 (2 threads) / Stable-Baselines3 (2 threads): 2.00 (target at least 2: met)",
        "rlopt float32 (2 threads) / SBX (JAX) (1 thread): 1.25 (target at least 1.1: met)",
        "rlopt float32, overlap (2 threads) / Stable-Baselines3 (2 threads): 2.20 (target at least 2: met)",
        "rlopt float32, overlap (2 threads) / SBX (JAX) (1 thread): 1.38 (target at least 1.1: met)",
        "rlopt bf16 (2 threads) / Stable-Baselines3 (2 threads): 2.30 (target at least 2.4: missed)",
        "rlopt bf16 (2 threads) / SBX (JAX) (1 thread): 1.44",
        "rlopt bf16, overlap (2 threads) / Stable-Baselines3 (2 threads): 2.50 (target at least 2.4: met)",
        "rlopt bf16, overlap (2 threads) / SBX (JAX) (1 thread): 1.56",
        "rlopt float32, eager (2 threads) / Stable-Baselines3 (2 threads): 1.60",
        "rlopt float32, eager (2 threads) / SBX (JAX) (1 thread): 1.00",
        "rlopt float32 (2 threads) / rlopt float32, eager (2 threads): 1.25",
        "beside a busy process rlopt float32, 1 thread keeps 45% of its speed",
        "X left out: why",
    ]
    made.write_csv(tmp_path / "table.csv")
    rows = list(csv.reader((tmp_path / "table.csv").open()))
    assert rows[2] == ["rlopt float32", "2 threads", "200.0", "190.0", "210.0"]
    assert rows[-1] == ["rlopt float32", "1 thread, beside a busy process", "45.0", "", ""]


def test_ppo_throughput_is_judged_by_the_number_of_environments(load):
    ppo = load("ppo_throughput")
    told = {
        ("rlopt, 1 environment", 1): [300.0], ("rlopt, 1 environment", 2): [290.0, 310.0, 330.0],
        ("Stable-Baselines3, 1 environment", 1): [200.0], ("rlopt, 8 environments", 2): [500.0],
        ("Stable-Baselines3, 8 environments", 1): [260.0],
    }  # fmt: skip
    speeds = {ppo.Entrant(name, f"{t} threads", "rlopt", t): v for (name, t), v in told.items()}
    assert ppo.report(speeds, ["a remark"]).notes == [
        "rlopt, 1 environment (2 threads) / Stable-Baselines3, 1 environment (1 threads): 1.55 "
        "(target at least 1.5: met)",
        "rlopt, 8 environments (2 threads) / Stable-Baselines3, 8 environments (1 threads): 1.92 "
        "(target at least 2: missed)",
        "a remark",
    ]


def test_environments_of_teams_are_judged_by_the_package_they_come_from(load):
    teams = load("teams")
    mine = [teams.Entrant("rlopt, 8 copies", f"{t} threads", "rlopt", t) for t in (1, 2)]
    peer = teams.Entrant("gymnasium_robotics", "1 thread", "peer", 1)
    speeds = {mine[0]: [300.0], mine[1]: [500.0, 520.0, 540.0], peer: [100.0]}
    rows, notes = teams.judge("mamujoco/HalfCheetah-2x3", 8, speeds)
    assert rows[1] == ["mamujoco/HalfCheetah-2x3", "rlopt, 8 copies", "2 threads", "520.0", "500.0", "540.0"]
    assert notes == [
        "mamujoco/HalfCheetah-2x3: rlopt, 8 copies (2 threads) / gymnasium_robotics: 5.20 (target at least 5: met)"
    ]
    assert teams.rlopt_step("lbf/8x8-2p-2f-coop", 3)() == 3


@pytest.mark.parametrize("name", ["environments", "replay", "team_environments"])
def test_a_chart_is_drawn_from_the_table_beside_it(load, tmp_path: Path, name: str):
    table = BENCHMARKS.parent / "results" / name / "table.csv"
    (tmp_path / "table.csv").write_bytes(table.read_bytes())
    assert load("charts").main([str(tmp_path)]) == 0
    (picture,) = tmp_path.glob("*.png")
    assert picture.name in (table.parent / "README.md").read_text()
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="has the columns a, b"):
        load("charts").main([str(tmp_path)])


def test_ppo_throughput_can_be_tried_out(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ppo = load("ppo_throughput")
    monkeypatch.setattr(ppo, "TARGETS", {1: 1.5})
    ppo.main(["--quick", "--env", "Pendulum-v1", "--out", str(tmp_path)])
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert "rlopt, 1 environment" in {r["library"] for r in rows}
    assert all(float(r["steps/s (median)"]) > 0 for r in rows)


def test_atari_throughput_is_judged_under_the_protocol_that_hides_nothing(load):
    atari = load("atari")
    speeds = {e: [100.0, 300.0, 200.0] for e in atari.entrants() if "wrappers" not in e.name}
    speeds |= {e: [90.0] for e in atari.entrants() if "wrappers" in e.name}
    assert atari.report(speeds, ["a remark"]).notes == [
        "dopamine: rlopt / AtariVectorEnv: 1.00 (target at least 0.9: met)",
        "dopamine: rlopt / Gymnasium's wrappers: 2.22 (target at least 2: met)",
        "classic: rlopt / AtariVectorEnv: 1.00",
        "classic: rlopt / Gymnasium's wrappers: 2.22",
        "a remark",
    ]


def test_atari_throughput_can_be_tried_out(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("ale_py.vector_env")
    atari = load("atari")
    two = [e for e in atari.entrants(1, 1) if e.name in ("rlopt, classic", "AtariVectorEnv, classic")]
    monkeypatch.setattr(atari, "entrants", lambda *sizes: two)
    atari.main(["--quick", "--only", "environments", "--env", "ALE/Pong-v5", "--out", str(tmp_path)])
    rows = list(csv.DictReader((tmp_path / "environments" / "table.csv").open()))
    assert [r["entrant"] for r in rows] == ["rlopt, classic", "AtariVectorEnv, classic"]
    atari.main(["--quick", "--only", "memory", "--env", "ALE/Pong-v5", "--out", str(tmp_path)])
    (row,) = csv.DictReader((tmp_path / "memory" / "table.csv").open())
    assert row["transitions"] == "2,000" and float(row["printed, GiB"]) > 0.01


def test_dqn_is_judged_beside_the_faster_peer_with_as_many_environments(load):
    atari = load("atari")
    speed = {
        "rlopt, float32, 1 environment": 120.0, "rlopt, bf16, 1 environment": 150.0,
        "rlopt, bf16, 8 environments": 300.0, "Stable-Baselines3, 1 environment": 80.0, "CleanRL, 1 environment": 100.0,
        "Stable-Baselines3, 8 environments": 100.0,
    }  # fmt: skip
    speeds = {atari.Entrant(name, "2 threads", "rlopt", 2): [value] for name, value in speed.items()}
    assert atari.dqn_report(speeds, ["a remark"]).notes == [
        "rlopt, float32, 1 environment / Stable-Baselines3, 1 environment: 1.50",
        "rlopt, float32, 1 environment / CleanRL, 1 environment: 1.20 (target at least 1.25: missed)",
        "rlopt, bf16, 1 environment / Stable-Baselines3, 1 environment: 1.88",
        "rlopt, bf16, 1 environment / CleanRL, 1 environment: 1.50 (target at least 1.6: missed)",
        "rlopt, bf16, 8 environments / Stable-Baselines3, 8 environments: 3.00",
        "a remark",
    ]


def test_optimiser_steps_can_be_tried_out(load, tmp_path: Path):
    optimisers = load("optimisers")
    optimisers.main(["--out", str(tmp_path), "--rounds", "2", "--seconds", "0.01"])
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.count(": rlopt / torch: ") == 6 and "| torch, rmsprop | Nature network |" in text
    assert (tmp_path / "chart.png").is_file() and (tmp_path / "table.csv").is_file()


def test_training_of_teams_is_judged_by_the_best_thread_settings(load):
    training = load("teams_training")
    speed = {("rlopt", 1): 300.0, ("rlopt", 2): 200.0, ("HARL", 1): 100.0, ("HARL", 2): 150.0}
    speeds = {training.Entrant(name, f"{t} threads", "rlopt", t): [value] for (name, t), value in speed.items()}
    rows, notes = training.judge("mpe/spread-continuous", speeds)
    assert rows[3] == ["HASAC, mpe/spread-continuous", "HARL", "2 threads", "150.0", "150.0", "150.0"]
    assert notes == ["HASAC, mpe/spread-continuous: rlopt (1 threads) / HARL (2 threads): 2.00"]
    shown = training.HarlEnv("mpe/spread-continuous", 0)
    obs, state, available = shown.reset()
    assert len(obs) == len(state) == 3 and state[0].shape == shown.share_observation_space[0].shape
    assert available is None
    for _ in range(25):
        _, _, rewards, dones, infos, _ = shown.step([space.sample() for space in shown.action_space])
    assert dones == [True] * 3 and infos[0] == {"bad_transition": True} and rewards[0] == rewards[2]


def test_many_seeds_is_judged_against_the_best_arrangement_of_float32_processes(load):
    many = load("many_seeds")
    speeds = {e: [100.0] for e in many.entrants(8) if "Stable" not in e.name}
    for e in speeds:
        if e.name == "separate rlopt processes, float32":
            speeds[e] = [{(1, 2): 150.0, (2, 1): 200.0, (8, 1): 180.0}[e.processes, e.threads]]
        elif e.name == "separate rlopt processes, bf16":
            speeds[e] = [250.0]
        elif e.name.startswith("num_runs=8 float32"):
            speeds[e] = [180.0 if "overlap" in e.name else 190.0]
        else:
            speeds[e] = [300.0]
    against = "separate rlopt processes, float32 (2 processes of 1 thread)"
    assert many.report(speeds, 8, []).notes == [
        f"num_runs=8 float32 / {against}: 0.95 (target at least 0.95: met)",
        f"num_runs=8 float32, overlap / {against}: 0.90 (target at least 0.95: missed)",
        f"num_runs=8 bf16 / {against}: 1.50 (target at least 1.3: met)",
        "num_runs=8 bf16 / separate rlopt processes, bf16 (2 processes of 1 thread): 1.20",
        f"num_runs=8 bf16, overlap / {against}: 1.50 (target at least 1.3: met)",
        "num_runs=8 bf16, overlap / separate rlopt processes, bf16 (2 processes of 1 thread): 1.20",
    ]


def lines_of(samples, where="a card"):
    return [json.dumps({"what": what, "value": value, "where": where}) + "\n" for what, value in samples]


def test_a_part_is_what_it_reported_before_it_broke_off(load):
    gpu = load("gpu")
    eager, captured = ({"update": word, "precision": "float32", "loop": "plain"} for word in ("eager", "captured"))
    lines = lines_of([(eager, 300.0), (captured, 1_400.0), (captured, 1_600.0), (captured, 1_500.0)])
    part = gpu.collect("sac", [*lines, json.dumps({"note": "told"}) + "\n", '{"what": {"upd'])
    made = gpu.report(part)
    assert made.header[:3] == ["update", "precision", "loop"]
    assert made.rows == [
        ["eager", "float32", "plain", "300.0", "300.0", "300.0", "1", "a card"],
        ["captured", "float32", "plain", "1500", "1400", "1600", "3", "a card"],
    ]
    assert made.notes == [
        "captured / eager, float32: 5.00",
        "captured, plain loop, float32 / LeanRL's published 725: 2.07 (target at least 1: met)",
        "captured, fastest setting / LeanRL's published 725: 2.07 (target at least 1: met)",
        "captured, fastest setting / the 2,000 aimed at: 0.75 (target at least 1: missed)",
        "told",
    ]
    part.gpu = False  # targets are for a GPU
    assert gpu.report(part).notes == ["captured / eager, float32: 5.00", "told"]


def test_break_even_is_the_fewest_worlds_that_pass_the_fastest_native_number(load):
    gpu = load("gpu")

    def row(backend: str, worlds: int) -> dict[str, str]:
        return {"environment": "HalfCheetah-v5", "backend": backend, "worlds": str(worlds)}

    samples = [(row("native", 8), 50_000.0), (row("native", 64), 90_000.0), (row("native", 256), 80_000.0)]
    slow = [(row("warp", 256), 20_000.0)]
    fast = [(row("warp", 1024), 95_000.0), (row("warp", 4096), 180_000.0)]
    assert gpu.report(gpu.collect("environments", lines_of(samples + slow + fast))).notes == [
        "HalfCheetah-v5: warp passes the fastest native number (90,000 steps/s) at 1,024 worlds",
        "HalfCheetah-v5: fastest warp / fastest native: 2.00",
    ]
    assert gpu.report(gpu.collect("environments", lines_of(samples + slow))).notes[0] == (
        "HalfCheetah-v5: warp stays below the fastest native number (90,000 steps/s) from 256 to 256 worlds"
    )
    assert gpu.report(gpu.collect("environments", lines_of(samples))).notes == []


def test_only_what_was_measured_is_written(load, tmp_path: Path):
    gpu = load("gpu")
    measured = gpu.collect("runs", lines_of([({"runs": "16", "update": "captured"}, 21_000.0)]))
    empty = gpu.Part("replay", {}, {}, ["replay was stopped after 70 s; what it had measured by then stands"])
    gpu.save(tmp_path, [measured, empty], "python benchmarks/gpu.py", 12.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "chart.png", "runs.csv"]
    text = (tmp_path / "README.md").read_text()
    assert "| 16 | captured | 21000 | 21000 | 21000 | 1 | a card |" in text
    assert "16 runs together / 20,000 steps/s: 1.05 (target at least 1: met)" in text
    assert "16 runs together / what 16 x 1M steps in ten minutes need: 0.79 (target at least 1: missed)" in text
    assert "## `replay`" in text and "stopped after 70 s" in text


def test_a_part_that_fails_or_is_late_leaves_a_note(load):
    gpu = load("gpu")
    late = gpu.run_part("sac", "cpu", quick=True, limit=0.3)
    assert not late.samples and late.notes == ["sac was stopped after 0.3 s; what it had measured by then stands"]
    failed = gpu.run_part("sac", "cuda:99", quick=True, limit=60)
    assert not failed.samples and failed.notes[0].startswith("sac ended early with status 1: ")


def test_without_a_gpu_one_line_says_what_to_do(load, monkeypatch: pytest.MonkeyPatch):
    gpu = load("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cpu --quick"):
        gpu.main([])


def test_the_gpu_script_can_be_tried_on_the_cpu(load, tmp_path: Path):
    pytest.importorskip("mujoco")
    gpu = load("gpu")
    gpu.main(["--device", "cpu", "--quick", "--parts", "sac", "--out", str(tmp_path)])
    rows = list(csv.DictReader((tmp_path / "sac.csv").open()))
    assert {(r["update"], r["precision"], r["loop"]) for r in rows} == {
        ("eager", "float32", "plain"), ("captured", "float32", "plain"), ("captured", "float32", "overlap"),
        ("captured", "bf16", "plain"), ("captured", "bf16", "overlap"),
    }  # fmt: skip
    assert all(float(r["steps/s (median)"]) > 0 and "CPU" in r["ran on"] for r in rows)
    assert "python benchmarks/gpu.py --device cpu --quick --parts sac" in (tmp_path / "README.md").read_text()
