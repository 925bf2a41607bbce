"""Rollouts of a fixed length: advantages by hand, frozen statistics, exact steps, gaps, and resume in the middle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn

from rlopt import registry
from rlopt.agents import Agent
from rlopt.agents.rollout_agent import RolloutAgentConfig, generalised_advantages
from rlopt.buffers import Rollout, minibatches
from rlopt.envs import Normalizer, make_env
from rlopt.envs.adapter import VectorAdapter
from rlopt.loops.rollout import RolloutLoop
from rlopt.nn import CategoricalActor, NetworkConfig, Optimiser, OptimiserConfig, network_options
from rlopt.policy import Policy
from rlopt.state import load_state, save_state, states_equal
from rlopt.training import train_config
from rlopt.training.setup import begin, make_loop, resume
from rlopt.training.trainer import Callback
from rlopt.types import Act, Carry, Obs, Update, option

STEPS = "rlopt-tests/Steps-v0"


class Steps(gym.Env[Any, Any]):
    """Shows the steps of the episode and their square, and pays the count after each.

    Args:
        lengths, ends: of successive episodes, in turn.
        bad: what is NaN, in every third episode: its first ``reset``, or in its second step ``observation`` or
            ``reward``.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, lengths: Any = (5,), ends: Any = ("terminate",), bad: str = "") -> None:
        self.lengths, self.ends, self.bad = lengths, ends, bad
        self.count, self.episode = 0, -1

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.count, self.episode = 0, self.episode + 1
        return self._seen("reset"), {}

    def step(self, action: Any) -> Any:
        self.count += 1
        over = self.count == self.lengths[self.episode % len(self.lengths)]
        end = self.ends[self.episode % len(self.ends)]
        wrong = self.bad == "reward" and self._is_bad(2)
        return (self._seen("observation"), float("nan") if wrong else float(self.count),
                over and end == "terminate", over and end == "truncate", {})  # fmt: skip

    def _seen(self, when: str) -> Any:
        wrong = self.bad == when and self._is_bad(0 if when == "reset" else 2)
        return np.array([np.nan if wrong else self.count, self.count**2], np.float32)

    def _is_bad(self, count: int) -> bool:
        return self.episode % 3 == 1 and self.count == count


class Choose(Steps):
    """Pays one of two actions."""

    def step(self, action: Any) -> Any:
        seen, _, *rest = super().step(action)
        return seen, float(action == 1), *rest


for name, entry in ((STEPS, Steps), ("rlopt-tests/Choose-v0", Choose)):
    if name not in gym.registry:
        gym.register(name, entry_point=entry)


# ---- a small on-policy agent


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(RolloutAgentConfig):
    """Options of the small agent."""

    epochs: int = option(2, "passes over a rollout", low=1)
    batch_size: int = option(16, "transitions per gradient step", low=1)


