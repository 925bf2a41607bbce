"""Nothing non-finite reaches the weights, the first culprit is named, and an update never waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gymnasium import spaces
from torch.utils._python_dispatch import TorchDispatchMode

from rlopt.agents import Agent
from rlopt.agents.saving import nets_of
from rlopt.nn import NetworkConfig, Optimiser
from rlopt.registry import get_agent
from tests.agents.cases import (
    ACTOR_CRITICS,
    AGENTS,
    GRADIENT_LEARNERS,
    LEARNERS,
    every_actor_critic,
    every_device_learner,
    every_gradient_learner,
    known,
)


def learnt(agent: Agent) -> list[torch.Tensor]:
    """Every network that learns, the temperature, and every optimiser's moments and count, as copies."""

    def leaves(tree: Any) -> list[torch.Tensor]:
        return [t for v in tree.values() for t in leaves(v)] if isinstance(tree, dict) else [tree]

    names = [name for name, net in nets_of(agent).items() if any(net.learns)]
    names += [name for name, thing in agent.parts.items() if isinstance(thing, Optimiser) or name == "log_temperature"]
    state = agent.state_dict()
    return [t for name in names for t in leaves(state[name])]


def spoil(batch: Any, field: str, value: float) -> Any:
    tensor = getattr(batch, field).clone()
    tensor.view(-1)[-1] = value
    return batch._replace(**{field: tensor})


BAD = [
    ("obs", float("nan"), "observation"),
    ("obs", float("inf"), "observation"),
    ("next_obs", float("nan"), "next observation"),
    ("next_obs", float("-inf"), "next observation"),
    ("reward", float("nan"), "reward"),
    ("reward", float("inf"), "reward"),
    ("reward", 1e30, "critic loss"),  # finite, but its square is not
]
LOSSES = {"ppo": "networks loss", "reinforce": None, "gigpo": None, "c51": None, "qr_dqn": None, "rainbow": None}
"""What 1e30 does elsewhere; divided by a deviation that is infinite it is nothing at all, and distributions bound their
gradient."""
VALUE_BASED = ("dqn", "ddqn_lap")


@pytest.mark.parametrize(
    ("name", "field", "value", "culprit"),
    [
        (name, field, value, culprit if value != 1e30 else LOSSES.get(name, culprit))
        for name in GRADIENT_LEARNERS
        for field, value, culprit in BAD
        if not (get_agent(name).loop == "group" and field == "next_obs")  # they bootstrap from nothing
    ],
)
def test_bad_input_changes_nothing_and_is_named(name, field, value, culprit, make_agent, make_data) -> None:
    # A clipped residual has a gradient that nothing makes infinite.
    unclipped = name in VALUE_BASED and culprit == "critic loss"
    agent = make_agent(name, **({"td_loss": "squared"} if unclipped else {}))
    for i in range(2):
        agent.update(make_data(agent, i))
    before = learnt(agent)
    agent.update(spoil(make_data(agent, 2), field, value))
    if culprit is None:
        assert agent.guard.first_bad() is None and all(t.isfinite().all() for t in learnt(agent))
        return
    unchanged = [torch.equal(a, b) for a, b in zip(before, learnt(agent), strict=True)]
    if name == "sac_2018" and culprit == "critic loss":  # the value network's step comes before and was sound
        assert torch.equal(before[0], learnt(agent)[0])
    else:
        assert all(unchanged)
    assert all(net.flat.isfinite().all() for net in nets_of(agent).values())
    assert agent.guard.first_bad() == culprit

    agent.update(make_data(agent, 3))  # learning goes on, and the first culprit is remembered
    assert not any(torch.equal(a, b) for a, b in zip(before, learnt(agent), strict=True) if a.numel() > 1 and a.any())
    agent.update(spoil(make_data(agent, 4), "reward", float("nan")))
    assert agent.guard.first_bad() == culprit
    agent.guard.clear()
    assert agent.guard.first_bad() is None
    assert all(t.isfinite().all() for t in learnt(agent))


@every_gradient_learner
def test_whatever_is_first_not_finite_is_named_and_no_later_step_is_taken(name: str, make_agent, make_data) -> None:
    """Every quantity in turn, as ``descend`` and ``open_update`` name them."""

    def watched(bad: str | None) -> tuple[Agent, list[str], list[bool]]:
        agent = make_agent(name, **known(name, fused=False))
        passes, names, passed = agent.guard.passes, [], []

        def watch(called: str, value: torch.Tensor) -> torch.Tensor:
            names.append(called)
            ok = passes(called, value if called != bad else torch.full_like(value, float("nan")))
            passed.append(bool(ok))
            return ok

        agent.guard.passes = watch  # type: ignore[method-assign]
        agent.update(make_data(agent, 0))
        return agent, names, passed

    _, names, passed = watched(None)
    assert {"observation", "reward"} <= set(names[:3]) and all(passed)
    if name in LEARNERS:
        assert names[1] == "next observation"
        parts = ("critic", "actor") if name in ACTOR_CRITICS else ("critic",)
        assert {f"{part} {what}" for part in parts for what in ("loss", "gradient")} <= set(names)
    for bad in dict.fromkeys(names):  # of several epochs each has the same names
        agent, again, passed = watched(bad)
        first = names.index(bad)
        assert again == names and passed == [k < first for k in range(len(names))]
        assert agent.guard.first_bad() == bad
        for part, optimiser in agent.parts.items():
            if isinstance(optimiser, Optimiser):
                own = part.removesuffix("optimiser").replace("_", " ") + "gradient"
                assert optimiser.count.item() == sum(n.endswith(own) for n in names[:first]), (bad, part)


