"""Exported graphs act as the policies that they were traced from, for any number of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

import rlopt.nn.q_actor  # noqa: F401 - registers its actor
from rlopt.cli.arguments import export_parser
from rlopt.envs.normalize import Normalizer
from rlopt.nn.actors import make_actor
from rlopt.nn.networks import NetworkConfig, network_options
from rlopt.policy import Policy
from rlopt.policy.portable import SUFFIXES, PolicyGraph, export_policy
from rlopt.policy.team import TeamActor
from rlopt.types import EnvSpec, RloptError

NUMBERS, BOX = spaces.Box(-np.inf, np.inf, (3,)), spaces.Box(-2.0, 3.0, (2,))
IMAGE = spaces.Box(0, 255, (10, 10, 3), np.uint8)
PARTS = spaces.Dict(
    {"a": NUMBERS, "image": IMAGE, "index": spaces.Discrete(4, start=1), "action_mask": spaces.MultiBinary(5)}
)
PLACE = spaces.Discrete(6)
TEAM = EnvSpec(
    "team",
    spaces.Dict({"obs": spaces.Box(-1, 1, (2, 3)), "state": spaces.Box(-1, 1, (4,))}),
    spaces.Box(-1, 1, (2, 2)),
    agents=("a", "b"),
)
NET = network_options(NetworkConfig(hidden=(8, 8)))
Q = {**NET, "values": "quantile", "size": 4, "dueling": True, "sigma": 0.5}
CASES: dict[str, tuple[str, spaces.Space[Any], spaces.Space[Any], dict[str, Any]]] = {
    "squashed_gaussian": ("squashed_gaussian", NUMBERS, BOX, NET),
    "gaussian": ("gaussian", NUMBERS, BOX, NET),
    "deterministic": ("deterministic", NUMBERS, BOX, NET),
    "categorical": ("categorical", NUMBERS, spaces.Discrete(5, start=2), NET),
    "multi_categorical": ("multi_categorical", NUMBERS, spaces.MultiDiscrete([3, 2]), NET),
    "greedy": ("greedy", NUMBERS, spaces.Discrete(5), NET),
    "quantile_noisy_dueling": ("greedy", NUMBERS, spaces.Discrete(5), Q),
    "tabular": ("tabular", PLACE, spaces.Discrete(3), {}),
    "index": ("categorical", PLACE, spaces.Discrete(3), NET),
    "image": ("squashed_gaussian", IMAGE, BOX, NET),
    "dict": ("categorical", PARTS, spaces.Discrete(5), NET),
    "memory": ("categorical", NUMBERS, spaces.Discrete(5), {**NET, "memory": "gru", "memory_size": 6}),
    "memory_greedy": ("greedy", NUMBERS, spaces.Discrete(5), {**NET, "memory": "gru", "memory_size": 6}),
}


def policy_of(name: str, normalised: bool = False) -> Policy:
    if name.startswith("team"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            from rlopt.joint import shared_agent

            own = [shared_agent(TEAM)] if name == "team_shared" else [TEAM.of_agent(i) for i in range(2)]
            actors = [make_actor("squashed_gaussian", one.observation_space, one.action_space, NET) for one in own]
        return Policy(TEAM, TeamActor(TEAM, actors, shared=name == "team_shared"))
    kind, seen, done, options = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        actor = make_actor(kind, seen, done, options)
        for parameter in actor.parameters():
            if name == "tabular":
                parameter.data = torch.rand_like(parameter)
    spec = EnvSpec("test", seen, done)
    normalizer = Normalizer(spec) if normalised else None
    if normalizer is not None:
        normalizer.moments[""].update(5.0 + 3.0 * torch.randn(50, 3), torch.ones(50, dtype=torch.bool))
    return Policy(spec, actor, normalizer)


def inputs_of(graph: PolicyGraph, rows: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(rows)
    found = []
    for x in graph.example():
        shape = (rows, *x.shape[1:])
        if x.dtype == torch.bool:
            mask = torch.rand(shape, generator=g) < 0.5
            mask[..., 0] = True
            found.append(mask)
        elif x.dtype == torch.float32:
            found.append(torch.randn(shape, generator=g))
        else:
            found.append(torch.randint(1, 5, shape, generator=g).to(x.dtype))
    return tuple(found)


def expected(policy: Policy, graph: PolicyGraph, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    seen = dict(zip(graph.leaves, tensors, strict=False))
    carry = dict(zip(graph.carry, tensors[len(seen) :], strict=True)) or None
    act = policy.act(seen.get("", seen), carry)
    return [act.action, *(act.carry or {}).values()]


EVERY = [*((name, False) for name in (*CASES, "team", "team_shared")), ("squashed_gaussian", True)]


@pytest.mark.parametrize(("name", "normalised"), EVERY)
def test_torch_export_acts_as_the_policy_does(name: str, normalised: bool, tmp_path: Path) -> None:
    policy = policy_of(name, normalised)
    graph = export_policy(policy, tmp_path / "policy.pt2", "torch")
    module = torch.export.load(tmp_path / "policy.pt2").module()
    for rows in (1, 2, 7):
        tensors = inputs_of(graph, rows)
        for found, wanted in zip(module(*tensors), expected(policy, graph, tensors), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "normalised"), EVERY)
def test_onnxruntime_acts_as_the_policy_does(name: str, normalised: bool, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    policy = policy_of(name, normalised)
    graph = export_policy(policy, tmp_path / "policy.onnx", "onnx")
    session = runtime.InferenceSession(str(tmp_path / "policy.onnx"), providers=["CPUExecutionProvider"])
    assert [x.name for x in session.get_inputs()] == graph.inputs
    assert [x.name for x in session.get_outputs()] == graph.outputs
    for rows in (1, 2, 7):
        tensors = inputs_of(graph, rows)
        given = {name: x.numpy() for name, x in zip(graph.inputs, tensors, strict=True)}
        for found, wanted in zip(session.run(None, given), expected(policy, graph, tensors), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RloptError, match="onnx or torch"):
        export_policy(policy_of("gaussian"), tmp_path / "policy", "tflite")
    with pytest.raises(RloptError, match="cannot be written"):
        export_policy(policy_of("gaussian"), tmp_path / "no" / "policy.pt2", "torch")
    assert set(next(a.choices for a in export_parser()._actions if a.dest == "to") or ()) == set(SUFFIXES)
