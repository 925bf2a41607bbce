"""MaMuJoCo, held equal to ``gymnasium_robotics.mamujoco_v1`` step by step in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from rlopt.envs import make_env
from rlopt.envs.factory import EnvFactory, find_spec
from rlopt.envs.native import make_native
from rlopt.envs.teams.mamujoco import NativeTeamEnv
from rlopt.joint import join_actions
from rlopt.loops.configuration import EnvConfig
from rlopt.training.video import _frame, drawn_environment
from rlopt.types import RloptError

pytest.importorskip("mujoco.batch")

# Tasks and partitions that run in the reference, and depths of sight.
TASKS = [
    ("HalfCheetah-2x3", 1), ("HalfCheetah-6x1", 2), ("Ant-4x2", 1), ("Ant-2x4", 0), ("Ant-2x4d", 2), ("Hopper-3x1", 1),
    ("Walker2d-2x3", 1), ("Humanoid-9_8", 1), ("HumanoidStandup-9_8", 0), ("Swimmer-2x1", 1), ("Reacher-2x1", 1),
    ("Pusher-3p", 1), ("ManySegmentSwimmer-3x2", 1), ("ManySegmentAnt-2x3", 1), ("ManySegmentAnt-3x1", 2),
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _registry() -> Iterator[None]:
    """Importing gymnasium_robotics registers names, which other tests should not meet."""
    before = dict(gymnasium.registry)
    yield
    gymnasium.registry.clear()
    gymnasium.registry.update(before)


def _reference(task: str, depth: int | None, **kwargs: Any) -> Any:
    pytest.importorskip("gymnasium_robotics")
    from gymnasium_robotics import mamujoco_v1

    scenario, _, partition = task.partition("-")
    return mamujoco_v1.parallel_env(scenario, partition.replace("_", "|"), agent_obsk=depth, **kwargs)


def _follow(env: NativeTeamEnv, reference: Any, steps: int, ordered: bool = True) -> int:
    """Take the same actions in both; returns the steps taken."""
    arrange = (lambda x: x) if ordered else np.sort
    obs, spec = env.reset(seeds=[5, 6]), env.spec
    seen, _ = reference.reset(seed=5)
    generator = np.random.default_rng(0)
    for k in range(steps):
        assert isinstance(obs, dict)
        assert np.array_equal(obs["state"][0], reference.state())
        for i, name in enumerate(spec.agents):
            mine, width = obs["obs"][0, i].numpy(), seen[name].shape[0]
            assert spec.of_agent(i).observation_space.shape == (width,)
            assert np.array_equal(arrange(mine[:width]), arrange(seen[name])), name
            assert not mine[width:].any()
        own = {
            name: generator.uniform(-1.0, 1.0, spec.of_agent(name).action_space.shape).astype(np.float32)
            for name in spec.agents
        }
        joint = join_actions(spec, [torch.from_numpy(action) for action in own.values()])
        step = env.step(joint.expand(2, *joint.shape))
        seen, rewards, terminated, truncated, _ = reference.step(own)
        assert step.reward[0].item() == rewards[spec.agents[0]]
        assert step.terminated[0] == terminated[spec.agents[0]]
        assert step.truncated[0] == truncated[spec.agents[0]]
        if step.ended[0]:
            return k + 1
        obs = step.obs
    return steps


def _native(task: str, n: int = 2, **kwargs: Any) -> NativeTeamEnv:
    env = make_native(EnvFactory(find_spec(f"mamujoco/{task}"), kwargs), n, dtype=np.float64)
    assert isinstance(env, NativeTeamEnv)
    return env


@pytest.mark.parametrize(("task", "depth"), TASKS)
def test_native_rows_equal_the_reference(task: str, depth: int) -> None:
    reference = _reference(task, depth)  # whose order of Pusher's joints of one name is left to chance
    assert _follow(_native(task, agent_obsk=depth), reference, 30, ordered=task != "Pusher-3p") > 5


@pytest.mark.parametrize("task", ["HalfCheetah-3x2", "Ant-8x1", "Walker2d-6x1", "Humanoid-17x1"])
def test_partitions_of_our_own_equal_the_reference_told_of_them(task: str) -> None:
    pytest.importorskip("gymnasium_robotics")
    from gymnasium_robotics.envs.multiagent_mujoco.obsk import get_parts_and_edges

    scenario, _, partition = task.partition("-")
    (joints,), edges, common = get_parts_and_edges(scenario, None)
    env = _native(task)
    names = {
        "Ant": lambda joint: (joint.act_ids - 2) % 8,
        "Humanoid": lambda joint: joint.act_ids,
    }
    joints = sorted(joints, key=names.get(scenario, joints.index))
    each = int(partition.split("x")[1])
    parts = [tuple(joints[i : i + each]) for i in range(0, len(joints), each)]
    factorization = {"partition": parts, "edges": edges, "globals": common}
    _follow(env, _reference(task, 1, agent_factorization=factorization), 20)


def test_without_a_depth_one_agent_is_all() -> None:
    env = _native("HalfCheetah-2x3", agent_obsk=None)
    assert env.spec.agents == ("agent_0",)
    assert env.spec.action_space.shape == (1, 6)
    _follow(env, _reference("HalfCheetah-2x3", None), 5)


@pytest.mark.parametrize("task", ["Walker2d-2x3", "Humanoid-9_8", "Hopper-3x1-full"])
def test_one_environment_gives_what_native_rows_do(task: str) -> None:
    native, sync = make_env(f"mamujoco/{task}", 2), make_env(f"mamujoco/{task}", 2, backend="sync")
    assert isinstance(native, NativeTeamEnv)
    assert native.spec == sync.spec
    a, b = native.reset(), sync.reset()
    state = None
    for k in range(60):
        assert isinstance(a, dict)
        assert isinstance(b, dict)
        assert torch.equal(a["obs"], b["obs"])
        assert torch.equal(a["state"], b["state"])
        action = torch.rand(2, *native.spec.action_space.shape, generator=torch.Generator().manual_seed(k)) * 2 - 1
        first, second = native.step(action), sync.step(action)
        assert torch.equal(first.reward, second.reward)
        assert torch.equal(first.ended, second.ended)
        a, b = first.obs, second.obs
        if k == 40:
            state = native.state_dict(), sync.state_dict(), action
    assert state is not None
    native.load_state_dict(state[0])
    sync.load_state_dict(state[1])  # type: ignore[arg-type]
    assert torch.equal(native.step(state[2]).reward, sync.step(state[2]).reward)


def test_what_agents_see_is_stored_once_where_it_is_a_gather_of_the_state() -> None:
    spec = make_env("mamujoco/Humanoid-9_8").spec
    index = torch.tensor(spec.derived["obs"])
    env = make_env("mamujoco/Humanoid-9_8", 3)
    obs = env.reset()
    assert isinstance(obs, dict)
    padded = torch.cat((obs["state"], torch.zeros(3, 1)), 1)
    assert torch.equal(padded[:, index], obs["obs"])
    assert "obs" not in make_env("mamujoco/Walker2d-2x3").spec.derived, "its agents see velocities that are not clipped"


def test_a_team_can_be_drawn() -> None:
    env: Any = drawn_environment(EnvConfig(id="mamujoco/HalfCheetah-2x3"), 0, torch.device("cpu"))
    env.reset()
    try:
        frame = _frame(env)
    except RloptError as e:
        pytest.skip(str(e))
    assert frame.dtype == np.uint8 and frame.ndim == 3 and frame.std() > 0
    env.step(torch.ones(1, *env.spec.action_space.shape))
    assert not np.array_equal(_frame(env), frame)
    env.close()


def test_the_full_view_is_harls() -> None:
    env = make_env("mamujoco/HalfCheetah-2x3-full", 2)
    assert env.spec.id == "mamujoco/HalfCheetah-2x3-full"
    obs, plain = env.reset(seeds=[1, 2]), make_env("HalfCheetah-v5", 2).reset(seeds=[1, 2])
    assert isinstance(obs, dict)
    assert isinstance(plain, torch.Tensor)
    for i in range(2):
        seen = np.concatenate((plain[0].double().numpy(), np.eye(2)[i]))
        np.testing.assert_allclose(obs["obs"][0, i], (seen - seen.mean()) / seen.std(), rtol=1e-5, atol=1e-6)
    state = plain[0].double().numpy()
    np.testing.assert_allclose(obs["state"][0], (state - state.mean()) / state.std(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("mamujoco/HalfChetah-2x3", {}, "no task 'HalfChetah'; did you mean HalfCheetah?"),
        ("mamujoco/HalfCheetah-2x4", {}, "HalfCheetah has no partition '2x4'; did you mean"),
        ("mamujoco/ManySegmentAnt-x", {}, "write KxM"),
        ("mamujoco/Hopper-3x1", {"agent_obsk": -1}, "agent_obsk=-1 must be 0, 1"),
        ("mamujoco/Ant-4x2", {"include_cfrc_ext_in_observation": False}, "the agents of Ant see cfrc_ext"),
    ],
)
def test_mistakes_are_one_clear_line(name: str, kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(RloptError) as caught:
        make_env(name, kwargs=kwargs)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
