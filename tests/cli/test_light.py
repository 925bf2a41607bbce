"""What answers at once: help, listings and mistakes in words import no torch."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlopt.cli.compose import compose
from rlopt.config import option_names
from rlopt.errors import RloptError
from rlopt.loops.configuration import TrainConfig
from rlopt.registry import AGENTS, get_agent
from rlopt.training.early import Untold, agent_options, declared, names, refuse_mistakes
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
]


def test_help_and_mistakes_in_words_import_no_torch(tmp_path: Path) -> None:
    """One process for all of them, as it is the modules that count."""
    code = (
        "import sys\nfrom rlopt.cli import main\n"
        f"for words in {WORDS!r}:\n"
        "    main(words)\n"
        "    if {'torch', 'gymnasium', 'numpy'} & set(sys.modules):\n"
        "        sys.exit(' '.join(words) + ' imports torch, Gymnasium or NumPy')\n"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == 17


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


@pytest.mark.parametrize(
    "words", [w[1:] for w in WORDS if w[0] == "train" and any("." in word.partition("=")[0] for word in w)]
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
