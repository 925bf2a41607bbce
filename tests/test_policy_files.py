"""Folders of exported policies that are damaged, or made to do harm."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.torch import save_file

from rlopt.files import digest_file
from rlopt.nn import NetworkConfig, SquashedGaussianActor, build_seeded, network_options
from rlopt.policy import Policy, load_policy, save_policy
from rlopt.policy import folder as policy_folder
from rlopt.state import save_state
from rlopt.types import EnvSpec, RloptError


def policy() -> Policy:
    observation, action = spaces.Box(-1.0, 1.0, (3,), np.float32), spaces.Box(-2.0, 2.0, (2,), np.float32)
    options = network_options(NetworkConfig(hidden=(16,)))
    actor = build_seeded(lambda: SquashedGaussianActor(observation, action, options), 0)
    return Policy(EnvSpec("Test-v0", observation, action, episode_limit=7), actor)


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_policy(policy(), tmp_path / "p")
    load_policy(tmp_path / "p")  # what torch imports at the first use of its meta device unpickles tables of its own

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a policy file was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, never)
    monkeypatch.setattr(torch, "load", never)
    return tmp_path / "p"


def rewrite(folder: Path, change: Any) -> None:
    """Change the description, and make its checksums those of the files that are there."""
    data = json.loads((folder / "policy.json").read_text())
    change(data)
    if "files" in data:
        data["files"] = {n: digest_file(folder / n)._asdict() for n in data["files"] if (folder / n).is_file()}
    (folder / "policy.json").write_text(json.dumps(data))


def refused(folder: Path, words: str) -> None:
    with pytest.raises(RloptError, match=words) as e:
        load_policy(folder)
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


def set_option(**values: Any) -> Any:
    return lambda data: data["options"].update(values)


def set_space(which: str, **values: Any) -> Any:
    return lambda data: data["spec"][which].update(values)


CHANGES: list[tuple[Any, str]] = [
    (lambda d: d.update(kind="os.system"), "unknown kind of policy 'os.system'"),
    (lambda d: d.update(kind="torch.nn.Linear"), "unknown kind of policy"),
    (lambda d: d.update(kind=["categorical"]), "no 'kind'"),
    (lambda d: d.update(format=99), "format 99.*upgrade"),
    (lambda d: d.update(format="1"), "does not describe a policy"),
    (lambda d: d.pop("options"), "no 'options'"),
    (lambda d: d.pop("spec"), "no 'spec'"),
    (lambda d: d["spec"].pop("action_space"), "damaged.*action_space"),
    (set_option(encoder="subprocess:run"), "no such encoder"),
    (set_option(unheard_of=1), "network.unheard_of: no such option"),
    (set_option(activation="__import__"), "network.activation: no such choice"),
    (set_option(hidden="abc"), "network.hidden: expected a list"),
    (set_option(hidden=[10**12, 10**12]), "damaged"),
    (set_option(hidden=[10**9]), "the network has"),
    (set_option(hidden=[1] * 10**5), "absurdly many"),
    (set_option(hidden=[-5]), "network.hidden: must be at least 1"),
    (set_option(hidden=[17]), r"is \(16, 3\) torch.float32; the network has \(17, 3\)"),
    (set_option(hidden=[]), "belongs nowhere"),
    (set_option(hidden=[16, 16]), "is missing"),
    (set_space("observation_space", shape=[10**6, 10**6]), "hold more than"),
    (set_space("observation_space", shape=[-3]), "damaged"),
    (set_space("observation_space", type="os.system"), "unknown kind of space"),
    (set_space("observation_space", dtype="O"), "dtype object"),
    (set_space("action_space", type="Discrete", n=10**15, start=0), "acts in Box action spaces"),
    (lambda d: d["spec"].update(observation_space={"type": "Discrete", "n": 10**15, "start": 0}), "the network has"),
    (lambda d: d["spec"].update(observation_space={"type": "Dict", "spaces": {"a": 3}}), "damaged"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_a_hostile_description_is_one_clear_line(saved: Path, change: Any, words: str) -> None:
    rewrite(saved, change)
    refused(saved, words)


def test_a_tagged_number_must_be_one(saved: Path) -> None:
    rewrite(saved, lambda d: d["meta"].update(gap={"$float": "7ff0"}))
    refused(saved, "a \\$float holds 16 hexadecimal digits")


def nest(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = {"type": "Dict", "spaces": {"a": value}}
    return value


def test_endless_nesting_is_refused(saved: Path) -> None:
    rewrite(saved, lambda d: d["spec"].update(observation_space=nest({"type": "Discrete", "n": 2, "start": 0}, 100)))
    refused(saved, "damaged")
    (saved / "policy.json").write_text("[" * 100_000)
    refused(saved, "damaged")


def test_a_description_cannot_name_other_files(saved: Path) -> None:
    data = json.loads((saved / "policy.json").read_text())
    data["files"]["../../other"] = {"bytes": 0, "sha256": ""}
    (saved / "policy.json").write_text(json.dumps(data))
    refused(saved, "it names the file '../../other'")


def test_a_pickle_under_another_name_is_not_loaded(saved: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.system, ("touch owned",))

    (saved / "tensors.safetensors").write_bytes(pickle.dumps(Evil()))
    rewrite(saved, lambda d: None)
    refused(saved, "tensors.safetensors is damaged")
    torch.save({"a": torch.zeros(2)}, saved / "tensors.safetensors")
    rewrite(saved, lambda d: None)
    refused(saved, "tensors.safetensors is damaged")
    (saved / "policy.json").write_bytes(pickle.dumps(Evil()))
    refused(saved, "policy.json is damaged")


def test_missing_surplus_and_foreign_tensors_are_refused(saved: Path) -> None:
    good = policy().actor.state_dict()
    for state, words in (
        ({k: v for k, v in good.items() if not k.endswith("0.bias")}, "is missing"),
        ({**good, "more": torch.zeros(3)}, "'more' belongs nowhere"),
        ({k: v.double() for k, v in good.items()}, "is .* torch.float64; the network has .* torch.float32"),
        ({k: "text" for k in good}, "is str; the network has"),
    ):
        save_state(saved, {"actor": state, "normalizer": None})
        rewrite(saved, lambda d: None)
        refused(saved, words)
    moments = {"mean": torch.zeros(3).double(), "square": torch.zeros(3).double(), "count": torch.zeros(()).double()}
    for statistics, words in (
        ({"": {**moments, "square": torch.zeros(2).double()}}, r"'square' is \(2,\).*the statistics have \(3,\)"),
        ({"other": moments}, "statistics are of other observations"),
        ({"": {"mean": moments["mean"]}}, "'count' is missing"),
        ([moments], "damaged"),
    ):
        normalizer = {"clip": 10.0, "epsilon": 1e-8, "moments": statistics}
        save_state(saved, {"actor": good, "normalizer": normalizer})
        rewrite(saved, lambda d: None)
        refused(saved, words)
    save_file({"x": torch.zeros(1)}, saved / "tensors.safetensors")
    rewrite(saved, lambda d: None)
    refused(saved, "damaged")


def test_damage_and_loss_are_noticed(saved: Path) -> None:
    weights = saved / "tensors.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    refused(saved, "tensors.safetensors is not the file that was saved")
    weights.write_bytes(good[:-8])
    refused(saved, "not the file that was saved")
    weights.unlink()
    refused(saved, "tensors.safetensors is missing")


def test_an_absurd_description_is_not_read(saved: Path) -> None:
    with open(saved / "policy.json", "ab") as file:
        file.truncate(policy_folder.MAX_DESCRIPTION_BYTES + 1)
    refused(saved, "larger than")
