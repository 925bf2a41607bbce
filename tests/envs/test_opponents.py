"""Particle environments with two sides, of which one is played for us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.envs import make_env
from rlopt.envs.teams.opponents import OpponentEnv
from rlopt.nn.actors import make_actor
from rlopt.policy import Policy, save_policy
from rlopt.policy.team import TeamActor
from rlopt.training import train_config
from rlopt.types import RloptError

pytest.importorskip("mpe2")


def constant(name: str, observation: spaces.Space[Any], action: spaces.Space[Any]) -> Any:
    """Return an opponent that always moves to the right."""
    assert name == "agent_0"
    assert isinstance(observation, spaces.Box)
    assert action == spaces.Discrete(5)
    return lambda seen: 2 if seen.shape == observation.shape else 0


@pytest.mark.parametrize("actions", ["", "-continuous"])
@pytest.mark.parametrize(("task", "n"), [("tag", 3), ("adversary", 2)])
def test_a_team_plays_one_side(task: str, n: int, actions: str) -> None:
    env = make_env(f"mpe/{task}{actions}", 2)
    spec = env.spec
    assert len(spec.agents) == n
    obs = env.reset()
    assert isinstance(obs, dict)
    index = torch.tensor(spec.derived["obs"])
    assert torch.equal(obs["state"][:, index], obs["obs"])
    action = torch.zeros(2, *spec.action_space.shape)
    for k in range(25):
        step = env.step(action if actions else action.long())
        assert step.reward.shape == (2, n)
        assert step.truncated.tolist() == [k == 24] * 2


def _played(module: str, team: str, steps: int, **kwargs: Any) -> Any:
    env = OpponentEnv(module, team, max_cycles=2**31, **kwargs)
    env.reset(seed=3)
    for _ in range(steps):
        env.step(np.zeros(len(env.agents), np.int64))
    return env.inner.unwrapped.world


def test_scripts_do_what_they_should() -> None:
    world = _played("mpe2.simple_tag_v3", "agent", 40)
    prey = world.agents[-1].state.p_pos
    assert min(np.linalg.norm(agent.state.p_pos - prey) for agent in world.agents[:-1]) < 0.3, "it was found"
    world = _played("mpe2.simple_tag_v3", "adversary", 40)
    prey = world.agents[-1].state.p_pos
    assert min(np.linalg.norm(agent.state.p_pos - prey) for agent in world.agents[:-1]) > 0.4, "it kept away from all"
    assert (np.abs(prey) < 1.5).all()
    world = _played("mpe2.simple_adversary_v3", "adversary", 40)
    places = np.array([agent.state.p_pos for agent in world.agents[1:]])
    landmarks = np.array([landmark.state.p_pos for landmark in world.landmarks])
    assert (np.linalg.norm(places - landmarks, axis=1) < 0.3).all(), "each hides a landmark"


def test_a_function_or_a_saved_policy_may_be_the_opponent(tmp_path: Path) -> None:
    world = _played("mpe2.simple_tag_v3", "adversary", 3, opponent=f"{__name__}:constant")
    assert world.agents[-1].state.p_vel[0] > 0.5
    spec = make_env("mpe/tag", kwargs=train_config({"env": {"id": "mpe/tag", "team": "agent"}}).env.kwargs).spec
    own = spec.of_agent(0)
    actor = make_actor("categorical", own.observation_space, own.action_space, {"hidden": [4]})
    save_policy(Policy(spec, TeamActor(spec, [actor])), tmp_path / "prey")
    env = make_env("mpe/tag", 1, kwargs={"opponent": str(tmp_path / "prey")})
    env.reset()
    assert env.step(torch.zeros(1, 3, dtype=torch.int64)).valid.all()


@pytest.mark.parametrize("task", ["tag", "adversary", "spread", "reference-continuous", "speaker_listener"])
def test_a_saved_world_goes_on_where_it_stood(task: str) -> None:
    env = make_env(f"mpe/{task}", 2, backend="sync")
    env.reset()
    generator = torch.Generator().manual_seed(0)
    actions = torch.rand(60, 2, *env.spec.action_space.shape, generator=generator)
    if "continuous" not in task:
        actions = (actions * 3).long()
    for action in actions[:30]:
        env.step(action)
    state = env.state_dict()
    assert state is not None
    steps = [env.step(action) for action in actions[30:]]
    other = make_env(f"mpe/{task}", 2, backend="sync", seed=9)
    other.reset()
    other.load_state_dict(state)
    for action, before in zip(actions[30:], steps, strict=True):
        after = other.step(action)
        assert torch.equal(after.reward, before.reward)
        assert torch.equal(after.ended, before.ended)
        assert torch.equal(after.obs["obs"], before.obs["obs"])  # type: ignore[index]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"team": "prey"}, "no agents whose names begin with 'prey'"),
        ({"opponent": "nowhere"}, "nowhere"),
        ({"opponent": "nowhere:play"}, "there is no such function"),
    ],
)
def test_mistakes_are_one_clear_line(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(RloptError) as caught:
        make_env("mpe/tag", kwargs=kwargs)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
