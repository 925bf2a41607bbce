"""Runs on a device that is not the CPU, and what they become, for ``far_device_cases.py``."""

from __future__ import annotations

import math
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import _disable_current_modes

from rlopt.training.setup import make_loop, resolve_config
from tests.agents.cases import LEARNERS, short_run
from tests.training.far_device import FarTensor

SAC = {"name": "sac"}


def config(device: str, run_dir=None, agent=SAC, **options):
    """The short run of an agent, shorter still."""
    options = {
        "seed": 4, "total_steps": 30, "device": device, "eval": {"every": None, "episodes": 1},
        "log": {"every": 10, "tensorboard": False}, **options,
    }  # fmt: skip
    if agent["name"] in LEARNERS:
        options = {"num_envs": 2, "buffer": {"name": "uniform", "capacity": 100}, **options}
    return resolve_config(short_run(agent["name"], run_dir, agent=agent, **options))


def numbers(tree):
    """Every number of a state by its path, tensors near and others as they are."""
    if isinstance(tree, dict):
        return {f"{k}/{path}": x for k, child in tree.items() for path, x in numbers(child).items()}
    if isinstance(tree, list | tuple):
        return numbers(dict(enumerate(tree)))
    return {"": tree.near if isinstance(tree, FarTensor) else tree}


def result(loop):
    """What a loop has become: its state, and the rows of its buffer."""
    buffer = getattr(loop, "buffer", None)
    rows = None
    if buffer is not None:
        rows = buffer.read_rows(max(0, buffer.rows_written - buffer.capacity_rows), buffer.rows_written)
    return numbers({"state": loop.state_dict(), "rows": rows})


def finished(loop):
    """``result`` at the end, with every step's episodes and metrics on the way."""
    told = []
    while loop.step < loop.total_steps:
        progress = loop.advance()
        told.append([progress.updates, progress.episodes, progress.metrics])
        told[-1] = {path: x.clone() if isinstance(x, torch.Tensor) else x for path, x in numbers(told[-1]).items()}
    found = {**result(loop), **numbers(told)}
    loop.close()
    return found


def on_the_cpu(**options):
    """What a run becomes that is not far away, by the same lines; watched, it would cost twice its time."""
    with _disable_current_modes(), patch("rlopt.nn.optim._kernels", lambda ok: False):
        return finished(make_loop(config("cpu", **options)))


def assert_equal(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name, x in first.items():
        if tolerance and isinstance(x, torch.Tensor) and x.is_floating_point():
            torch.testing.assert_close(x, second[name], msg=name, **tolerance)
        elif isinstance(x, torch.Tensor):
            assert torch.equal(x, second[name]), name
        else:
            assert x == second[name] or math.isnan(x), name
