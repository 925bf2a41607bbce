"""MANSA: who acts, what Global learns from by hand, where it calls in two rooms, and that no budget is exceeded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlopt import registry
from rlopt.agents.base import Agent, ReplayAgentConfig
from rlopt.agents.teams.mansa import MANSA, MANSAConfig
from rlopt.agents.teams.switch_tables import budgeted_operator, intervenes, learn_table, switching_operator, switching_q
from rlopt.analysis.tables import read_csv
from rlopt.envs.teams.two_rooms import BEST, SAFE, switching_values
from rlopt.joint import own_obs
from rlopt.loops.evaluation import Evaluator
from rlopt.nn import Actor, NetworkConfig
from rlopt.policy import Policy, load_policy, save_policy
from rlopt.training import train_config
from rlopt.training.evaluate import evaluate_path
from rlopt.training.setup import begin, make_loop
from rlopt.types import Act, Carry, Obs, RloptError, Update
from tests.agents.cases import short_run
from tests.agents.teams.games import joined, team_batch, team_spec

ACTIONS = {"poor": ((0, 0), (2, 2)), "safe": ((2, 0), (2, 2)), "best": ((2, 0), (0, 0))}
"""{name: joint action by room}, paid (0.5, 0.5), ``SAFE`` and ``BEST``."""


class ScriptedActor(Actor):
    """Does in each room what is written."""

    kind = "scripted"

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.table, self.options = torch.nn.Parameter(torch.tensor(table, dtype=torch.float32), False), {}

    def act(self, obs: Obs, carry: Carry = None, deterministic: Any = False, generator: Any = None) -> Any:
        assert isinstance(obs, dict)
        return self.table[obs["state"].argmax(-1)].long(), None


class Scripted(Agent):
    """A learner that has learnt."""

    supports_teams = True
    config_class = ReplayAgentConfig

    def build(self) -> None:
        self.actor = ScriptedActor(ACTIONS[self.name])

    def act(self, obs: Obs, carry: Carry = None, deterministic: bool = False) -> Act:
        return Act(self.actor.act(obs)[0])

    def update(self, batch: Any) -> Update:
        return Update({})

    @property
    def policy(self) -> Policy:
        return Policy(self.spec, self.actor)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {name: type(name, (Scripted,), {"name": name}) for name in ACTIONS}
    monkeypatch.setattr(registry, "AGENTS", {**registry.AGENTS, **own})


def rooms_loop(independent: str, steps: int = 1400, **agent: Any) -> Any:
    options = {
        "name": "mansa", "independent": {"name": independent}, "centralised": {"name": "best"}, "gamma": 0.9,
        "network": {"hidden": [32]}, "learning_rate": 3e-3, "warmup_steps": 200, "epsilon_steps": 600,
        "target_every": 20, "update_ratio": [1, 5], **agent,
    }  # fmt: skip
    tree = {
        "seed": 1, "total_steps": steps, "num_envs": 8, "device": "cpu", "threads": 1, "agent": options,
        "env": {"id": "two_rooms"}, "eval": {"every": None, "episodes": 2},
    }  # fmt: skip
    return make_loop(train_config(tree))


def called(agent: Any, **left: float) -> list[bool]:
    """Return where, by room, the policy calls."""
    room = torch.eye(2)
    carry = {**agent.initial_carry(2), **{f"switch/{k}": torch.full((2,), v) for k, v in left.items()}}
    after = agent.act({"obs": room[:, None].expand(-1, 2, -1), "state": room}, carry, deterministic=True).carry
    return [bool(on) for on in after["switch/on"]]


@pytest.mark.parametrize(
    ("independent", "cost", "where"),
    [("poor", 0.0, [True, True]), ("safe", 0.1, [False, True]), ("safe", 0.9, [False, False])],
)
def test_global_calls_where_the_gain_is_above_the_cost(scripted, independent: str, cost: float, where: list) -> None:
    """Free: always; in one room only; too expensive: never. In the rooms as their dynamic programme says."""
    loop = rooms_loop(independent, cost=cost)
    while loop.step < loop.total_steps:
        loop.advance()
    assert called(loop.agent) == where
    if independent == "safe":
        assert where == switching_values(cost, 0.9)[1].tolist()
    episodes = loop.evaluate(4)
    for episode in episodes:
        calls = {0: 0, 1: episode.facts["together"], 2: 20}[sum(where)]
        assert episode.facts["calls"] == pytest.approx(calls, abs=1)  # the room of the last step, or of the first
    loop.close()


# In tables


def model() -> tuple[Tensor, Tensor]:
    paid = torch.tensor([SAFE, BEST], dtype=torch.float64).T
    chain = torch.tensor([[0.8, 0.2], [0.2, 0.8]], dtype=torch.float64)
    return paid, torch.stack((chain, chain))


@pytest.mark.parametrize("cost", [0.0, 0.1, 0.6])
def test_the_operator_contracts_to_the_closed_form(cost: float) -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        paid, chain = torch.randn(5, 2, generator=g).double(), torch.rand(2, 5, 5, generator=g).double()
        chain = chain / chain.sum(-1, keepdim=True)
        v, w = (10 * torch.randn(5, generator=g).double() for _ in range(2))
        apart = (switching_operator(v, paid, chain, cost, 0.9) - switching_operator(w, paid, chain, cost, 0.9)).abs()
        assert apart.max() <= 0.9 * (v - w).abs().max() + 1e-12
        left, other = (10 * torch.randn(4, 5, generator=g).double() for _ in range(2))  # with 0 to 3 calls left
        after = [budgeted_operator(values, paid, chain, cost, 0.9) for values in (left, other)]
        assert (after[0] - after[1]).abs().max() <= 0.9 * (left - other).abs().max() + 1e-12
    v, (paid, chain) = torch.zeros(2, dtype=torch.float64), model()
    for _ in range(200):
        v = switching_operator(v, paid, chain, cost, 0.9)
    expected, where = switching_values(cost, 0.9)
    torch.testing.assert_close(v, expected)
    if cost:
        assert intervenes(switching_q(v, paid, chain, cost, 0.9)).tolist() == where.tolist()


def test_q_learning_in_a_table_comes_to_the_dynamic_programme() -> None:
    g, paid = torch.Generator().manual_seed(1), model()[0]
    q = torch.zeros(2, 2, dtype=torch.float64)
    for rate in (0.1, 0.02, 0.004):
        state, calls = torch.randint(2, (6000,), generator=g), torch.randint(2, (6000,), generator=g)
        after = torch.where(torch.rand(6000, generator=g) < 0.8, state, 1 - state)
        learn_table(q, state, calls, paid[state, calls], after, rate, 0.1, 0.9)
    expected, where = switching_values(0.1, 0.9)
    assert intervenes(q).tolist() == where.tolist()
    torch.testing.assert_close(q.amax(1), expected, atol=0.1, rtol=0.0)


def test_a_budget_is_spent_where_it_pays_most() -> None:
    paid, chain = model()
    v = torch.zeros(3, 2, dtype=torch.float64)
    for _ in range(400):
        v = budgeted_operator(v, paid, chain, 0.0, 0.9)
    alone = torch.linalg.solve(torch.eye(2, dtype=torch.float64) - 0.9 * chain[0], paid[:, 0])
    torch.testing.assert_close(v[0], alone)
    assert (v[1:] >= v[:-1]).all() and v[1, 1] == pytest.approx(float(alone[1]) + 0.5)  # one call is worth 0.5 there


# Calls and budgets


@pytest.mark.parametrize("rule", ["global", "centralised", "random", "fixed"])
@pytest.mark.parametrize(("budget", "runs"), [(0, 1), (1, 3), (3, 1), (3, 2)])
def test_no_episode_has_more_calls_than_its_budget(rule: str, budget: int, runs: int) -> None:
    """Random histories of episodes of several lengths, and the same after a resume in the middle of them, of every
    run."""
    more = {"random": {"rate": 0.9}, "fixed": {"every": 1}, "global": {"epsilon_end": 1.0}}.get(rule, {})
    options = {"rule": rule, "budget": budget, **more}
    config = short_run("mansa", num_envs=3, num_runs=runs, total_steps=120, agent=options)
    loops = [make_loop(config) for _ in range(2)]
    seen = []
    for _ in range(10):
        seen += loops[0].advance().episodes
    loops[1].load_state_dict(loops[0].state_dict())
    for name, log in loops[0].row_logs().items():
        written = log.rows_written
        loops[1].row_logs()[name].write_rows(0, log.read_rows(0, written))
    for _ in range(15):
        straight, resumed = loops[0].advance().episodes, loops[1].advance().episodes
        assert straight == resumed
        seen += straight
    assert {episode.run for episode in seen} == set(range(runs))
    assert all(episode.facts["calls"] <= budget for episode in seen)
    if budget and rule in ("centralised", "fixed"):
        assert {episode.facts["calls"] for episode in seen} == {min(budget, episode.length) for episode in seen}
    for loop in loops:
        loop.close()


def test_each_learner_may_draw_its_own_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then Global has minibatches of all; so have both learners where they learn from everything."""
    seen: dict[str, set[float]] = {}
    learnt = MANSA.own

    def own(self: MANSA, name: str, batch: Any) -> Any:
        seen.setdefault(name, set()).update(batch.extras["switch"].float().tolist())
        return learnt(self, name, batch)

    monkeypatch.setattr(MANSA, "own", own)
    for options, drawn in (
        ({"independent_learns": "own"}, {"independent": {0.0}, "centralised": {1.0}}),
        ({"centralised_learns": "everything"}, {"independent": {0.0, 1.0}, "centralised": {0.0, 1.0}}),
    ):
        seen.clear()
        buffer = {"name": "prioritized", "capacity": 50}
        loop = make_loop(short_run("mansa", total_steps=40, agent={"epsilon_end": 1.0, **options}, buffer=buffer))
        while loop.step < loop.total_steps:
            progress = loop.advance()
        assert seen == drawn
        assert ("switch" in loop.agent.draws) == ("independent_learns" in options) and "switch/q" in progress.metrics
        loop.close()


