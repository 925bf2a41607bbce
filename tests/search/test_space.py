"""Search spaces: what a file may say, and mistakes in one line that names the right word."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlopt.search.space import Choices, Range, examples, read_space, refuse_fixed, stored, value_at, word
from rlopt.training.presets import parse, train_config
from rlopt.types import RloptError

ROOT = Path(__file__).resolve().parents[2]


def space_of(tmp_path: Path, text: str) -> dict[str, Range | Choices]:
    (tmp_path / "space.yaml").write_text(text)
    return dict(read_space(tmp_path / "space.yaml"))


def test_a_file_says_what_is_searched_and_where(tmp_path: Path) -> None:
    text = "agent.learning_rate: {low: 1e-4, high: 0.01, log: true}\nagent.batch_size: {low: 8, high: 16, step: 4}\n"
    space = space_of(tmp_path, text + "buffer: {choices: [uniform, reshuffled, lap]}\n")
    assert space["agent.learning_rate"] == Range(low=1e-4, high=0.01, log=True)
    assert space["agent.batch_size"] == Range(low=8, high=16, step=4)
    assert 12 in space["agent.batch_size"]
    assert 17 not in space["agent.batch_size"]
    points = examples(space)
    assert [point["buffer"] for point in points] == ["uniform", "reshuffled", "lap"]
    assert {point["agent.batch_size"] for point in points} == {8, 16}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("agent.tau: {lo: 0.1, high: 0.2}", "agent.tau.lo: no such option; did you mean agent.tau.low?"),
        ("agent.tau: {low: 0.1}", "agent.tau.high: must be given; add agent.tau.high=…"),
        ("agent.tau: {low: 0.3, high: 0.2}", "agent.tau: low must lie below high, and both be finite; got 0.3 and 0.2"),
        ("agent.tau: {low: 0, high: 1, log: true}", "agent.tau: log: true needs low above 0 and no step; got low 0"),
        ("agent.tau: {low: 0, high: 1, step: 0.3}", "agent.tau: high must be low plus a multiple of step 0.3; got 1"),
        ("agent.tau: {low: x, high: 1}", "agent.tau.low: expected a whole number or a number, got 'x'"),
        ("agent.tau: {choices: []}", "agent.tau.choices: needs different values, got []"),
        ("agent.tau: {choices: [1, 1]}", "agent.tau.choices: needs different values, got [1, 1]"),
        ("agent.tau: 0.1", "agent.tau: expected {low: …, high: …}"),
        ("agent: {tau: {low: 0.1, high: 0.2}}", "write whole names, such as agent.tau"),
        ("total_steps: {low: 1, high: 2}", "total_steps: a sweep searches agent, buffer, env, num_envs, precision"),
        ("seed: {choices: [1, 2]}", "seed: a sweep searches agent,"),
        ("- agent.tau", "is no search space"),
        ("", "is no search space"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(RloptError, match=r"^[^\n]+$") as error:
        space_of(tmp_path, text)
    assert told in str(error.value)


def test_what_is_searched_is_not_fixed_too_and_a_group_leaves_its_options_alone() -> None:
    space = {"agent.tau": Range(low=0.1, high=0.2), "buffer": Choices(choices=["uniform", "lap"])}
    refuse_fixed(
        space, ["agent=td3", "buffer.capacity=100", "env=Pendulum-v1", "agent.gamma=0.9", "seed=3"], "the space"
    )
    for fixed in ("agent.tau=0.1", "buffer=lap", "~agent.tau", "++agent.tau=0.1"):
        with pytest.raises(RloptError, match="searched by the space; leave one of them out"):
            refuse_fixed(space, [fixed], "the space")
    nested = {"agent.network.hidden": Choices(choices=[[8], [4]])}
    with pytest.raises(RloptError, match=r"agent\.network\.hidden is searched"):
        refuse_fixed(nested, ["agent.network={hidden: [8]}"], "the space")
    with pytest.raises(RloptError, match=r"several values; write agent\.gamma: \{choices: "):
        refuse_fixed(space, ["agent.gamma=0.9,0.99"], "the space")
    for own in ("run_dir=x", "resume=x"):
        with pytest.raises(RloptError, match="lie below --root"):
            refuse_fixed(space, [own], "the space")


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 1e-05, -0.5, "lap", "1e-3", "a b", "x=y", "it's", "", [64, 64], [], {"a": [1, "b"]}, "null"],
)
def test_a_value_is_typed_so_that_it_is_read_as_itself(value: object) -> None:
    assert parse([word("x", value)])[0].value() == value
    assert isinstance(stored(value), (type(None), bool, int, float, str))


def test_the_value_of_an_option_is_found_by_its_name() -> None:
    config = train_config({"agent": "sac", "env": "Pendulum-v1", "env.kwargs": {"g": 9.8}})
    assert value_at(config, "agent.network.hidden") == [256, 256]
    assert (value_at(config, "env.kwargs.g"), value_at(config, "env"), value_at(config, "buffer")) == (
        9.8, "Pendulum-v1", "uniform",
    )  # fmt: skip
    with pytest.raises(KeyError):
        value_at(config, "env.kwargs.m")


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "spaces").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_spaces_fit_their_agents(file: Path) -> None:
    for point in examples(read_space(file)):
        train_config({"agent": file.stem, "env": "Pendulum-v1", **point})
