"""Sums of 0-d tensors (of several runs: (R,)) that nobody reads before it is time to log."""

from __future__ import annotations

import torch
from torch import Tensor

from rlopt.types import State

MetricSums = dict[str, tuple[Tensor, int]]


def add_metrics(sums: MetricSums, metrics: dict[str, Tensor]) -> None:
    """Add one update's metrics to running sums, on the device."""
    merge(sums, {name: (value, 1) for name, value in metrics.items()})


def merge(sums: MetricSums, more: MetricSums) -> None:
    """Add sums to sums, in one operation for those that are there already and one for those that are new."""
    known, fresh = ([name for name in more if (name in sums) is there] for there in (True, False))
    before = [sums[name][0].to(more[name][0].device) for name in known]  # a resumed run's lie on the CPU
    for names, others in ((known, before), (fresh, 0.0)):  # a new one is copied: who measured it may write there again
        if names:
            totals = torch._foreach_add([more[name][0] for name in names], others)
            for name, total in zip(names, totals, strict=True):
                sums[name] = (total, more[name][1] + (sums[name][1] if name in sums else 0))


def means(sums: MetricSums) -> dict[str, float]:
    """Read them, averaged over runs: the only place where the host waits for a metric."""
    return {name: float(total.mean()) / count for name, (total, count) in sums.items()}


def sums_state(sums: MetricSums) -> State:
    return {name: {"total": total, "count": count} for name, (total, count) in sums.items()}


def load_sums(state: State) -> MetricSums:
    return {name: (entry["total"], int(entry["count"])) for name, entry in state.items()}
