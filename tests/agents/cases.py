"""One row for every agent: all that the tests which walk over agents need to know of it.

A new agent costs one row of ``AGENTS``; ``test_every_registered_agent_has_a_row`` fails without it. What walks:
complete state, exact resume, export and evaluation, a device that is not the CPU, the guard, runs side by side, probe
problems.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.agents import Agent, ValueBased
from rlopt.buffers import Batch, Rollout
from rlopt.buffers.samplers.sequence import CARRY
from rlopt.config import build
from rlopt.nn import NetworkConfig, OptimiserConfig
from rlopt.random import generator_state, set_generator_state
from rlopt.registry import get_agent
from rlopt.training import TrainConfig, train_config
from rlopt.types import EnvSpec, Obs, map_obs

OBSERVATION = spaces.Box(-np.inf, np.inf, (4,))
TORQUE = spaces.Box(-0.4, 0.4, (2,))
CHOICE = spaces.Discrete(3, start=2)

PENDULUM = {"id": "Pendulum-v1", "backend": "torch", "kwargs": {"max_episode_steps": 40}}
CARTPOLE = {"id": "CartPole-v1", "backend": "torch"}
TEAM = {"id": "rlopt.envs.counting:rlopt/CountTeam-v0", "kwargs": {"length": 4, "end": "truncate"}}
GARNET = {"id": "Garnet-v0", "kwargs": {"states": 4, "actions": 2, "branching": 2, "seed": 0}}
SMALL = {"network": {"hidden": [16, 16]}, "batch_size": 8, "warmup_steps": 20}
ON_POLICY = {"network": {"hidden": [16]}, "rollout_steps": 20, "batch_size": 8, "epochs": 2}
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
    """For agents that learn by gradients: the space in which ``make_agent`` lets them act."""
    nets: tuple[str, ...] = ("actor", "critic")
    """For agents that learn by gradients: their networks that do, by attribute; targets are none."""
    always: dict[str, Any] = {}
    """Options that ``make_agent`` gives it unless it is given others."""
    variants: tuple[dict[str, Any], ...] = ({},)
    """Options under which state and runs side by side are looked at: every branch of its update."""
    team: bool = False
    """Whether it trains nothing but teams (whose minibatches ``make_batch`` does not make)."""
    words: bool = False
    """Whether it acts on words (extra ``llm``); ``test_gigpo_llm.py`` looks at what is walked over elsewhere."""
    probe: Probe | None = None
    """For agents with values ``critic`` of actions: how they learn the probe problems."""
    waits: int | None = 0
    """Times that an update may wait for the device; None where part of it is the host's work."""
    data: Callable[[Any, int, int], Any] | None = None
    """``(agent, seed, size)`` → input of its update, for an agent whose loop is not in ``DATA``."""


