from dataclasses import replace

import numpy as np
import pytest

from rlopt.analysis.curves import Curve, merge
from rlopt.analysis.reference import TD3_NORMALISATION, PublishedCurve, beside, reference, td3_normalised
from rlopt.analysis.statistics import bootstrap_interval
from rlopt.types import RloptError

TASKS = list(TD3_NORMALISATION)


@pytest.mark.parametrize(
    ("task", "tianshou", "simbav2"),
    [  # Tianshou: mean over the last ten evaluations before 100k; SimbaV2 repository: the evaluation nearest to 100k.
        ("HalfCheetah", 5829, 6156),
        ("Hopper", 1621, 1103),
        ("Walker2d", 924, 690),
        ("Ant", 827, 747),
        ("Humanoid", 601, 632),
    ],
)
def test_published_returns_at_100k(task: str, tianshou: int, simbav2: int) -> None:
    first, second = reference(f"{task}-v4")
    assert first.window(100_000).mean() == pytest.approx(tianshou, abs=0.5)
    assert second.at(100_000).mean() == pytest.approx(simbav2, abs=0.5)
    assert first.scores.shape == (201, 10)
    assert second.scores.shape == (61, 10)
    assert (np.diff(first.steps) > 0).all() and first.steps[-1] == 1_000_000


def test_published_returns_of_other_agents() -> None:
    td3 = {curve.name: curve.at(100_000).mean() for curve in reference("HalfCheetah-v4", ["td3"])}
    expected = {"Tianshou TD3 (v3, 10 seeds)": 5336, "authors' TD3 (v2, 5 seeds)": 4190}
    assert td3 == pytest.approx(expected, abs=0.5)
    (ppo,) = reference("Hopper-v4", ["ppo"])
    assert ppo.at(503_808).mean() == pytest.approx(1395, abs=0.5)


@pytest.mark.parametrize(
    ("env_id", "agent", "mean", "sd"),
    [  # Tables made of the same files by another script, population standard deviations.
        ("ALE/Pong-v5", "dqn", 18.0, 0.846),
        ("ALE/Breakout-v5", "c51", 222, 26.6),
        ("ALE/SpaceInvaders-v5", "rainbow", 1777, 186),
        ("ALE/MsPacman-v5", "rainbow", 3074, 62.1),
        ("BattleZoneNoFrameskip-v4", "dqn", 24093, 543),
    ],
)
def test_published_returns_of_atari_at_40m_frames(env_id: str, agent: str, mean: float, sd: float) -> None:
    (curve,) = reference(env_id, [agent], "dopamine")
    found = curve.at(10_000_000)
    assert (found.mean(), found.std()) == pytest.approx((mean, sd), rel=0.01)
    assert curve.scores.shape == (56, 5) and curve.steps[-1] == 50_000_000


def test_scores_of_two_protocols_are_never_seen_together() -> None:
    own = Curve("dqn", "ALE/Pong-v5", np.array([10]), np.ones((1, 1)), "dqn", "dopamine")
    assert [curve.algorithm for curve in beside([own])] == ["dqn"]
    assert beside([replace(own, protocol="classic")]) == beside([replace(own, agent="ppo")]) == []
    assert len(beside([own, replace(own, agent="rainbow"), replace(own, agent="c51")])) == 3
    assert beside([replace(own, env_id="Ant-v4", agent="sac", protocol=None)])[0].algorithm == "sac"


@pytest.mark.parametrize(
    ("source", "step", "iqm", "low", "high"),
    [
        (0, 100_000, 0.37, 0.30, 0.44),
        (0, 1_000_000, 1.17, 1.14, 1.19),
        (1, 100_000, 0.24, 0.21, 0.28),
        (1, 500_000, 0.99, 0.92, 1.03),
    ],
)
def test_pooled_iqm_is_the_published_one(source: int, step: int, iqm: float, low: float, high: float) -> None:
    """Against an independent computation (SciPy's trimmed mean, another generator) on the full files."""
    curves = [reference(f"{task}-v4")[source] for task in TASKS]
    interval = bootstrap_interval([td3_normalised(c.env_id, c.at(step)) for c in curves], resamples=4000)
    assert interval == pytest.approx((iqm, low, high), abs=0.011)


def test_versions_that_are_comparable() -> None:
    names = [curve.name for curve in reference("HalfCheetah-v4")]
    assert names == ["Tianshou SAC (v3, 10 seeds)", "SimbaV2-repository SAC (v4, 10 seeds)"]
    for version in ("v2", "v3", "v5"):
        assert [curve.name for curve in reference(f"HalfCheetah-{version}")] == names
    assert [curve.env_id for curve in reference("Swimmer-v5")] == ["Swimmer-v3"]
    # v5 changed what these reward.
    assert all(reference(f"{task}-v5") == [] for task in TASKS[1:])
    assert reference("Pendulum-v1") == reference("ALE/Breakout-v5") == reference("HalfCheetah") == []


def test_every_reference_names_its_source() -> None:
    assert all("@" in curve.source for task in TASKS for curve in reference(f"{task}-v4"))
    assert all(isinstance(curve, PublishedCurve) for curve in reference("Ant-v4"))


def test_td3_normalisation() -> None:
    assert td3_normalised("Hopper-v4", [18.791, 3226.0]).tolist() == [0.0, 1.0]
    with pytest.raises(RloptError, match=r"Pendulum-v1 has no TD3 normalisation"):
        td3_normalised("Pendulum-v1", 0.0)


def _curve() -> Curve:
    return merge("x", "Hopper-v4", [([5000, 10000, 15000], [1.0, 2.0, 6.0]), ([5000, 10000], [3.0, 4.0])])


def test_merge_marks_missing_evaluations() -> None:
    curve = _curve()
    assert curve.steps.tolist() == [5000, 10000, 15000]
    assert curve.scores[:, 0].tolist() == [1.0, 2.0, 6.0]
    assert curve.common().tolist() == [True, True, False]


def test_at_takes_the_nearest_evaluation_within_half_a_spacing() -> None:
    curve = _curve()
    assert curve.at(10_000).tolist() == [2.0, 4.0]
    assert curve.at(12_000).tolist() == [2.0, 4.0]
    assert curve.at(15_000).tolist() == [6.0]
    assert curve.at(17_400).tolist() == [6.0]
    assert curve.at(17_600) is None


def test_window_averages_what_lies_before() -> None:
    curve = _curve()
    assert curve.window(10_000).tolist() == [1.5, 3.5]
    # (5000, 15000] leaves the first evaluation out, and the second seed has not got there.
    assert curve.window(15_000, width=10_000).tolist() == [4.0]
    assert curve.window(100_000) is None
