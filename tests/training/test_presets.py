"""A registered name that stands for an agent class and presets, of the buffer too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rlopt
from rlopt import registry
from rlopt.agents import SAC
from rlopt.analysis.run_results import load_run
from rlopt.cli import listing
from rlopt.cli.compose import compose
from rlopt.loops.configuration import build_config
from rlopt.registry import get_agent, register_agent
from rlopt.training import train_config
from rlopt.types import RloptError

PRESETS: dict[str, Any] = {
    "agent": {"tau": 0.02, "network": {"hidden": [8]}, "fused": False},
    "buffer": {"name": "lap", "alpha": 0.6},
}


@pytest.fixture(autouse=True)
def sac_lap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "AGENTS", dict(registry.AGENTS))
    register_agent("sac_lap", "rlopt.agents.sac:SAC", PRESETS)


def facts(config: Any) -> tuple[Any, ...]:
    agent, buffer = config.agent, config.buffer
    return agent.name, agent.tau, agent.network.hidden, agent.batch_size, buffer.name, getattr(buffer, "alpha", None)


def command_line(**options: Any) -> Any:
    return compose(["agent=sac_lap", "env=Pendulum-v1", *(f"{key}={value}" for key, value in options.items())])


WAYS = [
    pytest.param(command_line, id="command line"),
    pytest.param(lambda **o: train_config({"agent": "sac_lap", **o}), id="a word"),
    pytest.param(lambda **o: train_config({"agent": {"name": "sac_lap"}, **o}), id="a mapping"),
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_name_is_its_class_and_its_presets_in_every_way_of_saying_it(way: Any) -> None:
    assert get_agent("sac_lap") is SAC
    assert facts(way()) == ("sac_lap", 0.02, (8,), 256, "lap", 0.6)
    assert facts(way(**{"agent.tau": 0.03, "buffer.alpha": 0.5})) == ("sac_lap", 0.03, (8,), 256, "lap", 0.5)
    assert facts(way(**{"buffer.capacity": 70})) == ("sac_lap", 0.02, (8,), 256, "lap", 0.6)
    assert facts(way(buffer="uniform")) == ("sac_lap", 0.02, (8,), 256, "uniform", None)
    assert facts(way(buffer="prioritized"))[-2:] == ("prioritized", 0.6)
    with pytest.raises(RloptError, match=r"agent\.tua: no such option; did you mean agent\.tau\?"):
        way(**{"agent.tua": 1})


def test_other_names_keep_the_uniform_buffer() -> None:
    assert facts(train_config({"agent": "sac"}))[-2:] == ("uniform", None)
    assert facts(build_config({}))[0] == "sac" and build_config({}).buffer.name == "uniform"


def test_an_experiment_may_be_of_such_a_name_and_choose_another_buffer(tmp_path: Path) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    head = "# @package _global_\ndefaults:\n  - override /agent: sac_lap\n"
    (folder / "mine.yaml").write_text(f"{head}  - _self_\nagent:\n  tau: 0.04\n")
    (folder / "plain.yaml").write_text(f"{head}  - override /buffer: uniform\n  - _self_\n")
    dirs = [str(tmp_path)]
    assert facts(compose(["experiment=mine"], dirs)) == ("sac_lap", 0.04, (8,), 256, "lap", 0.6)
    assert facts(compose(["experiment=plain"], dirs))[-2:] == ("uniform", None)


def test_a_run_keeps_the_name_in_its_folder_its_policy_and_its_results(tmp_path: Path) -> None:
    options = {"total_steps": 60, "agent.warmup_steps": 40, "agent.batch_size": 8, "eval.episodes": 1, "device": "cpu"}
    result = rlopt.train("sac_lap", "Pendulum-v1", run_dir=str(tmp_path / "run"), progress=False, **options)
    found = load_run(result.folder)
    assert found.agent == "sac_lap" and found.config["buffer.name"] == "lap"
    assert found.config["agent.td_loss"] == "huber"  # what the preset buffer brings
    again = rlopt.train(resume=result.folder, total_steps=70, progress=False)
    assert again.step == 70


def test_the_list_shows_what_a_name_presets(capsys: pytest.CaptureFixture[str]) -> None:
    lines = listing._lines("agents", [])
    assert lines["sac_lap"] == (
        "Soft actor-critic for bounded Box action spaces. (agent.tau=0.02, agent.network={'hidden': [8]}, "
        "agent.fused=False, buffer=lap, buffer.alpha=0.6)"
    )
    assert lines["sac"] == "Soft actor-critic for bounded Box action spaces."


def test_presets_are_of_the_agent_and_its_buffer_alone_and_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="agent and buffer, not env"):
        register_agent("other", "rlopt.agents.sac:SAC", {"env": {"id": "Hopper-v5"}})
    with pytest.raises(RloptError, match="registered already"):
        register_agent("sac_lap", "rlopt.agents.sac:SAC", {"agent": {"tau": 0.5}})
    presets = registry.agent_presets("sac_lap")
    presets["agent"]["tau"] = 1.0
    assert registry.agent_presets("sac_lap") == PRESETS
