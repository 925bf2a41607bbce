"""Search spaces: which options a sweep varies and where it looks, read from YAML and checked before anything begins.

::

    agent.learning_rate: {low: 1e-4, high: 1e-2, log: true}
    agent.batch_size: {low: 64, high: 256, step: 64}
    agent.network.hidden: {choices: [[64, 64], [256, 256]]}

An entry is a dotted option, or a group (``buffer: {choices: [uniform, reshuffled]}``). Whether a range holds whole
numbers is the option's own affair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rlopt.config import build, option, plain
from rlopt.errors import RloptError
from rlopt.training.presets import GROUPS, parse, quote

if TYPE_CHECKING:
    from rlopt.loops.configuration import TrainConfig

_SEARCHED = ("agent", "buffer", "env", "num_envs", "precision", "overlap")
"""What makes two runs different experiments, and so may be searched."""
_FORM = "{low: …, high: …} (also log: true, step: …) or {choices: […]}"


@dataclass(frozen=True, kw_only=True)
class Range:
    """An interval, its ends included."""

    low: int | float
    high: int | float
    log: bool = option(False, "draw the logarithm uniformly")
    step: int | float | None = option(None, "only low, low + step, low + 2 step …", above=0.0)

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and self.low <= value <= self.high

    def example(self, index: int) -> Any:
        """Return its ends in turn."""
        return (self.low, self.high)[index % 2]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Values without an order."""

    choices: list[Any]

    def __contains__(self, value: object) -> bool:
        return value in self.choices

    def example(self, index: int) -> Any:
        """Return each value in turn."""
        return self.choices[index % len(self.choices)]


Space = Mapping[str, Range | Choices]
"""Options by dotted name."""
Params = Mapping[str, Any]
"""A point of a space, as options take it."""


def read_space(path: str | Path) -> Space:
    """Return the search space that a file holds.

    Raises:
        RloptError: it cannot be read, or an entry is none; in one line.
    """
    try:
        tree = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RloptError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict) or not tree:
        raise RloptError(f"{path} is no search space: it should hold lines such as agent.gamma: {{low: 0.9, high: 1}}")
    return {str(key): _entry(str(key), entry) for key, entry in tree.items()}


def _entry(key: str, entry: Any) -> Range | Choices:
    if key.split(".", maxsplit=1)[0] not in _SEARCHED:
        raise RloptError(f"{key}: a sweep searches {', '.join(_SEARCHED)}; give it beside the space, as in {key}=…")
    if not isinstance(entry, Mapping) or (key in GROUPS and "choices" not in entry):
        inner = next(iter(entry), None) if isinstance(entry, Mapping) else None
        nested = "" if inner is None else f"; write whole names, such as {key}.{inner}"
        raise RloptError(f"{key}: expected {_FORM}, got {entry}{nested}")
    if "choices" in entry:
        found = build(Choices, entry, key)
        if not found.choices or any(found.choices.count(one) > 1 for one in found.choices):
            raise RloptError(f"{key}.choices: needs different values, got {found.choices}")
        return found
    range_ = build(Range, entry, key)
    if not (math.isfinite(range_.low) and math.isfinite(range_.high) and range_.low < range_.high):
        raise RloptError(f"{key}: low must lie below high, and both be finite; got {range_.low:g} and {range_.high:g}")
    if range_.log and (range_.low <= 0 or range_.step is not None):
        raise RloptError(f"{key}: log: true needs low above 0 and no step; got low {range_.low:g}, step {range_.step}")
    if range_.step is not None and abs((count := (range_.high - range_.low) / range_.step) - round(count)) > 1e-9:
        raise RloptError(f"{key}: high must be low plus a multiple of step {range_.step:g}; got {range_.high:g}")
    return range_


def examples(space: Space) -> list[Params]:
    """Return points that together have both ends of every range and every choice."""
    count = max(2, *(len(one.choices) for one in space.values() if isinstance(one, Choices)), 0)
    return [{key: entry.example(i) for key, entry in space.items()} for i in range(count)]


def refuse_fixed(space: Space, overrides: Sequence[str], where: object) -> None:
    """Refuse overrides that a sweep would ignore: those it searches, and what belongs to single runs.

    Raises:
        RloptError: one line about the first.
    """
    for override in parse(overrides):
        key = override.get_key_element().lstrip("+~")
        if override.is_sweep_override():
            raise RloptError(f"{override.input_line}: several values; write {key}: {{choices: […]}} into {where}")
        if key in ("run_dir", "resume"):
            raise RloptError(f"{override.input_line}: the runs of a sweep lie below --root; leave {key} out")
        for name in space:
            # A group's word leaves its options alone: agent=sac beside agent.tau, and buffer beside buffer.capacity.
            above = name.startswith(f"{key}.") and key not in GROUPS
            if key == name or above or (key.startswith(f"{name}.") and name not in GROUPS):
                raise RloptError(f"{override.input_line}: {name} is searched by {where}; leave one of them out")


def value_at(config: TrainConfig, key: str) -> Any:
    """Return the value of a dotted option, plain; of a group its name. KeyError where there is none."""
    found: Any = config
    for name in [*key.split("."), *({"env": ["id"]}.get(key, ["name"]) if key in GROUPS else [])]:
        if isinstance(found, Mapping):
            found = found[name]
        elif not hasattr(found, name):
            raise KeyError(key)
        else:
            found = getattr(found, name)
    return plain(found)


def word(key: str, value: Any) -> str:
    """Return ``key=value`` as one would type it, but for a shell's own quotes."""
    return f"{key}={_text(value)}"


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_text(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_text, value)) + "]"
    if isinstance(value, str):
        try:
            return value if parse([f"x={value}"])[0].value() == value else quote(value)
        except RloptError:
            return quote(value)
    return repr(value)


def stored(choice: Any) -> Any:
    """Return a choice as Optuna keeps it: numbers, words and null as they are, all else as one would type it."""
    return choice if choice is None or isinstance(choice, (bool, int, float, str)) else word("", choice)[1:]
