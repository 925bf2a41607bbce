"""Two rooms, of which one needs coordination: what is best there can be worked out by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from rlopt.envs import TorchEnv, make_env
from rlopt.envs.teams.two_rooms import APART, BEST, PAYOFFS, SAFE, TOGETHER, switching_values
from rlopt.loops.configuration import EnvConfig
from rlopt.training.video import drawn_environment
from rlopt.types import RloptError


def test_rooms_and_payoffs_are_what_they_should_be() -> None:
    env = make_env("two_rooms", 4000)
    assert isinstance(env, TorchEnv)
    obs = env.reset()
    assert isinstance(obs, dict)
    seen = torch.zeros(4000)
    for k in range(20):
        assert torch.equal(obs["obs"][:, 0], obs["state"])
        room = obs["state"].argmax(1)
        assert abs(room.float().mean() - 0.5) < 0.05
        action = torch.randint(0, 3, (4000, 2), generator=torch.Generator().manual_seed(k))
        step = env.step(action)
        assert torch.equal(step.reward, torch.tensor(PAYOFFS)[room, action[:, 0], action[:, 1]])
        assert isinstance(step.next_obs, dict)
        stayed = (step.next_obs["state"] == obs["state"]).all(1).float().mean()
        assert abs(stayed - 0.8) < 0.03
        seen += room
        assert isinstance(step.obs, dict)
        obs = step.obs
    assert step.truncated.all()
    assert torch.equal(step.info["together"], seen)


def test_the_best_joint_actions_and_the_trap() -> None:
    apart, together = torch.tensor(PAYOFFS)
    assert (apart.max(), together.max()) == BEST
    # In the first room each agent's best action does not depend on the other one's, and together they are best.
    assert len({int(k) for k in apart.argmax(0)}) == 1
    assert len({int(k) for k in apart.argmax(1)}) == 1
    assert apart[apart.sum(1).argmax(), apart.sum(0).argmax()] == SAFE[APART]
    # In the second one safety is the best answer to a partner that plays safe but explores, however much it does.
    for share in (0.05, 0.5, 1.0):
        partner = torch.full((3,), share / 3) + torch.tensor([0.0, 0.0, 1.0 - share])
        assert (together @ partner).argmax() == 2
    assert together[2, 2] == SAFE[TOGETHER]


@pytest.mark.parametrize(("cost", "where"), [(0.1, [False, True]), (0.6, [False, False]), (-0.1, [True, True])])
def test_values_of_switching_are_a_fixed_point(cost: float, where: list[bool]) -> None:
    values, central = switching_values(cost, 0.9)
    assert central.tolist() == where
    stay = 0.8
    for room, other in itertools.permutations(range(2)):
        paid = max(SAFE[room], BEST[room] - cost)
        following = stay * values[room] + (1 - stay) * values[other]
        assert float(values[room]) == pytest.approx(paid + 0.9 * float(following))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"backend": "sync"}, "env=two_rooms is written in torch.* use env.backend=torch"),
        ({"wrappers": ["RescaleObservation"]}, "env.wrappers wrap single environments; .* leave them out"),
        ({"kwargs": {"stay": 1.5}}, "env.kwargs.stay=1.5 must be a probability"),
    ],
)
def test_what_two_rooms_cannot_be_is_told_in_one_line(options: dict[str, Any], told: str) -> None:
    with pytest.raises(RloptError, match=told):
        make_env("two_rooms", 2, **options)


def test_a_film_of_what_is_not_drawn_is_refused() -> None:
    with pytest.raises(RloptError, match=r"^env=two_rooms is written in torch and draws nothing; leave videos out$"):
        drawn_environment(EnvConfig(id="two_rooms"), 0, torch.device("cpu"))
