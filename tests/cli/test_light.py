"""What answers at once: help, listings and mistakes in words import no torch."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from gymnasium.envs.registration import load_env_creator

from rlopt.cli.compose import compose
from rlopt.config import call_options, option_names
from rlopt.envs.factory import find_spec
from rlopt.errors import RloptError
from rlopt.loops.configuration import EnvConfig, TrainConfig, buffer_config
from rlopt.registry import AGENTS, SAMPLERS, get_agent
from rlopt.training.early import Untold, agent_options, buffer_options, declared, env_options, names, refuse_mistakes
from tests.cli.command_line import python

WORDS = [
    ["--help"],
    ["train", "--help"],
    ["trian"],
    ["list", "agents"],
    ["train", "--multrun"],
    ["train", "agent=sca"],
    ["train", "buffer=unifrm"],
    ["train", "experiment=sac_hoper_v4"],
    ["train", "seed"],
    ["train", "seed=1,2"],
    ["train", "resume=nowhere"],
    ["train", "--config-dir", "nowhere"],
    ["sweep", "--help"],
    ["sweep", "nowhere.yaml"],
    ["train", "agent.learning_rte=1"],
    ["train", "agent=ppo", "agent.network.hiden=[8]"],
    ["train", "experiment=sac_hopper_v4", "agent.tau=big"],
    ["train", "agent.gamma=2"],
    ["train", "eval.evry=5"],
    ["train", "totl_steps=5"],
    ["train", "env=Hopper-v5", "agent.lr=0.1"],
    ["train", "seed=-1"],
    ["train", "buffer=prioritized", "buffer.alfa=1"],
    ["train", "buffer=lap", "buffer.floor=low"],
    ["train", "buffer=hindsight", "buffer.over=prioritized", "buffer.relabeled=0.5"],
    ["train", "agent=rainbow", "env=CartPole-v1", "buffer.betta=1"],
    ["train", "buffer.alpha=0.5"],
    ["train", "buffer.capacity=0"],
    ["train", "env.normalize_obs=maybe"],
    ["evaluate", "nowhere"],
    ["export", "nowhere", "--to", "torch"],
    ["push", "nowhere", "hub:user/name"],
    ["plot", "nowhere"],
    ["report", "nowhere", "--out", "report.html"],
]
OF_ENVIRONMENTS = [
    ["train", "env=HalfCheeta-v5"],
    ["train", "env=HalfCheetah"],
    ["train", "env=Fetch-v7"],
    ["train", "env=simple_tag_v3"],
    ["train", "env=Hopper-v5", "env.timout=3"],
    ["train", "env=HalfCheetah-v5", "env.frame_skp=2"],
    ["train", "env=garnet", "env.sttes=5"],
]
"""Mistakes for which Gymnasium is imported, and torch is not."""


def test_help_and_mistakes_in_words_import_no_torch(tmp_path: Path) -> None:
    """One process for all of them, as it is the modules that count."""
    code = (
        "import sys\nfrom rlopt.cli import main\n"
        f"for words in {WORDS + OF_ENVIRONMENTS!r}:\n"
        "    main(words)\n"
        f"    heavy = {{'torch'}} if words in {OF_ENVIRONMENTS!r} else {{'torch', 'gymnasium', 'numpy'}}\n"
        "    if heavy & set(sys.modules):\n"
        "        sys.exit(f'{words} imports {heavy & set(sys.modules)}')\n"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(WORDS) - 4 + len(OF_ENVIRONMENTS)


def test_the_source_of_options_says_what_their_classes_say() -> None:
    """Else a right option would be refused, or a wrong one told in other words."""
    tops = ("eval", "log", "checkpoint")
    assert {*declared("rlopt.loops.configuration", "TrainConfig")} == {f.name for f in fields(TrainConfig)}
    told = set()
    for name in AGENTS:
        with suppress(Untold):
            options = agent_options(name)
            told.add(name)
            assert sorted(names(options)) == sorted(option_names(get_agent(name).config_class)), name
    assert {"sac", "td3", "ppo", "dqn", "rainbow", "gigpo", "hasac", "mappo", "qmix", "mansa", "drpg"} <= told
    groups = {n: o for n, o in declared("rlopt.loops.configuration", "TrainConfig").items() if n in tops}
    assert sorted(names(groups)) == sorted(n for n in option_names(TrainConfig) if n.partition(".")[0] in tops)


@pytest.mark.parametrize("given", [{"name": name} for name in SAMPLERS] + [{"name": "hindsight", "over": "lap"}])
def test_the_source_of_a_sampler_says_what_its_class_says(given: dict[str, str]) -> None:
    _, options = buffer_options(given, "sac")
    assert sorted(names(options)) == sorted(option_names(type(buffer_config(given))))


@pytest.mark.parametrize("id", ["Pendulum-v1", "HalfCheetah-v5", "Ant-v4", "Garnet-v0", "textworld"])
def test_the_source_of_an_environment_says_what_its_class_says(id: str) -> None:
    entry = find_spec(id).entry_point
    own = call_options(load_env_creator(entry))
    assert {*env_options({"id": id, "other": 1})} == {*own, *option_names(EnvConfig)}


@pytest.mark.parametrize("words", [w for w in OF_ENVIRONMENTS if len(w) == 2])
def test_an_unknown_environment_is_told_early_in_the_words_of_the_check_proper(words: list[str]) -> None:
    id = words[1].removeprefix("env=")
    with pytest.raises(RloptError) as proper:
        find_spec(id)
    with pytest.raises(RloptError) as early:
        refuse_mistakes({"env": {"id": id}})
    assert str(early.value) == str(proper.value)


def test_what_only_a_module_can_tell_is_left_to_it() -> None:
    for id in (
        "nowhere:Env-v0",
        "pettingzoo:nowhere",
        "mpe/sprd",
        "lbf/8x8",
        "${x}",
        "CartPole-v1",
        "two_rooms",
        "textworld",
    ):
        refuse_mistakes({"env": {"id": id, "kwargs": {"anything": 1}}})


@pytest.mark.parametrize(
    "words", [w[1:] for w in WORDS + OF_ENVIRONMENTS if w[0] == "train" and any("." in x.partition("=")[0] for x in w)]
)
def test_what_is_told_early_is_told_in_the_words_of_the_checks_proper(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    for early in (refuse_mistakes, lambda settings: None):
        monkeypatch.setattr("rlopt.training.presets.refuse_mistakes", early)
        with monkeypatch.context() as patched:
            patched.setattr("rlopt.training.presets.sys", SimpleNamespace(modules={}))
            with pytest.raises(RloptError) as caught:
                compose(words)
        told.append(str(caught.value))
    assert told[0] == told[1]
