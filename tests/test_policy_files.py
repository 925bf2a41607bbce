"""Folders of exported policies that are damaged, or made to do harm."""

from __future__ import annotations

import json
import os
import pickle
import threading
import time
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
from rlopt.state import MAX_JSON_BYTES, checksum, load_state, save_state
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
    data["checksum"] = checksum(data)
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
    (lambda d: d.update(format=1), "format 1, this rlopt reads 2; resume its run"),
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
    (lambda d: d["spec"].update(observation_space={"type": "Discrete", "n": 10**15, "start": 0}), "is missing"),
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
    data["checksum"] = checksum(data)
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
        file.truncate(MAX_JSON_BYTES + 1)
    refused(saved, f"more than the {MAX_JSON_BYTES} that are read")


def test_a_number_changed_by_hand_is_noticed(saved: Path) -> None:
    """Loaded, this one would move every action."""
    text = (saved / "policy.json").read_text()
    assert text.count("2.0") > 0
    (saved / "policy.json").write_text(text.replace("2.0", "6.0", 1))
    refused(saved, r"the checksum of policy\.json does not agree")


def test_a_flipped_bit_changes_nothing_or_is_noticed(saved: Path) -> None:
    """Every 23rd bit of the JSON files, and bits all over the weights (python -m tests.faults flips every one)."""
    observations = torch.linspace(-1, 1, 30).reshape(10, 3)
    good = load_policy(saved)
    noticed = 0
    for name, every in (("policy.json", 23), ("state.json", 23), ("tensors.safetensors", 331)):
        sound = (saved / name).read_bytes()
        for bit in range(0, 8 * len(sound), every):
            changed = bytearray(sound)
            changed[bit // 8] ^= 1 << bit % 8
            (saved / name).write_bytes(changed)
            try:
                found = load_policy(saved)
            except RloptError as e:
                assert "\n" not in str(e)
                noticed += 1
                continue
            assert torch.equal(found(observations), good(observations))
            assert (found.spec, found.meta) == (good.spec, good.meta)
        (saved / name).write_bytes(sound)
    assert noticed > 300


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_forged_weights_that_are_not_finite_are_refused(saved: Path, value: float) -> None:
    state = load_state(saved)
    next(iter(state["actor"].values())).view(-1)[0] = value
    save_state(saved, state)
    rewrite(saved, lambda d: None)
    refused(saved, "holds numbers that are not finite")


@pytest.mark.parametrize(("name", "value"), [("epsilon", float("nan")), ("epsilon", -1.0), ("clip", float("nan"))])
def test_forged_statistics_that_make_no_number_are_refused(saved: Path, name: str, value: float) -> None:
    moments = {"mean": torch.zeros(3).double(), "square": torch.zeros(3).double(), "count": torch.zeros(()).double()}
    normalizer = {"clip": 10.0, "epsilon": 1e-8, "moments": {"": moments}, name: value}
    save_state(saved, {"actor": policy().actor.state_dict(), "normalizer": normalizer})
    rewrite(saved, lambda d: None)
    refused(saved, "its statistics have clip=")


def test_a_policy_is_never_damaged_while_its_run_exports_it(tmp_path: Path) -> None:
    """A reader meets every moment of the replacement: each of its steps reads the policy once."""
    save_policy(policy(), tmp_path / "p", {"edition": 0})
    stop, found = threading.Event(), []

    def export() -> None:
        edition = 0
        while not stop.is_set():
            edition += 1
            save_policy(policy(), tmp_path / "p", {"edition": edition})

    writer = threading.Thread(target=export)
    writer.start()
    try:
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            found.append(load_policy(tmp_path / "p").meta["edition"])
    finally:
        stop.set()
        writer.join()
    assert found == sorted(found) and found[-1] > found[0]


def test_a_policy_read_in_the_middle_of_its_replacement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The description is the old one's, the rest is the new one's, and once no folder has the name."""
    save_policy(policy(), tmp_path / "p", {"edition": 0})
    read, editions = policy_folder._read_description, []

    def replaced_meanwhile(folder: Path) -> Any:
        data = read(folder)
        if len(editions) < 3:
            editions.append(data["meta"]["edition"])
            if len(editions) == 2:
                os.replace(tmp_path / "p", tmp_path / ".p.old")
            other = policy()
            with torch.no_grad():
                next(other.actor.parameters()).add_(len(editions))
            save_policy(other, tmp_path / "p", {"edition": len(editions)})
        return data

    monkeypatch.setattr(policy_folder, "_read_description", replaced_meanwhile)
    assert load_policy(tmp_path / "p").meta == {"edition": 3}
    assert editions == [0, 1, 2]


def test_damage_is_told_at_once_although_replacements_are_waited_for(saved: Path) -> None:
    (saved / "state.json").write_text("{}")
    begin = time.monotonic()
    refused(saved, "is not the file that was saved")
    assert time.monotonic() - begin < 0.5
