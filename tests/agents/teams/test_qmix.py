"""IQL, VDN and QMIX: their loss by hand, monotone mixing, the two-step game, and what IQL is with one agent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.agents.dqn import DQN, DQNConfig
from rlopt.agents.td import squared
from rlopt.agents.teams.qmix import QMIX, Mixer, Nets, QMIXConfig, TeamRows, loss
from rlopt.buffers import Batch
from rlopt.joint import join_spaces
from rlopt.nn import NetworkConfig, OptimiserConfig
from rlopt.policy import load_policy, save_policy
from rlopt.types import EnvSpec, RloptError
from tests.agents.cases import CHOICE, OBSERVATION, make_batch
from tests.agents.teams.games import joined, matrix_spec, shared_spec, team_batch, team_spec

SMALL: dict[str, Any] = {"network": NetworkConfig(hidden=(8,)), "batch_size": 8, "warmup_steps": 0}


def make(spec: EnvSpec, mixer: str, **options: Any) -> QMIX:
    return QMIX(spec, QMIXConfig(**{**SMALL, "mixer": mixer, "share_parameters": False, **options}))


# The loss by hand


class Stub:
    """Two agents with two actions, whose values are the parameter times (1, 2) and (10, 20); mixed q₁ + 2 q₂ + s."""

    def __call__(self, params: float, seen: Any, mixed: tuple[Tensor, Tensor] | None = None) -> Any:
        if mixed is not None:
            q, state = mixed
            return q[:, 0] + 2.0 * q[:, 1] + state
        return [params * torch.tensor([[1.0, 2.0]]), params * torch.tensor([[10.0, 20.0]])]


def rows(mixer: str, **more: Any) -> TeamRows:
    each = (1, 2) if mixer == "none" else (1,)
    made = TeamRows(
        (), (), torch.tensor([5.0]), torch.tensor([7.0]), torch.tensor([[0, 1]]), torch.full(each, 1.0),  # type: ignore[arg-type]
        torch.zeros(each), torch.tensor([0.5]), None, None, None,
    )  # fmt: skip
    return made._replace(**more)


@pytest.mark.parametrize(
    ("mixer", "error"),
    [
        # q = (1, 20), by the target, which doubles them, the best next are (4, 40).
        ("none", [1.0 - (1 + 0.5 * 4), 20.0 - (1 + 0.5 * 40)]),
        ("sum", [21.0 - (1 + 0.5 * 44)]),
        ("monotone", [1 + 40 + 5 - (1 + 0.5 * (4 + 80 + 7))]),
    ],
)
def test_the_loss_by_hand(mixer: str, error: list[float]) -> None:
    stub: Any = Stub()
    found, metrics = loss(Nets(stub, stub, mixer), 1.0, 2.0, rows(mixer), (), False, squared)  # type: ignore[arg-type]
    assert float(found) == pytest.approx(sum(0.5 * x**2 for x in error))
    assert metrics["td"].tolist() == pytest.approx([np.mean(np.abs(error))])


def test_the_dead_count_nothing_and_end() -> None:
    stub: Any = Stub()
    dead = {"alive": torch.tensor([[1.0, 0.0]]), "alive_next": torch.tensor([[0.0, 1.0]])}
    found, _ = loss(Nets(stub, stub, "sum"), 1.0, 2.0, rows("sum", **dead), (), False, squared)  # type: ignore[arg-type]
    assert float(found) == pytest.approx(0.5 * (1.0 - (1 + 0.5 * 40)) ** 2)
    spec = team_spec("discrete", alive=True)
    batch = team_batch(spec)
    batch.obs["alive"][0], batch.next_obs["alive"][1] = torch.tensor([1, 0, 1]).bool(), torch.tensor([0, 1, 1]).bool()
    batch.obs["alive"][2] = False
    each, whole = (make(spec, mixer).prepare(batch).batch for mixer in ("none", "sum"))
    assert each.weight[0].tolist() == [1, 0, 1] and each.terminated[1, 0] == 1
    assert whole.weight[:3].tolist() == [1, 1, 0] and whole.terminated[1] == batch.terminated[1]


def test_the_priority_is_of_the_living() -> None:
    stub: Any = Stub()
    dead = {"alive": torch.tensor([[0.0, 1.0]]), "alive_next": torch.tensor([[1.0, 1.0]])}
    _, metrics = loss(Nets(stub, stub, "none"), 1.0, 2.0, rows("none", **dead), (), False, squared)  # type: ignore[arg-type]
    assert metrics["td"].tolist() == [1.0]  # 20 - (1 + 0.5 · 40)


def test_one_agent_shares_with_nobody() -> None:
    with pytest.raises(
        RloptError, match=r"^agent\.share_parameters=false has no effect: t has one agent; leave it out$"
    ):
        make(EnvSpec("t", OBSERVATION, CHOICE), "none")


def test_a_dead_agent_moves_no_weight_of_its_own() -> None:
    spec = team_spec("discrete", alive=True)
    batch = team_batch(spec)
    batch.obs["alive"][:, 1] = False
    for mixer in ("none", "sum", "monotone"):
        agent = make(spec, mixer, optimiser=OptimiserConfig(name="sgd"), learning_rate=1.0, max_grad_norm=None)
        before = {name: x.clone() for name, x in agent.critic.module.named_parameters()}
        agent.update(batch)
        moved = {name.split(".")[1] for name, x in agent.critic.module.named_parameters() if not x.equal(before[name])}
        assert "1" not in moved and {"0", "2"} <= moved


# The mixer


def test_the_teams_value_rises_with_each_agents() -> None:
    generator = torch.Generator().manual_seed(0)
    mixer = Mixer(spaces.Box(-9, 9, (4,)), 3, 8, 16)
    q = torch.randn((64, 3), generator=generator, requires_grad=True)
    state = 3.0 * torch.randn((64, 4), generator=generator)
    (slope,) = torch.autograd.grad(mixer(q, state).sum(), q)
    assert (slope >= 0).all() and (slope > 0).any()
    with torch.no_grad():
        assert not torch.allclose(mixer(q, state), mixer(q, -state))


def two_step(agent: QMIX, updates: int) -> tuple[Tensor, Tensor]:
    """Learn the two-step game (Rashid et al. 2018, section 6) from all of its transitions; return the team's values
    (2, 2) of the second game 2B, and what the first agent does at the start.

    At the start the first agent chooses the game: in 2A everything pays 7, in 2B [[0, 1], [1, 8]].
    """
    where, acts, reward, then = [], [], [], []
    for a in range(2):
        for b in range(2):
            where += [0, 1, 2]
            acts += [(a, b)] * 3
            reward += [0.0, 7.0, [[0.0, 1.0], [1.0, 8.0]][a][b]]
            then += [1 + a, 1, 2]

    def seen(at: list[int]) -> dict[str, Tensor]:
        one_hot = torch.eye(3)[at]
        return {"obs": one_hot.unsqueeze(1).expand(-1, 2, -1), "state": one_hot}

    over = torch.tensor([float(w > 0) for w in where])
    ones = torch.ones(len(where))
    batch = Batch(
        seen(where), torch.tensor(acts), torch.tensor(reward), seen(then), over, 0.99 * ones, None, torch.arange(12)
    )
    for _ in range(updates):
        agent.update(batch)
    work = agent.prepare(batch).batch
    with torch.no_grad():
        own = agent.critic.module(work.seen)
        chosen = torch.stack(
            [own[0].gather(1, work.action[:, :1])[:, 0], own[1].gather(1, work.action[:, 1:])[:, 0]], 1
        )
        total = chosen.sum(1) if agent.config.mixer == "sum" else agent.critic.module((), (chosen, work.state))
    return total[2::3].view(2, 2), own[0][0].argmax()


def test_a_game_that_no_sum_of_values_can_tell() -> None:
    one = spaces.Box(0.0, 1.0, (3,), np.float32)
    own = [(one, spaces.Discrete(2))] * 2
    observation, action = join_spaces(own, one)
    spec = EnvSpec("TwoStep-v0", observation, action, agents=("a", "b"), agent_spaces=tuple(own))  # type: ignore[arg-type]
    options = {"learning_rate": 1e-2, "target_every": 20, "share_parameters": True}
    game, first = two_step(make(spec, "monotone", **options), 500)
    assert torch.allclose(game, torch.tensor([[0.0, 1.0], [1.0, 8.0]]), atol=0.3) and int(first) == 1
    game, first = two_step(make(spec, "sum", **options), 500)
    assert float(game[1, 1]) == pytest.approx(6.5, abs=0.3) and int(first) == 0  # the best sum misses 8, and so 2B


# With one agent


@pytest.mark.parametrize(("double", "memory"), [(False, "none"), (True, "none"), (True, "gru")])
def test_with_one_agent_iql_is_dqn_to_the_bit(double: bool, memory: str) -> None:
    network = NetworkConfig(hidden=(8,), memory=memory, memory_size=5 if memory == "gru" else None)
    options = {**SMALL, "double": double, "target_every": 3, "target_counts": "updates", "td_loss": "squared",
               "network": network}  # fmt: skip
    one = DQN(OBSERVATION, CHOICE, DQNConfig(**options))
    spec = EnvSpec("Alone-v0", OBSERVATION, CHOICE)
    team = QMIX(spec, QMIXConfig(**options, mixer="none", learning_rate=6.25e-5, max_grad_norm=None,
                                 optimiser=OptimiserConfig(epsilon=1.5e-4), epsilon_end=0.01))  # fmt: skip
    assert one.critic.flat.equal(team.critic.flat)
    obs = torch.randn((5, 4), generator=torch.Generator().manual_seed(0))
    carries = [agent.initial_carry(5) for agent in (one, team)]
    for i in range(4):
        batch = mine = make_batch(one, i)
        if batch.carry is not None:
            mine = batch._replace(carry={key: x.unsqueeze(1) for key, x in batch.carry.items()})
        assert one.update(batch).metrics["critic_loss"].equal(team.update(mine).metrics["critic_loss"])
        acts = [agent.act(obs, carry) for agent, carry in zip((one, team), carries, strict=True)]
        carries = [act.carry for act in acts]
        assert acts[0].action.equal(acts[1].action)
    assert one.critic.flat.equal(team.critic.flat) and one.target.flat.equal(team.target.flat)


# With a memory

GRU = NetworkConfig(hidden=(8,), memory="gru", memory_size=5)


def slices(agent: QMIX, seed: int, length: int = 4, size: int = 6) -> Batch:
    """Random slices of ``length`` steps, of which the first is burnt in and the last of some is missing."""
    flat = team_batch(agent.spec, seed, size * length).map(lambda x: x.unflatten(0, (size, length)))
    valid = torch.ones(size, length)
    valid[::2, -1] = 0.0
    mask = valid.clone()
    mask[:, 0] = 0.0
    begun: Any = agent.initial_carry(size)
    g = torch.Generator().manual_seed(seed)
    carry = {key: torch.rand(x.shape, generator=g) for key, x in begun.items()}
    return flat._replace(valid=valid, mask=mask, carry=carry, index=torch.arange(size))


@pytest.mark.parametrize(("mixer", "shared"), [("none", True), ("sum", False), ("monotone", True)])
def test_a_memory_travels_through_acting_learning_runs_and_the_exported_policy(
    mixer: str, shared: bool, tmp_path: Any
) -> None:
    spec = shared_spec()
    config = QMIXConfig(**{**SMALL, "mixer": mixer, "share_parameters": shared, "network": GRU, "target_every": 2})
    together, alone = QMIX(spec, config, seed=5, runs=2), [QMIX(spec, config, seed=5 + r) for r in range(2)]
    assert together.extra_fields == alone[0].extra_fields == {"carry/critic": ((3, 5), torch.float32)}
    for k in range(2):
        batches = [slices(agent, 10 * k + r) for r, agent in enumerate(alone)]
        found = together.update(joined(batches))
        singles = [agent.update(batch) for agent, batch in zip(alone, batches, strict=True)]
        losses = torch.stack([s.metrics["critic_loss"] for s in singles])
        torch.testing.assert_close(found.metrics["critic_loss"], losses, rtol=1e-3, atol=1e-4)
        assert found.priority is not None and found.priority.shape == (12,)
        torch.testing.assert_close(found.priority, torch.cat([s.priority for s in singles]), rtol=1e-3, atol=1e-4)
    save_policy(alone[0].policy, tmp_path / "policy")
    agent, loaded = alone[0], load_policy(tmp_path / "policy")
    carry, theirs, many = agent.initial_carry(4), loaded.initial_carry(4), together.initial_carry(8)
    for k in range(3):
        obs = [team_batch(spec, k + r, 4).obs for r in range(2)]
        mine, other = agent.act(obs[0], carry, deterministic=True), loaded.act(obs[0], theirs)
        both = together.act(joined(obs), many, deterministic=True)
        carry, theirs, many = mine.carry, other.carry, both.carry
        assert mine.action.equal(other.action) and both.action[:4].equal(mine.action)
    assert carry is not None and many is not None and float(carry["critic"].abs().sum()) > 0
    torch.testing.assert_close(many["critic"][:4], carry["critic"], rtol=1e-3, atol=1e-4)
    with pytest.raises(RloptError, match="needs its carry"):
        agent.act(obs[0])


def test_what_is_burnt_in_or_missing_moves_nothing_else() -> None:
    """A slice's loss does not see beyond its mask; the burnt step matters by what is remembered of it."""
    agent = make(shared_spec(), "sum", network=GRU, share_parameters=True)
    batch = slices(agent, 0)
    work = agent.prepare(batch)
    base = float(agent.loss(agent.critic.params, agent.target.params, work.batch, ())[0])
    assert batch.valid is not None

    def changed(where: Tensor) -> float:
        reward = torch.where(where.bool(), batch.reward + 9.0, batch.reward)
        seen = agent.prepare(batch._replace(reward=reward)).batch
        return float(agent.loss(agent.critic.params, agent.target.params, seen, ())[0])

    assert batch.mask is not None
    assert changed(1.0 - batch.mask) == pytest.approx(base) and changed(batch.mask) > base + 1.0


