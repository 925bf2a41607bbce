"""Group advantages: numbers by hand, a slow loop beside them, the invariants of the method, and the traps."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlopt.agents.anchors import nested_anchors
from rlopt.agents.group_advantages import (
    EstimatorConfig,
    Rows,
    anchor_groups,
    discounted_returns,
    episode_advantages,
    episode_scores,
    generalised_advantages,
    group_advantages,
    group_metrics,
    leave_one_out_advantages,
    similar_groups,
    step_advantages,
)
from rlopt.config import build
from rlopt.types import RloptError

few = settings(max_examples=30)
Step = tuple[int, str, float]
"""Episode, what was seen, reward."""


def rows_of(steps: list[Step], group: list[int], penalty: list[float] | None = None) -> Rows:
    episode = torch.tensor([i for i, _, _ in steps])
    group_of = torch.tensor(group)
    anchor = anchor_groups([key for _, key, _ in steps], group_of[episode])
    reward = torch.tensor([r for _, _, r in steps], dtype=torch.float64)
    charged = None if penalty is None else torch.tensor(penalty, dtype=torch.float64)
    return Rows(reward, episode, group_of, (anchor,), charged)


# Two tasks of two episodes. The first task: A walks x, y and wins; B walks x, x and fails. The second: both fail at z.
EPISODES = [0, 0, 1, 1, 2, 3]
STEPS: list[Step] = [(0, "x", 0.0), (0, "y", 1.0), (1, "x", 0.0), (1, "x", 0.0), (2, "z", 0.0), (3, "z", 0.0)]
GROUP = [0, 0, 1, 1]


def test_advantages_by_hand() -> None:
    rows = rows_of(STEPS, GROUP)
    assert episode_scores(rows).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert discounted_returns(rows, 0.5).tolist() == [0.5, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert episode_advantages(rows, "none").tolist() == [0.5, 0.5, -0.5, -0.5, 0.0, 0.0]
    deviation = math.sqrt(0.5)  # of 1 and 0, unbiased
    by_deviation = episode_advantages(rows, "std")
    assert by_deviation.tolist() == pytest.approx([0.5 / deviation] * 2 + [-0.5 / deviation] * 2 + [0, 0], rel=1e-5)
    # At x stand 0.5, 0 and 0, twice in one episode and at different times; y is alone, z all alike.
    third = 0.5 / 3
    assert step_advantages(rows, 0.5, "none").tolist() == pytest.approx([0.5 - third, 0, -third, -third, 0, 0])
    combined = group_advantages(rows, 0.5, EstimatorConfig(normaliser="none", omega=2.0))
    assert combined.tolist() == pytest.approx([0.5 + 2 * (0.5 - third), 0.5, *[-0.5 - 2 * third] * 2, 0, 0])
    assert leave_one_out_advantages(rows).tolist() == [1.0, 1.0, -1.0, -1.0, 0.0, 0.0]
    assert group_advantages(rows, 0.5, EstimatorConfig(estimator="reinforce")).tolist() == [0.5, 1, 0, 0, 0, 0]


def test_what_the_groups_were_like() -> None:
    found = group_metrics(rows_of(STEPS, GROUP), 0.5)
    assert float(found["equal_groups"]) == 0.5  # the second task taught nothing
    assert float(found["anchor_size"]) == 2.0  # 3, 1 and 2 steps at an anchor
    assert float(found["singletons"]) == pytest.approx(1 / 6)
    assert float(found["step_signal"]) == 0.5
    shares = {name.removeprefix("anchors/"): float(x) for name, x in found.items() if name.startswith("anchors/")}
    assert shares == {"1": pytest.approx(1 / 3), "2-4": pytest.approx(2 / 3), "5-9": 0.0, "10-49": 0.0, "50+": 0.0}


def test_buckets_of_anchors_by_size() -> None:
    """As many anchors of each of these sizes as written; all of one task."""
    sizes = [1, 2, 4, 5, 9, 10, 49, 50]
    keys = [str(n) for n in sizes for _ in range(n)]
    found = group_metrics(rows_of([(0, key, 0.0) for key in keys], [0]), 0.5)
    shares = [float(x) * len(sizes) for name, x in found.items() if name.startswith("anchors/")]
    assert shares == pytest.approx([1, 2, 2, 2, 1]) and float(found["anchor_size"]) == pytest.approx(130 / 8)


def test_generalised_advantages_by_hand() -> None:
    """γ = 0.5, λ = 0.5: δ = 0 + 0.5 · 2 - 1 = 0 and 1 - 2 = -1; Â = 0 - 0.25 and -1."""
    rows = rows_of(STEPS[:2], [0])
    assert generalised_advantages(rows, torch.tensor([1.0, 2.0]).double(), 0.5, 0.5).tolist() == [-0.25, -1.0]


# A slow loop over dictionaries


def slow(steps: list[Step], group: list[int], gamma: float, omega: float, normaliser: str) -> list[float]:
    """GiGPO as its pseudocode reads."""
    total = {i: sum(r for j, _, r in steps if j == i) for i in range(len(group))}
    after = []
    for at, (i, _, _) in enumerate(steps):
        later = [r for j, _, r in steps[at:] if j == i]
        after.append(sum(gamma**k * r for k, r in enumerate(later)))

    def scaled(x: float, others: list[float]) -> float:
        if len(others) < 2 or min(others) == max(others):
            return 0.0
        return (x - statistics.mean(others)) / (statistics.stdev(others) + 1e-6 if normaliser == "std" else 1.0)

    out = []
    for at, (i, key, _) in enumerate(steps):
        whole = scaled(total[i], [total[j] for j in range(len(group)) if group[j] == group[i]])
        here = [after[b] for b, (j, k, _) in enumerate(steps) if k == key and group[j] == group[i]]
        out.append(whole + omega * scaled(after[at], here))
    return out


@st.composite
def iterations(draw: st.DrawFn) -> tuple[list[Step], list[int]]:
    group = draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
    order = draw(st.lists(st.integers(0, len(group) - 1), min_size=1, max_size=24))
    order = list(range(len(group))) + order  # every episode has a step
    return [(i, draw(st.sampled_from("abc")), draw(st.sampled_from([-1.0, 0.0, 0.1, 1.0]))) for i in order], group


@few
@given(iterations(), st.sampled_from(["std", "none"]), st.sampled_from([0.0, 1.0, 1.4]))
def test_it_is_what_a_slow_loop_computes(case: tuple[list[Step], list[int]], normaliser: str, omega: float) -> None:
    steps, group = case
    fast = group_advantages(rows_of(steps, group), 0.9, EstimatorConfig(omega=omega, normaliser=normaliser))
    assert fast.tolist() == pytest.approx(slow(steps, group, 0.9, omega, normaliser), abs=1e-9)


def scaled(x: float, others: list[float], normaliser: str) -> float:
    if len(others) < 2 or min(others) == max(others):
        return 0.0
    return (x - statistics.mean(others)) / (statistics.stdev(others) + 1e-6 if normaliser == "std" else 1.0)


def later(steps: list[Step], gamma: float) -> list[float]:
    rest = [[r for j, _, r in steps[at:] if j == i] for at, (i, _, _) in enumerate(steps)]
    return [sum(gamma**k * r for k, r in enumerate(rewards)) for rewards in rest]


@few
@given(iterations(), st.sampled_from(["std", "none"]), st.randoms(use_true_random=False))
def test_the_released_codes_options_are_what_a_slow_loop_computes(
    case: tuple[list[Step], list[int]], normaliser: str, chance: random.Random
) -> None:
    """Statistics over steps, and a penalty that is taken off a step's own scores and enters no mean."""
    steps, group = case
    penalty = [chance.choice([0.0, 0.1]) for _ in steps]
    total = {i: sum(r for j, _, r in steps if j == i) for i in range(len(group))}
    after = later(steps, 0.9)
    expected = []
    for at, (i, key, _) in enumerate(steps):
        whole = scaled(total[i] - penalty[at], [total[j] for j, _, _ in steps if group[j] == group[i]], normaliser)
        if len({total[j] for j in range(len(group)) if group[j] == group[i]}) == 1:
            whole = 0.0
        here = [b for b, (j, k, _) in enumerate(steps) if k == key and group[j] == group[i]]
        mean = [after[b] - penalty[b] for b in here]
        expected.append(whole + scaled(mean[here.index(at)], mean, normaliser))
    c = EstimatorConfig(normaliser=normaliser, statistics="step")
    found = group_advantages(rows_of(steps, group, penalty), 0.9, c)
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


