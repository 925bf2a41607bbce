"""Several agents on several tasks: the scale on which tasks pool, and pictures that compare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from rlopt.analysis.figures import COLOURS
from rlopt.analysis.reference import SAME_REWARDS_IN_V5, TD3_NORMALISATION, td3_normalised
from rlopt.analysis.statistics import Array, ConfidenceInterval, normalise, performance_profile
from rlopt.envs.atari.scores import RANDOM_HUMAN, game_of

_GREYS = ("#333333", "#8C8C8C", "#B5B5B5")
_POINTS = 101


@dataclass(frozen=True)
class Scale:
    """What makes the returns of different tasks comparable: ``td3``, ``human``, or nothing (``return``)."""

    name: str

    @property
    def label(self) -> str:
        """What a score on this scale is called."""
        return {"td3": "TD3-normalised return", "human": "human-normalised score"}.get(self.name, "return")

    def __call__(self, env_id: str, scores: Array) -> Array:
        """Return the scores of a task on this scale."""
        if self.name == "td3":
            return td3_normalised(env_id, scores)
        game = game_of(env_id) if self.name == "human" else None
        return scores if game is None else normalise(scores, *RANDOM_HUMAN[game])


def scale_of(env_id: str) -> Scale:
    """Return the published scale that an environment has: of MuJoCo's tasks that of TD3's returns (v2 to v4 only, where
    v5 changed the rewards), of Atari games that of random play and a human."""
    task, _, version = env_id.rpartition("-")
    if task in TD3_NORMALISATION and (version in ("v2", "v3", "v4") or task in SAME_REWARDS_IN_V5):
        return Scale("td3")
    return Scale("human" if game_of(env_id) is not None else "return")


def draw_profiles(
    scores: Mapping[str, Sequence[Array]], label: str, title: str, coloured: Sequence[str]
) -> Figure:  # fmt: skip
    """Return performance profiles, a line and its bootstrap band for each name's scores by task; those not ``coloured``
    (published ones) are grey."""
    everything = np.concatenate([task for tasks in scores.values() for task in tasks])
    margin = 0.02 * float(np.ptp(everything)) or 1.0
    limits = np.linspace(everything.min() - margin, everything.max() + margin, _POINTS)
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, colour, dashes in _styles(list(scores), coloured):
        estimate, low, high = performance_profile(scores[name], limits)
        count = sum(map(len, scores[name]))
        axes.fill_between(limits, low, high, color=colour, alpha=0.18, linewidth=0, step="post")
        axes.step(limits, estimate, where="post", color=colour, linestyle=dashes, linewidth=1.6,
                  label=f"{name}, {count} runs")  # fmt: skip
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.set_xlabel(f"{label} τ")
    axes.set_ylabel("fraction of runs above τ")
    axes.set_ylim(-0.02, 1.02)
    _bare(figure)
    legend = figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=1)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def draw_improvement(pairs: Sequence[tuple[str, str, ConfidenceInterval]]) -> Figure:
    """Return probabilities of improvement as points with their intervals, the first pair on top, and a line at 0.5."""
    height = 0.42 * len(pairs) + 0.9
    figure = Figure(figsize=(6.4, height), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0.5, color="#888888", linewidth=1.0, linestyle=":")
    for row, (_, _, found) in enumerate(pairs):
        if not math.isnan(found.low):
            axes.plot([found.low, found.high], [row, row], color=COLOURS[0], linewidth=2.2, alpha=0.45)
        axes.plot(found.estimate, row, "o", color=COLOURS[0], markersize=5)
    labels = [f"{_short(x)}\nover {_short(y)}" for x, y, _ in pairs]
    axes.set_yticks(range(len(pairs)), labels, fontsize=7, parse_math=False)
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("P(X > Y)")
    _bare(figure)
    return figure


def _styles(names: Sequence[str], coloured: Sequence[str]) -> list[tuple[str, str, str]]:
    own, others = [n for n in names if n in coloured], [n for n in names if n not in coloured]
    drawn = [(name, COLOURS[i % len(COLOURS)], "-") for i, name in enumerate(own)]
    return drawn + [(name, _GREYS[i % len(_GREYS)], "--") for i, name in enumerate(others)]


def _short(name: str) -> str:
    return name if len(name) <= 44 else name[:43] + "…"


def _bare(figure: Figure) -> None:
    for axes in figure.axes:
        axes.grid(color="#E4E4E4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8, length=3, color="#666666")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
