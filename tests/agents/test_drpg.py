"""DRPG and its baselines behind the trainer's contract: continuation, convergence, export, the command line."""

from __future__ import annotations

import copy
import csv

import pytest
import torch
from safetensors.torch import load_file

from rlopt.agents.robust_solvers import DRPG, PartialPolicyIteration
from rlopt.cli.compose import compose
from rlopt.config import build
from rlopt.envs import make_env
from rlopt.loops.solver import SolverLoop
from rlopt.policy import load_policy, save_policy
from rlopt.registry import get_agent
from rlopt.robust import L1, from_toy_text, solve
from rlopt.robust.bellman import objective, policy_value, worst_case
from rlopt.robust.problems.domains import machine_replacement
from rlopt.robust.problems.garnet import garnet
from rlopt.state import load_state, save_state, states_equal
from rlopt.training import train_config
from rlopt.training.setup import begin, make_loop, resume
from rlopt.types import RloptError

AGENTS = [
    "drpg", "robust_value_iteration", "robust_modified_policy_iteration", "partial_policy_iteration",
    "robust_mirror_descent",
]  # fmt: skip
EACH = pytest.mark.parametrize("name", AGENTS)


def agent_of(name, m=None, **options):
    cls = get_agent(name)
    return cls(m or garnet(4, 3, 2, instances=2), build(cls.config_class, options))


@EACH
def test_an_agent_is_its_solver_step_by_step(name):
    m = garnet(4, 3, 2, instances=2)
    agent = agent_of(name, m, tolerance=None)
    method = {"partial_policy_iteration": name}.get(name, name.removeprefix("robust_"))
    truth = solve(m, method, 12, None)
    for t in range(12):
        metrics = agent.update().metrics
        assert float(metrics["value"]) == pytest.approx(float(truth.history["value"][t].mean()))
        assert float(metrics["gap_max"]) == pytest.approx(float(truth.history["gap"][t].max()))
        assert float(metrics["gap_5"]) <= float(metrics["gap"]) <= float(metrics["gap_max"]) + 1e-12
    s = agent.solution()
    torch.testing.assert_close((s.policy, s.lower, s.upper), (truth.policy, truth.lower, truth.upper))
    torch.testing.assert_close(agent.table.probabilities, agent.solver.state["best_policy"].reshape(8, 3))


@EACH
def test_stopped_and_continued_equals_never_stopped(name, tmp_path):
    straight = SolverLoop(agent_of(name, tolerance=None), 25)
    broken = SolverLoop(agent_of(name, tolerance=None), 25)
    while straight.step < 25:
        straight.advance()
    for _ in range(11):
        broken.advance()
    save_state(tmp_path / "state", broken.state_dict())
    fresh = SolverLoop(agent_of(name, tolerance=None), 25)
    fresh.load_state_dict(load_state(tmp_path / "state"))
    while fresh.step < 25:
        fresh.advance()
    assert states_equal(fresh.state_dict(), straight.state_dict()) is None


@EACH
def test_a_copy_goes_on_alone(name):
    agent = agent_of(name, tolerance=None)
    for _ in range(3):
        agent.update()
    twin = copy.deepcopy(agent)
    here = agent.solution().upper
    twin.update()
    assert torch.equal(agent.solution().upper, here)
    agent.update()
    assert torch.equal(agent.solution().upper, twin.solution().upper)


def test_convergence_ends_the_run():
    loop = SolverLoop(agent_of("partial_policy_iteration", tolerance=1e-6), 1000)
    while loop.step < loop.total_steps:
        loop.advance()
    assert loop.step == loop.total_steps < 30
    solver = loop.agent.solver
    assert float((solver.upper - solver.lower).max()) <= 1e-6


def test_a_toy_text_model_is_made_robust_and_its_policy_acts(tmp_path):
    """Rewards: lower ≤ value, and a larger set is worth less. The exported table acts in the real environment."""
    values = []
    for radius in (0.0, 0.2, 0.5):
        agent = agent_of(
            "partial_policy_iteration", from_toy_text("FrozenLake-v1"), gamma=0.9, radius=radius, tolerance=1e-8
        )
        for _ in range(40):
            metrics = agent.update().metrics
        assert float(metrics["lower"]) <= float(metrics["upper"]) + 1e-12
        values.append(float(metrics["lower"]))
    assert values[0] > values[1] > values[2] > 0.0
    save_policy(agent.policy, tmp_path / "policy")
    policy = load_policy(tmp_path / "policy")
    env = make_env("FrozenLake-v1", autoreset=False)
    obs = env.reset(seeds=[0])
    assert env.step(policy.act(obs).action).obs.shape == (1,)


