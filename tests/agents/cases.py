"""One row for every agent: all that the tests which walk over agents need to know of it.

A new agent costs one row of ``AGENTS``; ``test_every_registered_agent_has_a_row`` fails without it. What walks:
complete state, exact resume, export and evaluation, a device that is not the CPU, the guard, runs side by side, probe
problems.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.agents import Agent
from rlopt.buffers import Batch
from rlopt.nn import NetworkConfig, OptimiserConfig
from rlopt.registry import get_agent
from rlopt.training import TrainConfig, train_config
from rlopt.types import EnvSpec

OBSERVATION = spaces.Box(-np.inf, np.inf, (4,))
TORQUE = spaces.Box(-0.4, 0.4, (2,))
CHOICE = spaces.Discrete(3, start=2)

PENDULUM = {"id": "Pendulum-v1", "backend": "torch", "kwargs": {"max_episode_steps": 40}}
CARTPOLE = {"id": "CartPole-v1", "backend": "torch"}
GARNET = {"id": "Garnet-v0", "kwargs": {"states": 4, "actions": 2, "branching": 2, "seed": 0}}
SMALL = {"network": {"hidden": [16, 16]}, "batch_size": 8, "warmup_steps": 20}
SEARCH = {"adversary_every": 40, "search": {"candidates": 3, "episodes": 1, "rounds": 1}}


class Probe(NamedTuple):
    """How the problems of ``test_probes.py`` are learnt."""

    options: dict[str, Any]
    """A small entropy bonus, above all."""
    patience: float = 1.0
    """Updates of the longest problem, as a multiple of the others' agents."""


class Case(NamedTuple):
    """What tests know of an agent."""

    env: dict[str, Any]
    """The environment of a short run (``env.…``)."""
    options: dict[str, Any]
    """What makes that run small (``agent.…``)."""
    steps: int = 150
    """How long it is, in the loop's unit; more than a checkpoint and an episode."""
    actions: spaces.Space[Any] | None = None
    """For agents that learn from minibatches of transitions: the space in which ``make_agent`` lets them act."""
    always: dict[str, Any] = {}
    """Options that ``make_agent`` gives it unless it is given others."""
    variants: tuple[dict[str, Any], ...] = ({},)
    """Options under which state and runs side by side are looked at: every branch of its update."""
    probe: Probe | None = None
    """For agents with values ``critic`` of actions: how they learn the probe problems."""


SGD = OptimiserConfig(name="sgd")
ADAMW = OptimiserConfig(name="adamw", weight_decay=0.1)
AGENTS: dict[str, Case] = {
    "sac": Case(
        PENDULUM, {**SMALL, "fused": False}, actions=TORQUE, probe=Probe({"temperature": 0.05}),
        variants=(
            {},
            {"fused": False, "policy_delay": 2, "max_grad_norm": 0.3},
            {"fused": False, "policy_delay": 2, "temperature": 0.2},
            {"policy_delay": 3, "lr_schedule": "cosine", "schedule_steps": 20, "max_grad_norm": 0.5},
        ),
    ),
    "sac_2018": Case(
        PENDULUM, SMALL, actions=TORQUE, probe=Probe({"reward_scale": 5.0}, patience=1.75),
        variants=({}, {"max_grad_norm": 0.3}, {"optimiser": SGD, "lr_schedule": "linear", "schedule_steps": 20}),
    ),
    "sac_discrete": Case(
        CARTPOLE, SMALL, actions=CHOICE, probe=Probe({"temperature": 0.05}),
        variants=({}, {"average_critics": True, "critic_entropy": False}, {"temperature": 0.2, "optimiser": ADAMW}),
    ),
    "td3": Case(
        PENDULUM, SMALL, actions=TORQUE,
        # With a faster actor its tanh saturates, and no gradient leads back.
        probe=Probe({"policy_delay": 1, "target_noise": 0.0, "actor_learning_rate": 5e-3}),
        always={"policy_delay": 1},  # what walks looks at the actor after one update
        variants=({}, {"max_grad_norm": 0.3}, {"optimiser": ADAMW, "target_noise": 0.5}),
    ),
    "drpg_deep": Case(
        PENDULUM, {**SMALL, **SEARCH, "fused": False, "box": {"m": [0.5, 1.5]}}, actions=TORQUE,
        always={"box": {"m": (0.5, 1.5)}, "fused": False},
    ),
    "drpg_deep_discrete": Case(
        CARTPOLE, {**SMALL, **SEARCH, "box": {"length": [0.4, 0.6]}}, actions=CHOICE,
        always={"box": {"length": (0.4, 0.6)}},
    ),
    "ppo": Case(
        PENDULUM,
        {
            "network": {"hidden": [16]}, "rollout_steps": 40, "batch_size": 8, "epochs": 2, "lr_schedule": "linear",
            "schedule_steps": 150,
        },
    ),
    "reinforce": Case(CARTPOLE, {"network": {"hidden": [16]}, "groups": 2, "group_size": 2}, steps=300),
    "value_iteration": Case({"id": "FrozenLake-v1"}, {}),
    "drpg": Case(GARNET, {"tolerance": None}, steps=30),
    "robust_value_iteration": Case(GARNET, {"tolerance": None}, steps=30),
    "robust_modified_policy_iteration": Case(GARNET, {"tolerance": None, "sweeps": 2}, steps=30),
    "partial_policy_iteration": Case(GARNET, {"tolerance": None}, steps=30),
    "robust_mirror_descent": Case(GARNET, {"tolerance": None}, steps=30),
}  # fmt: skip

