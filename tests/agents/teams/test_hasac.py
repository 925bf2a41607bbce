"""HASAC's losses by hand, what its agents see of each other, and what it becomes with one agent."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.agents.sac import SAC, SACConfig
from rlopt.agents.td import squared
from rlopt.agents.teams.hasac import HASAC, MASAC, actor_loss, soft_target
from rlopt.agents.teams.hatd3 import HATD3, MATD3
from rlopt.agents.teams.joint_critic import JointBatch, TeamNets, critic_loss
from rlopt.agents.teams.members import own_actions, straight_through
from rlopt.agents.value_normaliser import moments, updated
from rlopt.joint import join_spaces
from rlopt.nn import CategoricalActor, NetworkConfig, OptimiserConfig
from rlopt.types import AgentSpaces, EnvSpec, RloptError
from tests.agents.cases import OBSERVATION, TORQUE, make_batch
from tests.agents.teams.games import SMALL, matrix_spec, play, shared_spec, team, team_batch, team_spec

# --- losses by hand


def stub(rows: int = 1) -> TeamNets:
    """Two agents with one action dimension each, whose action is their noise and log π twice that; Q₁ = s + 2 a¹ + 3 a²
    and Q₂ = Q₁ + 1."""

    def critic(params: float, obs: Tensor, action: Tensor) -> Tensor:
        q = params * (obs[:, 0] + 2.0 * action[:, 0] + 3.0 * action[:, 1])
        return torch.stack([q, q + 1.0])

    own: Any = SimpleNamespace(features=1, sample=lambda out, noise: (out * noise, 2.0 * noise[:, 0]), choices=None)
    actor: Any = lambda params, obs: params  # noqa: E731
    return TeamNets((actor, actor), critic, (own, own), rows)  # type: ignore[arg-type]


def joint_batch(terminated: list[float], state: list[float], weight: Tensor | None = None) -> JointBatch:
    s = torch.tensor(state).unsqueeze(1)
    return JointBatch(
        s, torch.tensor([[1.0, -1.0], [0.5, 0.0]]), torch.tensor([1.0, 2.0]), s + 1.0, torch.tensor(terminated),
        torch.tensor([0.9, 0.81]), weight,
    )  # fmt: skip


NOISE = torch.tensor([[0.5, -0.5], [1.0, 0.2]])
SEEN = (torch.zeros(2, 1), torch.zeros(2, 1))


def test_the_critics_targets_by_hand() -> None:
    """y = r + γᵏ (1 - d) (min Q̄(s', a') - Σ αᵢ log πⁱ); actors' parameters 1 and 2 scale their noise."""
    actors: Any = (torch.tensor(1.0), torch.tensor(2.0))
    alpha = torch.tensor([0.1, 0.2])
    y = soft_target(stub(), actors, 1.0, alpha, joint_batch([0.0, 1.0], [1.0, 2.0]), SEEN, None, NOISE)  # type: ignore[arg-type]
    q = 2.0 + 2.0 * 0.5 + 3.0 * -1.0  # s' = 2, a' = (0.5, 2 · -0.5)
    assert y.tolist() == pytest.approx([1.0 + 0.9 * (q - 0.1 * 1.0 - 0.2 * -1.0), 2.0])
    alive = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    y = soft_target(stub(), actors, 1.0, alpha, joint_batch([0.0, 1.0], [1.0, 2.0]), SEEN, alive, NOISE)  # type: ignore[arg-type]
    assert y.tolist() == pytest.approx([1.0 + 0.9 * (2.0 + 1.0 - 0.1), 2.0]), "the dead neither act nor have entropy"


