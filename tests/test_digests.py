"""Digests tell whether two checkouts compute the same: of every agent, to the bit, and by value rather than by name."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from rlopt.registry import AGENTS, SAMPLERS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def digests() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digests", ROOT / "benchmarks" / "digests.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_agent_and_sampler_has_a_case(digests: ModuleType) -> None:
    words = {word for options in digests.CASES.values() for word in options.split()}
    models = {"gigpo_llm"}  # language models, which not every checkout has
    assert {f"agent={name}" for name in AGENTS if name not in models} <= words
    elsewhere = {"uniform", "hindsight"}  # the default; goals, which no environment that is always there has
    assert {f"buffer={name}" for name in SAMPLERS if name not in elsewhere} <= words


def test_a_run_is_its_own_equal_and_every_change_is_found(
    digests: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    made = digests.run_case("value-iteration", ROOT)
    assert "error" not in made and made["tensors"] and made["numbers"] and made["tables"]["metrics.csv"]["step"]
    assert digests.compare({"case": made}, {"case": made})

    def changed(where: str) -> str:
        """What is told of ``made`` with one number replaced."""
        other = copy.deepcopy(made)
        if where == "tensors":
            other["tensors"][0] = "0" * 64
            other["names"]["0" * 64] = "state/new"
        elif where == "numbers":
            other["numbers"][next(iter(other["numbers"]))] = 1234.5
        else:
            other["tables"]["metrics.csv"][where][1] = "1234.5"
        capsys.readouterr()
        assert not digests.compare({"case": made}, {"case": other})
        return capsys.readouterr().out

    assert f"1 of {len(made['tensors'])} tensors missing" in changed("tensors")
    assert f"1 of {len(made['numbers'])} numbers missing" in changed("numbers")
    assert "metrics.csv: gap (row 1: " in changed("gap")

    more = copy.deepcopy(made)
    more["numbers"]["new"], more["tables"]["new.csv"] = 7, {"step": ["1"]}
    renamed = {**more, "names": {value: f"{name}/renamed" for value, name in more["names"].items()}}
    assert digests.compare({"case": made}, {"case": renamed})
    assert "equal; +1 numbers; +new.csv: step" in capsys.readouterr().out
    assert not digests.compare({"case": made}, {})
