"""Deep DRPG's inner player on functions whose worst point is known, and what the agent must keep."""

from __future__ import annotations

import copy

import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.agents.drpg_deep import Adversary, DeepDRPGConfig, RobustOptions, SearchConfig, ascend_box
from rlopt.nn import NetworkConfig
from rlopt.registry import get_agent
from rlopt.types import EnvSpec, RloptError

BOX = {"mass": (0.5, 1.5), "length": (1.0, 3.0)}
THOROUGH = SearchConfig(candidates=8, rounds=40, tolerance=0.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def point(*coordinates: float) -> Tensor:
    return torch.tensor(coordinates, dtype=torch.float64)


class Recorded:
    """A cost that remembers what it was asked."""

    def __init__(self, function):
        self.function, self.asked = function, []

    def __call__(self, points: Tensor) -> Tensor:
        self.asked.append(points.clone())
        return self.function(points)


# --- the ascent -----------------------------------------------------------------------------------------------------


def test_it_finds_the_peak_of_a_concave_cost() -> None:
    peak = point(0.8, 0.3)
    found = ascend_box(lambda p: 5.0 - (p - peak).square().sum(1), point(0.1, 0.9), 1e-4, THOROUGH, generator())
    assert (found.point - peak).abs().max() < 0.02
    assert found.cost == pytest.approx(5.0, abs=1e-3)
    assert found.left <= 1e-4 * found.spread


def test_it_ends_in_the_corner_that_all_slopes_lead_into_and_knows_it() -> None:
    """There the Frank-Wolfe gap is exactly nothing, whatever the tolerance."""
    cost = Recorded(lambda p: 3.0 * p[:, 0] - 2.0 * p[:, 1])
    found = ascend_box(cost, point(0.5, 0.5), 0.0, THOROUGH, generator())
    assert found.point.tolist() == [1.0, 0.0] and found.cost == 3.0 and found.left == 0.0
    assert found.rounds == len(cost.asked) < 10


def test_exploration_leaves_a_local_maximum_for_a_point_it_was_told_of() -> None:
    """Two hills; the higher one is narrow and far from where the ascent begins."""

    def cost(p: Tensor) -> Tensor:
        low, high = (p - point(0.2, 0.2)).square().sum(1), (p - point(0.9, 0.9)).square().sum(1)
        return torch.maximum(1.0 - low, 2.0 - 400.0 * high)

    start, hint = point(0.2, 0.2), point(0.91, 0.89)[None]
    found = ascend_box(cost, start, 1e-3, SearchConfig(rounds=30), generator(), explore=hint)
    assert (found.point - point(0.9, 0.9)).abs().max() < 0.02
    alone = ascend_box(cost, start, 1e-3, SearchConfig(candidates=5, rounds=30), generator())
    assert torch.equal(alone.point, start)


def test_every_round_tries_the_incumbent_its_neighbours_and_elsewhere_inside_the_box() -> None:
    cost = Recorded(lambda p: -(p - point(0.4, 0.6)).square().sum(1))
    ascend_box(cost, point(0.9, 0.5), 0.0, SearchConfig(candidates=8, rounds=2, step=0.25), generator())
    first = cost.asked[0]
    neighbours = [[0.9, 0.5], [1.0, 0.5], [0.9, 0.75], [0.65, 0.5], [0.9, 0.25]]
    torch.testing.assert_close(first[:5], torch.tensor(neighbours, dtype=torch.float64))
    assert all(p.shape == (8, 2) and p.min() >= 0.0 and p.max() <= 1.0 for p in cost.asked)
    assert not torch.equal(first[5:], cost.asked[1][5:])


def test_what_is_left_is_the_frank_wolfe_gap_of_a_linear_cost() -> None:
    """Gradient (2, -3) at (0.5, 0.25): the gap is 2 · (1 - 0.5) + 3 · 0.25 = 1.75."""
    options = SearchConfig(candidates=5, rounds=1)
    found = ascend_box(lambda p: 2.0 * p[:, 0] - 3.0 * p[:, 1], point(0.5, 0.25), 0.0, options, generator())
    assert found.left == pytest.approx(1.75)


def test_a_smaller_tolerance_takes_more_rounds_and_comes_nearer() -> None:
    peak = point(0.63, 0.21)
    rounds, errors = [], []
    for tolerance in (0.5, 0.05, 0.0005):
        found = ascend_box(lambda p: -(p - peak).square().sum(1), point(0.0, 1.0), tolerance, THOROUGH, generator(3))
        rounds.append(found.rounds)
        errors.append(float((found.point - peak).abs().max()))
    assert rounds[0] < rounds[1] < rounds[2]
    assert errors[0] > errors[1] > errors[2]


def test_a_flat_cost_ends_at_once_and_a_start_outside_is_put_into_the_box() -> None:
    found = ascend_box(lambda p: torch.zeros(len(p)), point(1.6, -0.2), 0.1, SearchConfig(), generator())
    assert found.rounds == 1 and found.point.tolist() == [1.0, 0.0] and found.spread == 0.0


# --- bag, tolerance, draws ------------------------------------------------------------------------------------------


def adversary(**options) -> Adversary:
    made = Adversary(RobustOptions(box=BOX, **options), seed=0)
    made.begin(point(0.5, 0.5))
    return made


def test_the_tolerance_decays_with_every_ascent() -> None:
    one = adversary(search=SearchConfig(tolerance=0.4, tolerance_decay=0.5))
    seen = []
    for _ in range(3):
        seen.append(one.tolerance)
        one.attack(lambda p: p[:, 0])
    assert seen == pytest.approx([0.4, 0.2, 0.1])


def test_an_ascent_begins_at_the_worst_point_known_and_the_bag_holds_those_before() -> None:
    one = adversary(bag=3)
    costs = [Recorded(lambda p: p[:, 0]), Recorded(lambda p: -p[:, 0]), Recorded(lambda p: p[:, 1])]
    for cost in costs:
        one.attack(cost)
    assert torch.equal(costs[0].asked[0][0], point(0.5, 0.5))
    for before, cost in zip(one_by_one(costs[:-1]), costs[1:], strict=True):
        assert torch.equal(cost.asked[0][0], before)
    assert len(one.members) == 3 and torch.equal(one.members[-1], one.worst)


def one_by_one(costs: list[Recorded]) -> list[Tensor]:
    """The best point that each was asked for: what its ascent returned."""
    found = []
    for cost in costs:
        points = torch.cat(cost.asked)
        found.append(points[cost.function(points).argmax()])
    return found


def test_the_bag_forgets_what_is_near_and_then_the_oldest() -> None:
    one = adversary(bag=3)
    for p in (point(1.0, 0.0), point(0.0, 1.0)):
        one.remember(p)
    assert one.members.tolist() == [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]
    one.remember(point(0.99, 0.02))
    assert one.members.tolist() == [[0.5, 0.5], [0.0, 1.0], [0.99, 0.02]]
    one.remember(point(0.2, 0.2))
    assert one.members.tolist() == [[0.0, 1.0], [0.99, 0.02], [0.2, 0.2]]


def test_draws_of_the_three_adversaries() -> None:
    worst = adversary(bag_share=0.5)
    worst.attack(lambda p: p[:, 0] - p[:, 1])
    drawn = worst.draw(4000)
    of_worst = (drawn == worst.worst).all(1)
    assert (of_worst | (drawn == worst.members[0]).all(1)).all()
    # half of the episodes are at the worst point, and half of the bag's two members are that point too
    assert of_worst.double().mean().item() == pytest.approx(0.75, abs=0.03)
    assert (adversary(bag_share=0.0).draw(50) == adversary().worst).all()

    uniform = adversary(adversary="uniform").draw(4000)
    assert uniform.min() >= 0.0 and uniform.max() <= 1.0
    assert uniform.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.03)

    nominal = Adversary(RobustOptions(box=BOX, adversary="nominal"), seed=0)
    nominal.begin(point(1.2, 0.4))  # simulators may begin outside the box; their own parameters are kept as they are
    assert (nominal.draw(3) == point(1.2, 0.4)).all()
    assert nominal.worst.tolist() == [1.0, 0.4]


