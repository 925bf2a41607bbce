"""Translation of spaces, observations and actions."""

from __future__ import annotations

import json
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.envs import VectorAdapter, make_env
from rlopt.envs.counting import CountSpacesEnv
from rlopt.envs.edge import observation_writer
from rlopt.envs.spaces import ActionCodec, ObservationCodec, space_from_json, space_to_json
from rlopt.nn.encoders import Flatten
from rlopt.types import RloptError, encoded_leaves


@pytest.mark.parametrize("backend", ["sync", "async", "gymnasium"])
def test_nested_observations_become_a_flat_dict_of_tensors(backend: str) -> None:
    if backend == "gymnasium":
        fns = [lambda: CountSpacesEnv(2, "truncate")] * 2
        mode = gymnasium.vector.AutoresetMode.SAME_STEP
        env: Any = VectorAdapter(gymnasium.vector.SyncVectorEnv(fns, autoreset_mode=mode))
    else:
        env = make_env("rlopt/CountSpaces-v0", 2, backend=backend, kwargs={"length": 2, "end": "truncate"})
    space = env.spec.observation_space
    assert set(space) == {"image", "parts/0", "parts/1", "deep/flags"}
    assert space["deep/flags"] == spaces.Box(0.0, 1.0, (2,), np.float32)
    obs = env.reset()
    assert {k: v.dtype for k, v in obs.items()} == {
        "image": torch.uint8, "parts/0": torch.int64, "parts/1": torch.int64, "deep/flags": torch.float32,
    }  # fmt: skip
    assert {k: tuple(v.shape) for k, v in obs.items()} == {
        "image": (2, 4, 4, 1), "parts/0": (2,), "parts/1": (2, 2), "deep/flags": (2, 2),
    }  # fmt: skip
    assert obs["parts/0"].tolist() == [5, 5]  # Discrete(4, start=5) keeps its numbering
    env.step(torch.tensor([-1, 1]))
    step = env.step(torch.tensor([-1, 1]))  # Discrete(3, start=-1)
    assert step.reward.tolist() == [2.0 - 1.0, 2.0 + 1.0]
    assert step.ended.all()
    assert step.next_obs["image"].unique().tolist() == [2]
    assert step.obs["image"].unique().tolist() == [0]
    assert step.next_obs["parts/0"].tolist() == [7, 7]
    assert step.next_obs["parts/1"].tolist() == [[2, 1], [2, 1]]
    assert step.next_obs["deep/flags"].tolist() == [[0.0, 1.0], [0.0, 1.0]]
    env.close()


def test_boxes_become_float32_and_images_stay_uint8() -> None:
    wide = ObservationCodec(spaces.Box(-1e300, np.array([1.0, 1e300]), (2,), np.float64)).space
    assert wide == spaces.Box(-np.inf, np.array([1.0, np.inf], np.float32), (2,), np.float32)
    assert ObservationCodec(spaces.Box(-3, 3, (2, 2), np.int32)).space == spaces.Box(-3, 3, (2, 2), np.float32)
    image = spaces.Box(0, 255, (3, 3), np.uint8)
    assert ObservationCodec(image).space is image


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (spaces.Text(5), "Text"),
        (spaces.Sequence(spaces.Discrete(2)), "Sequence"),
        (spaces.Dict({"a": spaces.Text(5)}), "at 'a'"),
        (spaces.Dict({"a/b": spaces.Discrete(2), "a": spaces.Dict({"b": spaces.Discrete(2)})}), "both named 'a/b'"),
        (spaces.Dict({}), "no leaf"),
    ],
)
def test_observations_without_a_tensor_are_refused(space: Any, words: str) -> None:
    with pytest.raises(RloptError, match=words):
        ObservationCodec(space)


def test_actions_reach_the_environment_in_its_own_words() -> None:
    box = ActionCodec(spaces.Box(-1.0, 1.0, (2, 2), np.float64))
    assert box.space == spaces.Box(-1.0, 1.0, (2, 2), np.float32)  # of the same shape: an agent axis stays one
    rows = box.rows(torch.arange(8.0).reshape(2, 2, 2), 2)
    assert rows.dtype == np.float64
    assert rows[1].tolist() == [[4.0, 5.0], [6.0, 7.0]]

    discrete = ActionCodec(spaces.Discrete(3, start=10)).rows(torch.tensor([10, 12]), 2)
    assert discrete == [10, 12]
    assert all(type(a) is int for a in discrete)

    several = ActionCodec(spaces.MultiDiscrete([3, 4], start=[0, 1])).rows(torch.tensor([[2, 4]]), 1)
    assert several.dtype == np.int64
    assert several.tolist() == [[2, 4]]

    binary = ActionCodec(spaces.MultiBinary(2))
    assert binary.space == spaces.MultiDiscrete([2, 2])
    assert binary.rows(torch.tensor([[0, 1]]), 1).dtype == np.int8
    with pytest.raises(RloptError, match=r"shape \(2,\), but 1 environments of MultiBinary\(2\) want \(1, 2\)"):
        binary.rows(torch.tensor([0, 1]), 1)


