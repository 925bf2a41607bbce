"""What every registered agent promises, whatever drives it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlopt.agents import Agent
from rlopt.registry import AGENTS as REGISTERED
from rlopt.registry import get_agent
from rlopt.training.setup import make_loop
from tests.agents.cases import AGENTS, GRADIENT_LEARNERS, short_run
from tests.agents.completeness import tensors_of, unregistered


def test_every_registered_agent_has_a_row() -> None:
    """Else no walking test would look at it: add a row to ``tests/agents/cases.py``."""
    assert set(AGENTS) == set(REGISTERED)
    elsewhere = [name for name, case in AGENTS.items() if case.team or case.words]
    learning = {name for name in AGENTS if get_agent(name).loop != "solver" and name not in elsewhere}
    assert learning == set(GRADIENT_LEARNERS)  # their rows say in which actions they are fed data
    assert set(AGENTS) == {path.stem for path in (Path(__file__).parents[2] / "configs" / "agent").glob("*.yaml")}


@pytest.mark.parametrize("name", list(AGENTS))
def test_what_a_run_leaves_in_an_agent_is_in_its_state(name: str) -> None:
    """Two runs of different seeds and lengths: what their agents agree on is constant."""

    def after(seed: int, share: float) -> Agent:
        loop = make_loop(short_run(name, seed=seed))
        while loop.step < share * loop.total_steps:
            loop.advance()
        loop.close()
        return loop.agent

    assert unregistered(after(3, 0.4), tensors_of(after(4, 0.3))) == []
