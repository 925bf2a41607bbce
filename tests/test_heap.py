"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
import os
from types import SimpleNamespace

import numpy as np
import pytest
from gymnasium import spaces

from rlopt import heap
from rlopt.agents.dqn import DQN, DQNConfig

Calls = list[tuple[int, int]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What an old glibc, which takes 32 MiB at most for one of the two, is told."""
    calls: Calls = []

    def mallopt(name: int, value: int) -> int:
        calls.append((name, value))
        return int(name == -1 or value <= 2**25)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.31", raising=False)
    for name in (*heap.SETTINGS, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    heap.keep_freed_memory.cache_clear()
    return calls


def test_networks_of_images_keep_freed_memory_and_others_do_not(asked: Calls) -> None:
    DQN(spaces.Box(0, 1, (3,), np.float32), spaces.Discrete(2), DQNConfig())
    assert asked == []
    for _ in range(2):  # once in a process
        DQN(spaces.Box(0, 255, (10, 10, 2), np.uint8), spaces.Discrete(2), DQNConfig())
        assert asked == [(-1, heap.KEPT), (-3, heap.KEPT), (-3, 2**25)]


@pytest.mark.parametrize("name", [*heap.SETTINGS, "GLIBC_TUNABLES"])
def test_what_the_environment_says_stands(asked: Calls, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "glibc.malloc.trim_threshold=1")
    heap.keep_freed_memory()
    assert asked == []


@pytest.mark.parametrize("library", [None, "NuttX 1", ValueError()])
def test_other_libraries_are_left_alone(asked: Calls, monkeypatch: pytest.MonkeyPatch, library: object) -> None:
    def confstr(name: str) -> object:
        if isinstance(library, ValueError):
            raise library
        return library

    monkeypatch.setattr(os, "confstr", confstr, raising=False)
    heap.keep_freed_memory()
    assert asked == []