@every_actor_critic
def test_a_loss_that_explodes_in_the_actor_leaves_the_actor_alone(name: str, make_agent, make_batch) -> None:
    """Critics whose values overflow for the policy's actions, but not for their own loss."""
    agent = make_agent(name)
    batch = make_batch(agent, 0)
    original, team = agent.nets, hasattr(agent.nets, "actors")  # of one

    def actor(params: Any, obs: torch.Tensor) -> Any:
        out = (original.actors[0] if team else original.actor)(params, obs)
        bad = obs is batch.obs and torch.is_grad_enabled()
        return out if not bad else (out[0] * torch.inf, out[1]) if isinstance(out, tuple) else out * torch.nan

    changed = {"actors": (actor,)} if team else {"actor": actor}
    agent.nets = type(original)(**{**vars(original), **changed})
    agent.fused = None
    before, critic = agent.actor.flat.clone(), agent.critic.flat.clone()
    agent.update(batch)
    assert torch.equal(agent.actor.flat, before)
    assert not torch.equal(agent.critic.flat, critic)
    assert agent.guard.first_bad() == "actor loss"
    assert agent.temperature is None or agent.temperature.log.isfinite()


def test_the_sticky_code_is_part_of_the_state(make_agent, make_batch) -> None:
    agent, other = make_agent("sac"), make_agent("sac", seed=1)
    agent.update(spoil(make_batch(agent, 0), "reward", float("nan")))
    other.load_state_dict(agent.state_dict())
    assert other.guard.first_bad() == "reward"


# --- no waiting -----------------------------------------------------------------------------------------------------


class NoSync(TorchDispatchMode):
    """Fails on every operation whose result, or whose shape, the host would have to wait for."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal.default", "unique")

    def __init__(self, allowed: int = 0) -> None:
        super().__init__()
        self.allowed = allowed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(func) for word in self.FORBIDDEN):
            self.allowed -= 1
            assert self.allowed >= 0, f"{func} waits for the device"
        if str(func).startswith(("aten.index.", "aten.index_put")):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), (
                f"{func} by a mask waits for the device"
            )
        return func(*args, **(kwargs or {}))


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("an update read a tensor on the host")

    for method in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__"):
        monkeypatch.setattr(torch.Tensor, method, refuse)


@every_device_learner
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "lr_schedule": "linear", "schedule_steps": 9}])
def test_update_never_waits_for_the_device(name: str, options, make_agent, make_data, monkeypatch) -> None:
    # Hand-written gradients and kernels of optimisers run on the CPU alone, where there is nobody to wait for.
    monkeypatch.setattr("rlopt.nn.optim._kernels", lambda ok: False)
    options = known(name, fused=False, **options)
    agents = [make_agent(name, **options)]
    if name == "sac":
        agents += [make_agent(name, policy_delay=2, **options), make_agent(name, temperature=0.2, **options)]
    for agent in agents:
        batches = [make_data(agent, i) for i in range(3)]
        with monkeypatch.context() as m, NoSync(3 * AGENTS[name].waits):
            forbid_reading(m)
            for batch in batches:
                agent.update(batch)
        assert agent.clock.updates >= 3


@every_device_learner
def test_update_never_waits_with_images(name: str, make_agent, make_data, monkeypatch) -> None:
    image = spaces.Dict({"camera": spaces.Box(0, 255, (3, 36, 36), "uint8"), "arm": spaces.Box(-1, 1, (2,))})
    agent = make_agent(name, observation_space=image, network=NetworkConfig(hidden=(8,)))
    batch = make_data(agent, 0)
    with monkeypatch.context() as m, NoSync(AGENTS[name].waits):
        m.setattr("rlopt.nn.optim._kernels", lambda ok: False)
        forbid_reading(m)
        update = agent.update(batch)
    assert all(value.isfinite() for value in update.metrics.values())
    assert agent.guard.first_bad() is None


def test_the_instruments_notice(make_agent, make_batch, monkeypatch) -> None:
    x = torch.ones(3)
    with NoSync(), pytest.raises(AssertionError, match="waits"):
        x[x > 0]
    with NoSync(), pytest.raises(AssertionError, match="waits"):
        bool(x.sum() > 0)
    with monkeypatch.context() as m:
        forbid_reading(m)
        for read in (x.sum().item, x.tolist, x.numpy, x[0].__float__, x[0].__bool__):
            with pytest.raises(AssertionError, match="host"):
                read()
