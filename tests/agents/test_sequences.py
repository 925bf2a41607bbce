"""Agents that remember and learn from slices: losses by hand, burn-in, the carry, and a maze that needs a memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from rlopt.agents import sac_discrete
from rlopt.agents.actor_critic import Nets
from rlopt.agents.dqn import DQN, DQNConfig
from rlopt.agents.sac_discrete import DiscreteSAC, DiscreteSACConfig
from rlopt.agents.sequences import Course, Remembering, mean, priorities, rows
from rlopt.buffers import Batch, PrioritizedSampler, ReplayBuffer, SequenceSampler, UniformSampler
from rlopt.envs.t_maze import TMaze
from rlopt.loops.evaluation import run_episodes
from rlopt.loops.replay import ReplayLoop
from rlopt.nn import Actor, NetworkConfig, OptimiserConfig
from rlopt.policy import load_policy, save_policy
from rlopt.state import states_equal
from rlopt.training import train_config
from rlopt.training.setup import make_loop, resolve_config
from rlopt.types import EnvSpec, RloptError, map_obs
from tests.agents.cases import make_slices

D = torch.float64


def t(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=D)


class Adds:
    """A net whose memory h is the sum of w times what it has seen, and whose answer is (h, 0): of an actor logits, of
    two critics values and twice the values."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, params: Any, obs: Tensor, carry: Any, ended: Tensor, burnt: Tensor) -> Any:
        h, found = carry["memory"], []
        for step in range(obs.shape[1]):
            h = h + params["w"] * obs[:, step, 0]
            found.append(h)
            h = torch.where(burnt[:, step] > 0, h.detach(), h)
        answer = torch.stack(found, 1)
        answer = torch.stack((answer, torch.zeros_like(answer)), -1)
        return (answer if isinstance(self.module, Actor) else torch.stack((answer, 2 * answer))), {"memory": h}


NETS = Nets(Remembering(Adds(Actor()), "actor"), Remembering(Adds(nn.Module()), "critic"))  # type: ignore[arg-type]


def one_slice() -> Batch:
    """Three steps, of which the first is burnt in; the last one leads to an end for good."""
    return Batch(
        obs=t([[1.0], [2.0], [3.0]], [[1.0], [0.0], [0.0]]),
        action=torch.tensor([[1, 0, 0], [0, 0, 0]]),
        reward=t([9.0, 1.0, 2.0], [4.0, 0.0, 0.0]),
        next_obs=t([[2.0], [3.0], [-6.0]], [[0.5], [0.0], [0.0]]),
        terminated=t([0.0, 0.0, 1.0], [0.0, 0.0, 0.0]),
        discount=t([0.5, 0.5, 0.5], [0.5, 0.0, 0.0]),
        weight=t(1.0, 0.5),
        index=torch.arange(2),
        valid=t([1.0, 1.0, 1.0], [1.0, 0.0, 0.0]),
        mask=t([0.0, 1.0, 1.0], [1.0, 0.0, 0.0]),
        carry={"actor": t(-2.0, 0.0), "critic": t(1.0, 0.0)},
    )


