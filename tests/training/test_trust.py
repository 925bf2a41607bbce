"""A folder that somebody else made imports nothing, reads and writes nothing elsewhere, and asks for nothing without an
end; one's own runs need no word."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlopt import settings
from rlopt.cli import main
from rlopt.policy import save_policy
from rlopt.runs.run_folder import RunFolder
from rlopt.settings import read_settings, write_settings
from rlopt.training import train_config
from rlopt.training.evaluate import evaluate_path
from rlopt.training.setup import begin, resume
from rlopt.types import RloptError
from tests.training.evaluated import policy_for
from tests.training.test_resume import run_to_end

MODULE = """
import gymnasium
from gymnasium.envs.classic_control import PendulumEnv
gymnasium.register("Mine-v0", entry_point=PendulumEnv, max_episode_steps=5)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of this user's in an environment of a module of the user's."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "mine_here.py").write_text(MODULE)
    sys.path.append(str(folder))
    config = train_config({
        "total_steps": 20, "device": "cpu", "run_dir": str(folder / "run"), "env": {"id": "mine_here:Mine-v0"},
        "agent": {"name": "sac", "network": {"hidden": [8]}, "warmup_steps": 15, "batch_size": 4, "fused": False},
        "eval": {"every": None, "episodes": 1}, "log": {"tensorboard": False}, "buffer": {"name": "uniform"},
    })  # fmt: skip
    run_to_end(begin(config))
    yield folder / "run"
    sys.path.remove(str(folder))


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    sys.modules.pop("mine_here", None)
    return shutil.copytree(made, tmp_path / "moved")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Another user's home."""
    monkeypatch.setenv("LOCALAPPDATA" if os.name == "nt" else "XDG_STATE_HOME", str(tmp_path / "other"))
    return tmp_path / "other"


def never_imported(name: str = "mine_here") -> bool:
    return name not in sys.modules


def test_ones_own_run_needs_no_word_wherever_it_is_moved(run: Path) -> None:
    assert len(evaluate_path(run).episodes) == 1
    assert len(evaluate_path(run / "policy", 1).episodes) == 1
    assert len(evaluate_path(run / "policy_best", 1).episodes) == 1
    assert run_to_end(resume(run, {"total_steps": 25})).step == 25
    assert read_settings(run / "config.yaml").own, "a resume signs it anew"


@pytest.mark.usefixtures("elsewhere")
def test_a_run_from_elsewhere_names_a_module_in_vain(run: Path) -> None:
    for attempt in (lambda: evaluate_path(run), lambda: evaluate_path(run / "policy"), lambda: resume(run, {})):
        with pytest.raises(RloptError, match=r"names a module \(mine_here:Mine-v0\), .*add --trust .*trust=True\), or"):
            attempt()
        assert never_imported()
    RunFolder.open(run).close()  # the refusal has let the lock go


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("word", [{"trust": True}, {"env_id": "mine_here:Mine-v0"}])
def test_the_users_word_lets_it_in(run: Path, word: dict[str, Any]) -> None:
    assert len(evaluate_path(run, **word).episodes) == 1
    assert not read_settings(run / "config.yaml").own, "looking at a run makes it nobody's"
    assert run_to_end(resume(run, {"total_steps": 25}, **word)).step == 25
    assert read_settings(run / "config.yaml").own
    resume(run, {"total_steps": 30}).close()


@pytest.mark.usefixtures("elsewhere")
def test_the_word_on_the_command_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["evaluate", str(run)], ["train", f"resume={run}"], ["train", f"resume={run}", "--print-config"]):
        assert main(argv) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: this file names a module (mine_here:Mine-v0)") and said.count("\n") == 1
        way = "--env mine_here:Mine-v0" if argv[0] == "evaluate" else "env=mine_here:Mine-v0"
        assert said.endswith(f"add --trust (from Python: trust=True), or {way}\n") and never_imported()
    assert main(["evaluate", str(run), "--trust"]) == 0
    assert main(["evaluate", str(run), "--env", "mine_here:Mine-v0"]) == 0
    assert main(["train", f"resume={run}", "env=mine_here:Mine-v0", "--print-config"]) == 0
    assert main(["train", f"resume={run}", "total_steps=22", "--trust"]) == 0


