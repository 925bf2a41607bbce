"""What an agent's state lacks, found by walking the object."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlopt.agents import Agent
from rlopt.fast.fused_ppo import FusedEpochs
from rlopt.fast.fused_sac import FusedUpdate
from rlopt.nn import Net, Optimiser
from rlopt.nn.guard import Guard

SCRATCH = {
    *((Optimiser, name) for name in ("grad", "parts", "_whole", "_cuts", "_small")),
    *((Guard, name) for name in ("_poison", "_ok", "_latest")),
}
"""Attributes that every update overwrites before it reads them, and views of them and of what is registered."""


def walk(thing: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Every tensor, generator and optimiser reachable from ``thing``, once, with the path to it."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor | torch.Generator | torch.optim.Optimizer):
        yield path, thing
        return
    if isinstance(thing, Optimiser):
        yield path, thing
    if isinstance(thing, dict):
        children = [(f"{path}[{k!r}]", v) for k, v in thing.items()]
    elif isinstance(thing, list | tuple | set):
        children = [(f"{path}[{i}]", v) for i, v in enumerate(thing)]
    elif isinstance(
        thing, FusedUpdate | FusedEpochs
    ):  # buffers that updates overwrite, and views of the nets' parameters
        return
    elif type(thing).__module__.startswith(("rlopt", "torch.nn", __name__)) and hasattr(thing, "__dict__"):
        scratch = {attribute for cls, attribute in SCRATCH if isinstance(thing, cls)}
        children = [(f"{path}.{k}", v) for k, v in vars(thing).items() if k not in scratch]
    else:
        return
    for child_path, child in children:
        yield from walk(child, child_path, seen)


def storages(agent: Agent) -> set[int]:
    """Where everything registered lies in memory."""
    found = set()
    for child in agent.children.values():
        found |= storages(child)
    for thing in agent._persistent.values():
        if isinstance(thing, Net):
            tensors = [*thing.module.state_dict(keep_vars=True).values()]
        elif isinstance(thing, Optimiser):
            tensors = [thing.count, *thing.state.values()]
        elif isinstance(thing, Guard):
            tensors = [thing.code]
        else:
            tensors = [thing] if isinstance(thing, Tensor) else []
        found |= {t.untyped_storage().data_ptr() for t in tensors}
    return found


def unregistered(agent: Agent, constants: dict[str, Tensor]) -> list[str]:
    """Paths of what the state lacks. ``constants`` are tensors of another agent: equal ones there are no state."""
    known, registered = storages(agent), [thing for each in agent.family() for thing in each._persistent.values()]
    missing = []
    for path, thing in walk(agent, "agent", set()):
        if isinstance(thing, Tensor):
            constant = path in constants and torch.equal(thing, constants[path])
            ok = constant or thing.numel() == 0 or thing.untyped_storage().data_ptr() in known
        else:
            ok = any(thing is r for r in registered)
        if not ok:
            missing.append(path)
    return missing


def tensors_of(agent: Agent) -> dict[str, Tensor]:
    return {path: t for path, t in walk(agent, "agent", set()) if isinstance(t, Tensor)}