@few
@given(iterations(), st.integers(1, 3))
def test_nested_anchors_are_what_a_slow_loop_computes(case: tuple[list[Step], list[int]], nested: int) -> None:
    """HGPO: at level k steps that agree in k earlier observations too; weights k + 1 where others agree."""
    steps, group = case
    seen: dict[int, list[str]] = {}
    pasts = []
    for i, key, _ in steps:
        pasts.append([*seen.setdefault(i, []), key])
        seen[i].append(key)
    after, expected = later(steps, 0.9), []
    for at, (i, _, _) in enumerate(steps):
        pairs = []
        for level in range(nested + 1):
            alike = [
                after[b]
                for b, (j, _, _) in enumerate(steps)
                if group[j] == group[i] and pasts[b][-1 - level :] == pasts[at][-1 - level :]
            ]
            if len(alike) > 1:
                pairs.append((level + 1, scaled(after[at], alike, "std")))
        weights = sum(weight for weight, _ in pairs)
        expected.append(sum(weight * x for weight, x in pairs) / weights if pairs else 0.0)
    rows = rows_of(steps, group)
    keys = [key for _, key, _ in steps]
    anchors = nested_anchors(keys, rows.episode.tolist(), rows.group[rows.episode], nested=nested)
    found = step_advantages(rows._replace(anchors=anchors), 0.9, "std")
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


