"""The native MuJoCo tasks against Gymnasium's own: equal to the bit in float64, over resets, keywords, resumption."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from rlopt.envs import SyncVectorEnv, make_env
from rlopt.envs.factory import EnvFactory, find_spec
from rlopt.envs.make import resolve_backend
from rlopt.envs.native import make_native
from rlopt.types import RloptError, Step

pytest.importorskip("mujoco.batch")

NAMES = ["Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum", "InvertedPendulum",
         "Pusher", "Reacher", "Swimmer", "Walker2d"]  # fmt: skip
IDS = [f"{name}-v{version}" for name in NAMES for version in (4, 5) if (name, version) != ("Pusher", 4)]
ENDING = ("Ant", "Hopper", "Humanoid-", "InvertedPendulum", "InvertedDouble", "Walker2d")  # of themselves, not timed


def _native(env_id: str, n: int, kwargs: dict[str, Any] | None = None, **options: Any) -> Any:
    options = {"dtype": np.float64, "threads": 1, **options}
    return make_native(EnvFactory(find_spec(env_id), kwargs or {}), n, **options)


def _actions(env: Any, steps: int, seed: int = 0) -> Tensor:
    """(steps, N, A), some of them out of bounds: MuJoCo clips those, the control cost does not."""
    space = env.spec.action_space
    drawn = np.random.default_rng(seed).uniform(1.2 * space.low, 1.2 * space.high, (steps, env.num_envs, *space.shape))
    return torch.from_numpy(drawn.astype(np.float32))


def _compare(env_id: str, n: int, steps: int, kwargs: dict[str, Any]) -> dict[str, int]:
    """Step native rows beside Gymnasium's environments, and count the ends."""
    native = _native(env_id, n, kwargs)
    references = [gymnasium.make(env_id, **kwargs) for _ in range(n)]
    seeds = [100 + i for i in range(n)]
    first = np.stack([env.reset(seed=seed)[0] for env, seed in zip(references, seeds, strict=True)])
    assert native.reset(seeds).tolist() == first.tolist()
    ends = {"terminated": 0, "truncated": 0}
    for actions in _actions(native, steps):
        step = native.step(actions)
        for i, (env, action) in enumerate(zip(references, actions.numpy(), strict=True)):
            obs, reward, terminated, truncated, _ = env.step(action)
            assert step.next_obs[i].tolist() == obs.tolist()
            assert float(step.reward[i]) == float(reward)
            assert (bool(step.terminated[i]), bool(step.truncated[i])) == (terminated, truncated)
            assert bool(step.ended[i]) == (terminated or truncated)
            assert bool(step.valid[i])
            ends["terminated"] += terminated
            ends["truncated"] += truncated
            if terminated or truncated:
                obs, _ = env.reset()  # with the generator that it has
            assert step.obs[i].tolist() == obs.tolist()
    native.close()
    return ends


@pytest.mark.parametrize("env_id", IDS)
def test_a_task_equals_gymnasium_to_the_bit(env_id: str) -> None:
    ends = _compare(env_id, 3, 110, {"max_episode_steps": 50})
    alone = _compare(env_id, 1, 60, {"max_episode_steps": 25})
    assert (ends["terminated"] + alone["terminated"] > 0) == env_id.startswith(ENDING)
    assert ends["truncated"] + alone["truncated"] > 0 or env_id.startswith(ENDING)


@pytest.mark.parametrize("env_id", ["Ant-v5", "HalfCheetah-v4", "Humanoid-v5", "Walker2d-v5"])
def test_hundreds_of_steps_of_one_episode_equal_gymnasium_to_the_bit(env_id: str) -> None:
    free = {} if env_id.startswith("HalfCheetah") else {"terminate_when_unhealthy": False}
    assert _compare(env_id, 2, 300, free) == {"terminated": 0, "truncated": 0}