def test_with_a_state_of_each_agent_a_transition_is_a_row_for_each() -> None:
    actors: Any = (torch.tensor(1.0), torch.tensor(2.0))
    batch = joint_batch([0.0, 1.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0], torch.tensor([1.0, 0.0, 1.0, 1.0]))
    alpha = torch.tensor([0.1, 0.1])
    y = soft_target(stub(2), actors, 1.0, alpha, batch, SEEN, None, NOISE)  # type: ignore[arg-type]
    first, second = 2.0 * 0.5 - 3.0, 2.0 * 1.0 + 3.0 * 0.4
    expected = [1.0 + 0.9 * (2.0 + first), 1.0, *(2.0 + 0.81 * (s + second - 0.1 * 2.4) for s in (4.0, 5.0))]
    assert y.tolist() == pytest.approx(expected)
    q = [1.0 + 2.0 - 3.0, 2.0 + 2.0 - 3.0, 3.0 + 1.0, 4.0 + 1.0]
    loss, told = critic_loss(stub(2), 1.0, batch, torch.zeros(4), None, squared)  # type: ignore[arg-type]
    assert float(loss) == pytest.approx(
        sum(0.5 * w * (v**2 + (v + 1) ** 2) for w, v in zip((1, 0, 1, 1), q, strict=True)) / 4
    )
    size = [v + 0.5 for v in q]
    assert told["td"].tolist() == pytest.approx([(size[0] + size[1]) / 2, (size[2] + size[3]) / 2])
    alive = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    _, told = critic_loss(stub(2), 1.0, batch, torch.zeros(4), alive, squared)  # type: ignore[arg-type]
    assert told["td"].tolist() == pytest.approx([size[0], 0.0]), "of the living"


def test_an_actors_loss_by_hand_sees_what_the_others_do() -> None:
    params, actions = torch.tensor(2.0, requires_grad=True), torch.tensor([[9.0, 4.0], [9.0, 5.0]])
    state = torch.tensor([[1.0], [2.0]])
    args = (state, SEEN[0], actions)
    loss, told = actor_loss(stub(), 0, params, 1.0, torch.tensor(0.5), *args, None, NOISE[:, :1])  # type: ignore[arg-type]
    q = [1.0 + 2.0 * (2.0 * 0.5) + 12.0, 2.0 + 2.0 * (2.0 * 1.0) + 15.0]
    assert float(loss.detach()) == pytest.approx(((0.5 * 1.0 - q[0]) + (0.5 * 2.0 - q[1])) / 2)
    assert told["log_prob"].tolist() == [1.0, 2.0]
    loss.backward()
    assert float(params.grad) == pytest.approx(-(2.0 * 0.5 + 2.0 * 1.0) / 2)  # type: ignore[arg-type]
    alive = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    loss, _ = actor_loss(stub(), 0, params, 1.0, torch.tensor(0.5), *args, alive, NOISE[:, :1])  # type: ignore[arg-type]
    assert float(loss.detach()) == pytest.approx(0.5 * 2.0 - q[1]), "over the rows where it lives"


def test_an_exact_expectation_is_the_sum_over_an_agents_actions() -> None:
    agent = team(matrix_spec((3, 2)), expectation="exact", critic_temperature="agents")
    own, obs, seen = agent.nets.own[0], torch.ones(4, 1), torch.ones(4, 1)
    actions = torch.tensor([[0, 0, 0, 1.0, 0]]).expand(4, -1)
    params, critic = agent.actors[0].params, agent.critic.params
    loss, told = actor_loss(
        agent.nets, 0, params, critic, torch.tensor(0.3), obs, seen, actions, None, torch.zeros(4, 3), exact=True
    )
    with torch.no_grad():
        log_pi = agent.actors[0].module(seen[:1])[0].log_softmax(-1)
        every = [torch.cat([torch.eye(3)[a], torch.tensor([1.0, 0.0])]) for a in range(3)]
        q = torch.stack([agent.critic.module(obs[:1], x.unsqueeze(0)).amin() for x in every])
    expected = (log_pi.exp() * (0.3 * log_pi - q)).sum()
    assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-6)
    assert float(told["log_prob"][0]) == pytest.approx(float((log_pi.exp() * log_pi).sum()), abs=1e-6)
    assert own.choices.shape == (3, 3)


def test_straight_through_samples_have_the_categoricals_frequencies_and_its_log_probability() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, -1e10]).expand(8_000, 1, 4).clone().requires_grad_()
    noise = torch.randn(8_000, 4, generator=torch.Generator().manual_seed(0))
    action, log_prob = straight_through(logits, noise)
    expected = torch.tensor([1.0, 0.0, -1.0, -1e10]).softmax(-1)
    torch.testing.assert_close(action.detach().mean(0), expected, atol=0.02, rtol=0.0)
    chosen = action.detach().argmax(-1)
    torch.testing.assert_close(log_prob.detach(), expected.log().clamp(min=-1e9)[chosen])
    (action * torch.arange(4.0)).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad[..., 3].any(), "an impossible action"
    wild = straight_through(logits[:2], torch.tensor([[-9.0, 9.0, 0.0, 0.0], [9.0, -9.0, 0.0, 0.0]]))
    assert all(x.isfinite().all() for x in wild)