GRU = NetworkConfig(hidden=(8,), memory="gru")
SGD = OptimiserConfig(name="sgd")
CENTRED = OptimiserConfig(name="rmsprop", beta2=0.95, epsilon=1e-5)
Q = {**SMALL, "epsilon_steps": 60, "target_every": 40}
FOLLOWS = {"target_counts": "updates", "target_every": 1}  # what walks looks at the target after one update
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
        PENDULUM, SMALL, actions=TORQUE, nets=("actor", "critic", "value"),
        probe=Probe({"reward_scale": 5.0}, patience=1.75),
        variants=({}, {"max_grad_norm": 0.3}, {"optimiser": SGD, "lr_schedule": "linear", "schedule_steps": 20}),
    ),
    "sac_discrete": Case(
        CARTPOLE, SMALL, actions=CHOICE, probe=Probe({"temperature": 0.05}),
        variants=(
            {}, {"average_critics": True, "critic_entropy": False}, {"temperature": 0.2, "optimiser": ADAMW},
            {"network": GRU, "target_every": 3, "tau": 1.0},
        ),
    ),
    "td3": Case(
        PENDULUM, SMALL, actions=TORQUE,
        # With a faster actor its tanh saturates, and no gradient leads back.
        probe=Probe({"policy_delay": 1, "target_noise": 0.0, "actor_learning_rate": 5e-3}),
        always={"policy_delay": 1},  # what walks looks at the actor after one update
        variants=({}, {"max_grad_norm": 0.3}, {"optimiser": ADAMW, "target_noise": 0.5}),
    ),
    "hasac": Case(
        {**TEAM, "kwargs": {"actions": "box", "length": 4}}, SMALL, actions=TORQUE,
        always={"critic_temperature": "agents"},
        variants=(
            {}, {"critic_temperature": "own", "value_normalisation": True},
            {"temperature": 0.2, "max_grad_norm": 0.3, "optimiser": ADAMW},
        ),
    ),
    "masac": Case(
        {**TEAM, "kwargs": {"actions": "heads", "length": 4}}, SMALL, actions=CHOICE,
        always={"critic_temperature": "agents"},
        variants=({}, {"expectation": "exact"}),
    ),
    "iql": Case(
        {**TEAM, "kwargs": {"actions": "discrete", "length": 4}}, Q, actions=CHOICE, nets=("critic",),
        always={**FOLLOWS, "mixer": "none"},
        variants=({}, {"double": False, "dueling": True, "td_loss": "huber"}, {"network": GRU}),
    ),
    "vdn": Case({**TEAM, "kwargs": {"length": 4}}, {**Q, "target_every": 2}, team=True),
    "qmix": Case({**TEAM, "kwargs": {"length": 4}}, {**Q, "mixing_units": 4, "target_every": 2}, team=True),
    "mansa": Case({**TEAM, "kwargs": {"length": 4}}, {**Q, "budget": 3, "target_every": 2}, team=True),
    "isac": Case({**TEAM, "kwargs": {"length": 4}}, SMALL, team=True),
    "hatd3": Case(
        {**TEAM, "kwargs": {"actions": "box", "length": 4}}, SMALL, actions=TORQUE, always={"policy_delay": 1},
        variants=({"max_grad_norm": 0.3},),
    ),
    "matd3": Case(
        {**TEAM, "kwargs": {"actions": "box", "length": 4}}, SMALL, actions=TORQUE, always={"policy_delay": 1},
        variants=({"optimiser": ADAMW},),
    ),
    "dqn": Case(
        CARTPOLE, Q, actions=CHOICE, nets=("critic",), always=FOLLOWS,
        probe=Probe({"target_counts": "updates", "target_every": 1}),
        variants=(
            {},
            {"double": True, "td_loss": "squared", "max_grad_norm": 0.3, "target_every": 3, "tau": 1.0},
            {"dueling": True, "noisy": 0.5, "td_loss": "pal", "optimiser": CENTRED},
            {"target_counts": "env_steps", "target_every": 5, "lr_schedule": "linear", "schedule_steps": 20},
            {"network": GRU, "double": True},
        ),
    ),
    "c51": Case(
        CARTPOLE, Q, actions=CHOICE, nets=("critic",), always={**FOLLOWS, "values": "categorical"},
        variants=({}, {"double": True, "noisy": 0.5}, {"network": GRU, "dueling": True}),
        probe=Probe({
            "target_counts": "updates", "target_every": 1, "values": "categorical", "v_min": -3.0, "v_max": 3.0,
            "atoms": 21,
        }),
    ),
    "ddqn_lap": Case(
        CARTPOLE, Q, actions=CHOICE, nets=("critic",), always={**FOLLOWS, "double": True, "optimiser": CENTRED},
        # A gradient is at most a hundredth here, and RMSprop forgets quickly how large gradients were.
        probe=Probe({
            "target_counts": "updates", "target_every": 1, "double": True, "td_loss": "huber", "td_threshold": 0.01,
            "optimiser": CENTRED,
        }, patience=2.5),
    ),
    "qr_dqn": Case(
        CARTPOLE, Q, actions=CHOICE, nets=("critic",), always={**FOLLOWS, "values": "quantile"},
        variants=({}, {"double": True, "dueling": True}, {"network": GRU}),
        probe=Probe({"target_counts": "updates", "target_every": 1, "values": "quantile", "atoms": 8}),
    ),
    "rainbow": Case(
        CARTPOLE, {**Q, "n_step": 2}, actions=CHOICE, nets=("critic",),
        always={**FOLLOWS, "values": "categorical", "double": True, "dueling": True, "noisy": 0.5},
        variants=({}, {"max_grad_norm": 10.0}),
        probe=Probe({
            "target_counts": "updates", "target_every": 1, "values": "categorical", "v_min": -3.0, "v_max": 3.0,
            "atoms": 21, "double": True, "dueling": True, "noisy": 0.1,
        }, patience=2.0),
    ),
    "ippo": Case(TEAM, ON_POLICY, team=True),
    "mappo": Case({**TEAM, "kwargs": {"actions": "box", "length": 4, "end": "truncate"}}, ON_POLICY, team=True),
    "happo": Case({**TEAM, "kwargs": {"actions": "heads", "length": 4, "end": "truncate"}}, ON_POLICY, team=True),
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
        actions=TORQUE,
        nets=("networks",),
        always={"rollout_steps": 4, "batch_size": 4, "epochs": 2},
        waits=1,  # once a rollout, for how many of its rows are transitions
        variants=(
            {},
            {"recompute_advantage": True, "value_clip": True, "entropy_coefficient": 0.1, "target_kl": 1e-3},
            {"lr_schedule": "linear", "clip_schedule": "linear", "schedule_steps": 20, "bootstrap": False},
            {"network": GRU},
        ),
    ),
    "reinforce": Case(
        CARTPOLE, {"network": {"hidden": [16]}, "groups": 2, "group_size": 2}, steps=300, actions=CHOICE,
        nets=("actor",),
        always={"groups": 2, "group_size": 2},
        variants=({}, {"credit": "episode", "entropy_coefficient": 0.1, "max_grad_norm": 0.3}, {"network": GRU}),
    ),
    "gigpo": Case(
        {"id": "FrozenLake-v1", "kwargs": {"is_slippery": False}},
        {"network": {"hidden": []}, "groups": 2, "group_size": 4, "batch_size": 32},
        steps=300, actions=CHOICE,
        nets=("actor",),
        always={"groups": 2, "group_size": 2},
        waits=None,  # whose observations are equal is found in a dictionary
        variants=(
            {},
            {"estimator": "ppo", "epochs": 2, "batch_size": 4},
            {"kl_coefficient": 0.1, "entropy_coefficient": 0.1, "dual_clip": 3.0, "anchor_history": 1},
        ),
    ),
    "gigpo_llm": Case(
        {"id": "tests.agents.corridor:Corridor-v0"},
        {
            "width": 32, "layers": 1, "prompt": "short", "think": False, "max_tokens": 8, "groups": 2, "group_size": 2,
            "tasks": 4, "batch_size": 8, "learning_rate": 1e-3, "warm_start": 3, "warm_success": 1.0, "warm_every": 2,
        },
        words=True,
    ),
    "value_iteration": Case({"id": "FrozenLake-v1"}, {}),
    "drpg": Case(GARNET, {"tolerance": None}, steps=30),
    "robust_value_iteration": Case(GARNET, {"tolerance": None}, steps=30),
    "robust_modified_policy_iteration": Case(GARNET, {"tolerance": None, "sweeps": 2}, steps=30),
    "partial_policy_iteration": Case(GARNET, {"tolerance": None}, steps=30),
    "robust_mirror_descent": Case(GARNET, {"tolerance": None}, steps=30),
}  # fmt: skip