@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [
        ("HalfCheetah-v5", {"forward_reward_weight": 0.7, "ctrl_cost_weight": 0.3, "reset_noise_scale": 0.4,
                            "exclude_current_positions_from_observation": False, "frame_skip": 3}),
        ("HalfCheetah-v4", {"reset_noise_scale": 0.0, "exclude_current_positions_from_observation": False}),
        ("Swimmer-v5", {"exclude_current_positions_from_observation": False, "ctrl_cost_weight": 1}),
        ("Hopper-v5", {"terminate_when_unhealthy": False, "healthy_reward": 2, "forward_reward_weight": 0.5}),
        ("Hopper-v5", {"healthy_state_range": (-3.0, 2.0), "healthy_angle_range": (-np.inf, np.inf),
                       "healthy_z_range": (-1.0, 5.0), "reset_noise_scale": 0.1}),
        ("Hopper-v4", {"terminate_when_unhealthy": False, "exclude_current_positions_from_observation": False}),
        ("Walker2d-v5", {"healthy_z_range": (1.1, 1.3), "healthy_angle_range": (-0.1, 0.2)}),
        ("Walker2d-v5", {"xml_file": "walker2d.xml", "terminate_when_unhealthy": False}),
        ("Ant-v5", {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0}),
        ("Ant-v5", {"include_cfrc_ext_in_observation": False, "main_body": "aux_1", "healthy_z_range": (0.4, 0.7)}),
        ("Ant-v5", {"contact_cost_weight": 0.0, "contact_force_range": (-0.2, 0.5), "main_body": 3}),
        ("Ant-v4", {"use_contact_forces": True, "exclude_current_positions_from_observation": False}),
        ("Humanoid-v5", {"include_cinert_in_observation": False, "include_cfrc_ext_in_observation": False,
                         "contact_cost_weight": 0.0, "contact_cost_range": (0.5, 2.0)}),
        ("Humanoid-v5", {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 1e-3,
                         "contact_cost_range": (-np.inf, 0.5), "terminate_when_unhealthy": False}),
        ("HumanoidStandup-v5", {"include_cvel_in_observation": False, "impact_cost_weight": 1e-3, "uph_cost_weight": 3,
                                "include_qfrc_actuator_in_observation": False, "reset_noise_scale": 0.1}),
        ("Reacher-v5", {"reward_dist_weight": 0.3, "reward_control_weight": 2.5}),
        ("Pusher-v5", {"reward_near_weight": 0.1, "reward_dist_weight": 3, "reward_control_weight": 0.7}),
        ("InvertedPendulum-v5", {"reset_noise_scale": 0.1}),
        ("InvertedDoublePendulum-v5", {"healthy_reward": 3.5, "reset_noise_scale": 0.3, "frame_skip": 2}),
    ],
)  # fmt: skip
def test_every_keyword_means_what_it_means_to_gymnasium(env_id: str, kwargs: dict[str, Any]) -> None:
    _compare(env_id, 2, 50, {"max_episode_steps": 30, **kwargs})


def test_a_model_of_the_users_own(tmp_path: Path) -> None:
    from gymnasium.envs.mujoco.mujoco_env import expand_model_path

    text = Path(expand_model_path("hopper.xml")).read_text()
    heavier = tmp_path / "hopper.xml"
    heavier.write_text(text.replace('density="1000"', 'density="1500"').replace("RK4", "implicitfast"))
    assert heavier.read_text() != text
    _compare("Hopper-v5", 2, 40, {"xml_file": str(heavier)})