# Several runs


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("mixer", ["none", "sum", "monotone"])
def test_runs_side_by_side_are_single_runs(mixer: str, shared: bool) -> None:
    """With networks that lie beside each other, and mapped where a layer does not (normalised ones)."""
    spec = shared_spec()
    for norm in ("none", "layer") if mixer == "none" else ("none",):
        options = {"share_parameters": shared, "network": NetworkConfig(hidden=(8, 8), norm=norm), "target_every": 2}
        config = QMIXConfig(**{**SMALL, "mixer": mixer, **options})
        together = QMIX(spec, config, seed=5, runs=3)
        assert together.beside == (norm == "none")
        alone = [QMIX(spec, config, seed=5 + r) for r in range(3)]
        for k in range(3):
            batches = [team_batch(spec, 10 * k + r) for r in range(3)]
            found = together.update(joined(batches))
            singles = [agent.update(batch) for agent, batch in zip(alone, batches, strict=True)]
            for key, value in found.metrics.items():
                torch.testing.assert_close(value, torch.stack([s.metrics[key] for s in singles]), rtol=1e-3, atol=1e-4)
            assert found.priority is not None and found.priority.shape == (24,)
        together.clock.env_steps = 0
        obs = [batch.obs for batch in batches]
        for deterministic in (False, True):
            acts = together.act(joined(batches).obs, deterministic=deterministic).action
            own = [a.act(o, deterministic=deterministic).action for a, o in zip(alone, obs, strict=True)]
            assert torch.equal(acts, torch.cat(own))
        for r, agent in enumerate(alone):
            for net in ("critic", "target"):
                stacked, single = getattr(together, net).flat[r], getattr(agent, net).flat
                torch.testing.assert_close(stacked, single, rtol=1e-3, atol=1e-4)