GRADIENT_LEARNERS = [name for name, case in AGENTS.items() if case.actions is not None]
"""Agents that learn by gradients, from whatever data."""
LEARNERS = [name for name in GRADIENT_LEARNERS if get_agent(name).loop in ("replay", "robust")]
"""Those that learn from minibatches of transitions."""
ACTOR_CRITICS = [name for name in LEARNERS if not issubclass(get_agent(name), ValueBased)]
"""Those of them whose actor is a network of its own."""
every_agent = pytest.mark.parametrize("name", [name for name, case in AGENTS.items() if not case.words])
every_device_learner = pytest.mark.parametrize("name", [n for n in GRADIENT_LEARNERS if AGENTS[n].waits is not None])
every_gradient_learner = pytest.mark.parametrize("name", GRADIENT_LEARNERS)
every_learner = pytest.mark.parametrize("name", LEARNERS)
every_learning_net = pytest.mark.parametrize(
    ("name", "net"), [(name, net) for name in GRADIENT_LEARNERS for net in AGENTS[name].nets]
)
every_actor_critic = pytest.mark.parametrize("name", ACTOR_CRITICS)
every_variant = pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in GRADIENT_LEARNERS for options in AGENTS[name].variants]
)


def short_run(name: str, run_dir: Path | str | None = None, **options: Any) -> TrainConfig:
    """Return the configuration of an agent's short run. ``options`` replace top-level ones; ``agent`` and ``env`` are
    added to the row's."""
    case = AGENTS[name]
    if case.words:
        pytest.importorskip("transformers")
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
    small = {"network": NetworkConfig(hidden=(16, 16)), "batch_size": 8, "warmup_steps": 0}
    options = {**known(name, **small), **case.always, **options}
    spec = EnvSpec("test", observation_space, case.actions if action_space is None else action_space)
    return cls(spec, build(cls.config_class, options), seed=seed, runs=runs, precision=precision)


def known(name: str, **options: Any) -> dict[str, Any]:
    """Return those of ``options`` that an agent has."""
    own = {field.name for field in fields(get_agent(name).config_class)}
    return {option: value for option, value in options.items() if option in own}


def make_data(agent: Any, seed: int, size: int = 8) -> Any:
    """Return random input of ``agent.update``, of ``size`` transitions in the agent's spaces."""
    case = AGENTS.get(agent.name)
    return ((case and case.data) or DATA[agent.loop])(agent, seed, size)