@pytest.mark.parametrize("ends", [(0.1, 0.1), (-0.1, 0.3), (-1.7, 2.9), (-160.48345947265625, 31.427471160888672)])
def test_an_action_at_its_bound_is_inside_the_environments_own_box(ends: tuple[float, float]) -> None:
    """0.1 in float32 is above 0.1 in float64."""
    space = spaces.Box(*ends, (3,), np.float64)
    codec = ActionCodec(space)
    low, high = codec.space.low, codec.space.high
    if ends[0] < ends[1]:  # what a policy answers its user
        assert space.contains(low.astype(np.float64)) and space.contains(high.astype(np.float64))
    rows = codec.batch(torch.as_tensor(np.stack([low, high, low / 2 + high / 2])), 3)
    assert rows.dtype == np.float64 and all(space.contains(row) for row in rows)
    assert rows[0].tolist() == [ends[0]] * 3 and rows[1].tolist() == [ends[1]] * 3
    wide = ActionCodec(spaces.Box(-1e300, 0.1, (1,), np.float64)).space
    assert wide.low == -np.inf and 0.09 < wide.high < 0.1
    far = codec.batch(torch.full((1, 3), 500.0), 1)
    assert far.tolist() == [[500.0] * 3], "what is wrong is not made right in silence"


def test_masks_stay_masks_and_other_bits_become_numbers() -> None:
    space = spaces.Dict({
        "action_mask": spaces.Box(0, 1, (3,), np.int8),  # PettingZoo's way
        "alive": spaces.MultiBinary(2),
        "bits": spaces.MultiBinary(2),
        "inner": spaces.Dict({"alive": spaces.MultiBinary(1)}),
    })  # fmt: skip
    codec = ObservationCodec(space)
    assert codec.space == spaces.Dict({
        "action_mask": spaces.MultiBinary(3),
        "alive": spaces.MultiBinary(2),
        "bits": spaces.Box(0.0, 1.0, (2,), np.float32),
        "inner/alive": spaces.Box(0.0, 1.0, (1,), np.float32),
    })  # fmt: skip
    assert encoded_leaves(codec.space).keys() == {"bits", "inner/alive"}
    arrays = codec.arrays(1)
    seen = {"action_mask": [1, 0, 1], "alive": [0, 1], "bits": [1, 0], "inner": {"alive": [1]}}
    observation_writer("test", codec)(arrays, 0, seen)
    obs = codec.tensors(arrays, None)
    assert isinstance(obs, dict)
    assert {key: leaf.dtype for key, leaf in obs.items()} == {
        "action_mask": torch.bool, "alive": torch.bool, "bits": torch.float32, "inner/alive": torch.float32,
    }  # fmt: skip
    assert obs["action_mask"].tolist() == [[True, False, True]]
    assert Flatten(codec.space)(obs).tolist() == [[1.0, 0.0, 1.0]], "an encoder reads no mask"


def test_an_environment_never_sees_the_callers_tensor() -> None:
    action = torch.zeros(1, 2)
    rows = ActionCodec(spaces.Box(-1.0, 1.0, (2,), np.float32)).rows(action, 1)
    action.fill_(1.0)
    assert rows.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    "space", [spaces.Dict({"a": spaces.Discrete(2)}), spaces.Box(0, 5, (2,), np.int64), spaces.Text(3)]
)
def test_action_spaces_that_no_agent_acts_in_are_refused(space: Any) -> None:
    with pytest.raises(RloptError, match="rlopt acts in Box of floats"):
        ActionCodec(space)


SPACES = [
    spaces.Box(-np.inf, np.inf, (3,), np.float32),
    spaces.Box(np.array([-1.0, -np.inf], np.float32), np.array([0.1, 2.0], np.float32)),
    spaces.Box(0, 255, (84, 84, 4), np.uint8),
    spaces.Box(0.0, 1.0, (), np.float32),
    spaces.Discrete(4, start=-2),
    spaces.MultiDiscrete([2, 3], start=[1, 0]),
    spaces.MultiBinary([2, 3]),
    spaces.MultiBinary(3),
    spaces.Dict({"z": spaces.Discrete(2), "a/b": spaces.Box(-1.0, 1.0, (2,), np.float32)}),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_spaces_survive_json(space: Any) -> None:
    text = json.dumps(space_to_json(space), allow_nan=False)
    found = space_from_json(json.loads(text))
    assert found == space
    assert len(text) < 250  # an image's bounds are one number each
    if isinstance(space, spaces.Dict):
        assert list(found) == list(space)


@pytest.mark.parametrize(
    "text",
    ['{"type": "os.system"}', '{"type": "Box", "shape": [2]}', '{"type": "Discrete", "n": -1, "start": 0}', "[]",
     '{"type": "Box", "dtype": "object", "shape": [1], "low": 0, "high": 1}'],
)  # fmt: skip
def test_damaged_descriptions_are_refused(text: str) -> None:
    with pytest.raises(RloptError):
        space_from_json(json.loads(text))