def test_the_critics_loss_of_slices_by_hand() -> None:
    batch = rows(one_slice())
    w, alpha = {"w": t(1.0)[0].requires_grad_()}, t(0.5)[0]
    loss, metrics = sac_discrete.critic_loss(NETS, w, {"w": t(1.0)[0]}, {"w": t(0.5)[0]}, alpha, batch)

    # Critics' memory before: 1 and 0. h = 2, 4, 7 of the first slice, 1 of the second; Q1 = (h, 0), Q2 = (2h, 0).
    # The target's, with w = 1/2: 1.5, 2.5, 4 and then after each step 2.5, 4, 1; of the second 1/2, then 3/4.
    # The actor's: -1, 1, 4 and after each step 1, 4, -2; of the second 1, then 1.5.
    def soft(logit: float, q: float) -> float:
        p = 1.0 / (1.0 + math.exp(-logit))
        return p * (q - 0.5 * math.log(p)) - 0.5 * (1 - p) * math.log(1 - p)

    y1, y2, y3 = 1.0 + 0.5 * soft(4.0, 4.0), 2.0, 4.0 + 0.5 * soft(1.5, 0.75)
    squares = [(4 - y1) ** 2 + (8 - y1) ** 2, (7 - y2) ** 2 + (14 - y2) ** 2, 0.5 * ((1 - y3) ** 2 + (2 - y3) ** 2)]
    assert loss.item() == pytest.approx(0.5 * sum(squares) / 3)  # three steps count
    assert metrics["q"].item() == pytest.approx((4 + 7 + 1) * 1.5 / 3)
    error = [(abs(4 - y1) + abs(8 - y1)) / 2, (5 + 12) / 2, (y3 - 1 + y3 - 2) / 2]
    assert metrics["td"].tolist() == pytest.approx([0.9 * max(error[:2]) + 0.1 * sum(error[:2]) / 2, error[2]])
    loss.backward()
    # dh/dw from the steps that are not burnt in: 2, 2 + 3, and 1 of the second slice; dQ2/dw is twice that.
    slope = 2 * (4 - y1 + 2 * (8 - y1)) + 5 * (5 + 2 * 12) + 0.5 * (1 - y3 + 2 * (2 - y3))
    assert w["w"].grad.item() == pytest.approx(slope / 3)


def test_the_actors_loss_of_slices_by_hand() -> None:
    batch = rows(one_slice())
    w = {"w": t(1.0)[0].requires_grad_()}
    loss, metrics = sac_discrete.actor_loss(NETS, w, {"w": t(1.0)[0]}, t(0.5)[0], batch.obs, batch.mask)
    logits, q = [1.0, 4.0, 1.0], [4.0, 7.0, 1.0]  # π sees (h, 0); the smaller of both critics is the first
    p = [1.0 / (1.0 + math.exp(-x)) for x in logits]
    log_prob = [a * math.log(a) + (1 - a) * math.log(1 - a) for a in p]
    assert metrics["log_prob"].tolist() == pytest.approx([sum(log_prob) / 3])
    assert loss.item() == pytest.approx(sum(0.5 * h - a * x for h, a, x in zip(log_prob, p, q, strict=True)) / 3)
    loss.backward()
    # dJ/dz = p (1 - p) (α z - Q); dz/dw as above.
    slopes = [a * (1 - a) * (0.5 * z - x) for a, z, x in zip(p, logits, q, strict=True)]
    assert w["w"].grad.item() == pytest.approx((2 * slopes[0] + 5 * slopes[1] + slopes[2]) / 3)


def test_single_transitions_stay_as_they_are() -> None:
    batch = Batch(*(torch.zeros(2) for _ in range(6)), None, torch.arange(2))
    assert rows(batch) is batch and mean(t(1.0, 3.0)).item() == 2.0 and priorities(t(1.0), None).tolist() == [1.0]


def recurrent(**options: Any) -> DiscreteSAC:
    network = NetworkConfig(hidden=(8,), memory="gru", memory_size=6)
    config = DiscreteSACConfig(network=network, **{"warmup_steps": 0, **options})
    return DiscreteSAC(EnvSpec("test", spaces.Box(-1, 1, (3,)), spaces.Discrete(2)), config, seed=1)


def test_unrolled_networks_are_stepped_ones() -> None:
    """From the stored carry through the burn-in, and one step further for what comes next."""
    agent = recurrent()
    batch = make_slices(agent, 0)
    flat = rows(batch)
    assert isinstance(flat.obs, Course) and batch.carry is not None
    for net, name in ((agent.actor, "actor"), (agent.critic, "critic"), (agent.target, "critic")):
        call, carry = Remembering(net, name), {"memory": batch.carry[name]}
        now, later = call(net.params, flat.obs), call(net.params, flat.next_obs)  # type: ignore[arg-type]
        shape = (*now.shape[:-2], 8, 4, 2)
        for step in range(4):
            answer, carry = net.module(map_obs(lambda x, at=step: x[:, at], batch.obs), carry=carry)
            after, _ = net.module(map_obs(lambda x, at=step: x[:, at], batch.next_obs), carry=carry)
            there = batch.valid[:, step] > 0  # type: ignore[index]
            torch.testing.assert_close(now.view(shape)[..., :, step, :][..., there, :], answer[..., there, :])
            torch.testing.assert_close(later.view(shape)[..., :, step, :][..., there, :], after[..., there, :])


