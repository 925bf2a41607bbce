"""Every option of every agent counts, or is refused: what a user gave is never ignored in silence.

Each is set away from its default, alone. A few updates, or where only the loop reads it a few steps of the loop, must
then leave another state than they do without it. An option that ``needs`` another one is refused without it, and must
count beside it. What quantities an update's guard has met, and when, is not what it learnt.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rlopt.config import build, join, over
from rlopt.loops.configuration import agent_config
from rlopt.registry import get_agent
from rlopt.state import State, states_equal
from rlopt.training.setup import make_loop
from rlopt.types import RloptError
from tests.agents.cases import AGENTS, GRADIENT_LEARNERS, every_agent, known, make_agent, make_data, short_run

STEPS = {"replay": 12, "robust": 16, "rollout": 40, "group": 110, "solver": 4}
"""How far each kind of loop goes."""
SMALL = {
    "replay": {"warmup_steps": 4, "batch_size": 4},
    "robust": {"warmup_steps": 4, "batch_size": 4, "adversary_every": 4},
    "rollout": {"rollout_steps": 10, "batch_size": 10},
    "group": {"horizon": 25},
}
SHORT = {"env": {"kwargs": {"max_episode_steps": 5}}}
TOP: dict[str, dict[str, Any]] = {"robust": SHORT, "rollout": {"num_envs": 2, **SHORT}}
VALUES: dict[str, Any] = {
    "adversary": "uniform", "ambiguity": "linf", "bag": 1, "inner_limit": 1, "inner_tolerance": 1e-3,
    "learning_starts": 8, "max_grad_norm": 1e-3, "network.encoder": "flatten", "optimiser.name": "sgd", "radius": 0.3,
    "optimiser.kwargs": {"maximize": True}, "search.tolerance": 5.0, "td_threshold": 1e-3, "tolerance": 1e6,
    "update_ratio": [2, 1], "td_loss": "pal", "horizon": 3, "target_kl": 1e-9, "batch_size": 7, "schedule_steps": 9,
    "clip": 1e-3, "anchor_digits": 0, "clip_high": 1e-3, "reward": "sign", "epsilon_end": 1.0, "epsilon_steps": 1,
    "anchor": "state", "independent": {"name": "vdn"}, "centralised": {"name": "vdn"}, "every": 2,
    "rates": [0.9],
}  # fmt: skip
"""Where another value cannot be worked out from the default, or would not show in so few steps."""
BESIDE: dict[str, dict[str, Any]] = {
    "optimiser.weight_decay": {"optimiser.name": "adamw"},
    "optimiser.kwargs": {"optimiser.name": "torch:SGD"},
    "target_noise_clip": {"target_noise": 2.0},
    "value_clip": {"clip": 1e-3},
    "clip_schedule": {"clip": 1e-3},
    "inner_limit": {"inner_tolerance": 1e-9},
    "epsilon_end": {"epsilon_steps": 1},
    "target_counts": {"target_every": 2},
    "double": {"learning_rate": 0.3, "target_every": 1000},
}
"""What an option stands beside to show."""
OBSERVED = torch.linspace(-1, 1, 20).view(5, 4)
SILENT = {
    "name": "it is the agent",
    "fused": "how it is computed, not what",
    "bag_share": "of a bag with one member (see test_drpg_deep.py)",
    "network.encoder": "of vectors all encoders are one",
    "evaluation_epsilon": "how it is evaluated (see test_dqn.py)",
}
FAMILY = [name for name in GRADIENT_LEARNERS if get_agent(name).name == "dqn"]
BLIND = {
    "sac_discrete": {"reward"}, "drpg_deep_discrete": {"reward"}, "reinforce": {"reward", "noise", "resample"},
    "gigpo": {"reward", "gamma", "omega", "nested", "tasks", "noise", "resample"},
    **{name: {"reward"} for name in FAMILY}, "vdn": {"double"}, "qmix": {"double"}, "mappo": {"unit_box"},
    "mansa": {"double"},
}  # fmt: skip
"""CartPole pays 1 whatever is made of it and draws no noise, on FrozenLake so few steps, from one state, lead nowhere,
the counting team acts in a box of ±1, and so few updates choose the same next actions.
(``tests/training/test_group_tasks.py`` has what groups draw.)"""


def options_of(config: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield dotted name, field and value of every option, those of groups behind their group."""
    for f in dataclasses.fields(config):
        value, name = getattr(config, f.name), join(where, f.name)
        if not dataclasses.is_dataclass(value):
            yield name, f, value
            continue
        if f.metadata.get("needs"):
            yield name, f, value
        yield from options_of(value, name)