def test_a_policy_with_a_configuration_beside_it_is_no_run_of_ones_own(run: Path, tmp_path: Path) -> None:
    """The folder of the report: a downloaded policy that brings a config.yaml."""
    loaded = shutil.copytree(run / "policy", tmp_path / "dl")
    (loaded / "config.yaml").write_text("env: {id: 'antigravity:Pendulum-v1'}\n")
    with pytest.raises(RloptError, match=r"names a module \(antigravity:Pendulum-v1\), which no file may choose"):
        evaluate_path(loaded, 1)
    assert never_imported("antigravity")


def test_neither_a_copied_signature_nor_a_changed_environment_passes(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("mine_here:Mine-v0", "antigravity:Mine-v0"))
    told = "config.yaml was changed: env.id is antigravity:Mine-v0, but the run was trained with mine_here:Mine-v0"
    for attempt in (lambda: evaluate_path(run), lambda: resume(run, {})):
        with pytest.raises(RloptError, match=told):
            attempt()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RloptError, match="is not as rlopt wrote it, and no checkpoint tells what it was"):
        evaluate_path(run)
    first, _, body = (run / "config.yaml").read_text().partition("\n")
    (run / "config.yaml").write_text(body)
    with pytest.raises(RloptError, match="names a module"):
        evaluate_path(run)
    forged = write_settings({"env": {"id": "antigravity:Mine-v0"}}).decode().replace(" own=", " own=0")
    (run / "config.yaml").write_text(forged)
    with pytest.raises(RloptError, match="is not as rlopt wrote it"):
        evaluate_path(run)
    assert never_imported("antigravity") and first.startswith("# rlopt sha256=")


@pytest.mark.usefixtures("elsewhere")
def test_unknown_words_of_the_environment_are_not_looked_up_in_its_module(run: Path) -> None:
    """``env.states`` may be an argument of the environment, and only its module could tell."""
    values = {**read_settings(run / "config.yaml").values, "env": {"id": "antigravity:Mine-v0", "states": 3}}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    for attempt in (lambda: evaluate_path(run), lambda: resume(run, {}), lambda: resume(run, {}, trust=True)):
        with pytest.raises(RloptError, match=r"env\.states: no such option"):
            attempt()
    assert never_imported("antigravity")


STRANGE: list[tuple[dict[str, Any], str]] = [
    ({"wrappers": ["os:system"]}, "names the wrapper os:system"),
    ({"wrappers": [{"class": "RecordVideo", "kwargs": {"video_folder": "x"}}]}, "names the wrapper RecordVideo"),
    ({"kwargs": {"xml_file": "/etc/passwd"}}, r"has env.kwargs.xml_file='/etc/passwd', which may name a file"),
    ({"kwargs": {"make": ["antigravity:E-v0"]}}, "has env.kwargs.make='antigravity:E-v0'"),
    ({"wrappers": [{"class": "TimeLimit", "kwargs": {"max_episode_steps": 10**12}}]}, r"asks for .*=1e\+12, more than"),
    ({"kwargs": {"max_episode_steps": 10**12}}, r"asks for env.kwargs.max_episode_steps=1e\+12, more than 100000"),
]


@pytest.mark.parametrize(("env", "words"), STRANGE)
def test_what_else_a_strangers_file_may_not_choose(tmp_path: Path, env: dict[str, Any], words: str) -> None:
    env = {"id": "Pendulum-v1", **env}
    save_policy(policy_for("Pendulum-v1"), tmp_path / "policy", {"env": env})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"env": env, "seed": 0, "eval": {"episodes": 1}}))
    for path in (tmp_path, tmp_path / "policy"):
        with pytest.raises(RloptError, match=words) as told:
            evaluate_path(path, 1)
        assert "\n" not in str(told.value) and "--trust" in str(told.value)


@pytest.mark.usefixtures("elsewhere")
def test_a_strangers_run_writes_no_buffer_elsewhere(run: Path, tmp_path: Path) -> None:
    values = read_settings(run / "config.yaml").values
    values["env"]["id"] = "Pendulum-v1"
    values["buffer"] |= {"device": "disk", "folder": str(tmp_path)}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RloptError, match=rf"names a folder to write to \(buffer.folder={tmp_path}\)"):
        resume(run, {})


# Sizes