def test_what_is_remembered_is_stored_from_the_first_step_on() -> None:
    agent = recurrent(warmup_steps=100)
    carry = agent.initial_carry(2)
    assert carry is not None and agent.extra_fields.keys() == {"carry/actor", "carry/critic"}
    obs = torch.ones(2, 3)
    first = agent.act(obs, carry)
    agent.clock.env_steps = 100
    later = agent.act(obs, carry)
    for name in carry:
        assert torch.equal(first.carry[name], later.carry[name]) and first.carry[name].abs().min() > 0
    policy = agent.policy
    own = policy.actor.act(obs, {"memory": carry["actor"]}, True)[1]
    assert torch.equal(own["memory"], later.carry["actor"])
    with pytest.raises(RloptError, match="needs its carry"):
        agent.act(obs)
    with pytest.raises(RloptError, match="depend on more than these observations"):
        agent.q(obs, torch.zeros(2, dtype=torch.int64))


def maze_loop(memory: str, sampler: Any, update_mode: str = "eager", **options: Any) -> ReplayLoop:
    env = TMaze(16, seed=1)
    network = NetworkConfig(hidden=(16,), memory=memory, memory_size=16 if memory == "gru" else None)
    config = DiscreteSACConfig(
        **{"batch_size": 32, "warmup_steps": 352, "learning_rate": 1e-2, "temperature": 0.02, "gamma": 1.0,
           "tau": 0.05, "update_ratio": (1, 44), **options}, network=network,
    )  # fmt: skip
    agent = DiscreteSAC(env.spec, config, seed=0)
    buffer = ReplayBuffer(
        20_000, env.observation_space, env.action_space, 16, sampler, extra_fields=agent.extra_fields, gamma=1.0
    )
    return ReplayLoop(agent, env, buffer, 10_000, update_mode=update_mode)


@pytest.mark.parametrize(("memory", "least", "most"), [("gru", 0.95, 1.0), ("none", 0.0, 0.6)])
def test_what_was_seen_ten_steps_ago(memory: str, least: float, most: float, tmp_path: Path) -> None:
    sampler = SequenceSampler(UniformSampler(), 11, start="episode") if memory == "gru" else UniformSampler()
    loop = maze_loop(memory, sampler)
    while loop.step < loop.total_steps:
        loop.advance()
    save_policy(loop.policy(), tmp_path / "policy")
    policy = load_policy(tmp_path / "policy")
    assert policy.recurrent == (memory == "gru")
    found = run_episodes(policy, TMaze(50, seed=9, autoreset=False), 200, seed=5)
    assert least <= sum(e.total_reward for e in found) / 200 <= most


def test_q_learning_remembers_too(tmp_path: Path) -> None:
    """The same helpers around one network: double DQN, of whole episodes."""
    env = TMaze(16, seed=1)
    config = DQNConfig(
        batch_size=32, warmup_steps=352, learning_rate=1e-2, gamma=1.0, update_ratio=(1, 44), double=True,
        target_counts="updates", target_every=10, epsilon_steps=4_000, optimiser=OptimiserConfig(),
        network=NetworkConfig(hidden=(16,), memory="gru", memory_size=16),
    )  # fmt: skip
    agent = DQN(env.spec, config, seed=0)
    assert agent.extra_fields.keys() == {"carry/critic"}
    sampler = SequenceSampler(UniformSampler(), 11, start="episode")
    buffer = ReplayBuffer(
        20_000, env.observation_space, env.action_space, 16, sampler, extra_fields=agent.extra_fields, gamma=1.0
    )
    loop = ReplayLoop(agent, env, buffer, 10_000)
    while loop.step < loop.total_steps:
        loop.advance()
    save_policy(loop.policy(), tmp_path / "policy")
    found = run_episodes(load_policy(tmp_path / "policy"), TMaze(50, seed=9, autoreset=False), 200, seed=5)
    assert sum(e.total_reward for e in found) / 200 >= 0.95