def small(**options: Any) -> MANSAConfig:
    learner = {"network": {"hidden": [8]}}
    base: dict[str, Any] = {"network": NetworkConfig(hidden=(8,)), "batch_size": 8, "warmup_steps": 0}
    return MANSAConfig(
        **{**base, "independent": {**learner, "share_parameters": False},
           "centralised": {**learner, "share_parameters": False}, **options}
    )  # fmt: skip


def test_what_global_learns_from_by_hand() -> None:
    spec = team_spec("discrete")
    batch = team_batch(spec, size=4)
    calls = torch.tensor([True, True, False, False])
    extras = {"switch": calls, "remaining": torch.tensor([2.0, 1.0, 1.0, 0.0]), "on": torch.tensor([0, 1, 1, 0]).bool()}
    agent, own = MANSA(spec, small(cost=0.5, budget=2)), ("switch", "remaining")
    found = agent.switch_batch(batch._replace(extras={k: extras[k] for k in own}))
    assert torch.equal(found.reward, batch.reward - 0.5 * calls) and torch.equal(found.action, calls.long())
    assert found.obs["remaining"].flatten().tolist() == [1.0, 0.5, 0.5, 0.0]
    assert found.next_obs["remaining"].flatten().tolist() == [0.5, 0.0, 0.5, 0.0]
    assert found.next_obs["action_mask"][:, 1].tolist() == [True, False, True, False]
    agent = MANSA(spec, small(cost=0.5, cost_of="switch_on"))
    found = agent.switch_batch(batch._replace(extras={k: extras[k] for k in ("switch", "on")}))
    assert torch.equal(found.reward, batch.reward - torch.tensor([0.5, 0.0, 0.0, 0.0]))  # the second went on
    assert found.next_obs["on"].flatten().tolist() == [1.0, 1.0, 0.0, 0.0]


