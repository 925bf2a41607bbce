"""Statistics over seeds: interquartile means, intervals, probability of improvement, performance profiles.

The definitions are those of Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice"
(arXiv 2108.13264, the rliable library): a score belongs to a task and a seed; a bootstrap resamples seeds inside each
task, never across tasks; its interval is the percentile one. Every function that draws owns its generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlopt.random import numpy_generator

Array = NDArray[np.float64]
Scores = ArrayLike | Sequence[ArrayLike]
"""(seeds,) of one task, (tasks, seeds), or one array of seeds per task where their numbers differ."""
Statistic = Callable[[Array], Array]
"""Reduces the last axis, which holds the scores of all tasks and seeds pooled."""

_CHUNK = 2_000_000  # resampled scores held at once: 16 MB


class ConfidenceInterval(NamedTuple):
    """A point estimate and the ends of its interval (NaN where one value alone allows none)."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return format(self)

    def __format__(self, spec: str) -> str:
        """Return ``0.52 [0.40, 0.64]``, each number in the format ``spec`` (``.2f`` without)."""
        estimate, low, high = (format(x, spec or ".2f") for x in self)
        return estimate if math.isnan(self.low) else f"{estimate} [{low}, {high}]"


def normalise(score: ArrayLike, low: float, high: float) -> Array:
    """Return scores on a scale where ``low`` (a random policy, say) is 0 and ``high`` (a reference agent) is 1."""
    if high == low:
        raise ValueError(f"normalise needs two different anchors, not {low} twice")
    return (np.asarray(score, dtype=np.float64) - low) / (high - low)


def mean(scores: ArrayLike) -> Array:
    """Return the mean over the last axis: the other common ``Statistic``."""
    return np.asarray(np.mean(np.asarray(scores, dtype=np.float64), axis=-1))


def iqm(scores: ArrayLike) -> Array:
    """Return the interquartile mean over the last axis: the mean of what is left when ⌊n/4⌋ scores are cut at either
    end.

    With fewer than four scores nothing is cut, so it is then the mean. Other axes are kept; for tasks and seeds pooled,
    flatten first (``bootstrap_interval`` does).
    """
    values = np.sort(np.asarray(scores, dtype=np.float64), axis=-1)
    n = values.shape[-1]
    if n == 0:
        raise ValueError("an interquartile mean needs at least one score")
    cut = n // 4
    return np.asarray(values[..., cut : n - cut].mean(axis=-1))