# Acting


def test_explores_and_is_exported(tmp_path: Any) -> None:
    spec = team_spec("discrete")
    for shared in (False,):
        agent = make(spec, "monotone", share_parameters=shared, epsilon_start=1.0, epsilon_end=0.0, epsilon_steps=100)
        obs = {key: x[:1].expand(400, *x.shape[1:]) for key, x in team_batch(spec).obs.items()}
        agent.clock.env_steps = 1
        drawn = agent.act(obs).action
        assert drawn.shape == (400, 3) and [len(drawn[:, i].unique()) for i in range(3)] == [2, 3, 5]
        agent.clock.env_steps = 1_000
        greedy = agent.act(obs).action
        assert len(greedy.unique(dim=0)) == 1
        save_policy(agent.policy, tmp_path / "policy")
        assert load_policy(tmp_path / "policy").act(obs).action.equal(greedy)


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        (EnvSpec("Alone-v0", OBSERVATION, CHOICE), {"mixer": "sum"}, "nothing to mix; use agent=dqn"),
        (matrix_spec((2, 2)), {"mixer": "none", "team_reward": False}, "pays its agents one reward together"),
    ],
)
def test_what_does_not_fit_is_refused(spec: EnvSpec, options: dict[str, Any], said: str) -> None:
    with pytest.raises(RloptError, match=said):
        make(spec, **options)
