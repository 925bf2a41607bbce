"""Flat parameters, seeded construction, and losses that map over runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn
from torch.utils._pytree import tree_map

from rlopt.agents import SAC, SAC2018, Agent, DiscreteSAC, sac, sac_2018, sac_discrete
from rlopt.agents.temperature import temperature_loss
from rlopt.buffers import Batch
from rlopt.nn import Critic, Net, NetworkConfig, Params, build_seeded

SMALL = NetworkConfig(hidden=(8,))


def net(seed: int = 0) -> Net:
    return Net(build_seeded(lambda: Critic(spaces.Box(-1, 1, (3,)), SMALL, action_features=2), seed))


def test_build_seeded_depends_on_its_seed_alone_and_touches_nothing_global() -> None:
    torch.manual_seed(1)
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first = net(7)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(net(7).flat, first.flat)
    assert not torch.equal(net(8).flat, first.flat)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_build_seeded_restores_the_generator_after_an_error() -> None:
    before = torch.random.get_rng_state()

    def fails() -> nn.Module:
        torch.rand(3)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        build_seeded(fails, 0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_leaves_are_views_of_the_flat_tensor() -> None:
    n = net()
    assert n.flat.numel() == sum(p.numel() for p in n.module.parameters())
    assert list(n.params) == [name for name, _ in n.module.named_parameters()]
    assert torch.equal(torch.cat([leaf.detach().flatten() for leaf in n.leaves]), n.flat)
    n.flat.fill_(0.5)
    assert all((p == 0.5).all() for p in n.module.parameters())
    with torch.no_grad():
        n.leaves[0].fill_(2.0)
    assert (n.flat[: n.leaves[0].numel()] == 2.0).all()


def test_calls_with_other_parameters() -> None:
    one, two = net(0), net(1)
    obs, action = torch.randn(4, 3), torch.randn(4, 2)
    assert torch.equal(one(one.params, obs, action), one.module(obs, action))
    assert torch.equal(one(dict(one.params), obs, action), one.module(obs, action))
    assert torch.equal(one(two.params, obs, action), two.module(obs, action))


def test_a_target_is_a_frozen_copy_that_follows() -> None:
    source = net()
    target = source.target()
    assert torch.equal(target.flat, source.flat)
    assert target.flat.untyped_storage().data_ptr() != source.flat.untyped_storage().data_ptr()
    assert not any(p.requires_grad for p in target.leaves) and all(p.requires_grad for p in source.leaves)
    before = target.flat.clone()
    source.flat.add_(1.0)
    assert torch.equal(target.flat, before)
    target.follow(source, 0.1)
    torch.testing.assert_close(target.flat, before + 0.1)
    target.follow(source, 1.0)
    torch.testing.assert_close(target.flat, source.flat)


class Counts(nn.Module):
    """Adds what it has counted (an integer) and a running mean, and moves the mean at each call; a constant aside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("constant", torch.tensor(torch.inf), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).squeeze(-1) + self.mean + self.count


def test_buffers_follow_and_are_seen_by_whoever_calls_with_them() -> None:
    source = Net(build_seeded(Counts, 0))
    target = source.target()
    assert set(source.buffers) == {"mean", "count"} and set(source.params) == {*source.buffers, *leaf_names(source)}
    assert len(source.leaves) == 2 and source.flat.numel() == 3
    source.module.mean.fill_(8.0)
    source.module.count.fill_(3)
    target.follow(source, 0.25)
    assert (target.module.mean, target.module.count) == (2.0, 3)
    assert target.module.constant == torch.inf
    x = torch.randn(4, 2)
    torch.testing.assert_close(source(target.params, x), target.module(x))
    again = Net(build_seeded(Counts, 1))
    again.load_state_dict(source.state_dict())
    assert again.params["mean"] == 8.0 and torch.equal(again(again.params, x), source(source.params, x))


def leaf_names(one: Net) -> set[str]:
    return {name for name, _ in one.module.named_parameters()}