LEARNERS = [name for name, case in AGENTS.items() if case.actions is not None]
"""Agents that learn from minibatches of transitions."""
every_agent = pytest.mark.parametrize("name", list(AGENTS))
every_learner = pytest.mark.parametrize("name", LEARNERS)
every_variant = pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in LEARNERS for options in AGENTS[name].variants]
)


def short_run(name: str, run_dir: Path | str | None = None, **options: Any) -> TrainConfig:
    """Return the configuration of an agent's short run. ``options`` replace top-level ones; ``agent`` and ``env`` are
    added to the row's."""
    case = AGENTS[name]
    tree = {
        "seed": 3,
        "total_steps": case.steps,
        "device": "cpu",
        "threads": 1,
        "run_dir": None if run_dir is None else str(run_dir),
        "eval": {"every": case.steps // 3, "episodes": 2},
        "log": {"every": case.steps // 6, "tensorboard": False},
        "checkpoint": {"minutes": None, "every_steps": case.steps * 13 // 30},
        **options,
        "agent": {"name": name, **case.options, **options.get("agent", {})},
        "env": {**case.env, **options.get("env", {})},
    }
    return train_config(tree)


def make_agent(
    name: str,
    seed: int = 0,
    observation_space: spaces.Space[Any] = OBSERVATION,
    action_space: spaces.Space[Any] | None = None,
    runs: int = 1,
    precision: str = "float32",
    **options: Any,
) -> Agent:
    """Return a small agent (networks of 2 x 16) that has acted in no environment."""
    cls, case = get_agent(name), AGENTS[name]
    options = {"network": NetworkConfig(hidden=(16, 16)), "batch_size": 8, "warmup_steps": 0, **case.always, **options}
    spec = EnvSpec("test", observation_space, case.actions if action_space is None else action_space)
    return cls(spec, cls.config_class(**options), seed=seed, runs=runs, precision=precision)


def make_batch(agent: Agent, seed: int, size: int = 8) -> Batch:
    """Return a random minibatch in the agent's spaces."""
    g = torch.Generator().manual_seed(seed)
    space = agent.spec.action_space
    if isinstance(space, spaces.Discrete):
        action = torch.randint(int(space.n), (size,), generator=g) + int(space.start)
    else:
        assert isinstance(space, spaces.Box)
        action = torch.as_tensor(space.high) * (2 * torch.rand((size, *space.shape), generator=g) - 1)
    return Batch(
        obs=torch.randn((size, 4), generator=g),
        action=action,
        reward=torch.randn(size, generator=g),
        next_obs=torch.randn((size, 4), generator=g),
        terminated=(torch.rand(size, generator=g) < 0.2).float(),
        discount=torch.full((size,), 0.99),
        weight=None,
        index=torch.arange(size),
    )
