"""PPO: its losses by hand, its details, and what it learns."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.agents import ppo
from rlopt.agents.ppo import PPO, PPOConfig, diagnostics, normalised, policy_loss, value_loss
from rlopt.agents.rollout_agent import generalised_advantages
from rlopt.buffers import Rollout
from rlopt.envs import Normalizer
from rlopt.envs.classic import CartPole
from rlopt.envs.t_maze import TMaze
from rlopt.envs.torch_env import TorchEnv
from rlopt.loops.evaluation import run_episodes
from rlopt.loops.rollout import RolloutLoop
from rlopt.nn import GaussianActor, NetworkConfig, OptimiserConfig
from rlopt.policy import Policy, load_policy, save_policy
from rlopt.types import EnvSpec, Obs, RloptError, map_obs

OBS, BOX = spaces.Box(-10, 10, (3,)), spaces.Box(-2, 2, (2,))
SGD = OptimiserConfig(name="sgd", beta1=0.0)


def network(**options: Any) -> NetworkConfig:
    return NetworkConfig(**{"hidden": (16,), "activation": "tanh", "init": "orthogonal", **options})


def make(action_space: Any = BOX, observation_space: Any = OBS, seed: int = 0, **options: Any) -> PPO:
    options = {"rollout_steps": 8, "batch_size": 8, "epochs": 2, "network": network(), **options}
    return PPO(EnvSpec("test", observation_space, action_space), PPOConfig(**options), seed=seed)


def rollout(agent: PPO, steps: int = 8, envs: int = 2, seed: int = 0) -> Rollout:
    """A rollout of the agent's own actions, in which some episodes end and others are cut."""
    g = torch.Generator().manual_seed(seed)
    obs, next_obs = torch.randn(2, steps, envs, 3, generator=g)
    acts = [agent.act(x) for x in obs]
    reward, chance = torch.randn(steps, envs, generator=g), torch.rand(steps, envs, generator=g)
    extras = {name: torch.stack([act.extras[name] for act in acts]) for name in agent.extra_fields}
    action, valid = torch.stack([act.action for act in acts]), torch.ones_like(chance, dtype=torch.bool)
    agent.clock.env_steps += steps * envs
    return Rollout(
        obs, action, reward, next_obs, chance < 0.1, chance > 0.9, (chance < 0.1) | (chance > 0.9), valid, extras
    )


# --- advantages (by hand: γ = 0.9, λ = 0.8) ---------------------------------------------------------------------------

REWARD, VALUE = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 1.5])
NEXT = torch.tensor([1.0, 2.0, 4.0])
"""V of where each step led: the second step's is of the state that the limit cut, the third's of the state after it."""
RIGHT = [3.416, 2.8, 5.1]


def gae(next_value: Tensor, terminated: int = -1, truncated: int = -1) -> list[float]:
    """Advantages of three steps, of which the given one ended in that way."""
    flags = [torch.arange(3)[:, None] == which for which in (terminated, truncated)]
    yes, column = torch.ones(3, 1, dtype=torch.bool), REWARD[:, None]
    data = Rollout(column, column, column, column, *flags, flags[0] | flags[1], yes)
    found: list[float] = generalised_advantages(data, VALUE[:, None], next_value[:, None], 0.9, 0.8).flatten().tolist()
    return found


def test_a_time_limit_is_bootstrapped_from_the_state_that_it_cut() -> None:
    assert gae(NEXT, truncated=1) == pytest.approx(RIGHT)


@pytest.mark.parametrize(
    ("bug", "found", "wrong"),
    [
        ("the time-out taken for an end", gae(NEXT, terminated=1), [2.12, 1.0, 5.1]),
        ("the value of the reset's observation", gae(torch.tensor([1.0, 1.5, 4.0]), truncated=1), [3.092, 2.35, 5.1]),
        ("λ leaking across the end", gae(torch.tensor([1.0, 1.5, 4.0])), [5.73584, 6.022, 5.1]),
    ],
)
def test_wrong_answers_name_their_bug(bug: str, found: list[float], wrong: list[float]) -> None:
    assert found == pytest.approx(wrong) and found != pytest.approx(RIGHT), bug


