"""What README.md, CONTRIBUTING.md and the pages of docs/ print runs: every block of Python as it stands, trainings cut
short; of every command line the words are read and checked as they would be; every option that is named exists."""

from __future__ import annotations

import re
import shlex
import sys
import textwrap
import types
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import rlopt
from rlopt import registry
from rlopt.cli.arguments import parse_arguments
from rlopt.cli.compose import compose, split
from rlopt.cli.options import option_rows
from rlopt.config import build, with_arguments
from rlopt.envs import SyncVectorEnv, make
from rlopt.loops.configuration import BufferConfig, TrainConfig
from rlopt.runs.run_folder import RunFolder
from rlopt.training import presets
from tests.training.conftest import no_curve

ROOT = Path(__file__).resolve().parents[1]
QUICK = {"device": "cpu", "eval.episodes": 1, "eval.max_steps": 20, "log.tensorboard": False}
SMALL = {**QUICK, "agent.network.hidden": [8], "agent.warmup_steps": 10, "agent.batch_size": 8}
PPO = {**QUICK, "agent.network": {"hidden": [8], "memory": "gru"}, "agent.rollout_steps": 20, "agent.batch_size": 20}
EXPORTED = "from rlopt.cli import main\nmain(['export', 'RUN', '--to', '{0}', '--out', 'policy.{1}'])\n"
GIVEN = {
    "rlopt.load_policy(": "import rlopt\nimport numpy as np\nobs = np.array([0.5, 0.5, 1.0], np.float32)\n",
    "model.predict(obs": "import numpy as np\nobs = np.array([0.5, 0.5, 1.0], np.float32)\n",
    "interop.sb3": "from stable_baselines3 import SAC\nenv = 'Pendulum-v1'\n",
    "interop.torchrl": "from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer\nN = 100\n",
    "policy.pt2": EXPORTED.format("torch", "pt2"),
    "policy.onnx": "import onnxscript\n" + EXPORTED.format("onnx", "onnx"),
}
"""What stands before a block that begins in the middle of somebody's program."""
SOURCES = ["README.md", "CONTRIBUTING.md", *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/**/*.md"))]
OTHERS = ("hf ", "pip", "ruff", "mypy", "pytest", "mkdocs", "python cleanrl/", "python -m rl_zoo3")
"""Commands that are not rlopt's."""
BLOCK = r"^( *)```{}\n(.*?)^\1```$"


def blocks(name: str, language: str = "python") -> list[str]:
    found = re.findall(BLOCK.format(language), (ROOT / name).read_text(), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(source) for _, source in found]


def commands() -> Iterator[str]:
    """Every command line that is printed, without its comment."""
    for name in SOURCES:
        for block in blocks(name, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                for one in re.split(r" && ", re.sub(r"(^|\s)#.*", "", line)):
                    if one.strip():
                        yield one.strip()


def run(source: str, space: dict[str, Any]) -> None:
    exec(compile(source, "<document>", "exec", dont_inherit=True), space)


@pytest.fixture
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A module of its own, in an empty folder, in which nothing trains for long and no agent, loop or backend stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RunFolder, "draw_curve", no_curve)
    for module, name in ((registry, "AGENTS"), (registry, "LOOPS"), (make, "_BACKENDS")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    short, train, told = count(60, 30), rlopt.train, presets.train_config

    def steps(options: Any) -> int:
        return min(options.get("total_steps", 1_000), next(short))

    def short_train(*args: Any, **options: Any) -> Any:
        small = {} if "resume" in options else QUICK if "climber" in args else PPO if "ppo" in args else SMALL
        return train(*args, **{**small, **options, "total_steps": steps(options)})

    def short_config(options: Any, *args: Any) -> Any:
        return told({**options, **SMALL, "total_steps": steps(options)}, *args)

    monkeypatch.setattr(rlopt, "train", short_train)
    monkeypatch.setattr(presets, "train_config", short_config)
    document = types.ModuleType("document")
    monkeypatch.setitem(sys.modules, "document", document)  # where dataclasses look for their types
    return vars(document)


SHOWN = [(name, one) for name in SOURCES if name != "CONTRIBUTING.md" for one in blocks(name) if "hub:" not in one]
"""Those that need a hub have a stand-in of one in tests of their own."""


@pytest.mark.parametrize(
    "source",
    [source for _, source in SHOWN],
    ids=[f"{name}:{source.strip().splitlines()[-1][:30]}" for name, source in SHOWN],
)
def test_the_blocks_of_the_pages_run(source: str, document: dict[str, Any]) -> None:
    for word, before in GIVEN.items():
        if word in source and not ("load_policy" in word and "rlopt.train" in source):
            source = before + source
    if "load_policy" in source and "obs = " not in source:
        source = GIVEN["rlopt.load_policy("] + source
    for package in re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE):
        pytest.importorskip(package)
    given = re.findall(r"""(?:load_policy|push)\("([^"]+)"|'export', '([^']+)'""", source)
    if given and "rlopt.train" not in source:
        folder = given[0][0] or given[0][1]
        rlopt.train("ppo" if "initial_carry" in source else "sac", "Pendulum-v1", total_steps=20, run_dir=folder)
    run(source.replace("model.learn(10_000)", "model.learn(20)"), document)


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_the_commands_are_understood(line: str) -> None:
    if line.startswith(OTHERS):
        return
    words = shlex.split(line)
    if words[0] == "rlopt":
        argv = words[1:]
    elif words[:2] == ["python", "train.py"]:
        argv = ["train", *words[2:]]
    else:
        assert words[0] == "python" and (ROOT / words[1]).is_file(), f"no test knows {line}"
        return
    arguments = parse_arguments(argv)
    if argv[0] == "train" and not any(word.startswith("resume=") for word in arguments.overrides):
        for job in split(arguments.overrides) if arguments.multirun else [arguments.overrides]:
            compose(job)


NAMED = re.compile(r"`(?:rlopt train )?((?:agent|env|eval|log|buffer|checkpoint)\.[a-z_0-9.]+)[=`]")


def test_the_options_that_the_pages_name_exist() -> None:
    configs: list[tuple[Any, str]] = [(TrainConfig(), "")]
    for name in registry.AGENTS:
        options = registry.agent_presets(name).get("agent", {})
        configs.append((build(registry.get_agent(name).config_class, options), "agent"))
    for name in registry.SAMPLERS:
        configs.append((with_arguments(BufferConfig, registry.get_sampler(name))(name=name), "buffer"))
    known = {key for config, where in configs for key, _, _ in option_rows(config, where)}
    for name in SOURCES[2:]:
        for word in NAMED.findall((ROOT / name).read_text()):
            whole = any(f"{key}.".startswith(f"{word}.") or word.startswith(f"{key}.") for key in known)
            assert whole or word.startswith("agent.clock"), f"{name} names {word}"


def test_what_contributing_shows_trains(document: dict[str, Any]) -> None:
    for source in blocks("CONTRIBUTING.md"):
        run(source, document)
    assert rlopt.train("ddpg", "Pendulum-v1").step == 60
    assert rlopt.train("climber", "Pendulum-v1", total_steps=3, run_dir="climb").step == 3
    assert rlopt.train(resume="climb", total_steps=5).step == 5
    env = {"id": "Corridor-v0", "backend": "corridors"}
    assert rlopt.train("sac_discrete", env, num_envs=3).step == 150
    team = SyncVectorEnv([document["Hunt"]] * 2)
    assert team.spec.agents == ("scout", "worker") and team.reset()["obs"].shape == (2, 2, 2)
    assert team.step(torch.tensor([[0, 4], [2, 1]])).reward.shape == (2, 2)


def test_the_agent_of_contributing_is_the_example() -> None:
    shown = next(source for source in blocks("CONTRIBUTING.md") if "class DDPG" in source)
    whole = (ROOT / "examples" / "own_agent.py").read_text().replace("import rlopt\n", "")
    assert shown.partition("\n\n\nregister_agent(")[0] in whole
