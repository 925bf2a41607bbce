"""Group rollouts and REINFORCE: advantages and losses by hand, group seeds, exact steps, continuation, learning."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from rlopt.agents.group import GroupAgentConfig, leave_one_out, returns_to_go
from rlopt.agents.reinforce import (
    Reinforce,
    ReinforceConfig,
    baseline_advantages,
    categorical_terms,
    normalise,
    policy_loss,
    squashed_terms,
)
from rlopt.buffers import Rollout
from rlopt.envs import make_env
from rlopt.envs.normalize import Normalizer
from rlopt.loops.group import GroupLoop
from rlopt.nn import NetworkConfig
from rlopt.policy import load_policy, save_policy
from rlopt.random import derive_seed
from rlopt.state import load_state, save_state, states_equal
from rlopt.training import train_config
from rlopt.training.setup import make_loop
from rlopt.types import Episode, RloptError

SMALL = NetworkConfig(hidden=(8,), activation="tanh")


class Probe(gym.Env):
    """Episodes whose first observation is drawn from the seed, and whose length is 2 plus that draw (0 … 4).

    Observation (draw, steps taken). Reward of a step: the number of steps taken. ``where`` makes the reward or the
    observation of step 2 not finite, in the rows that the ``bad`` seeds begin.
    """

    observation_space = gym.spaces.Box(-100, 100, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, where: str = "", poison: float = math.nan, bad: int = -1, endless: bool = False) -> None:
        self.where, self.poison, self.bad, self.endless = where, poison, bad, endless
        self.episodes = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed_used = seed
        self.draw = int(self.np_random.integers(5))
        self.t = 0
        self.episodes += 1
        return np.array([self.draw, 0], np.float32), {}

    def step(self, action):
        self.t += 1
        obs, reward = np.array([self.draw, self.t], np.float32), float(self.t)
        if self.t == 2 and self.where and self.draw == self.bad:
            if self.where == "reward":
                reward = self.poison
            else:
                obs[1] = self.poison
        return obs, reward, not self.endless and self.t == 2 + self.draw, False, {}


gym.register("rlopt-tests/Probe-v0", entry_point=Probe)


class Recorder(Reinforce):
    """Keeps the rollouts it learns from."""

    def update(self, batch):
        self.__dict__.setdefault("rollouts", []).append(batch)
        return super().update(batch)


def make(total_steps=1000, seed=0, id="rlopt-tests/Probe-v0", kwargs=None, normalize=False, agent=Recorder, **options):
    config = ReinforceConfig(**{"network": SMALL, "groups": 3, "group_size": 2, **options})
    env = make_env(id, config.groups * config.group_size, seed=seed, autoreset=False, kwargs=kwargs)
    normalizer = Normalizer(env.spec, True, True, config.gamma) if normalize else None
    return GroupLoop(agent(env.spec, config, seed=seed), env, total_steps, None, normalizer, seed)


def run(loop):
    episodes = []
    while loop.step < loop.total_steps:
        episodes += loop.advance().episodes
    return episodes


# Advantages and losses


def test_returns_to_go_by_hand():
    reward = torch.tensor([[1.0, 0.0], [2.0, 4.0], [3.0, 0.0]])
    assert returns_to_go(reward, 0.5).tolist() == [[1.0 + 0.5 * 3.5, 2.0], [2.0 + 0.5 * 3.0, 4.0], [3.0, 0.0]]


def test_leave_one_out_by_hand():
    score = torch.tensor([[1.0, 2.0, 6.0, 5.0, 9.0]])
    group = torch.tensor([0, 0, 0, 1, 1])
    every = torch.ones(1, 5, dtype=torch.bool)
    assert leave_one_out(score, every, group, 2).tolist() == [[4.0, 3.5, 1.5, 9.0, 5.0]]
    some = torch.tensor([[True, True, False, True, False]])
    # Without the third and the fifth: the third still sees the other two, the fourth sees nobody.
    assert leave_one_out(score, some, group, 2).tolist() == [[2.0, 1.0, 1.5, 0.0, 5.0]]


def hand_made() -> Rollout:
    """One group of three episodes: lengths 3 and 1, and one lost after 2 steps; rewards 1, 1, 1 and 4 and 9, 9."""
    valid = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 0, 0]], dtype=torch.bool)
    reward = torch.tensor([[1.0, 4.0, 9.0], [1.0, 0.0, 9.0], [1.0, 0.0, 0.0]])
    nothing = torch.zeros(3, 3)
    complete, group = torch.tensor([True, True, False]), torch.zeros(3, dtype=torch.int64)
    no = nothing.bool()
    return Rollout(nothing, nothing, reward, None, no, no, no, valid, group=group, complete=complete)


def test_advantages_of_return_to_go_by_hand():
    advantage, used = baseline_advantages(hand_made(), 0.5, "return_to_go", 1)
    assert used.tolist() == [[True, True, False], [True, False, False], [True, False, False]]
    # G = 1.75, 1.5, 1 and 4. At step 0 both run, each is the other's baseline; later the first is alone.
    assert advantage[:, 0].tolist() == [1.75 - 4.0, 1.5, 1.0]
    assert float(advantage[0, 1]) == 4.0 - 1.75


def test_advantages_of_whole_episodes_by_hand():
    advantage, used = baseline_advantages(hand_made(), 0.5, "episode", 1)
    assert used.sum() == 4
    assert advantage[:, 0].tolist() == [1.75 - 4.0] * 3
    assert float(advantage[0, 1]) == 4.0 - 1.75


def test_normalised_advantages_have_unit_mean_square_where_they_count():
    used = torch.tensor([[True, True], [False, True]])
    scaled = normalise(torch.tensor([[3.0, -4.0], [100.0, 5.0]]), used)
    root = math.sqrt((9 + 16 + 25) / 3)
    torch.testing.assert_close(scaled[used], torch.tensor([3.0, -4.0, 5.0]) / root)


def test_the_loss_by_hand():
    """-(2 · log ¼ - 1 · log ½)/2 - 0.1 · (0.3 + 0.5)/2; the third action does not count."""
    log_prob = torch.tensor([0.25, 0.5, 0.9]).log().requires_grad_()
    used = torch.tensor([True, True, False])
    loss, metrics = policy_loss(
        log_prob, torch.tensor([0.3, 0.5, 9.0]), torch.tensor([2.0, -1.0, 7.0]), used, entropy_coefficient=0.1
    )
    assert float(loss.detach()) == pytest.approx((4 * math.log(2) - math.log(2)) / 2 - 0.04)
    assert float(metrics["entropy"]) == pytest.approx(0.4)
    loss.backward()
    assert log_prob.grad.tolist() == [-1.0, 0.5, 0.0]


def test_categorical_terms_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)]])  # probabilities 1/4, 3/4
    log_prob, entropy = categorical_terms(logits, torch.tensor([1]))
    assert float(log_prob) == pytest.approx(math.log(0.75))
    assert float(entropy) == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))


def test_squashed_terms_against_the_density_and_the_score():
    """log N(u; m, s) - log(1 - tanh² u), and the score (u - m)/s² by the mean, ((u - m)²/s² - 1) by log s."""
    mean = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor([[-0.5]], dtype=torch.float64, requires_grad=True)
    u, noise = torch.tensor([[1.1]], dtype=torch.float64), torch.tensor([[0.7]], dtype=torch.float64)
    log_prob, entropy = squashed_terms((mean, log_std), u, noise)
    s = math.exp(-0.5)
    normal = lambda x: -0.5 * ((x - 0.3) / s) ** 2 - math.log(s) - 0.5 * math.log(2 * math.pi)  # noqa: E731
    assert float(log_prob.detach()) == pytest.approx(normal(1.1) - math.log(1 - math.tanh(1.1) ** 2))
    v = 0.3 + 0.7 * s
    assert float(entropy.detach()) == pytest.approx(-(normal(v) - math.log(1 - math.tanh(v) ** 2)))
    by_mean, by_log_std = torch.autograd.grad(log_prob.sum(), [mean, log_std])
    assert float(by_mean) == pytest.approx(0.8 / s**2)
    assert float(by_log_std) == pytest.approx(0.64 / s**2 - 1.0)


# Rollouts


def test_members_of_a_group_share_their_seed_and_groups_do_not():
    loop = make()
    for iteration in range(3):
        loop.advance()
        expected = [derive_seed(0, "group", iteration, g) for g in (0, 0, 1, 1, 2, 2)]
        assert [env.unwrapped.seed_used for env in loop.env.envs] == expected
    assert len({derive_seed(0, "group", i, g) for i in range(3) for g in range(3)}) == 9
    for rollout in loop.agent.rollouts:
        assert rollout.group.tolist() == [0, 0, 1, 1, 2, 2]
        assert torch.equal(rollout.obs[0, 0::2], rollout.obs[0, 1::2])


def test_a_rollout_is_whole_episodes_padded_to_the_longest():
    loop = make()
    progress = loop.advance()
    (rollout,) = loop.agent.rollouts
    draws = rollout.obs[0, :, 0].long()
    lengths = draws + 2
    assert rollout.valid.shape == (int(lengths.max()), 6) and rollout.complete.all()
    assert rollout.valid.sum(0).tolist() == lengths.tolist()
    for n, length in enumerate(lengths.tolist()):
        assert rollout.reward[:length, n].tolist() == [float(t + 1) for t in range(length)]
        assert rollout.obs[:length, n, 1].tolist() == [float(t) for t in range(length)]
        assert rollout.terminated[:, n].nonzero().flatten().tolist() == [length - 1]
        assert not rollout.reward[length:, n].any() and not rollout.truncated[:, n].any()
    assert progress.episodes == [Episode(k * (k + 1) / 2, k) for k in lengths.tolist()]
    assert loop.step == loop.agent.clock.env_steps == int(lengths.sum())
    assert progress.updates == loop.agent.clock.updates == 1 and progress.metrics["policy_loss"][1] == 1


def test_the_carry_before_each_step_and_extras_are_stored():
    class Remembers(Recorder):
        extra_fields = {"carry/memory": ((8,), torch.float32), "chance": ((), torch.float32)}

        def act(self, obs, carry=None, deterministic=False):
            act = super().act(obs, carry, deterministic)
            return act._replace(extras={"chance": carry["memory"].sum(1)})

    loop = make(network=NetworkConfig(hidden=(8,), memory="gru"), agent=Remembers)
    loop.advance()
    (rollout,) = loop.agent.rollouts
    stored = rollout.extras["carry/memory"]
    assert not stored[0].any() and stored[1].any(1).all()
    torch.testing.assert_close(rollout.extras["chance"], stored.sum(2))


def test_the_horizon_truncates():
    loop = make(kwargs={"endless": True}, horizon=4)
    progress = loop.advance()
    (rollout,) = loop.agent.rollouts
    assert progress.episodes == [Episode(10.0, 4)] * 6
    assert rollout.truncated.nonzero().tolist() == [[3, n] for n in range(6)] and not rollout.terminated.any()
    assert loop.step == 24


@pytest.mark.parametrize(("beyond", "iterations", "updates"), [(-1, 1, 0), (0, 1, 1), (1, 2, 1)])
def test_total_steps_is_reached_exactly_and_nothing_is_learnt_from_a_cut_rollout(beyond, iterations, updates):
    probe = make()
    probe.advance()
    whole = probe.step
    loop = make(whole + beyond)
    episodes = run(loop)
    assert loop.step == loop.agent.clock.env_steps == whole + beyond
    assert (loop.iteration, loop.agent.clock.updates) == (iterations, updates)
    assert sum(e.length for e in episodes) <= loop.step
    assert len(episodes) == 5 if beyond < 0 else 6


@pytest.mark.parametrize(("where", "poison"), [("reward", math.inf), ("observation", math.nan)])
def test_a_non_finite_value_is_named_and_its_episode_is_left_out(where, poison):
    draws = {int(np.random.default_rng(derive_seed(0, "group", 0, g)).integers(5)) for g in range(3)}
    assert len(draws) > 1, "this test needs groups of different lengths"
    bad = min(draws)
    loop = make(kwargs={"where": where, "poison": poison, "bad": bad})
    progress = loop.advance()
    assert loop.bad_now() and loop.first_bad() == where
    (rollout,) = loop.agent.rollouts
    poisoned = rollout.obs[0, :, 0] == bad
    assert torch.equal(rollout.complete, ~poisoned)
    assert rollout.valid[:, poisoned].sum(0).tolist() == [1] * int(poisoned.sum())
    assert rollout.obs.isfinite().all() and rollout.reward.isfinite().all()
    assert len(progress.episodes) == int((~poisoned).sum())
    assert torch.cat([p.flatten() for p in loop.agent.actor.leaves]).isfinite().all()
    assert loop.agent.guard.first_bad() is None
    loop.clear_bad()
    assert not loop.bad_now() and loop.first_bad() is None


def test_an_episode_whose_worker_died_is_left_out(monkeypatch):
    """The contract: the replaced row is invalid once, and goes on with an episode that nobody asked for."""
    loop = make(horizon=4, kwargs={"endless": True})
    step_of, calls = loop.env.step, []

    def step(action):
        found = step_of(action)
        calls.append(1)
        lost = torch.arange(6) == 4
        return found._replace(valid=found.valid & ~lost, ended=found.ended | lost) if len(calls) == 2 else found

    monkeypatch.setattr(loop.env, "step", step)
    progress = loop.advance()
    (rollout,) = loop.agent.rollouts
    assert rollout.complete.tolist() == [True, True, True, True, False, True]
    assert rollout.valid.sum(0).tolist() == [4, 4, 4, 4, 1, 4]
    assert progress.episodes == [Episode(10.0, 4)] * 5 and loop.step == 21
    assert loop.first_bad() is None


def test_normalisation_sees_what_is_real_and_the_policy_carries_it():
    loop = make(normalize=True)
    loop.advance()
    count = float(loop.normalizer.moments[""].count)
    assert count == loop.step  # one observation per transition, none for padding
    first = loop.agent.rollouts[0].obs[0]
    assert first[:, 0].tolist() == [min(10.0, d) for d in first[:, 0].tolist()]  # nothing was known before
    loop.advance()
    second = loop.agent.rollouts[1]
    assert not torch.equal(second.obs[0, :, 0], second.obs[0, :, 0].round())
    assert float(second.reward.abs().max()) < 3.0  # divided by the spread of returns
    assert loop.policy().normalizer is loop.normalizer


def test_episodes_given_up_put_nothing_made_up_into_the_statistics():
    draws = [int(np.random.default_rng(derive_seed(0, "group", 0, g)).integers(5)) for g in range(3)]
    loop = make(normalize=True, kwargs={"where": "observation", "bad": min(draws)})
    loop.advance()
    # What a lost row shows the policy in place of NaN is no observation: two more, all zero, would be counted here.
    assert float(loop.normalizer.moments[""].count) == loop.step


def test_an_environment_of_the_wrong_shape_is_refused():
    config = ReinforceConfig(groups=2, group_size=2, network=SMALL)
    for env in (make_env("CartPole-v1", 3, autoreset=False), make_env("CartPole-v1", 4)):
        with pytest.raises(RloptError, match="4 rows with autoreset=False"):
            GroupLoop(Reinforce(env.spec, config), env, 100)
    with pytest.raises(RloptError, match="16 environments side by side"):
        make_loop(
            train_config({"agent": {"name": "reinforce"}, "env": {"id": "CartPole-v1"}, "num_envs": 3, "device": "cpu"})
        )
    assert isinstance(config, GroupAgentConfig)


# Continuation and learning

CASES = {
    "discrete": {"id": "CartPole-v1"},
    "box": {"id": "Pendulum-v1", "horizon": 20, "entropy_coefficient": 0.01},
    "normalised": {"id": "CartPole-v1", "normalize": True, "credit": "episode", "max_grad_norm": 0.5},
}


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_continued_equals_never_stopped(case, tmp_path):
    """The environments of the continued loop are new ones: nothing of them needs to be saved."""
    new = lambda: make(total_steps=500, seed=5, agent=Reinforce, **CASES[case])  # noqa: E731
    straight = new()
    run(straight)
    broken = new()
    for _ in range(2):
        broken.advance()
    save_state(tmp_path / "state", broken.state_dict())
    fresh = new()
    fresh.load_state_dict(load_state(tmp_path / "state"))
    assert 0 < fresh.step == broken.step < 500
    run(fresh)
    assert fresh.iteration == straight.iteration > 2
    assert states_equal(fresh.state_dict(), straight.state_dict()) is None
    assert states_equal(fresh.state_dict(), new().state_dict()) is not None


class Bandit(gym.Env):
    """One step; the reward says how near the action is to the right one."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, discrete: bool) -> None:
        self.discrete = discrete
        self.action_space = gym.spaces.Discrete(3) if discrete else gym.spaces.Box(-2, 2, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        reward = float(action == 2) if self.discrete else -float(abs(action[0] - 1.0))
        return np.zeros(1, np.float32), reward, True, False, {}


gym.register("rlopt-tests/Bandit-v0", entry_point=Bandit)


@pytest.mark.parametrize("discrete", [True, False])
def test_the_better_action_is_learnt(discrete):
    loop = make(
        2000, id="rlopt-tests/Bandit-v0", kwargs={"discrete": discrete}, groups=1, group_size=20, learning_rate=0.03
    )
    run(loop)
    action = loop.policy().act(torch.zeros(1, 1)).action
    if discrete:
        assert int(action) == 2
    else:
        assert float(action) == pytest.approx(1.0, abs=0.25)


def test_a_stored_sample_gives_the_action_that_was_taken():
    loop = make(agent=Recorder, id="Pendulum-v1", horizon=3)
    loop.advance()
    (rollout,) = loop.agent.rollouts
    assert rollout.extras["before_tanh"].shape == (3, 6, 1)
    torch.testing.assert_close(rollout.action, 2.0 * rollout.extras["before_tanh"].tanh())


@pytest.mark.parametrize(("actions", "best"), [("multi_discrete", [[1, 1]]), ("multi_binary", [[1, 1, 1]])])
def test_actions_of_several_components_are_learnt_and_exported(tmp_path, actions, best):
    kwargs = {"length": 2, "actions": actions}
    agent = {"name": "reinforce", "groups": 4, "group_size": 4, "network": {"hidden": [8]}, "learning_rate": 0.1}
    env = {"id": "rlopt.envs.counting:rlopt/CountSpaces-v0", "kwargs": kwargs}
    loop = make_loop(train_config({"total_steps": 480, "seed": 1, "device": "cpu", "agent": agent, "env": env}))
    while loop.step < loop.total_steps:
        loop.advance()
    save_policy(loop.policy(), tmp_path / "p")
    policy, obs = load_policy(tmp_path / "p"), loop.env.reset()
    assert policy.act(obs).action[:1].tolist() == best
    answer = policy({key: leaf[0].numpy() for key, leaf in obs.items()})
    assert answer.tolist() == best[0]
    assert loop.evaluate(2)[0].total_reward == 1.0 + 2.0 + 2 * sum(best[0])
    loop.close()


def test_options_of_a_critic_are_refused_where_there_is_none():
    with pytest.raises(RloptError, match=r"network\.critic_hidden: agent=reinforce has no critic"):
        ReinforceConfig(network=NetworkConfig(critic_hidden=(4,)))