@pytest.mark.parametrize("ambiguity", ["l1", "state_l1", "linf", "kl", "chi2", "contamination"])
def test_every_named_set_can_be_asked_for(ambiguity):
    agent = agent_of("partial_policy_iteration", ambiguity=ambiguity, radius=0.1, gamma=0.8)
    for _ in range(15):
        metrics = agent.update().metrics
    assert float(metrics["gap_max"]) < 1e-6
    assert agent.robust_model.gamma == 0.8


def test_a_model_keeps_its_discount_unless_another_is_asked_for():
    """The named discount reaches solver and environment alike; a table, which has none, gets 0.95."""
    machine = machine_replacement()
    assert PartialPolicyIteration(machine).robust_model.gamma == machine.gamma == 0.8
    assert agent_of("drpg", machine, gamma=0.7).robust_model.gamma == 0.7
    assert agent_of("drpg", from_toy_text("FrozenLake-v1")).robust_model.gamma == 0.95
    for words, own, gamma in [
        (["env=machine_replacement"], None, 0.8),
        (["env=garnet", "env.gamma=0.8"], 0.8, 0.8),
        (["env=garnet", "agent.gamma=0.7"], 0.7, 0.7),
        (["env=river_swim"], None, 0.95),
        (["env=grid_world", "agent.gamma=0.9"], 0.9, 0.9),
        (["env=inventory", "agent.gamma=0.9"], 0.9, 0.9),
    ]:
        config = compose(["agent=drpg", "device=cpu", *words])
        assert config.env.kwargs["gamma"] == own
        loop = make_loop(config)
        assert loop.agent.robust_model.gamma == gamma and loop.agent.model.gamma == gamma


def test_a_radius_needs_a_set_to_go_with():
    m = garnet(3, 2, 2)
    own = agent_of("drpg", m).robust_model.ambiguity
    assert torch.equal(own.radius, m.ambiguity.radius)
    for options, radius in (({"ambiguity": "l1"}, 0.2), ({"ambiguity": "l1", "radius": 0.3}, 0.3)):
        assert float(agent_of("drpg", m, **options).robust_model.ambiguity.radius.unique()) == radius
    table = from_toy_text("FrozenLake-v1")
    assert float(agent_of("drpg", table, radius=0.3).robust_model.ambiguity.radius.unique()) == 0.3
    assert float(agent_of("drpg", table).robust_model.ambiguity.radius.unique()) == 0.2


def test_the_policy_of_every_instance_walks_its_own_environment():
    """Observation k·S + s; with the last step drawn at 1 - γ the mean return estimates the nominal -J."""
    kwargs = {"states": 4, "actions": 3, "branching": 2, "instances": 3, "gamma": 0.8}
    env = make_env("Garnet-v0", 1, kwargs=kwargs, autoreset=False)
    inner = env.envs[0].unwrapped
    agent = agent_of("partial_policy_iteration", inner.robust_model, gamma=0.8)
    for _ in range(10):
        agent.update()
    m, policy = agent.robust_model, agent.solver.state["best_policy"]
    truth = -objective(m, policy_value(m, policy, m.kernel.probabilities)).mean()
    table, returns = agent.table.probabilities, []
    for i in range(1500):
        obs, _ = inner.reset(seed=i)
        total, done = 0.0, False
        while not done:
            obs, reward, done, _, _ = inner.step(int(table[obs].argmax()))
            total += reward
        returns.append(total)
    returns = torch.tensor(returns, dtype=torch.float64)
    assert abs(float(returns.mean() - truth)) < 4.0 * float(returns.std()) / 1500**0.5
    env.close()