def _same(a: Step, b: Step) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:-1], b[:-1], strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("autoreset", [True, False])
@pytest.mark.parametrize("env_id", ["Hopper-v5", "Ant-v5", "Reacher-v4"])
def test_it_does_what_sync_does_call_by_call(env_id: str, autoreset: bool) -> None:
    kwargs, mask = {"max_episode_steps": 12}, torch.tensor([True, False, True])
    if env_id == "Ant-v5":
        kwargs["healthy_z_range"] = (0.45, 1.0)  # type: ignore[assignment]
    options: dict[str, Any] = {"seed": 5, "autoreset": autoreset, "kwargs": kwargs}
    native = make_env(env_id, 3, backend="native", **options)
    sync = make_env(env_id, 3, backend="sync", **options)
    assert native.spec == sync.spec
    actions = iter(_actions(native, 60))

    def both(steps: int) -> None:
        for _ in range(steps):
            action = next(actions)
            assert _same(native.step(action), sync.step(action))

    assert torch.equal(native.reset(), sync.reset())  # type: ignore[arg-type]
    both(16)
    assert torch.equal(native.reset(mask=mask), sync.reset(mask=mask))  # type: ignore[arg-type]
    both(7)
    seeds = [7, 8, 9]
    assert torch.equal(native.reset(seeds, ~mask), sync.reset(seeds, ~mask))  # type: ignore[arg-type]
    both(16)
    assert torch.equal(native.reset(), sync.reset())  # type: ignore[arg-type]
    both(3)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("env_id", [i for i in IDS if i.endswith("v5")] + ["Reacher-v4", "Humanoid-v4", "Ant-v4"])
def test_a_saved_environment_goes_on_exactly(env_id: str, n: int) -> None:
    kwargs = {"max_episode_steps": 15}
    env = _native(env_id, n, kwargs, seed=1)
    assert env.state_dict() is None
    env.reset()
    before, after = _actions(env, 20, 1), _actions(env, 30, 2)
    for action in before:
        last = env.step(action)
    state = env.state_dict()
    expected = [env.step(action) for action in after]
    other = _native(env_id, n, kwargs, seed=2)
    other.reset()
    other.step(before[0])
    assert torch.equal(other.load_state_dict(state), last.obs)
    assert all(_same(other.step(action), step) for action, step in zip(after, expected, strict=True))
    fresh = _native(env_id, n, kwargs, seed=3)
    fresh.load_state_dict(state)  # and saving again at once loses nothing
    again = _native(env_id, n, kwargs)
    again.load_state_dict(fresh.state_dict())
    assert all(_same(again.step(action), step) for action, step in zip(after, expected, strict=True))


def test_rows_that_wait_for_their_reset_are_saved_too() -> None:
    env = _native("Humanoid-v5", 3, autoreset=False)
    env.reset()
    actions = _actions(env, 80)
    k = 0
    while not (step := env.step(actions[k])).terminated.any():
        k += 1
    other = _native("Humanoid-v5", 3, autoreset=False)
    assert torch.equal(other.load_state_dict(env.state_dict()), step.obs)
    for action in actions[k : k + 5]:
        step = env.step(action)
        assert not step.valid.all()
        assert _same(step, other.step(action))
    mask = ~step.valid | step.terminated
    assert torch.equal(env.reset(mask=mask), other.reset(mask=mask))
    assert env.step(actions[0]).valid.all()


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Ant-v5"])
def test_the_number_of_threads_changes_nothing(env_id: str) -> None:
    one, two = (_native(env_id, 5, {"max_episode_steps": 20}, threads=k) for k in (1, 2))
    assert torch.equal(one.reset(), two.reset())
    for action in _actions(one, 40):
        assert _same(one.step(action), two.step(action))
    two.close()
    two.close()


def test_a_state_of_something_else_is_refused_in_one_line() -> None:
    env = _native("Hopper-v5", 2)
    env.reset()
    for other, words in (
        (_native("Hopper-v5", 3), "holds 3 environments, but num_envs is 2"),
        (_native("Walker2d-v5", 2), "the mujoco version of the saved run"),
        (make_env("Hopper-v5", 2, backend="sync"), "not of backend=native"),
    ):
        other.reset()
        with pytest.raises(RloptError, match=words):
            env.load_state_dict(other.state_dict())
    with pytest.raises(RloptError, match="not of a Gymnasium backend"):
        other.load_state_dict(env.state_dict())