class Probe(Agent):
    """Clipped policy gradient with a value baseline, and a memory that counts the steps of an episode."""

    name, loop, config_class = "probe", "rollout", ProbeConfig
    config: ProbeConfig

    def build(self) -> None:
        spec = self.spec
        options = network_options(NetworkConfig(hidden=(8,)))
        self.actor = self.net("actor", lambda: CategoricalActor(spec.observation_space, spec.action_space, options))
        features = int(np.prod(spec.observation_space.shape or ()))
        self.value = self.net("value", lambda: nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.Linear(8, 1)))
        self.optimisers = [
            self.persist(f"{name}_optimiser", Optimiser(net.flat, 3e-3, OptimiserConfig(), 0.5))
            for name, net in (("actor", self.actor), ("value", self.value))
        ]
        self.extra_fields = {"log_prob": ((), torch.float32), "carry/age": ((1,), torch.float32)}
        self.rollouts: list[Rollout] = []
        self.ratios: list[Tensor] = []

    @property
    def policy(self) -> Policy:
        return Policy(self.spec, self.actor.module)

    def initial_carry(self, rows: int) -> Carry:
        return {"age": torch.zeros(rows, 1, device=self.device)}

    @torch.no_grad()
    def act(self, obs: Obs, carry: Carry = None, deterministic: bool = False) -> Act:
        action, _ = self.actor.module.act(obs, None, deterministic, self.act_generator)
        assert carry is not None
        return Act(action, {"age": carry["age"] + 1}, {"log_prob": self.log_prob(obs, action)})

    def log_prob(self, obs: Obs, action: Tensor) -> Tensor:
        return self.actor(self.actor.params, obs).log_softmax(-1).gather(-1, action[..., None]).squeeze(-1)

    def update(self, batch: Rollout) -> Update:
        self.rollouts.append(batch)
        self.open_update(observation=batch.obs, reward=batch.reward)
        with torch.no_grad():
            value, following = (self.value(self.value.params, x).squeeze(-1) for x in (batch.obs, batch.next_obs))
        advantage = generalised_advantages(batch, value, following, self.config.gamma, 0.9)
        batch = batch.with_extras(advantage=advantage, target=advantage + value)
        positions = batch.positions()
        generator = self.update_generator
        for chosen in minibatches(len(positions), self.config.epochs, self.config.batch_size, generator):
            part = batch.at(positions[chosen])
            ratio = (self.log_prob(part.obs, part.action) - part.extras["log_prob"]).exp()
            self.ratios.append(ratio.detach())
            gain = part.extras["advantage"]
            loss = -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
            self.descend("policy", self.optimisers[0], loss, self.actor)
            error = self.value(self.value.params, part.obs).squeeze(-1) - part.extras["target"]
            self.descend("value", self.optimisers[1], error.square().mean(), self.value)
            self.end_update()
        return Update({"policy_loss": loss.detach()})


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.AGENTS, "probe", Probe)
    torch.set_num_threads(1)


def make(
    env: Any = None, steps: int = 8, total: int = 100, num_envs: int = 3, normalize: bool = False, seed: int = 5
) -> RolloutLoop:
    env = env or make_env("CartPole-v1", num_envs, seed, "sync")
    agent = Probe(env.spec, ProbeConfig(rollout_steps=steps), seed=seed)
    return RolloutLoop(agent, env, total, normalizer=Normalizer(env.spec, True, True) if normalize else None, seed=seed)


def run(loop: RolloutLoop) -> RolloutLoop:
    while loop.step < loop.total_steps:
        loop.advance()
    loop.close()
    return loop


# ---- advantages


def rollout(reward: list[float], **flags: list[int]) -> Rollout:
    """One environment's time line; flags by name, 0 (``valid``: 1) where they are left out."""
    steps = len(reward)
    rows = {name: torch.tensor(flags.get(name, [int(name == "valid")] * steps)).bool()[:, None]
            for name in ("terminated", "truncated", "ended", "valid")}  # fmt: skip
    zeros = torch.zeros(steps, 1, 1)
    return Rollout(zeros, zeros, torch.tensor(reward)[:, None], zeros, **rows)


def by_hand(made: Rollout, value: list[float], following: list[float], gamma: float = 0.9, decay: float = 0.8) -> Any:
    values = (torch.tensor(x)[:, None] for x in (value, following))
    return generalised_advantages(made, *values, gamma, decay).flatten().tolist()


def test_an_end_for_good_and_a_lost_life_cut_the_bootstrap() -> None:
    for ended in ([0, 1, 0], [0, 0, 0]):
        made = rollout([1.0, 2.0, 3.0], terminated=[0, 1, 0], ended=ended)
        nothing = float("nan")  # nobody looks at what lies behind an end
        assert by_hand(made, [0.5, 1.0, 1.5], [1.0, nothing, 4.0]) == pytest.approx([2.12, 1.0, 5.1])


