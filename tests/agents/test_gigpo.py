"""GiGPO for networks: the loss by hand, what counts as the same state, which steps are learnt from, learning."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.agents import GiGPO, GiGPOConfig, anchors, register_anchor
from rlopt.agents.anchors import tensor_anchors
from rlopt.agents.surrogate import divergence, policy_loss, surrogate
from rlopt.buffers import Rollout
from rlopt.config import build
from rlopt.envs import make_env
from rlopt.loops.group import GroupLoop
from rlopt.nn import NetworkConfig
from rlopt.types import RloptError

TABLE = NetworkConfig(hidden=())


# The loss


def test_gains_by_hand() -> None:
    """Ratios 1.5, 0.5 and 4; ε = 0.2 below and 0.3 above, c = 3."""
    log_ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 4.0]).log()
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0])
    assert surrogate(log_ratio, advantage, 0.2).tolist() == pytest.approx([1.2, 0.5, -1.5, -0.8, -4.0])
    assert surrogate(log_ratio, advantage, 0.2, 0.3)[0] == pytest.approx(1.3)
    assert surrogate(log_ratio, advantage, 0.2, dual=3.0).tolist() == pytest.approx([1.2, 0.5, -1.5, -0.8, -3.0])


def test_the_divergence_by_hand() -> None:
    """π_ref / π = 2 and ½: 2 - 1 - log 2, ½ - 1 + log 2."""
    found = divergence(torch.tensor([0.25, 0.5]).log(), torch.tensor([0.5, 0.25]).log())
    assert found.tolist() == pytest.approx([1 - math.log(2), math.log(2) - 0.5])


def test_the_loss_by_hand() -> None:
    c = GiGPOConfig(kl_coefficient=0.5, entropy_coefficient=0.1)
    log_prob = torch.tensor([0.5, 0.25]).log().requires_grad_()
    old, reference = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.5, 0.5]).log()
    advantage, entropy = torch.tensor([2.0, -1.0]), torch.tensor([0.4, 0.6])
    loss, metrics = policy_loss(log_prob, entropy, old, advantage, reference, c)
    away = (2 - 1 - math.log(2)) / 2
    gain = (2.0 - 0.8) / 2  # the second ratio, ½, is clipped to 0.8
    assert float(loss.detach()) == pytest.approx(-gain + 0.5 * away - 0.05)
    assert float(metrics["clip_fraction"]) == 0.5 and float(metrics["reference_kl"]) == pytest.approx(away)
    loss.backward()
    # -2/2 of the first; of the second, which is clipped, only the divergence: ½ · (1 - 2) / 2.
    assert log_prob.grad is not None and log_prob.grad.tolist() == pytest.approx([-1.0, -0.25])
    # Of a weight of its own for each action: ¼ and ¾.
    weighed, _ = policy_loss(log_prob, entropy, old, advantage, reference, c, torch.tensor([0.25, 0.75]))
    assert float(weighed.detach()) == pytest.approx(-(2.0 - 3 * 0.8) / 4 + 0.5 * 0.75 * 2 * away - 0.1 * 0.55)


# Anchors


def anchor(obs: Any, episode: list[int], **options: Any) -> list[list[int]]:
    action = torch.arange(len(episode))
    found = tensor_anchors(obs, action, torch.tensor(episode), torch.zeros(len(episode), dtype=torch.int64), **options)
    return [level.tolist() for level in found]


def test_observations_agree_where_every_bit_of_every_leaf_does() -> None:
    obs = {"a": torch.tensor([[1.0], [1.0], [1.0], [-0.0], [0.0]]), "b": torch.tensor([1, 1, 2, 0, 0])}
    assert anchor(obs, [0, 0, 1, 1, 1]) == [[0, 0, 1, 2, 2]]


def test_rounded_observations_repeat() -> None:
    obs = torch.tensor([[0.123], [0.124], [0.13]])
    assert anchor(obs, [0, 1, 2]) == [[0, 1, 2]]
    assert anchor(obs, [0, 1, 2], digits=2) == [[0, 0, 1]]


def test_history_must_agree_as_well_and_nested_levels_ask_for_more_of_it() -> None:
    """Episode 0 sees 5, 7, 9, episode 1 sees 6, 7, 9, episode 2 begins with 7."""
    obs, episode = torch.tensor([5, 7, 9, 6, 7, 9, 7]), [0, 0, 0, 1, 1, 1, 2]
    seven = [1, 4, 6]
    (plain,) = anchor(obs, episode)
    assert len({plain[at] for at in seven}) == 1 and plain[2] == plain[5]
    (once,) = anchor(obs, episode, history=1)
    assert len({once[at] for at in seven}) == 3 and once[2] == once[5]
    level0, level1, level2 = anchor(obs, episode, nested=2)
    assert level0 == plain and level1 == once and level2[2] != level2[5]


def test_a_function_of_ones_own_says_what_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchors, "KEYS", {})
    seen = []

    def parity(observation: Any, info: Any, history: Any) -> int:
        seen.append((observation.tolist(), dict(info), [(o.tolist(), int(a)) for o, a in history]))
        return int(observation[0]) % 2

    register_anchor("parity", parity)
    agent = GiGPO(spaces.Box(-9, 9, (1,)), spaces.Discrete(2), GiGPOConfig(anchor="parity"))
    obs = torch.tensor([[1.0], [2.0], [3.0]])
    assert anchor(obs, [0, 1, 0], key=agent.key) == [[0, 1, 0]]
    assert seen[-1] == ([3.0], {}, [([1.0], 0)])
    with pytest.raises(RloptError, match="exists already"):
        register_anchor("parity", len)  # type: ignore[arg-type]
    with pytest.raises(RloptError, match=r"agent\.anchor=pairity is unknown; did you mean"):
        GiGPO(spaces.Box(-9, 9, (1,)), spaces.Discrete(2), GiGPOConfig(anchor="pairity"))


def test_a_function_of_ones_own_is_told_what_the_environment_says() -> None:
    seen = []

    def key(observation: Any, info: Any, history: Any) -> float:
        seen.append(dict(info))
        return float(info.get("lives", -1.0))

    told = {"lives": torch.tensor([math.nan, math.nan, 3.0, 2.0]), "won": torch.tensor([math.nan] * 3 + [0.0])}
    assert anchor(torch.zeros(4, 1), [0, 1, 0, 1], key=key, info=told) == [[0, 0, 1, 2]]
    assert seen == [{}, {}, {"lives": 3.0}, {"lives": 2.0, "won": 0.0}]


class Lives(gym.Env):
    """Counts down what an observation does not show; the last one ends it."""

    observation_space, action_space = spaces.Discrete(2), spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.lives = 3
        return 0, {}

    def step(self, action: Any) -> Any:
        self.lives -= 1
        return 0, float(action), self.lives == 0, False, {"lives": self.lives}


def test_what_env_facts_names_reaches_the_anchor_with_the_observation(monkeypatch: pytest.MonkeyPatch) -> None:
    gym.register("rlopt-tests/Lives-v0", entry_point=Lives)
    monkeypatch.setattr(anchors, "KEYS", {})
    register_anchor("lives", lambda observation, info, history: (info.get("lives"), len(history)))
    env = make_env("rlopt-tests/Lives-v0", 4, autoreset=False, facts=("lives",))
    agent = GiGPO(env.spec, GiGPOConfig(groups=2, group_size=2, anchor="lives", network=TABLE))
    loop = GroupLoop(agent, env, 100)
    rollout, _ = loop._collect()
    assert rollout is not None and set(rollout.extras) == {"info/lives"}
    assert rollout.extras["info/lives"].nan_to_num(-1.0)[:, 0].tolist() == [-1.0, 2.0, 1.0]
    _, metrics = agent.samples(rollout)
    assert float(metrics["anchor_size"]) == 2.0  # by lives, of which there are three; by observation it would be six


# What is learnt from


def rollout(agent: GiGPO) -> Rollout:
    """Two steps of a group of three: the first wins, the second is over after a step, the third was lost half-way."""
    valid = torch.tensor([[True, True, True], [True, False, False]])
    obs = torch.tensor([[0, 0, 0], [1, 3, 3]])
    action = torch.tensor([[0, 1, 1], [0, 1, 1]])
    ended = torch.tensor([[False, True, True], [True, False, False]])
    reward = torch.tensor([[0.0, 0.0, 9.0], [1.0, 0.0, 0.0]])
    none = torch.zeros_like(ended)
    complete, group = torch.tensor([True, True, False]), torch.tensor([0, 0, 0])
    return Rollout(obs, action, reward, None, ended & valid, none, ended, valid, {}, group, complete)


def make(**options: Any) -> GiGPO:
    config = GiGPOConfig(network=TABLE, normaliser="none", gamma=0.5, **options)
    return GiGPO(spaces.Discrete(4), spaces.Discrete(2), config)


def test_steps_of_lost_episodes_and_padding_are_not_learnt_from() -> None:
    data, metrics = make().samples(rollout(make()))
    assert data.obs.tolist() == [0, 0, 1]  # type: ignore[union-attr]
    # R = 1 and 0; at 0 stand returns ½ and 0.
    assert data.advantage.tolist() == pytest.approx([0.5 + 0.25, -0.5 - 0.25, 0.5])
    assert float(metrics["singletons"]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("estimator", ["gigpo", "grpo", "step", "rloo", "ppo"])
def test_rows_of_finished_episodes_change_nothing(estimator: str) -> None:
    """Trap 5: rows that pad a rollout to a length, which repeat a step and even its reward, enter no mean, no deviation
    and no group."""
    agent = GiGPO(spaces.Discrete(4), spaces.Discrete(2), GiGPOConfig(network=TABLE, estimator=estimator))
    whole = rollout(agent)
    padded = whole.map(lambda x: torch.cat((x, x[-1:], x[-1:])))
    padded = padded._replace(valid=torch.cat((whole.valid, torch.zeros(2, 3, dtype=torch.bool))))
    (plain, told), (more, also) = agent.samples(whole), agent.samples(padded)
    assert plain.advantage.equal(more.advantage) and plain.log_prob.equal(more.log_prob)
    assert told.keys() == also.keys() and all(told[name].equal(also[name]) for name in told)


def test_the_first_ratio_is_one_and_a_whole_batch_moves_by_the_policy_gradient() -> None:
    agent, at = make(), torch.tensor([0, 1])
    before = agent.actor_module(at).softmax(-1)[:, 0].detach()
    done = agent.update(rollout(agent))
    assert float(done.metrics["clip_fraction"]) == 0.0 and abs(float(done.metrics["approx_kl"])) < 1e-6
    assert (agent.actor_module(at).softmax(-1)[:, 0] > before).all() and agent.clock.updates == 1


def test_ppos_advantages_come_from_a_critic() -> None:
    agent = make_ppo()
    data, _ = agent.samples(rollout(agent))
    assert data.target is not None and float(data.advantage.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(data.advantage.std()) == pytest.approx(1.0, rel=1e-5)
    before = agent.critic.flat.clone()  # type: ignore[union-attr]
    agent.update(rollout(agent))
    assert not agent.critic.flat.equal(before)  # type: ignore[union-attr]


def make_ppo() -> GiGPO:
    return GiGPO(spaces.Discrete(4), spaces.Discrete(2), GiGPOConfig(network=TABLE, estimator="ppo"))


def test_the_reference_stays_where_the_policy_began() -> None:
    agent = make(kl_coefficient=0.1, epochs=3, batch_size=1)
    begun = agent.actor.flat.clone()
    agent.update(rollout(agent))
    assert agent.reference is not None and agent.reference.flat.equal(begun) and not agent.actor.flat.equal(begun)


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "grpo", "anchor_digits": 2},
        {"estimator": "rloo", "gae_lambda": 0.9},
        {"critic_learning_rate": 0.1},
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RloptError, match=r"agent\..* has no effect without agent\.estimator"):
        build(GiGPOConfig, options, "agent")


@pytest.mark.parametrize("space", [spaces.MultiDiscrete([2, 3]), spaces.Box(-1, 1, (2,))])
@pytest.mark.parametrize("estimator", ["gigpo", "ppo"])
def test_it_acts_in_every_space(space: spaces.Space[Any], estimator: str) -> None:
    agent = GiGPO(spaces.Box(-1, 1, (3,)), space, GiGPOConfig(estimator=estimator))
    obs = torch.zeros(2, 4, 3)
    acts = [agent.act(row) for row in obs]
    flags = torch.zeros(2, 4, dtype=torch.bool)
    ended = torch.tensor([[False] * 4, [True] * 4])
    extras = {name: torch.stack([act.extras[name] for act in acts]) for name in agent.extra_fields}
    batch = Rollout(
        obs, torch.stack([act.action for act in acts]), torch.rand(2, 4, generator=torch.Generator().manual_seed(0)),
        None, ended, flags, ended, ~flags, extras, torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.bool),
    )  # fmt: skip
    before = agent.actor.flat.clone()
    assert np.isfinite(float(agent.update(batch).metrics["policy_loss"])) and not agent.actor.flat.equal(before)
