"""The guard names what was first not finite, in the order of the calls, and never waits for the device."""

from __future__ import annotations

import pytest
import torch

from rlopt.nn.guard import Guard

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_the_first_that_is_not_finite_is_named_and_nothing_passes_after_it(bad: float) -> None:
    guard = Guard(CPU)
    guard.begin()
    assert guard.passes("a", t(1.0)) and guard.passes("b", t(3e38, 1.0))
    assert not guard.passes("c", t(1.0, bad))
    assert not guard.passes("d", t(1.0)) and not guard.passes("e", t(NAN))
    assert guard.first_bad() == guard.first_bad() == "c"


def test_the_order_is_that_of_the_calls_not_of_the_first_update() -> None:
    guard = Guard(CPU)
    for order, found in (("abc", None), ("cba", "c"), ("bca", "b")):
        guard.clear()
        guard.begin()
        for name in order:
            guard.passes(name, t(1.0 if found is None else NAN))
        assert guard.first_bad() == found


def test_what_was_first_stays_until_it_is_cleared_and_the_next_update_passes() -> None:
    guard = Guard(CPU)
    for name, value in (("a", 1.0), ("b", NAN), ("a", NAN), ("c", 2.0)):
        guard.begin()
        assert guard.passes(name, t(value)).item() == (value in (1.0, 2.0))
    assert guard.first_bad() == "b"
    guard.clear()
    assert guard.first_bad() is None
    guard.begin()
    guard.passes("c", t(NAN))
    guard.clear()  # in the middle of an update that went wrong, too
    assert guard.first_bad() is None


def test_observations_stand_for_their_floating_leaves() -> None:
    guard = Guard(CPU)
    guard.begin()
    pixels = torch.full((2, 3), 255, dtype=torch.uint8)
    assert guard.passes("pixels", pixels)
    assert guard.passes("both", {"pixels": pixels, "arm": torch.ones(2, 3)})
    assert not guard.passes("bad", {"pixels": pixels, "arm": torch.ones(2, 3), "leg": torch.full((2, 1), INF)})
    assert guard.first_bad() == "bad"


def test_every_run_has_its_own_flag_and_code() -> None:
    guard = Guard(CPU, runs=3)
    guard.begin()
    assert guard.passes("loss", t(1.0, NAN, 1.0)).tolist() == [True, False, True]
    assert guard.passes("rows", torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, INF]])).tolist() == [True, False, False]
    guard.remember()
    assert guard.code.tolist() == [0, guard.number("loss"), guard.number("rows")]
    assert guard.first_bad() == "loss"


def test_a_child_shares_flags_and_code_and_prefixes_its_names() -> None:
    guard = Guard(CPU)
    child = guard.child("left")
    grandchild = child.child("inner")
    guard.begin()
    assert child.passes("loss", t(1.0))
    assert not grandchild.passes("loss", t(NAN))
    assert not guard.passes("loss", t(1.0)) and not child.passes("loss", t(1.0))
    assert guard.first_bad() == child.first_bad() == "left/inner/loss"


def test_a_saved_code_keeps_its_name_where_names_are_numbered_otherwise() -> None:
    first, second, runs = Guard(CPU), Guard(CPU), Guard(CPU, runs=2)
    for guard, order in ((first, "abc"), (second, "xcb")):
        guard.begin()
        for name in order:
            guard.passes(name, t(NAN if guard is first and name == "b" else 1.0))
    state = first.state_dict()
    second.load_state_dict(state)
    assert second.first_bad() == "b" and second.number("b") == 3
    fresh = Guard(CPU)
    fresh.load_state_dict(state)
    assert fresh.first_bad() == "b" and fresh.state_dict()["names"] == ["a", "b", "c"]
    runs.number("z")
    runs.load_state_dict({"code": t(0, 2).long(), "names": ["a", "b"]})
    assert runs.first_bad() == "b" and runs.code.shape == (2,)