def test_rows_that_are_no_transition_never_enter() -> None:
    """A surplus row hands on what comes behind it; a lost episode ends before its last row."""
    nan = float("nan")
    whole = by_hand(rollout([1.0, 2.0, 3.0]), [0.5, 1.0, 1.5], [1.0, 1.5, 4.0])
    made = rollout([1.0, nan, 2.0, 3.0], valid=[1, 0, 1, 1])
    assert by_hand(made, [0.5, nan, 1.0, 1.5], [1.0, nan, 1.5, 4.0]) == pytest.approx([whole[0], 0.0, *whole[1:]])
    made = rollout([1.0, nan, 2.0, 3.0], valid=[1, 0, 1, 1], ended=[0, 1, 0, 0])
    assert by_hand(made, [0.5, nan, 1.0, 1.5], [1.0, nan, 1.5, 4.0]) == pytest.approx([1.4, 0.0, *whole[1:]])


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 37])
def test_advantages_are_the_recursion(steps: int) -> None:
    g = torch.Generator().manual_seed(steps)
    reward, value, following = (torch.randn(steps, 5, generator=g) for _ in range(3))
    terminated, truncated, ended, gaps = (torch.rand(steps, 5, generator=g) < 0.15 for _ in range(4))
    valid = ~gaps
    zeros = torch.zeros(steps, 5, 1)
    made = Rollout(zeros, zeros, reward, zeros, terminated & valid, truncated & valid, ended, valid)
    expected, behind = torch.zeros(steps, 5), torch.zeros(5)
    for t in reversed(range(steps)):
        cut = (made.terminated | made.truncated | made.ended)[t]
        delta = reward[t] + 0.9 * ~made.terminated[t] * following[t] - value[t]
        here = delta + 0.9 * 0.8 * torch.where(cut, 0.0, behind)
        behind = torch.where(valid[t], here, torch.where(cut, 0.0, behind))
        expected[t] = torch.where(valid[t], here, 0.0)
    torch.testing.assert_close(generalised_advantages(made, value, following, 0.9, 0.8), expected)
    apart = generalised_advantages(
        made._replace(reward=torch.stack((reward, 2 * reward), -1)), torch.stack((value, 2 * value), -1),
        torch.stack((following, 2 * following), -1), 0.9, 0.8,
    )  # fmt: skip
    torch.testing.assert_close(apart, torch.stack((expected, 2 * expected), -1))


# ---- collecting