def test_stacked_buffers_are_those_of_the_modules() -> None:
    both = Net([build_seeded(Counts, seed) for seed in range(2)])
    target = both.target()
    both.buffers["mean"].copy_(torch.tensor([4.0, 8.0]))
    both.buffers["count"].copy_(torch.tensor([1, 2]))
    assert [(m.mean.item(), m.count.item()) for m in both.modules] == [(4.0, 1), (8.0, 2)]
    x = torch.randn(2, 5, 2)
    found = torch.vmap(both)(both.params, x)
    for r, module in enumerate(both.modules):
        torch.testing.assert_close(found[r], module(x[r]))
    target.follow(both, 0.5)
    assert [(m.mean.item(), m.count.item()) for m in target.modules] == [(2.0, 1), (4.0, 2)]
    again = Net([build_seeded(Counts, 7) for _ in range(2)])
    again.load_state_dict(both.state_dict())
    assert again.buffers["mean"].tolist() == [4.0, 8.0] and again.modules[1].count == 2


@pytest.mark.parametrize("runs", [1, 2])
def test_frozen_leaves_are_known_by_name(runs: int) -> None:
    def factory() -> nn.Module:
        module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        module[0].requires_grad_(False)  # an encoder that was learnt elsewhere
        return module

    one = Net([build_seeded(factory, seed) for seed in range(runs)])
    assert one.frozen == ("0.weight", "0.bias")
    one.leaves[2].requires_grad_(False)
    assert one.frozen == ("0.weight", "0.bias", "1.weight")
    assert len(one.target().frozen) == 4
    assert net().frozen == ()


def test_state_round_trip_and_strictness() -> None:
    one, two = net(0), net(1)
    state = one.state_dict()
    flat = two.flat
    two.load_state_dict(state)
    assert two.flat is flat and torch.equal(flat, one.flat)
    assert all((p.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()) for p in two.leaves)
    one.flat.zero_()
    assert any(tensor.any() for tensor in state.values())  # copies
    for broken in (dict(list(state.items())[1:]), {**state, "extra": torch.zeros(1)}):
        with pytest.raises(RuntimeError):
            two.load_state_dict(broken)
    name = next(iter(state))
    with pytest.raises(RuntimeError):
        two.load_state_dict({**state, name: torch.zeros(1)})


# --- the run axis: what one run computes, R stacked runs compute at once --------------------------------------------

R, B = 3, 5
SPACE = spaces.Box(-1, 1, (4,))


def stack(trees: list[Params]) -> Params:
    return {k: torch.stack([tree[k].detach() for tree in trees]) for k in trees[0]}


def batches(discrete: bool) -> list[Batch]:
    g = torch.Generator().manual_seed(0)
    return [
        Batch(
            obs=torch.randn(B, 4, generator=g),
            action=torch.randint(3, (B,), generator=g) if discrete else torch.rand(B, 2, generator=g),
            reward=torch.randn(B, generator=g),
            next_obs=torch.randn(B, 4, generator=g),
            terminated=torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0]),
            discount=torch.full((B,), 0.9),
            weight=torch.rand(B, generator=g),
            index=torch.arange(B),
        )
        for _ in range(R)
    ]


def losses(cls: type[Agent]) -> tuple[list[Any], Any, Any]:
    """R agents, and each of their losses as (function of its own parameters and run data, run data)."""
    space = spaces.Discrete(3) if cls is DiscreteSAC else spaces.Box(-1, 1, (2,))
    config = cls.config_class(network=SMALL)
    agents: list[Any] = [cls(SPACE, space, config, seed=i) for i in range(R)]
    nets = agents[0].nets
    noise = torch.randn(R, 2, B, 2, generator=torch.Generator().manual_seed(1))
    data = []
    for i, (agent, batch) in enumerate(zip(agents, batches(cls is DiscreteSAC), strict=True)):
        params = {k: getattr(agent, k).params for k in ("actor", "critic", "target")}
        params["value"] = agent.value.params if cls is SAC2018 else {}
        data.append({**params, "batch": batch, "noise": noise[i], "log_alpha": torch.tensor([0.1 * i - 1.0])})

    def alpha(d: Any) -> torch.Tensor:
        return d["log_alpha"].exp().squeeze(0)

    if cls is SAC:
        functions = {
            "critic": lambda p, d: sac.critic_loss(
                nets, p, d["actor"], d["target"], alpha(d), d["batch"], d["noise"][0]
            ),
            "actor": lambda p, d: sac.actor_loss(nets, p, d["critic"], alpha(d), d["batch"].obs, d["noise"][1]),
            "log_alpha": lambda p, d: (temperature_loss(p, d["batch"].reward, -2.0), {}),
        }
    elif cls is SAC2018:
        functions = {
            "value": lambda p, d: sac_2018.value_loss(nets, p, d["actor"], d["critic"], d["batch"].obs, d["noise"][0]),
            "critic": lambda p, d: sac_2018.critic_loss(nets, p, d["target"], d["batch"], 5.0),
            "actor": lambda p, d: sac_2018.actor_loss(nets, p, d["critic"], d["batch"].obs, d["noise"][1], 1e-3),
        }
    else:
        functions = {
            "critic": lambda p, d: sac_discrete.critic_loss(nets, p, d["actor"], d["target"], alpha(d), d["batch"]),
            "actor": lambda p, d: sac_discrete.actor_loss(nets, p, d["critic"], alpha(d), d["batch"].obs),
        }
    return agents, functions, data


