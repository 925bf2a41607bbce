"""Exported policies: the network that acts, the statistics it sees through, and nothing that only training needs.

A policy folder holds ``policy.json`` (what it is, how it was trained, the checksums of the rest and its own) and a
state tree of ``rlopt.state`` (weights and frozen statistics); that of a language model its files in place of the tree.
Loading one runs none of its code: the kind of network is a word of the closed registry ``rlopt.nn.make_actor``, and
sizes are compared with the weights present before anything is allocated.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from rlopt.files import Digest, digest_file, fresh_folder, remove, replace_folder, write_file
from rlopt.hub import local, refuse_nowhere
from rlopt.nn.actors import Actor
from rlopt.nn.module import Net, build_seeded
from rlopt.policy.exported import EvaluationMode, Policy
from rlopt.policy.frozen_statistics import check_tensors, frozen_statistics, load_statistics
from rlopt.policy.language import FILES, LanguageActor, LanguagePolicy, read_language_policy
from rlopt.policy.specification import spec_from_json, spec_to_json
from rlopt.policy.switching_apart import ApartSwitch
from rlopt.policy.team import SharedActor, build_actor
from rlopt.registry import load_extensions
from rlopt.state import CorruptCheckpoint, checksum, load_state, read_json, save_state, tag_floats, untag_floats
from rlopt.types import RloptError, State, resolve_device
from rlopt.version import __version__

FORMAT = 2
"""Version of the folder's layout; others are refused (1 had no checksum of its own)."""
DESCRIPTION = "policy.json"
_TRIES = 50
"""How often a policy is read that is replaced each time before all of it is read."""
MAX_OPTION_ITEMS = 256
"""Entries of a list or mapping among a network's options."""