def test_actions_become_vectors_and_targets_are_what_was_meant_or_released() -> None:
    goals = {"box": [-1.0, -3.0, -2.0], "discrete": [0.98 * math.log(k) for k in (2, 3, 5)]}
    goals["heads"] = [0.98 * math.log(k) for k in (2, 6, 10)]
    for kind, expected in goals.items():
        agent = team(team_spec(kind))
        assert [t.target_entropy for t in agent.temperatures] == pytest.approx(expected)
        assert agent.critic_temperature.target_entropy == pytest.approx(sum(expected))
    assert {t.target_entropy for t in team(team_spec("heads"), target_entropy_ratio=0.0).temperatures} == {0.0}
    assert {t.target_entropy for t in team(team_spec(), target_entropy=-0.5).temperatures} == {-0.5}
    own = team(team_spec("heads")).nets.own[1]
    assert own.encode(torch.tensor([[2, 1], [0, 0]])).tolist() == [[0, 0, 1, 0, 1, 0], [1, 0, 0, 1, 0, 0]]
    space = spaces.Discrete(3, start=5)
    module = CategoricalActor(OBSERVATION, space, {"hidden": [4]})
    assert own_actions(module, EnvSpec("t", OBSERVATION, space)).encode(torch.tensor([6])).tolist() == [[0, 1, 0]]


def test_statistics_of_values_are_unbiased_from_the_first_and_those_of_the_dead_do_not_count() -> None:
    seen = updated(torch.zeros(3), torch.tensor([1.0, 3.0, 50.0]), torch.tensor([1.0, 1.0, 0.0]))
    mean, deviation = moments(seen)
    assert float(mean) == pytest.approx(2.0, rel=1e-4)
    assert float(deviation) == pytest.approx(1.0, rel=1e-2)
    assert torch.equal(updated(seen, torch.ones(2), torch.zeros(2)), seen)


