"""Nothing that an agent changes while it learns may be missing from its state."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.agents import SAC, Agent
from rlopt.buffers import ReplayBuffer
from rlopt.nn import NetworkConfig, Optimiser, OptimiserConfig, Schedule
from rlopt.types import Clock, RloptError
from tests.agents.cases import (
    ACTOR_CRITICS,
    AGENTS,
    GRADIENT_LEARNERS,
    LEARNERS,
    every_gradient_learner,
    every_learner,
    every_variant,
    known,
)
from tests.agents.completeness import tensors_of, unregistered

# --- completeness, by walking the object ----------------------------------------------------------------------------


def check(make: Any, make_data: Any) -> list[str]:
    """Two agents of different seeds after different numbers of updates: what they agree on is constant."""
    one, other = make(seed=0), make(seed=1)
    for i in range(3):
        one.update(make_data(one, i))
    return unregistered(one, tensors_of(other))


@every_gradient_learner
def test_every_tensor_optimiser_and_generator_is_registered(name: str, make_agent, make_data) -> None:
    assert check(lambda seed: make_agent(name, seed=seed), make_data) == []


@pytest.mark.parametrize("forgotten", ["tensor", "optimiser", "torch_optimiser", "generator", "nested"])
def test_the_walk_notices_what_was_forgotten(forgotten: str, make_agent, make_batch) -> None:
    """The test above is worth something only if it fails when it should."""

    class Forgetful(SAC):
        def build(self) -> None:
            super().build()
            self.average = torch.tensor(float(self.seed))
            if forgotten == "nested":
                self.stash = [{"deep": (torch.tensor([1.0 + self.seed]),)}]
            if forgotten == "optimiser":
                self.more = Optimiser(self.temperature.log.detach(), 1e-3, OptimiserConfig())
            if forgotten == "torch_optimiser":
                self.more = torch.optim.Adam([self.temperature.log])
            if forgotten == "generator":
                self.more = torch.Generator()
            if forgotten != "tensor":
                self.persist("average", self.average)

    Forgetful.__module__ = "rlopt.agents.forgetful"
    base = make_agent("sac")
    missing = check(lambda seed: Forgetful(base.spec, base.config, seed=seed), make_batch)
    path = {"tensor": "agent.average", "nested": "agent.stash[0]['deep'][0]"}.get(forgotten, "agent.more")
    assert path in missing


# --- completeness, by what it promises ------------------------------------------------------------------------------


def assert_same(a: Any, b: Any, path: str = "") -> None:
    """Two state trees are equal to the bit."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path


@every_variant
def test_a_fresh_agent_of_another_seed_continues_exactly(name: str, options, make_agent, make_data) -> None:
    straight = make_agent(name, seed=0, **options)
    obs = torch.randn(3, 4, generator=torch.Generator().manual_seed(9))

    def go(agent: Agent, first: int) -> list[Any]:
        seen: list[Any] = []
        for i in range(first, first + 5):
            agent.clock.env_steps = 2 * i
            seen.append(agent.act(obs, agent.initial_carry(3)).action)
            update = agent.update(make_data(agent, i))
            seen += [x for x in (update.priority, *update.metrics.values()) if x is not None]
        return seen

    saved = make_agent(name, seed=0, **options)
    go(straight, 0)
    go(saved, 0)
    state = saved.state_dict()
    go(saved, 50)  # the state is a copy: going on does not change it
    resumed = make_agent(name, seed=1, **options)
    resumed.load_state_dict(state)
    assert_same(resumed.state_dict(), state)
    for a, b in zip(go(straight, 5), go(resumed, 5), strict=True):
        assert torch.equal(a, b)
    assert_same(straight.state_dict(), resumed.state_dict())