def stacked(trees: list[Any]) -> Any:
    first = trees[0]
    if first is None:
        return None
    if isinstance(first, Batch):
        return Batch(*(stacked([getattr(t, f) for t in trees]) for f in Batch._fields))
    if isinstance(first, dict):
        return {k: stacked([t[k] for t in trees]) for k in first}
    return torch.stack([t.detach() for t in trees])


@pytest.mark.parametrize("cls", [SAC, SAC2018, DiscreteSAC])
def test_losses_map_over_runs(cls: type[Agent]) -> None:
    """vmap of each loss over stacked parameters, and one backward of the sum, equal a loop over the runs."""
    _, functions, data = losses(cls)
    everything = stacked(data)
    for name, function in functions.items():
        own = everything[name]
        own = {k: v.requires_grad_() for k, v in own.items()} if isinstance(own, dict) else own.requires_grad_()
        rest = {k: v for k, v in everything.items() if k != name}
        inputs = (own, {**rest, name: own})
        dims = tree_map(lambda x: 0 if isinstance(x, torch.Tensor) else None, inputs)  # a batch lacks optional parts
        loss, metrics = torch.func.vmap(function, dims, randomness="error")(*inputs)
        assert loss.shape == (R,)
        leaves = list(own.values()) if isinstance(own, dict) else [own]
        together = torch.autograd.grad(loss.sum(), leaves)
        for run in range(R):
            mine = data[run][name] if isinstance(own, dict) else data[run][name].requires_grad_()
            one, one_metrics = function(mine, data[run])
            torch.testing.assert_close(loss[run], one, rtol=1e-5, atol=1e-6)
            for key, value in one_metrics.items():
                torch.testing.assert_close(metrics[key][run], value, rtol=1e-5, atol=1e-6)
            alone = torch.autograd.grad(one, list(mine.values()) if isinstance(mine, dict) else [mine])
            for a, b in zip(together, alone, strict=True):
                torch.testing.assert_close(a[run], b, rtol=1e-4, atol=1e-6)


def test_losses_map_over_runs_with_indices_in_the_observation() -> None:
    """One-hot encoding must map too."""
    space = spaces.Dict({"place": spaces.Discrete(4), "speed": spaces.Box(-1, 1, (2,))})
    agents: list[Any] = [
        DiscreteSAC(space, spaces.Discrete(3), DiscreteSAC.config_class(network=SMALL), seed=i) for i in range(R)
    ]
    obs = {"place": torch.randint(4, (R, B)), "speed": torch.randn(R, B, 2)}
    actor, critic = (stack([getattr(a, k).params for a in agents]) for k in ("actor", "critic"))
    alpha = torch.tensor(0.2)
    loss = torch.func.vmap(lambda p, c, o: sac_discrete.actor_loss(agents[0].nets, p, c, alpha, o)[0])(
        actor, critic, obs
    )
    for run, agent in enumerate(agents):
        alone, _ = sac_discrete.actor_loss(
            agent.nets, agent.actor.params, agent.critic.params, alpha, {k: v[run] for k, v in obs.items()}
        )
        torch.testing.assert_close(loss[run], alone.detach())
