"""Environments of several agents, told by what three different ones count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from rlopt import joint
from rlopt.envs import SyncVectorEnv, VectorAdapter, VectorEnv, make_env
from rlopt.envs.counting import CountTeamEnv
from rlopt.envs.torch_env import TorchEnv
from rlopt.types import EnvSpec, RloptError

ID = "rlopt.envs.counting:rlopt/CountTeam-v0"
NO, YES = False, True


@pytest.fixture(params=["sync", "async"])
def build(request: pytest.FixtureRequest) -> Iterator[Any]:
    made: list[VectorEnv] = []

    def make(n: int = 2, autoreset: bool = True, **kwargs: Any) -> VectorEnv:
        made.append(make_env(ID, n, backend=request.param, autoreset=autoreset, kwargs=kwargs))
        return made[-1]

    yield make
    for env in made:
        env.close()


def test_what_a_team_is_comes_from_the_environments_metadata(build: Any) -> None:
    spec: EnvSpec = build(derived=True).spec
    assert (spec.agents, spec.reward_shape) == (("agent_0", "agent_1", "agent_2"), (3,))
    one = spec.of_agent("agent_2")
    obs = spaces.Box(0.0, np.inf, (4,), np.float32)
    assert one.observation_space == spaces.Dict(obs=obs, action_mask=spaces.MultiBinary(5))
    assert one.action_space == spaces.Discrete(5)
    assert spec.derived["obs"] == ((0, 1, -1, -1), (2, 3, 4, -1), (5, 6, 7, 8))
    assert spec.action_space == spaces.MultiDiscrete([2, 3, 5])


def test_three_agents_of_which_one_dies(build: Any) -> None:
    env = build(length=4, dies=2)
    obs = env.reset()
    assert {key: leaf.dtype for key, leaf in obs.items()} == {
        "obs": torch.float32, "action_mask": torch.bool, "state": torch.float32, "alive": torch.bool,
    }  # fmt: skip
    assert obs["action_mask"][0].tolist() == [
        [YES, YES, NO, NO, NO], [YES, YES, YES, NO, NO], [YES] * 5,
    ]  # fmt: skip
    step = env.step(torch.tensor([[0, 1, 2], [1, 2, 4]]))
    assert step.reward.tolist() == [[1 + 0, 2 + 1, 3 + 2], [1 + 1, 2 + 2, 3 + 4]]
    assert step.next_obs["obs"][0].tolist() == [[1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 2, 2]]
    assert step.next_obs["state"][0].tolist() == [1, 0, 1, 0, 1, 1, 0, 2, 2]
    assert step.next_obs["action_mask"][0].tolist() == [
        [YES, NO, NO, NO, NO], [YES, YES, NO, NO, NO], [YES, YES, YES, YES, NO],
    ]  # fmt: skip
    assert step.next_obs["alive"].all()
    step = env.step(torch.tensor([[0, 1, 2], [0, 0, 0]]))
    assert step.reward[0].tolist() == [2, 4 + 1, 6 + 2], "it is paid for the step in which it dies"
    assert step.next_obs["alive"].tolist() == [[YES, NO, YES]] * 2
    assert step.next_obs["obs"][0].tolist() == [[2, 0, 0, 0], [0, 0, 0, 0], [2, 0, 2, 2]]
    assert not step.next_obs["action_mask"][0, 1].any()
    assert not step.ended.any(), "the others go on"
    step = env.step(torch.tensor([[0, 2, 0], [0, 0, 0]]))
    assert step.reward[0].tolist() == [3, 0, 9]
    step = env.step(torch.tensor([[0, 0, 0], [0, 0, 0]]))
    assert step.ended.all()
    assert step.next_obs["alive"].tolist() == [[YES, NO, YES]] * 2
    assert step.obs["alive"].all(), "the next episode begins with everyone"


@pytest.mark.parametrize(("actions", "shape"), [("box", (3, 3)), ("heads", (3, 2))])
def test_joint_actions_arrive_at_their_agents(build: Any, actions: str, shape: tuple[int, ...]) -> None:
    env = build(n=1, actions=actions)
    assert env.spec.action_space.shape == shape
    env.reset()
    own = [torch.ones((1, *(env.spec.of_agent(i).action_space.shape or ()))) for i in range(3)]
    own = own if actions == "box" else [a.long() for a in own]
    step = env.step(joint.join_actions(env.spec, own))
    assert step.reward.tolist() == [[1.0 + own[0].numel(), 2.0 + own[1].numel(), 3.0 + own[2].numel()]]
    with pytest.raises(RloptError, match=r"actions have shape \(1, 3\), but 1 environments") as caught:
        env.step(torch.zeros(1, 3))
    assert "\n" not in str(caught.value)


def test_a_team_may_share_one_reward(build: Any) -> None:
    env = build(paid_apart=False)
    env.reset()
    assert env.spec.reward_shape == ()
    assert env.step(torch.zeros(2, 3, dtype=torch.int64)).reward.tolist() == [6.0, 6.0]


def test_a_saved_team_goes_on_where_it_stood(build: Any) -> None:
    env = build(length=4)
    env.reset()
    zero = torch.zeros(2, 3, dtype=torch.int64)
    env.step(zero)
    state = env.state_dict()
    assert state is not None
    steps = [env.step(zero) for _ in range(4)]
    obs = env.load_state_dict(state)
    assert obs["obs"][0, 0].tolist() == [1, 0, 0, 0]
    for before in steps:
        after = env.step(zero)
        assert torch.equal(after.reward, before.reward)
        assert all(torch.equal(after.obs[key], before.obs[key]) for key in after.obs)


class _Liar(CountTeamEnv):
    """Declares something else than it does."""

    def __init__(self, **declared: Any) -> None:
        super().__init__()
        self.metadata = {**self.metadata, **declared}


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"reward_shape": ()}, "gives rewards of shape (3,), not ()"),
        ({"reward_shape": (2,)}, "reward_shape=(2,) must be () or (3,) with 3 agents"),
        ({"agents": ("a", "b"), "reward_shape": ()}, "must be MultiBinary (2, K), not"),
        ({"agents": ()}, "agent_spaces and reward_shape are for several agents"),
    ],
)
def test_what_does_not_fit_its_declaration_is_one_clear_line(declared: dict[str, Any], words: str) -> None:
    with pytest.raises(RloptError) as caught:
        env = SyncVectorEnv([lambda: _Liar(**declared)])
        env.reset()
        env.step(torch.zeros(1, 3, dtype=torch.int64))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_vector_environment_that_pays_agents_together_by_mistake_is_told() -> None:
    vector = gymnasium.vector.SyncVectorEnv(
        [lambda: CountTeamEnv(paid_apart=False)] * 3, autoreset_mode=AutoresetMode.SAME_STEP
    )
    vector.metadata["reward_shape"] = (3,)
    env = VectorAdapter(vector)
    env.reset()
    with pytest.raises(RloptError, match=r"gives rewards of shape \(3,\), not \(3, 3\)"):
        env.step(torch.zeros(3, 3, dtype=torch.int64))


class Chase(TorchEnv):
    """Two agents on a line, in torch: each moves, and is paid for being near the other; the second is out at step 3."""

    observation_space = spaces.Dict(obs=spaces.Box(-np.inf, np.inf, (2, 2)), alive=spaces.MultiBinary(2))
    action_space = spaces.Box(-1.0, 1.0, (2, 1))
    agents, reward_shape, episode_limit = ("hunter", "prey"), (2,), 4

    def initial(self, streams: Any) -> dict[str, torch.Tensor]:
        start = streams.uniform(-1.0, 1.0, 2).float()
        return {"place": start, "steps": torch.zeros_like(start[:, 0])}

    def dynamics(self, state: dict[str, torch.Tensor], action: torch.Tensor) -> Any:
        place, steps = state["place"] + action[..., 0], state["steps"] + 1.0
        distance = (place[:, 0] - place[:, 1]).abs()
        return {"place": place, "steps": steps}, torch.stack([-distance, distance], 1), distance < 0.0

    def observe(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        gone = torch.stack([state["steps"] < 9.0, state["steps"] < 3.0], 1)
        return {"obs": torch.stack([state["place"], state["place"].flip(1)], 2), "alive": gone}


def test_a_team_written_in_torch_is_one_batch_of_tensors() -> None:
    env = Chase(3)
    assert env.spec.of_agent("prey").action_space == spaces.Box(-1.0, 1.0, (1,))
    obs = env.reset()
    assert isinstance(obs, dict)
    assert obs["alive"].dtype == torch.bool
    for k in range(4):
        step = env.step(torch.zeros(3, 2, 1))
        distance = (obs["obs"][:, 0, 0] - obs["obs"][:, 1, 0]).abs()
        torch.testing.assert_close(step.reward, torch.stack([-distance, distance], 1))
        assert isinstance(step.next_obs, dict)
        assert step.next_obs["alive"].tolist() == [[True, k < 2]] * 3
    assert step.truncated.all()
    assert step.obs["alive"].all()
    with pytest.raises(RloptError, match=r"Chase: the reward has shape \(3, 2\); it must be \(3,\)"):
        other = type("Chase", (Chase,), {"reward_shape": ()})(3)
        other.reset()
        other.step(torch.zeros(3, 2, 1))