# --- the agents -----------------------------------------------------------------------------------------------------

ACTIONS = {"drpg_deep": spaces.Box(-1.0, 1.0, (1,)), "drpg_deep_discrete": spaces.Discrete(2)}
every_agent = pytest.mark.parametrize("name", sorted(ACTIONS))


def agent(name: str, seed: int = 0):
    cls = get_agent(name)
    spec = EnvSpec("test", spaces.Box(-1.0, 1.0, (3,)), ACTIONS[name])
    return cls(spec, cls.config_class(box=BOX, network=NetworkConfig(hidden=(8,))), seed=seed)


@every_agent
def test_the_state_holds_worst_point_bag_tolerance_and_generator(name: str) -> None:
    one, other = agent(name), agent(name, seed=1)
    one.adversary.begin(point(0.5, 0.5))
    one.adversary.attack(lambda p: p[:, 0])
    other.load_state_dict(one.state_dict())
    other.adversary.begin(point(0.5, 0.5))
    assert torch.equal(one.adversary.worst, other.adversary.worst)
    assert torch.equal(one.adversary.members, other.adversary.members) and len(other.adversary.members) == 2
    assert one.adversary.tolerance == other.adversary.tolerance
    assert torch.equal(one.adversary.draw(20), other.adversary.draw(20))
    a, b = (x.adversary.attack(lambda p: -p[:, 1]) for x in (one, other))
    assert torch.equal(a.point, b.point)
    assert copy.deepcopy(one).adversary.nominal.tolist() == [0.5, 0.5]


@every_agent
def test_one_run_at_a_time(name: str) -> None:
    cls = get_agent(name)
    with pytest.raises(RloptError, match="one run at a time"):
        cls(EnvSpec("test", spaces.Box(-1.0, 1.0, (3,)), ACTIONS[name]), runs=2)


def test_impossible_boxes_are_refused() -> None:
    with pytest.raises(RloptError, match=r"agent\.box\.mass: \[2, 1\] is no interval"):
        DeepDRPGConfig(box={"mass": (2.0, 1.0)})
    with pytest.raises(RloptError, match=r"agent\.search\.candidates=4: finite differences in 2 parameters take 5"):
        DeepDRPGConfig(box=BOX, search=SearchConfig(candidates=4))