def make_batch(agent: Any, seed: int, size: int = 8) -> Batch:
    """Return a random minibatch in the agent's spaces; of slices where it remembers."""
    if getattr(agent, "memories", None) is not None:
        return make_slices(agent, seed, size)
    g = torch.Generator().manual_seed(seed)
    space = agent.spec.action_space
    if isinstance(space, spaces.Discrete):
        action = torch.randint(int(space.n), (size,), generator=g) + int(space.start)
    else:
        assert isinstance(space, spaces.Box)
        action = torch.as_tensor(space.high) * (2 * torch.rand((size, *space.shape), generator=g) - 1)
    return Batch(
        obs=random_obs(agent.spec.observation_space, (size,), g),
        action=action,
        reward=torch.randn(size, generator=g),
        next_obs=random_obs(agent.spec.observation_space, (size,), g),
        terminated=(torch.rand(size, generator=g) < 0.2).float(),
        discount=torch.full((size,), 0.99),
        weight=None,
        index=torch.arange(size),
    )


def make_slices(agent: Any, seed: int, size: int = 8, length: int = 4) -> Batch:
    """Return ``size`` random slices, of which some have a burn-in and some end early."""
    g = torch.Generator().manual_seed(seed)
    steps, start = torch.arange(length), int(agent.spec.action_space.start)
    before, stop = torch.randint(0, 2, (size, 1), generator=g), torch.randint(2, length + 1, (size, 1), generator=g)
    valid, shape = (steps < stop).float(), (size, length)
    course = random_obs(agent.spec.observation_space, (size, length + 1), g)
    end = valid * (steps == stop - 1) * (torch.rand((size, 1), generator=g) < 0.3)

    def shown(first: int) -> Any:
        return map_obs(lambda x: x[:, first : first + length] * valid.view(*shape, *[1] * (x.dim() - 2)), course)

    return Batch(
        obs=shown(0), action=torch.randint(int(agent.spec.action_space.n), shape, generator=g) + start,
        reward=torch.randn(shape, generator=g) * valid, next_obs=shown(1), terminated=end,
        discount=0.99 * valid, weight=None, index=torch.arange(size), valid=valid,
        mask=valid * (steps >= before),
        carry={name: torch.rand(x.shape, generator=g) for name, x in agent.initial_carry(size).items()},
    )  # fmt: skip


def make_rollout(agent: Any, seed: int, size: int = 8) -> Rollout:
    """Return a rollout of the agent's own actions: of four steps in which some episodes end, or of whole episodes in
    the groups that it has. Its streams stay where they are."""
    g, c = torch.Generator().manual_seed(seed), agent.config
    grouped = agent.loop == "group"
    rows = c.groups * c.group_size if grouped else size // 4
    shape = (size // rows, rows)
    obs, next_obs = (random_obs(agent.spec.observation_space, shape, g) for _ in range(2))
    reward, chance = torch.randn(shape, generator=g), torch.rand(shape, generator=g)
    yes = torch.ones(shape, dtype=torch.bool)
    terminated, truncated, group = chance < 0.1, chance > 0.9, None
    if grouped:
        terminated, truncated, group = ~yes, ~yes, torch.arange(c.groups).repeat_interleave(c.group_size)
        terminated[-1] = True
    actions, extras, stream = [], [], generator_state(agent.act_generator)
    agent.act_generator.manual_seed(seed)
    carry = agent.initial_carry(rows)
    for t in range(shape[0]):
        act = agent.act(map_obs(lambda x, t=t: x[t], obs), carry)
        before = {CARRY + name: leaf for name, leaf in (carry or {}).items()}
        actions.append(act.action)
        extras.append({name: {**act.extras, **before}[name] for name in agent.extra_fields})
        carry = act.carry
    set_generator_state(agent.act_generator, stream)
    told = {name: torch.stack([each[name] for each in extras]) for name in agent.extra_fields}
    ended = terminated | truncated
    complete = yes[0] if grouped else None
    led = None if grouped else next_obs
    return Rollout(
        obs, torch.stack(actions), reward, led, terminated, truncated, ended, yes, told, group, complete
    )  # fmt: skip


DATA: dict[str, Callable[[Any, int, int], Any]] = {
    "replay": make_batch, "robust": make_batch, "rollout": make_rollout, "group": make_rollout,
}  # fmt: skip
"""Input of an update by the agent's loop."""


def random_obs(space: spaces.Space[Any], shape: tuple[int, ...], generator: torch.Generator) -> Obs:
    """Return observations (*shape, …) of a space: normal numbers, bytes, or numbers of a choice."""
    if isinstance(space, spaces.Dict):
        return {name: random_obs(part, shape, generator) for name, part in space.items()}  # type: ignore[misc]
    if isinstance(space, spaces.Discrete):
        return torch.randint(int(space.n), shape, generator=generator) + int(space.start)
    assert isinstance(space, spaces.Box)
    if space.dtype == np.uint8:
        return torch.randint(256, (*shape, *space.shape), generator=generator, dtype=torch.uint8)
    return torch.randn((*shape, *space.shape), generator=generator)