@few
@given(iterations(), st.sampled_from([0.0, 0.7, 1.0]))
def test_the_other_estimators_are_what_a_slow_loop_computes(case: tuple[list[Step], list[int]], decay: float) -> None:
    steps, group = case
    rows, after = rows_of(steps, group), later(steps, 0.9)
    assert group_advantages(rows, 0.9, EstimatorConfig(estimator="reinforce")).tolist() == pytest.approx(after)
    total = {i: sum(r for j, _, r in steps if j == i) for i in range(len(group))}
    others = {i: [total[j] for j in total if j != i and group[j] == group[i]] for i in total}
    alone = {i: total[i] - statistics.mean(others[i]) if others[i] else 0.0 for i in total}
    found = group_advantages(rows, 0.9, EstimatorConfig(estimator="rloo"))
    assert found.tolist() == pytest.approx([alone[i] for i, _, _ in steps], abs=1e-9)
    value = [float(len(key) + at % 3) for at, (_, key, _) in enumerate(steps)]
    expected = [0.0] * len(steps)
    for at in reversed(range(len(steps))):
        ahead = next((b for b in range(at + 1, len(steps)) if steps[b][0] == steps[at][0]), None)
        rest = (0.0, 0.0) if ahead is None else (value[ahead], expected[ahead])
        expected[at] = steps[at][2] + 0.9 * rest[0] - value[at] + 0.9 * decay * rest[1]
    critic = generalised_advantages(rows, torch.tensor(value).double(), 0.9, decay)
    assert critic.tolist() == pytest.approx(expected, abs=1e-9)


# Invariants


@few
@given(iterations())
def test_means_over_an_anchor_and_over_a_group_are_zero(case: tuple[list[Step], list[int]]) -> None:
    rows = rows_of(*case)
    by_anchor = step_advantages(rows, 0.9, "none")
    assert torch.zeros(99).double().index_add(0, rows.anchors[0], by_anchor).abs().max() < 1e-9
    first = [rows.episode.tolist().index(i) for i in range(len(rows.group))]
    assert torch.zeros(9).double().index_add(0, rows.group, episode_advantages(rows, "std")[first]).abs().max() < 1e-9


