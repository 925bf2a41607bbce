"""Settings ranked by their last evaluations."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rlopt.analysis.ranking import Setting, as_lines, as_markdown, rank_runs, ranked, rows_of, score_of
from rlopt.analysis.run_results import EvaluationCurve
from rlopt.analysis.statistics import ConfidenceInterval
from rlopt.settings import write_settings


def setting(name: str, value: float, ended: str = "done") -> Setting:
    return Setting((name,), (value,), ConfidenceInterval(value, math.nan, math.nan), 100, 60.0, ended, name)


def test_whole_results_come_first_the_best_of_them_on_top() -> None:
    found = ranked(
        [setting("lost", math.nan, "failed"), setting("cut", 9.0, "pruned"), setting("b", 1.0), setting("a", 2.0)]
    )
    assert [one.name for one in found] == ["a", "b", "cut", "lost"]
    assert [row[0] for row in rows_of(found)] == ["rank", "1", "2", "-", "-"]


def test_the_score_is_the_iqm_over_seeds_and_one_seed_has_the_interval_of_its_episodes() -> None:
    seeds = [EvaluationCurve(i, [10, 20], [[0.0], [value - 1, value + 1]]) for i, value in enumerate((1, 2, 3, 100))]
    assert score_of(seeds).estimate == 2.5  # without the least and the largest
    assert score_of(seeds[:2]).estimate == 1.5
    estimate, low, high = score_of(seeds[:1])
    assert (estimate, low + high) == (1.0, pytest.approx(2.0))
    assert high == pytest.approx(1.0 + 12.706 * math.sqrt(2) / math.sqrt(2), abs=1e-2)  # t of one degree of freedom


def test_runs_of_the_same_words_are_seeds_of_one_setting(tmp_path: Path) -> None:
    runs = {}
    for i, (rate, value) in enumerate(((0.1, 1.0), (0.1, 3.0), (0.2, 4.0), (0.2, 6.0))):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "config.yaml").write_bytes(
            write_settings({"agent": {"name": "sac"}, "env": {"id": "Pendulum-v1"}, "seed": i % 2})
        )
        (folder / "evaluations.csv").write_text(f"step,episode,return,length\n0,0,9,200\n60,0,{value},200\n")
        runs[folder] = ((f"agent.learning_rate={rate}",), 30.0, "done")
    runs[tmp_path / "gone"] = (("agent.learning_rate=0.3",), 1.0, "ended with code 2")
    blank, title, head, first, second = rank_runs(runs)
    assert (blank, title) == ("", "Pendulum-v1, last evaluations:")
    assert head.split()[:2] == ["rank", "IQM"]
    assert first.split() == [
        "1",
        "5.0",
        "[4.0,",
        "6.0]",
        "5.0",
        "±",
        "1.4",
        "2",
        "60",
        "1.0",
        "done",
        "agent.learning_rate=0.2",
    ]
    assert second.split()[:2] == ["2", "2.0"]
    assert rank_runs({tmp_path / "gone": ((), 1.0, "done")}) == []


def test_a_table_is_written_for_a_terminal_and_as_markdown() -> None:
    rows = rows_of([setting("a|b", 1.5)], "trial")
    assert as_lines(rows)[1].split() == ["1", "a|b", "1.5", "1.5", "1", "100", "1.0", "done", "a|b"]
    assert as_markdown(rows)[1:] == ["|" + "---|" * 9, "| 1 | a\\|b | 1.5 | 1.5 | 1 | 100 | 1.0 | done | a\\|b |"]
