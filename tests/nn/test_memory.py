"""A memory: unrolling equals stepping, nothing leaks over an episode's end, and it maps over runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from rlopt.nn import Critic, Net, NetworkConfig, build_seeded, make_actor, network_options
from rlopt.nn.memory import GRU, SIZE
from rlopt.policy import Policy, load_policy, save_policy
from rlopt.registry import get_agent
from rlopt.types import Carry, EnvSpec, RloptError, map_obs, next_carry

B, L, F, H = 4, 9, 3, 5
CONFIG = NetworkConfig(hidden=(8,), memory="gru", memory_size=H)
BOX = spaces.Box(-2.0, 2.0, (2,), np.float32)
KINDS = {"squashed_gaussian": BOX, "gaussian": BOX, "deterministic": BOX, "categorical": spaces.Discrete(3, start=1)}
VECTOR = spaces.Box(-1.0, 1.0, (F,), np.float32)
IMAGE = spaces.Dict({"image": spaces.Box(0, 255, (1, 36, 36), np.uint8), "place": spaces.Discrete(4)})


def flags(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ends and valid rows (B, L): some rows are surplus, and some episodes are lost."""
    g = torch.Generator().manual_seed(seed)
    return torch.rand(B, L, generator=g) < 0.25, torch.rand(B, L, generator=g) < 0.7


def observations(space: spaces.Space[Any], seed: int = 0) -> Any:
    g = torch.Generator().manual_seed(seed)
    if isinstance(space, spaces.Dict):
        image = torch.randint(256, (B, L, 1, 36, 36), generator=g, dtype=torch.uint8)
        return {"image": image, "place": torch.randint(4, (B, L), generator=g)}
    return torch.randn(B, L, F, generator=g)


def stepped(call: Any, obs: Any, carry: Carry, initial: Carry, ended: Tensor, valid: Tensor, axis: int = 1) -> Any:
    """One step at a time, as a collector does it."""
    found = []
    for t in range(L):
        before = carry
        out, after = call(map_obs(lambda x, t=t: x[:, t], obs), before)
        carry = next_carry(before, after, initial, ended[:, t], valid[:, t])
        found.append(out)
    leaves = [f if isinstance(f, tuple) else (f,) for f in found]
    return [torch.stack(parts, axis) for parts in zip(*leaves, strict=True)], carry


def same(a: Carry, b: Carry) -> None:
    assert a is not None and b is not None and a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def test_it_is_the_gru_of_torch() -> None:
    ours, theirs = GRU(F, CONFIG), nn.GRU(F, H, batch_first=True)
    assert max(p.abs().max() for p in ours.parameters()) <= H**-0.5
    ours.input.weight, ours.input.bias = theirs.weight_ih_l0, theirs.bias_ih_l0
    ours.state.weight, ours.state.bias = theirs.weight_hh_l0, theirs.bias_hh_l0
    x, start = torch.randn(B, L, F), torch.randn(B, H)
    states, carry = ours.unroll(x, {"memory": start}, torch.zeros(B, L))
    expected, last = theirs(x, start[None])
    torch.testing.assert_close(states, expected)
    torch.testing.assert_close(carry["memory"], last[0])
    assert GRU(F, NetworkConfig(memory="gru")).size == SIZE


@pytest.mark.parametrize("space", [VECTOR, IMAGE], ids=["vector", "image"])
@pytest.mark.parametrize("kind", KINDS)
def test_unrolling_an_actor_equals_stepping_it(kind: str, space: spaces.Space[Any]) -> None:
    actor = build_seeded(lambda: make_actor(kind, space, KINDS[kind], network_options(CONFIG)), 0)
    obs, (ended, valid) = observations(space), flags()
    start, initial = {"memory": torch.randn(B, H)}, actor.initial_carry(B)
    together, carry = actor(obs, start, ended, valid)
    alone, last = stepped(actor, obs, start, initial, ended, valid)
    for a, b in zip(together if isinstance(together, tuple) else (together,), alone, strict=True):
        assert a.shape[:2] == (B, L)
        torch.testing.assert_close(a, b)
    same(carry, last)


@pytest.mark.parametrize("space", [VECTOR, IMAGE], ids=["vector", "image"])
@pytest.mark.parametrize("shape", [{"action_features": 2}, {"outputs": 3}, {"ensemble": 1}], ids=str)
def test_unrolling_a_critic_equals_stepping_it(shape: dict[str, int], space: spaces.Space[Any]) -> None:
    critic = build_seeded(lambda: Critic(space, CONFIG, **shape), 0)
    members = shape.get("ensemble", 2)
    obs, (ended, valid) = observations(space), flags()
    actions = torch.randn(B, L, 2) if "action_features" in shape else None
    start = {"memory": torch.randn(B, members, H)}
    together, carry = critic(obs, actions, start, ended, valid)
    assert together.shape == ((members, B, L, 3) if "outputs" in shape else (members, B, L))
    steps = iter(range(L))

    def one(o: Any, c: Carry) -> Any:
        t = next(steps)
        return critic(o, None if actions is None else actions[:, t], c)

    alone, last = stepped(one, obs, start, critic.initial_carry(B), ended, valid, axis=2)
    torch.testing.assert_close(together, alone[0])
    same(carry, last)