@few
@given(iterations(), st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(case: tuple[list[Step], list[int]], chance: random.Random) -> None:
    """But within an episode, which is its time."""
    steps, group = case
    turn = list(range(len(group)))
    chance.shuffle(turn)
    order = sorted(range(len(steps)), key=lambda at: turn[steps[at][0]])
    moved = group_advantages(rows_of([steps[at] for at in order], group), 0.9, EstimatorConfig())
    assert moved.tolist() == pytest.approx(
        group_advantages(rows_of(steps, group), 0.9, EstimatorConfig())[order].tolist()
    )


@few
@given(iterations())
def test_without_step_advantages_it_is_grpo(case: tuple[list[Step], list[int]]) -> None:
    steps, group = case
    grpo = group_advantages(rows_of(steps, group), 0.9, EstimatorConfig(estimator="grpo"))
    assert group_advantages(rows_of(steps, group), 0.9, EstimatorConfig(omega=0.0)).equal(grpo)
    unique = [(i, str(at), r) for at, (i, _, r) in enumerate(steps)]
    assert group_advantages(rows_of(unique, group), 0.9, EstimatorConfig()).equal(grpo)


@few
@given(iterations())
def test_without_a_deviation_it_is_leave_one_out(case: tuple[list[Step], list[int]]) -> None:
    """(N - 1) / N times it: the paper's appendix C."""
    rows = rows_of(*case)
    members = torch.bincount(rows.group)[rows.group].double()[rows.episode]
    expected = leave_one_out_advantages(rows) * (members - 1) / members
    assert torch.allclose(episode_advantages(rows, "none"), expected, atol=1e-12)


@few
@given(iterations(), st.sampled_from([-1.0, 2.0]))
def test_a_reward_that_all_get_at_the_end_changes_no_episode_advantage(
    case: tuple[list[Step], list[int]], bonus: float
) -> None:
    steps, group = case
    last = {i: at for at, (i, _, _) in enumerate(steps)}
    paid = [(i, key, r + bonus * (last[i] == at)) for at, (i, key, r) in enumerate(steps)]
    before, after = (episode_advantages(rows_of(x, group), "none") for x in (steps, paid))
    assert torch.allclose(before, after, atol=1e-9)


@few
@given(iterations())
def test_with_no_discount_every_step_to_a_final_reward_is_worth_the_same(case: tuple[list[Step], list[int]]) -> None:
    steps, group = case
    last = {i: at for at, (i, _, _) in enumerate(steps)}
    rows = rows_of([(i, key, r * (last[i] == at)) for at, (i, key, r) in enumerate(steps)], group)
    assert torch.allclose(discounted_returns(rows, 1.0), episode_scores(rows)[rows.episode])


def test_with_no_discount_a_final_reward_is_every_steps() -> None:
    assert discounted_returns(rows_of([(0, "a", 0.0), (0, "b", 0.0), (0, "c", 1.0)], [0]), 1.0).tolist() == [1, 1, 1]


# The five places where paper and released code differ


def test_long_episodes_do_not_count_more_unless_asked_to() -> None:
    """Trap 1. One step that won, three that failed: means of 1/2 over episodes and 1/4 over steps."""
    rows = rows_of([(0, "a", 1.0), (1, "b", 0.0), (1, "c", 0.0), (1, "d", 0.0)], [0, 0])
    assert episode_advantages(rows, "none").tolist() == [0.5, -0.5, -0.5, -0.5]
    assert episode_advantages(rows, "none", "step").tolist() == [0.75, -0.25, -0.25, -0.25]
    deviation = statistics.stdev([1.0, 0.0, 0.0, 0.0])
    scaled = episode_advantages(rows, "std", "step")
    assert scaled.tolist() == pytest.approx([x / deviation for x in (0.75, -0.25, -0.25, -0.25)], rel=1e-5)


@pytest.mark.parametrize("normaliser", ["std", "none"])
@pytest.mark.parametrize("reward", [10.0, 0.1])
def test_one_alone_and_equal_ones_are_exactly_zero(normaliser: str, reward: float) -> None:
    """Trap 2. A group of one would have had its reward for an advantage."""
    alone = rows_of([(0, "a", reward), (0, "b", reward)], [0])
    assert group_advantages(alone, 0.9, EstimatorConfig(normaliser=normaliser)).tolist() == [0.0, 0.0]
    equal = rows_of([(i, "a", reward / 3) for i in (0, 1, 2) for _ in range(3)], [0, 0, 0])
    assert episode_advantages(equal, normaliser).tolist() == [0.0] * 9


def test_deviations_are_unbiased() -> None:
    """Trap 3. Of two values the other kind is 1.41 times smaller."""
    rows = rows_of([(0, "a", 1.0), (1, "b", 0.0)], [0, 0])
    assert episode_advantages(rows, "std")[0] == pytest.approx(0.5 / math.sqrt(0.5), rel=1e-5)


def test_a_penalty_of_one_step_stays_there_and_is_not_blown_up() -> None:
    """Trap 4. Taken off a step's own scores, it reaches neither earlier steps nor a group that is all alike."""
    rows = rows_of(STEPS, GROUP, [0.1, 0.0, 0.0, 0.0, 0.1, 0.0])
    assert episode_advantages(rows, "none").tolist() == pytest.approx([0.4, 0.5, -0.5, -0.5, 0.0, 0.0])
    deviation = math.sqrt(0.5)
    assert episode_advantages(rows, "std")[0] == pytest.approx(0.4 / deviation, rel=1e-5)
    mean = 0.4 / 3
    assert step_advantages(rows, 0.5, "none")[:4].tolist() == pytest.approx([0.4 - mean, 0, -mean, -mean])


def test_more_rows_of_finished_episodes_would_change_the_numbers() -> None:
    """Trap 5: so nothing is padded. Rows that are there twice are told by what they do to the mean at x."""
    twice = step_advantages(rows_of([*STEPS, STEPS[3]], GROUP), 0.5, "none")
    assert twice[0] != step_advantages(rows_of(STEPS, GROUP), 0.5, "none")[0]


# Groups


def test_anchors_never_join_two_tasks() -> None:
    group = torch.tensor([0, 1, 0, 1])
    assert anchor_groups(["a", "a", "a", "b"], group).tolist() == [0, 1, 0, 2]


def test_nested_anchors_weigh_by_how_much_history_agrees() -> None:
    """Level 0: a = 1, 0, 0 at one anchor. Level 1: the first two share a past, the third is alone with its own.

    Level 0 without a deviation: 2/3, -1/3, -1/3; level 1: 1/2, -1/2, none. Weights 1 and 2 where others agree.
    """
    level0, level1 = torch.tensor([0, 0, 0]), torch.tensor([0, 0, 1])
    reward = torch.tensor([1.0, 0.0, 0.0]).double()
    rows = Rows(reward, torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0]), (level0, level1))
    expected = [(2 / 3 + 2 * 0.5) / 3, (-1 / 3 - 2 * 0.5) / 3, -1 / 3]
    assert step_advantages(rows, 0.9, "none").tolist() == pytest.approx(expected)