def test_a_loop_goes_on_exactly_in_the_middle_of_episodes() -> None:
    """With priorities of slices and a burn-in, from a state that was saved between two ends."""
    options = {"warmup_steps": 64, "update_ratio": (1, 16)}
    loop, back = (maze_loop("gru", SequenceSampler(PrioritizedSampler(), 6, burn_in=2), **options) for _ in range(2))
    for _ in range(25):
        loop.advance()
    back.load_state_dict(loop.state_dict())
    for name, log in back.row_logs().items():
        log.write_rows(0, loop.row_logs()[name].read_rows(0, 25))
    back.rows_restored()
    for _ in range(10):
        loop.advance()
        back.advance()
    assert loop.agent.clock.updates == 31 and states_equal(loop.state_dict(), back.state_dict()) is None


def test_recorded_updates_are_the_same() -> None:
    options = {"warmup_steps": 64, "update_ratio": (1, 16)}
    loops = []
    for mode in ("eager", "captured"):
        loop = maze_loop("gru", SequenceSampler(UniformSampler(), 6, burn_in=2), update_mode=mode, **options)
        for _ in range(12):
            loop.advance()
        loops.append(loop)
    assert loops[0].agent.clock.updates > 5
    assert states_equal(loops[0].agent.state_dict(), loops[1].agent.state_dict()) is None


def test_runs_side_by_side_remember_apart() -> None:
    options = {"network": NetworkConfig(hidden=(8,), memory="gru", memory_size=6), "warmup_steps": 0}
    spec = EnvSpec("test", spaces.Box(-1, 1, (3,)), spaces.Discrete(2))
    both = DiscreteSAC(spec, DiscreteSACConfig(**options), seed=1, runs=2)
    alone = [DiscreteSAC(spec, DiscreteSACConfig(**options), seed=1 + r) for r in range(2)]
    carry, carries = both.initial_carry(6), [agent.initial_carry(3) for agent in alone]
    for step in range(3):
        obs = torch.full((6, 3), 0.3 * step)
        act = both.act(obs, carry)
        for r, agent in enumerate(alone):
            one = agent.act(obs[:3], carries[r])
            assert torch.equal(one.action, act.action[3 * r : 3 * r + 3])
            for name, leaf in one.carry.items():
                torch.testing.assert_close(leaf, act.carry[name][3 * r : 3 * r + 3])
            carries[r] = one.carry
        carry = act.carry


def test_mistakes_are_told() -> None:
    def made(agent: dict[str, Any], **buffer: Any) -> Any:
        options = {"env": {"id": "CartPole-v1"}, "eval": {"every": None}, "buffer": {"capacity": 100, **buffer}}
        return make_loop(resolve_config(train_config({**options, "agent": {"name": "sac_discrete", **agent}})))

    gru = {"network": {"memory": "gru"}}
    with pytest.raises(RloptError, match=r"agent\.network\.memory=gru: it is learnt from slices; give their length"):
        made(gru)
    with pytest.raises(RloptError, match=r"sequence_length=5: .*; give agent\.network\.memory=gru, or leave it out"):
        made({}, sequence_length=5)
    with pytest.raises(RloptError, match=r"agent\.n_step=2 is not combined with buffer\.sequence_length"):
        made({**gru, "n_step": 2}, sequence_length=5)
    with pytest.raises(RloptError, match=r"agent\.td_loss=pal is not combined with agent\.network\.memory"):
        made({**gru, "td_loss": "pal"}, sequence_length=5)
    loop = made(gru, sequence_length=5)
    loop.close()
