"""One row for every sampler: the options under which a short run uses all of it, read by the tests that walk over them.

A new sampler costs one row; ``test_every_registered_sampler_has_a_row`` fails without it.
"""

from __future__ import annotations

from typing import Any

import pytest

from rlopt.registry import get_sampler

SAMPLERS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "distinct": {},
    "reshuffled": {},
    "prioritized": {"anneal_draws": 400},
    "lap": {},
    "prioritized_reshuffled": {"beta": 0.4},
}
"""Options of ``buffer=NAME`` beside its capacity."""
every_sampler = pytest.mark.parametrize("kind", [pytest.param(get_sampler(name), id=name) for name in SAMPLERS])