def test_similar_texts_join_the_first_group_that_they_resemble() -> None:
    group = torch.tensor([0, 0, 0, 1, 0])
    texts = ["you see a coin", "you see a coin.", "a wall", "you see a coin", "you see a coin"]
    assert similar_groups(texts, group, 0.9).tolist() == [0, 0, 1, 2, 0]
    assert similar_groups(texts, group, 1.0).tolist() == [0, 1, 2, 3, 0]


@pytest.mark.parametrize(
    ("estimator", "option"),
    [
        ("grpo", {"omega": 0.5}),
        ("rloo", {"normaliser": "none"}),
        ("step", {"statistics": "step"}),
        ("grpo", {"nested": 1}),
    ],
)
def test_options_that_an_estimator_does_not_have_are_refused(estimator: str, option: dict[str, object]) -> None:
    with pytest.raises(RloptError, match="has no effect without estimator=gigpo"):
        build(EstimatorConfig, {"estimator": estimator, **option}, "")


def test_a_rounding_error_is_no_signal() -> None:
    """0.1 + 0.2 is not 0.3, but neither is it a reason to learn."""
    rows = rows_of([(0, "a", 0.1), (0, "b", 0.2), (1, "c", 0.2), (1, "d", 0.1)], [0, 0])
    advantage: Tensor = episode_advantages(rows, "std")
    assert advantage.tolist() == [0.0] * 4
