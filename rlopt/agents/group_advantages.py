"""Advantages relative to groups, as pure functions: GRPO compares whole episodes of one task, GiGPO also single steps
that act on the same observation (Feng, Xue, Liu and An 2025, "Group-in-Group Policy Optimization for LLM Agent
Training", arXiv 2505.10978; equation numbers below are that paper's).

Data are rows, one per step and in the order of time within an episode: M rows of I episodes in G groups, whatever a
policy is (a table, a network, a language model). Nothing is padded, so padding can enter no mean and no deviation.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlopt.types import Metrics, option

ESTIMATORS = ("gigpo", "grpo", "rloo", "step", "reinforce", "ppo")
ANCHORED = {"estimator": ("gigpo", "step")}
"""What options of anchors need to count."""
SIZES = (1, 2, 5, 10, 50)
"""Where the buckets of anchors by size begin."""
EPSILON = 1e-6
"""Added to a deviation before dividing by it (released code)."""


@dataclass(frozen=True, kw_only=True)
class EstimatorConfig:
    """What the estimators of an advantage can be asked for."""

    estimator: str = option(
        "gigpo",
        "an action's advantage: over its group's episodes and over steps at the same anchor (gigpo), the first alone "
        "(grpo; rloo: over the mean of the others), the second alone (step), its return (reinforce), or by a critic "
        "(ppo)",
        choices=ESTIMATORS,
    )
    omega: float = option(
        1.0, "ω: weight of the step advantage beside the episode's", low=0.0, needs={"estimator": ("gigpo",)}
    )
    normaliser: str = option(
        "std",
        "what centred scores are divided by: their deviation, or nothing (hard, unbalanced tasks)",
        choices=("std", "none"),
        needs={"estimator": ("gigpo", "grpo", "step")},
    )
    statistics: str = option(
        "trajectory",
        "what counts once in a group's mean and deviation: an episode (paper), or a step, so that long episodes count "
        "more (released code)",
        choices=("trajectory", "step"),
        needs={"estimator": ("gigpo", "grpo")},
    )
    nested: int = option(
        0,
        "anchors that also agree in up to so many earlier observations count as finer groups (HGPO)",
        low=0,
        needs=ANCHORED,
    )

    @property
    def anchored(self) -> bool:
        """Whether steps are compared with others at the same anchor."""
        return self.estimator in ANCHORED["estimator"]


class Rows(NamedTuple):
    """The steps of an iteration that count: M rows, of one episode in the order of time."""

    reward: Tensor
    """(M,) raw rewards, or what ``agent.reward`` makes of them."""
    episode: Tensor
    """(M,) int64 in [0, I): whose step it is."""
    group: Tensor
    """(I,) int64 in [0, G): whose episode of the same task."""
    anchors: tuple[Tensor, ...] = ()
    """(M,) int64 each: the anchor group of the observation acted on (``anchor_groups``); behind the first, nested ones
    that agree in more history."""
    penalty: Tensor | None = None
    """(M,) taken off the scores of this one step alone, after discounting (released code's invalid actions); where the
    penalty is part of ``reward``, as in the paper, leave it out."""
    exact: Tensor | None = None
    """(M,) int64: the true state acted in, numbered as anchors are; for ``aliasing`` alone."""


def anchor_groups(keys: Sequence[Hashable], group: Tensor) -> Tensor:
    """Return the anchor group (M,) int64 of each step (section 4.2, eq. 4 to 6): steps of one task ``group`` (M,) whose
    ``keys`` are equal, wherever in an episode and in whichever episode they stand."""
    numbers: dict[tuple[int, Hashable], int] = {}
    return torch.tensor(
        [numbers.setdefault(pair, len(numbers)) for pair in zip(group.tolist(), keys, strict=True)],
        dtype=torch.int64,
        device=group.device,
    )


def similar_groups(texts: Sequence[str], group: Tensor, threshold: float) -> Tensor:
    """Return anchor groups (M,) int64 of texts that are alike (the released code's ``enable_similarity``): a step joins
    the first group of its task whose first member it resembles at least by ``threshold``, the ratio of Ratcliff and
    Obershelp in (0, 1], else opens one."""
    known: dict[int, list[tuple[str, int]]] = {}
    found: dict[tuple[int, str], int] = {}
    count = 0
    for task, text in zip(group.tolist(), texts, strict=True):
        if (task, text) not in found:
            matcher = difflib.SequenceMatcher(autojunk=False)
            matcher.set_seq2(text)  # the one it keeps what it has counted of
            for first, number in known.setdefault(task, []):
                matcher.set_seq1(first)
                if matcher.quick_ratio() >= threshold and matcher.ratio() >= threshold:
                    found[task, text] = number
                    break
            else:
                known[task].append((text, count))
                found[task, text] = count
                count += 1
    numbers = [found[pair] for pair in zip(group.tolist(), texts, strict=True)]
    return torch.tensor(numbers, dtype=torch.int64, device=group.device)


def discounted_returns(rows: Rows, gamma: float) -> Tensor:
    """Return what came after each step, Ret_t = Σ_k γᵏ r_{t+k} (eq. 7), (M,); nothing is bootstrapped."""
    table, place = _as_table(rows)
    for t in range(table.shape[1] - 2, -1, -1):
        table[:, t].add_(table[:, t + 1], alpha=gamma)
    return table[rows.episode, place]


class Moments(NamedTuple):
    """What the scores of each of B buckets have in common, (B,) each."""

    mean: Tensor
    scale: Tensor
    """What centred scores are divided by."""
    differ: Tensor
    """bool: there are different scores."""


def moments(score: Tensor, bucket: Tensor, normaliser: str, weight: Tensor | None = None) -> Moments:
    """Return mean and scale F, the unbiased deviation or 1, of the scores (M,) of each ``bucket`` (M,).

    Args:
        weight: (M,) how often each score counts (once without).
    """
    weight = torch.ones_like(score) if weight is None else weight
    zeros = score.new_zeros(_count(bucket))
    count = zeros.index_add(0, bucket, weight)
    mean = zeros.index_add(0, bucket, weight * score) / count
    scale = torch.ones_like(mean)
    if normaliser == "std":
        squares = zeros.index_add(0, bucket, weight * (score - mean[bucket]).square())
        scale = (squares / (count - 1.0).clamp(min=1.0)).sqrt() + EPSILON
    low, high = (zeros.scatter_reduce(0, bucket, score, way, include_self=False) for way in ("amin", "amax"))
    return Moments(mean, scale, low != high)


def relative(score: Tensor, bucket: Tensor, m: Moments) -> Tensor:
    """Return (x - mean) / F of scores (M,) by the moments of their ``bucket`` (M,) (eq. 3 and 7).

    A score that is alone in its bucket says nothing, nor do equal ones: both are exactly 0, where dividing by a
    deviation of nothing would make noise of a rounding error.
    """
    return torch.where(m.differ[bucket], (score - m.mean[bucket]) / m.scale[bucket], 0.0)


def episode_scores(rows: Rows) -> Tensor:
    """Return the undiscounted return R of each episode (I,)."""
    return rows.reward.new_zeros(len(rows.group)).index_add(0, rows.episode, rows.reward)


def episode_advantages(rows: Rows, normaliser: str, statistics: str = "trajectory") -> Tensor:
    """Return how much better a whole episode was than those of its group, A_E (M,), the same for all of its steps
    (eq. 2 and 3).

    With ``statistics="step"`` an episode counts as often as it has steps. A penalty is taken off a step's own score and
    enters no mean and no deviation.
    """
    total = episode_scores(rows)
    lengths = torch.bincount(rows.episode, minlength=len(rows.group)).to(total.dtype)
    m = moments(total, rows.group, normaliser, lengths if statistics == "step" else None)
    return relative(_charged(total[rows.episode], rows), rows.group[rows.episode], m)


def leave_one_out_advantages(rows: Rows) -> Tensor:
    """Return R minus the mean R of the *other* episodes of the group, (M,) (RLOO; Kool et al. 2019); 0 without others.

    It is N / (N - 1) times what ``episode_advantages`` is without a deviation (the paper's appendix C).
    """
    members = torch.bincount(rows.group)[rows.group]
    factor = (members / (members - 1.0).clamp(min=1.0)).to(rows.reward.dtype)
    return episode_advantages(rows, "none") * factor[rows.episode]


def step_advantages(rows: Rows, gamma: float, normaliser: str) -> Tensor:
    """Return how much better a step's return was than those of the others at its anchor, A_S (M,) (eq. 7).

    Of nested anchors it is the mean over every level at which others agree, weighted by how much they agree in: k + 1
    at level k (HGPO, arXiv 2602.22817).
    """
    score = _charged(discounted_returns(rows, gamma), rows)
    advantage, total = torch.zeros_like(score), torch.zeros_like(score)
    for level, anchor in enumerate(rows.anchors):
        weight = (level + 1.0) * (torch.bincount(anchor)[anchor] > 1)
        advantage += weight * relative(score, anchor, moments(score, anchor, normaliser))
        total += weight
    return advantage / total.clamp(min=1.0)


def generalised_advantages(rows: Rows, value: Tensor, gamma: float, decay: float) -> Tensor:
    """Return Â (M,) of whole episodes by the values (M,) of a critic (Schulman et al. 2016, eq. 16); beyond the
    last step there is nothing, also where a limit cut it."""
    values, place = _as_table(rows._replace(reward=value))
    rewards, _ = _as_table(rows)
    later = torch.cat((values[:, 1:], torch.zeros_like(values[:, :1])), 1)
    advantage = rewards + gamma * later - values
    for t in range(advantage.shape[1] - 2, -1, -1):
        advantage[:, t].add_(advantage[:, t + 1], alpha=gamma * decay)
    return advantage[rows.episode, place]


def group_advantages(rows: Rows, gamma: float, c: EstimatorConfig) -> Tensor:
    """Return the advantage (M,) of every step by the estimator asked for (gigpo: A_E + ω A_S, eq. 8); all but
    ``ppo``'s, which needs a critic (``generalised_advantages``)."""
    if c.estimator == "gigpo":
        whole = episode_advantages(rows, c.normaliser, c.statistics)
        return whole + c.omega * step_advantages(rows, gamma, c.normaliser)
    if c.estimator == "grpo":
        return episode_advantages(rows, c.normaliser, c.statistics)
    if c.estimator == "step":
        return step_advantages(rows, gamma, c.normaliser)
    if c.estimator == "rloo":
        return leave_one_out_advantages(rows)
    assert c.estimator == "reinforce"
    return _charged(discounted_returns(rows, gamma), rows)


def group_metrics(rows: Rows, gamma: float) -> Metrics:
    """Return what the groups of an iteration were like, () each: ``equal_groups`` is the share of tasks whose episodes
    all scored alike (GRPO learns nothing from them), ``anchor_size`` the mean number of steps at an anchor,
    ``anchors/2-4`` the share of anchors at which so many stand (the paper's figure 5), ``singletons`` the share of
    steps that are alone at theirs, ``step_signal`` that of steps whose anchor has seen different returns, ``aliasing``
    (where true states are known) that of steps whose anchor stands for several."""
    differ = moments(episode_scores(rows), rows.group, "none").differ
    there = torch.bincount(rows.group) > 0
    found = {"equal_groups": 1.0 - differ[there].float().mean()}
    if rows.anchors:
        anchor = rows.anchors[0]
        size = torch.bincount(anchor)
        found |= {
            "anchor_size": size.float().mean(),
            "singletons": (size[anchor] == 1).float().mean(),
            "step_signal": moments(discounted_returns(rows, gamma), anchor, "none").differ[anchor].float().mean(),
        }
        sizes = torch.tensor(SIZES, device=size.device)
        share = torch.bincount(torch.bucketize(size, sizes, right=True) - 1, minlength=len(SIZES))
        for first, beyond, part in zip(SIZES, (*SIZES[1:], None), share / len(size), strict=True):
            name = f"{first}+" if beyond is None else f"{first}-{beyond - 1}" if beyond - first > 1 else f"{first}"
            found[f"anchors/{name}"] = part
        if rows.exact is not None:
            several = moments(rows.exact.double(), anchor, "none").differ
            found["aliasing"] = several[anchor].float().mean()
    return found


def _charged(score: Tensor, rows: Rows) -> Tensor:
    return score if rows.penalty is None else score - rows.penalty


def _count(number: Tensor) -> int:
    return int(number.max()) + 1 if number.numel() else 0


def _as_table(rows: Rows) -> tuple[Tensor, Tensor]:
    """Return the rewards as (I, T), zeros behind the end, and each row's column (M,)."""
    order = rows.episode.argsort(stable=True)
    length = torch.bincount(rows.episode, minlength=len(rows.group))
    first = length.cumsum(0) - length
    place = torch.empty_like(rows.episode)
    place[order] = torch.arange(len(order), device=order.device) - first[rows.episode[order]]
    table = rows.reward.new_zeros(len(rows.group), int(length.max()) if length.numel() else 0)
    table[rows.episode, place] = rows.reward
    return table, place
