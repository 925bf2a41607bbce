"""Teams from the environment to the exported policy, by every agent that trains them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from rlopt.joint import own_action, own_entries, own_obs
from rlopt.loops.base import Loop
from rlopt.policy import load_policy
from rlopt.state import states_equal
from rlopt.training import TrainConfig, train_config
from rlopt.training.evaluate import evaluate_path
from rlopt.training.setup import begin, make_loop, resume
from tests.agents.completeness import tensors_of, unregistered

pytestmark = pytest.mark.usefixtures("without_curves")
ROLLOUT = {"rollout_steps": 3, "epochs": 2}
SHARED = {"share_parameters": True}
LINEAR = {"lr_schedule": "linear", "schedule_steps": 99}
SMALL = {"network": {"hidden": [8]}, "batch_size": 8}


class Run(NamedTuple):
    """A short training of a team of three, one of which dies."""

    agent: dict[str, Any]
    actions: str = "box"
    more: dict[str, Any] = {}


RUNS = {
    "hasac": Run({"name": "hasac"}, more={"env": {"normalize_obs": True}}),
    "hasac-captured": Run({"name": "hasac", "n_step": 3}, "heads", {"update_mode": "captured"}),
    "hasac-exact-normalised": Run(
        {"name": "hasac", "expectation": "exact", "value_normalisation": True, **SHARED}, "discrete"
    ),
    "hasac-two-runs": Run({"name": "hasac"}, "box", {"num_runs": 2}),
    "masac": Run({"name": "masac", "critic_temperature": "agents"}, "heads"),
    "isac": Run({"name": "isac", "expectation": "exact", "team_reward": False}, "discrete"),
    "hatd3": Run({"name": "hatd3"}),
    "mappo": Run(
        {"name": "mappo", **ROLLOUT, "lr_schedule": "linear", "schedule_steps": 99},
        more={"env": {"normalize_obs": True}},
    ),
    "ippo-shared": Run({"name": "ippo", **ROLLOUT, "share_parameters": True}, "discrete"),
    "happo": Run({"name": "happo", **ROLLOUT, "target_kl": 1.0}, "heads"),
    "matd3": Run({"name": "matd3"}, more={"num_runs": 2}),
}
every_run = pytest.mark.parametrize("case", RUNS)


def config(case: str, run_dir: Path | None = None, steps: int = 48, **options: Any) -> TrainConfig:
    run = RUNS[case]
    kwargs = {"actions": run.actions, "length": [4, 3], "end": ["terminate", "truncate"]}
    env = {"id": "rlopt.envs.counting:rlopt/CountTeam-v0", "kwargs": kwargs, **run.more.get("env", {})}
    replay = {"buffer": {"name": "reshuffled", "capacity": 200}} if "rollout_steps" not in run.agent else {}
    warm = {"warmup_steps": 16} if replay else {}
    return train_config({
        "seed": 3, "total_steps": steps, "num_envs": 2, "device": "cpu", "threads": 1,
        "run_dir": None if run_dir is None else str(run_dir), "eval": {"every": 24, "episodes": 2},
        "log": {"every": 12, "tensorboard": False}, "checkpoint": {"minutes": None, "every_steps": 24},
        **replay, **run.more, "agent": {**SMALL, **warm, **run.agent}, "env": env, **options,
    })  # fmt: skip


def finished(loop: Loop) -> Any:
    while loop.step < loop.total_steps:
        loop.advance()
    return loop


@every_run
def test_a_resumed_team_equals_one_that_never_stopped_and_its_policy_needs_no_state(case: str, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    results = []
    for folder, steps in ((straight, 48), (broken, 30)):
        trainer = begin(config(case, folder, steps))
        results.append((trainer.run(), trainer.loop))
        trainer.close()
    trainer = resume(broken, {"total_steps": 48})
    results.append((trainer.run(), trainer.loop))
    trainer.close()
    (reference, first), _, (continued, second) = results
    assert states_equal(first.agent.state_dict(), second.agent.state_dict()) is None
    assert [e.total_reward for e in continued.evaluation] == [e.total_reward for e in reference.evaluation]
    run = 0 if "num_runs" in RUNS[case].more else None
    assert evaluate_path(broken, run=run).returns == evaluate_path(straight, run=run).returns
    policy = load_policy(broken / "policy" / "run0" if run == 0 and (broken / "policy" / "run0").is_dir() else broken)
    loop = make_loop(config(case))
    obs = loop.env.reset()
    assert isinstance(obs, dict)
    bare = {key: leaf for key, leaf in obs.items() if key not in ("state", "alive")}
    together = policy.act(bare).action
    assert not together[:, ~own_entries(policy.spec)].any(), "padding stays 0"
    for i, name in enumerate(policy.spec.agents):
        alone = policy.of_agent(name).act(own_obs(policy.spec, obs, i)).action
        torch.testing.assert_close(alone, own_action(policy.spec, together, i))
    loop.close()


@every_run
def test_all_of_a_teams_state_is_registered(case: str) -> None:
    loop, other = make_loop(config(case)), make_loop(config(case, seed=4))
    agent = finished(loop).agent
    assert agent.guard.first_bad() is None
    assert unregistered(agent, tensors_of(other.agent)) == []
    for each in (loop, other):
        each.close()