def test_a_bomb_of_aliases_is_refused_before_it_goes_off(run: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (run / "config.yaml").write_text("\n".join(lines))
    for attempt in (lambda: evaluate_path(run), lambda: resume(run, {}), lambda: RunFolder(run).config()):
        with pytest.raises(RloptError, match=r"config.yaml cannot be read: it holds an alias \(\*name\)"):
            attempt()
    (run / "config.yaml").write_text("a: 1\n" * (settings.MAX_BYTES // 5 + 1))
    with pytest.raises(RloptError, match=f"more than the {settings.MAX_BYTES} that are read"):
        evaluate_path(run)


def test_a_description_asks_for_no_environment_that_cannot_be(tmp_path: Path) -> None:
    """150,000² numbers are 168 GiB."""
    policy = policy_for("RiverSwim-v0")
    for id, kwargs in (("RiverSwim-v0", {"states": 150_000}), ("Garnet-v0", {"states": 150_000})):
        save_policy(policy, tmp_path / "p", {"env": {"id": id, "kwargs": kwargs}})
        with pytest.raises(RloptError, match=r"a model of 150000 x \d x 150000 numbers needs .* GiB") as told:
            evaluate_path(tmp_path / "p", 1)
        assert "\n" not in str(told.value)


def test_a_configuration_asks_for_no_endless_evaluation(tmp_path: Path) -> None:
    save_policy(policy_for("Pendulum-v1"), tmp_path / "policy", {"env": {"id": "Pendulum-v1"}})
    (tmp_path / "config.yaml").write_text("{env: {id: Pendulum-v1}, seed: 0, eval: {episodes: 1000000000000}}")
    with pytest.raises(RloptError, match=r"eval\.episodes: must be at most 1,000,000, got 1,000,000,000,000"):
        evaluate_path(tmp_path)
    (tmp_path / "config.yaml").write_text("{env: {id: Pendulum-v1}, seed: 0, eval: {episodes: 1000000}}")
    with pytest.raises(RloptError, match=r"asks for 1000000 episodes; say how many \(episodes=, --episodes\)"):
        evaluate_path(tmp_path)
    (tmp_path / "config.yaml").write_text("{env: {id: Pendulum-v1}, seed: 0, threads: 99999999999}")
    before = torch.get_num_threads()
    with pytest.raises(RloptError, match="asks for 99999999999 threads, more than"):
        evaluate_path(tmp_path, 1)
    assert torch.get_num_threads() == before


# The key


@pytest.mark.skipif(os.name == "nt", reason="rights of POSIX")
def test_the_key_is_private_made_once_and_trusted_only_while_it_is_private(elsewhere: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(write_settings({"env": {"id": "a:B-v0"}}))
    key = elsewhere / "rlopt" / "key"
    assert key.stat().st_mode & 0o777 == 0o600 and key.stat().st_size == 32 and os.listdir(key.parent) == ["key"]
    kept = key.read_bytes()
    path.write_bytes(write_settings({"env": {"id": "a:B-v0"}}))
    assert key.read_bytes() == kept and read_settings(path).own
    key.chmod(0o644)
    assert not read_settings(path).own
    key.chmod(0o600)
    key.rename(key.with_name("moved"))
    key.symlink_to(key.with_name("moved"))
    assert not read_settings(path).own


def test_without_a_home_runs_are_made_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOCALAPPDATA" if os.name == "nt" else "XDG_STATE_HOME", str(tmp_path / "file"))
    with RunFolder.create(tmp_path / "run", {"env": {"id": "a:B-v0"}}) as folder:
        found = folder.settings()
    assert found.intact and not found.own and found.values == {"env": {"id": "a:B-v0"}}


def test_what_is_written_is_read_whatever_it_holds(tmp_path: Path) -> None:
    twice = [1, 2]
    values = {"env": {"kwargs": {"inf": float("inf"), "a": twice, "b": twice, "text": "ä: # x\n"}}, "seed": 3}
    path = tmp_path / "config.yaml"
    path.write_bytes(write_settings(values))
    found = read_settings(path)
    assert (found.values, found.intact, found.own) == (values, True, True)


def test_flips_and_cuts_of_a_configuration_are_noticed(tmp_path: Path) -> None:
    values = {"env": {"id": "Pendulum-v1", "kwargs": {"g": 9.0}}, "seed": 3, "total_steps": 300}
    sound = write_settings(values)
    path = tmp_path / "config.yaml"
    for bit in range(0, 8 * len(sound), 5):
        changed = bytearray(sound)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            found = read_settings(path)
        except RloptError:
            continue
        assert found.values == values or found.intact is False
    for size in range(0, len(sound), 7):
        path.write_bytes(sound[:size])
        try:
            found = read_settings(path)
        except RloptError:
            continue
        assert found.intact is False