def test_the_members_of_a_critic_remember_apart() -> None:
    critic = Critic(VECTOR, CONFIG, outputs=3)
    q, _ = critic(observations(VECTOR), None, critic.initial_carry(B), torch.zeros(B, L))
    gradients = torch.autograd.grad(q[0].sum(), list(critic.parameters()))
    assert all(not g[1].any() and g[0].any() for g in gradients)


def test_nothing_leaks_over_the_end_of_an_episode() -> None:
    actor = make_actor("categorical", VECTOR, spaces.Discrete(3), network_options(CONFIG))
    obs, ended = observations(VECTOR), torch.zeros(B, L, dtype=torch.bool)
    ended[:, 3] = True
    before, _ = actor(obs, actor.initial_carry(B), ended)
    changed = obs.clone()
    changed[:, :4] += 1.0
    after, _ = actor(changed, actor.initial_carry(B), ended)
    assert torch.equal(before[:, 4:], after[:, 4:])
    assert not torch.isclose(before[:, :4], after[:, :4]).any()
    # Nothing but the end stops it.
    on, _ = actor(changed, actor.initial_carry(B), torch.zeros_like(ended))
    assert not torch.isclose(on[:, 4], before[:, 4]).any()


def test_not_a_number_before_an_end_does_not_survive_it() -> None:
    memory, ended = GRU(F, CONFIG), torch.zeros(B, L)
    ended[:, 1] = 1.0
    x = observations(VECTOR)
    x[:, 0] = float("nan")
    states, _ = memory.unroll(x, memory.initial_carry(B), ended)
    assert states[:, 1].isnan().all() and states[:, 2:].isfinite().all()


@pytest.mark.parametrize("space", [VECTOR, IMAGE], ids=["vector", "image"])
def test_it_maps_over_runs(space: spaces.Space[Any]) -> None:
    """Three runs at once are three runs alone, and so are the gradients."""

    def factory() -> nn.Module:
        return make_actor("gaussian", space, BOX, network_options(CONFIG))

    alone = [Net(build_seeded(factory, seed)) for seed in range(3)]
    stacked = Net([build_seeded(factory, seed) for seed in range(3)])
    data = [(observations(space, r), {"memory": torch.randn(B, H)}, flags(r)[0]) for r in range(3)]

    def loss(net: Net, params: Any, obs: Any, carry: Any, ended: Tensor) -> Tensor:
        (mean, log_std), last = net(params, obs, carry, ended)
        return (mean.sin() * log_std.exp()).sum() + last["memory"].sum()

    obs: Any = [d[0] for d in data]
    obs = {k: torch.stack([o[k] for o in obs]) for k in obs[0]} if isinstance(obs[0], dict) else torch.stack(obs)
    carry, ended = {"memory": torch.stack([d[1]["memory"] for d in data])}, torch.stack([d[2] for d in data])
    losses = torch.vmap(lambda p, o, c, e: loss(stacked, p, o, c, e))(stacked.params, obs, carry, ended)
    gradients = torch.autograd.grad(losses.sum(), stacked.leaves)
    for r, net in enumerate(alone):
        one = loss(net, net.params, *data[r])
        torch.testing.assert_close(losses[r], one)
        for g, expected in zip(gradients, torch.autograd.grad(one, net.leaves), strict=True):
            torch.testing.assert_close(g[r], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_policy_remembers(tmp_path: Path, kind: str) -> None:
    actor = build_seeded(lambda: make_actor(kind, VECTOR, KINDS[kind], network_options(CONFIG)), 0)
    policy = Policy(EnvSpec("Test-v0", VECTOR, KINDS[kind]), actor)
    save_policy(policy, tmp_path)
    loaded = load_policy(tmp_path)
    assert loaded.recurrent and loaded.actor.options["memory"] == "gru" and loaded.actor.options["memory_size"] == H
    for deterministic in (True, False):
        carries = [p.initial_carry() for p in (policy, loaded)]
        for t in range(3):
            obs = np.full(F, 0.5 * t)
            answers = [
                p(obs, c, deterministic, torch.Generator().manual_seed(t))
                for p, c in zip((policy, loaded), carries, strict=True)
            ]
            # The loaded weights lie as trained ones do, which may round the last bit differently.
            np.testing.assert_allclose(answers[0][0], answers[1][0], rtol=1e-5, atol=1e-6)
            carries = [answer[1] for answer in answers]
    with pytest.raises(RloptError, match="keep its carry"):
        loaded(np.zeros(F))
    with pytest.raises(RloptError, match="needs its carry"):
        loaded.act(torch.zeros(1, F))


def test_agents_that_learn_from_single_steps_refuse_a_memory() -> None:
    cls = get_agent("sac")
    with pytest.raises(RloptError, match=r"agent\.network\.memory=gru: agent=sac learns from single steps"):
        cls(VECTOR, BOX, cls.config_class(network=CONFIG))
