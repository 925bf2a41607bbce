"""Lanes run jobs side by side, in order, and pass errors and modes on."""

from __future__ import annotations

import threading

import pytest
import torch

from rlopt.nn.lanes import Lanes


def test_results_come_in_the_order_of_the_jobs() -> None:
    assert Lanes(2).run([lambda i=i: i * i for i in range(5)]) == [0, 1, 4, 9, 16]
    assert Lanes(1).run([lambda: 7]) == [7]


def test_two_lanes_are_two_threads_that_meet() -> None:
    both = threading.Barrier(2, timeout=20.0)  # broken unless two jobs are inside at once

    def job() -> str:
        both.wait()
        return threading.current_thread().name

    names = Lanes(2).run([job, job])
    assert names == ["MainThread", "rlopt-lane"]
    assert len(set(Lanes(1).run([lambda: threading.current_thread().name] * 3))) == 1


def test_an_error_in_any_lane_is_raised_here_and_the_lanes_live_on() -> None:
    lanes = Lanes(2)

    def fails() -> None:
        raise ValueError("lane")

    for jobs in ([fails, int], [int, fails]):
        with pytest.raises(ValueError, match="lane"):
            lanes.run(jobs)
    assert lanes.run([lambda: 1, lambda: 2]) == [1, 2]


def test_the_gradient_mode_and_the_number_of_threads_are_the_callers() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            assert Lanes(2).run([torch.is_grad_enabled] * 2) == [False, False]
        assert Lanes(2).run([torch.is_grad_enabled] * 2) == [True, True]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
