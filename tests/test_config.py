"""``rlopt.config``: mappings become frozen dataclasses, and every mistake is one line that names the option."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlopt.config import build, changed, checked, defaults, nearest, option_names, to_dict, with_arguments
from rlopt.types import RloptError, option


@dataclass(frozen=True, kw_only=True)
class Net:
    hidden: tuple[int, ...] = option((256, 256), "widths", low=1)
    activation: str = option("relu", "non-linearity", choices=("relu", "tanh"))


@dataclass(frozen=True, kw_only=True)
class Settings:
    learning_rate: float = option(3e-4, "step", above=0.0)
    gamma: float = option(0.99, "discount", low=0.0, high=1.0)
    batch_size: int = option(256, "rows", low=1)
    ratio: tuple[int, int] = option((1, 1), "updates per step", low=1)
    clip: float | None = option(None, "norm", above=0.0)
    temperature: float | Literal["auto"] = option("auto", "fixed or learned", above=0.0)
    threads: int | Literal["auto"] = option("auto", "threads", low=1)
    fused: bool = option(True, "fast path")
    name: str | None = None
    path: Path | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    names: tuple[str | dict[str, Any], ...] = ()
    net: Net = option(Net, "network")


def refused(cls: type, mapping: Any, where: str = "agent") -> str:
    with pytest.raises(RloptError) as caught:
        build(cls, mapping, where)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_options_left_out_keep_their_defaults() -> None:
    assert build(Settings, {}) == Settings()


def test_nested_mappings_become_nested_dataclasses() -> None:
    built = build(Settings, {"net": {"hidden": [32]}, "gamma": 1})
    assert built == Settings(gamma=1.0, net=Net(hidden=(32,)))
    assert isinstance(built.gamma, float)


@pytest.mark.parametrize(
    ("option_name", "given_value", "expected"),
    [
        ("learning_rate", "1e-3", 1e-3),  # YAML readers leave this as text
        ("learning_rate", 1, 1.0),
        ("batch_size", 1e2, 100),
        ("batch_size", "1e2", 100),
        ("ratio", [2, 5], (2, 5)),
        ("clip", "0.5", 0.5),
        ("clip", None, None),
        ("temperature", "auto", "auto"),
        ("temperature", 0.2, 0.2),
        ("temperature", 1, 1.0),
        ("temperature", "0.2", 0.2),
        ("threads", "auto", "auto"),
        ("threads", 3, 3),
        ("name", 7, "7"),
        ("path", "runs/a", Path("runs/a")),
        ("extra", {"a": (1, 2)}, {"a": [1, 2]}),
        ("names", ["A", {"class": "B"}], ("A", {"class": "B"})),
    ],
)
def test_values_are_converted_to_the_declared_type(option_name: str, given_value: Any, expected: Any) -> None:
    found = getattr(build(Settings, {option_name: given_value}), option_name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("mapping", "line"),
    [
        ({"learning_rte": 1}, "agent.learning_rte: no such option; did you mean agent.learning_rate?"),
        ({"hidden": [1]}, "agent.hidden: no such option; did you mean agent.net.hidden?"),
        ({"net": {"hiden": [1]}}, "agent.net.hiden: no such option; did you mean agent.net.hidden?"),
        ({"learning_rate": "fast"}, "agent.learning_rate: expected a number, got 'fast'"),
        ({"learning_rate": True}, "agent.learning_rate: expected a number, got true"),
        ({"learning_rate": None}, "agent.learning_rate: expected a number, got null"),
        ({"learning_rate": float("nan")}, "agent.learning_rate: expected a number, got nan"),
        ({"learning_rate": 0}, "agent.learning_rate: must be above 0, got 0"),
        ({"gamma": 1.5}, "agent.gamma: must be at most 1, got 1.5"),
        ({"gamma": -0.1}, "agent.gamma: must be at least 0, got -0.1"),
        ({"batch_size": 1.5}, "agent.batch_size: expected a whole number, got 1.5"),
        ({"batch_size": True}, "agent.batch_size: expected a whole number, got true"),
        ({"batch_size": 0}, "agent.batch_size: must be at least 1, got 0"),
        ({"ratio": [1]}, "agent.ratio: expected a list of 2: [a whole number, a whole number], got [1]"),
        ({"ratio": [1, 0]}, "agent.ratio: must be at least 1, got 0"),
        ({"ratio": [1, "x"]}, "agent.ratio[1]: expected a whole number, got 'x'"),
        ({"ratio": 3}, "agent.ratio: expected a list of 2: [a whole number, a whole number], got 3"),
        ({"clip": -1}, "agent.clip: must be above 0, got -1"),
        ({"temperature": "atuo"}, "agent.temperature: expected a number or auto, got 'atuo'"),
        ({"threads": "many"}, "agent.threads: expected a whole number or auto, got 'many'"),
        ({"threads": 0}, "agent.threads: must be at least 1, got 0"),
        ({"fused": 1}, "agent.fused: expected true or false, got 1"),
        ({"fused": "yes"}, "agent.fused: expected true or false, got 'yes'"),
        ({"name": [1]}, "agent.name: expected text or null, got [1]"),
        ({"extra": 3}, "agent.extra: expected options (key: value), got 3"),
        ({"net": 3}, "agent.net: expected options (key: value), got 3"),
        ({"net": {"hidden": [8, 0]}}, "agent.net.hidden: must be at least 1, got 0"),
        ({"net": {"hidden": 8}}, "agent.net.hidden: expected a list, each a whole number, got 8"),
        ({"net": {"activation": "tan"}}, "agent.net.activation: no such choice 'tan'; did you mean tanh?"),
    ],
)
def test_a_mistake_is_one_line_with_the_dotted_name(mapping: dict[str, Any], line: str) -> None:
    assert refused(Settings, mapping) == line


def test_without_a_near_name_the_choice_is_listed() -> None:
    line = "zzz: no such option; choose from activation, hidden"
    assert refused(Net, {"zzz": 1}, where="") == line


def test_an_option_without_default_must_be_given() -> None:
    @dataclass(frozen=True)
    class Needs:
        steps: int

    assert refused(Needs, {}, "run") == "run.steps: must be given; add run.steps=…"
    assert build(Needs, {"steps": 3}, "run") == Needs(3)
    assert defaults(Needs) == {}


def test_what_the_dataclass_itself_rejects_comes_through() -> None:
    @dataclass(frozen=True)
    class Pair:
        low: float = 0.0
        high: float = 1.0

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise RloptError("agent.low: must not exceed agent.high")

    assert refused(Pair, {"low": 2}) == "agent.low: must not exceed agent.high"


def test_defaults_are_plain_data() -> None:
    found = defaults(Settings)
    assert found["net"] == {"hidden": [256, 256], "activation": "relu"}
    assert found["ratio"] == [1, 1]
    assert json.loads(json.dumps(found)) == found


@given(
    learning_rate=st.floats(1e-6, 1e3),
    batch_size=st.integers(1, 10**9),
    ratio=st.tuples(st.integers(1, 99), st.integers(1, 99)),
    temperature=st.one_of(st.just("auto"), st.floats(1e-3, 10)),
    hidden=st.lists(st.integers(1, 999)).map(tuple),
    name=st.one_of(st.none(), st.text(min_size=1, max_size=9)),
)
def test_to_dict_and_build_are_inverse_even_through_json(hidden: tuple[int, ...], **values: Any) -> None:
    built = Settings(net=Net(hidden=hidden), **values)
    assert build(Settings, to_dict(built)) == built
    assert build(Settings, json.loads(json.dumps(to_dict(built)))) == built


def test_option_names_are_dotted() -> None:
    assert option_names(Net, "agent.net") == ["agent.net.hidden", "agent.net.activation"]
    assert "net.hidden" in option_names(Settings)


def test_arguments_of_a_constructor_become_options() -> None:
    class Sampler:
        """Draws.

        Args:
            alpha: exponent of
                priorities.
        """

        def __init__(self, buffer: object, alpha: float = 0.6, stratified: bool = False) -> None:
            pass

    options = with_arguments(Net, Sampler)
    built = build(options, {"alpha": 1, "hidden": [8]}, "buffer")
    assert isinstance(built, Net)
    assert to_dict(built) == {"hidden": [8], "activation": "relu", "alpha": 1.0, "stratified": False}
    assert options.__dataclass_fields__["alpha"].metadata["help"] == "exponent of priorities."
    with pytest.raises(RloptError, match=r"^buffer\.alhpa: no such option; did you mean buffer\.alpha\?$"):
        build(options, {"alhpa": 1}, "buffer")
    with pytest.raises(RloptError, match=r"^buffer\.stratified: expected true or false, got 3$"):
        build(options, {"stratified": 3}, "buffer")


def test_only_what_was_made_by_hand_is_checked_again() -> None:
    built = build(Settings, {"gamma": 0.5})
    assert checked(built) is built
    assert checked(Settings(gamma=1)) == Settings(gamma=1.0)
    for by_hand in (Settings(gamma=2.0), replace(built, gamma=2.0)):
        with pytest.raises(RloptError, match=r"^agent\.gamma: must be at most 1, got 2$"):
            checked(by_hand)
    with pytest.raises(RloptError, match=r"^agent\.gamma: must be at most 1, got 2$"):
        changed(built, gamma=2.0)
    with pytest.raises(RloptError, match=r"^agent\.net\.hidden: must be at least 1, got 0$"):
        build(Settings, {"net": Net(hidden=(0,))})


@pytest.mark.parametrize(
    ("word", "expected"),
    [("halfcheetah-v5", "HalfCheetah-v5"), ("HalfCheeta-v5", "HalfCheetah-v5"), ("qqq", None)],
)
def test_nearest_ignores_case_and_gives_up_on_what_is_far(word: str, expected: str | None) -> None:
    assert nearest(word, ["HalfCheetah-v5", "Hopper-v5"]) == expected