def _auto(env_id: str, **kwargs: Any) -> str:
    return resolve_backend(env_id, kwargs=kwargs)


def test_auto_is_native_where_that_is_exact_and_sync_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {_auto(env_id) for env_id in IDS} == {"native"}
    assert _auto("Hopper-v5", healthy_reward=2.0, max_episode_steps=7) == "native"
    assert _auto("Pendulum-v1") == "sync"
    assert _auto("CartPole-v1") == "sync"
    assert _auto("Hopper-v5", render_mode="rgb_array") == "sync"
    assert resolve_backend("Hopper-v5", wrappers=["ClipReward"]) == "sync"
    assert resolve_backend("Hopper-v5", "sync") == "sync"
    assert make_env("Hopper-v5", 2).spec.episode_limit == 1000
    assert isinstance(make_env("Hopper-v5", wrappers=[lambda env: env]), SyncVectorEnv)
    assert isinstance(make_env("Hopper-v5", backend="gymnasium"), SyncVectorEnv)
    gymnasium.register("OwnHopper-v0", entry_point="own_hopper:Hopper", max_episode_steps=5)
    gymnasium.register("LongHopper-v0", entry_point="gymnasium.envs.mujoco.hopper_v5:HopperEnv", max_episode_steps=9)
    try:
        assert _auto("OwnHopper-v0") == "sync"  # a subclass may compute anything
        assert _auto("LongHopper-v0") == "native"
        assert make_env("LongHopper-v0").spec.episode_limit == 9
    finally:
        del gymnasium.registry["OwnHopper-v0"], gymnasium.registry["LongHopper-v0"]
    asleep = tmp_path / "asleep.xml"
    asleep.write_text(
        '<mujoco><option><flag sleep="enable"/></option><worldbody><body><joint type="slide"/><joint type="slide"/>'
        '<joint name="hinge"/><geom size="1"/></body></worldbody><actuator><motor joint="hinge"/></actuator></mujoco>'
    )
    assert _auto("Hopper-v5", xml_file=str(asleep)) == "sync"
    with pytest.raises(RloptError, match=r"backend=native: the model uses plugins or sleeping.*use backend=sync"):
        make_env("Hopper-v5", backend="native", kwargs={"xml_file": str(asleep)})
    with pytest.raises(RloptError, match="backend=native: it is not one of"):
        make_env("Pendulum-v1", backend="native")
    monkeypatch.setitem(sys.modules, "mujoco.batch", None)  # an older MuJoCo
    assert _auto("Hopper-v5") == "sync"


def test_actions_of_another_kind_are_translated_or_refused() -> None:
    one, two = _native("Hopper-v5", 2), _native("Hopper-v5", 2)
    one.reset()
    two.reset()
    action = torch.tensor([[0.5, -0.25, 1.0], [0.0, 0.125, -1.0]])
    assert _same(one.step(action.double()), two.step(action.requires_grad_()))
    with pytest.raises(RloptError, match=r"want \(2, 3\)"):
        one.step(torch.zeros(3, 3))
    with pytest.raises(RloptError, match="before reset"):
        _native("Hopper-v5", 2).step(action)


def test_what_a_caller_writes_into_a_step_never_comes_back() -> None:
    env, other = (make_env("HalfCheetah-v5", 2, backend="native", autoreset=False) for _ in range(2))
    env.reset()
    other.reset()
    for action in _actions(env, 3):
        step = env.step(action)
        assert _same(step, other.step(action))
        for field in (step.obs, step.reward, step.valid, step.truncated):
            field.zero_()  # type: ignore[union-attr]
    state, expected = env.state_dict(), other.state_dict()
    assert state is not None
    assert expected is not None
    assert torch.equal(state["observed"], expected["observed"])