def test_targets_are_advantages_plus_values() -> None:
    agent = make()
    data = agent.samples(rollout(agent), torch.arange(16))
    torch.testing.assert_close(data.target, data.advantage + data.value)


# --- losses by hand ---------------------------------------------------------------------------------------------------


def test_the_surrogate_pays_no_further_move_in_the_direction_that_pays() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], dtype=torch.float64)
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 1.0], dtype=torch.float64)
    log_ratio = ratio.log().requires_grad_()
    loss = policy_loss(log_ratio, advantage, 0.2)
    # min: 1.2·2, 1.5·(-2), 0.5·2, 0.8·(-2), 1.1
    assert loss.item() == pytest.approx(-(2.4 - 3.0 + 1.0 - 1.6 + 1.1) / 5)
    loss.backward()
    assert log_ratio.grad.tolist() == pytest.approx([0.0, 3.0 / 5, -1.0 / 5, 0.0, -1.1 / 5])
    valid = torch.tensor([True, False, False, True, False])
    assert policy_loss(log_ratio, advantage, 0.2, valid).item() == pytest.approx(-(2.4 - 1.6) / 2)


def test_the_value_loss_and_its_clipped_form() -> None:
    value, old, target = torch.tensor([1.0, 1.0, 0.1]), torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 3.0, 1.0])
    assert value_loss(value, target, old).item() == pytest.approx((0.0 + 4.0 + 0.81) / 6)
    # held within 0.2 of the old value: 0.2, 0.2, 0.1
    assert value_loss(value, target, old, 0.2).item() == pytest.approx((0.64 + 7.84 + 0.81) / 6)
    valid = torch.tensor([True, False, True])
    assert value_loss(value, target, old, None, valid).item() == pytest.approx(0.81 / 4)


def test_advantages_are_normalised_in_the_minibatch() -> None:
    x = torch.tensor([1.0, 2.0, 6.0])
    expected = (x - 3.0) / (math.sqrt(7.0) + 1e-8)
    torch.testing.assert_close(normalised(x), expected)
    masked = normalised(torch.cat((x, torch.tensor([99.0]))), torch.tensor([True, True, True, False]))
    torch.testing.assert_close(masked[:3], expected)
    assert normalised(torch.tensor([5.0])).tolist() == [5.0]


def test_diagnostics() -> None:
    found = diagnostics(torch.tensor([0.5, 1.0, 1.4, 1.1]).log(), 0.2)
    logs = [math.log(x) for x in (0.5, 1.0, 1.4, 1.1)]
    assert found["old_approx_kl"].item() == pytest.approx(-sum(logs) / 4)
    assert found["approx_kl"].item() == pytest.approx(-sum(logs) / 4, abs=1e-6)  # these ratios have mean 1
    assert found["clip_fraction"].item() == 0.5


# --- the details ------------------------------------------------------------------------------------------------------


def test_how_the_networks_begin() -> None:
    agent = make(network=network(hidden=(64, 64)))
    actor, critic = agent.actor_module, agent.module.critic
    for layer, gain in zip(actor.body.layers, (2**0.5, 2**0.5, 0.01), strict=True):
        rows = layer.weight if layer.weight.shape[0] < layer.weight.shape[1] else layer.weight.T
        torch.testing.assert_close(rows @ rows.T, gain**2 * torch.eye(len(rows)), rtol=1e-4, atol=1e-5)
        assert not layer.bias.any()
    assert critic.body.layers[-1].weight.norm().item() == pytest.approx(1.0)
    assert isinstance(actor, GaussianActor) and actor.log_std.tolist() == [0.0, 0.0]
    assert agent.optimiser.config.epsilon == 1e-5
    assert agent.optimiser.flat is agent.networks.flat  # one optimiser and one norm for both


