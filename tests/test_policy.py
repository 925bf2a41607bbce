"""Exported policies: round trips, what users may hand in, hostile and damaged files."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

import rlopt
from rlopt.envs import Normalizer
from rlopt.nn import (
    Actor,
    CategoricalActor,
    NetworkConfig,
    SquashedGaussianActor,
    TabularActor,
    build_seeded,
    network_options,
    register_actor,
)
from rlopt.nn.actors import ACTORS
from rlopt.policy import Policy, load_policy, save_policy
from rlopt.types import EnvSpec, RloptError

SMALL = network_options(NetworkConfig(hidden=(16,)))
VECTOR = spaces.Box(-1.0, 1.0, (3,), np.float32)
NESTED = spaces.Dict({
    "image": spaces.Box(0, 255, (3, 40, 40), np.uint8),
    "inner/position": spaces.Box(-np.inf, np.inf, (2,), np.float32),
    "inner/which": spaces.Discrete(3),
    "many": spaces.MultiDiscrete([2, 5]),
})  # fmt: skip
TORQUE = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32))


def make(observation: spaces.Space[Any], action: spaces.Space[Any], kind: str = "auto", seed: int = 0) -> Policy:
    spec = EnvSpec("Test-v0", observation, action, episode_limit=7)
    classes = {"tabular": TabularActor, "categorical": CategoricalActor, "squashed_gaussian": SquashedGaussianActor}
    name = kind if kind != "auto" else "categorical" if isinstance(action, spaces.Discrete) else "squashed_gaussian"
    actor = build_seeded(lambda: classes[name](observation, action, {} if name == "tabular" else SMALL), seed)
    assert isinstance(actor, Actor)
    if isinstance(actor, TabularActor):
        with torch.no_grad():
            actor.probabilities.copy_(torch.tensor([[0.1, 0.9], [0.7, 0.3], [0.5, 0.5]], dtype=torch.float64))
    return Policy(spec, actor)


def batch(space: spaces.Space[Any], n: int) -> Any:
    space.seed(0)
    drawn = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {key: torch.as_tensor(np.stack([d[key] for d in drawn])) for key in space.spaces}
    return torch.as_tensor(np.stack(drawn))


CASES = [
    (VECTOR, TORQUE, "squashed_gaussian"),
    (NESTED, TORQUE, "squashed_gaussian"),
    (spaces.Box(0, 255, (40, 40, 1), np.uint8), spaces.Discrete(4), "categorical"),
    (spaces.Discrete(3), spaces.Discrete(2), "tabular"),
    (spaces.Discrete(3), TORQUE, "squashed_gaussian"),
]


def test_loading_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    save_policy(make(VECTOR, TORQUE), tmp_path)
    before = torch.get_rng_state()
    load_policy(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("observation", "action", "kind"), CASES, ids=lambda c: c if isinstance(c, str) else "")
def test_a_saved_policy_comes_back_bit_for_bit(
    tmp_path: Path, observation: spaces.Space[Any], action: spaces.Space[Any], kind: str
) -> None:
    policy = make(observation, action, kind)
    save_policy(policy, tmp_path / "p", {"step": 12, "selected": "best"})
    loaded = load_policy(tmp_path / "p")
    assert loaded.spec == policy.spec
    assert loaded.meta == {"step": 12, "selected": "best"}
    before, after = policy.actor.state_dict(), loaded.actor.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    obs = batch(observation, 5)
    for deterministic in (True, False):
        acts = [
            p.act(obs, deterministic=deterministic, generator=torch.Generator().manual_seed(4)).action
            for p in (policy, loaded)
        ]
        assert torch.equal(*acts)


def test_a_loaded_policy_takes_part_in_no_gradient(tmp_path: Path) -> None:
    policy = make(VECTOR, TORQUE)
    assert not policy.act(torch.zeros(2, 3)).action.requires_grad
    save_policy(policy, tmp_path)
    assert not any(p.requires_grad for p in load_policy(tmp_path).actor.parameters())
    assert all(p.requires_grad for p in policy.actor.parameters()), "saving must leave the agent's network trainable"


def test_a_policy_acts_with_the_current_weights_and_its_copy_does_not() -> None:
    policy = make(VECTOR, TORQUE)
    copied = policy.to("cpu")
    before = policy(np.ones(3))
    with torch.no_grad():
        for p in policy.actor.parameters():
            p.zero_()
    assert np.array_equal(copied(np.ones(3)), before)
    assert np.array_equal(policy(np.ones(3)), [0.0, 5.0]), "the middle of the bounds"


# Calling a policy


def test_numpy_in_gives_numpy_of_the_action_space() -> None:
    policy = make(VECTOR, TORQUE)
    one, many = policy(np.zeros(3)), policy(np.zeros((4, 3)))
    assert isinstance(one, np.ndarray) and one.shape == (2,) and one.dtype == np.float32
    assert isinstance(many, np.ndarray) and many.shape == (4, 2)
    assert TORQUE.contains(one)
    assert policy([0.0, 0.0, 0.0]).tolist() == one.tolist()


def test_tensor_in_gives_tensor() -> None:
    policy = make(VECTOR, TORQUE)
    one, many = policy(torch.zeros(3, dtype=torch.float64)), policy(torch.zeros(4, 3))
    assert isinstance(one, torch.Tensor) and one.shape == (2,) and one.dtype == torch.float32
    assert isinstance(many, torch.Tensor) and many.shape == (4, 2)
    assert np.array_equal(one.numpy(), policy(np.zeros(3)))


def test_one_discrete_action_is_a_python_int() -> None:
    policy = make(spaces.Discrete(3), spaces.Discrete(2), "tabular")
    assert policy(0) == 1 and policy(np.int64(1)) == 0
    assert type(policy(0)) is int
    many = policy(np.array([0, 1]))
    assert many.tolist() == [1, 0] and many.dtype == np.int64
    assert policy(torch.tensor(0)).shape == ()


def test_indices_keep_the_numbering_of_their_spaces() -> None:
    policy = make(spaces.Discrete(3, start=10), spaces.Discrete(2, start=5), "tabular")
    assert [policy(i) for i in (10, 11)] == [6, 5]
    with pytest.raises(RloptError, match="an index lies outside"):
        policy(9)


def test_nested_and_flat_dictionaries_are_the_same_observation() -> None:
    policy = make(NESTED, TORQUE)
    flat = {k: v[0].numpy() for k, v in batch(NESTED, 1).items()}
    nested = {
        "image": flat["image"],
        "inner": {"position": flat["inner/position"], "which": int(flat["inner/which"])},
        "many": flat["many"],
    }
    assert np.array_equal(policy(nested), policy(flat))
    rows = policy({k: v.numpy() for k, v in batch(NESTED, 3).items()})
    assert rows.shape == (3, 2)
    np.testing.assert_allclose(rows[0], policy(flat), rtol=1e-5)


BAD = [
    (VECTOR, np.zeros(4), r"sees Box.*\(3,\), or \(N, 3\) for a batch, not \(4,\)"),
    (VECTOR, np.zeros((2, 2, 3)), r"not \(2, 2, 3\)"),
    (VECTOR, {"a": 1}, "not a dictionary with 'a'"),
    (VECTOR, "left", "not str"),
    (VECTOR, None, "not NoneType"),
    (NESTED, np.zeros(3), "a dictionary with 'image', 'inner/position', 'inner/which', 'many', not ndarray"),
    (NESTED, {"image": np.zeros((3, 40, 40), np.uint8)}, "lacks 'inner/position', 'inner/which', 'many'"),
    (spaces.Discrete(3), 3, "an index lies outside"),
    (spaces.Discrete(3), -1, "an index lies outside"),
    (spaces.Discrete(3), 1.5, "whole numbers"),
    (spaces.Box(0, 255, (40, 40, 1), np.uint8), np.zeros((40, 40, 1)), "whole numbers"),
    (spaces.Box(0, 255, (40, 40, 1), np.uint8), np.full((40, 40, 1), 256), "lies outside"),
]


@pytest.mark.parametrize(("space", "obs", "words"), BAD)
def test_a_wrong_observation_is_one_clear_line(space: spaces.Space[Any], obs: Any, words: str) -> None:
    with pytest.raises(RloptError, match=words) as e:
        make(space, TORQUE)(obs)
    assert "\n" not in str(e.value)


def test_surplus_keys_and_uneven_batches_are_refused() -> None:
    policy = make(spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Box(-1, 1, (2,))}), TORQUE)
    good = {"a": np.zeros(2), "b": np.zeros(2)}
    with pytest.raises(RloptError, match="'c' too many"):
        policy({**good, "c": np.zeros(2)})
    with pytest.raises(RloptError, match="these are one, a batch of 3"):
        policy({**good, "b": np.zeros((3, 2))})


def test_random_actions_follow_the_generator_and_touch_no_global_one() -> None:
    policy = make(VECTOR, TORQUE)
    torch_before, numpy_before = torch.get_rng_state(), global_numpy_state()
    draws = [policy(np.zeros(3), deterministic=False, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    own = [policy(np.zeros(3), deterministic=False) for _ in range(2)]
    assert np.array_equal(draws[0], draws[1]) and not np.array_equal(draws[0], draws[2])
    assert not np.array_equal(own[0], own[1])
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert global_numpy_state() == numpy_before


def global_numpy_state() -> str:
    return repr(np.random.get_state())


# Statistics


def see(normalizer: Normalizer, obs: torch.Tensor) -> None:
    normalizer.moments[""].update(obs, torch.ones(len(obs), dtype=torch.bool))


def seen(*rows: list[float]) -> Normalizer:
    normalizer = Normalizer(EnvSpec("Test-v0", VECTOR, TORQUE), clip=2.0)
    see(normalizer, torch.tensor(rows))
    return normalizer


def test_statistics_travel_with_the_policy_and_stay_frozen(tmp_path: Path) -> None:
    plain = make(VECTOR, TORQUE)
    normalizer = seen([0.0, 0.0, 0.0], [2.0, 4.0, 0.0])  # mean 1, 2, 0 and deviation 1, 2, 0
    policy = Policy(plain.spec, plain.actor, normalizer)
    obs = torch.tensor([[3.0, 0.0, 1.0]])  # normalised: 2, -1, and 1/sqrt(epsilon), clipped to 2
    expected = plain.act(torch.tensor([[2.0, -1.0, 2.0]])).action
    torch.testing.assert_close(policy.act(obs).action, expected)
    save_policy(policy, tmp_path)
    loaded, copied = load_policy(tmp_path), policy.to("cpu")
    before = policy.act(obs).action
    see(normalizer, torch.full((5, 3), 100.0))  # training goes on
    for frozen in (loaded, copied):
        for _ in range(2):
            assert torch.equal(frozen.act(obs).action, before)
    assert not torch.equal(policy.act(obs).action, before), "the agent's own policy sees the statistics of the moment"


def test_statistics_of_rewards_alone_leave_observations_as_they_are(tmp_path: Path) -> None:
    plain = make(VECTOR, TORQUE)
    policy = Policy(plain.spec, plain.actor, Normalizer(plain.spec, obs=False, reward=True))
    save_policy(policy, tmp_path)
    assert np.array_equal(load_policy(tmp_path)(np.ones(3)), plain(np.ones(3)))


# Folders


def test_overwriting_replaces_the_whole_folder(tmp_path: Path) -> None:
    first, second = make(VECTOR, TORQUE, seed=0), make(VECTOR, TORQUE, seed=1)
    save_policy(first, tmp_path / "p", {"step": 1})
    save_policy(second, tmp_path / "p", {"step": 2})
    loaded = load_policy(tmp_path / "p")
    assert loaded.meta["step"] == 2
    assert np.array_equal(loaded(np.ones(3)), second(np.ones(3)))
    assert [p.name for p in tmp_path.iterdir()] == ["p"], "nothing staged is left behind"


@pytest.mark.parametrize("calls_before_failure", [0, 1, 2, 3])
def test_a_failing_disk_leaves_the_old_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls_before_failure: int
) -> None:
    first = make(VECTOR, TORQUE, seed=0)
    save_policy(first, tmp_path / "p")
    left, real = [calls_before_failure], os.replace

    def fail(*args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")

    import rlopt.files

    write = rlopt.files._write
    monkeypatch.setattr(rlopt.files, "_write", lambda *a: (fail(), write(*a)))
    monkeypatch.setattr(os, "replace", lambda *a: (fail(), real(*a)) if left[0] < 1 else real(*a))
    with pytest.raises(OSError, match="No space left"):
        save_policy(make(VECTOR, TORQUE, seed=1), tmp_path / "p")
    monkeypatch.undo()
    assert np.array_equal(load_policy(tmp_path / "p")(np.ones(3)), first(np.ones(3)))


def test_a_crash_between_the_two_renames_still_leaves_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(VECTOR, TORQUE)
    save_policy(first, tmp_path / "p")
    renames, real = [0], os.replace

    def die_after_the_first(*args: Any) -> None:
        renames[0] += 1
        if renames[0] > 1:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(os, "replace", die_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        save_policy(make(VECTOR, TORQUE, seed=1), tmp_path / "p")
    monkeypatch.undo()
    assert not (tmp_path / "p").exists()
    assert np.array_equal(load_policy(tmp_path / "p")(np.ones(3)), first(np.ones(3)))


def test_a_run_folder_means_its_last_policy(tmp_path: Path) -> None:
    save_policy(make(VECTOR, TORQUE), tmp_path / "run" / "policy", {"selected": "last"})
    save_policy(make(VECTOR, TORQUE, seed=1), tmp_path / "run" / "policy_best", {"selected": "best"})
    assert load_policy(tmp_path / "run").meta == {"selected": "last"}
    assert load_policy(tmp_path / "run" / "policy_best").meta == {"selected": "best"}


def test_other_folders_and_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("words")
    (tmp_path / "file").write_text("words")
    for name in ("thesis", "file"):
        with pytest.raises(RloptError, match="is no policy; name another folder"):
            save_policy(make(VECTOR, TORQUE), tmp_path / name)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == (tmp_path / "file").read_text() == "words"


def test_a_policy_is_found_from_inside_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_policy(make(VECTOR, TORQUE), tmp_path / "p", {"step": 4})
    monkeypatch.chdir(tmp_path / "p")
    assert load_policy(".").meta == {"step": 4}


def test_saving_a_loaded_policy_keeps_how_it_was_trained(tmp_path: Path) -> None:
    save_policy(make(VECTOR, TORQUE), tmp_path / "a", {"step": 3})
    save_policy(load_policy(tmp_path / "a"), tmp_path / "b")
    assert load_policy(tmp_path / "b").meta == {"step": 3}


def test_numbers_that_json_lacks_are_kept(tmp_path: Path) -> None:
    meta = {"env": {"kwargs": {"range": [0.6, math.inf], "low": -math.inf, "$float": 1.5}}, "gap": math.nan, "step": 3}
    save_policy(make(VECTOR, TORQUE), tmp_path, meta)
    text = (tmp_path / "policy.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    loaded = load_policy(tmp_path).meta
    assert math.isnan(loaded.pop("gap")) and meta.pop("gap")
    assert loaded == meta


@pytest.mark.parametrize("device", ["meta", "vulkan"])
def test_a_device_that_is_not_there_is_no_damage(tmp_path: Path, device: str) -> None:
    policy = make(VECTOR, TORQUE)
    save_policy(policy, tmp_path)
    for use in (lambda: load_policy(tmp_path, device), lambda: policy.to(device)):
        with pytest.raises(RloptError, match=f"^device={device} cannot be used on this machine; use auto, cpu") as e:
            use()
        assert "\n" not in str(e.value)


def test_a_missing_policy_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(RloptError, match="does not exist"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(RloptError, match="holds no policy"):
        load_policy(tmp_path)


def test_an_actor_from_outside_is_loaded_only_once_registered(tmp_path: Path) -> None:
    class Constant(Actor):
        kind = "test_constant"

        def __init__(self, observation: Any, action: Any, options: dict[str, Any]) -> None:
            super().__init__()
            self.options = options
            self.value = torch.nn.Parameter(torch.zeros(int(options["size"])))

        def act(self, obs: Any, carry: Any = None, deterministic: bool = False, generator: Any = None) -> Any:
            return self.value.detach().expand(len(obs), -1), None

    actor = Constant(VECTOR, TORQUE, {"size": 2})
    save_policy(Policy(EnvSpec("Test-v0", VECTOR, TORQUE), actor), tmp_path)
    with pytest.raises(RloptError, match="unknown kind of policy 'test_constant'"):
        load_policy(tmp_path)
    register_actor("test_constant", Constant)
    try:
        assert load_policy(tmp_path)(np.zeros(3)).tolist() == [0.0, 0.0]
    finally:
        del ACTORS["test_constant"]


# The package


def test_importing_rlopt_is_light_and_its_names_are_there() -> None:
    code = (
        "import sys, rlopt; assert not {'torch', 'gymnasium', 'numpy'} & set(sys.modules), 'heavy';"
        "assert rlopt.load_policy.__name__ == 'load_policy' and rlopt.Policy and rlopt.save_policy and rlopt.make_env;"
        "assert rlopt.buffers.ReplayBuffer and 'agents' in dir(rlopt) and rlopt.__version__"
    )
    root = str(Path(rlopt.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        rlopt.nonsense  # noqa: B018