def bootstrap_interval(
    scores: Scores, statistic: Statistic = iqm, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> ConfidenceInterval:
    """Return a statistic of the pooled scores with its percentile bootstrap interval, stratified by task.

    Args:
        scores: (seeds,), (tasks, seeds), or a sequence of (seeds_t,) arrays. NaN marks a missing seed and is left out.
        statistic: reduces the last axis of (…, tasks · seeds); ``iqm`` or ``mean``.
        level: coverage, in (0, 1).
        resamples: rliable uses 50 000 for what it reports; with 2000 an end moves by a few per cent of the width.
        seed: of the bootstrap's own generator: the same call gives the same interval.

    The interval is NaN where no task has a second seed: nothing then says how seeds vary.
    """
    tasks = _by_task(scores)
    estimate = float(statistic(np.concatenate(tasks)))
    if all(len(task) < 2 for task in tasks):
        return ConfidenceInterval(estimate, math.nan, math.nan)
    rng = numpy_generator(seed, "bootstrap")
    draws = [statistic(np.concatenate(block, axis=1)) for block in _resample(rng, tasks, resamples)]
    return _percentile(estimate, np.concatenate(draws), level)


def bootstrap_curve(scores: ArrayLike, statistic: Statistic = iqm, level: float = 0.95, resamples: int = 2000) -> Array:
    """Return (3, T): estimate, low and high of ``bootstrap_interval`` at each row of ``scores`` (T, seeds).

    Each row draws the same seeds, so the band is as smooth as the curves are.
    """
    rows = np.asarray(scores, dtype=np.float64)
    return np.array([bootstrap_interval(row, statistic, level, resamples) for row in rows]).reshape(-1, 3).T


def mean_interval(values: ArrayLike, level: float = 0.95) -> ConfidenceInterval:
    """Return the mean of independent values (n,) with Student's t interval: mean ± t(n-1) · s / √n, s with n - 1.

    For what is roughly normal, such as the returns of a run's evaluation episodes. For a few seeds of one agent
    ``bootstrap_interval(values, mean)`` assumes less, but is too narrow below about ten seeds. NaN values are left out;
    where there is nothing else, all three are NaN.
    """
    x = np.asarray(values, dtype=np.float64).ravel()
    if len(x) == 0:
        raise ValueError("a mean needs at least one value")
    x = x[~np.isnan(x)]
    if len(x) == 0:
        return ConfidenceInterval(math.nan, math.nan, math.nan)
    centre = float(x.mean())
    if len(x) == 1:
        return ConfidenceInterval(centre, math.nan, math.nan)
    half = student_t_quantile(0.5 + level / 2, len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return ConfidenceInterval(centre, centre - half, centre + half)


def probability_of_improvement(
    x: Scores, y: Scores, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> ConfidenceInterval:
    """Return how likely a run of X beats a run of Y on a task drawn at random (ties count half), with its interval.

    P = mean over tasks of P(X_t > Y_t), each the Mann-Whitney U statistic over n · m pairs (Agarwal et al. 2021,
    section 4.3). ``x`` and ``y`` have the same tasks in the same order; their numbers of seeds may differ.
    """
    xs, ys = _by_task(x), _by_task(y)
    if len(xs) != len(ys):
        raise ValueError(f"x has {len(xs)} tasks and y {len(ys)}; give both the same tasks in the same order")

    def probability(a: list[Array], b: list[Array]) -> Array:  # each (K, seeds)
        wins = [
            ((p[:, :, None] > q[:, None, :]) + 0.5 * (p[:, :, None] == q[:, None, :]))
            for p, q in zip(a, b, strict=True)
        ]
        return np.asarray(np.mean([w.mean(axis=(1, 2)) for w in wins], axis=0))

    estimate = float(probability([t[None] for t in xs], [t[None] for t in ys])[0])
    if all(len(t) < 2 for t in xs + ys):
        return ConfidenceInterval(estimate, math.nan, math.nan)
    rng = numpy_generator(seed, "bootstrap")
    draws = [probability(b[: len(xs)], b[len(xs) :]) for b in _resample(rng, xs + ys, resamples)]
    return _percentile(estimate, np.concatenate(draws), level)


def performance_profile(
    scores: Scores, thresholds: ArrayLike, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Array:
    """Return (3, T): the fraction of runs whose score is above each threshold (T,), and the ends of its pointwise
    interval (NaN where no task has a second seed).

    The run-score distribution of Agarwal et al. 2021, section 4.2: every task weighs the same, whatever its number of
    seeds. A curve that lies above another one everywhere belongs to the better agent (stochastic dominance).
    """
    tasks, limits = _by_task(scores), np.asarray(thresholds, dtype=np.float64)

    def above(block: list[Array]) -> Array:  # (K, seeds) each
        return np.asarray(np.mean([(each[:, :, None] > limits).mean(axis=1) for each in block], axis=0))

    estimate = above([task[None] for task in tasks])[0]
    if all(len(task) < 2 for task in tasks):
        return np.stack([estimate, np.full_like(estimate, math.nan), np.full_like(estimate, math.nan)])
    rng = numpy_generator(seed, "bootstrap")
    wide = max(1, sum(len(task) for task in tasks) * len(limits))
    draws = np.concatenate([above(block) for block in _resample(rng, tasks, resamples, _CHUNK // wide)])
    return np.stack([estimate, *np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)])


def student_t_quantile(probability: float, dof: int) -> float:
    """Return the quantile of Student's t distribution with an integer number of degrees of freedom, by bisection.

    The distribution function is the finite series of Abramowitz & Stegun 26.7.3 and 26.7.4.
    """
    if not 0 < probability < 1 or dof < 1:
        raise ValueError(f"no t quantile at probability {probability} with {dof} degrees of freedom")
    if probability < 0.5:
        return -student_t_quantile(1 - probability, dof)
    low, high = 0.0, 1.0
    while _student_t_cdf(high, dof) < probability:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_t_cdf(middle, dof) < probability else (low, middle)
    return (low + high) / 2


def _student_t_cdf(t: float, dof: int) -> float:
    """P(T ≤ t) for t ≥ 0."""
    theta = math.atan(t / math.sqrt(dof))
    cosine, sine = math.cos(theta), math.sin(theta)
    if dof % 2:
        term = total = cosine if dof > 1 else 0.0
        for j in range(3, dof - 1, 2):
            term *= (j - 1) / j * cosine**2
            total += term
        central = 2 / math.pi * (theta + sine * total)
    else:
        term = total = 1.0
        for j in range(2, dof - 1, 2):
            term *= (j - 1) / j * cosine**2
            total += term
        central = sine * total
    return 0.5 + central / 2


def _by_task(scores: Scores) -> list[Array]:
    """Return one (seeds,) array per task, without NaN."""
    items = list(scores) if isinstance(scores, Sequence | np.ndarray) else [scores]
    if not items:
        raise ValueError("no scores")
    rows = [items] if np.ndim(items[0]) == 0 else items
    tasks = [np.asarray(row, dtype=np.float64).ravel() for row in rows]
    tasks = [task[~np.isnan(task)] for task in tasks]
    if any(len(task) == 0 for task in tasks):
        raise ValueError("a task has no score; leave it out, or give it one")
    return tasks


def _resample(
    rng: np.random.Generator, tasks: list[Array], resamples: int, most: int | None = None
) -> Iterator[list[Array]]:
    """Blocks of resampled tasks, each a list of (K, seeds_t), K at most ``most``."""
    block = max(1, _CHUNK // sum(len(task) for task in tasks) if most is None else most)
    for start in range(0, resamples, block):
        k = min(block, resamples - start)
        yield [task[rng.integers(0, len(task), size=(k, len(task)))] for task in tasks]


def _percentile(estimate: float, draws: Array, level: float) -> ConfidenceInterval:
    if not 0 < level < 1:
        raise ValueError(f"level={level} is no coverage; give one between 0 and 1, such as 0.95")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return ConfidenceInterval(estimate, float(low), float(high))