def test_actions_are_clipped_and_their_samples_kept() -> None:
    act = make(unit_box=False).act(torch.zeros(1000, 3))
    sample = act.extras["sample"]
    assert sample.abs().max() > 2.0 and torch.equal(act.action, sample.clamp(-2.0, 2.0))
    act = make().act(torch.zeros(1000, 3))  # in the unit box
    torch.testing.assert_close(act.action, 2.0 * act.extras["sample"].clamp(-1.0, 1.0))


def test_the_gradient_of_both_networks_is_clipped_together() -> None:
    agent = make(optimiser=SGD, learning_rate=1.0, max_grad_norm=1e-3, epochs=1, batch_size=16)
    before = agent.networks.flat.clone()
    agent.update(rollout(agent))
    assert (agent.networks.flat - before).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_every_epoch_sees_every_transition_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    real = ppo.ppo_loss
    monkeypatch.setattr(ppo, "ppo_loss", lambda n, p, batch, *a: seen.append(batch.obs[:, 0]) or real(n, p, batch, *a))
    agent = make(epochs=3, batch_size=5, fused=False)
    data = rollout(agent)
    agent.update(data)
    assert [len(x) for x in seen] == [5, 5, 5, 1] * 3 and agent.clock.updates == 12
    epochs = [torch.cat(seen[i : i + 4]) for i in (0, 4, 8)]
    expected = data.obs[..., 0].flatten().sort().values  # type: ignore[index]
    assert all(torch.equal(epoch.sort().values, expected) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_epochs_end_once_the_policy_has_gone_too_far() -> None:
    for target_kl, updates in ((1e-12, 2), (None, 20), (1e3, 20)):
        agent = make(learning_rate=0.05, epochs=10, target_kl=target_kl)
        agent.update(rollout(agent))
        assert agent.clock.updates == updates


def test_rate_and_clip_fall_with_the_steps_before_the_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    clips: list[float] = []
    real = ppo.ppo_loss
    monkeypatch.setattr(ppo, "ppo_loss", lambda n, p, b, c, clip: clips.append(clip) or real(n, p, b, c, clip))
    agent = make(lr_schedule="linear", clip_schedule="linear", schedule_steps=64, epochs=1, batch_size=16, fused=False)
    rates = []
    for i in range(4):
        agent.update(rollout(agent, seed=i))
        rates.append(agent.rate())
    assert rates == [1.0, 0.75, 0.5, 0.25]  # the first update is made at the full rate
    assert clips == pytest.approx([0.2, 0.15, 0.1, 0.05])


def test_options_change_what_they_say() -> None:
    def after(**options: Any) -> Tensor:
        agent = make(learning_rate=0.03, epochs=4, **options)
        agent.update(rollout(agent))
        return agent.networks.flat

    plain = after()
    for options in (
        {"value_clip": True},
        {"bootstrap": False},
        {"normalise_advantage": False},
        {"recompute_advantage": True},
        {"entropy_coefficient": 0.1},
        {"value_coefficient": 0.1},
        {"gae_lambda": 0.5},
        {"max_grad_norm": None},
    ):
        assert not torch.equal(after(**options), plain), options


def test_rows_that_are_no_transitions_teach_nothing() -> None:
    """With a surplus row between two steps all is as without it."""
    one, other = make(), make()
    whole = rollout(one, steps=2, envs=4)
    rollout(other, steps=2, envs=4)  # moves its streams as much
    apart = whole.map(lambda x: torch.stack((x[0], torch.ones_like(x[0]), x[1])))
    no = torch.zeros(4, dtype=torch.bool)
    for flags in (apart.terminated, apart.truncated, apart.ended, apart.valid):
        flags[1] = no
    metrics = [agent.update(data).metrics for agent, data in ((one, whole), (other, apart))]
    torch.testing.assert_close(one.networks.flat, other.networks.flat)
    torch.testing.assert_close(*metrics)


# --- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["none", "gru"])
def test_the_first_ratio_is_1(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ends inside the rollouts, and statistics of observations that grow between them."""
    found: list[Tensor] = []
    real = ppo.ppo_loss

    def watched(*args: Any) -> Any:
        loss, terms = real(*args)
        found.append(terms.log_ratio)
        return loss, terms

    monkeypatch.setattr(ppo, "ppo_loss", watched)
    env = CartPole(4, seed=0)
    config = PPOConfig(
        rollout_steps=32, batch_size=64, epochs=2, learning_rate=0.01, network=network(memory=memory), fused=False
    )
    loop = RolloutLoop(PPO(env.spec, config), env, 512, normalizer=Normalizer(env.spec))
    ends = 0
    while loop.step < loop.total_steps:
        before = len(found)
        progress = loop.advance()
        ends += len(progress.episodes)
        if progress.updates:
            assert found[before].abs().max() < 1e-5
            assert found[-1].abs().max() > 1e-3
    assert ends > 10 and len(found) == 16


@pytest.mark.parametrize(("memory", "least", "most"), [("gru", 0.95, 1.0), ("none", 0.0, 0.6)])
def test_what_was_seen_ten_steps_ago(memory: str, least: float, most: float, tmp_path: Any) -> None:
    env = TMaze(64, seed=1)
    options = {"memory_size": 16} if memory == "gru" else {}
    config = PPOConfig(
        rollout_steps=11, batch_size=704, epochs=8, learning_rate=0.01, gamma=1.0, entropy_coefficient=0.01,
        network=network(memory=memory, **options),
    )  # fmt: skip
    loop = RolloutLoop(PPO(env.spec, config, seed=0), env, 11 * 64 * 16)
    while loop.step < loop.total_steps:
        loop.advance()
    save_policy(loop.policy(), tmp_path / "policy")
    policy: Policy = load_policy(tmp_path / "policy")
    assert policy.recurrent == (memory == "gru")
    found = run_episodes(policy, TMaze(50, seed=9, autoreset=False), 200, seed=5)
    assert least <= sum(e.total_reward for e in found) / 200 <= most


class Looks(TorchEnv):
    """An image whose left or right half is bright, and 1 for the action that says which; an episode is one step."""

    observation_space, action_space = spaces.Box(0, 255, (1, 12, 12), np.uint8), spaces.Discrete(2)
    episode_limit = 1

    def initial(self, streams: Any) -> Tensor:
        return (streams.uniform() < 0.5).float()

    def dynamics(self, state: Tensor, action: Tensor) -> Any:
        return state, (action == state).float(), torch.ones_like(state, dtype=torch.bool)

    def observe(self, state: Tensor) -> Tensor:
        right = (torch.arange(12) >= 6).float()
        bright = torch.where(state[:, None] > 0, right, 1.0 - right)
        return (200.0 * bright)[:, None, None, :].expand(-1, 1, 12, 12).to(torch.uint8)


def test_policy_and_value_may_see_through_one_encoder(tmp_path: Any) -> None:
    """Then the last layers stand on it directly, with the gains 0.01 and 1, as in CleanRL's ``ppo_atari``."""
    env = Looks(32, seed=1)
    config = PPOConfig(
        rollout_steps=4, batch_size=32, epochs=4, learning_rate=1e-3, shared_encoder=True,
        network=NetworkConfig(hidden=(), init="orthogonal"),
    )  # fmt: skip
    agent = PPO(env.spec, config, seed=0)
    actor, critic = agent.actor_module, agent.module.critic
    assert critic.encoders[0] is actor.encoder and len(actor.body.layers) == 1
    assert actor.body.layers[0].weight.norm(dim=1).tolist() == pytest.approx([0.01, 0.01])
    assert critic.body.layers[0].weight.norm().item() == pytest.approx(1.0)
    owned = sum(p.numel() for part in (actor, critic.body) for p in part.parameters())
    assert agent.networks.flat.numel() == owned  # nothing is there twice
    obs = env.reset(seeds=range(32))
    outputs, value, _ = agent.module(obs)
    torch.testing.assert_close(outputs, actor(obs))
    torch.testing.assert_close(value, critic(obs)[0])
    first = next(actor.encoder.parameters())
    for part in (outputs[:, 0], value):
        assert torch.autograd.grad(part.sum(), first, retain_graph=True)[0].any()

    loop = RolloutLoop(agent, env, 32 * 4 * 12)
    while loop.step < loop.total_steps:
        loop.advance()
    save_policy(loop.policy(), tmp_path / "policy")
    found = run_episodes(load_policy(tmp_path / "policy"), Looks(50, seed=9, autoreset=False), 50, seed=5)
    assert sum(e.total_reward for e in found) / 50 >= 0.95
    other = PPO(env.spec, config, seed=1)
    other.load_state_dict(agent.state_dict())
    assert torch.equal(other.networks.flat, agent.networks.flat)


# --- spaces -----------------------------------------------------------------------------------------------------------

DICT = spaces.Dict({"arm": spaces.Box(-1, 1, (2,)), "camera": spaces.Box(0, 255, (1, 12, 12), "uint8")})


def seen(space: Any, rows: int) -> Obs:
    g = torch.Generator().manual_seed(1)
    if isinstance(space, spaces.Dict):
        camera = torch.randint(256, (rows, 1, 12, 12), generator=g, dtype=torch.uint8)
        return {"arm": torch.rand(rows, 2, generator=g), "camera": camera}
    return torch.randn(rows, 3, generator=g)


BEST: dict[str, tuple[Any, Any]] = {
    "box": (BOX, [0.5, -1.0]),
    "unbounded": (spaces.Box(-math.inf, math.inf, (2,)), [0.5, -1.0]),
    "discrete": (spaces.Discrete(3, start=1), 2),
    "multi_discrete": (spaces.MultiDiscrete([2, 3]), [1, 2]),
    "multi_binary": (spaces.MultiBinary(2), [0, 1]),
}
WAYS = [(name, "vector", memory) for name in BEST for memory in ("none", "gru")]
WAYS += [("box", "dict", "none"), ("discrete", "dict", "gru")]


@pytest.mark.parametrize(("acted", "observed", "memory"), WAYS)
def test_it_finds_the_best_action(acted: str, observed: str, memory: str) -> None:
    action_space, best = BEST[acted]
    observation_space = OBS if observed == "vector" else DICT
    net = network(memory=memory, **({"memory_size": 16} if memory == "gru" else {}))
    options = {"rollout_steps": 1, "epochs": 8, "batch_size": 32, "learning_rate": 0.02, "network": net}
    agent = make(action_space, observation_space, **options)
    obs, yes = seen(observation_space, 64), torch.ones(1, 64, dtype=torch.bool)
    goal = torch.tensor(best)
    for _ in range(12):
        carry = agent.initial_carry(64)
        act = agent.act(obs, carry)
        extras = dict(act.extras)
        if carry is not None:
            extras |= {f"carry/{name}": leaf for name, leaf in carry.items()}
        apart = (act.action - goal).abs().float().reshape(64, -1).sum(1)
        behind = map_obs(lambda x: x.unsqueeze(0), obs)
        data = Rollout(
            behind, act.action.unsqueeze(0), -apart.unsqueeze(0), behind, yes, ~yes, yes, yes,
            {name: x.unsqueeze(0) for name, x in extras.items()},
        )  # fmt: skip
        agent.clock.env_steps += 64
        agent.update(data)
    assert agent.guard.first_bad() is None
    action = agent.act(obs, agent.initial_carry(64), deterministic=True).action
    assert (action - goal).abs().float().mean() < (0.5 if action.is_floating_point() else 0.1)


def test_mistakes_are_told() -> None:
    with pytest.raises(RloptError, match=r"agent\.batch_size=4: .* give at least that"):
        make(batch_size=4, network=network(memory="gru"))
    with pytest.raises(RloptError, match="shared_encoder: no encoder learns to read Box"):
        make(shared_encoder=True)
    with pytest.raises(RloptError, match="shared_encoder is not combined"):
        make(shared_encoder=True, network=network(memory="gru"))
    with pytest.raises(RloptError, match="schedule_steps"):
        make(clip_schedule="linear")
    with pytest.raises(RloptError, match="Gaussian policy acts in Box"):
        make(spaces.Tuple([BOX]))
