"""``make_agent``, ``make_data`` and ``make_batch`` of ``tests/agents/cases.py`` as fixtures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rlopt.agents import Agent
from rlopt.buffers import Batch
from tests.agents import cases


@pytest.fixture
def make_agent() -> Callable[..., Agent]:
    return cases.make_agent


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    return cases.make_batch


@pytest.fixture
def make_data() -> Callable[..., Any]:
    return cases.make_data
