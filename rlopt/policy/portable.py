"""Policies for programs without rlopt: as ONNX, or as a graph of ``torch.export``."""

from __future__ import annotations

import io
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from rlopt.files import replace_file
from rlopt.policy.exported import Policy
from rlopt.policy.language import LanguagePolicy
from rlopt.types import Carry, Obs, RloptError, Space, is_mask, obs_leaves, seen_leaves, shape_of, tensor_dtype
from rlopt.version import install

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
"""What a policy can be exported to, and how such a file ends."""
ROWS = 3  # of the example; 1 would be taken for a constant


class PolicyGraph(nn.Module):
    """A policy's most likely actions as a function of tensors alone: its observation's leaves, then its carry's.

    Statistics are inside: observations are raw. It returns actions (N, …) in environment units, or int64, then the
    next carry's leaves.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        alone = policy.to("cpu")
        self.actor, self.normalizer = alone.actor, alone.normalizer
        for parameter in self.actor.parameters():  # views of one tensor, which each of them would take along
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(False)
        spec = policy.spec
        self.leaves = seen_leaves(spec) if spec.agents else obs_leaves(spec.observation_space)
        self.carry = alone.initial_carry(ROWS) or {}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        split = len(self.leaves)
        seen = dict(zip(self.leaves, tensors[:split], strict=True))
        obs: Obs = seen.get("", seen)
        carry: Carry = dict(zip(self.carry, tensors[split:], strict=True)) or None
        if self.normalizer is not None:
            obs = self.normalizer.normalize_obs(obs)
        action, after = self.actor.act(obs, carry, deterministic=True)
        return action, *(() if after is None else (after[name] for name in self.carry))

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs: the leaves (``obs`` where there is one), and ``carry/…``."""
        return [key or "obs" for key in self.leaves] + [f"carry/{name}" for name in self.carry]

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs: ``action``, and ``next_carry/…``."""
        return ["action", *(f"next_carry/{name}" for name in self.carry)]

    def example(self) -> tuple[Tensor, ...]:
        """Return inputs of ``ROWS`` rows."""
        return *(_example(key, leaf) for key, leaf in self.leaves.items()), *self.carry.values()


def export_policy(policy: Policy, path: Path | str, to: str) -> PolicyGraph:
    """Write ``policy`` to a file that needs no rlopt, for any number of rows, and return what was traced.

    Its inputs are raw observations, its normalisation is inside, and its actions are the most likely ones; a memory's
    carry is one more input and output (zeros begin an episode). A team's inputs are joint observations without
    ``state`` and ``alive``.

    Args:
        to: ``onnx`` (extra ``export``), or ``torch``, which ``torch.export.load(path).module()`` reads.

    Raises:
        RloptError: an unknown format, a missing extra, a policy that the format cannot express, or a file that cannot
            be written.
    """
    if to not in SUFFIXES:
        raise RloptError(f"to={to}: a policy is exported to {' or '.join(SUFFIXES)}")
    if isinstance(policy, LanguagePolicy):
        raise RloptError("a policy that writes is in Hugging Face's format already: its folder's model/ (and adapter/)")
    graph = PolicyGraph(policy).eval()
    batch = torch.export.Dim("batch", min=1)
    shapes: Any = (tuple({0: batch} for _ in graph.inputs),)  # a named one: what fixes the number of rows is refused
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(graph, graph.example(), dynamic_shapes=shapes, strict=False)
            data = _torch(program) if to == "torch" else _onnx(program, graph)
    except RloptError:
        raise
    except Exception as e:  # tracing and translating raise whatever they meet
        said = " ".join(str(e).split())[:200]
        raise RloptError(f"a {policy.actor.kind} policy cannot be exported to {to}: {said}") from e
    try:
        replace_file(Path(os.path.abspath(path)), data)
    except OSError as e:
        raise RloptError(f"{path} cannot be written: {e}; name another file (out=, --out)") from e
    return graph


def _torch(program: Any) -> bytes:
    data = io.BytesIO()
    torch.export.save(program, data)
    return data.getvalue()


def _onnx(program: Any, graph: PolicyGraph) -> bytes:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise RloptError(f"ONNX needs the package {e.name}; {install('export')}") from e
    registry = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = registry.level
    registry.setLevel(logging.ERROR)  # it warns of a torchvision that no policy needs
    try:
        found = torch.onnx.export(
            program, input_names=graph.inputs, output_names=graph.outputs, dynamo=True, external_data=False,
            verbose=False,
        )  # fmt: skip
    finally:
        registry.setLevel(before)
    assert found is not None
    return bytes(found.model_proto.SerializeToString())


def _example(key: str, leaf: Space) -> Tensor:
    if is_mask(key, leaf):
        return torch.ones(ROWS, *shape_of(leaf), dtype=torch.bool)
    example = torch.zeros(ROWS, *shape_of(leaf), dtype=tensor_dtype(leaf))
    if isinstance(leaf, spaces.Discrete | spaces.MultiDiscrete):
        example += torch.as_tensor(leaf.start)
    return example