def nested(dotted: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in dotted.items():
        *groups, last = name.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return tree


def other(name: str, f: Any, value: Any) -> Any:
    """Return a value that is not ``value``, and in range."""
    m = f.metadata
    if name in VALUES:
        return VALUES[name]
    if dataclasses.is_dataclass(value):  # a group that needs another option
        first = next(iter(dataclasses.fields(value)))
        return {first.name: getattr(value, first.name) + 1}
    if m.get("choices"):
        return next(word for word in m["choices"] if word not in (value, "auto", None))
    if isinstance(value, dict) and value:  # intervals
        return {word: [low, 0.9 * high] for word, (low, high) in value.items()}
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        high = m["high"]
        return next(x for x in (value * 0.5, 0.5, 0.1) if x != value and (high is None or x <= high))
    if isinstance(value, tuple):
        return [8]
    assert value is None, f"{name}: add a value to VALUES"
    return 8 if f.type.startswith("int") or "int" in f.type else 0.5


def after_updates(name: str, options: dict[str, Any]) -> State:
    """Return what some actions and updates of an agent leave behind."""
    own = known(name, network={"hidden": [16, 16]}, warmup_steps=4, fused=False)
    if {"lr_schedule", "clip_schedule"} & options.keys():
        own["schedule_steps"] = 5  # which the loop would decide
    agent = make_agent(name, **over(own, options))
    states: list[State] = []
    for i in range(3):
        batch = make_data(agent, i, 24)
        agent.clock.env_steps = 2 * i + 1
        action = agent.act(OBSERVED, agent.initial_carry(len(OBSERVED))).action
        update = agent.update(batch)
        states.append({"action": action, "update": update._asdict()})
    return {"steps": states, "agent": learnt(agent.state_dict())}


def learnt(agent: State) -> State:
    return {name: part for name, part in agent.items() if name != "guard"}


def after_steps(name: str, options: dict[str, Any]) -> State:
    """Return what a few steps of an agent's loop leave behind."""
    kind = get_agent(name).loop
    top = over({"env": AGENTS[name].env}, TOP.get(kind, {}))
    loop = make_loop(short_run(name, total_steps=STEPS[kind], agent=over(SMALL.get(kind, {}), options), **top))
    try:
        logged = []
        while loop.step < loop.total_steps:
            progress = loop.advance()
            logged.append([{key: total for key, (total, _) in progress.metrics.items()}, loop.counters()])
        state = loop.state_dict()
        return {"loop": state | ({"agent": learnt(state["agent"])} if "agent" in state else {}), "logged": logged}
    finally:
        loop.close()


@every_agent
def test_every_option_counts_or_is_refused(name: str) -> None:
    kind = get_agent(name).loop
    config = agent_config(over({"name": name}, over(AGENTS[name].options, SMALL.get(kind, {}))))
    ways = [after_updates, after_steps] if name in GRADIENT_LEARNERS else [after_steps]
    plain_runs: dict[Any, State] = {}
    ignored = []
    for key, f, value in options_of(config):
        if key in SILENT or key in BLIND.get(name, ()):
            continue
        group = key.rpartition(".")[0]
        beside = dict(BESIDE.get(key, {}))
        needs = f.metadata.get("needs") or {}
        if needs:
            first = next(iter(needs))
            beside[join(group, first)] = needs[first][0]
        given = {key: other(key, f, value)}
        refused = False
        for way in ways:
            base = (way.__name__, json.dumps(beside))
            try:
                if base not in plain_runs:
                    plain_runs[base] = way(name, nested(beside))
                if states_equal(way(name, nested({**beside, **given})), plain_runs[base]) is not None:
                    break
            except RloptError as error:
                assert any(word in str(error) for word in (key, *beside)) and "\n" not in str(error)
                refused = True  # by what has one agent, perhaps; a team may take it
            else:
                refused = False
        else:
            if not refused:
                ignored.append(given)
    assert not ignored


@every_agent
def test_an_option_without_what_it_needs_is_refused_in_one_line(name: str) -> None:
    config = agent_config({"name": name, **AGENTS[name].always})
    for key, f, value in options_of(config):
        if needs := f.metadata.get("needs"):
            group = key.rpartition(".")[0]
            away = {
                join(group, word): next(c for c in choices_of(config, join(group, word)) if c not in wanted)
                for word, wanted in needs.items()
            }
            tree = nested({**away, key: other(key, f, value)})
            with pytest.raises(RloptError, match=rf"^agent\.{key}\S* has no effect without agent\.") as told:
                build(type(config), {"name": name, **AGENTS[name].always, **tree})
            assert "\n" not in str(told.value)


def choices_of(config: Any, name: str) -> tuple[Any, ...]:
    """Return values of an option: its choices, or two numbers and none."""
    f = next(f for key, f, _ in options_of(config) if key == name)
    return f.metadata["choices"] or (None, 0.5, 0.25)


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({"buffer": {"folder": "x"}}, "buffer.folder=x has no effect without buffer.device=disk; add .*"),
        ({"env": {"timeout": 5}}, "env.timeout=5 has no effect with env.backend=torch, which has no workers; .*"),
        (
            {"agent": {"name": "ppo", "log_std": -1}, "env": {"id": "CartPole-v1"}},
            r"agent\.log_std=-1\.0 has no effect on actions in Discrete\(2\); leave it out",
        ),
        (
            {"agent": {"name": "ppo", "unit_box": False}, "env": {"id": "CartPole-v1"}},
            r"agent\.unit_box=false has no effect on actions in Discrete\(2\); leave it out",
        ),
        ({"agent": {"td_threshold": 2}, "buffer": {"name": "lap"}}, "agent.td_threshold=2.0 has no effect without .*"),
        ({"agent": {"name": "robust_modified_policy_iteration", "start": "random"}}, "agent.start=random has no .*"),
    ],
)  # fmt: skip
def test_what_cannot_count_is_refused(tree: dict[str, Any], line: str) -> None:
    name = tree.get("agent", {}).get("name", "sac")
    with pytest.raises(RloptError, match=rf"^{line}$"):
        make_loop(short_run(name, **tree))