@pytest.mark.parametrize("num_envs", [1, 3, 7])
def test_total_steps_is_reached_exactly_and_the_last_rollout_is_shorter(num_envs: int) -> None:
    loop = run(make(num_envs=num_envs, total=100, steps=8))
    rollouts = loop.agent.rollouts
    assert loop.step == loop.agent.clock.env_steps == 100
    assert sum(int(r.valid.sum()) for r in rollouts) == 100
    assert all(len(r.valid) == 8 for r in rollouts[:-1]) and len(rollouts[-1].valid) <= 8
    assert loop.agent.clock.updates == sum(2 * -(-int(r.valid.sum()) // 16) for r in rollouts)


def test_rows_are_the_environments_own_in_order() -> None:
    kwargs = {"lengths": (3, 2), "ends": ("terminate", "truncate")}
    first, second = run(make(make_env(STEPS, 2, kwargs=kwargs), steps=5, total=20)).agent.rollouts
    for made in (first, second):
        assert made.obs[:, 0, 0].tolist() == [0, 1, 2, 0, 1]
        assert made.next_obs[:, 0, 0].tolist() == made.reward[:, 0].tolist() == [1, 2, 3, 1, 2]
        assert made.terminated[:, 0].tolist() == [0, 0, 1, 0, 0] and made.truncated[:, 0].tolist() == [0, 0, 0, 0, 1]
        assert made.ended[:, 0].tolist() == [0, 0, 1, 0, 1] and bool(made.valid.all())
        assert made.extras["carry/age"][:, 0, 0].tolist() == [0, 1, 2, 0, 1]  # what it acted with, from the start on


@pytest.mark.parametrize("backend", ["sync", "torch", "native"])
def test_what_an_environment_gave_is_not_written_over(backend: str) -> None:
    env = make_env("Hopper-v5" if backend == "native" else "CartPole-v1", 2, backend=backend)
    obs = env.reset()
    held = []
    for _ in range(4):
        action = torch.zeros(2, 3) if backend == "native" else torch.zeros(2, dtype=torch.int64)
        step = env.step(action)
        rows = [obs, *step[:-1]]
        held += [(x, x.clone()) for x in rows if isinstance(x, Tensor)]
        obs = step.obs
    env.close()
    assert all(torch.equal(x, copy) for x, copy in held)


def test_surplus_rows_of_next_step_vectors_are_gaps() -> None:
    """One of two environments is reset while the other goes on: its row is no transition. Where both are, none is."""
    slots = [lambda n=n: gym.make(STEPS, lengths=(n,)) for n in (2, 3)]
    env = VectorAdapter(gym.vector.SyncVectorEnv(slots, autoreset_mode=AutoresetMode.NEXT_STEP), autoreset=True)
    made = run(make(env, steps=12, total=18)).agent.rollouts[0]
    assert made.valid[:, 0].tolist()[:6] == [1, 1, 0, 1, 1, 0] and made.valid[:, 1].tolist()[:4] == [1, 1, 1, 0]
    assert not bool(made.obs[~made.valid].any()) and not bool(made.reward[~made.valid].any())
    assert not bool((made.ended & ~made.valid).any())
    alone = run(make(VectorAdapter(gym.vector.SyncVectorEnv(slots[:1], autoreset_mode=AutoresetMode.NEXT_STEP),
                                   autoreset=True), steps=4, total=8))  # fmt: skip
    assert [bool(r.valid.all()) for r in alone.agent.rollouts] == [True, True]


@pytest.mark.parametrize("where", ["observation", "reward", "reset"])
def test_rows_that_are_not_finite_stay_out(where: str) -> None:
    loop = make(make_env(STEPS, 2, kwargs={"lengths": (4,), "bad": where}), steps=6, total=24)
    told = 0
    while loop.step < loop.total_steps:
        loop.advance()
        told += loop.bad_now()
        loop.clear_bad()
    assert told and loop.step == 24
    for made in loop.agent.rollouts:
        lost = ~made.valid
        assert all(bool(x.isfinite().all()) for x in (made.obs, made.next_obs, made.reward, made.extras["log_prob"]))
        assert bool(made.ended[lost].all()) and not bool(made.terminated[lost].any())
    assert any(bool((~r.valid).any()) for r in loop.agent.rollouts)
    assert loop.agent.guard.first_bad() is None
    loop.close()


# ---- statistics


def test_statistics_stand_still_from_the_first_step_of_a_rollout_to_its_last_epoch() -> None:
    loop = make(normalize=True, steps=8, total=96)
    seen = []
    while loop.step < loop.total_steps:
        before = loop.normalizer.moments[""].mean.clone()
        learnt = len(loop.agent.rollouts)
        loop.advance()
        moved = not torch.equal(before, loop.normalizer.moments[""].mean)
        assert moved == (len(loop.agent.rollouts) > learnt)
        seen.append(moved)
    assert sum(seen) == 4
    first = [loop.agent.ratios[4 * i] for i in range(4)]  # two minibatches in each of two epochs
    for ratio in first:
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-6, atol=1e-6)
    assert max(float((r - 1).abs().max()) for r in loop.agent.ratios) > 1e-4
    everything = torch.cat([r.valid.flatten() for r in loop.agent.rollouts])
    assert float(loop.normalizer.moments[""].count) == float(everything.sum()) == 96
    loop.close()


def test_the_first_rollout_is_seen_as_it_is_and_rewards_are_scaled_by_all_that_is_known() -> None:
    env = lambda: make_env(STEPS, 2, kwargs={"lengths": (4,)})  # noqa: E731
    plain = make(env(), steps=4, total=8)
    scaled = RolloutLoop(
        Probe(plain.env.spec, ProbeConfig(rollout_steps=4), seed=5), env(), 8,
        normalizer=Normalizer(plain.env.spec, True, True, 0.99),
    )  # fmt: skip
    for loop in (plain, scaled):
        run(loop)
    raw, made = plain.agent.rollouts[0], scaled.agent.rollouts[0]
    assert torch.equal(raw.obs, made.obs)
    running = np.array([1.0, 2 + 0.99, 3 + 0.99 * 2.99, 4 + 0.99 * (3 + 0.99 * 2.99)])
    torch.testing.assert_close(made.reward, raw.reward / float(np.sqrt(running.var() + 1e-8)))


@pytest.mark.parametrize(("word", "expected"), [("raw", [1, 2, 3]), ("sign", [1, 1, 1]), ("clip", [1, 1, 1])])
def test_single_rewards_are_transformed_for_learning_alone(word: str, expected: list[int]) -> None:
    env = make_env(STEPS, 1, kwargs={"lengths": (3,)})
    loop = RolloutLoop(Probe(env.spec, ProbeConfig(rollout_steps=3, reward=word)), env, 6)
    episodes = []
    while loop.step < 6:
        episodes += loop.advance().episodes
    assert loop.agent.rollouts[0].reward.flatten().tolist() == expected
    assert [e.total_reward for e in episodes] == [6.0, 6.0]
    loop.close()


# ---- continuation


@pytest.mark.parametrize("normalize", [False, True])
def test_stopped_in_the_middle_of_a_rollout_and_continued_equals_never_stopped(tmp_path: Any, normalize: bool) -> None:
    new = lambda: make(num_envs=3, steps=8, total=100, normalize=normalize)  # noqa: E731
    straight, broken = run(new()), new()
    for _ in range(13):
        broken.advance()
    save_state(tmp_path / "state", broken.state_dict())
    fresh = new()
    fresh.load_state_dict(load_state(tmp_path / "state"))
    assert len(fresh.steps) == 5 and fresh.step == 39
    run(fresh)
    assert states_equal(fresh.state_dict(), straight.state_dict()) is None
    assert all(
        torch.equal(x.obs, y.obs) and torch.equal(x.extras["carry/age"], y.extras["carry/age"])
        for x, y in zip(fresh.agent.rollouts, straight.agent.rollouts[1:], strict=True)
    )
    broken.close()


def test_an_environment_that_cannot_be_saved_begins_anew_across_a_cut(caplog: pytest.LogCaptureFixture) -> None:
    loop = make(make_env(STEPS, 2, kwargs={"lengths": (9,)}), steps=6, total=24)
    for _ in range(3):
        loop.advance()
    fresh = make(make_env(STEPS, 2, kwargs={"lengths": (9,)}), steps=6, total=24)
    fresh.load_state_dict({**loop.state_dict(), "env": None})
    assert "cannot be saved" in caplog.text
    for _ in range(3):
        fresh.advance()
    made = fresh.agent.rollouts[0]
    assert made.obs[:, 0, 0].tolist() == made.extras["carry/age"][:, 0, 0].tolist() == [0, 1, 2, 0, 1, 2]
    assert made.ended[:, 0].tolist() == [0, 0, 1, 0, 0, 0]
    assert not bool(made.terminated.any() | made.truncated.any())
    loop.close()
    fresh.close()


@pytest.mark.usefixtures("without_curves")
def test_a_run_is_saved_and_resumed_through_the_trainer(tmp_path: Any) -> None:
    def settings(name: str, total: int) -> Any:
        return train_config(
            {"agent": {"name": "probe", "rollout_steps": 8}, "env": {"id": "CartPole-v1", "normalize_obs": True},
             "num_envs": 2, "total_steps": total, "device": "cpu", "threads": 1, "run_dir": tmp_path / name,
             "eval": {"every": 20, "episodes": 1}, "log": {"every": 10, "tensorboard": False},
             "checkpoint": {"minutes": None, "every_steps": 20}}
        )  # fmt: skip

    with begin(settings("straight", 60)) as trainer:
        assert trainer.run().status == "finished"
        straight = trainer.loop.state_dict()
    with begin(settings("broken", 60)) as trainer:
        trainer.callbacks.append(StopAt(22))
        assert trainer.run().status == "stopped" and len(trainer.loop.steps) == 3
    with resume(tmp_path / "broken", {}) as trainer:
        assert trainer.run().step == 60
        assert states_equal(trainer.loop.state_dict(), straight) is None
    loop = make_loop(settings("other", 60))
    assert isinstance(loop, RolloutLoop)
    loop.close()


class StopAt(Callback):
    """Stops a run at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Any, progress: Any) -> bool:
        return bool(trainer.loop.step >= self.step)


def test_it_learns() -> None:
    """One of two actions is paid."""
    loop = make(make_env("rlopt-tests/Choose-v0", 8), steps=16, total=3_000)
    run(loop)
    assert float(loop.agent.rollouts[-1].reward.mean()) > 0.85
