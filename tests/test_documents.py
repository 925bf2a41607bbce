"""Every block of Python in README.md and CONTRIBUTING.md runs as it is printed, trainings cut short."""

from __future__ import annotations

import re
import sys
import types
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import rlopt
from rlopt import registry
from rlopt.envs import SyncVectorEnv, make
from rlopt.runs.run_folder import RunFolder
from rlopt.training import presets
from tests.training.conftest import no_curve

ROOT = Path(__file__).resolve().parents[1]
QUICK = {"device": "cpu", "eval.episodes": 1, "eval.max_steps": 20, "log.tensorboard": False}
SMALL = {**QUICK, "agent.network.hidden": [8], "agent.warmup_steps": 10, "agent.batch_size": 8}
PPO = {**QUICK, "agent.network": {"hidden": [8], "memory": "gru"}, "agent.rollout_steps": 20, "agent.batch_size": 20}
GIVEN = {
    "policy = rlopt.load_policy": "import rlopt\nobs = [0.5, 0.5, 1.0]\n",
    "interop.sb3": "from stable_baselines3 import SAC\nenv = 'Pendulum-v1'\n",
    "interop.torchrl": "from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer\nN = 100\n",
}
"""What stands before a block that begins in the middle of somebody's program."""
PACKAGES = {"interop.sb3": "stable_baselines3", "interop.torchrl": "torchrl"}


def blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE)


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


@pytest.mark.parametrize("source", blocks("README.md"), ids=lambda source: source.strip().splitlines()[-1][:30])
def test_the_readmes_blocks_run(source: str, document: dict[str, Any]) -> None:
    for word, before in GIVEN.items():
        if word in source:
            pytest.importorskip(PACKAGES.get(word, "rlopt"))
            source = before + source
    if "load_policy" in source:
        rlopt.train("ppo" if "initial_carry" in source else "sac", "Pendulum-v1", total_steps=20, run_dir="RUN")
    run(source, document)


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
