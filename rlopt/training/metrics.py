"""Sums of 0-d tensors (of several runs: (R,)) that nobody reads before it is time to log."""

from __future__ import annotations

from torch import Tensor

from rlopt.types import State

Sums = dict[str, tuple[Tensor, int]]


def add_metrics(sums: Sums, metrics: dict[str, Tensor]) -> None:
    """Add one update's metrics to running sums, on the device."""
    for name, value in metrics.items():
        if name in sums:
            total, count = sums[name]
            sums[name] = (total + value, count + 1)
        else:
            sums[name] = (value.clone(), 1)  # whoever measured it may write there again


def merge(sums: Sums, more: Sums) -> None:
    """Add sums to sums."""
    for name, (value, n) in more.items():
        if name in sums:
            total, count = sums[name]
            sums[name] = (total + value, count + n)
        else:
            sums[name] = (value, n)


def means(sums: Sums) -> dict[str, float]:
    """Read them, averaged over runs: the only place where the host waits for a metric."""
    return {name: float(total.mean()) / count for name, (total, count) in sums.items()}


def sums_state(sums: Sums) -> State:
    return {name: {"total": total, "count": count} for name, (total, count) in sums.items()}


def load_sums(state: State) -> Sums:
    return {name: (entry["total"], int(entry["count"])) for name, entry in state.items()}