def test_everybody_acts_by_whom_the_switch_says() -> None:
    spec = team_spec("discrete")
    obs = team_batch(spec, size=40).obs
    agent = MANSA(spec, small(), seed=3)
    act = agent.act(obs, agent.initial_carry(40), deterministic=True)
    each = [agent.learners[name].act(obs, deterministic=True).action for name in ("independent", "centralised")]
    calls = act.carry["switch/on"].bool()
    assert torch.equal(act.action, torch.where(calls[:, None], each[1], each[0])) and 0 < calls.sum() < 40
    for rule in ("independent", "centralised"):
        agent = MANSA(spec, small(rule=rule))
        assert list(agent.draws) == [rule]  # who never acts does not learn
        act = agent.act(obs, agent.initial_carry(40), deterministic=True)
        assert torch.equal(act.action, agent.learners[rule].act(obs, deterministic=True).action)
    rates = MANSA(spec, small(rule="random", rate=0.25))
    assert 0 < rates.act(obs, rates.initial_carry(40), deterministic=True).facts["calls"].sum() < 25
    agent = MANSA(spec, small(rule="fixed", every=3))
    carry, told = agent.initial_carry(40), []
    for _ in range(7):
        act = agent.act(obs, carry, deterministic=True)
        carry, told = act.carry, [*told, float(act.facts["calls"].mean())]
    assert told == [1, 0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("options", [{"budget": 2}, {"rule": "random", "rate": 0.4, "budget": None}])
def test_each_run_is_the_single_run_with_its_seed(options: dict[str, Any]) -> None:
    """The same episodes and calls: equal until rounding grows."""
    more: dict[str, Any] = {"total_steps": 59, "num_envs": 2, "eval": {"every": 59, "episodes": 2, "max_steps": 9}}
    together = make_loop(short_run("mansa", num_runs=2, agent=options, **more))
    episodes = []
    while together.step < 59:
        episodes += together.advance().episodes
    found = together.evaluate(2)
    for r in range(2):
        alone, own = make_loop(short_run("mansa", seed=3 + r, agent=options, **more)), []
        while alone.step < 59:
            own += alone.advance().episodes
        assert [e._replace(run=0) for e in episodes if e.run == r] == own
        for name in alone.agent.learners:
            stacked, single = (agent.learners[name].critic.flat for agent in (together.agent, alone.agent))
            torch.testing.assert_close(stacked[r], single, rtol=1e-3, atol=1e-4)
        assert [e._replace(run=0) for e in found if e.run == r] == alone.evaluate(2)
        alone.close()
    together.close()


def test_each_run_has_its_own_rate_of_random_calls() -> None:
    spec = team_spec("discrete")
    obs = joined([team_batch(spec, size=50).obs] * 2)
    agent = MANSA(spec, small(rule="random", rates=(1e-9, 1.0)), runs=2)
    calls = agent.act(obs, agent.initial_carry(100), deterministic=True).facts["calls"]
    assert calls[:50].sum() == 0 and calls[50:].sum() == 50
    assert [policy.actor.options["rate"] for policy in agent.policies] == [1e-9, 1.0]
    with pytest.raises(RloptError, match="2 shares for num_runs=1"):
        MANSA(spec, small(rule="random", rates=(0.5, 1.0)))


def test_agents_learn_to_switch_for_themselves(scripted, tmp_path) -> None:
    """In the rooms, which each of them sees, they predict Global without a mistake; reported beside it, exported, and
    taken apart."""
    loop = rooms_loop("safe", cost=0.1)
    while loop.step < loop.total_steps:
        metrics = loop.advance().metrics
    agent, room = loop.agent, torch.eye(2)
    obs = {"obs": room[:, None].expand(-1, 2, -1), "state": room}
    distilled = agent.policy.variants["distilled"]
    after = distilled.act(obs, distilled.initial_carry(2)).carry
    assert after["switch/on"].tolist() == [[0.0, 0.0], [1.0, 1.0]] and "distilled/loss" in metrics
    for episode in loop.evaluate(3):
        assert episode.facts["distilled/return"] == pytest.approx(episode.total_reward)
        assert episode.facts["distilled/calls"] == episode.facts["calls"]
    loop.close()


@pytest.mark.parametrize("budget", [None, 2])
def test_one_agent_of_a_switching_team_acts_on_what_it_sees_alone(budget: int | None, tmp_path) -> None:
    spec = team_spec("discrete")
    agent = MANSA(spec, small(budget=budget), seed=1)
    agent.rule.flat.normal_(generator=torch.Generator().manual_seed(0))  # as after some training
    save_policy(agent.policy, tmp_path / "policy")
    loaded, obs = load_policy(tmp_path / "policy"), team_batch(spec, size=30).obs
    team = agent.policy.variants["distilled"]
    carry, own = team.initial_carry(30), [loaded.of_agent(name).initial_carry(30) for name in spec.agents]
    told = loaded.variants["distilled"].act({"obs": obs["obs"]}, loaded.variants["distilled"].initial_carry(30))
    assert torch.equal(told.action, team.act({"obs": obs["obs"]}, carry).action)
    made = torch.zeros(30, 3)
    for _ in range(4):
        act = team.act({"obs": obs["obs"]}, carry)
        carry = act.carry
        made += carry["switch/on"]
        for i, name in enumerate(spec.agents):
            one = loaded.of_agent(name).act(own_obs(spec, obs, i), own[i])
            own[i] = one.carry
            assert torch.equal(one.action, act.action[:, i])
            assert torch.equal(one.facts["calls"], carry["switch/on"][:, i])
    assert made.max() <= (4 if budget is None else budget) and made.max() > 0
    with pytest.raises(RloptError, match="save the policy of the team"):
        save_policy(team, tmp_path / "apart")
    fixed = MANSA(spec, small(rule="fixed"))
    with pytest.raises(RloptError, match="decided for all of it at once"):
        fixed.policy.of_agent("a")
    alone = MANSA(spec, small(rule="independent"))
    mine = alone.policy.of_agent("b").act(own_obs(spec, obs, 1)).action
    assert torch.equal(mine, alone.learners["independent"].act(obs, deterministic=True).action[:, 1])


def test_evaluating_a_run_reports_global_and_the_distilled_rule_as_training_did(tmp_path: Path) -> None:
    trainer = begin(short_run("mansa", tmp_path / "run", total_steps=30))
    try:
        trainer.run()
    finally:
        trainer.close()
    table = read_csv(tmp_path / "run" / "evaluations.csv")
    last = [i for i, step in enumerate(table["step"]) if step == 30]
    found = evaluate_path(tmp_path / "run").episodes
    for name in ("calls", "distilled/return", "distilled/calls"):
        assert [e.facts[name] for e in found] == [table[name][i] for i in last]


MEMORY = {"hidden": [8], "memory": "gru", "memory_size": 4}
SLICES = {"name": "uniform", "capacity": 200, "sequence_length": 5, "burn_in": 2}


@pytest.mark.parametrize("names", [("independent", "centralised"), ("centralised",)])
def test_learners_with_a_memory_both_see_every_step(names: tuple[str, ...]) -> None:
    """Whoever acts; and from slices of calls and of others they learn without a complaint."""
    agent = {"budget": 3, **{name: {"network": MEMORY} for name in names}}
    loop = make_loop(short_run("mansa", num_runs=2, num_envs=2, total_steps=50, agent=agent, buffer=SLICES))
    while loop.step < 50:
        before = loop.carry
        loop.advance()
    assert {k for k in loop.carry if k.endswith("/critic")} == {f"{name}/critic" for name in names}
    for name in names:
        began = loop.carry[f"{name}/critic"].flatten(1).abs().sum(1) == 0
        moved = (loop.carry[f"{name}/critic"] - before[f"{name}/critic"]).flatten(1).abs().sum(1) > 0
        assert (moved | began).all()
    assert loop.first_bad() is None
    assert any(policy.initial_carry(1) for policy in loop.policies())
    assert "calls" in loop.evaluate(1)[0].facts
    loop.close()
    with pytest.raises(RloptError, match=r"learnt from slices; give their length, buffer\.sequence_length=40"):
        make_loop(short_run("mansa", agent=agent))


@pytest.mark.parametrize("options", [{"budget": 2}, {"cost_of": "switch_on"}, {"rule": "random", "rate": 0.5}])
def test_an_exported_policy_switches_alike(options: dict[str, Any], tmp_path) -> None:
    spec = team_spec("discrete")
    agent = MANSA(spec, small(**options))
    save_policy(agent.policy, tmp_path / "policy")
    loaded, obs = load_policy(tmp_path / "policy"), team_batch(spec, size=9).obs
    carries = [agent.policy.initial_carry(9), loaded.initial_carry(9)]
    for _ in range(4):
        acts = [
            policy.act(obs, carry, True, torch.Generator().manual_seed(0))
            for policy, carry in zip((agent.policy, loaded), carries, strict=True)
        ]
        assert torch.equal(acts[0].action, acts[1].action)
        assert torch.equal(acts[0].facts["calls"], acts[1].facts["calls"])
        carries = [act.carry for act in acts]
    state = torch.get_rng_state()
    loaded(obs, carries[1])
    assert torch.equal(state, torch.get_rng_state())
    if "rule" not in options:
        with pytest.raises(RloptError, match="lacks 'state'"):
            loaded({"obs": obs["obs"]}, carries[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"centralised": {"name": "mappo"}}, "learns from its own steps"),
        ({"independent": {"name": "ippo"}}, "learns from its own steps"),
        ({"independent": {"name": "mansa"}}, "learns from its own steps"),
        ({"rule": "independent", "budget": 2}, "agent.budget=2 has no effect"),
        ({"rule": "independent", "centralised_learns": "everything"}, "has no effect without agent.rule=global"),
        ({"independent": {"name": "dqn"}}, "trains one"),
        ({"independent": {"batch_size": 3}}, "give agent.batch_size"),
        ({"centralised": {"mixing_unit": 3}}, "mixing_units"),
    ],
)
def test_learners_that_do_not_fit_are_refused_in_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RloptError, match=words) as told:
        MANSA(team_spec("discrete"), small(**options))
    assert "\n" not in str(told.value)


def test_soft_actor_critics_stand_behind_the_switch_too() -> None:
    names = {"independent": {"name": "isac"}, "centralised": {"name": "masac"}}
    loop = make_loop(short_run("mansa", total_steps=60, agent={**names, "budget": None}))
    while loop.step < 60:
        progress = loop.advance()
    assert any(key.startswith("centralised/critic") for key in progress.metrics)
    assert isinstance(loop.evaluator, Evaluator) and "calls" in loop.evaluate(2)[0].facts
    loop.close()
