"""What the command line makes of words before any command runs."""

from __future__ import annotations

import sys
from pathlib import Path

import gymnasium
import pytest
import yaml

from rlopt.cli import main
from rlopt.cli.arguments import parse_arguments


@pytest.mark.parametrize("number", ["inf", "-inf", "nan", "1e400", "1.9", "many"])
@pytest.mark.parametrize("words", [["evaluate", "run", "--episodes"], ["plot", "run", "--at"]])
def test_a_count_is_a_whole_number(words: list[str], number: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words[:2], f"{words[2]}={number}"]) == 2
    assert capsys.readouterr().err == f"error: argument {words[2]}: expected a whole number, got {number}\n"


def test_a_count_may_be_written_as_a_power_of_ten() -> None:
    assert parse_arguments(["evaluate", "run", "--episodes", "2e1"]).episodes == 20
    assert parse_arguments(["plot", "run", "--at", "1e5", "--at", "250_000"]).at == [100_000, 250_000]


def test_modules_are_found_where_the_command_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "puddle.py").write_text(
        "import gymnasium\n"
        "from gymnasium.envs.classic_control.pendulum import PendulumEnv\n"
        "gymnasium.register('Puddle-v0', entry_point=PendulumEnv)\n"
    )
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    try:
        # an option of the environment's own is checked against its constructor, so the module is imported
        assert main(["train", "env=puddle:Puddle-v0", "env.g=9.0", "--print-config"]) == 0
        assert main(["--version"]) == 0
    finally:
        gymnasium.registry.pop("Puddle-v0", None)
        sys.modules.pop("puddle", None)
    assert yaml.safe_load(capsys.readouterr().out.partition("rlopt ")[0])["env"]["kwargs"] == {"g": 9.0}
    assert sys.path.count(str(tmp_path)) == 1