@every_gradient_learner
def test_loading_changes_no_object_identity(name: str, make_agent) -> None:
    """The exported policy and the losses share tensors with the agent: a state is copied into them."""
    agent, other = make_agent(name, seed=0), make_agent(name, seed=1)
    policy, flats = agent.policy, {net: getattr(agent, net).flat for net in AGENTS[name].nets}
    agent.load_state_dict(other.state_dict())
    for net, flat in flats.items():
        assert getattr(agent, net).flat is flat
        assert torch.equal(flat, getattr(other, net).flat)
    for mine, theirs in zip(policy.actor.parameters(), other.policy.actor.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_configuration_made_by_hand_is_checked_like_any_other(make_agent) -> None:
    for options, told in (
        ({"batch_size": 0}, "agent.batch_size: must be at least 1, got 0"),
        ({"gamma": 5.0}, "agent.gamma: must be at most 1, got 5"),
        ({"lr_schedule": "liner"}, "agent.lr_schedule: no such choice 'liner'; did you mean linear?"),
        ({"network": NetworkConfig(hidden=(0,))}, "agent.network.hidden: must be at least 1, got 0"),
    ):
        with pytest.raises(RloptError, match=re.escape(told)):
            make_agent("sac", **options)


def test_a_state_of_another_agent_is_refused(make_agent) -> None:
    agent = make_agent("sac")
    with pytest.raises(KeyError, match="value"):
        agent.load_state_dict(make_agent("sac_2018").state_dict())
    with pytest.raises(KeyError, match="temperature_optimiser"):
        agent.load_state_dict(make_agent("sac", temperature=0.2).state_dict())


def test_same_seed_same_agent_and_other_seed_another(make_agent) -> None:
    for name in GRADIENT_LEARNERS:
        a, b, c = make_agent(name, seed=4), make_agent(name, seed=4), make_agent(name, seed=5)
        assert_same(a.state_dict(), b.state_dict())
        for net in AGENTS[name].nets:
            assert not torch.equal(getattr(a, net).flat, getattr(c, net).flat)


def test_building_and_running_leave_the_global_generators_alone(make_agent, make_data) -> None:
    before = torch.random.get_rng_state()
    for name in GRADIENT_LEARNERS:
        agent = make_agent(name, **known(name, warmup_steps=1))
        agent.act(torch.zeros(1, 4))
        agent.clock.env_steps = 1
        agent.act(torch.zeros(1, 4))
        agent.update(make_data(agent, 0))
    assert torch.equal(torch.random.get_rng_state(), before)


# --- acting ---------------------------------------------------------------------------------------------------------


@every_gradient_learner
def test_acting_warm_up_samples_and_mode(name: str, make_agent) -> None:
    agent = make_agent(name, **known(name, warmup_steps=10))
    space, obs = agent.spec.action_space, torch.zeros(2000, 4)
    warm = agent.act(obs).action
    assert all(space.contains(a) for a in warm[:50].numpy())
    if name not in LEARNERS:  # on policy there is no warm-up
        pass
    elif isinstance(space, spaces.Discrete):
        shares = [(warm == k).float().mean().item() for k in (2, 3, 4)]
        assert shares == pytest.approx([1 / 3] * 3, abs=0.05)
    else:
        assert warm.mean(0).tolist() == pytest.approx([0.0, 0.0], abs=0.02)
        assert warm.var(0).tolist() == pytest.approx([0.8**2 / 12] * 2, rel=0.1)
    mode = agent.act(obs, deterministic=True).action  # the warm-up does not concern evaluation
    assert (mode == mode[0]).all()
    assert torch.equal(mode, agent.act(obs, deterministic=True).action)
    agent.clock.env_steps = 10
    sampled = agent.act(obs).action
    assert all(space.contains(a) for a in sampled[:50].numpy())
    assert not torch.equal(sampled, warm) and not (sampled == sampled[0]).all()
    assert sampled.dtype == warm.dtype == mode.dtype


def test_agents_refuse_action_spaces_they_cannot_act_in(make_agent) -> None:
    box, discrete = spaces.Box(-1, 1, (2,)), spaces.Discrete(3)
    unbounded = spaces.Box(-torch.inf, torch.inf, (2,))
    jagged = spaces.Box(-torch.arange(1.0, 41.0).numpy(), torch.arange(1.0, 41.0).numpy())
    for name, space, words in [
        ("sac", discrete, "agent=sac_discrete"),
        ("sac_2018", discrete, "agent=sac_discrete"),
        ("sac", unbounded, "finite bounds"),
        ("sac_discrete", box, "agent=sac"),
        ("sac_discrete", jagged, "agent=sac"),
        ("sac_discrete", spaces.MultiDiscrete([2, 2]), "agent=ppo"),
        ("sac", spaces.MultiDiscrete([2, 2]), "agent=ppo"),
    ]:
        with pytest.raises(RloptError, match=words) as error:
            make_agent(name, action_space=space)
        assert "\n" not in str(error.value)


# --- the course of an update ----------------------------------------------------------------------------------------


@every_gradient_learner
def test_update_advances_the_clock_and_reports(name: str, make_agent, make_data) -> None:
    agent = make_agent(name)
    update = agent.update(make_data(agent, 0))
    optimisers = agent.registered(Optimiser)
    assert agent.clock.updates == max(o.count.item() for o in optimisers) and agent.clock.env_steps == 0
    assert all(m.shape == () and not m.requires_grad and m.isfinite() for m in update.metrics.values())
    if name not in LEARNERS:
        assert {"policy_loss", "entropy"} <= update.metrics.keys() and update.priority is None
        return
    assert update.priority.shape == (8,) and (update.priority >= 0).all()
    assert {"critic_loss", "q"} <= update.metrics.keys()
    assert ("actor_loss" in update.metrics) == (name in ACTOR_CRITICS)
    # A deterministic actor has none.
    assert ("entropy" in update.metrics) == (name in ACTOR_CRITICS and "td3" not in name)


def test_policy_delay_spaces_actor_and_temperature(make_agent, make_batch) -> None:
    agent = make_agent("sac", policy_delay=3)
    moved = []
    for i in range(7):
        before = [agent.critic.flat.clone(), agent.actor.flat.clone(), agent.temperature.log.detach().clone()]
        agent.update(make_batch(agent, i))
        after = [agent.critic.flat, agent.actor.flat, agent.temperature.log]
        moved.append([not torch.equal(a, b) for a, b in zip(before, after, strict=True)])
    assert moved == [[True, i % 3 == 0, i % 3 == 0] for i in range(7)]


def test_a_fixed_temperature_stays(make_agent, make_batch) -> None:
    for name in ("sac", "sac_discrete"):
        agent = make_agent(name, temperature=0.2)
        for i in range(3):
            update = agent.update(make_batch(agent, i))
        assert update.metrics["temperature"].item() == pytest.approx(0.2)
        assert "temperature_optimiser" not in agent.state_dict()


@every_learner
def test_targets_follow_by_tau(name: str, make_agent, make_batch) -> None:
    agent = make_agent(name, tau=0.25)
    source = agent.value if name == "sac_2018" else agent.critic
    before = agent.target.flat.clone()
    agent.update(make_batch(agent, 0))
    torch.testing.assert_close(agent.target.flat, 0.75 * before + 0.25 * source.flat)
    assert not torch.equal(agent.target.flat, before)
    assert not any(p.requires_grad for p in agent.target.module.parameters())


def test_learning_rate_schedules() -> None:
    clock = Clock(env_steps=25)
    assert Schedule().factor(clock) == 1.0
    assert Schedule("linear", 100).factor(clock) == 0.75
    assert Schedule("linear", 100, final=0.2).factor(clock) == pytest.approx(0.2 + 0.8 * 0.75)
    assert Schedule("cosine", 100).factor(clock) == pytest.approx(0.8535534)  # ½ (1 + cos π/4)
    clock.env_steps = 1000
    assert Schedule("linear", 100, final=0.2).factor(clock) == pytest.approx(0.2)
    with pytest.raises(RloptError, match="schedule_steps"):
        Schedule("linear")


@pytest.mark.parametrize("name", [name for name in GRADIENT_LEARNERS if known(name, lr_schedule="")])
def test_every_learning_rate_follows_the_schedule(name: str, make_agent, make_data) -> None:
    """At the end of a schedule that falls to 0 nothing moves any more."""
    agent = make_agent(name, lr_schedule="linear", schedule_steps=10)
    agent.update(make_data(agent, 0))
    agent.clock.env_steps = 100
    before = agent.state_dict()
    agent.update(make_data(agent, 1))
    after = agent.state_dict()
    for key in (*AGENTS[name].nets, "log_temperature"):
        if key in before:
            assert_same(before[key], after[key], key)


def test_separate_learning_rates(make_agent) -> None:
    for name in ("sac", "sac_discrete"):
        agent = make_agent(name, learning_rate=1e-3, actor_learning_rate=1e-4, temperature_learning_rate=1e-5)
        rates = [agent._persistent[f"{part}_optimiser"].learning_rate for part in ("critic", "actor", "temperature")]
        assert rates == [1e-3, 1e-4, 1e-5]


@every_gradient_learner
def test_gradients_are_clipped_to_their_norm(name: str, make_agent, make_data) -> None:
    """With SGD without momentum and a learning rate of 1 the step is the clipped gradient itself."""
    once = {"optimiser": OptimiserConfig(name="sgd", beta1=0.0), **known(name, epochs=1), "batch_size": 8}
    once = known(name, **once)
    net = AGENTS[name].nets[-1]
    agent = make_agent(name, **once, learning_rate=1.0, max_grad_norm=1e-3)
    before = getattr(agent, net).flat.clone()
    batch = make_data(agent, 0)
    agent.update(batch._replace(reward=100.0 * batch.reward))
    assert (getattr(agent, net).flat - before).norm().item() == pytest.approx(1e-3, rel=1e-2)
    loose, never = (make_agent(name, **once, learning_rate=1e-3, max_grad_norm=norm) for norm in (1e9, None))
    for other in (loose, never):
        other.update(batch)
    assert torch.equal(getattr(loose, net).flat, getattr(never, net).flat)


@pytest.mark.parametrize("fused", [True, False])
def test_actions_of_a_box_keep_its_shape_and_are_what_they_are_in_a_row(fused: bool, make_agent) -> None:
    found = []
    for shape in ((4,), (2, 2)):
        space = spaces.Box(-1.0, 1.0, shape, np.float32)
        agent = make_agent("sac", action_space=space, batch_size=8, fused=fused)
        buffer = ReplayBuffer(32, agent.spec.observation_space, space, num_envs=2)
        generator = torch.Generator().manual_seed(0)
        for _ in range(8):
            obs, after, reward = (torch.rand(2, *size, generator=generator) for size in ((4,), (4,), ()))
            action = agent.act(obs).action
            assert action.shape == (2, *shape)
            no = torch.zeros(2, dtype=torch.bool)
            buffer.add(obs, action, reward, after, no, no)
        agent.update(buffer.sample(8))
        assert agent.policy(np.ones(4, np.float32)).shape == shape
        found.append((action.flatten(), agent.actor.flat.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
