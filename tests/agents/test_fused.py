"""SAC's compiled update equals the readable one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from gymnasium import spaces
from torch import nn

from rlopt.agents import SAC, Temperature
from rlopt.fast import fused_sac
from rlopt.nn import RULES, NetworkConfig, OptimiserConfig, register_encoder
from rlopt.nn.encoders import ENCODERS
from rlopt.nn.networks import MLP


@pytest.mark.parametrize("hidden", [(16,), (16, 16), (8, 12, 16, 10)])
@pytest.mark.parametrize("weighted", [False, True])
def test_one_update_equals_the_readable_one(hidden: tuple[int, ...], weighted: bool, make_agent, make_batch) -> None:
    options = {"network": NetworkConfig(hidden=hidden), "initial_temperature": 0.3}
    fused, plain = (make_agent("sac", fused=f, **options) for f in (True, False))
    assert fused.fused is not None and plain.fused is None
    batch = make_batch(fused, 1)
    if weighted:
        batch = batch._replace(weight=torch.linspace(0.1, 1.0, 8))
    for agent in (fused, plain):
        with torch.no_grad():
            # Biases that are not zero, and log standard deviations beyond a clamp in some rows and inside in others.
            agent.actor.flat.add_(0.3 * torch.randn(agent.actor.flat.shape, generator=torch.Generator().manual_seed(5)))
            agent.actor_module.body.layers[-1].weight[2].mul_(60.0)
            raw = agent.actor_module.body(torch.cat([batch.obs, batch.next_obs]))[:, 2]
            agent.actor_module.body.layers[-1].bias[2].add_(2.0 - raw.mean())
    raw = fused.actor_module.body(torch.cat([batch.obs, batch.next_obs]))[:, 2]
    assert (raw > 2).any() and (raw < 2).any()

    a, b = fused.update(batch), plain.update(batch)
    assert a.metrics.keys() == b.metrics.keys()
    torch.testing.assert_close(a.metrics, b.metrics)
    torch.testing.assert_close(a.priority, b.priority)
    for name in ("critic_optimiser", "actor_optimiser", "temperature_optimiser"):
        ours, theirs = fused._persistent[name], plain._persistent[name]
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fused.target.flat, plain.target.flat, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {"policy_delay": 2, "max_grad_norm": 0.7},
        {"temperature": 0.2, "td_loss": "huber"},
        {"optimiser": OptimiserConfig(name="adam", weight_decay=0.1), "lr_schedule": "linear", "schedule_steps": 20},
        {"optimiser": OptimiserConfig(name="adamw", weight_decay=1.0, beta1=0.5, epsilon=1e-3), "learning_rate": 1e-2},
    ],
)
def test_training_is_the_same_with_and_without(options, make_agent, make_batch) -> None:
    fused, plain = (make_agent("sac", fused=f, **options) for f in (True, False))
    assert fused.fused is not None and plain.fused is None
    for i in range(10):
        fused.clock.env_steps = plain.clock.env_steps = i
        a, b = fused.update(make_batch(fused, i)), plain.update(make_batch(plain, i))
        assert a.metrics.keys() == b.metrics.keys()
        torch.testing.assert_close(a.metrics, b.metrics, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(a.priority, b.priority, rtol=1e-3, atol=1e-4)
    for net in ("actor", "critic", "target"):
        torch.testing.assert_close(getattr(fused, net).flat, getattr(plain, net).flat, rtol=1e-3, atol=1e-4)


def test_a_batch_of_another_size_takes_the_readable_path(make_agent, make_batch) -> None:
    fused, plain = (make_agent("sac", fused=f) for f in (True, False))
    fused.update(make_batch(fused, 0, size=5))
    plain.update(make_batch(plain, 0, size=5))
    assert torch.equal(fused.critic.flat, plain.critic.flat)
    assert torch.equal(fused.actor.flat, plain.actor.flat)


@pytest.mark.parametrize(
    ("space", "network"),
    [
        (spaces.Dict({"a": spaces.Box(-1, 1, (4,))}), NetworkConfig(hidden=(8,))),
        (spaces.Box(0, 255, (3, 36, 36), "uint8"), NetworkConfig(hidden=(8,))),
        (spaces.Box(0, 255, (4,), "uint8"), NetworkConfig(hidden=(8,))),
        (spaces.Box(-1, 1, (2, 2)), NetworkConfig(hidden=(8,))),
        (spaces.Box(-1, 1, (4,)), NetworkConfig(hidden=(8,), activation="tanh")),
        (spaces.Box(-1, 1, (4,)), NetworkConfig(hidden=(8,), norm="layer")),
    ],
)
def test_networks_the_formulas_do_not_cover_take_the_readable_path(space, network, make_agent) -> None:
    assert make_agent("sac", observation_space=space, network=network).fused is None


def test_critics_may_have_hidden_layers_of_their_own(make_agent, make_batch) -> None:
    network = NetworkConfig(hidden=(8,), critic_hidden=(12, 16, 4))
    fused, plain = (make_agent("sac", fused=f, network=network) for f in (True, False))
    assert fused.fused is not None
    for i in range(3):
        a, b = (agent.update(make_batch(agent, i)) for agent in (fused, plain))
        torch.testing.assert_close(a.metrics, b.metrics, rtol=1e-4, atol=1e-5)
    for net in ("actor", "critic", "target"):
        torch.testing.assert_close(getattr(fused, net).flat, getattr(plain, net).flat, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [{"optimiser": OptimiserConfig(name="sgd")}, {"td_loss": "pal"}])
def test_rules_and_losses_the_formulas_do_not_cover_take_the_readable_path(options, make_agent) -> None:
    assert make_agent("sac", **options).fused is None


def test_a_rule_that_is_added_is_honoured(make_agent, make_batch, monkeypatch) -> None:
    monkeypatch.setitem(RULES, "mine", RULES["adam"]._replace(make=RULES["sgd"].make))
    agent, plain = (make_agent("sac", optimiser=OptimiserConfig(name=name)) for name in ("mine", "sgd"))
    assert agent.fused is None
    for each in (agent, plain):
        each.update(make_batch(each, 0))
    assert torch.equal(agent.actor.flat, plain.actor.flat)


def test_a_build_of_torch_without_the_products_takes_the_readable_path(make_agent, make_batch, monkeypatch) -> None:
    monkeypatch.setattr("rlopt.fast.products._find_mm", lambda: None)
    agent = make_agent("sac")
    assert agent.fused is None
    agent.update(make_batch(agent, 0))


# --- whatever is added anywhere is honoured, on the readable path ---------------------------------------------------


class Doubled(nn.ReLU):
    """A non-linearity of somebody's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(x)


