"""What other modules and installed packages bring to the commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from rlopt import registry
from rlopt.cli import main
from rlopt.nn.encoders import ENCODERS
from tests.cli.command_line import SHORT, refused, rows


def test_an_environment_of_a_module_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gymnasium

    (tmp_path / "pond.py").write_text(
        "import gymnasium\n"
        "from gymnasium.envs.classic_control.pendulum import PendulumEnv\n"
        "gymnasium.register('Pond-v0', entry_point=PendulumEnv, max_episode_steps=20)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = [word for word in SHORT if not word.startswith("env=")]
    try:
        assert main(["train", "env=pond:Pond-v0", "env.kwargs.g=9.0", *words, f"run_dir={tmp_path / 'out'}"]) == 0
    finally:
        gymnasium.registry.pop("Pond-v0", None)
    assert {row["length"] for row in rows(tmp_path / "out" / "evaluations.csv")} == {"20"}


PACKAGE = {
    "extra/__init__.py": "",
    "extra/configs/__init__.py": "",
    "extra/configs/experiment/ours.yaml": """\
# @package _global_
# Ours
defaults:
  - override /agent: ours
  - override /buffer: newest
seed: 11
""",
    "extra/things.py": """\
from rlopt.agents import SAC
from rlopt.buffers import UniformSampler
from rlopt.nn import register_encoder
from rlopt.nn.encoders import Flatten

class Ours(SAC):
    '''An agent from outside.'''
    name = "ours"

class Newest(UniformSampler):
    '''A sampler from outside.'''
    name = "newest"
    def __init__(self, share: float = 0.5) -> None:
        self.share = share

def networks():
    register_encoder("wide", Flatten)
""",
    "extra-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: extra\nVersion: 1.0\n",
    "extra-1.0.dist-info/entry_points.txt": """\
[rlopt.agents]
ours = extra.things:Ours
broken = extra.nothing:Gone
[rlopt.samplers]
newest = extra.things:Newest
[rlopt.networks]
wide = extra.things:networks
[rlopt.configs]
extra = extra.configs
""",
}


@pytest.fixture
def installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in PACKAGE.items():
        file = tmp_path / "site" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "site")
    caches = (registry._entry_points, registry._every_entry_point, registry.load_extensions)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path
    for cached in caches:
        cached.cache_clear()
    ENCODERS.pop("wide", None)


def test_an_installed_package_brings_agents_samplers_networks_and_configurations(
    installed_package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    for line in ("An agent from outside.", "A sampler from outside.", "Ours"):
        assert line in listed
    out = installed_package / "out"
    words = [*SHORT, "experiment=ours", "agent.network.encoder=wide", "buffer.share=0.25", f"run_dir={out}"]
    assert main(["train", *words]) == 0
    capsys.readouterr()
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["agent"]["name"], config["buffer"]["share"], config["seed"]) == ("ours", 0.25, 11)
    said = refused(["train", "agent=broken", *SHORT], capsys)
    assert said.startswith("extra offers broken (rlopt.agents) as extra.nothing:Gone, which does not import")
