"""Agents in folders of their own: all that learning needs to go on, without a run around it.

A folder holds ``agent.json`` (which registered agent it is, its options, spaces and what is frozen, with the checksums
of the rest and its own) and a state tree of ``rlopt.state``. Loading one runs none of its code.
"""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from rlopt.config import build, to_dict
from rlopt.files import digest_file, fresh_folder, remove, replace_folder, write_file
from rlopt.nn import Net
from rlopt.policy.specification import spec_from_json, spec_to_json
from rlopt.registry import get_agent, load_extensions
from rlopt.state import CorruptCheckpoint, checksum, load_state, read_json, save_state, tag_floats, untag_floats
from rlopt.types import RloptError
from rlopt.version import __version__

if TYPE_CHECKING:
    from rlopt.agents.base import Agent

A = TypeVar("A", bound="Agent")
FORMAT = 1
DESCRIPTION = "agent.json"


def save_agent(agent: Agent, path: Path | str) -> None:
    """Write ``agent`` as the folder ``path``; a crash at any moment leaves the old one or the new one, whole.

    Raises:
        OSError: if the disk fails or is full; what was there before is untouched.
        RloptError: if ``path`` holds something else, which would be lost, or if the agent solves a model, which no
            folder holds.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not (path / DESCRIPTION).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise RloptError(f"{path} is there and is no agent; name another folder for this one")
    staged = path.with_name(f".{path.name}.new")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_agent(agent, fresh_folder(staged))
        replace_folder(staged, path)
    finally:
        with suppress(OSError):
            remove(staged)


def write_agent(agent: Agent, folder: Path) -> None:
    """Write ``agent`` into an empty folder. Raises as ``save_agent`` does."""
    if agent.loop == "solver":
        raise RloptError(f"agent={agent.name} solves a model, which is not saved with it; save its policy")
    description = {
        "format": FORMAT,
        "rlopt": __version__,
        "agent": agent.config.name or agent.name,
        "config": tag_floats(to_dict(agent.config)),
        "spec": spec_to_json(agent.spec),
        "seed": agent.seed,
        "runs": agent.runs,
        "precision": agent.precision,
        "frozen": {name: list(net.frozen) for name, net in nets_of(agent).items()},
    }
    digests = save_state(folder, agent.state_dict())
    description["files"] = {name: digest._asdict() for name, digest in digests.items()}
    description["checksum"] = checksum(description)
    write_file(folder / DESCRIPTION, [json.dumps(description, indent=1, allow_nan=False).encode()])


def load_agent(path: Path | str, cls: type[A], device: str | torch.device = "cpu") -> A:
    """Return the agent in the folder ``path``, an instance of ``cls``.

    Raises:
        RloptError: there is none, it is damaged or another kind of agent, or it is not registered.
    """
    folder = Path(path)
    if not (folder / DESCRIPTION).is_file():
        raise RloptError(f"{path} holds no agent (no {DESCRIPTION}); give a folder that agent.save wrote")
    try:
        return _load(folder, cls, device)
    except CorruptCheckpoint as e:
        raise RloptError(f"{folder} is damaged: {e}") from e
    except RloptError as e:
        raise RloptError(f"{folder}: {e}") from e
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, ArithmeticError, OSError) as e:
        raise RloptError(f"{folder} is damaged: {type(e).__name__}: {' '.join(str(e).split())[:200]}") from e


def _load(folder: Path, cls: type[A], device: str | torch.device) -> A:
    data = read_json(folder / DESCRIPTION)
    if data["format"] != FORMAT:
        raise RloptError(f"format {data['format']!r} is not read by this version of rlopt ({__version__})")
    if data["checksum"] != checksum(data):
        raise CorruptCheckpoint(f"{DESCRIPTION} is not what was saved")
    for name, recorded in data["files"].items():
        if name not in ("state.json", "tensors.safetensors") or digest_file(folder / name)._asdict() != recorded:
            raise CorruptCheckpoint(f"{str(name)[:40]} is not the file that was saved")
    load_extensions()
    kind = cls if cls.__dict__.get("name") == data["agent"] else get_agent(data["agent"])
    if not issubclass(kind, cls):
        raise RloptError(f"it is a {data['agent']}, no {cls.__name__}; use Agent.load")
    state = load_state(folder)
    config = build(kind.config_class, untag_floats(data["config"]), "agent")
    _refuse_sizes(config, sum(x.numel() for x in _tensors(state)))
    agent: A = kind(
        spec_from_json(data["spec"]), config, seed=data["seed"], device=device, runs=data["runs"],
        precision=data["precision"],
    )  # fmt: skip
    agent.load_state_dict(state)
    for name, net in nets_of(agent).items():
        freeze(net, data["frozen"][name])
    return agent


def nets_of(agent: Agent) -> dict[str, Net]:
    """Return every network of an agent and of its children, by name (``child/name``)."""
    own = {name: thing for name, thing in agent.parts.items() if isinstance(thing, Net)}
    return own | {f"{of}/{name}": net for of, child in agent.children.items() for name, net in nets_of(child).items()}


def freeze(net: Net, names: list[str] | None = None) -> None:
    """Let no update move the leaves ``names`` of a network; all of them by default."""
    for name, leaf in zip(list(net.params), net.leaves, strict=False):
        if names is None or name in names:
            leaf.requires_grad_(False)


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, dict | list):
        return [x for child in (tree.values() if isinstance(tree, dict) else tree) for x in _tensors(child)]
    return [tree] if isinstance(tree, Tensor) else []


def _refuse_sizes(config: Any, numbers: int) -> None:
    """Refuse hidden layers that cannot be in a file with so many numbers, before they are allocated."""
    hidden = getattr(getattr(config, "network", None), "hidden", None) or ()
    if sum(math.prod(pair) for pair in pairwise(hidden)) + sum(hidden) > numbers:
        raise ValueError(f"hidden layers of {list(hidden)[:8]} are more than the {numbers} numbers that are there")
