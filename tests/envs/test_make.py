"""From names to environments: ids, wrappers, backends, and one clear line where something is wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.envs import Backend, SyncVectorEnv, VectorAdapter, backend_names, factory, make_env, register_backend
from rlopt.envs import make as make_module
from rlopt.random import derive_seed
from rlopt.types import RloptError


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"id": "HalfCheeta-v5"}, "env=HalfCheeta-v5 is not a registered environment; did you mean HalfCheetah-v5?"),
        ({"id": "pendulum-v1"}, "did you mean Pendulum-v1?"),
        ({"id": "CartPole"}, "env=CartPole lacks its version; did you mean CartPole-v1?"),
        ({"id": "no_such_module:X-v0"}, "no module named no_such_module"),
        ({"id": ".foo:Bar-v0"}, "env=.foo:Bar-v0: .foo is no module's name; write module:Name"),
        ({"id": "./foo:Bar-v0"}, "env=./foo:Bar-v0: ./foo is no module's name; write module:Name"),
        ({"id": "Zzz-v0"}, "env=Zzz-v0 is not a registered environment; `rlopt list envs` shows what there is"),
        ({"id": "Pendulum-v1", "kwargs": {"g": "abc"}}, "env=Pendulum-v1: env.kwargs.g: expected a number, got 'abc'"),
        ({"id": "HalfCheetah-v5", "kwargs": {"frame_skip": 0}}, "frame_skip: expected a whole number of at least 1"),
        ({"id": "HalfCheetah-v5", "kwargs": {"reset_noise_scale": "abc"}}, "env.kwargs.reset_noise_scale: expected a"),
        ({"id": "Pendulum-v1", "wrappers": [{"class": "TimeLimit", "kwargs": 5}]}, "kwargs of TimeLimit must be a map"),
        ({"id": "HalfCheetah-v3"}, "env=HalfCheetah-v3 cannot be built: "),
        ({"id": "Pendulum-v1", "backend": "asink"}, "backend='asink' is unknown; did you mean async?"),
        ({"id": "Pendulum-v1", "backend": "xyz"}, "backend='xyz' is unknown; choose from async, atari, auto, "),
        ({"id": "Pendulum-v1", "num_envs": 0}, "num_envs=0 must be at least 1"),
        ({"id": "Pendulum-v1", "backend": "async", "timeout": 0.0}, "timeout=0.0 must be above 0"),
        ({"id": "Pendulum-v1", "kwargs": {"gravity": 1}}, "cannot be built with env.kwargs={'gravity': 1}"),
        ({"id": "Pendulum-v1", "device": "gpu"}, "device='gpu' is no torch device"),
        ({"id": "Pendulum-v1", "backend": "vector"}, "no vector version of its own"),
        ({"id": "CartPole-v1", "backend": "vector", "wrappers": ["FlattenObservation"]}, "wrap single environments"),
        ({"id": "Pendulum-v1", "wrappers": ["FlattenObservatio"]}, "did you mean FlattenObservation?"),
        ({"id": "Pendulum-v1", "wrappers": ["nowhere:Wrapper"]}, "cannot import 'nowhere:Wrapper'"),
        ({"id": "Pendulum-v1", "wrappers": [".nowhere:Wrapper"]}, ".nowhere is no module's name"),
        ({"id": "Pendulum-v1", "wrappers": ["collections:OrderdDict"]}, "collections has no class 'OrderdDict'; did"),
        ({"id": "Pendulum-v1", "wrappers": [{"name": "X"}]}, "the keys class and kwargs"),
        ({"id": "Pendulum-v1", "wrappers": ["TimeLimit"]}, "TimeLimit refuses this environment"),
        ({"id": "Pendulum-v1", "wrappers": [3]}, "neither module:Class"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(RloptError) as caught:
        make_env(**arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("env_id", "module", "extra"), [("Hopper-v5", "mujoco", "mujoco"), ("ALE/Pong-v5", "ale_py", "atari")]
)
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, env_id: str, module: str, extra: str) -> None:
    for name in [n for n in sys.modules if n.startswith((module, "gymnasium.envs.mujoco"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # importing it now raises ModuleNotFoundError
    with pytest.raises(RloptError) as caught:
        make_env(env_id)
    assert f'pip install -c constraints.txt -e ".[{extra}]"' in str(caught.value)


def test_an_id_from_a_module_is_registered_by_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rlopt_envs.py").write_text(
        "import gymnasium\n"
        "from rlopt.envs.counting import CountEnv\n"
        "gymnasium.register('MyCount-v0', entry_point='my_rlopt_envs:CountEnv', max_episode_steps=4)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for backend in ("sync", "async"):
        env = make_env("my_rlopt_envs:MyCount-v0", backend=backend, kwargs={"length": 9})
        assert env.spec.id == "my_rlopt_envs:MyCount-v0"
        assert env.spec.episode_limit == 4
        env.reset()
        steps = [env.step(torch.zeros(1, 1)) for _ in range(4)]
        assert [bool(s.truncated) for s in steps] == [False, False, False, True]
        assert not any(bool(s.terminated) for s in steps)
        env.close()


class Doubled(gymnasium.RewardWrapper[Any, Any]):
    def __init__(self, env: Any, factor: float = 2.0) -> None:
        super().__init__(env)
        self.factor = factor

    def reward(self, reward: Any) -> float:
        return float(reward) * self.factor


def test_wrappers_by_name_mapping_and_callable_apply_from_the_inside_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wrapper_module", sys.modules[__name__])
    env = make_env(
        "rlopt/Count-v0",
        kwargs={"length": 5},
        wrappers=[
            {"class": "ClipReward", "kwargs": {"max_reward": 1.5}},  # a bare name is one of gymnasium.wrappers
            {"class": "wrapper_module:Doubled", "kwargs": {"factor": 10.0}},
            "wrapper_module:Doubled",
            lambda inner: gymnasium.wrappers.RescaleObservation(
                gymnasium.wrappers.TransformObservation(
                    inner, lambda o: np.clip(o, 0, 4), spaces.Box(0.0, 4.0, (2,), np.float64)
                ),
                0.0,
                1.0,
            ),
        ],
    )
    assert env.spec.observation_space == spaces.Box(0.0, 1.0, (2,), np.float32)
    env.reset()
    steps = [env.step(torch.zeros(1, 1)) for _ in range(2)]
    assert [float(s.reward) for s in steps] == [20.0, 30.0]
    assert [s.obs.tolist() for s in steps] == [[[0.25, 0.0]], [[0.5, 0.0]]]


def test_slots_start_from_seeds_derived_from_run_stream_and_slot() -> None:
    env = make_env("Pendulum-v1", 2, seed=3)
    expected = [gymnasium.make("Pendulum-v1").reset(seed=derive_seed(3, "env", i))[0] for i in range(2)]
    first = env.reset()
    assert isinstance(first, torch.Tensor)
    assert first.tolist() == np.stack(expected).tolist()
    again = env.reset()
    assert not torch.equal(first, again)  # a row goes on with its own generator
    assert torch.equal(first, env.reset(seeds=[derive_seed(3, "env", i) for i in range(2)]))
    assert not torch.equal(first, make_env("Pendulum-v1", 2, seed=3, stream="evaluation").reset())
    assert env.spec.episode_limit == 200
    assert make_env("Pendulum-v1", kwargs={"max_episode_steps": 7}).spec.episode_limit == 7


def test_envpools_own_tasks() -> None:
    pytest.importorskip("envpool")
    kwargs = {"max_episode_steps": 25}
    env, same = (make_env("Hopper-v5", 3, seed=1, backend="envpool", kwargs=kwargs) for _ in range(2))
    assert env.spec.episode_limit == 25
    assert env.spec.action_space.dtype == np.float32
    first: Any = env.reset()
    assert torch.equal(first, same.reset())  # type: ignore[arg-type]
    assert torch.equal(same.reset(seeds=[4, 5, 6]), same.reset(seeds=[4, 5, 6]))  # type: ignore[arg-type]
    actions = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (60, 3, 3)).astype(np.float32))
    ended = torch.zeros(3, dtype=torch.bool)
    for action in actions:
        step = env.step(action)
        assert torch.equal(step.valid, ~ended)  # the row after an end, and no other, is no transition
        ended = step.terminated | step.truncated
    assert env.state_dict() is None
    mask, before = torch.tensor([True, False, False]), env.reset(mask=torch.zeros(3, dtype=torch.bool))
    after = env.reset(mask=mask)
    assert (after == before).all(-1).tolist() == [False, True, True]  # type: ignore[union-attr]
    with pytest.raises(RloptError, match="seed all rows"):
        env.reset(seeds=[1, 2, 3], mask=mask)
    waiting = make_env("Hopper-v5", 2, backend="envpool", autoreset=False, kwargs={"max_episode_steps": 3})
    waiting.reset(seeds=[7, 8])
    assert [waiting.step(actions[k, :2]).valid.tolist() for k in range(4)] == [[True, True]] * 3 + [[False, False]]
    again: Any = waiting.reset(seeds=[9, 8], mask=torch.tensor([True, False]))
    other: Any = make_env("Hopper-v5", 2, backend="envpool").reset(seeds=[9, 8])
    assert torch.equal(again[0], other[0])
    with pytest.raises(RloptError, match=r"cannot be built by EnvPool with env.kwargs="):
        make_env("Hopper-v5", backend="envpool", kwargs={"nope": 1})


def test_a_missing_envpool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(RloptError, match=r'backend=envpool needs .*pip install -c constraints.txt -e "\.\[envpool\]"'):
        make_env("Pendulum-v1", backend="envpool")


def test_a_backend_of_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_module, "_BACKENDS", dict(make_module._BACKENDS))
    asked = []

    def backend(request: Any) -> Any:
        asked.append(request)
        return SyncVectorEnv([request.factory] * request.num_envs, seed=request.seed)

    register_backend("mine", Backend(backend, batched=True))
    env = make_env("Pendulum-v1", 2, seed=9, backend="mine", kwargs={"g": 9.81})
    assert env.num_envs == 2
    assert (asked[0].id, asked[0].seed, asked[0].factory.kwargs) == ("Pendulum-v1", 9, {"g": 9.81})
    assert "mine" in backend_names()
    assert make_module.stepping_device("mine", torch.device("meta")).type == "cpu"
    assert make_module.stepping_device("torch", torch.device("meta")).type == "meta"
    with pytest.raises(RloptError, match="registered already"):
        register_backend("sync", Backend(backend))


def test_ales_own_vector_environment_is_another_task_but_may_be_adapted() -> None:
    ale_py = pytest.importorskip("ale_py")
    with pytest.raises(RloptError, match=r"ALE/Breakout-v5 with env\.backend=vector is another task: it clips rewards"):
        make_env("ALE/Breakout-v5", 2, backend="vector")
    gymnasium.register_envs(ale_py)

    def adapted(mode: str) -> Any:
        later = {"max_num_frames_per_episode": 80, "noop_max": 0, "use_fire_reset": False, "reward_clipping": False}
        way = gymnasium.VectorizeMode.VECTOR_ENTRY_POINT
        return VectorAdapter(
            gymnasium.make_vec("ALE/Breakout-v5", 2, vectorization_mode=way, autoreset_mode=mode, **later)
        )

    env, following = adapted("SameStep"), adapted("NextStep")
    assert env.mode == gymnasium.vector.AutoresetMode.SAME_STEP
    assert following.mode == gymnasium.vector.AutoresetMode.NEXT_STEP
    following.close()
    last: Any = env.reset()
    assert last.dtype == torch.uint8
    ends = []
    for _ in range(45):
        step: Any = env.step(torch.tensor([1, 0]))
        assert step.valid.all()
        assert torch.equal(step.ended, step.truncated | step.terminated)
        for i in step.ended.nonzero().flatten().tolist():
            assert not torch.equal(step.obs[i], step.next_obs[i])
            assert torch.equal(step.next_obs[i, :3], last[i, 1:])  # the true last frames follow the ones before
        assert torch.equal(step.obs[~step.ended], step.next_obs[~step.ended])
        ends.append(step.truncated.tolist())
        last = step.obs
    assert [k for k, e in enumerate(ends) if e == [True, True]] == [19, 39]  # 80 frames are 20 steps
    env.close()


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("FetchReach-v4", "write env=gymnasium_robotics:FetchReach-v4 once it is installed"),
        ("simple_spread_v3", "it looks like one of PettingZoo: write env=pettingzoo:MODULE"),
        ("pistonball_v6", "it looks like one of PettingZoo: write env=pettingzoo:MODULE"),
        ("mpe/simple_spread_v3", "MPE has no task 'simple_spread_v3'"),
        ("HalfCheetah-v9", "did you mean HalfCheetah-v5?"),
        ("Qqqqqq-v5", "module:Name-v0 is one that a module of yours registers"),
    ],
)
def test_an_id_of_somewhere_else_is_told_where_it_is(env_id: str, words: str) -> None:
    with pytest.raises(RloptError) as caught:
        make_env(env_id)
    assert words in str(caught.value) and "did you mean Ant" not in str(caught.value)


def test_minigrid_is_found_once_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minigrid", None)  # as where it is not
    with pytest.raises(RloptError, match=r"env=MiniGrid-Empty-5x5-v0 needs the package minigrid, .*\[text\]"):
        make_env("MiniGrid-Empty-5x5-v0")


def test_the_versions_that_met_are_told_where_a_well_known_package_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"gymnasium-robotics": "1.4.2", "mujoco": "3.17.0"}
    monkeypatch.setattr(factory.metadata, "version", found.__getitem__)
    monkeypatch.setitem(gymnasium.registry, "Broken-v0", gymnasium.registry["Pendulum-v1"])  # so that it is put back
    entry = "gymnasium_robotics_stand_in:Broken"
    gymnasium.register("Broken-v0", entry_point=entry)
    spec = gymnasium.registry["Broken-v0"]
    assert factory._versions(spec) == ""
    spec.entry_point = "gymnasium_robotics.envs.fetch:Broken"
    assert factory._versions(spec) == (
        " (gymnasium-robotics 1.4.2 with mujoco 3.17.0, which may not go together: try another version of "
        "gymnasium-robotics)"
    )


def test_an_atari_game_without_its_namespace_is_found() -> None:
    pytest.importorskip("ale_py")
    with pytest.raises(RloptError, match=r"did you mean ALE/Pong-v5\?"):
        make_env("Pong-v5")


BROKEN = """
import gymnasium, sys
{body}
class Silent(gymnasium.Env):
    def __init__(self, depth=1):
        assert depth == 2
