import math

import numpy as np
import pytest

from rlopt.analysis.statistics import (
    bootstrap_curve,
    bootstrap_interval,
    iqm,
    mean,
    mean_interval,
    normalise,
    probability_of_improvement,
    student_t_quantile,
)


def test_iqm_cuts_a_quarter_at_either_end() -> None:
    # n = 8: 1, 2 and 50, 90 go; (3 + 4 + 5 + 6) / 4.
    assert iqm([90, 3, 1, 6, 5, 2, 4, 50]) == 4.5
    # n = 10 cuts floor(2.5) = 2 at either end, as scipy's trim_mean and rliable do.
    assert iqm(range(10)) == 4.5
    assert iqm([0, 0, 1, 2, 3, 4, 5, 6, 100, 100]) == pytest.approx(21 / 6)
    # Below four scores nothing is cut.
    assert iqm([1, 2, 9]) == 4.0


def test_iqm_reduces_the_last_axis_only() -> None:
    assert iqm([[0, 1, 2, 100], [-100, 4, 6, 7]]).tolist() == [1.5, 5.0]


def test_normalise_maps_anchors_to_zero_and_one() -> None:
    assert normalise([-289.415, 10574.0, (10574.0 - 289.415) / 2], -289.415, 10574.0).tolist() == pytest.approx(
        [0, 1, 0.5]
    )
    with pytest.raises(ValueError, match="two different anchors"):
        normalise(1.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("probability", "dof", "expected"),
    [  # Printed tables of Student's t.
        (0.975, 1, 12.7062),
        (0.975, 2, 4.3027),
        (0.975, 3, 3.1824),
        (0.975, 4, 2.7764),
        (0.95, 9, 1.8331),
        (0.995, 10, 3.1693),
        (0.975, 120, 1.9799),
        (0.025, 4, -2.7764),
    ],
)
def test_student_t_quantiles_are_those_of_the_tables(probability: float, dof: int, expected: float) -> None:
    assert student_t_quantile(probability, dof) == pytest.approx(expected, abs=1e-4)


def test_mean_interval_is_students() -> None:
    # s² = (4 + 0 + 4) / 2 = 4, half width = 4.3027 * 2 / √3.
    interval = mean_interval([1.0, 3.0, 5.0, math.nan])
    assert interval.estimate == 3.0
    assert interval.high - 3.0 == pytest.approx(4.30265 * 2 / math.sqrt(3), rel=1e-5)
    assert 3.0 - interval.low == pytest.approx(interval.high - 3.0)


def test_a_mean_of_nothing_but_nan_is_nan() -> None:
    assert all(math.isnan(value) for value in mean_interval([math.nan, math.nan]))
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval([])


def test_one_value_has_no_interval() -> None:
    assert mean_interval([7.0])[0] == 7.0
    assert all(math.isnan(end) for end in mean_interval([7.0])[1:])
    assert all(math.isnan(end) for end in bootstrap_interval([[1.0], [2.0]])[1:])


def test_bootstrap_of_two_values_is_the_one_that_can_be_enumerated() -> None:
    # Resampled means of {0, 1} are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4: a 40 % interval is the middle, 95 % all.
    assert bootstrap_interval([0.0, 1.0], mean, level=0.4) == (0.5, 0.5, 0.5)
    assert bootstrap_interval([0.0, 1.0], mean, level=0.95) == (0.5, 0.0, 1.0)


def test_bootstrap_is_stratified_by_task() -> None:
    # Within a task all seeds agree, so resampling inside tasks never changes the pooled mean; across tasks it would.
    assert bootstrap_interval([[0.0] * 5, [1.0] * 5], mean) == (0.5, 0.5, 0.5)
    low, high = bootstrap_interval([0.0] * 5 + [1.0] * 5, mean)[1:]
    assert low < 0.5 < high


def test_bootstrap_takes_tasks_of_different_numbers_of_seeds() -> None:
    ragged = bootstrap_interval([[1.0, 2.0, 3.0], [5.0, 7.0]], mean)
    padded = bootstrap_interval(np.array([[1.0, 2.0, 3.0], [5.0, math.nan, 7.0]]), mean)
    assert ragged == padded
    assert ragged.estimate == 3.6
    with pytest.raises(ValueError, match="no score"):
        bootstrap_interval([[1.0], [math.nan]])


def test_bootstrap_owns_its_generator() -> None:
    scores = np.random.default_rng(3).normal(size=(5, 10))
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    first = bootstrap_interval(scores, seed=1)
    np.random.random(10)
    assert bootstrap_interval(scores, seed=1) == first
    assert bootstrap_interval(scores, seed=2) != first
    np.random.seed(0)
    assert (np.random.get_state()[1] == before).all()


def test_bootstrap_mean_has_the_width_that_theory_gives() -> None:
    # For n = 400 standard normals the interval is mean ± 1.96 · s / √n up to Monte-Carlo error.
    x = np.random.default_rng(0).normal(size=400)
    interval = bootstrap_interval(x, mean, resamples=20_000)
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * x.std() / 20, rel=0.03)


def test_bootstrap_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=(1, 50))
    whole = bootstrap_interval(x)
    monkeypatch.setattr("rlopt.analysis.statistics._CHUNK", 777)
    assert bootstrap_interval(x) == whole


def test_bootstrap_curve_has_a_row_for_estimate_and_ends() -> None:
    curve = bootstrap_curve([[0.0, 1.0, 2.0], [3.0, 3.0, 3.0]], mean)
    assert curve.shape == (3, 2)
    assert curve[:, 1].tolist() == [3.0, 3.0, 3.0]
    assert curve[1, 0] < curve[0, 0] < curve[2, 0]


def test_probability_of_improvement_counts_pairs() -> None:
    # (3 > 1, 3 > 2, 2 > 1, 2 = 2): 3.5 of 4 pairs in the first task; 0 of 2 in the second.
    estimate = probability_of_improvement([[3.0, 2.0], [0.0]], [[1.0, 2.0], [1.0, 2.0]]).estimate
    assert estimate == pytest.approx((3.5 / 4 + 0) / 2)
    assert probability_of_improvement([[5.0, 6.0]], [[1.0, 2.0, 3.0]]) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="same tasks"):
        probability_of_improvement([[1.0], [2.0]], [[1.0]])


def test_probability_of_improvement_has_an_interval_around_a_coin_toss() -> None:
    rng = np.random.default_rng(1)
    interval = probability_of_improvement(rng.normal(size=(5, 10)), rng.normal(size=(5, 10)))
    assert 0.2 < interval.low < 0.5 < interval.high < 0.8
