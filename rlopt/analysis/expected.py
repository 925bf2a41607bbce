"""The range of returns that an experiment's file expects, read from its head.

::

    # expected:  1919 to 3655 at 1M steps (evaluation): the published mean +- sd
    # expected:  0.3 to 1 at 21k steps (success): eight seeds 0.67 on average
    # expected:  unknown: not run here yet

The word in brackets says what lies in the range, as a mean over seeds: that of the one ``evaluation`` there, of the
``last ten evaluations``, of the ``training return`` (episodes of the ``WINDOW`` steps before), or of a fact of the
evaluation's episodes, by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlopt.analysis.curves import WINDOW, Curve, merge
from rlopt.analysis.run_results import Run, SeedGroup, evaluations
from rlopt.analysis.statistics import Array
from rlopt.analysis.tables import read_csv

MEASURES = ("evaluation", "last ten evaluations", "training return")
_NUMBER = r"-?\d+(?:\.\d+)?"
_RANGE = re.compile(rf"({_NUMBER}) to ({_NUMBER}) at ({_NUMBER})([kM]?) steps \(([\w ]+)\)(?::\s*(.*))?")
_SIZES = {"": 1, "k": 1_000, "M": 1_000_000}


@dataclass(frozen=True)
class Expected:
    """What a run of an experiment should come to."""

    low: float
    high: float
    step: int
    measure: str
    """One of ``MEASURES``, or a fact."""
    why: str = ""

    def measured(self, group: SeedGroup) -> Array | None:
        """Return (seeds,) what the runs came to at ``step``; None where they have not got there, or lack the fact."""
        curve = group.curve
        if self.measure not in MEASURES:
            facts = [e for run in group.runs for e in evaluations(run.folder, run.seed, self.measure)]
            return merge(self.measure, curve.env_id, [(e.steps, e.means) for e in facts]).at(self.step)
        if self.measure == "evaluation" or curve.at(self.step) is None:
            return curve.at(self.step)
        if self.measure == "training return":
            return _training(group, self.step)
        return _last_ten(curve, self.step)

    def place(self, score: float) -> str:
        """Return ``below``, ``inside`` or ``above``."""
        slack = 1e-6 * (1.0 + abs(score))  # sums of float32 rewards
        return "below" if score < self.low - slack else "above" if score > self.high + slack else "inside"


def expected_of(file: Path) -> Expected | str:
    """Return the range in the head of an experiment's file, or why it has none."""
    words: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("#")
        if (begin := text.lstrip()).startswith("expected:"):
            words = [begin.removeprefix("expected:").strip()]
        elif words and text.startswith(" " * 6):
            words.append(text.strip())
        elif words:
            break
    told = " ".join(words)
    if (found := _RANGE.fullmatch(told)) is None:
        return told.removeprefix("unknown").lstrip(":;, ") or "its file names no range"
    low, high, step, size, measure, why = found.groups()
    return Expected(float(low), float(high), round(float(step) * _SIZES[size]), measure, why or "")


def _last_ten(curve: Curve, step: int) -> Array | None:
    """Return each seed's mean over its last ten evaluations up to ``step``, of those that got there; that of the
    untrained policy (step 0) is none of them."""
    here = ~np.isnan(curve.scores[int(np.argmin(np.abs(curve.steps - step)))])
    found = []
    for column in curve.scores[(curve.steps > 0) & (curve.steps <= step)][:, here].T:
        done = column[~np.isnan(column)]
        if len(done):
            found.append(float(done[-10:].mean()))
    return np.array(found) if found else None


def _training(group: SeedGroup, step: int) -> Array | None:
    found = [mean for run in group.runs for mean in training_means(run, step)]
    return np.array(found) if found else None


def training_means(run: Run, step: int) -> list[float]:
    """Return each seed's mean return over the training episodes that ended in the ``WINDOW`` steps before ``step``."""
    path = run.folder / "episodes.csv"
    table = read_csv(path) if path.is_file() else {}
    if not table or not table["step"]:
        return []
    steps, returns = (np.array(table[name], dtype=np.float64) for name in ("step", "return"))
    slots = np.array(table.get("run", [0] * len(steps)), dtype=np.int64)
    inside = (steps > step - WINDOW) & (steps <= step)
    return [float(returns[inside & (slots == slot)].mean()) for slot in np.unique(slots[inside])]