def test_the_command_of_the_issue_trains_resumes_and_draws(tmp_path):
    """``agent=drpg env=garnet env.states=… env.instances=…``: a run folder like any other, resumed bit for bit."""
    words = ["agent=drpg", "env=garnet", "env.states=5", "env.actions=3", "env.branching=2", "env.instances=4",
             "seed=3", "device=cpu", "threads=1", "log.tensorboard=false", "eval.episodes=3",
             "agent.tolerance=null"]  # fmt: skip
    config = compose([*words, "total_steps=30", f"run_dir={tmp_path / 'a'}"])
    assert config.env.id == "Garnet-v0"
    assert config.env.kwargs == {"gamma": None, "seed": 3, "states": 5, "actions": 3, "branching": 2, "instances": 4}
    assert make_loop(config).agent.robust_model.gamma == 0.95  # the paper's, and the generator's own
    assert compose(["agent=drpg", "env=garnet"]).total_steps == 200
    for folder, steps in (("a", 30), ("b", 12)):
        trainer = begin(compose([*words, f"total_steps={steps}", f"run_dir={tmp_path / folder}"]))
        trainer.run()
        trainer.close()
    trainer = resume(tmp_path / "b", {"total_steps": 30})
    trainer.run()
    state = trainer.loop.state_dict()
    trainer.close()
    straight = make_loop(config)
    while straight.step < 30:
        straight.advance()
    assert states_equal(state, straight.state_dict()) is None
    tables = [list(csv.DictReader((tmp_path / f / "metrics.csv").open())) for f in ("a", "b")]
    assert [row["step"] for row in tables[0]] == [str(i) for i in range(1, 31)]
    assert [[row[k] for k in ("step", "value", "gap")] for row in tables[0]] == [
        [row[k] for k in ("step", "value", "gap")] for row in tables[1]
    ]
    assert (tmp_path / "a" / "policy" / "policy.json").is_file() and (tmp_path / "a" / "curve.png").is_file()
    assert len(list(csv.reader((tmp_path / "a" / "evaluations.csv").open()))) == 4
    a, b = (load_file(tmp_path / folder / "solution.safetensors") for folder in ("a", "b"))
    assert a.keys() == {"policy", "kernel", "value", "lower", "upper"}
    assert states_equal(a, b) is None and states_equal(state, straight.state_dict()) is None
    assert a["kernel"].shape == (4, 5, 3, 5) and a["lower"].shape == (4,)
    assert bool((a["lower"] <= a["upper"]).all())
    rows, m = (a["policy"][..., None] * a["kernel"]).sum(2), straight.agent.robust_model
    cost = (a["policy"] * (a["kernel"] * m.kernel.to_dense(m.cost)).sum(-1)).sum(-1)
    torch.testing.assert_close(a["value"], cost + m.gamma * (rows @ a["value"][..., None]).squeeze(-1))


@pytest.mark.parametrize("env", ["machine_replacement", "river_swim", "grid_world", "inventory"])
def test_every_named_model_composes_and_solves(env):
    loop = make_loop(compose(["agent=partial_policy_iteration", f"env={env}", "device=cpu"]))
    assert loop.agent.robust_model.gamma == (0.8 if env == "machine_replacement" else 0.95)
    while loop.step < loop.total_steps and loop.step < 60:
        loop.advance()
    assert loop.agent.converged
    m, s = loop.agent.robust_model, loop.agent.solver.state
    exact = objective(m, worst_case(m, s["best_policy"], m.kernel.probabilities).value)
    assert bool((exact <= s["upper"] + 1e-9).all())


def test_user_mistakes_are_one_line():
    for words, text in [
        (["env=garnet", "env.sates=3"], "did you mean env.states"),
        (["env=garnet", "env.branching=11"], "branching=11"),
        (["env=CartPole-v1"], "shows no model"),
        (["env=garnet", "agent.gamma=1"], r"agent\.gamma=1"),
        (["env=garnet", "agent.ambiguity=l2"], r"agent\.ambiguity"),
        (["env=garnet", "agent.radius=0.3"], r"agent\.radius=0\.3: the model brings its own.*agent\.ambiguity=l1"),
        (["env=garnet", "agent.stepsize=1"], r"did you mean agent\.step_size"),
        (["env=garnet", "num_envs=3"], "leave num_envs out"),
    ]:
        with pytest.raises(RloptError, match=text) as caught:
            make_loop(compose(["agent=drpg", "device=cpu", *words]))
        assert "\n" not in str(caught.value)
    with pytest.raises(RloptError, match="solves a TabularMDP or RobustMDP"):
        DRPG(make_env("FrozenLake-v1").spec)
    with pytest.raises(RloptError, match="no such option"):
        train_config({"agent": {"name": "drpg"}, "env": {"id": "Garnet-v0", "colour": "red"}})
    assert PartialPolicyIteration(garnet(3, 2, 2)).robust_model.ambiguity.__class__ is L1
