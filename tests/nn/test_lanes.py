"""Lanes run jobs side by side, in order, and pass errors and modes on."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time

import pytest
import torch

from rlopt.fast.lanes import Lanes


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


def test_shared_work_reaches_every_lane_and_errors_leave_none_behind() -> None:
    lanes, both = Lanes(2), threading.Barrier(2, timeout=20.0)
    lanes.share(both.wait)
    alone: list[str] = []
    Lanes(1).share(lambda: alone.append(threading.current_thread().name))
    assert alone == ["MainThread"]

    seen: list[str] = []

    def fails_here() -> None:
        if threading.current_thread().name == "MainThread":
            raise KeyboardInterrupt
        seen.append("other")

    with pytest.raises(KeyboardInterrupt):
        lanes.share(fails_here)
    assert seen == ["other"]  # it had finished before the error went on


def test_shared_work_that_fails_everywhere_is_raised_once_and_leaves_the_lanes_alive() -> None:
    lanes = Lanes(2)

    def fails() -> None:
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            lanes.share(fails)
    assert lanes.run([lambda: 1, lambda: 2]) == [1, 2]


def test_lanes_end_with_their_owner() -> None:
    before = set(threading.enumerate())
    lanes = Lanes(3)
    lanes.run([lambda: None] * 3)
    own = set(threading.enumerate()) - before
    assert len(own) == 2
    del lanes
    gc.collect()
    for thread in own:
        thread.join(20.0)
        assert not thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_gets_lanes_of_its_own() -> None:
    lanes = Lanes(2)
    assert lanes.run([lambda: 1, lambda: 2]) == [1, 2]
    child = os.fork()
    if child == 0:
        os._exit(0 if lanes.run([lambda: 3, lambda: 4]) == [3, 4] else 1)
    deadline = time.monotonic() + 30.0
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    assert done[1] == 0
