"""A team of three different agents, one of which dies, from the environment to the exported policy."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from rlopt import registry
from rlopt.agents.base import Agent
from rlopt.joint import own_action, own_obs
from rlopt.loops.base import Loop
from rlopt.policy import load_policy
from rlopt.state import states_equal
from rlopt.training import TrainConfig, train_config
from rlopt.training.evaluate import evaluate_path
from rlopt.training.setup import begin, make_loop, resume
from rlopt.types import RloptError
from tests.agents.completeness import tensors_of, unregistered
from tests.agents.independent import Independent, IndependentBox

pytestmark = pytest.mark.usefixtures("without_curves")
SMALL = {"network": {"hidden": [8]}, "batch_size": 8}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "discrete": ("independent", SMALL),
    "box": ("independent_box", {**SMALL, "fused": False}),
}


@pytest.fixture(autouse=True)
def independent(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (Independent, IndependentBox):
        monkeypatch.setitem(registry.AGENTS, cls.name, cls)


def config(actions: str = "discrete", run_dir: Path | None = None, steps: int = 60, **options: Any) -> TrainConfig:
    name, learner = KINDS[actions]
    agent = {"name": name, "learner": learner, "batch_size": 8, "warmup_steps": 20, **options.pop("agent", {})}
    kwargs = {"actions": actions, "length": [4, 3], "end": ["terminate", "truncate"], **options.pop("kwargs", {})}
    env = {"id": "rlopt.envs.counting:rlopt/CountTeam-v0", "kwargs": kwargs, **options.pop("env", {})}
    return train_config({
        "seed": 3, "total_steps": steps, "num_envs": 2, "device": "cpu", "threads": 1, "agent": agent, "env": env,
        "run_dir": None if run_dir is None else str(run_dir), "eval": {"every": 30, "episodes": 3},
        "log": {"every": 20, "tensorboard": False}, "checkpoint": {"minutes": None, "every_steps": 30},
        "buffer": {"name": "reshuffled", "capacity": 200}, **options,
    })  # fmt: skip


def finished(loop: Loop) -> Any:
    while loop.step < loop.total_steps:
        loop.advance()
    return loop


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as f:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(f)]


def test_what_is_stored_and_drawn_has_the_agents_as_an_axis() -> None:
    loop = finished(make_loop(config(steps=40, agent={"n_step": 3, "warmup_steps": 40})))
    batch = loop.buffer.batch(torch.arange(24))
    assert batch.reward.shape == (24, 3)
    assert batch.action.shape == (24, 3)
    assert batch.obs["action_mask"].dtype == batch.next_obs["alive"].dtype == torch.bool
    one = make_loop(config(steps=40, agent={"n_step": 1, "warmup_steps": 40}))
    single = finished(one).buffer.batch(torch.arange(40))
    count, paid = single.obs["obs"][:, 0, 0], single.reward
    masks, alive = single.obs["action_mask"], single.obs["alive"]
    assert torch.equal(alive[:, 1], count < 2)
    assert not masks.gather(2, single.action.unsqueeze(2)).squeeze(2)[~alive].any(), "the dead have no possible action"
    assert masks.gather(2, single.action.unsqueeze(2)).squeeze(2)[alive].all()
    expected = ((count + 1)[:, None] * torch.tensor([1.0, 2.0, 3.0]) + single.action) * alive
    assert torch.equal(paid, expected)
    # Rows of 2 environments in turn, so transition i is followed by i + 2 until its episode ends.
    ends = (count == torch.tensor([3.0, 3.0]).repeat(20)) | ((single.obs["obs"][:, 0, 1] % 2 == 1) & (count == 2))
    for i in range(24):
        rows, discount, total = [i], 0.99, paid[i].clone()
        while len(rows) < 3 and not ends[rows[-1]]:
            rows.append(rows[-1] + 2)
            total += discount * paid[rows[-1]]
            discount *= 0.99
        torch.testing.assert_close(batch.reward[i], total)
        assert torch.equal(batch.next_obs["state"][i], single.next_obs["state"][rows[-1]])
        assert float(batch.discount[i]) == pytest.approx(0.99 ** len(rows))
    for each in (loop, one):
        each.close()


def test_a_derived_leaf_is_not_stored_and_drawn_alike() -> None:
    plain, derived = (finished(make_loop(config(steps=30, kwargs={"derived": way}))) for way in (False, True))
    index = torch.arange(30)
    assert derived.buffer.nbytes < plain.buffer.nbytes
    a, b = plain.buffer.batch(index), derived.buffer.batch(index)
    for key, leaf in a.obs.items():
        assert torch.equal(leaf, b.obs[key])
        assert torch.equal(a.next_obs[key], b.next_obs[key])
    for each in (plain, derived):
        each.close()


CASES = {
    "discrete": {},
    "box": {"actions": "box"},
    "n-step-normalised": {"agent": {"n_step": 3}, "env": {"normalize_obs": True, "normalize_reward": True}},
    "own-rewards-derived": {"agent": {"team_reward": False}, "kwargs": {"derived": True}},
    "one-reward": {"kwargs": {"paid_apart": False}},
    "two-runs": {"num_runs": 2, "env": {"normalize_obs": True}},
    "captured": {"update_mode": "captured"},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_team_equals_one_that_never_stopped(case: str, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    results = []
    for folder, steps in ((straight, 60), (broken, 36)):
        trainer = begin(config(run_dir=folder, steps=steps, **CASES[case]))
        results.append((trainer.run(), trainer.loop))
        trainer.close()
    trainer = resume(broken, {"total_steps": 60})
    results.append((trainer.run(), trainer.loop))
    trainer.close()
    (reference, first), _, (continued, second) = results
    assert states_equal(first.agent.state_dict(), second.agent.state_dict()) is None
    rows = [log.read_rows(0, log.rows_written) for loop in (first, second) for log in loop.row_logs().values()]
    assert states_equal(*rows) is None
    assert table(straight / "episodes.csv") == table(broken / "episodes.csv")
    runs = range(2) if "num_runs" in CASES[case] else [None]
    final = [x for run in runs for x in evaluate_path(broken, run=run).returns]
    assert final == [e.total_reward for e in continued.evaluation] == [e.total_reward for e in reference.evaluation]


def test_returns_are_the_teams_and_each_agents(tmp_path: Path) -> None:
    trainer = begin(config(run_dir=tmp_path / "run"))
    trainer.run()
    trainer.close()
    for name in ("episodes.csv", "evaluations.csv"):
        rows = table(tmp_path / "run" / name)
        assert rows
        for row in rows:
            own = [float(row[f"return/agent_{i}"]) for i in range(3)]
            assert float(row["return"]) == sum(own)
            assert own[1] <= 2 * 1 + 2 * 2 + 2 + 1, "of the two steps before it died"
    policy = load_policy(tmp_path / "run")
    loop = make_loop(config())
    obs = loop.env.reset()
    together = policy.act({"obs": obs["obs"], "action_mask": obs["action_mask"]}).action
    for i, name in enumerate(policy.spec.agents):
        alone = policy.of_agent(name).act(own_obs(policy.spec, obs, i)).action
        assert torch.equal(alone, own_action(policy.spec, together, i))
    loop.close()


@pytest.mark.parametrize("actions", KINDS)
def test_all_of_a_teams_state_is_registered(actions: str) -> None:
    loop, other = make_loop(config(actions)), make_loop(config(actions, seed=4))
    agent: Agent = finished(loop).agent
    assert unregistered(agent, tensors_of(other.agent)) == []
    for each in (loop, other):
        each.close()


def test_an_agent_that_is_alone_refuses_a_team() -> None:
    for name, actions in (("sac_discrete", "discrete"), ("sac", "box"), ("reinforce", "heads")):
        kwargs = {"actions": actions}
        env = {"id": "rlopt.envs.counting:rlopt/CountTeam-v0", "kwargs": kwargs}
        with pytest.raises(RloptError, match=f"CountTeam-v0 has 3 agents, but agent={name} trains one; choose"):
            make_loop(train_config({"agent": {"name": name}, "env": env, "device": "cpu"}))