class OwnEncoder(nn.Module):
    """An encoder of somebody's own."""

    out_features = 4

    def __init__(self, space: Any) -> None:
        super().__init__()

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return obs.flip(-1)


class OwnMLP(MLP):
    """A residual connection that has no module of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.sum(-1, keepdim=True)


class OwnTemperature(Temperature):
    def descend(self, log_prob: torch.Tensor) -> None:
        super().descend(log_prob.clamp(max=0.0))


class OwnLoss(SAC):
    def actor_objective(self, work: Any) -> Any:
        loss, metrics = super().actor_objective(work)
        return 3.0 * loss, metrics


class OwnStages(SAC):
    def stages(self) -> tuple[str, ...]:
        return "critic", "target"


def altered(kind: str) -> type[SAC]:
    """SAC with one thing changed, as somebody would change it."""

    class Altered(SAC):
        def build_actor(self, actor: Any) -> Any:
            made = super().build_actor(actor)
            body = made.body
            if kind == "normalisation":
                body.norms = nn.ModuleList(nn.LayerNorm(16, elementwise_affine=False) for _ in range(2))
            elif kind == "activation":
                body.activation = Doubled()
            elif kind == "class":
                body.__class__ = OwnMLP
            elif kind == "attribute":
                body.residual = True
            elif kind == "child":
                made.head_norm = nn.LayerNorm(4)
            elif kind == "hook":
                body.register_forward_hook(lambda module, args, out: 0.5 * out)
            return made

        def build_critic(self, make: Any) -> None:
            def with_buffer() -> nn.Module:
                critic = make()
                critic.register_buffer("seen", torch.zeros(()))
                return critic

            super().build_critic(with_buffer if kind == "buffer" else make)

    return Altered


ALTERED = {k: altered(k) for k in ("normalisation", "activation", "class", "hook", "attribute", "buffer", "child")}
UNUSED = [ALTERED[k] for k in ("attribute", "buffer", "child")]
"""Additions that nothing reads here; what they are for only their author knows."""


@pytest.mark.parametrize("cls", [OwnLoss, OwnStages, *(pytest.param(cls, id=k) for k, cls in ALTERED.items())])
def test_what_is_not_written_out_takes_the_readable_path_and_is_honoured(cls, make_agent, make_batch) -> None:
    spec, config = make_agent("sac").spec, make_agent("sac").config
    agent, original = cls(spec, config), make_agent("sac", fused=False)
    plain = cls(spec, make_agent("sac", fused=False).config)
    assert agent.fused is None and agent.fast_act is None
    for each in (agent, plain, original):
        for i in range(2):
            each.update(make_batch(each, i))
    assert torch.equal(agent.actor.flat, plain.actor.flat)
    if cls not in UNUSED:
        assert not torch.equal(agent.actor.flat, original.actor.flat)


def test_a_temperature_of_ones_own_takes_the_readable_path(make_agent, monkeypatch) -> None:
    monkeypatch.setattr("rlopt.agents.sac.Temperature", OwnTemperature)
    agent = make_agent("sac")
    assert not fused_sac.applies(agent, SAC, Temperature)


def test_an_encoder_of_ones_own_takes_the_readable_path(make_agent, make_batch) -> None:
    register_encoder("flipped", OwnEncoder)
    try:
        agent = make_agent("sac", network=NetworkConfig(encoder="flipped", hidden=(8,)))
        plain = make_agent("sac", network=NetworkConfig(hidden=(8,)), fused=False)
        assert agent.fused is None
        for each in (agent, plain):
            each.update(make_batch(each, 0))
        assert not torch.equal(agent.actor.flat, plain.actor.flat)
    finally:
        del ENCODERS["flipped"]


@pytest.mark.parametrize("what", ["obs", "next_obs", "reward"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_that_is_not_finite_reaches_the_weights(what, value, make_agent, make_batch) -> None:
    fused, plain = (make_agent("sac", fused=f) for f in (True, False))
    for agent in (fused, plain):
        agent.update(make_batch(agent, 0))
        before = [agent.actor.flat.clone(), agent.critic.flat.clone(), agent.temperature.log.clone()]
        moments = agent.critic_optimiser.state_dict()
        batch = make_batch(agent, 1)
        getattr(batch, what)[3] = value
        agent.update(batch)
        after = [agent.actor.flat, agent.critic.flat, agent.temperature.log]
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        torch.testing.assert_close(agent.critic_optimiser.state_dict(), moments, rtol=0, atol=0)
        assert (
            agent.guard.first_bad() == {"obs": "observation", "next_obs": "next observation", "reward": "reward"}[what]
        )
        agent.update(make_batch(agent, 2))
        assert not torch.equal(agent.critic.flat, before[1]) and agent.critic.flat.isfinite().all()
    torch.testing.assert_close(fused.critic.flat, plain.critic.flat, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("deterministic", [False, True])
def test_acting_row_by_row_equals_the_policy(runs: int, deterministic: bool, make_agent) -> None:
    fused, plain = (make_agent("sac", fused=f, runs=runs) for f in (True, False))
    assert fused.fast_act is not None and plain.fast_act is None
    for agent in (fused, plain):
        with torch.no_grad():
            agent.actor.flat.add_(0.3 * torch.randn(agent.actor.flat.shape, generator=torch.Generator().manual_seed(5)))
    obs = 3.0 * torch.randn(2 * runs, 4, generator=torch.Generator().manual_seed(6))
    for _ in range(2):  # the streams stay together
        ours, theirs = (agent.act(obs, deterministic=deterministic).action for agent in (fused, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    many = obs.repeat(40, 1)
    ours, theirs = (agent.act(many, deterministic=deterministic).action for agent in (fused, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_one_version_is_compiled_for_every_kind_of_minibatch(make_agent, make_batch) -> None:
    from rlopt.fast.fused_sac import update_phases

    agent, batch = make_agent("sac"), make_batch(make_agent("sac"), 0)
    agent.update(batch)
    versions = len(update_phases.signatures)
    packed = torch.cat([batch.obs, batch.next_obs.flip(0)], 1)
    agent.update(batch._replace(obs=packed[:, :4], next_obs=packed[:, 4:], weight=torch.rand(8, 2)[:, 0]))
    agent.update(batch._replace(obs=batch.obs.double(), reward=batch.reward.double()))
    assert len(update_phases.signatures) == versions == 1


def test_a_refused_product_is_an_error(make_agent, make_batch) -> None:
    agent = make_agent("sac")
    agent.fused.memory.products[1] = 1  # what compiled code leaves when torch's function fails
    with pytest.raises(RuntimeError, match=r"agent\.fused=false"):
        agent.update(make_batch(agent, 0))
    agent.update(make_batch(agent, 0))


@pytest.mark.parametrize("hidden", [(16,), (16, 16), (24, 16, 8)])
@pytest.mark.parametrize("name", ["critic", "actor"])
def test_bfloat16_products_agree_with_the_readable_networks(name, hidden, make_agent, make_batch) -> None:
    options = {"network": NetworkConfig(hidden=hidden), "precision": "bf16"}
    fused, plain = (make_agent("sac", fused=f, **options) for f in (True, False))
    exact = make_agent("sac", fused=False, network=NetworkConfig(hidden=hidden))
    for agent in (fused, plain, exact):
        agent.update(make_batch(agent, 3))
    ours, theirs, full = (getattr(a, f"{name}_optimiser").grad for a in (fused, plain, exact))
    scale = full.abs().max()
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=0.0, atol=0.02)
    torch.testing.assert_close(ours / scale, full / scale, rtol=0.0, atol=0.05)
    # One hidden layer has no product between hidden layers; more have, and then rounding shows.
    assert torch.allclose(theirs, full, rtol=1e-5, atol=1e-7) == (len(hidden) == 1)


@pytest.mark.parametrize("runs", [1, 4])
def test_two_lanes_compute_the_same_bits_as_one(runs: int, make_agent, make_batch) -> None:
    agents = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        agent = make_agent("sac", runs=runs)
        assert agent.fused.lanes.count == threads
        for i in range(5):
            agent.update(make_batch(agent, i, size=8 * runs))
        agents.append(agent)
    torch.set_num_threads(1)
    for net in ("actor", "critic", "target"):
        assert torch.equal(getattr(agents[0], net).flat, getattr(agents[1], net).flat)


@pytest.mark.parametrize("runs", [1, 2])
def test_a_copy_learns_alone_and_a_pickle_is_refused(runs: int, make_agent, make_batch) -> None:
    agent = make_agent("sac", runs=runs)
    batches = [make_batch(agent, i, size=8 * runs) for i in range(3)]
    agent.update(batches[0])
    twin = copy.deepcopy(agent)
    before = agent.critic.flat.clone()
    twin.update(batches[1])
    assert torch.equal(agent.critic.flat, before)
    agent.update(batches[1])
    for name in ("actor", "critic", "target"):
        assert torch.equal(getattr(agent, name).flat, getattr(twin, name).flat)
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(agent.fused if runs == 1 else agent.fused.runs[0])


@pytest.mark.parametrize("member", [0, 1])
@pytest.mark.parametrize("net", ["target", "critic"])
def test_one_critic_that_is_not_a_number_is_not_hidden_by_the_other(net, member, make_agent, make_batch) -> None:
    agents = [make_agent("sac", fused=fused, temperature=0.2) for fused in (True, False)]
    for agent in agents:
        getattr(agent, net).params["body.layers.0.weight"].data[member].fill_(float("nan"))
        before = agent.actor.flat.clone(), agent.critic.flat.clone()
        agent.update(make_batch(agent, 1))
        assert agent.guard.first_bad() == "critic loss"
        assert torch.equal(agent.actor.flat, before[0])
        assert torch.equal(agent.critic.flat.nan_to_num(), before[1].nan_to_num())


def test_a_learning_rate_or_target_entropy_set_by_hand_is_obeyed(make_agent, make_batch) -> None:
    fused, plain = (make_agent("sac", fused=f) for f in (True, False))
    for agent in (fused, plain):
        agent.update(make_batch(agent, 0))
        agent.critic_optimiser.learning_rate = 0.0
        agent.actor_optimiser.max_grad_norm = 1e-3
        agent.temperature.target_entropy = 50.0
    critic = fused.critic.flat.clone()
    for i in (1, 2):
        for agent in (fused, plain):
            agent.update(make_batch(agent, i))
    assert torch.equal(fused.critic.flat, critic)
    assert fused.temperature.value > 1.0  # it was sinking before
    torch.testing.assert_close(fused.temperature.value, plain.temperature.value)
    torch.testing.assert_close(fused.actor.flat, plain.actor.flat, rtol=1e-4, atol=1e-6)