def test_a_shared_network_keeps_each_agents_own_target_and_a_team_has_a_log_probability() -> None:
    own = [spaces.Dict(obs=spaces.Box(-1, 1, (2,)), action_mask=spaces.MultiBinary(k)) for k in (2, 3)]
    acts = [spaces.Discrete(2), spaces.Discrete(3)]
    observation, action = join_spaces(list(zip(own, acts, strict=True)))
    pairs = tuple(AgentSpaces(*pair) for pair in zip(own, acts, strict=True))
    spec = EnvSpec("t", observation, action, agents=("a", "b"), agent_spaces=pairs)
    obs = {"obs": torch.ones(4, 2, 2), "action_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]).bool().expand(4, 2, 3)}
    for share in (True, False):
        agent = team(spec, share_parameters=share)
        assert [t.target_entropy for t in agent.temperatures] == pytest.approx([0.98 * math.log(k) for k in (2, 3)])
        every = torch.cartesian_prod(torch.arange(2), torch.arange(3))
        more = {key: leaf[:1].expand(6, *leaf.shape[1:]) for key, leaf in obs.items()}
        assert float(agent.log_prob(more, every).exp().sum()) == pytest.approx(1.0, abs=1e-5)


# --- what the agents see of each other


@pytest.mark.parametrize("kind", ["box", "discrete", "heads"])
@pytest.mark.parametrize("share", [False, True])
def test_an_agents_loss_sees_what_those_before_it_have_become(kind: str, share: bool) -> None:
    """Once agent 2 has learnt and is shown, its actions in the work are its new policy's; of MASAC they stay."""
    if share and kind != "discrete":
        return
    spec = team_spec(kind) if not share else matrix_spec((3, 3, 3))
    for cls in (HASAC, MASAC):
        agent = team(spec, cls, learning_rate=0.1, share_parameters=share)
        work = agent.prepare(team_batch(spec))
        agent.watch(work)
        agent.stage("critic", work)
        for i in range(3):
            agent.stage(f"show/{i}", work)
        before = work.actions.clone()
        loss_before = float(agent.agent_objective(work, 0)[0].detach())
        agent.stage("actor/2", work)
        if agent.refreshes:
            agent.stage("show/2", work)
        parts = agent.nets.cut(work.actions, 2)
        changed = not torch.equal(parts[1], agent.nets.cut(before, 2)[1])
        assert changed == (cls is HASAC) or kind != "box", "a discrete sample may stay"
        with torch.no_grad():
            noise = agent.nets.cut(work.noise[1], 2)[1]
            new = agent.own_sample(2, agent.actors[2].params, work.seen[2], noise)
        assert torch.equal(parts[1], new) == (cls is HASAC) or not changed
        if kind == "box":
            assert torch.equal(parts[0], agent.nets.cut(before, 2)[0]), "the others still do what they did"
            moved = float(agent.agent_objective(work, 0)[0].detach()) != loss_before
            assert moved == (cls is HASAC)


@pytest.mark.parametrize("share", [False, True])
def test_whoever_is_looked_at_is_shown_as_it_is_by_then(share: bool) -> None:
    """At every agent's step the others' actions are those of their policies of the moment, of MASAC those before the
    update. Nobody is shown whom nobody looks at."""
    spec = matrix_spec((3, 3, 3)) if share else team_spec()
    for cls in (HASAC, MASAC):
        agent = team(spec, cls, learning_rate=0.1, share_parameters=share)
        work, order = agent.prepare(team_batch(spec)), agent.order()
        first, *rest = order
        old = [net.target() for net in agent.actors]
        agent.watch(work)
        for stage in agent.stages():
            if stage.startswith("actor/"):
                for k in set(order) - {int(stage[-1])}:
                    params = (agent.actors if cls is HASAC else old)[k].params
                    mine, noise = (agent.nets.cut(x, k)[1] for x in (work.actions, work.noise[1]))
                    assert torch.equal(mine, agent.own_sample(k, params, work.seen[k], noise).detach())
            agent.stage(stage, work)
        shown = [int(stage[-1]) for stage in agent.stages() if stage.startswith("show/")]
        if cls is HASAC:
            assert shown == [*(rest[:1] if share else rest), *order[:-1]]
        else:
            assert shown == (order[:1] if share else order)
        assert first == int(next(stage for stage in agent.stages() if stage.startswith("actor/"))[-1])


# --- one agent


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize(
    "options", [{"lr_schedule": "linear", "schedule_steps": 9}, {"temperature": 0.2, "max_grad_norm": 0.3}]
)
def test_with_one_agent_it_is_sac_bit_for_bit(options: dict[str, Any], runs: int) -> None:
    """From the seed on: initial weights, warm-up, exploration, updates."""
    spec = EnvSpec("t", OBSERVATION, TORQUE)
    options = {**SMALL, "warmup_steps": 2, **options}
    one = SAC(spec, SACConfig(fused=False, **options), runs=runs)
    other = HASAC(spec, HASAC.config_class(critic_temperature="agents", **options), runs=runs)
    for i in range(6):
        batch = make_batch(one, i, size=8 * runs)._replace(weight=torch.rand(8 * runs) if i % 2 else None)
        one.clock.env_steps = other.clock.env_steps = i
        if runs == 1:  # several runs of a team act one by one
            assert torch.equal(one.act(batch.obs).action, other.act(batch.obs).action)
        mine, its = one.update(batch), other.update(batch)
        assert mine.metrics.keys() == its.metrics.keys()
        assert all(torch.equal(value, its.metrics[name]) for name, value in mine.metrics.items())
        assert torch.equal(mine.priority, its.priority)  # type: ignore[arg-type]
    for name in ("actor", "critic", "target"):
        assert torch.equal(getattr(one, name).flat, getattr(other, name).flat)
    assert torch.equal(one.q(batch.obs, batch.action), other.q(batch.obs, batch.action))
    assert torch.equal(one.log_prob(batch.obs, batch.action), other.log_prob(batch.obs, batch.action))


def test_a_team_of_one_that_sees_the_state_is_sac_too() -> None:
    space = spaces.Dict(obs=spaces.Box(-9, 9, (1, 4)), state=spaces.Box(-9, 9, (4,)))
    spec = EnvSpec("t", space, spaces.Box(-0.4, 0.4, (1, 2), np.float32), agents=("alone",))
    one = SAC(EnvSpec("t", OBSERVATION, TORQUE), SACConfig(fused=False, **SMALL))
    other = team(spec, critic_temperature="agents")
    for i in range(4):
        batch = make_batch(one, i)
        joint = batch._replace(
            obs={"obs": batch.obs.unsqueeze(1), "state": batch.obs},  # type: ignore[union-attr]
            next_obs={"obs": batch.next_obs.unsqueeze(1), "state": batch.next_obs},  # type: ignore[union-attr]
            action=batch.action.unsqueeze(1),
        )
        one.update(batch)
        other.update(joint)
    for name in ("actor", "critic", "target"):
        assert torch.equal(getattr(one, name).flat, getattr(other, name).flat)


# --- masks


def dead(batch: Any, who: int, junk: float) -> Any:
    """The batch in which agent ``who`` is dead everywhere, and its numbers are ``junk``."""
    obs, next_obs = dict(batch.obs), dict(batch.next_obs)
    for each in (obs, next_obs):
        each["alive"] = each["alive"].clone()
        each["alive"][:, who] = False
        each["obs"] = each["obs"].clone()
        each["obs"][:, who] = junk
        if each["state"].dim() == 3:
            each["state"] = each["state"].clone()
            each["state"][:, who] = junk
    action = batch.action.clone()
    if action.is_floating_point():
        action[:, who] = junk
    return batch._replace(obs=obs, next_obs=next_obs, action=action)


@pytest.mark.parametrize("each_state", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"), [("box", {}), ("box", {"value_normalisation": True}), ("discrete", {"expectation": "exact"})]
)
def test_a_dead_agent_moves_no_weight(kind: str, options: dict[str, Any], each_state: bool) -> None:
    """Its own stay, and whatever it would have seen, done or been paid, those of the living end the same."""
    spec = team_spec(kind, alive=True, each_state=each_state)
    ends = []
    for junk in (0.0, 0.7):
        agent = team(spec, **options)
        before = agent.actors[1].flat.clone()
        for i in range(3):
            agent.update(dead(team_batch(spec, i), 1, junk))
        assert torch.equal(agent.actors[1].flat, before)
        assert float(agent.temperatures[1].log) == 0.0
        assert not torch.equal(agent.actors[0].flat, team(spec, **options).actors[0].flat)
        assert agent.guard.first_bad() is None
        state = agent.state_dict()
        ends.append(
            [state[name] for name in sorted(state) if name.startswith(("actor_0", "actor_2", "critic", "target"))]
        )
        ends[-1] += [state["log_temperature_0"], state["log_critic_temperature"]]
    for mine, its in zip(*ends, strict=True):
        leaves = zip(mine.values(), its.values(), strict=True) if isinstance(mine, dict) else [(mine, its)]
        assert all(torch.equal(a, b) for a, b in leaves)


@pytest.mark.parametrize("each_state", [False, True])
def test_where_nobody_lives_nothing_moves_and_where_nobody_lives_on_the_bootstrap_is_cut(each_state: bool) -> None:
    spec = team_spec("box", alive=True, each_state=each_state)
    agent, batch = team(spec), team_batch(spec)
    nobody = torch.zeros(8, 3, dtype=torch.bool)
    last = batch._replace(next_obs={**batch.next_obs, "alive": nobody}, terminated=torch.zeros(8))
    assert agent.prepare(last).batch.terminated.all()
    gone = last._replace(obs={**batch.obs, "alive": nobody})
    before = agent.state_dict()
    agent.update(gone)
    after = agent.state_dict()
    for name in ("actor_0", "actor_1", "actor_2", "critic"):
        assert all(torch.equal(x, after[name][key]) for key, x in before[name].items())
    assert float(agent.critic_temperature.log) == 0.0


# --- games


GAMES = {
    "alone": torch.tensor([0.0, 0.3, 0.6]).unsqueeze(1) + torch.tensor([0.0, 0.4]),
    "coordination": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
}
"""In the first what one does is worth the same whatever the other does: its equilibrium is softmax(u / α) of each."""


@pytest.mark.parametrize("name", GAMES)
def test_it_reaches_a_quantal_response_equilibrium_of_cooperative_games(name: str) -> None:
    """Three seeds side by side: every agent's policy is softmax(E Q / α) against the other's."""
    payoff, alpha = GAMES[name], 0.3
    agent = team(
        matrix_spec(tuple(payoff.shape)), runs=3, temperature=alpha, expectation="exact", learning_rate=5e-2,
        lr_schedule="linear", schedule_steps=200,
    )  # fmt: skip
    for first, second in play(agent, payoff, 200):
        torch.testing.assert_close(first, (payoff @ second / alpha).softmax(-1), atol=0.03, rtol=0.0)
        torch.testing.assert_close(second, (first @ payoff / alpha).softmax(-1), atol=0.03, rtol=0.0)
        if name == "alone":
            torch.testing.assert_close(first, (payoff[:, 0] / alpha).softmax(-1), atol=0.03, rtol=0.0)
        else:
            assert float(first @ payoff @ second) > 0.85, "they agree"


def gap(payoff: Tensor, alpha: float, first: Tensor, second: Tensor) -> float:
    """How far two policies are from being quantal responses to each other."""
    answers = (payoff @ second / alpha).softmax(-1), (first @ payoff / alpha).softmax(-1)
    return max(float((answers[0] - first).abs().max()), float((answers[1] - second).abs().max()))


@pytest.mark.parametrize("cls", [MASAC, HASAC])
def test_where_simultaneous_steps_chase_each_other_the_sequence_reaches_the_equilibrium(cls: type[HASAC]) -> None:
    """Two agents are to choose the same of three actions, of which the third pays less. Its only quantal response
    equilibrium is the fixed point of a contraction (the payoffs' largest eigenvalue is below 2 α). With steps of a
    size that is right for one agent alone, agents that step at once overshoot for ever: each answers what the other has
    just left. One after the other they settle. All settings and seeds are the same."""
    payoff, alpha = torch.diag(torch.tensor([1.0, 1.0, 0.2])), 0.55
    equilibrium = torch.ones(3) / 3.0
    for _ in range(300):
        equilibrium = (payoff @ equilibrium / alpha).softmax(-1)
    assert equilibrium.tolist() == pytest.approx([0.396, 0.396, 0.208], abs=1e-3)
    agent = team(
        matrix_spec((3, 3)), cls, runs=3, temperature=alpha, expectation="exact", learning_rate=0.2,
        optimiser=OptimiserConfig(name="sgd", beta1=0.0), network=NetworkConfig(hidden=(32,), norm="layer"),
    )  # fmt: skip
    for rate, updates in ((0.0, 60), (0.45, 20)):  # the critic learns the payoffs first
        for optimiser in agent.actor_optimisers:
            optimiser.learning_rate = rate
        play(agent, payoff, updates, size=32 if rate == 0.0 else 1024)
    lately = [play(agent, payoff, 1, size=1024) for _ in range(10)]
    for run in range(3):
        gaps = [gap(payoff, alpha, *policies[run]) for policies in lately]
        if cls is MASAC:
            assert min(gaps) > 0.08, "after no update are they near"
            continue
        assert max(gaps) < 0.08
        for i in range(2):
            mean = torch.stack([policies[run][i] for policies in lately]).mean(0)
            torch.testing.assert_close(mean, equilibrium, atol=0.04, rtol=0.0)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    for spec in (team_spec("box"), matrix_spec((300, 2))):
        with pytest.raises(RloptError, match=r"expectation=exact sums over all actions .* at most 256; use sampled"):
            team(spec, expectation="exact")
    with pytest.raises(RloptError, match="act in different spaces; give each a network of its own"):
        team(team_spec("box"), share_parameters=True)
    alone = EnvSpec("t", OBSERVATION, TORQUE)
    for cls in (HASAC, MASAC, HATD3, MATD3):
        team(alone, cls)  # type: ignore[arg-type]
        for options in ({"order": "fixed"}, {"share_parameters": True}):
            with pytest.raises(RloptError, match=r"^agent\.\w+=\w+ has no effect: t has one agent; leave it out$"):
                team(alone, cls, **options)  # type: ignore[arg-type]
    for cls in (MASAC, MATD3):
        with pytest.raises(RloptError, match=rf"^agent\.order=fixed has no effect: agent={cls.name}'s agents .* leave"):
            team(team_spec("box"), cls, order="fixed")  # type: ignore[arg-type]
    team(shared_spec(), MASAC, order="fixed", share_parameters=True)