gymnasium.register("Silent-v0", entry_point=Silent)
"""


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("sys.exit(0)", "env={}:Silent-v0: importing {} fails: SystemExit in "),
        ("1 / 0", "importing {} fails: division by zero"),
        ("import nothing_of_the_kind", "no module named nothing_of_the_kind"),
        ("", "env=Silent-v0 cannot be built: AssertionError in "),
    ],
)
def test_a_module_that_fails_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, words: str
) -> None:
    name = f"rlopt_broken_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(BROKEN.format(body=body))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RloptError) as caught:
        make_env(f"{name}:Silent-v0")
    assert words.format(name, name) in str(caught.value) and "\n" not in str(caught.value)
    gymnasium.registry.pop("Silent-v0", None)


@pytest.mark.parametrize("kind", ["NormalizeObservation", "NormalizeReward"])
def test_wrappers_with_statistics_are_refused(kind: str) -> None:
    """An evaluation would have other statistics, and report scaled rewards."""
    option = "normalize_obs" if kind == "NormalizeObservation" else "normalize_reward"
    wrapper = getattr(gymnasium.wrappers, kind)
    inside = [kind, {"class": "TransformReward", "kwargs": {"func": float}}]
    for wrappers in ([kind], inside, [wrapper]):
        with pytest.raises(RloptError, match=f"the wrapper {kind} has statistics .* use env.{option}=true"):
            make_env("Pendulum-v1", wrappers=wrappers)


def test_a_vector_of_gymnasiums_own_takes_its_task() -> None:
    env = make_env("CartPole-v1", 2, backend="vector")
    env.reset()
    assert env.step(torch.ones(2, dtype=torch.int64)).reward.tolist() == [1.0, 1.0]
