"""Offline data: arrays of single transitions, or the episodes of a Minari data set, as a replay buffer takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rlopt.buffers.layout import Layout, as_tensor
from rlopt.types import RloptError

if TYPE_CHECKING:
    from rlopt.buffers.replay import ReplayBuffer

Arrays = dict[str, Any]


def store(buffer: ReplayBuffer, dataset: Any) -> None:
    """Store a data set in a replay buffer: see ``ReplayBuffer.extend``."""
    if buffer.num_envs != 1:
        raise RloptError(f"extend needs num_envs=1, not {buffer.num_envs}: a data set is one row of transitions")
    given = dataset if isinstance(dataset, Mapping) else from_episodes(dataset)
    values = fields(buffer.layout, given)
    storage, ring, count = buffer.storage, buffer.capacity_rows, len(values["reward"])
    if count > ring:
        raise RloptError(f"{count:,} transitions do not fit a capacity of {ring:,}; raise it")
    values["ended"][-1] = True  # whatever comes next is no part of it
    if buffer.rows_written:
        buffer.block[(buffer.rows_written - 1) % ring, :, buffer.slices["ended"]] = 1.0
    done, most = 0, 1 if storage.frames else count
    while done < count:
        rows = min(most, count - done, ring - buffer.rows_written % ring)
        part = {name: value[done : done + rows] for name, value in values.items()}
        if storage.frames:
            storage.check(part, None)
        first = buffer.claim(rows)
        if storage.frames:
            storage.write(buffer.rows_written - 1, part, None)
        else:
            storage.write_many(first, part)
        buffer.tell(first, rows, part, None)
        done += rows


def from_episodes(dataset: Any) -> Arrays:
    """Return the transitions of a Minari data set, or of anything whose ``iterate_episodes()`` gives objects with its
    ``observations`` (one more than steps, nested in dicts or tuples or not), ``actions``, ``rewards``, ``terminations``
    and ``truncations``.

    An episode whose last step has neither flag was cut by its recording: it counts as truncated.
    """
    parts: list[Arrays] = []
    for episode in dataset.iterate_episodes():
        observations = _leaves(episode.observations)
        truncated = np.array(episode.truncations, dtype=bool)
        truncated[-1] |= not bool(episode.terminations[-1])
        parts.append(
            {
                "obs": {key: leaf[:-1] for key, leaf in observations.items()},
                "action": np.asarray(episode.actions),
                "reward": np.asarray(episode.rewards),
                "next_obs": {key: leaf[1:] for key, leaf in observations.items()},
                "terminated": np.asarray(episode.terminations, dtype=bool),
                "truncated": truncated,
            }
        )
    if not parts:
        raise RloptError("this data set has no episodes")
    plain = [name for name in parts[0] if name not in ("obs", "next_obs")]
    found: Arrays = {name: np.concatenate([part[name] for part in parts]) for name in plain}
    for name in ("obs", "next_obs"):
        tree = {key: np.concatenate([part[name][key] for part in parts]) for key in parts[0][name]}
        found[name] = tree[""] if tree.keys() == {""} else tree
    return found


def fields(layout: Layout, dataset: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what M transitions store, by field of ``layout``: (M, …) each.

    Raises:
        RloptError: an array is missing, unknown, or of another shape or kind.
    """
    given = {name: value for name, value in dataset.items() if value is not None}
    names = ("obs", "action", "reward", "next_obs", "terminated", "truncated", "ended")
    missing = [name for name in names[:-1] if name not in given]
    unknown = [name for name in given if name not in names and name not in layout.extras]
    missing += [name for name in layout.extras if name not in given]
    if missing or unknown:
        what = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(unknown)} too"] * bool(unknown)
        raise RloptError(f"a data set has {', '.join([*names[:-1], *layout.extras])}; this one {' and '.join(what)}")
    values = {name: given[name] for name in ("action", "reward", "terminated", "truncated")}
    for prefix in ("obs", "next_obs"):
        tree = given[prefix] if isinstance(given[prefix], Mapping) else {"": given[prefix]}
        values |= {layout.names[prefix].get(key, f"{prefix}/{key}"): leaf for key, leaf in tree.items()
                   if key not in layout.derived}  # fmt: skip
    values |= {layout.extras[name]: given[name] for name in layout.extras}
    values["ended"] = given.get("ended", given["terminated"])
    expected = {name: spec for name, spec in layout.fields.items() if name != "valid"}
    expected["truncated"] = ((), torch.bool)
    if values.keys() != expected.keys():
        raise RloptError(f"the data set's observations differ in {', '.join(sorted(values.keys() ^ expected.keys()))}")
    count = len(values["reward"])
    found = {name: _column(name, values[name], (count, *shape), dtype) for name, (shape, dtype) in expected.items()}
    found["ended"] = found["ended"].bool() | found.pop("truncated").bool()
    return found


def _column(name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    tensor = as_tensor(name, value)
    if tuple(tensor.shape) != shape and not (tensor.shape[:1] == shape[:1] and tensor.numel() == np.prod(shape)):
        raise RloptError(f"{name} has shape {tuple(tensor.shape)}; this buffer takes {shape}")
    if dtype in (torch.uint8, torch.int64) and tensor.is_floating_point():
        raise RloptError(f"{name} is {tensor.dtype}; this buffer keeps {dtype}, and would change its values")
    return tensor.reshape(shape)


def _leaves(tree: Any, path: str = "") -> Arrays:
    """Return the leaves of nested dicts and tuples, their names joined with ``/``."""
    if isinstance(tree, Mapping | tuple):
        children = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        parts = [_leaves(child, f"{path}/{key}" if path else str(key)) for key, child in children]
        return {key: leaf for part in parts for key, leaf in part.items()}
    return {path: np.asarray(tree)}