def save_policy(policy: Policy, path: Path | str, meta: Mapping[str, Any] | None = None) -> None:
    """Write ``policy`` as the folder ``path``; a crash at any moment leaves the old one or the new one, whole.

    ``meta`` is JSON, or numbers that JSON lacks (inf, NaN), that says how it was trained (``policy.meta`` by default).

    Raises:
        OSError: if the disk fails or is full; what was there before is untouched.
        RloptError: if ``path`` holds something else than a policy, which would be lost, or if the policy is one
            agent's part of a network that its team shares.
    """
    if isinstance(policy.actor, SharedActor | ApartSwitch):
        raise RloptError(f"{policy.spec.id} acts with a network that its team shares; save the policy of the team")
    path = Path(os.path.abspath(path))
    if path.exists() and not (path / DESCRIPTION).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise RloptError(f"{path} is there and is no policy; name another folder for this one")
    staged = path.with_name(f".{path.name}.new")
    description = {
        "format": FORMAT,
        "rlopt": __version__,
        "kind": policy.actor.kind,
        "options": policy.actor.options,
        "spec": spec_to_json(policy.spec),
        "evaluation_mode": policy.evaluation_mode._asdict(),
        "meta": tag_floats(policy.meta if meta is None else meta),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        digests = _write_weights(policy, fresh_folder(staged))
        description["files"] = {name: {"bytes": d.bytes, "sha256": d.sha256} for name, d in digests.items()}
        description["checksum"] = checksum(description)
        text = json.dumps(description, indent=1, allow_nan=False)
        write_file(staged / DESCRIPTION, [text.encode()])
        replace_folder(staged, path)
    finally:
        with suppress(OSError):
            remove(staged)


def _write_weights(policy: Policy, folder: Path) -> dict[str, Digest]:
    if isinstance(policy, LanguagePolicy):
        return policy.write(folder)
    state: State = {
        "actor": dict(policy.actor.state_dict()),
        "normalizer": None if policy.normalizer is None else frozen_statistics(policy.normalizer),
    }
    return save_state(folder, state)


_REFUSED = (
    TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, AssertionError, RuntimeError,
    MemoryError, OSError,
)  # fmt: skip
"""What building from a description that makes no sense may raise."""


def load_policy(path: Path | str, device: str | torch.device = "cpu") -> Policy:
    """Return the policy in a policy folder, the last one (``policy/``) of a run folder, or the one at ``hub:user/name``
    (``hub:user/name@revision``; see ``rlopt.hub``).

    Raises:
        RloptError: there is none, it cannot be fetched, or it is damaged, hostile, or written by a newer rlopt.
    """
    path = local(path)
    target = resolve_device(device)
    for _ in range(_TRIES):
        folder = find_policy(path)
        before = _edition(folder)
        try:
            return _read(folder, target)
        except RloptError as e:
            if before is not None and _edition(folder) == before:
                raise
            failed = e  # its run has exported another one meanwhile
    raise failed


def _edition(folder: Path) -> tuple[int, ...] | None:
    """Return what differs between a policy and the one that replaces it."""
    try:
        found = (folder / DESCRIPTION).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _read(folder: Path, device: torch.device) -> Policy:
    try:
        return _load(folder, device)
    except CorruptCheckpoint:
        raise
    except RloptError as e:
        raise RloptError(f"{folder}: {e}") from e
    except _REFUSED as e:
        raise _damaged(folder, e) from e


def find_policy(path: Path | str) -> Path:
    """Return the policy folder that ``path`` means: itself, or ``path/policy`` of a run folder.

    Raises:
        RloptError: there is none.
    """
    whole = Path(os.path.abspath(path))  # "." has no name
    for folder in (whole, whole / "policy"):
        if (found := _described(folder)) is not None:
            return found
    refuse_nowhere(path)
    if runs := run_policies(whole):
        raise RloptError(f"{path} holds the policies of several runs; name one of them, such as {runs[0]}")
    raise RloptError(f"{path} holds no policy; give a folder with {DESCRIPTION} in it, or a run folder with policy/")


def run_policies(path: Path | str) -> list[Path]:
    """Return the policies ``run0``, ``run1`` … of a run folder, or of its ``policy/``, that holds several; else
    nothing."""
    whole = Path(os.path.abspath(path))
    for folder in (whole, whole / "policy"):
        each = (folder / f"run{r}" for r in itertools.count())
        if runs := list(itertools.takewhile(lambda one: _described(one) is not None, each)):
            return runs
    return []


def _described(folder: Path) -> Path | None:
    """Return the policy in ``folder``. A crash in the middle of an overwrite leaves the old one under the name that
    ``replace_folder`` gives it."""
    # Whoever looks for the old one after the new one has got its name finds neither, and so looks again.
    candidates = (folder, folder.with_name(f".{folder.name}.old"), folder)
    return next((candidate for candidate in candidates if (candidate / DESCRIPTION).is_file()), None)


def _load(folder: Path, device: torch.device) -> Policy:
    data = _read_description(folder)
    spec = spec_from_json(data["spec"])
    writes = data["kind"] == LanguageActor.kind
    for name, recorded in data["files"].items():
        if not FILES.fullmatch(name) if writes else name not in ("state.json", "tensors.safetensors"):
            raise ValueError(f"it names the file {str(name)[:40]!r}")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{name} is missing")
        if digest_file(folder / name)._asdict() != recorded:
            raise ValueError(f"{name} is not the file that was saved")
    if writes:
        return _as_described(read_language_policy(folder, spec, data["options"], device), data)
    state = load_state(folder)
    weights: Any = state["actor"]
    _check_options(data["options"], 0)
    load_extensions()  # networks of installed packages, which the description may name
    with torch.device("meta"):
        shapes = build_actor(spec, data["kind"], data["options"]).state_dict()
    check_tensors(weights, shapes, "the network has")
    # The weights drawn here are overwritten at once; drawing them must not move torch's global generator.
    actor = build_seeded(lambda: build_actor(spec, data["kind"], data["options"]), 0)
    assert isinstance(actor, Actor)
    actor.load_state_dict(weights, strict=True)
    actor.to(device).requires_grad_(False).eval()
    if {p.dtype for p in actor.parameters()} == {torch.float32}:
        Net(actor)  # side by side as they were trained: how memory is aligned decides the last bit of a product
    normalizer = None
    if state["normalizer"] is not None:
        normalizer = load_statistics(spec, state["normalizer"], device)
    return _as_described(Policy(spec, actor, normalizer), data)


def _as_described(policy: Policy, data: dict[str, Any]) -> Policy:
    policy.meta = untag_floats(data["meta"])
    policy.evaluation_mode = _evaluation_mode(**data["evaluation_mode"])
    return policy


def _evaluation_mode(deterministic: bool, epsilon: float) -> EvaluationMode:
    if type(deterministic) is not bool or type(epsilon) is not float or not 0.0 <= epsilon <= 1.0:
        raise ValueError(f"it acts with deterministic={deterministic!r} and epsilon={epsilon!r}")
    return EvaluationMode(deterministic, epsilon)


def _read_description(folder: Path) -> dict[str, Any]:
    data = read_json(folder / DESCRIPTION)
    wanted = {
        "format": int,
        "kind": str,
        "options": dict,
        "spec": dict,
        "evaluation_mode": dict,
        "meta": dict,
        "files": dict,
    }
    if not isinstance(data, dict) or not isinstance(data.get("format"), int):
        raise ValueError(f"{DESCRIPTION} does not describe a policy")
    if data["format"] > FORMAT:
        raise RloptError(f"this policy has format {data['format']}, this rlopt reads {FORMAT}; upgrade rlopt")
    if data["format"] < FORMAT:
        raise RloptError(
            f"this policy has format {data['format']}, this rlopt reads {FORMAT}; resume its run, which exports it anew"
        )
    if data.get("checksum") != checksum(data):
        raise ValueError(f"the checksum of {DESCRIPTION} does not agree")
    for key, kind in wanted.items():
        if not isinstance(data.get(key), kind):
            raise ValueError(f"{DESCRIPTION} has no {key!r}")
    return data


def _check_options(value: Any, depth: int) -> None:
    """Refuse networks of absurdly many layers, which even without memory for their weights take for ever to build."""
    if depth > 8 or (isinstance(value, (dict, list, str)) and len(value) > MAX_OPTION_ITEMS):
        raise ValueError("its network has absurdly many options")
    if isinstance(value, (dict, list)):
        for child in value.values() if isinstance(value, dict) else value:
            _check_options(child, depth + 1)


def _damaged(folder: Path, error: BaseException) -> RloptError:
    said = " ".join(str(error).split())[:200] or type(error).__name__
    return CorruptCheckpoint(f"{folder} is damaged, not a policy that rlopt wrote: {said}")
